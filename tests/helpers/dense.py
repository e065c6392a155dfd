"""Adapters of one module for every kind of layer, and what they mean: dense matrices by numpy in float64."""

import numpy as np
import torch
import torch.nn as nn
from conftest import make, update

import lora

#: numpy's view of a weight-shaped update as the matrices that have a rank of their own, by the kinds of conftest.
BLOCKS = {
    "Linear": lambda W: [W],
    "Linear transposed": lambda W: [W.T],
    "MergedLinear": lambda W: [W[:4], W[7:]],  # splits (4, 3, 2), the middle one not enabled
    "Embedding": lambda W: [W.T],
    "Conv1d": lambda W: [W.reshape(6, 4 * 3)],
    "Conv2d": lambda W: [W.reshape(3 * 3, 4 * 3)],  # loralib: out / groups · k, in · k
    "Conv3d": lambda W: [W.reshape(3 * 2, 2 * 4)],
    "Conv1d factored": lambda W: [W.reshape(6, -1)],
    "Conv2d factored": lambda W: [W[:3].reshape(3, -1), W[3:].reshape(3, -1)],  # 2 groups
    "Conv3d factored": lambda W: [W.reshape(3, -1)],
}
#: The rank of a block at r.
BLOCK_RANK = {"Conv2d": lambda r: 3 * r, "Conv3d": lambda r: 2 * r, "Conv2d factored": lambda r: r // 2}


def block_rank(kind, r):
    return BLOCK_RANK.get(kind, lambda r: r)(r)


def constant(layer):
    """The layer with a base weight, and bias, that are always the same."""
    nn.init.constant_(layer.weight, 0.5)
    if getattr(layer, "bias", None) is not None:
        nn.init.constant_(layer.bias, 0.25)
    return layer


def adapter_of(kind, r=2, dtype=torch.float64, scaling=None, **arguments):
    """An adapter of one layer, "0", whose base weight, and bias, are always the same."""
    layer = constant(make(kind, r=r, **arguments).to(dtype))
    layer.scaling = layer.scaling if scaling is None else scaling
    model = nn.Sequential(layer)
    lora.mark_only_lora_as_trainable(model)
    return lora.adapter_of(model)


def terms(kind, ranks=(2, 4, 2), weights=(0.5, -1.5, 2.0), **options):
    """Pairs of an adapter and its weight."""
    return [(adapter_of(kind, r, **options), weight) for r, weight in zip(ranks, weights, strict=True)]


def dense(adapter, name="0"):
    """s · B A in the shape of the base weight."""
    layer = adapter.layer(name)
    layer.lora_alpha = adapter.modules[name]["scaling"] * layer.r
    return update(layer)


def total(adapters):
    """The weighted sum of dense updates."""
    return sum(weight * dense(adapter) for adapter, weight in adapters)


def best(matrix, rank):
    """The best approximation at a rank, and its squared singular values."""
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vt[:rank], S**2


def absolute(adapter):
    """The adapter with every number in it positive: its update bounds the sum of all products' magnitudes."""
    modules = {name: {**settings, "scaling": abs(settings["scaling"])} for name, settings in adapter.modules.items()}
    return lora.Adapter(modules, {name: tensor.detach().abs() for name, tensor in adapter.tensors.items()})


def assert_same(got, expected, scale=1.0):
    """Equal but for float64's rounding in sums and decompositions."""
    tolerance = 64 * np.finfo(np.float64).eps * max(scale, np.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def content(adapter):
    """All that an adapter says, to compare it with itself later."""
    return repr(adapter.modules), {name: tensor.clone() for name, tensor in adapter.tensors.items()}


def assert_unchanged(adapter, before):
    modules, tensors = before
    assert repr(adapter.modules) == modules
    assert all(torch.equal(tensors[name], tensor) for name, tensor in adapter.tensors.items())


def with_module(adapter, name, new):
    """The adapter with one of its modules under another name."""
    rename = {f"{name}.{own}": f"{new}.{own}" for own in ("lora_A", "lora_B")}
    tensors = {rename.get(key, key): tensor for key, tensor in adapter.tensors.items()}
    modules = {new if key == name else key: settings for key, settings in adapter.modules.items()}
    return lora.Adapter(modules, tensors)
