"""inject: what it adapts, that it works in place, what it refuses, and what it reports."""

import re

import pytest
import torch
import torch.nn as nn
from toy_model import IDS, Model, adapted

import lora

Q, V = [f"layers.{i}.attn.q_proj" for i in (0, 1)], [f"layers.{i}.attn.v_proj" for i in (0, 1)]
MLP = [f"layers.{i}.mlp.{name}" for i in (0, 1) for name in ("up_proj", "down_proj")]

# ---- what is adapted -------------------------------------------------------------------------------------------

TARGETS = {
    "a name": ({"target_modules": ["q_proj"]}, Q),
    "two names": ({"target_modules": ["q_proj", "v_proj"]}, [Q[0], V[0], Q[1], V[1]]),
    "a dotted suffix": ({"target_modules": ["mlp.up_proj"]}, MLP[::2]),
    "a full name": ({"target_modules": ["layers.1.attn.v_proj"]}, V[1:]),
    "a regex": ({"target_modules": r"layers\.0\..*_proj"}, [Q[0], V[0], *MLP[:2]]),
    "a regex that is a name": ({"target_modules": "head"}, ["head"]),
    "all-linear": ({"target_modules": "all-linear"}, [Q[0], V[0], *MLP[:2], Q[1], V[1], *MLP[2:], "head"]),
    "an embedding": ({"target_modules": ["embed"]}, ["embed"]),
    "without a name": ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, Q),
    "without a suffix": ({"target_modules": "all-linear", "exclude_modules": ["0.mlp.up_proj", "head"]},
                         [Q[0], V[0], MLP[1], Q[1], V[1], *MLP[2:]]),
    "without a regex": ({"target_modules": ["q_proj"], "exclude_modules": r"layers\.0\..*"}, Q[1:]),
    "without what is saved": ({"target_modules": "all-linear", "modules_to_save": ["head"]},
                              [Q[0], V[0], *MLP[:2], Q[1], V[1], *MLP[2:]]),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), TARGETS.values(), ids=TARGETS)
def test_the_modules_that_the_config_speaks_of_are_adapted(fields, expected):
    model = Model()
    report = lora.inject(model, **fields)
    assert adapted(model) == expected
    assert [row.names[0] for row in report.modules] == expected


def test_all_linear_leaves_the_output_embedding_out():
    model = Model()
    model.get_output_embeddings = lambda: model.head
    lora.inject(model, target_modules="all-linear")
    assert "head" not in adapted(model)
    assert len(adapted(model)) == 8


def test_a_config_and_its_fields_say_the_same():
    one, other = Model(), Model()
    assert lora.inject(one, lora.LoraConfig(target_modules=["q_proj"], r=3)) == lora.inject(
        other, target_modules=["q_proj"], r=3
    )


@pytest.mark.parametrize(("args", "fields"), [((), {}), ((lora.LoraConfig(target_modules=["a"]),), {"r": 3})])
def test_either_a_config_or_its_fields_must_be_given(args, fields):
    with pytest.raises(TypeError, match="either a LoraConfig or its fields"):
        lora.inject(Model(), *args, **fields)


def test_rank_and_alpha_go_by_the_first_pattern_that_matches():
    model = Model()
    lora.inject(
        model,
        target_modules=["q_proj", "v_proj"],
        r=2,
        lora_alpha=6,
        rank_pattern={r"layers\.0\..*": 4, "q_proj": 1},
        alpha_pattern={"0.attn.v_proj": 10},
    )
    found = {name: (m.r, m.scaling) for name, m in model.named_modules() if isinstance(m, lora.LoRALayer)}
    assert found == {Q[0]: (4, 6 / 4), V[0]: (4, 10 / 4), Q[1]: (1, 6 / 1), V[1]: (2, 6 / 2)}
    assert model.layers[0].attn["q_proj"].lora_A.shape == (4, 8)


def test_rslora_scales_by_the_root_of_the_rank():
    model = Model()
    lora.inject(model, target_modules=["q_proj"], r=4, lora_alpha=6, use_rslora=True)
    assert model.layers[0].attn["q_proj"].scaling == 6 / 4**0.5


def test_splits_and_enable_lora_go_by_pattern():
    model = nn.ModuleDict({"qkv": nn.Linear(8, 16), "gate_up": nn.Linear(8, 10), "o": nn.Linear(8, 8)})
    lora.inject(
        model,
        target_modules="all-linear",
        r=2,
        splits={"qkv": (8, 4, 4), "gate.*": (5, 5)},
        enable_lora={"qkv": [1, 0, True]},
    )
    assert [type(m) for m in model.values()] == [lora.MergedLinear, lora.MergedLinear, lora.Linear]
    assert model["qkv"].splits == (8, 4, 4)
    assert model["qkv"].enable_lora == (True, False, True)
    assert model["qkv"].lora_A.shape == (4, 8)
    assert model["qkv"].lora_B.shape == (12, 2)
    assert model["gate_up"].lora_B.shape == (10, 2)


def test_convolutions_take_the_factored_form_unless_told_otherwise():
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 5)), nn.Conv1d(4, 6, 3))
    lora.inject(model, target_modules=["0"], r=2)
    assert model[0].lora_A.shape == (2, 4, 3, 5)
    lora.inject(model, target_modules=["1"], r=2, factored=False)
    assert model[1].lora_A.shape == (2, 12)


@pytest.mark.parametrize(
    ("base", "wanted", "expected"),
    [
        (torch.float64, None, torch.float64),
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_adapters_are_in_float32_where_the_weight_is_narrower(base, wanted, expected):
    model = Model().to(base)
    lora.inject(model, target_modules=["q_proj", "embed"], adapter_dtype=wanted)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {expected}
    assert model.layers[0].attn["q_proj"].weight.dtype == base


# ---- in place --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("merge_weights", [False, True])
def test_outputs_are_bit_identical_right_after(dtype, training, merge_weights):
    model = Model(tied=True).to(dtype).train(training)
    before = model(IDS)
    lora.inject(model, target_modules=".*(_proj|embed|head)", r=3, merge_weights=merge_weights, lora_dropout=0.5)
    with torch.set_grad_enabled(training):
        assert torch.equal(model(IDS), before)


def test_modules_parameters_ties_and_training_flags_stay():
    model = Model(tied=True)
    model.layers[0].eval()
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    flags = [module.training for module in modules]
    lora.inject(model, target_modules=".*(_proj|embed|head)")
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [module.training for module in modules] == flags
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert model.head.weight is model.embed.weight


def test_hooks_stay_and_run():
    model, calls = Model(), []
    layer = model.layers[0].attn["q_proj"]
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.weight.register_hook(lambda grad: calls.append("weight"))
    lora.inject(model, target_modules=["q_proj", "embed"])
    model(IDS).sum().backward()
    assert calls == ["pre", "forward", "backward"]


def test_a_layer_stays_where_it_is_expected():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv3d(4, 4, 1)
    )
    bases = [type(module) for module in model]
    lora.inject(model, target_modules=r"\d")
    assert all(isinstance(module, base) for module, base in zip(model, bases, strict=True))
    assert [type(module) for module in model] == [lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d]


def test_the_state_dict_gains_the_adapters_and_nothing_else():
    model = Model()
    before = set(model.state_dict())
    lora.inject(model, target_modules=["q_proj"], modules_to_save=["head"], bias="all", lora_dropout=0.1)
    assert set(model.state_dict()) - before == {f"{name}.{own}" for name in Q for own in ("lora_A", "lora_B")}
    assert before <= set(model.state_dict())


def test_a_step_moves_the_adapters_and_nothing_else():
    model = Model()
    lora.inject(model, target_modules=["q_proj", "embed"], r=2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(IDS).square().mean().backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"embed.lora_A", *(f"{name}.lora_B" for name in Q)}  # the other factor is zero at first


def test_a_layer_reached_under_two_names_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    report = lora.inject(model, target_modules=["b"], r=2)
    assert isinstance(model["a"], lora.Linear)
    assert report.modules[0].names == ("a", "b")
    assert report.trainable == 2 * (4 + 4)


def test_the_root_module_itself_can_be_adapted():
    layer = nn.Linear(4, 3)
    lora.inject(layer, target_modules="all-linear", r=2)
    assert isinstance(layer, lora.Linear)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}


def test_a_layer_of_ours_without_rank_is_adapted_like_a_plain_one():
    model = nn.Sequential(lora.Linear(4, 6, fan_in_fan_out=True), lora.MergedLinear(6, 6, r=4))
    x = torch.randn(3, 4)
    before = model(x)
    lora.inject(model, target_modules=["0", "1"], r=2)
    assert [m.r for m in model] == [2, 2]
    torch.testing.assert_close(model(x), before)


# ---- what is reported ------------------------------------------------------------------------------------------

TABLE = """\
module                kind       weight  r  scaling  parameters
embed                 Embedding  10 × 8  4  2                72
layers.0.attn.q_proj  Linear     8 × 8   2  4                32
layers.1.attn.q_proj  Linear     8 × 8   4  2                64
embed.weight is tied to head.weight, which the adapter leaves alone.
trained in full: layers.1.norm
trainable: 184 of 976 parameters (18.85 %)"""


def test_the_report_prints_as_a_table():
    model = Model(tied=True)
    report = lora.inject(
        model,
        target_modules=["embed", "q_proj"],
        r=4,
        lora_alpha=8,
        rank_pattern={re.escape(Q[0]): 2},
        modules_to_save=["layers.1.norm"],
    )
    assert str(report) == TABLE
    parameters = {id(p): p for p in model.parameters()}.values()
    assert report.total == sum(p.numel() for p in parameters)
    assert report.trainable == sum(p.numel() for p in parameters if p.requires_grad)


def test_shared_modules_are_reported_in_words():
    shared = nn.Linear(4, 4)
    report = lora.inject(nn.Sequential(shared, shared, nn.Linear(4, 4)), target_modules=["0"])
    assert "0 is one module with 1: they share the adapter." in str(report)
    assert not report.modules[0].tied_to


def test_weights_that_share_storage_are_reported_as_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    assert lora.inject(model, target_modules=["0"]).modules[0].tied_to == ("1.weight",)


def test_weights_that_are_all_one_are_reported_in_a_few_lines():
    """A report of 4,000 such layers was of 204 MB: it named each beside each other, as if none had an adapter."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(200)])
    for layer in model:
        layer.weight = model[0].weight
    report = lora.inject(model, target_modules=[str(i) for i in range(100)])
    assert {module.tied_to for module in report.modules} == {tuple(f"{i}.weight" for i in range(100, 200))}
    assert "0.weight is tied to 100.weight, 101.weight" in str(report)
    assert max(map(len, str(report).splitlines())) < 400
    lora.eject(model)
    assert {module.tied_to for module in lora.inject(model, target_modules="all-linear").modules} == {()}


def test_the_trainable_share_counts_biases_that_train():
    model = nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 4))
    report = lora.inject(model, target_modules=["0"], r=1, bias="all")
    assert (report.trainable, report.total) == (10 + 5 + 5 + 4, 50 + 5 + 20 + 4 + 15)
    assert str(report).endswith("trainable: 24 of 94 parameters (25.53 %)")
