"""The numbers that define an adapter: its rank, its scaling, its dropout, and what is wrong with them."""

from __future__ import annotations

import math
from typing import Any

import torch

from lora.errors import is_count, is_number, short

_LARGEST_SCALING = torch.finfo(torch.float32).max


def scaling_of(lora_alpha: float, r: int, use_rslora: bool = False) -> float:
    """s = lora_alpha / r, or lora_alpha / √r (rsLoRA, arXiv:2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def alpha_of(scaling: float, r: int, use_rslora: bool = False) -> float:
    """The lora_alpha that gives a scaling at rank `r`."""
    lora_alpha = scaling * (math.sqrt(r) if use_rslora else r)
    if not is_number(lora_alpha):
        raise ValueError(f"a scaling of {scaling} at rank {r} takes a `lora_alpha` beyond floats.")
    return lora_alpha


def scaling_problem(scaling: Any) -> str | None:
    """What is wrong with a scaling, if anything: torch multiplies no tensor by what float32 does not hold."""
    if is_number(scaling) and abs(scaling) <= _LARGEST_SCALING:
        return None
    at_most = f" of at most {_LARGEST_SCALING:.2g}" if is_number(scaling) else ""
    return f"`scaling` must be a finite number{at_most}, got {short(scaling)}."


def settings_problems(r: Any, lora_alpha: Any, lora_dropout: Any, use_rslora: Any = False) -> list[str]:
    """What is wrong with settings that no layer can take; nothing if they are fine."""
    problems = []
    if not is_count(r):
        problems.append(f"`r` must be an integer of at least 0, got {short(r)}.")
    if not is_number(lora_alpha):
        problems.append(f"`lora_alpha` must be a finite number, got {short(lora_alpha)}.")
    if not is_number(lora_dropout) or not 0 <= lora_dropout < 1:
        problems.append(f"`lora_dropout` must be at least 0 and below 1, got {short(lora_dropout)}.")
    if not problems and r > 0 and scaling_problem(scaling_of(lora_alpha, r, bool(use_rslora))):
        said = f"{short(lora_alpha)} at `r` = {r}"
        problems.append(f"`lora_alpha` must make a scaling of at most {_LARGEST_SCALING:.2g}, got {said}.")
    return problems
