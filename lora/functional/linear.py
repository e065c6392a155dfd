"""LoRA for linear layers as a function: the plain equation, and beside it the same with a hand-written backward.

The fused function saves x and h = drop(x) Aᵀ for its backward, never a dropped copy of x, and adds its products
into the base layer's output and input gradient, never into fresh tensors of their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.functional.how import How, choose
from lora.functional.noise import Noise
from lora.functional.tensors import cast, needs_plain_backward, twin_gradients, without_autocast

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

    Raises:
        RuntimeError: the dtypes of x and weight differ, as `torch.nn.functional.linear` raises it.

    From "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.

    >>> import torch, lora.functional
    >>> x, W, A, B = torch.ones(3, 8), torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2)
    >>> lora.functional.lora_linear(x, W, None, A, B, scaling=0.5)[0]
    tensor([16., 16., 16., 16.])
    """
    slices = slices or ((0, weight.shape[0]),)
    how = choose(x, weight, bias, A, B, scaling, dropout)
    if how is None:
        return plain_lora_linear(x, weight, bias, A, B, scaling, dropout, slices)
    with without_autocast(x.device):
        if not torch.is_grad_enabled():  # as when text is generated, where every microsecond shows
            return _forward_alone(x, weight, bias, A, B, how, slices)
        y: Tensor = _LoRALinear.apply(x, weight, bias, A, B, how, slices)  # type: ignore[no-untyped-call]
    return y


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
    """What `lora_linear` computes, as the equation reads, in operations that autograd knows.

    Args:
        dropout: the probability, or what to multiply x by in the place of dropping at random.

    The other arguments and the result are `lora_linear`'s.
    """
    y = F.linear(x, weight, bias)  # (..., out_features)
    dropped = x * dropout if isinstance(dropout, Tensor) else F.dropout(x, dropout) if dropout else x
    h = F.linear(dropped, A.to(x.dtype))  # (..., G·r)
    update = spread(h, B.to(x.dtype), slices or ((0, weight.shape[0]),), weight.shape[0])
    return y + (update * scaling).to(y.dtype)


def spread(h: Tensor, B: Tensor, slices: Slices, out_features: int) -> Tensor:
    """h_g B_gᵀ in each slice of (..., out_features), zeros between them, for h (..., G·r) and B (sizes, r)."""
    if _whole(slices, out_features):
        return F.linear(h, B)
    pieces, end = [], 0
    for (start, stop), h_g, B_g in zip(slices, h.chunk(len(slices), -1), _tall(B, slices), strict=True):
        pieces += [h.new_zeros(*h.shape[:-1], start - end)] * (start > end)
        pieces.append(F.linear(h_g, B_g))  # (..., stop - start)
        end = stop
    pieces += [h.new_zeros(*h.shape[:-1], out_features - end)] * (out_features > end)
    return torch.cat(pieces, -1)


def add_up_(y: Tensor, h: Tensor, B: Tensor, slices: Slices, alpha: float = 1.0) -> Tensor:
    """Add alpha · h_g B_gᵀ to each slice of y (N, out_features), in place, for h (N, G·r) and B (sizes, r)."""
    if _whole(slices, y.shape[1]):
        return y.addmm_(h, B.T, alpha=alpha)
    for y_g, h_g, B_g in zip(_wide(y, slices), _narrow(h, slices), _tall(B, slices), strict=True):
        y_g.addmm_(h_g, B_g.T, alpha=alpha)
    return y


# The parts that belong to each slice, of one that is wide, (N, out_features), narrow, (N, G·r), or tall, (sizes, r).


def _whole(slices: Slices, out_features: int) -> bool:
    return len(slices) == 1 and slices[0] == (0, out_features)


def _wide(y: Tensor, slices: Slices) -> list[Tensor]:
    return [y] if _whole(slices, y.shape[1]) else [y[:, start:stop] for start, stop in slices]


def _narrow(h: Tensor, slices: Slices) -> Sequence[Tensor]:
    return [h] if len(slices) == 1 else h.chunk(len(slices), 1)


def _tall(B: Tensor, slices: Slices) -> Sequence[Tensor]:
    return [B] if len(slices) == 1 else torch.split(B, [stop - start for start, stop in slices])


class _LoRALinear(torch.autograd.Function):
    """`plain_lora_linear`, fused. Saves x (if A trains) and h (if B does), and inputs that are not copies.

    With D the dropout's mask and c = s / (1 - p):

        h = c · (D ⊙ x) Aᵀ          y  = x Wᵀ + b,   y_g += h_g B_gᵀ
        dh = c · dy_g B_g           dx = dy W + D ⊙ (dh A)
        dB_g = dy_gᵀ h_g            dA = dhᵀ (D ⊙ x)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, how: How, slices: Slices
    ) -> Tensor:
        y, h = fused_forward(x, weight, bias, A, B, how, slices)
        _, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.how, ctx.slices = how, slices
        # x itself: of a view made here, double backward would know nothing.
        ctx.save_for_backward(x if needs_A else None, weight, bias, A, B, h if needs_B else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(dy.device):
            if needs_plain_backward(dy):
                return _plain_backward(ctx, dy)
            x, weight, _, A, B, h = ctx.saved_tensors
            needs_x, _, needs_bias, *_ = ctx.needs_input_grad
            dx, dA, dB = fused_backward(dy, x, weight, A, B, h, ctx.how, ctx.slices, needs_x)
            return dx, None, _rows(dy).sum(0) if needs_bias else None, dA, dB, None, None


def fused_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, how: How, slices: Slices
) -> tuple[Tensor, Tensor]:
    """y (..., out_features) and h (N, G·r), with nothing else of the size of x or y made on the way."""
    x_, weight_, A_, B_ = (cast(t, how.dtype) for t in (_rows(x), weight, A, B))
    y = x_.new_empty(*x.shape[:-1], weight.shape[0])  # made whole: users may not write to a view made in here
    y_ = _rows(y)  # (N, out_features)
    if bias is None:
        torch.mm(x_, weight_.T, out=y_)
    else:
        torch.addmm(cast(bias, how.dtype), x_, weight_.T, out=y_)
    h = _down(x_, A_, how.noise).mul_(how.c)  # (N, G·r)
    add_up_(y_, h, B_, slices)
    return y, h


def _forward_alone(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, how: How, slices: Slices
) -> Tensor:
    """`fused_forward` where no backward follows, in as few operations as there are products."""
    dtype = how.dtype
    x = cast(x, dtype)
    y = F.linear(x, cast(weight, dtype), None if bias is None else cast(bias, dtype))  # (..., out_features)
    h = _down(_rows(x), cast(A, dtype), how.noise).mul_(how.c)  # (N, G·r); as with a backward, to the last bit
    add_up_(_rows(y), h, cast(B, dtype), slices)
    return y


def fused_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    how: How,
    slices: Slices,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, where it is needed; dA, where there is an x; dB, where there is an h."""
    dy_ = _rows(dy)  # (N, out_features)
    dx = torch.mm(dy_, cast(weight, how.dtype)) if needs_x else None  # (N, in_features)
    dA, dB = None, None if h is None else _outer(dy_, h, slices)
    if needs_x or x is not None:
        dh = _to_rank(dy_, cast(B, how.dtype), slices).mul_(how.c)  # (N, G·r)
        x_ = None if x is None else cast(_rows(x), how.dtype)  # (N, in_features)
        dA = _through_down(dh, cast(A, how.dtype), x_, dx, how.noise)
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    return dx, dA, dB


def _plain_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Autograd's own backward, of the plain twin: for one that is itself differentiated, or mapped over many dy."""
    *inputs, _ = ctx.saved_tensors
    how, slices, needs = ctx.how, ctx.slices, ctx.needs_input_grad[:5]
    if inputs[0] is None and needs[4]:
        raise RuntimeError(
            "differentiating twice needs the layer's input, which is not kept while lora_B trains and lora_A does not; "
            "let lora_A train, or compute with `lora.functional.plain_lora_linear`."
        )
    if inputs[0] is None:  # then its value does not matter: y is linear in it
        inputs[0] = dy.new_zeros(*dy.shape[:-1], inputs[1].shape[1], requires_grad=True)

    def twin(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        mask = 0.0 if how.noise is None else how.noise.mask(_rows(x)).view(x.shape) * how.noise.rescale
        return plain_lora_linear(x, weight, bias, A, B, how.scaling, mask, slices)

    return *twin_gradients(twin, inputs, needs, dy, how.dtype), None, None


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
    # Skinny products that MKL computes faster, up to twice at r = 8, from a B that lies the other way.
    pieces = [
        torch.mm(dy_g, B_g.T.contiguous().T) for dy_g, B_g in zip(_wide(dy, slices), _tall(B, slices), strict=True)
    ]
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def _outer(dy: Tensor, h: Tensor, slices: Slices) -> Tensor:
    """dy_gᵀ h_g one below the other, (sizes, r)."""
    # As (hᵀ dy)ᵀ: five times faster than dyᵀ h in MKL at r = 8, and as fast at r = 64.
    pieces = [torch.mm(h_g.T, dy_g) for h_g, dy_g in zip(_narrow(h, slices), _wide(dy, slices), strict=True)]
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


def _rows(x: Tensor) -> Tensor:
    """(..., features) as (N, features)."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
