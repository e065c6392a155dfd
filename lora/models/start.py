"""Adapters that start as a part of the base weight: W₀ + s · B A is unchanged, and W₀ is not.

What they started from is remembered, so that the pretrained weight is not lost: it is W₀ + s₀ · B₀ A₀.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lora.functional.fused import exact_dtype, without_autocast
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.models.blocks import Pair, tensors_of
from lora.models.model import undo_on_error


@torch.no_grad()
def start_from(layer: LoRALayer, pairs: Sequence[Pair], *, writes_base: bool) -> None:
    """Give A and B these blocks.

    Args:
        pairs: B (rows, q) and A (q, columns) of each block of the layer.
        writes_base: take s · B A out of W₀, so that the sum is unchanged to rounding.
    """
    A, B = tensors_of(layer, pairs)
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)
    if writes_base:
        remember_start(layer)
        _take_out(layer)
    layer.awaits = None
    layer.reset_magnitude()


def remember_start(layer: LoRALayer, base_written: bool = True) -> None:
    """Take A and B, as they are, for a part of the pretrained weight; was the base weight changed for it?"""
    # On the CPU, whatever device the layer is moved to: it is asked for when a run begins or ends.
    A, B = (factor.detach().to("cpu", copy=True) for factor in (layer.lora_A, layer.lora_B))
    layer.lora_start, layer.base_written = (A, B, layer.scaling), base_written


@torch.no_grad()
def pretrained_weight(layer: LoRALayer) -> Tensor:
    """The base weight as it was before an initialiser changed it, to rounding."""
    weight = layer.base_weight()
    if layer.lora_start is None:
        return weight
    dtype = exact_dtype(weight.dtype)
    return (weight.to(dtype) + _started(layer, dtype)).to(weight.dtype)


@torch.no_grad()
def give_back(layer: LoRALayer) -> None:
    """Write the pretrained weight into the base again."""
    if layer.lora_start is not None:
        if layer.base_written:
            layer.write_base(pretrained_weight(layer))
        layer.lora_start = None


@contextmanager
def undo_start_on_error(layers: Sequence[LoRALayer]) -> Iterator[None]:
    """Put the layers' adapters and starts back if the block raises, and base weights that it wrote, to rounding."""
    starts = [(layer, layer.lora_start, layer.base_written) for layer in layers]
    with undo_on_error(layers, [factor for layer in layers for _, factor in layer.lora_parameters()]):
        try:
            yield
        except BaseException:
            for layer, start, base_written in starts:
                if layer.lora_start is not start:
                    give_back(layer)
                    layer.lora_start, layer.base_written = start, base_written
                    _take_out(layer)
            raise


@torch.no_grad()
def _take_out(layer: LoRALayer) -> None:
    """Take the layer's start out of the base weight, where that is to be so."""
    if layer.lora_start is not None and layer.base_written:
        weight = layer.base_weight()
        dtype = exact_dtype(weight.dtype)
        layer.write_base((weight.to(dtype) - _started(layer, dtype)).to(weight.dtype))


def _started(layer: LoRALayer, dtype: torch.dtype) -> Tensor:
    """s₀ · B₀ A₀, in the shape of the weight."""
    assert layer.lora_start is not None, "asked of layers that have one"
    A, B, scaling = layer.lora_start
    with without_autocast(layer.lora_A.device):
        started = layer.delta(A.to(layer.lora_A.device, dtype), B.to(layer.lora_A.device, dtype)) * scaling
    return weights.of(layer, "weight").sharded_like(started)
