"""What the tests of calibration share: a model that waits, and what a copy of its base sees of the same batches."""

import copy
import math

import numpy as np
import torch
from torch import nn
from toy_model import IDS, Model

import lora

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj", "head"]
BATCHES = [IDS, IDS.flip(0, 1)[:, :3], torch.tensor([[5, 6, 7, 8, 9, 1]])]
METHODS = ["eva", "lora_ga", "corda"]


def waiting(how, base=None, **fields):
    """A model whose adapters wait for data, and its base."""
    base = Model().double() if base is None else base
    model = copy.deepcopy(base)
    lora.inject(model, **{"target_modules": TARGETS, "r": 2, "lora_alpha": 3, "init_lora_weights": how} | fields)
    return model, base


def loss_of(model, batch):
    return model(batch).square().mean()


def seen(base, batches, loss=loss_of):
    """Of every linear layer, by name: all inputs, a row each, and the weight's gradient, summed over the batches."""
    inputs, layers = {}, {name: m for name, m in base.named_modules() if isinstance(m, nn.Linear)}
    hooks = [
        layer.register_forward_hook(lambda _, x, y, name=name: inputs.setdefault(name, []).append(x[0].flatten(0, -2)))
        for name, layer in layers.items()
    ]
    base = base.requires_grad_(True)
    for batch in batches:
        loss(base, batch).backward()
    for hook in hooks:
        hook.remove()
    rows = {name: torch.cat(x).detach().double().numpy() for name, x in inputs.items()}
    gradients = {name: layer.weight.grad.double().numpy() for name, layer in layers.items()}
    base.zero_grad()
    return rows, gradients


def numbers(tensor):
    return tensor.detach().double().numpy()


def projector(rows):
    """Onto the space of orthonormal rows; signs and mixtures of equal values do not matter."""
    return rows.T @ rows


def principal(x, r):
    """The r leading principal directions of rows, as sklearn's PCA has them, and the share of variance of each."""
    _, S, Vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return Vt[:r], S**2 / (S**2).sum()


def assert_same_function(model, base, started):
    """The model computes what its base did, to rounding; and the base weights are what they were, plus a start."""
    torch.testing.assert_close(model(IDS), base(IDS), rtol=0, atol=1e-10)
    with lora.disabled(model):
        torch.testing.assert_close(model(IDS), base(IDS), rtol=0, atol=1e-10)
    theirs = dict(base.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, lora.LoRALayer):
            assert torch.equal(layer.weight, theirs[name].weight) != started


def adapted(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, lora.LoRALayer)}


def assert_lora_ga(A, B, gradient, r, gamma=16.0):
    U, S, Vt = np.linalg.svd(gradient, full_matrices=False)
    c2 = math.sqrt(len(U)) / gamma
    np.testing.assert_allclose(projector(A), c2 * projector(Vt[:r]), atol=1e-8)
    np.testing.assert_allclose(projector(B.T), c2 * projector(U[:, r : 2 * r].T), atol=1e-8)
    return (S[: 2 * r] ** 2).sum() / (S**2).sum()
