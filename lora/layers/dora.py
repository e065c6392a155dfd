"""DoRA: a magnitude m for each output, and the direction from W₀ + s · B A.

    W = g ⊙ (W₀ + s · B A)        g = m / ‖W₀ + s · B A‖

The norm counts as a constant for gradients (arXiv:2402.09353, section 4.3). It is taken without building the sum:

    ‖W₀ + s · B A‖² = ‖W₀‖² + 2 s · Σ (W₀ Aᵀ) ⊙ B + s² · Σ (B (A Aᵀ)) ⊙ B        each Σ over a row
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora.functional.fused import is_plain, without_autocast
from lora.functional.magnitude import magnify
from lora.layers.derived import Derived

if TYPE_CHECKING:
    from lora.layers.layer import LoRALayer

_PART = 2**20  # values of a weight that are summed at a time


@torch.no_grad()
def squared_norms(layer: LoRALayer) -> Tensor:
    """‖W₀ + s · B A‖² for each output that has a magnitude, in float32, or float64 where the weight is."""
    weight, rows, s = layer.base_weight(), layer.block_rows(), layer.lora_scaling()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with without_autocast(weight.device):
        Bs = torch.split(layer.lora_B.to(dtype).flatten(1), rows)
        As = layer.lora_A.to(dtype).flatten(1).chunk(len(rows))
        added = []
        for W, A, B in zip(layer.weight_blocks(weight), As, Bs, strict=True):  # (rows, cols), (q, cols), (rows, q)
            cross = (W @ A.T.to(W.dtype)).to(dtype)  # (rows, q): no copy of W in another dtype
            added.append(((2 * s * cross + s * s * (B @ (A @ A.T))) * B).sum(1))  # (rows)
        return _base_squares(layer, weight, dtype) + torch.cat(added)


@torch.no_grad()
def dense_norms(layer: LoRALayer) -> Tensor:
    """The same, from the sum itself: for a kind whose update has no blocks in the weight's own rows."""
    weight = layer.base_weight()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with without_autocast(weight.device):
        update = layer.delta(layer.lora_A.to(dtype), layer.lora_B.to(dtype))
    total: Tensor = weight.to(dtype) + layer.lora_scaling() * update
    norm: Tensor = torch.linalg.vector_norm(total.flatten(1), dim=1)
    return norm


def _current_norms(layer: LoRALayer) -> Tensor:
    """The norms; remembered where no gradient is wanted, as when text is generated, token by token."""
    sources = layer.weight, layer.lora_A, layer.lora_B
    if torch.is_grad_enabled() or not is_plain(*sources):
        return layer.norms()
    if layer._norms is None or not layer._norms.is_current(sources, layer.scaling):
        with torch.inference_mode(False):
            layer._norms = Derived(sources, layer.scaling, layer.norms())
    return layer._norms.tensor


def _base_squares(layer: LoRALayer, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """‖W₀‖² for each output, remembered while the weight stays what it is."""
    if weight is not layer.weight or not is_plain(weight):  # it was computed just now, or is being traced
        return _squares(layer, weight, dtype)
    if layer._squares is None or not layer._squares.is_current((weight,), 0.0):
        with torch.inference_mode(False):
            layer._squares = Derived((weight,), 0.0, _squares(layer, weight, dtype))
    return layer._squares.tensor


def _squares(layer: LoRALayer, weight: Tensor, dtype: torch.dtype) -> Tensor:
    squares = []
    for block in layer.weight_blocks(weight):  # (rows, columns)
        # In parts, as torch copies what is in another dtype; whole where a compiler does better.
        size = max(1, _PART // max(1, block.shape[1])) if is_plain(block) else len(block)
        parts = torch.split(block, size)
        squares += [torch.linalg.vector_norm(part, dim=1, dtype=dtype).square() for part in parts]
    return torch.cat(squares)


def gain(layer: LoRALayer) -> Tensor:
    """g for each row of the weight, in float32 at least: 1 where the layer has no magnitude."""
    return 1 + layer.over_outputs(excess(layer))


def excess(layer: LoRALayer) -> Tensor:
    """g − 1, exactly 0 at the start, for each output that has a magnitude."""
    norm = _current_norms(layer).to(layer.lora_magnitude.device).detach()  # `no_grad` is not for forward-mode tangents
    # Outputs whose weights are all zero have no direction: g = 1, with which they can learn one.
    some = norm != 0
    return torch.where(some, layer.lora_magnitude - norm, 0) / torch.where(some, norm, 1)


def magnified(layer: LoRALayer, y: Tensor) -> Tensor:
    """g ⊙ (y − b) + b, for y = (W₀ + s · B A) x + b."""
    excess = layer.over_outputs(layer.lora_excess()).to(y.dtype)
    bias = layer._parameters.get("bias")
    _, dim = layer.output_dims()
    return magnify(y, excess, None if bias is None else bias.to(y.dtype), dim)
