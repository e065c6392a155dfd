"""Room for other adapters: what is refused at a smaller rank, files, caches, hooks, tensor parallelism."""

import copy
import dataclasses

import pytest
import torch
from conftest import example, make
from releases import since
from test_swap import model_of, same_base, switches, tensors_and_settings
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import parallelize_module

import lora
import lora.parallel

# ---- what does not fit -------------------------------------------------------------------------------------------

OTHERS = {
    "more inputs": (lambda: lora.Linear(6, 4, r=2), lambda: lora.Linear(7, 4, r=1), "0.lora_A"),
    "fewer outputs": (lambda: lora.Linear(6, 4, r=2), lambda: lora.Linear(6, 3, r=1), "0.lora_B"),
    "more outputs": (lambda: lora.Linear(6, 4, r=2), lambda: lora.Linear(6, 9, r=1), "0.lora_B"),
    "another kernel": (lambda: lora.Conv1d(4, 4, 3, r=2), lambda: lora.Conv1d(4, 4, 5, r=1), "0.lora_"),
    "rows of one split more": (
        lambda: lora.MergedLinear(6, 9, r=2, splits=(3, 3, 3), enable_lora=(True, False, True)),
        lambda: lora.MergedLinear(6, 9, r=1, splits=(3, 3, 3), enable_lora=(True, True, True)),
        "0.lora_",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_an_adapter_of_a_smaller_rank_and_other_sizes_is_refused_as_by_any_model(what):
    ours, theirs, named = OTHERS[what]
    model, other = nn.Sequential(ours()), nn.Sequential(theirs())
    lora.prepare_for_swap(model, 4)
    before, adapter = copy.deepcopy(model.state_dict()), tensors_and_settings(model)
    with pytest.raises(lora.AdapterError) as error:
        lora.load_adapter(model, lora.adapter_of(other), check_base=False)
    assert named in str(error.value) or "0: " in str(error.value)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert tensors_and_settings(model)[1] == adapter[1]


def test_a_prepared_models_state_does_not_go_into_one_that_is_not_prepared():
    model, plain = model_of("Linear"), model_of("Linear")
    lora.prepare_for_swap(model, 4)
    with pytest.raises(RuntimeError, match=r"(?s)size mismatch for 0\.lora_A.*size mismatch for 0\.lora_B"):
        plain.load_state_dict(model.state_dict())


# ---- what a swap leaves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_and_lora_alpha_of_the_layer_give_its_scaling_after_every_swap(use_rslora):
    model = model_of("Linear")
    lora.prepare_for_swap(model, 8)
    for r in (1, 8, 4):
        lora.load_adapter(model, lora.adapter_of(model_of("Linear", r=r, use_rslora=use_rslora)), check_base=False)
        layer = model[0]
        assert layer.scaling == pytest.approx(3 / r ** (0.5 if use_rslora else 1))
        assert layer.lora_alpha / layer.r ** (0.5 if use_rslora else 1) == pytest.approx(layer.scaling)
        assert layer.padded_from == (r, 3)
    lora.initialize(model, True)  # which uses all of the rank
    saved = lora.adapter_of(model).modules["0"]
    assert saved["r"] == 8
    assert saved["lora_alpha"] == pytest.approx(saved["scaling"] * 8 ** (0.5 if use_rslora else 1))


@pytest.mark.parametrize("format", ["lora", "peft", "portable"])
def test_files_of_a_prepared_model_are_those_of_one_that_is_not(format, tmp_path):
    model = nn.Sequential(make("Linear", r=2, lora_alpha=3), make("MergedLinear", r=3, lora_alpha=5))
    lora.mark_only_lora_as_trainable(model)
    plain = copy.deepcopy(model)
    lora.prepare_for_swap(model, 5)
    for each, name in ((model, "prepared"), (plain, "plain")):
        lora.save_adapter(each, tmp_path / name, format=format)
    ours, theirs = (lora.read_adapter(tmp_path / name) for name in ("prepared", "plain"))
    assert ours.modules == theirs.modules
    torch.testing.assert_close(ours.tensors, theirs.tensors, rtol=0, atol=0)


def test_the_merged_weight_that_serves_is_that_of_the_adapter_that_is_there():
    model, x = model_of("Linear", merge_weights=True, dtype=torch.float64).eval(), example("Linear", torch.float64)
    lora.prepare_for_swap(model, 4)
    with torch.no_grad():
        for r in (1, 4, 2):
            other = same_base("Linear", model, r=r, lora_alpha=7, dtype=torch.float64)
            lora.load_adapter(model, lora.adapter_of(other))
            torch.testing.assert_close(model(x), other(x))
        for each in (model, other):
            each[0].scaling = 5.0
        torch.testing.assert_close(model(x), other(x))
        lora.prepare_for_swap(model, 8)
        torch.testing.assert_close(model(x), other(x))


def test_with_a_frozen_A_what_trains_stays_within_the_adapters_rank():
    model, x = model_of("Linear", lora_dropout=0.3), example("Linear")
    lora.prepare_for_swap(model, 6)
    lora.mark_only_lora_as_trainable(model, freeze_A=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(5):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert lora.adapter_of(model).modules["0"]["r"] == 2


def test_hooks_of_parameters_see_gradients_of_the_new_size():
    model, seen = model_of("Linear"), []
    for parameter in (model[0].lora_A, model[0].lora_B):
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    model(example("Linear")).sum().backward()
    lora.prepare_for_swap(model, 4)
    model(example("Linear")).sum().backward()
    rows, columns = model[0].lora_B.shape[0], model[0].lora_A.shape[1]
    assert sorted(seen) == sorted([(2, columns), (rows, 2), (4, columns), (rows, 4)])


def test_generators_that_end_in_any_order_leave_it_enabled():
    model, x = model_of("Linear"), example("Linear")
    lora.prepare_for_swap(model, 4)
    enabled = model(x)

    def reference():
        with lora.disabled(model):
            yield model(x)
            yield model(x)

    first, second = reference(), reference()
    assert torch.equal(next(first), next(second))
    first.close()
    assert switches(model[0])["lora_scale"] == [0, 0]
    model.bfloat16().float()  # a cast in between keeps the two apart
    assert switches(model[0]) == {"lora_scale": [0, 0], "lora_scale_off": [1.5, 1]}
    second.close()
    assert switches(model[0]) == {"lora_scale": [1.5, 1], "lora_scale_off": [0, 0]}
    torch.testing.assert_close(model(x), enabled, rtol=0.02, atol=0.02)


def test_what_is_cut_out_of_a_prepared_layer_holds_no_graph_and_no_memory_of_it():
    model = model_of("MergedLinear")
    lora.prepare_for_swap(model, 4)
    adapter = lora.adapter_of(model)
    for name in ("lora_A", "lora_B"):
        assert not adapter.tensors[f"0.{name}"].requires_grad
    adapter.tensors["0.lora_A"].fill_(7)
    assert not (model[0].lora_A == 7).any()


def test_emptied_in_inference_mode_it_can_be_swapped_and_trained_outside_of_it():
    layer = make("Linear")
    lora.prepare_for_swap(layer, 4)
    with torch.inference_mode():
        layer.to_empty(device="cpu")
    assert not layer.lora_scale.is_inference()
    layer.scaling = 2.0
    assert switches(layer) == {"lora_scale": [2, 1], "lora_scale_off": [0, 0]}


# ---- ranks -------------------------------------------------------------------------------------------------------


divides = since("2.11", "lora.parallel divides no layers")


def swap_under_tensor_parallelism():
    def made(r):
        torch.manual_seed(0)
        layers = [
            lora.MergedLinear(6, 16, splits=(8, 4, 4), enable_lora=(True, False, True), dtype=torch.float64),
            lora.Linear(16, 6, dtype=torch.float64),
        ]
        model = nn.Sequential(*layers).requires_grad_(False)
        splits = {"0": (8, 4, 4)}
        enabled = {"0": (True, False, True)}
        lora.inject(model, target_modules=["0", "1"], r=r, lora_alpha=7, splits=splits, enable_lora=enabled)
        with torch.no_grad():
            for layer in model:
                layer.lora_B.normal_()
        return model

    model, x = made(2), torch.ones(3, 6, dtype=torch.float64)
    lora.prepare_for_swap(model, 4)
    col = lora.parallel.MergedColwiseParallel(output_layouts=Replicate())
    parallelize_module(
        model, init_device_mesh("cpu", (2,)), {"0": col, "1": lora.parallel.RowwiseParallel(input_layouts=Replicate())}
    )
    with pytest.raises(ValueError, match=r"(?s)0: is sharded.*1: is sharded; prepare the model, then shard it"):
        lora.prepare_for_swap(model, 8)
    found = []
    for r in (1, 4, 3):
        other = made(r)
        lora.load_adapter(model, lora.adapter_of(other))
        torch.testing.assert_close(model(x), other(x))
        with lora.disabled(model), lora.disabled(other):
            torch.testing.assert_close(model(x), other(x))
        found.append([settings["r"] for settings in lora.adapter_of(model).modules.values()])
    return found


@divides
def test_a_divided_model_swaps_as_a_whole_one_does(ranks):
    assert ranks.run(swap_under_tensor_parallelism) == [[[1, 1], [4, 4], [3, 3]]] * 2


def compiled_under_tensor_parallelism():
    torch._dynamo.reset()
    torch.manual_seed(0)
    alone = nn.Sequential(make("Linear", dtype=torch.float64), nn.ReLU())
    model, x = copy.deepcopy(alone), example("Linear", torch.float64)
    lora.prepare_for_swap(model, 4)
    style = lora.parallel.ColwiseParallel(output_layouts=Replicate())
    compiled = torch.compile(
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": style}), backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), alone(x))
    for each in (model, alone):
        each[0].scaling = 5.0
    torch.testing.assert_close(compiled(x), alone(x))
    with lora.disabled(model), lora.disabled(alone):
        torch.testing.assert_close(compiled(x), alone(x))


@divides
@pytest.mark.slow
def test_a_divided_model_that_is_prepared_compiles(ranks):
    ranks.run(compiled_under_tensor_parallelism)


# ---- what a reviewer found --------------------------------------------------------------------------------------


def test_assigned_from_meta_its_tensors_are_where_its_parameters_are():
    layer, source = lora.Linear(6, 5, r=2, lora_alpha=3, device="meta"), make("Linear")
    for each in (layer, source):
        lora.prepare_for_swap(each, 4)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert switches(layer) == {"lora_scale": [1.5, 1], "lora_scale_off": [0, 0]}


def test_assigned_in_another_dtype_its_scaling_has_all_its_digits():
    model = model_of("Linear")
    lora.prepare_for_swap(model, 4)
    model[0].scaling = 0.3
    model.load_state_dict(copy.deepcopy(model).double().state_dict(), assign=True)
    assert model[0].lora_scale.tolist() == [0.3, 1]


def test_a_model_that_was_made_in_inference_mode_serves_on():
    with torch.inference_mode():
        model, x = model_of("Linear").eval(), example("Linear")
        before = model(x)
    lora.prepare_for_swap(model, 4)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), before)


def test_ranks_that_calibration_would_share_out_are_refused_where_there_is_room():
    model = nn.Sequential(lora.Linear(6, 6, r=2), lora.Linear(6, 6, r=2))
    lora.prepare_for_swap(model, 3)
    lora.initialize(model, "eva")
    with pytest.raises(ValueError, match=r"`rho` \(=2.0\) would take the room of layers that are prepared for swaps"):
        lora.calibrate(model, [torch.randn(64, 6)], rho=2.0)


def test_a_layer_that_uses_the_names_itself_is_refused_and_nothing_is_changed():
    class Scaled(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.register_buffer("lora_scale", torch.ones(1))
            self.padded_from = "the left"

        def _gated(self, x):
            return x

    model = nn.Sequential(nn.Linear(6, 6), Scaled(6, 6))
    lora.inject(model, target_modules=["0", "1"], r=2)
    with pytest.raises(ValueError, match=r"1: uses names that .* needs: _gated, lora_scale, padded_from\."):
        lora.prepare_for_swap(model, 4)
    assert [layer.r for layer in model] == [2, 2]
    assert model[1].lora_scale.tolist() == [1]


@pytest.mark.parametrize("made_there", [True, False])
def test_in_inference_mode_adapters_made_there_are_loaded_and_saved(tmp_path, made_there):
    model = model_of("Linear").eval()
    with torch.inference_mode():
        model, other = model_of("Linear") if made_there else model, model_of("Linear", r=2)
        lora.save_adapter(other, tmp_path / "adapter.safetensors")
        lora.load_adapter(model, lora.adapter_of(other), check_base=False)
        lora.load_adapter(model, tmp_path / "adapter.safetensors", check_base=False)


class Doubled(lora.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_forward_of_a_users_class_is_kept_in_a_compiled_model():
    model = nn.Sequential(Doubled(6, 4, r=2, init_lora_weights=False))
    x = torch.randn(3, 6)
    before = model(x)
    lora.prepare_for_swap(model, 4)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), before)


def test_a_forward_that_hooks_have_kept_reads_the_scaling_from_a_tensor():
    model = nn.Sequential(lora.Linear(6, 4, r=2, init_lora_weights=False))
    model[0].forward = model[0].forward  # as accelerate's hooks keep it
    lora.prepare_for_swap(model, 4)
    graphs, x = [], torch.randn(3, 6)
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph)
    for scaling in (1.0, 2.0, 3.0):
        model[0].scaling = scaling
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1


def test_a_scaling_that_nothing_can_be_multiplied_by_is_named_with_the_layer():
    model, other = (nn.Sequential(*(lora.Linear(6, 4, r=1) for _ in range(2))) for _ in range(2))
    lora.prepare_for_swap(model, 64)
    other[0].scaling = 3.0
    adapter = lora.adapter_of(other)
    adapter = dataclasses.replace(adapter, modules=adapter.modules | {"1": {**adapter.modules["1"], "scaling": 1e308}})
    with pytest.raises(
        lora.AdapterError, match=r"1: `scaling` must be a finite number of at most 3.4e\+38, got 1e\+308"
    ):
        lora.load_adapter(model, adapter, check_base=False)
    assert model[0].scaling == 1
