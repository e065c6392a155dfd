"""inject: what it refuses, and that a model is as it was whenever it raises."""

import functools

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, prune
from toy_model import IDS, Model, adapted, snapshot

import lora
from lora.layers import registry
from lora.layers.linear import LinearLoRA


@pytest.fixture
def own_kinds(monkeypatch):
    """Kinds that a test registers are forgotten after it."""
    monkeypatch.setattr(registry, "_kinds", dict(registry._kinds))
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))


def refuses(model, *messages, **fields):
    """The model refuses the fields with every message, each in a line of its own, and is as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^inject: nothing was changed, because\n  - ") as caught:
        lora.inject(model, **{"target_modules": ["q_proj"], **fields})
    assert snapshot(model) == before
    lines = str(caught.value).split("\n  - ")[1:]
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert message in line


# ---- every pattern must match something ------------------------------------------------------------------------

NO_MATCH = {
    "a name": ({"target_modules": ["q_porj"]}, "`target_modules` 'q_porj' matches no module (did you mean 'q_proj'"),
    "part of a name": ({"target_modules": ["proj"]}, "`target_modules` 'proj' matches no module"),
    "one of two names": ({"target_modules": ["q_proj", "k_proj"]}, "`target_modules` 'k_proj' matches no module"),
    "a regex": ({"target_modules": r"layers\.[23].*"}, r"`target_modules` 'layers\\.[23].*' matches no module"),
    "a regex of a part": ({"target_modules": "q_proj"}, "`target_modules` 'q_proj' matches no module"),
    "to exclude": ({"exclude_modules": ["x_proj"]}, "`exclude_modules` 'x_proj' matches no module"),
    "a regex to exclude": ({"exclude_modules": "x.*"}, "`exclude_modules` 'x.*' matches no module"),
    "everything excluded": (
        {"exclude_modules": ["q_proj"]},
        "`exclude_modules` and what trains in full leave no module",
    ),
    "ranks": ({"rank_pattern": {"v_proj": 4}}, "`rank_pattern` 'v_proj' matches no adapted module"),
    "alphas": ({"alpha_pattern": {"v_proj": 4}}, "`alpha_pattern` 'v_proj' matches no adapted module"),
    "splits": ({"splits": {"qkv": (4, 4)}}, "`splits` 'qkv' matches no adapted module"),
    "enable_lora": ({"enable_lora": {"qkv": True}}, "`enable_lora` 'qkv' matches no adapted module"),
    "nothing like it": (
        {"target_modules": ["wq"]},
        "`target_modules` 'wq' matches no module (names end in 'embed', 'layers', ",
    ),
    "to save": ({"modules_to_save": ["haed"]}, "`modules_to_save` 'haed' matches no module (did you mean 'head'?)"),
}


@pytest.mark.parametrize(("fields", "message"), NO_MATCH.values(), ids=NO_MATCH)
def test_what_matches_nothing_is_refused(fields, message):
    refuses(Model(), message, **fields)


def test_all_linear_without_a_linear_layer_is_refused():
    refuses(nn.Sequential(nn.ReLU()), "'all-linear' matches no module", target_modules="all-linear")


# ---- modules that cannot be adapted ----------------------------------------------------------------------------


def on_instance():
    model = nn.ModuleDict({"x": nn.Linear(4, 4)})
    model["x"].forward = functools.partial(model["x"].forward)  # as accelerate's hooks do: ours would not be called
    return model


def parametrized():
    return nn.ModuleDict({"x": parametrizations.weight_norm(nn.Linear(4, 4))})


def frozen_and_parametrized():
    return parametrized().requires_grad_(False)


def pruned():
    return nn.ModuleDict({"x": prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)})


class Named(nn.Linear):
    """One of its own words is one of ours: to take its `use_dora` for ours would change its function."""

    def __init__(self):
        super().__init__(4, 4)
        self.use_dora = 0.25

    def forward(self, x):
        return super().forward(x) * self.use_dora


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.x = nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.x.weight.T


def reader_on_instance():
    model = Reads()
    model.forward = functools.partial(model.forward)
    return model


class Nibbles(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.weight = nn.Parameter(self.weight.detach().mul(10).to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight / 10, self.bias)


def packed_and_read():
    model = Reads()
    model.x = Nibbles()
    return model


CANNOT = {
    "a norm": (lambda: nn.ModuleDict({"x": nn.LayerNorm(4)}), "x", "no kind of LoRA layer adapts a LayerNorm"),
    "a container": (Model, "layers", "no kind of LoRA layer adapts a ModuleList"),
    "lazy": (lambda: nn.ModuleDict({"x": nn.LazyLinear(4)}), "x", "is lazy and has no shape yet"),
    "lazy convolution": (lambda: nn.ModuleDict({"x": nn.LazyConv2d(4, 3)}), "x", "is lazy and has no shape yet"),
    "read, with a forward on the instance": (
        reader_on_instance,
        "x",
        "its instance has a `forward` of its own",
    ),
    "packed and read": (packed_and_read, "x", "its weight is packed, and a Reads around it reads `x.weight` as it is"),
    "forward on the instance": (on_instance, "x", "forward"),
    "parametrized": (parametrized, "x", "parametri"),
    "parametrized and frozen": (frozen_and_parametrized, "x", "parametri"),
    "pruned": (pruned, "x", "weight"),
    "attributes of our names": (lambda: nn.ModuleDict({"x": Named()}), "x", "use_dora"),
}


@pytest.mark.parametrize(("make", "name", "message"), CANNOT.values(), ids=CANNOT)
def test_a_module_that_cannot_be_adapted_is_refused(make, name, message):
    refuses(make(), message, target_modules=[name])


def test_a_second_injection_is_refused():
    model = Model()
    lora.inject(model, target_modules=["q_proj"])
    messages = [f"layers.{i}.attn.q_proj: has LoRA already; eject or merge it first." for i in (0, 1)]
    refuses(model, *messages, target_modules=["q_proj", "v_proj"])


SETTINGS = {
    "short splits": (
        {"splits": {"q_proj": (4, 2)}},
        "`splits` (=(4, 2)) must be positive and add up to `out_features`",
    ),
    "negative splits": ({"splits": {"q_proj": (9, -1)}}, "`splits` (=(9, -1)) must be positive"),
    "one number": ({"splits": {"q_proj": 8}}, "`splits`"),
    "mask too long": ({"splits": {"q_proj": (4, 4)}, "enable_lora": {"q_proj": [1, 1, 1]}}, "must have one entry for"),
    "mask of a 2": ({"enable_lora": {"q_proj": [1, 2]}}, "each a bool, 0 or 1, got [1, 2]"),
    "mask of nothing": ({"enable_lora": {"q_proj": [0, 0]}}, "`enable_lora` enables no split"),
    "mask that does not divide": ({"enable_lora": {"q_proj": [1, 0, 1]}}, "must be divisible by the 3 entries"),
    "a number for a mask": ({"enable_lora": {"q_proj": 1}}, "`enable_lora`"),
}


@pytest.mark.parametrize(("fields", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_do_not_fit_a_module_are_refused_for_each(fields, message):
    refuses(Model(), *[message] * 2, **fields)


def test_splits_are_refused_for_what_is_not_linear():
    refuses(Model(), "for linear layers, not for an Embedding", target_modules=["embed"], splits={"embed": (4, 4)})


def test_a_rank_that_groups_do_not_divide_is_refused():
    refuses(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "must be divisible by `groups`", target_modules=["0"], r=3)


def test_kernels_that_are_not_square_are_refused_in_the_form_of_loralib():
    model = nn.Sequential(nn.Conv2d(4, 4, (3, 5)))
    refuses(model, "pass `factored=True`", target_modules=["0"], factored=False)


@pytest.mark.parametrize("saved", ["q_proj", "layers.0", "attn"])
def test_a_module_is_not_trained_in_full_and_adapted_as_well(saved):
    matched = 1 if saved == "layers.0" else 2
    refuses(Model(), *["trains in full and cannot be adapted"] * matched, modules_to_save=[saved])


def test_a_module_is_not_trained_in_full_when_another_is_adapted_that_shares_its_weight():
    message = "head: a module of `modules_to_save` trains in full and cannot share a weight with one adapted: embed."
    refuses(Model(tied=True), message, target_modules=["embed"], modules_to_save=["head"])


def test_a_pattern_that_others_leave_nothing_to_is_refused():
    message = "`rank_pattern` 'layers.1.attn.q_proj' is never used: patterns before it match all its modules."
    refuses(Model(), message, rank_pattern={"q_proj": 2, "layers.1.attn.q_proj": 4})
    lora.inject(Model(), target_modules=["q_proj"], rank_pattern={"layers.1.attn.q_proj": 4, "q_proj": 2})


def test_one_error_lists_everything():
    model = nn.ModuleDict({"a": nn.LayerNorm(4), "b": nn.LazyLinear(4), "c": nn.LayerNorm(4)})
    model["d"] = lora.Linear(4, 4, r=2)
    model["e"] = nn.Linear(4, 4)
    messages = ["'i' matches no module", "'f' matches no module", "'g' matches no module", "'h' matches no adapted"]
    messages += ["a: no kind of", "b: is lazy", "c: no kind of", "d: has LoRA already", "e: `splits`"]
    fields = {"exclude_modules": ["g"], "rank_pattern": {"h": 2}, "modules_to_save": ["i"], "splits": {"e": (1, 1)}}
    refuses(model, *messages, target_modules=["a", "b", "c", "d", "e", "f"], **fields)


# ---- all or nothing, whatever goes wrong -----------------------------------------------------------------------


class Fragile(nn.Linear):
    pass


class FragileLoRA(LinearLoRA):
    error: BaseException = MemoryError("no memory left")

    def reset_lora_parameters(self):
        super().reset_lora_parameters()
        raise self.error


def with_fragile():
    model = Model()
    model.layers[1].attn["q_proj"] = Fragile(8, 8)
    return model


@pytest.mark.parametrize("error", [MemoryError("no memory left"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("trainable", [True, False])
def test_the_model_is_as_it_was_when_a_layer_fails_half_way(own_kinds, monkeypatch, error, trainable):
    lora.register(Fragile, FragileLoRA)
    monkeypatch.setattr(FragileLoRA, "error", error)
    model = with_fragile().requires_grad_(trainable)
    before = snapshot(model)
    with pytest.raises(type(error)):
        lora.inject(model, target_modules=["q_proj", "v_proj", "embed"], modules_to_save=["head"], bias="all")
    assert snapshot(model) == before


def test_a_layer_of_ours_without_rank_is_as_it_was_when_another_fails(own_kinds):
    lora.register(Fragile, FragileLoRA)
    model = nn.Sequential(lora.Linear(4, 6, fan_in_fan_out=True), Fragile(6, 4))
    before = snapshot(model)
    with pytest.raises(MemoryError):
        lora.inject(model, target_modules=["0", "1"])
    assert snapshot(model) == before


def test_the_model_is_as_it_was_when_memory_ends_while_values_are_remembered(monkeypatch):
    def remember(module, name):
        raise MemoryError

    monkeypatch.setattr("lora.models.training.remember", remember)
    model = Model()
    before = snapshot(model)
    with pytest.raises(MemoryError):
        lora.inject(model, target_modules=["q_proj"], modules_to_save=["head"], bias="all")
    assert snapshot(model) == before


def test_a_lazy_module_elsewhere_is_in_nobodys_way():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    lora.inject(model, target_modules=["0"])
    assert adapted(model) == ["0"]
    assert model(torch.ones(2, 4)).shape == (2, 3)


def test_a_lazy_module_to_save_is_refused():
    refuses(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)), "1: is lazy", target_modules=["0"], modules_to_save=["1"])


def test_a_model_that_was_refused_can_be_adapted():
    model = Model()
    refuses(model, "matches no module", target_modules=["q_proj", "nothing"])
    before = model(IDS)
    lora.inject(model, target_modules=["q_proj"])
    assert torch.equal(model(IDS), before)


def test_a_class_has_the_article_of_its_name():
    model = nn.Sequential(nn.EmbeddingBag(4, 4), nn.GroupNorm(1, 4))
    with pytest.raises(ValueError, match="adapts an EmbeddingBag") as caught:
        lora.inject(model, target_modules=["0", "1"], r=2)
    assert "adapts a GroupNorm" in str(caught.value)
