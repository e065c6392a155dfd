"""Adapters that start as a part of the base weight: W₀ + s · B A is unchanged, and W₀ is not.

What they started from is remembered, so that the pretrained weight is not lost: it is W₀ + s₀ · B₀ A₀.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora.blocks import Pair, tensors_of
from lora.layer import LoRALayer
from lora.tensors import without_autocast


@torch.no_grad()
def start_from(layer: LoRALayer, pairs: Sequence[Pair], *, writes_base: bool) -> None:
    """Give A and B these blocks.

    Args:
        pairs: B (rows, q) and A (q, columns) of each block of the layer.
        writes_base: take s · B A out of W₀, so that the sum is unchanged to rounding.
    """
    A, B = tensors_of(layer, pairs)
    pretrained = layer.base_weight() if writes_base else None
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)
    if pretrained is not None:
        remember_start(layer)
        dtype = torch.promote_types(pretrained.dtype, torch.float32)
        layer.write_base((pretrained.to(dtype) - _started(layer, dtype)).to(pretrained.dtype))
    layer.awaits = None
    layer.reset_magnitude()


def remember_start(layer: LoRALayer) -> None:
    """Take A and B, as they are, for a part of the pretrained weight."""
    # On the CPU, whatever device the layer is moved to: it is asked for when a run begins or ends.
    A, B = (factor.detach().to("cpu", copy=True) for factor in (layer.lora_A, layer.lora_B))
    layer.lora_start = A, B, layer.scaling


@torch.no_grad()
def pretrained_weight(layer: LoRALayer) -> Tensor:
    """The base weight as it was before an initialiser changed it, to rounding."""
    weight = layer.base_weight()
    if layer.lora_start is None:
        return weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(dtype) + _started(layer, dtype)).to(weight.dtype)


@torch.no_grad()
def give_back(layer: LoRALayer) -> None:
    """Write the pretrained weight into the base again."""
    if layer.lora_start is not None:
        layer.write_base(pretrained_weight(layer))
        layer.lora_start = None


def _started(layer: LoRALayer, dtype: torch.dtype) -> Tensor:
    """s₀ · B₀ A₀, in the shape of the weight."""
    assert layer.lora_start is not None, "asked of layers that have one"
    A, B, scaling = layer.lora_start
    with without_autocast(layer.lora_A.device):
        return layer.delta(A.to(layer.lora_A.device, dtype), B.to(layer.lora_A.device, dtype)) * scaling
