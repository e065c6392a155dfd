"""LoRA for linear layers as a function: the plain equation, and beside it the same with a hand-written backward.

The fused function saves x and h = drop(x) Aᵀ for its backward, never a dropped copy of x, and adds its products
into the base layer's output and input gradient, never into fresh tensors of their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.functional.fused import (
    Fused,
    FusedFunction,
    Noise,
    Slices,
    cast,
    choose,
    drop,
    exact_dtype,
    may_autocast,
    spread,
    without_autocast,
    without_input,
)

_FOLDED = (torch.float32, torch.float64)
_LEAST_FOLDED = 2**16  # numbers of a weight
# Up to which rank, and from how many rows on, a CPU multiplies dy by B faster if B lies the other way, its copy
# included: float16 always, up to ten times; bfloat16 never. (float32, r = 16, 16 rows of 3072: 92 µs, without it 15.)
_TURNED = {torch.float16: (math.inf, 1), torch.float32: (15, 64), torch.float64: (math.inf, 128)}


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    slices: Slices | None = None,
    *,
    fold: bool = True,
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
        fold: allow a temporary W + s · B A where no backward follows and it saves time: on a CPU, in float32 and
            float64, of all outputs, without dropout, if x and y together are twice as large as W. Default: True.

    Returns:
        y (..., out_features).

    Raises:
        RuntimeError: the dtypes of x and weight differ, as `torch.nn.functional.linear` raises it.

    From "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.

    >>> import torch, lora.functional
    >>> x, W, A, B = torch.ones(3, 8), torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2)
    >>> lora.functional.lora_linear(x, W, None, A, B, scaling=0.5)[0]
    tensor([16., 16., 16., 16.])
    """
    fused = choose(x, weight, bias, A, B, scaling, dropout, slices)
    if fused is None:
        return plain_lora_linear(x, weight, bias, A, B, scaling, dropout, slices)
    if torch.is_grad_enabled():
        return _LoRALinear.run(x, weight, bias, A, B, fused)
    fold = fold and _folds(x, weight, A, fused)
    if not may_autocast():  # as when text is generated, where every microsecond shows
        return _forward_alone(x, weight, bias, A, B, fused, fold)
    with without_autocast(x.device):
        return _forward_alone(x, weight, bias, A, B, fused, fold)


def plain_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float | Tensor = 0.0,
    slices: Slices | None = None,
) -> Tensor:
    """The equation of `lora_linear` in operations that autograd knows; `dropout` may be what to multiply x by."""
    y = F.linear(x, weight, bias)  # (..., out_features)
    h = F.linear(drop(x, dropout), A.to(x.dtype))  # (..., G·r)
    B, left = spread(B, scaling, x.dtype)
    update = up_slices(h, B, slices or ((0, weight.shape[0]),), weight.shape[0])
    return y + (update * left).to(y.dtype)


# ---- slices ----------------------------------------------------------------------------------------------------------


def up_slices(h: Tensor, B: Tensor, slices: Slices, out_features: int) -> Tensor:
    """h_g B_gᵀ in each slice of (..., out_features), zeros between them, for h (..., G·r) and B (sizes, r)."""
    if is_whole(slices, out_features):
        return F.linear(h, B)
    pieces, end = [], 0
    for (start, stop), h_g, B_g in zip(slices, _parts_of_h(h, slices), _parts_of_B(B, slices), strict=True):
        pieces += [h.new_zeros(*h.shape[:-1], start - end)] * (start > end)
        pieces.append(F.linear(h_g, B_g))  # (..., stop - start)
        end = stop
    pieces += [h.new_zeros(*h.shape[:-1], out_features - end)] * (out_features > end)
    return torch.cat(pieces, -1)


def add_slices_(y: Tensor, h: Tensor, B: Tensor, slices: Slices, alpha: float = 1.0) -> Tensor:
    """Add alpha · h_g B_gᵀ to each slice of y (N, out_features), in place, for h (N, G·r) and B (sizes, r)."""
    if is_whole(slices, y.shape[1]):
        return y.addmm_(h, B.T, alpha=alpha)
    for y_g, h_g, B_g in zip(_parts_of_y(y, slices), _parts_of_h(h, slices), _parts_of_B(B, slices), strict=True):
        y_g.addmm_(h_g, B_g.T, alpha=alpha)
    return y


def is_whole(slices: Slices, out_features: int) -> bool:
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


class _LoRALinear(FusedFunction):
    """`plain_lora_linear`, fused. Saves x (if A trains) and h (if B does), and inputs that are not copies.

    With D the dropout's mask and c = s / (1 - p):

        h = (D ⊙ x) Aᵀ              y  = x Wᵀ + b,   y_g += c · h_g B_gᵀ
        dh = c · dy_g B_g           dx = dy W + D ⊙ (dh A)
        dB_g = c · dy_gᵀ h_g        dA = dhᵀ (D ⊙ x)

    (In float16 B has the factor c in y and dh.)
    """

    inputs = 5

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, fused: Fused) -> Tensor:
        y, h = linear_forward(x, weight, bias, A, B, fused)
        _, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        ctx.fused, ctx.shapes = fused, (x.shape,)
        # x itself: of a view made here, double backward would know nothing.
        ctx.save_for_backward(x if needs_A else None, weight, bias, A, B, h if needs_B else None)
        return y

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
        x, weight, _, A, B, h = ctx.saved_tensors
        needs_x, _, needs_bias, _, _, _ = ctx.needs_input_grad
        dx, dA, dB = linear_backward(dy, x, weight, A, B, h, ctx.fused, needs_x)
        return dx, None, flat(dy).sum(0) if needs_bias else None, dA, dB

    @staticmethod
    def twin(ctx: Any, *inputs: Any) -> Tensor:
        _, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        if needs_B and not needs_A:
            raise without_input("plain_lora_linear")
        fused: Fused = ctx.fused
        x, weight, bias, A, B = (cast(tensor, fused.dtype) for tensor in inputs)
        return plain_lora_linear(x, weight, bias, A, B, fused.scaling, fused.dropout(x, flat(x)), fused.slices)


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, fused: Fused
) -> tuple[Tensor, Tensor]:
    """y (..., out_features) and h (N, G·r), with nothing else of the size of x or y made on the way."""
    x = cast(x, fused.dtype)
    y = base(x, weight, bias)
    return y, add_update_(flat(y), flat(x), A, B, fused)


def _folds(x: Tensor, weight: Tensor, A: Tensor, fused: Fused) -> bool:
    """Whether a forward that no backward follows computes with a temporary W + c · B A.

    Beside W, N rows take 2 N r (in + out) multiply-adds in skinny products, and y is written twice. The sum takes
    2 r · in · out, and a weight is written. So it is the same for N = in · out / (in + out), where x and y together
    are as large as the weight. CPU time of the sum's way over the other's at 1, 2 and 4 times that N, one thread,
    float32, r = 16:

        576→960  0.96, 0.93, 0.91     1536→576  1.01, 0.97, 0.94     2048→2048  1.01, 1.00, 1.00

    (576→960 at r = 64: 0.97, 0.89, 0.85.) So it begins at 2 times. Against float64 both are equally exact (relative
    errors of 2.42e-7 for an update of 1/100 of W). In lower precision the rounded sum would lose the same part of the
    update for each row. In training, h is needed all the same, and the sum would have to be kept, or made twice:
    a step gained at most 2 % of its time at many rows, and lost 2 to 25 % at few. Small layers stay beside: there is
    nothing to gain, and with gradients and without they compute the same to the bit.
    """
    few = x.numel() <= A.numel()  # without more ado
    if fused.noise is not None or fused.dtype not in _FOLDED or few or weight.numel() < _LEAST_FOLDED:
        return False
    out_features, in_features = weight.shape
    whole = weight.dtype == fused.dtype and is_whole(fused.slices, out_features)
    measured = x.device.type == "cpu"
    return measured and whole and x.numel() * (in_features + out_features) >= 2 * weight.numel() * in_features


def _forward_alone(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, fused: Fused, fold: bool
) -> Tensor:
    """`linear_forward` where no backward follows, in as few operations as there are products."""
    dtype = fused.dtype
    x = cast(x, dtype)
    if fold:
        return F.linear(x, torch.addmm(weight, fused.up(B), cast(A, dtype), alpha=fused.alpha), cast(bias, dtype))
    y = F.linear(x, cast(weight, dtype), cast(bias, dtype))  # (..., out_features)
    if fused.noise is None:  # the same kernels as with a backward, called with less around them
        h = F.linear(x, cast(A, dtype))  # (..., G·r)
        add_slices_(flat(y), flat(h), fused.up(B), fused.slices, fused.alpha)
    else:
        add_update_(flat(y), flat(x), A, B, fused)
    return y


def linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, A: Tensor, B: Tensor, h: Tensor | None, fused: Fused, needs_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, where it is needed; dA, where there is an x; dB, where there is an h."""
    dy_ = flat(dy)  # (N, out_features)
    dx = torch.mm(dy_, cast(weight, fused.dtype)) if needs_x else None  # (N, in_features)
    dA, dB = update_backward(dy_, None if x is None else cast(flat(x), fused.dtype), A, B, h, dx, fused)
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    return dx, dA, dB


def base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b (..., out_features) in x's dtype."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])  # made whole: users may not write to a view made in here
    if bias is None:
        torch.mm(flat(x), cast(weight, x.dtype).T, out=flat(y))
    else:
        torch.addmm(cast(bias, x.dtype), flat(x), cast(weight, x.dtype).T, out=flat(y))
    return y


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
    dA, dB = None, None if h is None else fused.of_B(_outer(dy, h, fused.slices), B)
    if dx is not None or x is not None:
        dh = fused.scaled_(_to_rank(dy, fused.up(B), fused.slices))  # (N, G·r)
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


def _to_rank(dy: Tensor, B: Tensor, slices: Slices) -> Tensor:
    """dy_g B_g side by side, (N, G·r)."""
    rank, rows = _TURNED.get(dy.dtype, (0, 0))
    turned = dy.is_cpu and B.shape[1] <= rank and len(dy) >= rows
    parts = zip(_parts_of_y(dy, slices), _parts_of_B(B, slices), strict=True)
    pieces = [torch.mm(dy_g, B_g.T.contiguous().T if turned else B_g) for dy_g, B_g in parts]
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def _outer(dy: Tensor, h: Tensor, slices: Slices) -> Tensor:
    """dy_gᵀ h_g one below the other, (sizes, r)."""
    # MKL computes (hᵀ dy)ᵀ at r = 8 and many rows up to five times faster than dyᵀ h, but autograd copies what lies
    # the other way: at r = 16, 16 rows of 3072, 86 µs with the copy, and 24 for dyᵀ h. They are equal at about r²/4
    # rows; in bfloat16 and float16 at r².
    N, squared = len(h), (h.shape[1] // len(slices)) ** 2
    most = squared / 4 if dy.dtype.itemsize >= 4 else squared
    turned = dy.is_cpu and most < N
    parts = zip(_parts_of_y(dy, slices), _parts_of_h(h, slices), strict=True)
    pieces = [torch.mm(h_g.T, dy_g).T if turned else torch.mm(dy_g.T, h_g) for dy_g, h_g in parts]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


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
