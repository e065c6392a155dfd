"""In what order a fused projection has its rows, when each of its splits is divided among ranks.

    model order   q q q q k k v v        rank order, for two ranks   q q k v | q q k v

A rank then holds a part of each split, one below the other, and computes as on a smaller fused projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

# A fused projection's own tensors that have a row for each output.
_WITH_ROWS = ("weight", "bias", "lora_B", "lora_magnitude")


def rank_order(splits: Sequence[int], ranks: int) -> Tensor:
    """Which row of the model stands where, if every split is divided among this many ranks."""
    by_split = [rows.view(ranks, -1) for rows in torch.split(torch.arange(sum(splits)), list(splits))]
    return torch.cat(by_split, 1).flatten()  # each (ranks, size / ranks) -> (rows)


def in_rank_order(module: nn.Module, own: str, tensor: Tensor) -> Tensor:
    """A module's own tensor, whole and as the model has it, in the order in which the module keeps it."""
    order = _order_of(module, own)
    return tensor if order is None else _select(module, own, tensor, order)


def in_model_order(module: nn.Module, own: str, tensor: Tensor) -> Tensor:
    """A module's own tensor, whole and in the order in which the module keeps it, as the model has it."""
    order = _order_of(module, own)
    return tensor if order is None else _select(module, own, tensor, order.argsort())


def is_reordered(module: nn.Module, own: str) -> bool:
    """Whether a module keeps one of its own tensors in an order of its own."""
    return own in _WITH_ROWS and getattr(module, "divided_splits", None) is not None


def dim_of_rows(module: nn.Module, own: str) -> int:
    """Which dimension of a linear layer's own tensor counts its outputs."""
    return 1 if own == "weight" and getattr(module, "fan_in_fan_out", False) else 0


def _order_of(module: nn.Module, own: str) -> Tensor | None:
    if not is_reordered(module, own):
        return None
    divided: Any = module.divided_splits
    splits, ranks = divided
    if own.startswith("lora_"):  # those of a merged layer have rows for the enabled splits alone
        splits = tuple(compress(splits, getattr(module, "enable_lora", splits)))
    return rank_order(splits, ranks)


def _select(module: nn.Module, own: str, tensor: Tensor, order: Tensor) -> Tensor:
    return tensor.index_select(dim_of_rows(module, own), order.to(tensor.device))
