"""How large updates are and how far apart, from A and B: the product is never made."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.adapters.adapter import Adapter
from lora.adapters.single import as_single
from lora.layers.linear import MergedLinearLoRA
from lora.models.blocks import Pair, pairs_of, spectrum


@dataclass(frozen=True)
class Block:
    """One block of an update: ‖s · B A‖, its effective rank, and the rows of the output that it is for, if not all."""

    norm: float
    effective_rank: float
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Distance:
    """Two updates: the norm of each, that of their difference, and the cosine between them; None where one is zero."""

    norm_a: float
    norm_b: float
    distance: float
    cosine: float | None


def relative(distance: float, size: float) -> float:
    """A distance as a share of a size; infinite where there is only the distance."""
    return distance / size if size else math.inf if distance else 0.0


def blocks(adapter: Adapter, name: str) -> list[Block]:
    """A module's update block by block: one for each split or group; ValueError if only its model knows them."""
    layer = adapter.layer(name)
    rows = layer.lora_slices() if isinstance(layer, MergedLinearLoRA) else None
    measured = []
    for index, (B, A) in enumerate(pairs_of(layer)):
        S = spectrum(B, A).S * abs(layer.lora_scaling)
        measured.append(Block(float(S.norm()), effective_rank(S), rows[index] if rows else None))
    return measured


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of the normalised squared singular values: r if all are equal, 1 if one counts, 0 for none.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 6)
    2.0
    """
    energy = S.double().square()
    if not energy.sum() > 0:
        return 0.0
    return float(torch.special.entr(energy / energy.sum()).sum().exp())


def distance(a: Adapter, b: Adapter, name: str) -> Distance:
    """How far apart the two updates of a module are; ValueError if they are updates of different weights."""
    if a.magnitude(name) is not None or b.magnitude(name) is not None:
        raise ValueError("with magnitudes (DoRA), updates cannot be compared without the base weight.")
    pairs_a, pairs_b = _alike(a, b, name)
    if [_shape(pair) for pair in pairs_a] != [_shape(pair) for pair in pairs_b]:
        raise ValueError("their base weights have different shapes.")
    both = list(zip(pairs_a, pairs_b, strict=True))
    norm_a, norm_b = _norm(pairs_a), _norm(pairs_b)
    apart = _norm([(torch.cat([B, -D], 1), torch.cat([A, C])) for (B, A), (D, C) in both])  # B A - D C
    inner = sum(float(((B.T @ D) * (A @ C.T)).sum()) for (B, A), (D, C) in both)  # tr((B A)ᵀ D C)
    return Distance(norm_a, norm_b, apart, inner / (norm_a * norm_b) if norm_a and norm_b else None)


def _alike(a: Adapter, b: Adapter, name: str) -> tuple[list[Pair], list[Pair]]:
    """The blocks of both, scaled; in the form that all kinds of layers have, where their own differ."""
    forms = [(adapter.modules[name], *adapter.pair(name)) for adapter in (a, b)]
    kinds = [f"{module.base.kind} (groups={module.base.groups})" for module, *_ in forms]
    if kinds[0] != kinds[1]:
        raise ValueError(f"they are for different layers: {kinds[0]} and {kinds[1]}.")
    if forms[0][0].form != forms[1][0].form:
        forms = [as_single(*form) for form in forms]
    layers = [module.layer(A, B) for module, A, B in forms]
    ours, theirs = ([(B * layer.lora_scaling, A) for B, A in pairs_of(layer)] for layer in layers)
    return ours, theirs


def _shape(pair: Pair) -> tuple[int, int]:
    return pair[0].shape[0], pair[1].shape[1]


def _norm(pairs: list[Pair]) -> float:
    return math.hypot(*(float(spectrum(B, A).S.norm()) for B, A in pairs))
