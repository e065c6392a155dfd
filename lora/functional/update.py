"""The update of a linear layer, in its output's slices: its products, forward and backward.

They are added into what is there, the base layer's output and input gradient, wherever that is at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.functional.fused import Fused, Noise, Slices, cast, exact_dtype, scaled_mm

# Up to which rank, and from how many rows on, a CPU multiplies dy by B faster if B lies the other way, its copy
# included: float16 always, up to ten times; bfloat16 never. (float32, r = 16, 16 rows of 3072: 92 µs, without it 15.)
_TURNED = {torch.float16: (math.inf, 1), torch.float32: (15, 64), torch.float64: (math.inf, 128)}


# ---- slices ----------------------------------------------------------------------------------------------------------


def up_slices(h: Tensor, B: Tensor, slices: Slices, out_features: int) -> Tensor:
    """h_g B_gᵀ in each slice of (..., out_features), zeros between them, for h (..., G·r) and B (sizes, r)."""
    if is_whole(slices, out_features):
        return F.linear(h, B)
    pieces, end = [], 0
    for (start, stop), h_g, B_g in zip(slices, _parts_of_h(h, slices), _parts_of_B(B, slices), strict=True):
        if start > end:
            pieces.append(h.new_zeros(*h.shape[:-1], start - end))
        pieces.append(F.linear(h_g, B_g))  # (..., stop - start)
        end = stop
    if out_features > end:
        pieces.append(h.new_zeros(*h.shape[:-1], out_features - end))
    return torch.cat(pieces, -1)


def add_slices_(y: Tensor, h: Tensor, B: Tensor, slices: Slices, alpha: float = 1.0) -> Tensor:
    """Add alpha · h_g B_gᵀ to each slice of y (N, out_features), in place, for h (N, G·r) and B (sizes, r)."""
    if is_whole(slices, y.shape[1]):
        return y.addmm_(h, B.T, alpha=alpha)
    for y_g, h_g, B_g in zip(_parts_of_y(y, slices), _parts_of_h(h, slices), _parts_of_B(B, slices), strict=True):
        y_g.addmm_(h_g, B_g.T, alpha=alpha)
    return y


def is_whole(slices: Slices, out_features: int) -> bool:
    """Whether there is one slice, which is all of the output."""
    return len(slices) == 1 and slices[0] == (0, out_features)


def _parts_of_y(y: Tensor, slices: Slices) -> list[Tensor]:
    """Of y (N, out_features), or its gradient, each slice (N, stop - start)."""
    return [y] if is_whole(slices, y.shape[1]) else [y[:, start:stop] for start, stop in slices]


def _parts_of_h(h: Tensor, slices: Slices) -> Sequence[Tensor]:
    """Of h (..., G·r) what goes into each slice, (..., r)."""
    return [h] if len(slices) == 1 else h.chunk(len(slices), -1)


def _parts_of_B(B: Tensor, slices: Slices) -> Sequence[Tensor]:
    """Of B (sizes, r) the rows of each slice, (stop - start, r)."""
    return [B] if len(slices) == 1 else torch.split(B, [stop - start for start, stop in slices])


# ---- products --------------------------------------------------------------------------------------------------------


def add_update_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, fused: Fused) -> Tensor:
    """Add the update of x (N, in_features) to y (N, out_features), in place; return h (N, G·r)."""
    h = down(x, cast(A, fused.dtype), fused.noise)
    add_slices_(y, h, fused.up(B), fused.slices, fused.alpha)
    return h


def update_backward(
    dy: Tensor,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    dx: Tensor | None,
    fused: Fused,
    fresh: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """dA, where there is an x, and dB, where there is an h.

    The update's part of dx is added to it in place; written to it if it is fresh, and holds nothing yet.
    """
    dA = dB = None
    if h is not None:
        dB = fused.of_B_scaled(_outer(dy, h, fused.slices, fused.alpha), B)  # (sizes, r)
    if dx is not None or x is not None:
        dh = _to_rank(dy, fused.up(B), fused.slices, fused.alpha)  # (N, G·r)
        dA = _through_down(dh, cast(A, fused.dtype), x, dx, fused.noise, fresh)
    return dA, dB


def down(x: Tensor, A: Tensor, noise: Noise | None) -> Tensor:
    """(D ⊙ x) Aᵀ, (N, G·r)."""
    if noise is None:
        return torch.mm(x, A.T)
    h = x.new_empty(x.shape[0], A.shape[0])
    for rows, chunk in noise.chunks(x):
        torch.mm(noise.gate(x[rows], chunk, out=chunk), A.T, out=h[rows])
    return h


def _to_rank(dy: Tensor, B: Tensor, slices: Slices, alpha: float) -> Tensor:
    """alpha · dy_g B_g side by side, (N, G·r)."""
    rank, rows = _TURNED.get(dy.dtype, (0, 0))
    turned = dy.is_cpu and B.shape[1] <= rank and len(dy) >= rows
    parts = zip(_parts_of_y(dy, slices), _parts_of_B(B, slices), strict=True)
    pieces = [scaled_mm(dy_g, B_g.T.contiguous().T if turned else B_g, alpha) for dy_g, B_g in parts]
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def _outer(dy: Tensor, h: Tensor, slices: Slices, alpha: float) -> Tensor:
    """alpha · dy_gᵀ h_g one below the other, (sizes, r)."""
    # MKL computes (hᵀ dy)ᵀ at r = 8 and many rows up to five times faster than dyᵀ h, but autograd copies what lies
    # the other way: at r = 16, 16 rows of 3072, 86 µs with the copy, and 24 for dyᵀ h. They are equal at about r²/4
    # rows; in bfloat16 and float16 at r².
    N, squared = len(h), (h.shape[1] // len(slices)) ** 2
    most = squared / 4 if dy.dtype.itemsize >= 4 else squared
    turned = dy.is_cpu and most < N
    parts = zip(_parts_of_y(dy, slices), _parts_of_h(h, slices), strict=True)
    products = [scaled_mm(h_g.T, dy_g, alpha).T if turned else scaled_mm(dy_g.T, h_g, alpha) for dy_g, h_g in parts]
    return torch.cat(products) if len(products) > 1 else products[0]


def _through_down(
    dh: Tensor, A: Tensor, x: Tensor | None, dx: Tensor | None, noise: Noise | None, fresh: bool
) -> Tensor | None:
    """Return dA = dhᵀ (D ⊙ x), if there is an x. Add D ⊙ (dh A) to dx, if there is one, or write it there if fresh."""
    if noise is None:
        if dx is not None:
            torch.mm(dh, A, out=dx) if fresh else dx.addmm_(dh, A)
        return None if x is None else torch.mm(dh.T, x)
    like = dx if x is None else x
    assert like is not None, "asked for no gradient"
    dA = None
    for rows, chunk in noise.chunks(like):
        if dx is not None:
            update = torch.mm(dh[rows], A, out=dx[rows] if fresh else None)
            noise.gate(update, chunk, out=update)
            if not fresh:
                dx[rows].add_(update)
        if x is not None:
            part = torch.mm(dh[rows].T, noise.gate(x[rows], chunk, out=chunk))
            dA = part if dA is None else cast(dA, exact_dtype(A.dtype)).add_(part)
    return torch.zeros_like(A) if dA is None and x is not None else dA  # if there are no rows


def flat(x: Tensor) -> Tensor:
    """(..., features) as (N, features)."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
