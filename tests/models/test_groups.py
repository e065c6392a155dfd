"""lora.param_groups: each trainable parameter in one group, at the right rate; and LoRA-FA, which freezes A."""

import copy
import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from counting import kept_for_backward
from hypothesis import given
from torch import nn
from toy_model import IDS, Model, snapshot

import lora
from lora.models.training import param_groups

LR, RATIO, DECAY = 1e-3, 10.0, 0.1
TARGETS = ["q_proj", "v_proj", "embed"]


def adapted(**fields):
    model = Model(fields.pop("tied", False))
    lora.inject(model, **{"target_modules": TARGETS, "r": 2, **fields})
    return model


def names_by_group(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def everything():
    model = adapted(bias="all", modules_to_save=["head", "norm"])
    model.extra = lora.Linear(4, 4, r=2, use_dora=True)
    model.extra.weight.requires_grad_(False)
    return model


# ---- which group, at which rate ----------------------------------------------------------------------------------


def test_what_is_in_which_group_and_at_which_rate():
    model = everything()
    groups = param_groups(model, LR, RATIO, DECAY)
    attention = [f"layers.{layer}.attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
    mlp = [f"layers.{layer}.mlp.{name}" for layer in (0, 1) for name in ("up_proj", "down_proj")]
    norms = [f"layers.{layer}.norm" for layer in (0, 1)]
    with_bias = [name for name in attention if "q_proj" in name] + mlp + norms + ["extra"]
    assert names_by_group(model, groups) == {
        "lora_A": {f"{name}.lora_A" for name in [*attention, "extra"]},
        "lora_B": {f"{name}.lora_B" for name in [*attention, "extra"]},
        "embedding_A": {"embed.lora_A"},
        "embedding_B": {"embed.lora_B"},
        "lora_magnitude": {"extra.lora_magnitude"},
        "biases": {f"{name}.bias" for name in with_bias},
        "weights": {"head.weight"},
        "norms": {f"{name}.weight" for name in norms},
    }
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "lora_A": (LR, DECAY),
        "lora_B": (LR * RATIO, DECAY),
        "embedding_A": (LR * RATIO, DECAY),
        "embedding_B": (LR, DECAY),
        "lora_magnitude": (LR, 0),
        "biases": (LR, 0),
        "weights": (LR, DECAY),
        "norms": (LR, 0),
    }


def test_the_raised_rate_is_that_of_the_factor_that_starts_at_zero():
    model = adapted()
    for group in param_groups(model, LR, RATIO):
        zero = {not parameter.any() for parameter in group["params"]}
        assert zero == {group["lr"] == LR * RATIO}


def test_embeddings_can_have_a_rate_of_their_own():
    groups = param_groups(adapted(), LR, RATIO, lr_embedding=1e-6)
    assert {group["name"]: group["lr"] for group in groups} == {
        "lora_A": LR, "lora_B": LR * RATIO, "embedding_A": 1e-6, "embedding_B": 1e-6,
    }  # fmt: skip


def test_the_defaults_are_the_papers_ratio_and_no_decay():
    assert [
        (group["lr"], group["weight_decay"]) for group in param_groups(lora.Linear(4, 4, r=2, bias=False), 0.5)
    ] == [
        (0.5, 0),
        (8.0, 0),
    ]


def test_norms_are_told_by_their_class_and_vectors_by_their_shape():
    model = nn.ModuleDict({
        "a": nn.Linear(4, 4), "layer": nn.LayerNorm((2, 4)), "rms": nn.RMSNorm((2, 4)), "batch": nn.BatchNorm1d(4),
        "scale": nn.PReLU(4), "rnn": nn.LSTM(4, 4), "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
    })  # fmt: skip
    lora.inject(model, target_modules=["a"], modules_to_save=[name for name in model if name != "a"])
    found = names_by_group(model, param_groups(model, LR))
    assert found["norms"] == {"layer.weight", "rms.weight", "batch.weight", "scale.weight"}
    assert found["weights"] == {
        "rnn.weight_ih_l0", "rnn.weight_hh_l0", "attention.in_proj_weight", "attention.out_proj.weight",
    }  # fmt: skip
    assert {"attention.bias_k", "attention.in_proj_bias", "rnn.bias_hh_l0", "layer.bias"} <= found["biases"]


CHOICES = {
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "modules_to_save": st.sampled_from([None, ["head"], ["norm", "head"]]),
    "target_modules": st.sampled_from([["q_proj"], ["embed"], TARGETS, "all-linear"]),
    "tied": st.booleans(),
}


@given(st.fixed_dictionaries(CHOICES), st.lists(st.integers(0, 40), max_size=8))
def test_every_trainable_parameter_is_in_exactly_one_group_that_is_not_empty(fields, frozen):
    if fields["target_modules"] in ("all-linear", ["embed"], TARGETS):
        fields["tied"] = False  # nothing adapted may share its weight with what trains in full
    model = adapted(**fields)
    parameters = list(model.parameters())
    for number in frozen:  # by hand, whatever it is
        parameters[number % len(parameters)].requires_grad_(False)
    trainable = {id(parameter) for parameter in parameters if parameter.requires_grad}
    if not trainable:
        return
    groups = param_groups(model, LR)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == trainable
    assert all(group["params"] for group in groups)
    assert len({group["name"] for group in groups}) == len(groups)


def test_tied_parameters_and_shared_modules_are_there_once():
    model = adapted(tied=True, target_modules=["q_proj"], modules_to_save=["head", "embed"])
    model.again = model.layers[0].attn["q_proj"]
    model.tied = lora.Linear(8, 8, r=2)
    model.tied.weight.requires_grad_(False)
    model.tied.lora_A = model.again.lora_A
    groups = param_groups(model, LR)
    found = names_by_group(model, groups)
    assert found["weights"] == {"embed.weight"}
    assert len(found["lora_A"]) == 2
    torch.optim.AdamW(groups)  # which warns of a parameter that is there twice, and refuses one in two groups


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_looked_through(wrap):
    model = adapted()
    wrapped = param_groups(wrap(model), LR)
    assert [group["name"] for group in wrapped] == [group["name"] for group in param_groups(model, LR)]


def test_nothing_is_changed():
    model = everything()
    before = snapshot(model)
    param_groups(model, LR)
    assert snapshot(model) == before


# ---- what is refused -----------------------------------------------------------------------------------------------

BAD = [0, -1e-3, math.nan, math.inf, "1e-3", None, True]


def test_all_that_is_wrong_is_listed():
    model = adapted().requires_grad_(False)
    with pytest.raises(ValueError, match="param_groups") as error:
        param_groups(model, 0, -1, math.nan, lr_embedding=math.inf)
    assert str(error.value).split("\n")[1:] == [
        "  - `lr` must be a finite number above 0, got 0.",
        "  - `lr_ratio` must be a finite number above 0, got -1.",
        "  - `lr_embedding` must be a finite number above 0, got inf.",
        "  - `weight_decay` must be a finite number of at least 0, got nan.",
        "  - nothing in this Model trains; see `lora.mark_only_lora_as_trainable`.",
    ]


@pytest.mark.parametrize("value", BAD, ids=repr)
@pytest.mark.parametrize("name", ["lr", "lr_ratio", "weight_decay", "lr_embedding"])
def test_numbers_out_of_range(name, value):
    if (name, value) in {("weight_decay", 0), ("lr_embedding", None)} and value is not False:
        param_groups(adapted(), **{"lr": LR, name: value})
        return
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number"):
        param_groups(adapted(), **{"lr": LR, name: value})


def test_a_model_without_lora_or_disabled_has_no_groups():
    with pytest.raises(ValueError, match="param_groups: there is no LoRA layer in this Model"):
        param_groups(Model(), LR)
    model = adapted(modules_to_save=["head"])
    with lora.disabled(model), pytest.raises(ValueError, match="disabled"):  # the base's head stands there
        param_groups(model, LR)


# ---- with torch's optimizers ---------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "NAdam": torch.optim.NAdam,
}


def steps(model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_take_the_groups_and_go_on_from_a_saved_state(make, tmp_path):
    model = adapted(bias="all", modules_to_save=["head"])
    optimizer = make(param_groups(model, LR, RATIO, DECAY))
    steps(model, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(model)
    resumed = make(param_groups(twin, 1.0))  # other numbers: the state has the right ones
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    keys = ("name", "lr", "weight_decay")
    assert [[group[key] for key in keys] for group in resumed.param_groups] == [
        [group[key] for key in keys] for group in optimizer.param_groups
    ]
    steps(model, optimizer, 2)
    steps(twin, resumed, 2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_schedule_scales_every_groups_own_rate():
    optimizer = torch.optim.AdamW(param_groups(adapted(), LR, RATIO))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    optimizer.step()
    schedule.step()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["lora_B"] == pytest.approx(LR * RATIO / 2)
    assert rates["lora_A"] == pytest.approx(LR / 2)


def test_one_step_of_sgd_moves_b_by_the_ratio():
    plain, plus = lora.Linear(6, 4, r=2), None
    plain.weight.requires_grad_(False), plain.bias.requires_grad_(False), nn.init.ones_(plain.lora_B)
    plus, x = copy.deepcopy(plain), torch.randn(3, 6)
    moved = {}
    for name, layer, ratio in (("plain", plain, 1), ("plus", plus, 7)):
        before = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
        optimizer = torch.optim.SGD(param_groups(layer, 0.01, ratio))
        layer(x).square().sum().backward()
        optimizer.step()
        moved[name] = [(now - then).detach() for now, then in zip((layer.lora_A, layer.lora_B), before, strict=True)]
    torch.testing.assert_close(moved["plus"][0], moved["plain"][0])
    torch.testing.assert_close(moved["plus"][1], 7 * moved["plain"][1], rtol=1e-5, atol=1e-6)


# ---- LoRA-FA -------------------------------------------------------------------------------------------------------


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_frozen_a_is_all_that_no_longer_trains(bias):
    model = adapted(modules_to_save=["head"])
    lora.mark_only_lora_as_trainable(model, bias)
    before, saved = trainable(model), set(lora.lora_state_dict(model, bias))
    lora.mark_only_lora_as_trainable(model, bias, freeze_A=True)
    frozen = {f"layers.{n}.attn.{name}.lora_A" for n, name in itertools.product((0, 1), ("q_proj", "v_proj"))}
    assert before - trainable(model) == frozen  # not the embedding's, which starts at zero
    assert set(lora.lora_state_dict(model, bias)) == saved  # A is of the adapter all the same
    assert "lora_A" not in {group["name"] for group in param_groups(model, LR)}
    lora.mark_only_lora_as_trainable(model, bias)
    assert trainable(model) == before


def test_a_layer_with_r_0_has_no_a_to_freeze():
    model = nn.Sequential(lora.Linear(4, 4), lora.Linear(4, 4, r=2))
    lora.mark_only_lora_as_trainable(model, freeze_A=True)
    assert trainable(model) == {"1.lora_B"}


def test_it_learns_and_a_stays_as_it_started():
    model = adapted()
    lora.mark_only_lora_as_trainable(model, freeze_A=True)
    before = {name: tensor.clone() for name, tensor in lora.lora_state_dict(model).items()}
    optimizer = torch.optim.AdamW(param_groups(model, 2e-4, weight_decay=0.1))
    first = model(IDS).square().mean().item()
    steps(model, optimizer, 5)
    assert model(IDS).square().mean().item() < first
    for name, tensor in lora.lora_state_dict(model).items():
        assert torch.equal(tensor, before[name]) == ("attn" in name and "lora_A" in name), name


FORMS = {
    "Linear": (lora.Linear, {}, 1),
    "MergedLinear": (lora.MergedLinear, {"splits": (64, 16, 16), "enable_lora": (True, False, True)}, 2),
}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("cls", "fields", "groups"), FORMS.values(), ids=FORMS)
def test_with_a_frozen_a_a_layer_keeps_nothing_of_its_input(cls, fields, groups, dropout):
    layer, x = cls(128, 96, r=4, lora_dropout=dropout, **fields), torch.randn(32, 128, requires_grad=True)
    kept = []
    for freeze in (False, True):
        lora.mark_only_lora_as_trainable(layer, freeze_A=freeze)
        kept.append(kept_for_backward(lambda: layer(x), *layer.parameters()))
    assert kept == [(32 * 128 + 32 * 4 * groups) * 4, 32 * 4 * groups * 4]


def test_a_frozen_a_is_saved_and_loaded(tmp_path):
    model, path = adapted(), tmp_path / "adapter.safetensors"
    base = copy.deepcopy(model)
    lora.eject(base)
    lora.mark_only_lora_as_trainable(model, freeze_A=True)
    steps(model, torch.optim.AdamW(param_groups(model, 1e-2)), 2)
    lora.save_adapter(model, path)

    fresh = copy.deepcopy(base)  # gets its LoRA layers from the file: both factors train, as after any load …
    lora.load_adapter(fresh, path)
    assert torch.equal(fresh(IDS), model(IDS))
    assert {name for name in trainable(fresh) if "attn" in name} > {"layers.0.attn.q_proj.lora_A"}
    lora.mark_only_lora_as_trainable(fresh, freeze_A=True)
    assert trainable(fresh) == trainable(model)

    lora.inject(base, target_modules=TARGETS, r=2)  # … and where they are there, what trained goes on
    lora.mark_only_lora_as_trainable(base, freeze_A=True)
    lora.load_adapter(base, path)
    assert trainable(base) == trainable(model)
    assert torch.equal(base(IDS), model(IDS))
