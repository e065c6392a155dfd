"""Modules that keep several weights for themselves, adapted, and the same by hand: in dense arithmetic, in float64."""

import copy

import torch
import torch.nn as nn
from torch.func import functional_call

import lora


def adapted(make, targets, inputs, of, **settings):
    """A model in which every adapter has moved, what goes into it, and itself before."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"x": make()}).double().requires_grad_(False)
    inputs = tuple(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)
    model = copy.deepcopy(base)
    lora.inject(model, target_modules=targets, **{"r": 2, "lora_alpha": 4, **settings})
    assert_close(of(model["x"](*inputs)), of(base["x"](*inputs)))  # nothing has moved
    return moved(model), inputs, base


def moved(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * (0.1 if "magnitude" in name else 0.5))
    return model


def assert_close(one, other, tolerance=1e-9):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def assert_is_w(model, inputs, base, of, scaling=2.0):
    """The output is that of W in training and in `eval()`, with gradients and without, and the base's if disabled."""
    before = of(base["x"](*inputs))
    for training in (True, False):
        right = by_hand(model.train(training), base.train(training), scaling)
        for grad in (True, False):  # without, torch's encoders take a fast path of their own
            with torch.set_grad_enabled(grad):
                assert_close(of(model["x"](*inputs)), of(right(*inputs)))
                with lora.disabled(model):
                    off = of(model["x"](*inputs))
                assert_close(off, before)
    assert not torch.allclose(of(right(*inputs)), before)


def adapters(model):
    """For each adapted weight, by its full name: A, B and the magnitude, as the state dict has them."""
    state, found = dict(model.named_parameters()), {}
    for key in state:
        if key.endswith(".lora_A"):
            found[f"{key.removesuffix('lora_A')}weight"] = key.removesuffix("A")
        elif key.endswith("_lora_A"):
            found[key.removesuffix("_lora_A")] = key.removesuffix("A")
    return {name: [state.get(f"{start}{part}") for part in ("A", "B", "magnitude")] for name, start in found.items()}


def by_hand(model, base, scaling=2.0, splits=None, enabled=None):
    """The base with g (W0 + s B A) in its weights, differentiable in A, B and the magnitudes.

    Returns:
        A function of the inputs of `base["x"]`.
    """
    weights, merged = dict(model.named_parameters()), {}
    for name, (A, B, magnitude) in adapters(model).items():
        if splits and name.endswith("in_proj_weight"):
            parts, As, Bs, rows = [], iter(A.chunk(sum(enabled))), iter(B.split(splits[0])), splits[0]
            for wanted in enabled:
                parts.append(next(Bs) @ next(As) if wanted else torch.zeros_like(weights[name][:rows]))
            update = torch.cat(parts)
        else:
            update = B @ A
        W = weights[name].detach() + scaling * update
        if magnitude is not None:
            W = W / W.norm(dim=1, keepdim=True).detach() * magnitude[:, None]
        merged[name] = W
    right = _First(copy.deepcopy(base)).train(model.training)
    return lambda *inputs: functional_call(right, {f"model.{name}": W for name, W in merged.items()}, inputs)


class _First(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model["x"](*inputs)
