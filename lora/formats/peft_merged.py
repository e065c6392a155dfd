"""Fused projections as PEFT before 0.3 had them (`enable_lora`): A of all that are enabled, and B of two groups.

The outputs that are enabled, one after the other, are cut into two groups: A's first half is for the first, its second
half for the other. With two splits enabled, a group is a split. With others, a split may be cut in two, and splits of
one group have one A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lora.adapters.adapter import Form, ModuleAdapter
from lora.adapters.base import Base
from lora.errors import short
from lora.layers.settings import alpha_of, scaling_of

OPTION = "enable_lora"
_GROUPS = 2
_MOST = 64  # splits


def problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the setting, if it is there."""
    said = config.get(OPTION)
    if said is None:
        return
    if not isinstance(said, list) or not 0 < len(said) <= _MOST or not all(isinstance(each, bool) for each in said):
        yield f"`{OPTION}` must be a list of at most {_MOST} truth values, got {short(said)}."
    elif not any(said):
        yield f"`{OPTION}` must enable a split, got {short(said)}."


def form_of(config: Mapping[str, Any], r: Any, lora_alpha: Any, A: Tensor, B: Tensor) -> Form:
    """A module's adapter as one of `lora.MergedLinear`; ValueError if the shapes are others."""
    enabled = config[OPTION]
    count = sum(enabled)
    rank, odd = divmod(r * count, _GROUPS)
    size, rest = divmod(B.shape[0], count)
    if odd or rest or B.shape[0] % _GROUPS or A.dim() != 2 or len(A) != r * count or B.shape[1:] != (rank, 1):
        shapes = f"{(*A.shape,)} and {(*B.shape,)}"
        raise ValueError(f"the shapes {shapes} do not fit r = {r} and `{OPTION}` = {short(enabled)}.")
    half = B.shape[0] // _GROUPS
    splits, mask, parts, start = list[int](), list[bool](), list[Tensor](), 0
    for is_enabled in enabled:
        ends = [start + size] if is_enabled else []
        ends = [half, *ends] if ends and start < half < start + size else ends
        for end in ends:
            splits, mask = [*splits, end - start], [*mask, True]
            parts.append(A[rank * (start // half) :][:rank])
            start = end
        if not is_enabled:
            splits, mask = [*splits, size], [*mask, False]
    scaling = scaling_of(lora_alpha, r)
    settings = ModuleAdapter(
        r=rank,
        lora_alpha=alpha_of(scaling, rank),
        lora_dropout=config.get("lora_dropout") or 0.0,
        use_rslora=False,
        splits=tuple(splits),
        enable_lora=tuple(mask),
        scaling=scaling,
        base=Base(kind="linear"),
    )
    return settings, torch.cat(parts), B.squeeze(2)
