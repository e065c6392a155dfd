"""A matrix of codes and scales, as quantised weights are, that takes up a change for the inputs that it will meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.functional.rounding import lost_in_rows

# How often scales and codes take turns, and how often each scale has its own in between.
_TURNS = 2
_SWEEPS = 4
# What of the step to a scale's optimum is tried. With each all of a block's numbers are rounded in another way, which
# for a small change makes more of a difference than where the optimum is.
_STEPS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)


class Coded(NamedTuple):
    """A matrix (rows, columns), its rows in blocks of as many columns with one scale each.

        W_ij = round(values[codes_ij] · scales_ib)        b: the block of column j

    Attributes:
        codes: (rows, columns), in int64.
        values: what the codes mean, ascending, in float32.
        scales: (rows, blocks), in float32.
        dtype: what W is rounded to.
        storable: (scales (rows), block) → the nearest that can be stored. Default: None, where all can be.
        source: how they are stored, for the function that writes them. Default: None.
    """

    codes: Tensor
    values: Tensor
    scales: Tensor
    dtype: torch.dtype
    storable: Callable[[Tensor, int], Tensor] | None = None
    source: Any = None

    @property
    def size(self) -> int:
        """Columns of a block."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dense(self) -> Tensor:
        """W, in `dtype`."""
        return (self.values[self.codes] * self.scales.repeat_interleave(self.size, 1)).to(self.dtype)


def change_for_inputs(weight: Tensor, moments: Tensor, coded: Coded, damping: float = 0.01) -> Coded:
    """Codes and scales near W for inputs x with H = E[x xᵀ]: Q of a small E‖(W − Q) x‖² = tr((W − Q) H (W − Q)ᵀ).

    It starts from those of a weight that W is a small change of, and takes them one after the other, all others being
    as they are: each scale goes to where its block's error is least, or nearly there, and each code to the nearest of

        w_k + Σ_{i≠k} (w_i − q_i) H_ik / H_kk

    Of a small change, coding W anew to nearest loses all and more: its codes are those that there were. Scales go up
    and down by any little; with correlated inputs that says much of a change which is of low rank itself.

    A row of which the error would not be smaller than that of the start keeps its codes and scales.

    Args:
        weight: W (rows, columns), in float32 or float64.
        moments: H (columns, columns), in W's dtype.
        coded: where to start from, of W's shape.
        damping: what is added to H's diagonal, as a share of its mean, so that few inputs do not decide too much.

    From "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323, section
    3, the error; "QuantEase: Optimization-based Quantization for Language Models", arXiv:2309.01885, section 3, the
    codes in turn.
    """
    mean = moments.diagonal().mean()
    if not mean > 0:  # there is no input, or nothing but zeros
        return coded
    H = moments.clone()
    H.diagonal().add_(damping * mean)
    start = weight - coded.dense().to(weight.dtype)  # (rows, columns): W − Q
    # Copies in which a column is one piece: (columns, rows), (blocks, rows) and (columns, rows).
    codes, scales, error = (
        part.T.clone(memory_format=torch.contiguous_format) for part in (coded.codes, coded.scales, start)
    )
    for _ in range(_TURNS):
        for _ in range(_SWEEPS):
            _move_scales(coded, H, codes, scales, error)
        _move_codes(coded, H, codes, scales, error)
    better = lost_in_rows(error.T, moments) < lost_in_rows(start, moments)  # (rows)
    codes, scales = torch.where(better, codes, coded.codes.T), torch.where(better, scales, coded.scales.T)
    return coded._replace(codes=codes.T.contiguous(), scales=scales.T.contiguous())


def _move_scales(coded: Coded, H: Tensor, codes: Tensor, scales: Tensor, error: Tensor) -> None:
    """Give each block the scale of those tried with which the error is least, if it is less."""
    for b, scale in enumerate(scales):
        block = slice(coded.size * b, coded.size * (b + 1))
        within, slope = H[block, block], H[block] @ error  # (size, size), (size, rows)
        C = coded.values[codes[block]]  # (size, rows): what the scale multiplies
        bend = (C * (within @ C.to(H.dtype))).sum(0)
        step = ((C * slope).sum(0) / bend.clamp(min=torch.finfo(H.dtype).tiny)).to(scale.dtype)  # (rows)
        Q, best = (C * scale).to(coded.dtype), torch.zeros_like(bend)
        moved, least = Q, scale
        for share in _STEPS:
            tried = scale + share * step
            tried = tried if coded.storable is None else coded.storable(tried, b)
            its = (C * tried).to(coded.dtype)
            change = its.to(H.dtype) - Q.to(H.dtype)
            gain = ((within @ change - 2 * slope) * change).sum(0)
            less = gain < best
            best, least, moved = gain.where(less, best), tried.where(less, least), its.where(less, moved)
        scale.copy_(least)
        error[block] -= moved.to(H.dtype) - Q.to(H.dtype)


def _move_codes(coded: Coded, H: Tensor, codes: Tensor, scales: Tensor, error: Tensor) -> None:
    """Choose each code again, with the errors of all others."""
    between = (coded.values[1:] + coded.values[:-1]) / 2
    for b, scale in enumerate(scales):
        block = slice(coded.size * b, coded.size * (b + 1))
        within, slopes = H[block, block], H[block] @ error  # (size, size), (size, rows)
        for k, (slope, its, left) in enumerate(zip(slopes, codes[block], error[block], strict=True)):
            old = (coded.values[its] * scale).to(coded.dtype).to(H.dtype)  # (rows)
            its.copy_(torch.bucketize(((old + slope / within[k, k]) / scale).to(between.dtype), between))
            change = (coded.values[its] * scale).to(coded.dtype).to(H.dtype) - old
            left.sub_(change)
            slopes[k + 1 :].addr_(within[k, k + 1 :], change, alpha=-1)
