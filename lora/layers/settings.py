"""The words that define an adapter: which values they may have, and in which form layers keep them."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from lora.errors import is_count, is_number


def settings_problems(r: Any, lora_alpha: Any, lora_dropout: Any) -> list[str]:
    """What is wrong with settings that no layer can take; nothing if they are fine."""
    problems = []
    if not is_count(r):
        problems.append(f"`r` must be an integer of at least 0, got {r!r}.")
    if not is_number(lora_alpha):
        problems.append(f"`lora_alpha` must be a finite number, got {lora_alpha!r}.")
    if not is_number(lora_dropout) or not 0 <= lora_dropout < 1:
        problems.append(f"`lora_dropout` must be at least 0 and below 1, got {lora_dropout!r}.")
    return problems


def split_settings(
    out_features: int, splits: Sequence[int] | None, enable_lora: bool | Sequence[bool | int]
) -> dict[str, Any]:
    """`splits` and `enable_lora` in the form that layers keep: tuples of ints and of bools."""
    if splits is not None and not (_is_sequence(splits) and all(isinstance(size, numbers.Integral) for size in splits)):
        raise ValueError(f"`splits` must be a list or a tuple of integers, got {splits!r}.")
    if isinstance(enable_lora, bool):
        enable_lora = (enable_lora,) * len(splits or (0,))
    mask = tuple(enable_lora) if _is_sequence(enable_lora) else ()
    if not mask or any(entry not in (0, 1) for entry in mask):
        raise ValueError(f"`enable_lora` must hold at least one entry, each a bool, 0 or 1, got {enable_lora!r}.")
    if splits is None:
        if out_features % len(mask):
            raise ValueError(
                f"`out_features` (={out_features}) must be divisible by the {len(mask)} entries of `enable_lora`; "
                "for uneven splits give `splits`."
            )
        splits = (out_features // len(mask),) * len(mask)
    return {"splits": tuple(int(size) for size in splits), "enable_lora": tuple(map(bool, mask))}


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
