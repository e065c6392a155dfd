"""The names that a LoRA layer adds to its base layer, which may use others as it likes."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import KINDS, make
from torch import nn

import lora

# loralib's and PEFT's words for what defines an adapter.
WORDS = {"r", "scaling", "merge_weights", "fan_in_fan_out", "enable_lora", "splits", "factored"}
WORDS |= {"use_rslora", "use_dora", "init_lora_weights", "reset_lora_parameters", "reset_magnitude"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layer_adds_is_lora_or_private_or_a_known_word(kind):
    layer = make(kind, use_dora=True)
    base = type(layer).lora_base_class
    theirs = {*dir(base), *vars(copy_of_base(layer)), "weight", "bias"}
    ours = {name for name in {*dir(type(layer)), *vars(layer), *layer._parameters} if not name.startswith("_")} - theirs
    assert {name for name in ours if not name.startswith("lora_")} <= WORDS


def copy_of_base(layer):
    model = nn.Sequential(copy.deepcopy(layer))
    lora.eject(model)
    return model[0]


class Attributes(nn.Linear):
    """Its own words are some that a LoRA layer might need."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.scaling, self.down, self.delta = 0.25, 3.0, "delta"

    def drop(self, x):
        return 2 * x

    def forward(self, x):
        return self.drop(super().forward(x)) * self.scaling + self.down


class OfTheClass(Attributes):
    scaling = 0.5

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        del self.scaling


class OfTheInstance(Attributes):
    @property
    def scaling(self):
        return self.factor

    @scaling.setter
    def scaling(self, value):
        self.factor = value


class AsParameter(Attributes):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        del self.scaling
        self.scaling = nn.Parameter(torch.tensor(0.75))


@pytest.mark.parametrize("cls", [Attributes, OfTheClass, OfTheInstance, AsParameter])
def test_a_subclass_may_have_a_scaling_and_a_method_drop_of_its_own(cls, tmp_path):
    x = torch.randn(5, 6)
    model = nn.Sequential(cls(6, 4))
    own, before = model[0].scaling, model(x)
    lora.inject(model, target_modules=["0"], r=2, lora_alpha=6)
    layer = model[0]
    assert torch.equal(model(x), before)
    assert layer.scaling is own or layer.scaling == own
    assert layer.lora_scaling == 3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    trained = model(x)
    with torch.no_grad():
        update = 3 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(trained, before + 2 * float(own) * update)  # by `drop` and the `scaling` of its own
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), trained)
        assert twin[0].scaling == own
    lora.eject(model)
    assert type(model[0]) is cls
    assert model[0].scaling == own
    assert torch.equal(model(x), before)
    lora.load_adapter(model, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(model(x), trained)
    lora.prepare_for_swap(model, 4)
    assert model[0].lora_scale.tolist() == [3, 1]
    assert model[0].scaling == own
    torch.testing.assert_close(model(x), trained)


def test_loralibs_word_is_ours_where_it_is_free():
    layer = lora.Linear(6, 4, r=2, lora_alpha=6)
    assert layer.scaling == layer.lora_scaling == 3
    layer.scaling = 5.0
    assert layer.scaling == layer.lora_scaling == 5
    assert "scaling" not in vars(layer)


def test_it_may_be_set_before_torchs_constructor_has_run():
    class Early(lora.Linear):
        def __init__(self, *sizes):
            self.scaling = 2.0
            super().__init__(*sizes)

    assert Early(6, 4).scaling == 2


@pytest.mark.parametrize("value", [None, "2", True, 2j, torch.tensor(2.0), [2.0]], ids=repr)
@pytest.mark.parametrize("name", ["scaling", "lora_scaling"])
def test_a_scaling_is_a_number(name, value):
    layer = lora.Linear(4, 3, r=2)
    with pytest.raises(TypeError, match="`scaling` must be a number, got "):
        setattr(layer, name, value)
    assert layer.scaling == 0.5
    setattr(layer, name, np.float32(2))
    assert layer.scaling == 2


@pytest.mark.parametrize("value", [1e308, -1e300, float("inf"), float("nan"), 10**400, np.float64("inf")], ids=str)
def test_a_scaling_set_by_hand_is_refused_as_in_a_constructor(value):
    layer = lora.Linear(4, 4, r=2)
    with pytest.raises(ValueError, match="`scaling` must be a finite number"):
        layer.scaling = value
    assert layer.scaling == 0.5
    with pytest.raises(ValueError, match="`lora_alpha` must"):
        lora.Linear(4, 4, r=2, lora_alpha=value)
