"""One module's adapter as a LoRA layer by itself: what its kind says of A and B, without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn as nn
from torch import Tensor

from lora.layers.layer import LoRALayer
from lora.layers.registry import kind_for
from lora.models.injection import Plan, adapt

_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def bare_layer(settings: Mapping[str, Any], A: Tensor, B: Tensor, magnitude: Tensor | None = None) -> LoRALayer:
    """A LoRA layer with these tensors, whose base weight has a shape and no values.

    Its `delta(A, B)` is B A in the shape of the base weight; given a `weight`, `merge_into` adds the update to it.

    Args:
        settings: the entry of `Adapter.modules`.
        A, B: the adapter's tensors; they are shared.
        magnitude: that of DoRA, shared as well. Default: None, the layer without it.

    Raises:
        ValueError: the kind of layer is a user's own, or settings and shapes do not fit each other.
    """
    base = settings["base"]
    make = _BASES.get(base["kind"])
    if make is None:
        raise ValueError(f"is of the kind {base['kind']}, which only its model knows.")
    shape = _shape(base["kind"], settings, A, B) if base.get("shape") is None else list(base["shape"])
    if base["kind"] != "conv" and len(shape) != 2:
        raise ValueError(f"`base` must have a shape of two sizes for {base['kind']!r}, got {shape}.")
    module = make(shape, base)
    kind = kind_for(type(module))
    assert kind is not None, "these are torch's own"
    kind, own = kind.configure(
        module, **{option: settings.get(option) for option in ("splits", "enable_lora", "factored")}
    )
    for tensor, name, expected in zip(
        (A, B), ("lora_A", "lora_B"), kind.lora_shapes(module, settings["r"], **own), strict=True
    ):
        if tuple(tensor.shape) != tuple(expected):
            raise ValueError(f"{name} must have the shape {tuple(expected)}, got {tuple(tensor.shape)}.")
    general = {key: settings[key] for key in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    adapt([Plan(module, kind, general | own | {"use_dora": magnitude is not None})])
    assert isinstance(module, LoRALayer), "it was adapted"
    module.scaling = float(settings["scaling"])
    module.lora_A, module.lora_B = nn.Parameter(A, False), nn.Parameter(B, False)
    if magnitude is not None:
        if magnitude.shape != module.lora_magnitude.shape:
            expected = tuple(module.lora_magnitude.shape)
            raise ValueError(f"lora_magnitude must have the shape {expected}, got {tuple(magnitude.shape)}.")
        module.lora_magnitude = nn.Parameter(magnitude, False)
    if base.get("fan_in_fan_out"):
        module.fan_in_fan_out = True
        module.weight = nn.Parameter(module.weight.T, False)
    return module


def _linear(shape: list[int], base: Mapping[str, Any]) -> nn.Module:
    out_features, in_features = reversed(shape) if base.get("fan_in_fan_out") else shape
    return nn.Linear(in_features, out_features, bias=False, device="meta")


def _embedding(shape: list[int], base: Mapping[str, Any]) -> nn.Module:
    num_embeddings, embedding_dim = shape
    return nn.Embedding(num_embeddings, embedding_dim, device="meta")


def _conv(shape: list[int], base: Mapping[str, Any]) -> nn.Module:
    out_channels, in_channels, *kernel = shape
    groups = base.get("groups", 1)
    if len(shape) not in _CONVOLUTIONS or out_channels % groups:
        raise ValueError(f"no convolution has a weight of shape {tuple(shape)} and {groups} groups.")
    sizes = in_channels * groups, out_channels, tuple(kernel)
    return _CONVOLUTIONS[len(shape)](*sizes, groups=groups, bias=False, device="meta")


_BASES: dict[str, Callable[[list[int], Mapping[str, Any]], nn.Module]] = {
    "linear": _linear,
    "embedding": _embedding,
    "conv": _conv,
}


def _shape(kind: str, settings: Mapping[str, Any], A: Tensor, B: Tensor) -> list[int]:
    """The shape of a packed base weight, which its description leaves open."""
    if kind == "conv":
        raise ValueError("`base` must have a shape for a convolution.")
    shape = [sum(settings.get("splits") or (B.shape[0],)), A.shape[1]]
    return shape[::-1] if kind == "embedding" or settings["base"].get("fan_in_fan_out") else shape
