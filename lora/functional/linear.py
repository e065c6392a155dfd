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

from lora.functional.beside import lora_beside, plain_lora_beside
from lora.functional.fused import (
    Fused,
    FusedFunction,
    Slices,
    cast,
    choose,
    may_autocast,
    without_autocast,
    without_input,
)
from lora.functional.update import add_slices_, add_update_, flat, is_whole, update_backward

_FOLDED = (torch.float32, torch.float64)
_LEAST_FOLDED = 2**16  # numbers of a weight


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

    Where the fused function does not apply this is `plain_lora_linear` (`torch.compile`, function transforms), or
    `lora_beside` (a trainable or subclassed weight); all agree to rounding.

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
        return lora_beside(x, F.linear(x, weight, bias), A, B, scaling, dropout, slices)
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
    return plain_lora_beside(x, F.linear(x, weight, bias), A, B, scaling, dropout, slices)


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
        ctx.fused, ctx.unsaved = fused, ((x.shape, x.dtype),)
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
