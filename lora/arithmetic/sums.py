"""The ways to add updates up, block by block: what `lora.combine` calls its methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora.models.blocks import Pair, cut, dense_spectrum, spectrum


class Part(NamedTuple):
    """One adapter's share in a module of the result: `weight` · B A, block by block."""

    weight: float
    pairs: list[Pair]


class How(NamedTuple):
    """What the methods are told beside the parts: the rank of a block, and how the sparse ones choose values."""

    q: int
    density: float
    generator: torch.Generator


def _cat(parts: Sequence[Part], how: How) -> list[Pair]:
    blocks = zip(*([(B * part.weight, A) for B, A in part.pairs] for part in parts), strict=True)
    return [(torch.cat([B for B, _ in block], 1), torch.cat([A for _, A in block])) for block in blocks]


def _svd(parts: Sequence[Part], how: How) -> list[Pair]:
    return [cut(spectrum(B, A), how.q) for B, A in _cat(parts, how)]


def _linear(parts: Sequence[Part], how: How) -> list[Pair]:
    roots = [math.sqrt(abs(part.weight)) for part in parts]
    signed = [math.copysign(root, part.weight) for root, part in zip(roots, parts, strict=True)]
    blocks = zip(*(part.pairs for part in parts), strict=True)
    return [(_weighted(roots, (B for B, _ in block)), _weighted(signed, (A for _, A in block))) for block in blocks]


def _weighted(weights: Iterable[float], tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]).sum(0)


def _ties(parts: Sequence[Part], how: How) -> list[Pair]:
    updates = torch.stack([_trimmed(_flat(part), how.density) for part in parts])  # (adapters, values)
    agree = updates.sign() == updates.sum(0).sign()
    return _factored(torch.where(agree, updates, 0).sum(0) / agree.sum(0).clamp(min=1), parts, how)


def _trimmed(update: Tensor, density: float) -> Tensor:
    largest = update.abs().topk(max(1, round(density * update.numel()))).indices
    return torch.zeros_like(update).index_copy_(0, largest, update[largest])


def _dare(parts: Sequence[Part], how: How) -> list[Pair]:
    return _factored(torch.stack([_dropped(_flat(part), how) for part in parts]).sum(0), parts, how)


def _dropped(update: Tensor, how: How) -> Tensor:
    kept = torch.rand(update.shape, dtype=torch.float64, generator=how.generator) < how.density
    return torch.where(kept, update / how.density, 0)


def _flat(part: Part) -> Tensor:
    """All values of an update, the blocks one after the other."""
    return torch.cat([(B @ A * part.weight).flatten() for B, A in part.pairs])


def _factored(values: Tensor, parts: Sequence[Part], how: How) -> list[Pair]:
    shapes = [(B.shape[0], A.shape[1]) for B, A in parts[0].pairs]
    blocks = torch.split(values, [rows * columns for rows, columns in shapes])
    return [cut(dense_spectrum(block.view(shape)), how.q) for block, shape in zip(blocks, shapes, strict=True)]


METHODS: dict[str, Callable[[Sequence[Part], How], list[Pair]]] = {
    "cat": _cat,
    "svd": _svd,
    "linear": _linear,
    "ties": _ties,
    "dare": _dare,
}
OF_ANY_RANK = ("svd", "ties", "dare")
