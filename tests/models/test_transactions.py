"""Whole or not at all: what changes a model does all of it, or nothing to the bit, wherever Ctrl-C comes."""

import copy
from functools import partial

import pytest
import torch
from conftest import randomised
from interruptions import ends_of, is_interrupted, lines_of, whole
from torch import nn

import lora
from lora.layers import weights


class Rounded(nn.Linear):
    """A packed weight: codes in int8, and a scale that is written in place."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = torch.ones(())
        self.pack(self.weight.detach())

    def pack(self, weight):
        self.scale.copy_(weight.abs().max() / 100)
        codes = (weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def unpack(self):
        return self.weight * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.unpack(), self.bias)


@pytest.fixture(autouse=True)
def _packing(monkeypatch):
    monkeypatch.setattr(weights, "_PACKINGS", dict(weights._PACKINGS))
    lora.register_weight(Rounded, Rounded.unpack, Rounded.pack)


def plain():
    """Layers of each mechanism, one that is packed, a norm with statistics, a tie, gradients, and a head."""
    torch.manual_seed(1)
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(6, 5),
            "qkv": nn.Linear(6, 9),
            "embed": nn.Embedding(7, 5),
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "packed": Rounded(6, 5),
            "norm": nn.BatchNorm1d(5),
            "head": nn.Linear(5, 7),
        }
    )
    model["norm"].running_mean.normal_()
    model["linear"].bias.grad = torch.ones(5)
    return model


def injected(targets=("linear", "qkv", "embed", "conv", "packed"), **settings):
    """The same with LoRA in it, as after some training."""
    model = plain()
    torch.manual_seed(2)
    splits = {"splits": {"qkv": (4, 3, 2)}, "enable_lora": {"qkv": (True, False, True)}} if "qkv" in targets else {}
    lora.inject(model, **{"target_modules": list(targets), "r": 2, "lora_alpha": 3, **splits, **settings})
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            randomised(module, 0.1)
            module.lora_A.grad = torch.ones_like(module.lora_A)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
        model["norm"].running_mean += 1
    return model


DENSE = ("linear", "qkv", "embed", "conv")
IN_FULL = {"bias": "all", "modules_to_save": ["head"]}


def constructed():
    torch.manual_seed(1)
    return nn.Sequential(lora.Linear(6, 5, r=2, fan_in_fan_out=True), lora.Linear(5, 4, r=2, use_dora=True))


def waiting(how):
    model = plain()
    lora.inject(model, target_modules=["linear", "head"], r=2, init_lora_weights=how)
    return nn.Sequential(model["linear"], model["norm"], model["head"])


def calibrated(model, **settings):
    torch.manual_seed(3)
    lora.calibrate(model, [torch.randn(8, 6)], step=lambda model, x: model(x).square().mean(), **settings)


def original(name):
    torch.manual_seed(4)
    return torch.randn(5, 6)


def file_of(**settings):
    return lora.adapter_of(copy.deepcopy(injected(DENSE, **settings)))


def resized():
    model = injected(("embed",), use_dora=True)
    model["embed"].weight.data = torch.cat([model["embed"].weight.data, torch.ones(2, 5)])
    return model


# What changes a model: how the model is made, and the change.
CHANGES = {
    "merge": (injected, lora.merge),
    "merge DoRA": (lambda: injected(DENSE, use_dora=True, **IN_FULL), lora.merge),
    "merge bfloat16": (lambda: injected(DENSE).bfloat16(), lora.merge),
    "merge transposed": (constructed, lora.merge),
    "eject": (lambda: injected(**IN_FULL), lora.eject),
    "eject pissa": (lambda: injected(DENSE, init_lora_weights="pissa", use_dora=True), lora.eject),
    "eject transposed": (constructed, lora.eject),
    "inject": (plain, lambda model: lora.inject(model, target_modules="all-linear", r=2, **IN_FULL)),
    "initialize pissa": (constructed, lambda model: lora.initialize(model, "pissa")),
    "initialize again": (
        lambda: injected(DENSE, init_lora_weights="pissa"),
        lambda model: lora.initialize(model, "olora"),
    ),
    "mark_only_lora_as_trainable": (
        lambda: injected(**IN_FULL),
        lambda model: lora.mark_only_lora_as_trainable(model, "lora_only", freeze_A=True),
    ),
    "prepare_for_swap": (injected, lambda model: lora.prepare_for_swap(model, 4)),
    "calibrate eva": (lambda: waiting("eva"), lambda model: calibrated(model, rho=2.0)),
    "calibrate lora_ga": (lambda: waiting("lora_ga"), calibrated),
    "calibrate corda": (lambda: waiting("corda"), calibrated),
    "loftq": (lambda: injected(("packed",)), lambda model: lora.loftq(model, original, 3)),
    "load_adapter": (lambda: injected(DENSE), lambda model: lora.load_adapter(model, file_of(), check_base=False)),
    "load_adapter into a plain model": (plain, lambda model: lora.load_adapter(model, file_of(**IN_FULL))),
    "resize": (resized, lambda model: setattr(model["embed"], "num_embeddings", 9)),
}
CHANGES |= {
    f"inject {how}": (
        plain,
        partial(lora.inject, target_modules=["linear", "head"], r=2, init_lora_weights=how),
    )
    for how in ("pissa", "pissa_niter_2", "olora", "orthogonal", "gaussian", "eva")
}


def changed(change, model):
    torch.manual_seed(0)
    change(model)


def spread(points, most):
    """At most so many of them, evenly."""
    return points[:: -(-len(points) // most)] if most else points


@pytest.mark.parametrize("most", [12, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("what", CHANGES)
def test_ctrl_c_at_any_line_leaves_all_or_nothing(what, most):
    build, change = CHANGES[what]
    model = build()
    changed(change, model)  # what is imported, or made once, is there now
    done = whole(model, objects=False)
    model = build()
    seen = lines_of(partial(changed, change, model))
    model = build()
    before = whole(model)
    undone = 0
    for n in spread(ends_of(seen), most):
        is_interrupted(partial(changed, change, model), n)
        if whole(model) == before:
            undone += 1
        else:
            assert whole(model, objects=False) == done, seen[n]
            model = build()
            before = whole(model)
    assert undone
    changed(change, model)
    assert whole(model, objects=False) == done
