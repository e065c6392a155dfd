"""PEFT's words in a LoraConfig: layers by their numbers, and words that mean nothing here."""

import warnings

import pytest
import torch
from torch import nn
from toy_model import snapshot

import lora


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def model_of():
    body = nn.ModuleDict({"layers": nn.ModuleList([Layer() for _ in range(3)]), "q": nn.Linear(4, 4)})
    return nn.ModuleDict({"model": body, "h": nn.ModuleList([Layer()])})


def adapted(**fields):
    return [
        module.names[0] for module in lora.inject(model_of(), **{"target_modules": ["q"], "r": 2, **fields}).modules
    ]


SELECTED = {
    "all": ({}, ["model.layers.0.q", "model.layers.1.q", "model.layers.2.q", "model.q", "h.0.q"]),
    "an empty list is no limit": ({"layers_to_transform": []}, None),
    "one number": ({"layers_to_transform": 1}, ["model.layers.1.q"]),
    "a list": ({"layers_to_transform": [2, 0]}, ["model.layers.0.q", "model.layers.2.q"]),
    "in a list of this name": ({"layers_to_transform": 0, "layers_pattern": "h"}, ["h.0.q"]),
    "in lists of these names": (
        {"layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
        ["model.layers.0.q", "h.0.q"],
    ),
    "an empty pattern is none": ({"layers_to_transform": 0, "layers_pattern": []}, ["model.layers.0.q"]),
    "and what is named in full": (
        {"layers_to_transform": 1, "target_modules": ["q", "model.q"]},
        ["model.layers.1.q", "model.q"],
    ),
    "of a layer, not of an expert": (
        {"layers_to_transform": 1, "target_modules": ["experts.0", "experts.1"]},
        ["model.layers.1.experts.0", "model.layers.1.experts.1"],
    ),
    "of all linear layers": (
        {"layers_to_transform": 1, "target_modules": "all-linear"},
        ["model.layers.1.q", "model.layers.1.experts.0", "model.layers.1.experts.1"],
    ),
    "without those excluded": (
        {"layers_to_transform": [0, 1], "exclude_modules": ["layers.0.q"], "layers_pattern": ["h", "layers"]},
        ["model.layers.1.q", "h.0.q"],
    ),
}


@pytest.mark.parametrize(("fields", "expected"), SELECTED.values(), ids=SELECTED)
def test_only_layers_of_these_numbers_are_adapted(fields, expected):
    assert adapted(**fields) == (expected or SELECTED["all"][1])


def test_parameters_that_are_named_by_themselves_are_in_no_layer():
    """As in PEFT."""
    model = model_of()
    model["model"]["table"] = nn.ParameterDict({"rows": nn.Parameter(torch.randn(4, 4))})
    fields = {"target_modules": ["q"], "target_parameters": ["table.rows"], "layers_to_transform": 1}
    names = [module.names[0] for module in lora.inject(model, r=2, **fields).modules]
    assert sorted(names) == ["model.layers.1.q", "model.table.rows"]


UNREACHED = {
    "no such layer": (
        {"layers_to_transform": [1, 3, 7]},
        "`layers_to_transform` 3, 7: no target is in layers of these numbers (they are in 0, 1, 2).",
    ),
    "none with a number": (
        {"layers_to_transform": 0, "target_modules": ["model.q"]},
        "`layers_to_transform` 0: no target is in a layer of this number ('model.q' has no number after two names; "
        "name the list that holds the layers in `layers_pattern`).",
    ),
    "only behind one name": (
        {"layers_to_transform": 0, "target_modules": ["h.0.q"], "exclude_modules": ["layers.0.q"]},
        "`layers_to_transform` 0: no target is in a layer of this number ('h.0.q' has no number after two names",
    ),
    "no such list": (
        {"layers_to_transform": 1, "layers_pattern": ["layers", "block"]},
        "`layers_pattern` 'block' matches no target.",
    ),
    "excluded": (
        {"layers_to_transform": 1, "exclude_modules": ["layers.1.q"]},
        "`layers_to_transform` 1: no target is in a layer of this number (they are in 0, 2).",
    ),
}


@pytest.mark.parametrize(("fields", "message"), UNREACHED.values(), ids=UNREACHED)
def test_a_number_or_a_list_that_reaches_nothing_is_refused(fields, message):
    model = model_of()
    before = snapshot(model)
    with pytest.raises(ValueError, match="nothing was changed") as caught:
        lora.inject(model, **{"target_modules": ["q"], "r": 2, **fields})
    assert str(caught.value).count("\n") == 1
    assert message in str(caught.value)
    assert snapshot(model) == before


WRONG = {
    "a bool": ({"layers_to_transform": True}, "`layers_to_transform` must be the number of a layer, or a list of them"),
    "negative": ({"layers_to_transform": [0, -1]}, "`layers_to_transform` must be the number of a layer"),
    "a string": ({"layers_to_transform": "3"}, "`layers_to_transform` must be the number of a layer"),
    "numbers as names": ({"layers_to_transform": 0, "layers_pattern": [0]}, "`layers_pattern` must be a name, or a"),
    "a pattern alone": ({"layers_pattern": "h"}, "`layers_pattern` says where `layers_to_transform` counts"),
    "no expression": (
        {"layers_to_transform": 0, "layers_pattern": "(h"},
        "'(h' must be a name or a regular expression",
    ),
    "beside an expression": ({"layers_to_transform": 0, "target_modules": ".*q"}, "says the layers itself"),
    "no flag": ({"inference_mode": 1, "fan_in_fan_out": None}, "`fan_in_fan_out` must be True or False, got None."),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_values_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match="LoraConfig: a value is not valid") as caught:
        lora.LoraConfig(**{"target_modules": ["q"], **fields})
    assert message in str(caught.value)


def test_nothing_trains_in_inference_mode():
    model = model_of()
    fields = {"target_modules": ["layers.0.q"], "modules_to_save": ["h"], "bias": "all", "r": 2}
    lora.inject(model, **fields, inference_mode=True, init_lora_weights=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    lora.mark_only_lora_as_trainable(model)
    assert model["model"]["layers"][0].q.lora_A.requires_grad
    lora.eject(model)


def test_a_layout_that_no_layer_has_is_warned_of():
    with pytest.warns(UserWarning, match="`fan_in_fan_out` is True, but no adapted layer stores"):
        lora.inject(model_of(), target_modules=["q"], r=2, fan_in_fan_out=True)
    model = nn.ModuleDict({"q": lora.Linear(4, 4, r=0, fan_in_fan_out=True), "v": nn.Linear(4, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.inject(model, target_modules=["q", "v"], r=2, fan_in_fan_out=True)


def test_words_that_mean_nothing_here_say_what_to_do_all_at_once():
    fields = {"megatron_config": {"a": 1}, "eva_config": {}, "use_qalora": True, "use_bdlora": None, "revision": "main"}
    with pytest.raises(ValueError, match="LoraConfig: a word of PEFT's has no meaning here") as caught:
        lora.LoraConfig(target_modules=["q"], **fields)
    lines = str(caught.value).split("\n  - ")[1:]
    assert lines == [
        "`megatron_config` is {'a': 1}; `lora.parallel` has LoRA for layers that are split over devices, as DTensors.",
        "`eva_config` is {}; `lora.calibrate` takes the data and these settings after `inject`.",
        "`use_qalora` is True; leave it out: with it the adapter would compute something else than W₀ + s · B A.",
    ]


def test_a_word_that_nobody_has_is_a_typo():
    with pytest.raises(TypeError, match=r"LoraConfig has no field 'lora_aplha' \(did you mean 'lora_alpha'\?\), 'xyz'"):
        lora.inject(model_of(), target_modules=["q"], lora_aplha=2, xyz=1)
