"""What an adapter has learnt since it started as a part of the base weight: a difference, of twice its rank.

    s · B A − s₀ · B₀ A₀

is what a base that nobody has changed can load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora.adapters.single import Form, with_rank
from lora.layers.layer import LoRALayer
from lora.layers.weights import same_values
from lora.models.blocks import Pair, factor_blocks, tensors_of


@torch.no_grad()
def difference(layer: LoRALayer, settings: Mapping[str, Any]) -> Form:
    """Settings, A and B of what the layer has learnt: s · (B A − (s₀ / s) B₀ A₀), at twice its rank."""
    assert layer.lora_start is not None, "asked of layers that have one"
    A, B, scaling = layer.lora_start
    trained: Tensor = layer.lora_B
    if not layer.scaling:  # nothing of A and B counts, and their start does
        settings, trained = {**settings, "scaling": 1.0}, torch.zeros_like(layer.lora_B)
    ratio = scaling / settings["scaling"]
    blocks = zip(_pairs(layer, layer.lora_A, trained), _pairs(layer, A, B * -ratio), strict=True)
    pairs = [(torch.cat([B, B0], 1), torch.cat([A, A0])) for (B, A), (B0, A0) in blocks]
    return with_rank(settings, 2 * layer.r), *tensors_of(layer, pairs)


def without_start(layer: LoRALayer, settings: Mapping[str, Any], A: Tensor, B: Tensor) -> Form:
    """The inverse of `difference`, for a layer that started from the same A and B; ValueError for another's."""
    assert layer.lora_start is not None, "asked of layers that have one"
    A0, B0, scaling = layer.lora_start
    if settings["r"] != 2 * layer.r or A.shape[0] != 2 * A0.shape[0]:
        raise ValueError(
            f"its adapter in the model started from a part of the base weight, so that the file's has twice its rank: "
            f"`r` must be {2 * layer.r}, got {settings['r']}."
        )
    if not settings["scaling"]:
        raise ValueError("a scaling of 0 in the file loses what the adapter started from.")
    rows, q = layer.block_rows(), B0.shape[1]
    Bs, As = torch.split(B.flatten(1), rows), A.flatten(1).chunk(len(rows))
    started = [(-B[:, q:], A[q:]) for B, A in zip(Bs, As, strict=True)]
    ours = _pairs(layer, A0, B0 * (scaling / settings["scaling"]))
    if not all(
        same_values(x, y) for pair, own in zip(started, ours, strict=True) for x, y in zip(pair, own, strict=True)
    ):
        raise ValueError(
            "its adapter in the file started from another part of the base weight than the one in the model: load it "
            "into the plain base model, or initialise as it was."
        )
    trained = tensors_of(layer, [(B[:, :q], A[:q]) for B, A in zip(Bs, As, strict=True)])
    return with_rank(settings, layer.r), *trained


def _pairs(layer: LoRALayer, A: Tensor, B: Tensor) -> list[Pair]:
    return factor_blocks(layer, A.detach().cpu(), B.detach().cpu())
