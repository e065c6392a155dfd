"""Room for other adapters: what `lora.prepare_for_swap` changes, and what it does not, without a compiler."""

import copy
import pickle

import pytest
import torch
from conftest import KINDS, STORED, example, make, plain_twin
from pairwise import every_two
from torch import nn

import lora
from lora.layers.linear import LinearLoRA
from lora.swapping import Swappable

each_kind = pytest.mark.parametrize("kind", KINDS)
with_and_without_dora = pytest.mark.parametrize("use_dora", [False, True])
WITH_GROUPS = {"Conv2d factored": 2}  # whose rank is a multiple of its groups


def model_of(kind, r=2, lora_alpha=3, **arguments):
    model = nn.Sequential(make(kind, r=r, lora_alpha=lora_alpha, **arguments))
    lora.mark_only_lora_as_trainable(model)
    return model


def same_base(kind, prepared, **arguments):
    """A model on the same base weights, with another adapter."""
    other = model_of(kind, **arguments)
    for name in ("weight", "bias"):
        if isinstance(getattr(other[0], name, None), nn.Parameter):
            setattr(other[0], name, getattr(prepared[0], name))
    return other


def ranks_up_to(kind, most):
    step = WITH_GROUPS.get(kind, 1)
    return range(step, most + 1, step)


def tensors_and_settings(model):
    adapter = lora.adapter_of(model)
    return adapter.tensors, {name: dict(settings, base=None) for name, settings in adapter.modules.items()}


def assert_same_adapter(model, other):
    (tensors, settings), (others, other_settings) = tensors_and_settings(model), tensors_and_settings(other)
    assert settings == other_settings
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


# ---- preparing --------------------------------------------------------------------------------------------------


@every_two(kind=KINDS, use_dora=[False, True], mode=["train", "eval", "served"])
def test_a_prepared_model_computes_what_it_did(kind, use_dora, mode):
    model, x = (
        model_of(kind, use_dora=use_dora, dtype=torch.float64).train(mode == "train"),
        example(kind, torch.float64),
    )
    with torch.set_grad_enabled(mode != "served"):
        before = model(x)
        parameters = [*model.parameters()]
        lora.prepare_for_swap(model, 8)
        torch.testing.assert_close(model(x), before)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert (model[0].r, model[0].padded_from) == (8, (2, 3))
    assert model[0].scaling == 1.5
    assert model[0].lora_alpha == 12
    one = type(model[0]).lora_shapes(model[0], 8, **{k: getattr(model[0], k) for k in model[0].lora_settings[6:]})
    assert (tuple(model[0].lora_A.shape), tuple(model[0].lora_B.shape)) == one
    if not use_dora:
        torch.testing.assert_close(model(x), plain_twin(model[0])(x))


@each_kind
def test_the_keys_of_its_state_dict_and_its_trainable_parameters_stay(kind):
    model = model_of(kind)
    keys, trainable = [*model.state_dict()], [name for name, p in model.named_parameters() if p.requires_grad]
    lora.prepare_for_swap(model, 8)
    assert [*model.state_dict()] == keys
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    other = model_of(kind)
    lora.prepare_for_swap(other, 8)
    other.load_state_dict(model.state_dict())
    x = example(kind)
    assert torch.equal(other(x), model(x))


@each_kind
@with_and_without_dora
def test_it_trains_as_if_it_were_not_prepared(kind, use_dora):
    model, x = model_of(kind, use_dora=use_dora, dtype=torch.float64), example(kind, torch.float64)
    twin = copy.deepcopy(model)
    lora.prepare_for_swap(model, 8)
    for each in (model, twin):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        for _ in range(5):
            each(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    trained, expected = lora.adapter_of(model), lora.adapter_of(twin)
    assert trained.modules["0"]["r"] == 2
    torch.testing.assert_close(trained.tensors, {k: v.detach() for k, v in expected.tensors.items()})
    torch.testing.assert_close(model(x), twin(x))


@each_kind
def test_gradients_that_there_are_already_stay(kind):
    model, x = model_of(kind, dtype=torch.float64), example(kind, torch.float64)
    twin = copy.deepcopy(model)
    model(x).square().sum().backward()
    lora.prepare_for_swap(model, 6)
    lora.prepare_for_swap(twin, 6)
    twin(x).square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_without_gradients_it_has_none_afterwards():
    model = model_of("Linear")
    lora.prepare_for_swap(model, 6)
    assert all(parameter.grad is None for parameter in model.parameters())


@each_kind
def test_it_may_be_prepared_again_for_a_larger_rank(kind):
    model, x = model_of(kind, dtype=torch.float64), example(kind, torch.float64)
    twin = copy.deepcopy(model)
    for max_r in (4, 4, 8):
        lora.prepare_for_swap(model, max_r)
    assert (model[0].r, model[0].padded_from) == (8, (2, 3))
    torch.testing.assert_close(model(x), twin(x))
    assert_same_adapter(model, twin)


def test_a_factored_convolution_gets_the_next_rank_that_its_groups_divide():
    model = model_of("Conv2d factored")
    lora.prepare_for_swap(model, 5)
    assert model[0].r == 6
    other = same_base("Conv2d factored", model, r=6)
    lora.load_adapter(model, lora.adapter_of(other))
    assert_same_adapter(model, other)


def test_layers_of_rank_zero_stay_as_they_are():
    model = nn.Sequential(make("Linear"), make("Linear", r=0))
    lora.prepare_for_swap(model, 4)
    assert [layer.r for layer in model] == [4, 0]
    assert not isinstance(model[1], Swappable)


def test_it_says_so_when_printed():
    layer = lora.Linear(6, 5, r=2, merge_weights=False)
    lora.prepare_for_swap(layer, 4)
    assert repr(layer) == "Linear(in_features=6, out_features=5, bias=True, r=4, lora_alpha=2, padded_from=(2, 1))"


# ---- swapping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORED)
@with_and_without_dora
def test_adapters_of_any_rank_load_and_are_saved_as_they_were(kind, use_dora, tmp_path):
    model, x = model_of(kind, use_dora=use_dora, dtype=torch.float64), example(kind, torch.float64)
    lora.prepare_for_swap(model, 6)
    for r in reversed(ranks_up_to(kind, 6)):
        other = same_base(
            kind, model, r=r, lora_alpha=0.1 * r, use_dora=use_dora, use_rslora=r == 4, dtype=torch.float64
        )
        other[0].scaling *= 1.25
        lora.save_adapter(other, tmp_path / "other")
        lora.load_adapter(model, tmp_path / "other")
        torch.testing.assert_close(model(x), other(x))
        assert model[0].scaling == other[0].scaling
        lora.save_adapter(model, tmp_path / "model")
        saved, expected = (lora.read_adapter(tmp_path / name) for name in ("model", "other"))
        assert saved.modules == expected.modules
        torch.testing.assert_close(saved.tensors, expected.tensors, rtol=0, atol=0)


def test_each_layer_takes_a_rank_of_its_own():
    model, other = (nn.Sequential(make("Linear", r=2), nn.ReLU(), make("MergedLinear", r=2)) for _ in range(2))
    lora.prepare_for_swap(model, 8)
    other[0], other[2] = make("Linear", r=7), make("MergedLinear", r=1)
    lora.load_adapter(model, lora.adapter_of(other), check_base=False)
    assert_same_adapter(model, other)


def test_a_larger_rank_is_refused_and_every_layer_that_has_no_room_is_listed():
    model, other = (nn.Sequential(make("Linear"), make("Embedding"), make("Conv1d")) for _ in range(2))
    lora.mark_only_lora_as_trainable(model)
    lora.prepare_for_swap(model, 4)
    other[0], other[2] = make("Linear", r=5), make("Conv1d", r=9)
    lora.mark_only_lora_as_trainable(other)
    before, adapter = copy.deepcopy(model.state_dict()), tensors_and_settings(model)
    with pytest.raises(lora.AdapterError) as error:
        lora.load_adapter(model, lora.adapter_of(other), check_base=False)
    assert str(error.value) == (
        "load_adapter: the adapter is not loaded, because\n"
        "  - 0: `r` is 5 in the file, and the model is prepared for at most 4.\n"
        "  - 2: `r` is 9 in the file, and the model is prepared for at most 4."
    )
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert tensors_and_settings(model)[1] == adapter[1]


@pytest.mark.parametrize("r", [1, 2, 3, 6])
@pytest.mark.parametrize("form", ["single", "by split"])
def test_pefts_files_load_into_prepared_layers(r, form, tmp_path):
    """One A for all splits of a fused layer, or a block for each, at ranks that are not the layer's."""
    model, x = model_of("MergedLinear", dtype=torch.float64, enable_lora=True), example("MergedLinear", torch.float64)
    lora.prepare_for_swap(model, 6)
    if form == "single":
        other = nn.Sequential(make("Linear", r=r, out_features=9, dtype=torch.float64))
        lora.mark_only_lora_as_trainable(other)
        other[0].weight, other[0].bias = model[0].weight, model[0].bias
    else:
        other = same_base("MergedLinear", model, r=r, dtype=torch.float64, enable_lora=True)
    lora.save_adapter(other, tmp_path, format="peft")
    lora.load_adapter(model, tmp_path, check_base=False)
    torch.testing.assert_close(model(x), other(x))
    assert lora.adapter_of(model).modules["0"]["r"] == r


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear", "Conv2d factored", "Embedding"])
@pytest.mark.parametrize("r", [10, 40])
def test_pefts_files_of_larger_ranks_are_refused(kind, r, tmp_path):
    model = model_of(kind)
    lora.prepare_for_swap(model, 6)
    lora.save_adapter(model_of(kind, r=r), tmp_path, format="peft")
    with pytest.raises(lora.AdapterError, match="in the file, and the model is prepared for at most"):
        lora.load_adapter(model, tmp_path, check_base=False)


def test_a_single_pair_that_has_no_room_is_told_the_rank_of_the_layer(tmp_path):
    model = model_of("MergedLinear")
    lora.prepare_for_swap(model, 6)
    lora.save_adapter(model_of("Linear", r=9, out_features=9), tmp_path, format="peft")
    with pytest.raises(lora.AdapterError, match="`r` is 9 in the file, and the model is prepared for at most 6"):
        lora.load_adapter(model, tmp_path, check_base=False)


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear", "Conv1d", "Embedding"])
def test_loralibs_files_load_into_prepared_layers(kind, tmp_path):
    model, other = model_of(kind), model_of(kind, r=3, lora_alpha=6)
    lora.prepare_for_swap(model, 8)
    torch.save(lora.lora_state_dict(other), tmp_path / "loralib.pt")
    lora.load_adapter(model, tmp_path / "loralib.pt", lora_alpha=6, check_base=False)
    got, expected = lora.adapter_of(model), lora.adapter_of(other)
    assert got.modules["0"]["r"] == 3
    torch.testing.assert_close(got.delta("0"), expected.delta("0"))


def test_an_adapter_of_another_form_is_refused_as_ever():
    model = model_of("MergedLinear")
    lora.prepare_for_swap(model, 8)
    other = model_of("MergedLinear", splits=(3, 3, 3))
    with pytest.raises(lora.AdapterError, match="`splits` is"):
        lora.load_adapter(model, lora.adapter_of(other), check_base=False)


def test_what_is_written_beyond_the_adapters_rank_is_not_left_out():
    model = model_of("MergedLinear")
    lora.prepare_for_swap(model, 4)
    assert lora.adapter_of(model).modules["0"]["r"] == 2
    for factor in (model[0].lora_A, model[0].lora_B):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            dict(twin.named_parameters())[f"0.{'lora_A' if factor is model[0].lora_A else 'lora_B'}"][-1, -1] = 1.0
        adapter = lora.adapter_of(twin)
        assert adapter.modules["0"]["r"] == 4
        assert torch.equal(adapter.tensors["0.lora_A"], twin[0].lora_A)
        assert torch.equal(adapter.tensors["0.lora_B"], twin[0].lora_B)


def test_started_again_it_has_the_whole_rank():
    model = model_of("Linear")
    lora.prepare_for_swap(model, 4)
    lora.initialize(model, True)
    assert lora.adapter_of(model).modules["0"]["r"] == 4
    assert lora.adapter_of(model).modules["0"]["lora_alpha"] == 6


# ---- what a compiler reads --------------------------------------------------------------------------------------


def switches(layer):
    return {name: buffer.tolist() for name, buffer in layer.named_buffers()}


def test_the_tensors_follow_the_layer():
    layer = make("Linear", lora_alpha=4)
    lora.prepare_for_swap(layer, 4)
    first = layer.lora_scale
    assert switches(layer) == {"lora_scale": [2, 1], "lora_scale_off": [0, 0]}
    layer.scaling = 0.5
    assert switches(layer) == {"lora_scale": [0.5, 1], "lora_scale_off": [0, 0]}
    with lora.disabled(layer):
        assert switches(layer) == {"lora_scale": [0, 0], "lora_scale_off": [0.5, 1]}
        with lora.disabled(layer):
            assert switches(layer)["lora_scale"] == [0, 0]
            layer.scaling = 3.0
        assert switches(layer) == {"lora_scale": [0, 0], "lora_scale_off": [3, 1]}
    assert switches(layer) == {"lora_scale": [3, 1], "lora_scale_off": [0, 0]}
    assert layer.lora_scale is first  # where a CUDA graph has it


def test_the_scaling_keeps_its_digits_whatever_the_layer_is_cast_to():
    layer = make("Linear")
    lora.prepare_for_swap(layer, 4)
    layer.scaling = 0.3
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        layer.to(dtype)
        assert layer.lora_scale.dtype == kept
        assert layer.lora_scale[0] == torch.tensor(0.3, dtype=kept)


def test_prepared_on_meta_it_is_right_after_to_empty():
    layer, source = lora.Linear(6, 5, r=2, lora_alpha=3, device="meta"), make("Linear")
    for each in (layer, source):
        lora.prepare_for_swap(each, 4)
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert switches(layer) == {"lora_scale": [1.5, 1], "lora_scale_off": [0, 0]}
    x = example("Linear")
    torch.testing.assert_close(layer(x), source(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_prepared_and_have_tensors_of_their_own(copied):
    layer, x = make("MergedLinear"), example("MergedLinear")
    lora.prepare_for_swap(layer, 4)
    with lora.disabled(layer):
        off = copied(layer)
        assert switches(off)["lora_scale"] == [0, 0]
    other = copied(layer)
    assert repr(other) == repr(layer)
    assert torch.equal(other(x), layer(x))
    other.scaling = 5.0
    assert switches(layer)["lora_scale"] == switches(off)["lora_scale"] == [1.5, 1]  # the block is left for all
    assert switches(other)["lora_scale"] == [5, 1]


def test_prepared_in_inference_mode_it_trains():
    layer = make("Linear")
    with torch.inference_mode():
        lora.prepare_for_swap(layer, 4)
        layer.scaling = 2.0
    assert not layer.lora_scale.is_inference()
    assert switches(layer)["lora_scale"] == [2, 1]
    layer(example("Linear")).sum().backward()
    assert layer.lora_A.grad.any()


def test_a_load_that_fails_leaves_the_tensors_as_they_were(monkeypatch):
    model, other = model_of("Linear"), model_of("Linear", r=1, lora_alpha=9)
    lora.prepare_for_swap(model, 4)
    before = tensors_and_settings(model)
    monkeypatch.setattr("lora.layers.weights.Plain.write", lambda self, value: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora.load_adapter(model, lora.adapter_of(other), check_base=False)
    assert switches(model[0])["lora_scale"] == [1.5, 1]
    assert (model[0].scaling, model[0].padded_from) == (1.5, (2, 3))
    assert tensors_and_settings(model)[1] == before[1]


# ---- out of it again --------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("out", [lora.merge, lora.eject])
def test_merged_or_ejected_nothing_is_left_of_it(kind, out):
    model, x = model_of(kind, dtype=torch.float64), example(kind, torch.float64)
    plain = copy.deepcopy(model)
    lora.prepare_for_swap(model, 6)
    for each in (plain, model):
        out(each)
    torch.testing.assert_close(model(x), plain(x))
    assert type(model[0]) is type(plain[0])
    assert vars(model[0]).keys() == vars(plain[0]).keys()
    assert not model[0]._buffers
    assert not model[0]._non_persistent_buffers_set
    lora.inject(model, target_modules=["0"], r=2)
    assert not isinstance(model[0], Swappable)


# ---- what is refused --------------------------------------------------------------------------------------------


class OwnForward(LinearLoRA):
    """A user's kind whose forward nobody knows."""

    def lora_forward(self, input, *args, **kwargs):
        return super().lora_forward(input, *args, **kwargs) + self.scaling


class Opaque(nn.Linear):
    pass


class NoBlocks(lora.LoRALayer):
    """A user's kind that says the four things only."""

    @classmethod
    def lora_shapes(cls, base, r, **settings):
        return (r, base.in_features), (base.out_features, r)

    def lora_down(self, x, A):
        return x @ A.T

    def lora_up(self, h, B):
        return h @ B.T

    def lora_delta(self, A, B):
        return B @ A


def adapted_as(kind):
    module = Opaque(6, 6)
    lora.register(Opaque, kind)
    lora.inject(module, target_modules=[""], r=2)
    return module


def test_everything_that_cannot_be_prepared_is_listed_and_nothing_is_changed():
    from_weight, waits = make("Linear"), make("Linear")
    lora.initialize(from_weight, "pissa")
    lora.initialize(waits, "eva")
    model = nn.Sequential(
        make("Linear", r=5), from_weight, waits, adapted_as(OwnForward), adapted_as(NoBlocks), make("Linear")
    )
    before = repr(model), {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="nothing was changed") as error:
        lora.prepare_for_swap(model, 4)
    assert str(error.value) == (
        "prepare_for_swap: nothing was changed, because\n"
        "  - 0: `max_r` (=4) must be at least its rank, 5.\n"
        "  - 1: its adapter started as a part of its base weight, without which it would be another model's; save it "
        "with `lora.save_adapter`, and load it into the plain base model.\n"
        "  - 2: waits for data (`init_lora_weights='eva'`); call `lora.calibrate` first.\n"
        "  - 3: its kind has a `lora_forward` of its own (OwnForward), which may take the scaling for a constant.\n"
        "  - 4: the kind Opaque does not say of what blocks its update is made."
    )
    assert (repr(model), {name: tensor.shape for name, tensor in model.state_dict().items()}) == before


@pytest.mark.parametrize("max_r", [2.0, True, "8", None])
def test_a_rank_that_is_no_integer_is_refused(max_r):
    with pytest.raises(TypeError, match=f"`max_r` must be an integer, got {max_r!r}"):
        lora.prepare_for_swap(model_of("Linear"), max_r)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="there is no LoRA layer in this Linear"):
        lora.prepare_for_swap(nn.Linear(2, 2), 4)
    with pytest.raises(ValueError, match="no LoRA layer has a rank above 0"):
        lora.prepare_for_swap(make("Linear", r=0), 4)
    model = model_of("Linear")
    with lora.disabled(model), pytest.raises(ValueError, match="LoRA is disabled"):
        lora.prepare_for_swap(model, 4)


# ---- ranks ------------------------------------------------------------------------------------------------------


def swap_in_sharded_model(path):
    from torch.distributed.fsdp import fully_shard

    model, other, x = model_of("MergedLinear"), model_of("MergedLinear", r=3), example("MergedLinear")
    lora.prepare_for_swap(model, 6)
    lora.load_adapter(model, lora.adapter_of(other), check_base=False)
    expected = model(x).detach()
    lora.load_adapter(model, lora.adapter_of(model_of("MergedLinear", r=1)), check_base=False)
    fully_shard(model)
    with pytest.raises(ValueError, match="0: is sharded; prepare the model, then shard it"):
        lora.prepare_for_swap(model, 8)
    lora.load_adapter(model, lora.adapter_of(other), check_base=False)
    torch.testing.assert_close(model(x).detach(), expected)
    lora.save_adapter(model, path)
    return lora.adapter_of(model).modules["0"]["r"], switches(model[0])["lora_scale"]


def test_a_sharded_model_swaps_as_a_whole_one_does(ranks, tmp_path):
    path = tmp_path / "adapter.safetensors"
    assert ranks.run(swap_in_sharded_model, path) == [(3, [1, 1])] * 2
    assert lora.read_adapter(path).modules["0"]["r"] == 3


def prepare_after_wrapping():
    wrapped = nn.parallel.DistributedDataParallel(model_of("Linear"))
    with pytest.raises(ValueError, match="is wrapped in DistributedDataParallel, which knows the sizes"):
        lora.prepare_for_swap(wrapped, 4)
    return wrapped.module[0].r


def test_replicas_are_prepared_before_they_are_wrapped(ranks):
    assert ranks.run(prepare_after_wrapping) == [2, 2]
