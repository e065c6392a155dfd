"""What an adapter has learnt since it started as a part of the base weight: a difference, of twice its rank.

    s · B A − s₀ · B₀ A₀

is what a base that nobody has changed can load.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora.layers.layer import LoRALayer
from lora.layers.weights import same_values
from lora.models.blocks import Pair, factor_blocks, tensors_of


@torch.no_grad()
def since_start(layer: LoRALayer, s: float) -> Pair:
    """A and B, at twice the layer's rank and for the scaling `s`, of what it has learnt: s · (B A − (s₀ / s) B₀ A₀)."""
    assert layer.lora_start is not None, "asked of layers that have one"
    A, B, scaling = layer.lora_start
    trained: Tensor = layer.lora_B
    if not layer.lora_scaling:  # nothing of A and B counts, and their start does
        trained = torch.zeros_like(layer.lora_B)
    ratio = scaling / s
    blocks = zip(_pairs(layer, layer.lora_A, trained), _pairs(layer, A, B * -ratio), strict=True)
    pairs = [(torch.cat([B, B0], 1), torch.cat([A, A0])) for (B, A), (B0, A0) in blocks]
    return tensors_of(layer, pairs)


def to_start(layer: LoRALayer, r: int, s: float, A: Tensor, B: Tensor) -> Pair:
    """A and B of a layer, from what `since_start` made of one that started alike, of rank `r` and for the scaling `s`.

    Raises:
        ValueError: it is of a layer that started from something else.
    """
    assert layer.lora_start is not None, "asked of layers that have one"
    A0, B0, scaling = layer.lora_start
    if r != 2 * layer.r or A.shape[0] != 2 * A0.shape[0]:
        raise ValueError(
            f"its adapter in the model started from a part of the base weight, so that the file's has twice its rank: "
            f"`r` must be {2 * layer.r}, got {r}."
        )
    if not s:
        raise ValueError("a scaling of 0 in the file loses what the adapter started from.")
    rows, q = layer.lora_block_rows(), B0.shape[1]
    Bs, As = torch.split(B.flatten(1), rows), A.flatten(1).chunk(len(rows))
    started = [(-B[:, q:], A[q:]) for B, A in zip(Bs, As, strict=True)]
    ours = _pairs(layer, A0, B0 * (scaling / s))
    if not all(
        same_values(x, y) for pair, own in zip(started, ours, strict=True) for x, y in zip(pair, own, strict=True)
    ):
        raise ValueError(
            "its adapter in the file started from another part of the base weight than the one in the model: load it "
            "into the plain base model, or initialise as it was."
        )
    return tensors_of(layer, [(B[:, :q], A[:q]) for B, A in zip(Bs, As, strict=True)])


def _pairs(layer: LoRALayer, A: Tensor, B: Tensor) -> list[Pair]:
    return factor_blocks(layer, A.detach().cpu(), B.detach().cpu())
