"""`lora.check` names the adapters that take no part in training."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import lora
from lora.reports import CheckReport


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        self.never, self.expert = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids):
        x = self.body(self.words(ids))
        x = x + self.expert(x[:0]).sum(0)  # it saw no token
        return head_of(x, self)


def head_of(x, net):
    """It reads the weight of a layer that it does not name: nobody can see whose."""
    return F.linear(x, getattr(net, "".join(["he", "ad"])).weight)


def adapted(**settings):
    model = Net()
    lora.inject(model, target_modules=["words", "body", "head", "never", "expert"], r=2, **settings)
    return model


def test_adapters_without_a_gradient_are_named_with_the_reason():
    model = adapted()
    model(torch.arange(4)).square().sum().backward()
    report = lora.check(model)
    assert isinstance(report, CheckReport)
    assert report.trained == 5
    assert list(report.idle) == ["head", "never", "expert"]
    assert all("its weight was read where nobody could see it" in report.idle[name] for name in ("head", "never"))
    assert "its gradient is zero" in report.idle["expert"]
    assert str(report).splitlines()[-1] == "2 of 5 adapters learn"
    assert str(report).startswith("head: no gradient came to it")


def test_without_gradients_values_tell():
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.arange(4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert list(lora.check(model).idle) == ["head", "never", "expert"]
    assert "as it started" in lora.check(model).idle["never"]


@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal"])
def test_a_start_from_the_weight_is_known_by_its_values(how):
    model = nn.ModuleDict({"x": nn.Linear(8, 8), "y": nn.Linear(8, 8)})
    lora.inject(model, target_modules="all-linear", r=2, init_lora_weights=how)
    if how == "orthogonal":  # nothing is zero there, and nothing is remembered
        assert not lora.check(model).idle
        return
    with pytest.raises(ValueError, match="nothing in this model has been trained yet"):
        lora.check(model)
    with torch.no_grad():
        model["x"].lora_A += 1
    assert list(lora.check(model).idle) == ["y"]


def test_reentrant_checkpointing_over_inputs_without_a_gradient_is_found():
    model = nn.ModuleDict({"x": nn.Linear(8, 8), "y": nn.Linear(8, 8)})
    lora.inject(model, target_modules="all-linear", r=2)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        hidden = checkpoint(model["x"], torch.ones(1, 8), use_reentrant=True)
    model["y"](hidden).sum().backward()
    assert "use_reentrant=True" in lora.check(model).idle["x"]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_where_only_what_trains_in_full_has_a_gradient_every_adapter_is_named():
    model = nn.ModuleDict({"x": nn.Linear(8, 8), "y": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    lora.inject(model, target_modules=["x", "y"], modules_to_save=["head"], r=2)
    body = nn.Sequential(model["x"], model["y"])
    model["head"](checkpoint(body, torch.ones(1, 8), use_reentrant=True)).sum().backward()
    report = lora.check(model)
    assert list(report.idle) == ["x", "y"]
    assert all("`model.enable_input_require_grads()`" in reason for reason in report.idle.values())
    model.zero_grad()
    model["head"](checkpoint(body, torch.ones(1, 8).requires_grad_(), use_reentrant=True)).sum().backward()
    assert not [name for name, reason in lora.check(model).idle.items() if "no gradient" in reason]


def test_gradients_that_the_base_had_before_say_nothing():
    model = nn.Sequential(nn.Linear(8, 8))
    model(torch.ones(8)).sum().backward()
    lora.inject(model, target_modules=["0"], r=2)
    assert model[0].weight.grad is not None
    with pytest.raises(ValueError, match="nothing in this model has been trained yet"):
        lora.check(model)


def test_what_is_frozen_is_not_told_of():
    model = adapted()
    lora.mark_only_lora_as_trainable(model, freeze_A=True)
    for parameter in (model.never.lora_A, model.never.lora_B, model.head.lora_B):
        parameter.requires_grad_(False)
    model(torch.arange(4)).square().sum().backward()
    report = lora.check(model)
    assert (report.trained, list(report.idle)) == (3, ["expert"])


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(ValueError, match="check: there is no LoRA layer in this Linear"):
        lora.check(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="check: nothing in this model has been trained yet; call it after"):
        lora.check(adapted())
    with pytest.raises(ValueError, match="check: no adapter in this model trains"):
        lora.check(adapted().requires_grad_(False))
