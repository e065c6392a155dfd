"""A model that holds another library's adapters gets none of ours: its own would be frozen, or adapted themselves."""

import copy

import loralib
import peft
import pytest
import torch
from torch import nn

import lora

# Classes as libraries define them, of which none is imported: their modules, their names, and what they derive from.
CLASSES = [
    ("peft.tuners.lora.layer", "Linear", nn.Module),
    ("peft.tuners.ia3.layer", "Linear", nn.Module),
    ("peft.utils.other", "ModulesToSaveWrapper", nn.Module),
    ("loralib.layers", "Linear", nn.Linear),
    ("torchtune.modules.peft.lora", "LoRALinear", nn.Module),
    ("adapters.methods.lora", "LoRALinear", nn.Linear),
    ("litgpt.lora", "LoRALinear", nn.Module),
    ("minlora.model", "LoRAParametrization", nn.Module),
    ("lycoris.modules.loha", "LohaModule", nn.Module),
    ("diffusers.models.lora", "LoRALinearLayer", nn.Module),
]
TARGETS = ["all-linear", ["plain"], r".*plain"]


def foreign(module, name, base):
    return type(name, (base,), {"__module__": module})(*(4, 4) * (base is nn.Linear))


def holding(*layers):
    return nn.ModuleDict({"plain": nn.Linear(4, 4), "body": nn.ModuleList(layers)})


def refused(act, model):
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=r"because\n") as caught:
        act(model)
    assert before == [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    return str(caught.value)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls[0])
@pytest.mark.parametrize("derived", [False, True])
def test_they_are_known_by_name_whatever_is_targeted(cls, derived, targets):
    layers = [foreign(*cls) for _ in range(2)]
    if derived:
        for layer in layers:
            layer.__class__ = type("Mine", (type(layer),), {"__module__": "mine"})
    message = refused(lambda model: lora.inject(model, target_modules=targets, r=2), holding(*layers))
    assert "  - body.0, body.1: hold an adapter of " in message
    library = {"peft": "PEFT's", "loralib": "loralib's", "torchtune": "torchtune's"}.get(cls[0].partition(".")[0], "'s")
    assert f"{library}, which would be frozen, or adapted itself; take it out first" in message


def test_each_library_has_its_line():
    layers = [foreign(*CLASSES[0]), foreign(*CLASSES[3])]
    message = refused(lambda model: lora.inject(model, target_modules=["plain"], r=2), holding(*layers))
    assert "body.0: holds an adapter of PEFT's" in message
    assert "by `model.merge_and_unload()` or `model.unload()`, or begin with the plain base model." in message
    assert "body.1: holds an adapter of loralib's" in message


def test_a_file_is_not_loaded_beside_them():
    base = holding(nn.Linear(4, 4))
    lora.inject(base, target_modules=["plain"], r=2)
    adapter = lora.adapter_of(base)
    model = holding(foreign(*CLASSES[0]))
    message = refused(lambda model: lora.load_adapter(model, adapter, check_base=False), model)
    assert "body.0: holds an adapter of PEFT's" in message


@pytest.mark.parametrize("module", ["mine.peft", "peftlike", "lora_of_mine", "adapters.models.mine", "__main__"])
def test_classes_of_ones_own_are_adapted(module):
    model = holding(foreign(module, "LoRALinear", nn.Linear))
    assert len(lora.inject(model, target_modules="all-linear", r=2).modules) == 2


@pytest.mark.parametrize("targets", ["all-linear", ["0"], ["base_layer"], r".*lora_A\.default"], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_pefts_models(method, targets):
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = peft.LoraConfig(target_modules=["0"], r=2, use_dora=method == "dora", modules_to_save=["1"])
    if method == "ia3":
        config = peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    theirs = peft.get_peft_model(base, config)
    message = refused(lambda model: lora.inject(model, target_modules=targets, r=2), theirs)
    assert "base_model.model.0" in message
    assert "an adapter of PEFT's" in message
    assert any(p.requires_grad for p in theirs.parameters())
    if method != "ia3":
        lora.inject(theirs.merge_and_unload(), target_modules=["0"], r=2)


def test_loralibs_layers():
    model = nn.Sequential(nn.Linear(4, 4), loralib.Linear(4, 4, r=2), loralib.MergedLinear(4, 4, r=2))
    state = copy.deepcopy(model.state_dict())
    message = refused(lambda model: lora.inject(model, target_modules=["0"], r=2), model)
    assert "1, 2: hold an adapter of loralib's" in message
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
