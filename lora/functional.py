"""LoRA as functions of tensors: the plain equation, and beside it the same with a hand-written backward.

The fused function saves x and h = drop(x) Aᵀ for its backward, never a dropped copy of x, and adds its products
into the base layer's output and input gradient, never into fresh tensors of their size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.noise import Noise
from lora.tensors import is_plain

Slices = Sequence[tuple[int, int]]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    slices: Slices | None = None,
) -> Tensor:
    """A linear layer with a low-rank update, in as little memory and time as its arithmetic takes.

        y = x Wᵀ + b,    then for the g-th slice (i, j) of the output    y[i:j] += s · drop(x) A_gᵀ B_gᵀ

    Where the fused function does not apply (a trainable or subclassed weight, `torch.compile`, function transforms)
    this is `plain_lora_linear`; the two agree to rounding.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features), or None.
        A: (G·r, in_features), for G slices; cast to x's dtype.
        B: (sum of the slices' sizes, r); cast to x's dtype.
        scaling: s.
        dropout: probability of dropping a value of x on the LoRA path. The fused function rounds it to a multiple of
            1/256 and rescales by what it rounded to, so that the expectation is exact. Default: 0.
        slices: begin and end of the parts of the output to update, in order. Default: all of it, as one.

    Returns:
        y (..., out_features).

    >>> import torch, lora.functional
    >>> x, W, A, B = torch.ones(3, 8), torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2)
    >>> lora.functional.lora_linear(x, W, None, A, B, scaling=0.5)[0]
    tensor([16., 16., 16., 16.])
    """
    slices = slices or ((0, weight.shape[0]),)
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    fits = weight.dtype == x.dtype or dtype != x.dtype  # if not, the plain path raises what nn.Linear raises
    plain = not fits or weight.requires_grad or not is_plain(x, weight, bias, A, B)
    noise = Noise.draw(dropout, x) if dropout and not plain else None
    if plain or (dropout and noise is None):
        return plain_lora_linear(x, weight, bias, A, B, scaling, dropout, slices)
    with torch.autocast(x.device.type, enabled=False):
        how = _How(scaling, noise, slices, dtype)
        return _LoRALinear.apply(x, weight, bias, A, B, how)  # type: ignore[no-any-return, no-untyped-call]


def plain_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    slices: Slices | None = None,
) -> Tensor:
    """What `lora_linear` computes, as the equation reads, in operations that autograd knows."""
    y = F.linear(x, weight, bias)  # (..., out_features)
    h = F.linear(F.dropout(x, dropout) if dropout else x, A.to(x.dtype))  # (..., G·r)
    update = spread(h, B.to(x.dtype), slices or ((0, weight.shape[0]),), weight.shape[0])
    return y + (update * scaling).to(y.dtype)


def spread(h: Tensor, B: Tensor, slices: Slices, out_features: int) -> Tensor:
    """h_g B_gᵀ in each slice of (..., out_features), zeros between them, for h (..., G·r) and B (sizes, r)."""
    pieces, end = [], 0
    for (start, stop), h_g, B_g in per_slice(slices, h, B, dim=-1):
        pieces += [h.new_zeros(*h.shape[:-1], start - end)] * (start > end)
        pieces.append(F.linear(h_g, B_g))  # (..., stop - start)
        end = stop
    pieces += [h.new_zeros(*h.shape[:-1], out_features - end)] * (out_features > end)
    return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]


def per_slice(slices: Slices, A: Tensor, B: Tensor, dim: int = 0) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """(start, stop), A_g and B_g of each slice, for an A (or an h, by columns) that stacks G of them by `dim`."""
    sizes = [stop - start for start, stop in slices]
    return zip(slices, torch.split(A, B.shape[1], dim), torch.split(B, sizes), strict=True)


class _How(NamedTuple):
    """What the fused function is told beside tensors."""

    scaling: float
    noise: Noise | None
    slices: Slices
    dtype: torch.dtype


class _LoRALinear(torch.autograd.Function):
    """`plain_lora_linear`, fused. Saves x (if A trains) and h (if B does), and inputs that are not copies.

    With D the dropout's mask and c = s / (1 - p):

        h = c · (D ⊙ x) Aᵀ          y  = x Wᵀ + b,   y_g += h_g B_gᵀ
        dh = c · dy_g B_g           dx = dy W + D ⊙ (dh A)
        dB_g = dy_gᵀ h_g            dA = dhᵀ (D ⊙ x)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, how: _How) -> Tensor:
        x_, weight_, A_, B_ = (t.to(how.dtype) for t in (_rows(x), weight, A, B))
        # (N, out_features)
        y = torch.mm(x_, weight_.T) if bias is None else torch.addmm(bias.to(how.dtype), x_, weight_.T)
        h = _down(x_, A_, how.noise).mul_(_c(how))  # (N, G·r)
        for (start, stop), h_g, B_g in per_slice(how.slices, h, B_, dim=1):
            y[:, start:stop].addmm_(h_g, B_g.T)
        needs_x, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        ctx.how = how
        ctx.save_for_backward(
            x if needs_A else None,  # x itself: of a view made here, double backward would know nothing
            weight if needs_x else None,
            A if needs_x or needs_A or needs_B else None,
            B if needs_x or needs_A or needs_B else None,
            h if needs_B else None,
        )
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, h = ctx.saved_tensors
        how, needs = ctx.how, ctx.needs_input_grad
        dy_ = _rows(dy)  # (N, out_features)
        dbias = dy_.sum(0) if needs[2] else None
        if torch.is_grad_enabled():
            dx, dA, dB = _plain_gradients(dy_, x, weight, A, B, how, needs)
        else:
            dx = torch.mm(dy_, weight.to(how.dtype)) if needs[0] else None  # (N, in_features)
            dA, dB = None, _outer(dy_, h, how.slices) if needs[4] else None
            if needs[0] or needs[3]:
                dh = _to_rank(dy_, B.to(how.dtype), how.slices).mul_(_c(how))  # (N, G·r)
                x_ = _rows(x).to(how.dtype) if needs[3] else None  # (N, in_features)
                dA = _through_down(dh, A.to(how.dtype), x_, dx, how.noise)
        return None if dx is None else dx.view(*dy.shape[:-1], -1), None, dbias, dA, dB, None


def _down(x: Tensor, A: Tensor, noise: Noise | None) -> Tensor:
    """(D ⊙ x) Aᵀ, (N, G·r)."""
    if noise is None:
        return torch.mm(x, A.T)
    h = x.new_empty(x.shape[0], A.shape[0])
    for rows, chunk in noise.chunks(x):
        torch.mm(noise.gate(x[rows], chunk, out=chunk), A.T, out=h[rows])
    return h


def _to_rank(dy: Tensor, B: Tensor, slices: Slices) -> Tensor:
    """dy_g B_g side by side, (N, G·r)."""
    dh = dy.new_empty(dy.shape[0], B.shape[1] * len(slices))
    for (start, stop), dh_g, B_g in per_slice(slices, dh, B, dim=1):
        # A skinny product that MKL computes faster, up to twice at r = 8, from a B that lies the other way.
        torch.mm(dy[:, start:stop], B_g.T.contiguous().T, out=dh_g)
    return dh


def _outer(dy: Tensor, h: Tensor, slices: Slices) -> Tensor:
    """dy_gᵀ h_g one below the other, (sizes, r)."""
    hs = torch.split(h, h.shape[1] // len(slices), 1)
    # As (hᵀ dy)ᵀ: five times faster than dyᵀ h in MKL at r = 8, and as fast at r = 64.
    pieces = [torch.mm(h_g.T, dy[:, start:stop]) for (start, stop), h_g in zip(slices, hs, strict=True)]
    return (torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]).T


def _through_down(dh: Tensor, A: Tensor, x: Tensor | None, dx: Tensor | None, noise: Noise | None) -> Tensor | None:
    """Return dA = dhᵀ (D ⊙ x), if there is an x, and add D ⊙ (dh A) to dx in place, if there is a dx."""
    if noise is None:
        if dx is not None:
            dx.addmm_(dh, A)
        return None if x is None else torch.mm(dh.T, x)
    like = dx if x is None else x
    assert like is not None, "asked for no gradient"
    dA = torch.zeros(A.shape, dtype=torch.promote_types(A.dtype, torch.float32), device=A.device)
    for rows, chunk in noise.chunks(like):
        if dx is not None:
            update = torch.mm(dh[rows], A)
            dx[rows].add_(noise.gate(update, chunk, out=update))
        if x is not None:
            dA.add_(torch.mm(dh[rows].T, noise.gate(x[rows], chunk, out=chunk)))
    return None if x is None else dA


def _plain_gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor, A: Tensor, B: Tensor, how: _How, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA and dB in operations that autograd knows: the backward of a backward that shall be differentiated."""
    if x is None and (needs[4] or how.noise):
        raise RuntimeError(
            "differentiating twice needs the layer's input, which is not kept while lora_A does not train; "
            "let lora_A train, or compute with `lora.functional.plain_lora_linear`."
        )
    A_, B_ = A.to(how.dtype), B.to(how.dtype)
    D = 1 if how.noise is None or x is None else how.noise.mask(_rows(x))
    gs = list(per_slice(how.slices, A_, B_))
    dh = torch.cat([dy[:, start:stop] @ B_g for (start, stop), _, B_g in gs], 1) * _c(how)
    dx = dy @ weight.to(how.dtype) + dh @ A_ * D if needs[0] else None
    if x is None:
        return dx, None, None
    dropped = _rows(x).to(how.dtype) * D
    dB = torch.cat([dy[:, start:stop].T @ (dropped @ A_g.T) for (start, stop), A_g, _ in gs]) * _c(how)
    return dx, dh.T @ dropped, dB


def _rows(x: Tensor) -> Tensor:
    """(..., features) as (N, features)."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _c(how: _How) -> float:
    return how.scaling if how.noise is None else how.scaling * how.noise.rescale
