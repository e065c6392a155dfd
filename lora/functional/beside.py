"""LoRA beside a linear layer of any kind, as a function: its update is added to what the layer has computed.

Of a layer whose weight only its own class multiplies with, as that of a quantised one, nothing is known but its output.
The fused function saves x and h = drop(x) Aᵀ, never a dropped copy of x, and makes one tensor of the output's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.functional.fused import (
    Fused,
    FusedFunction,
    Slices,
    autocast_dtype,
    cast,
    drop,
    is_plain,
    seeded_dropout,
    spread,
    with_dropout,
    without_autocast,
    without_input,
)
from lora.functional.update import add_slices_, down, flat, is_whole, up_slices, update_backward


def lora_beside(
    x: Tensor,
    y: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    slices: Slices | None = None,
    *,
    seed: Callable[[], int] | None = None,
) -> Tensor:
    """Add a low-rank update to what a linear layer of any kind has computed, in a new tensor.

        y,    and in the g-th slice (i, j) of the output    y[i:j] + s · drop(x) A_gᵀ B_gᵀ

    `lora_linear`, which has the layer's weight, takes less time and memory: it computes y, too, and the input's
    gradient at once. Where the fused function does not apply (`torch.compile`, function transforms, tensor subclasses)
    this is `plain_lora_beside`; the two agree to rounding.

    Args:
        x: (..., in_features), the layer's input.
        y: (..., out_features), its output; not written to.
        A: (G·r, in_features), for G slices; cast to x's dtype.
        B: (sum of the slices' sizes, r); cast to x's dtype.
        scaling: s.
        dropout: probability of dropping a value of x, as `lora_linear` takes it. Default: 0.
        slices: begin and end of the parts of the output to update, in order. Default: all of it, as one.
        seed: gives the seed of dropout; not called where nothing is dropped. Default: torch's default generator.

    Returns:
        (..., out_features), in y's dtype.

    From "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1, and, beside a weight of
    four bits, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, section 3.

    >>> import torch, lora.functional
    >>> x, y, A, B = torch.ones(3, 8), torch.zeros(3, 4), torch.ones(2, 8), torch.ones(4, 2)
    >>> lora.functional.lora_beside(x, y, A, B, scaling=0.5)[0]
    tensor([8., 8., 8., 8.])
    """
    slices = slices or ((0, B.shape[0]),)
    fused = None
    # A layer may give what is not of its input's rows: then the sum broadcasts, or is an error, as torch has it.
    if is_plain(x, y, A, B) and x.shape[:-1] == y.shape[:-1] and slices[-1][1] <= y.shape[-1]:
        dtype = autocast_dtype(x, A) or x.dtype
        fused = Fused(scaling, None, dtype, slices)
        if dropout:
            fused = with_dropout(dropout, x, scaling, dtype, slices, seed)
    if fused is None:
        return plain_lora_beside(x, y, A, B, scaling, seeded_dropout(dropout, x, seed), slices)
    if torch.is_grad_enabled():
        return _LoRABeside.run(y, x, A, B, fused)
    with without_autocast(x.device):
        return _forward(y, x, A, B, fused)[0]


def plain_lora_beside(
    x: Tensor,
    y: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float | Tensor = 0.0,
    slices: Slices | None = None,
) -> Tensor:
    """The equation of `lora_beside` in operations that autograd knows; `dropout` may be what to multiply x by."""
    if x.is_floating_point():  # for integers torch says that A is not
        A = A.to(x.dtype)
    h = F.linear(drop(x, dropout), A)  # (..., G·r)
    B, left = spread(B, scaling, h.dtype)
    slices = slices or ((0, B.shape[0]),)
    update = up_slices(h, B, slices, max(y.shape[-1], slices[-1][1]))
    return y + (update * left).to(y.dtype)


class _LoRABeside(FusedFunction):
    """`plain_lora_beside`, fused. Saves x (if A trains) and h (if B does), and A and B, which are no copies.

    With D the dropout's mask and c = s / (1 - p):

        h = (D ⊙ x) Aᵀ              y_g + c · h_g B_gᵀ
        dh = c · dy_g B_g           dx = D ⊙ (dh A)
        dB_g = c · dy_gᵀ h_g        dA = dhᵀ (D ⊙ x)

    (In float16 B has the factor c in y and dh.)
    """

    inputs = 4

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, fused: Fused) -> Tensor:
        z, h = _forward(y, x, A, B, fused)
        _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        ctx.fused, ctx.unsaved = fused, ((y.shape, y.dtype), (x.shape, x.dtype))
        ctx.save_for_backward(None, x if needs_A else None, A, B, h if needs_B else None)
        return z

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
        _, x, A, B, h = ctx.saved_tensors
        fused: Fused = ctx.fused
        needs_y, needs_x, *_ = ctx.needs_input_grad
        dy_ = cast(flat(dy), fused.dtype)  # (N, out_features)
        _, (shape, _) = ctx.unsaved
        dx = dy_.new_empty(shape) if needs_x else None  # (..., in_features)
        x_, dx_ = None if x is None else cast(flat(x), fused.dtype), None if dx is None else flat(dx)
        dA, dB = update_backward(dy_, x_, A, B, h, dx_, fused, fresh=True)
        return dy if needs_y else None, dx, dA, dB

    @staticmethod
    def twin(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        if needs_B and not needs_A:
            raise without_input("plain_lora_beside")
        fused: Fused = ctx.fused
        x, A, B = (cast(tensor, fused.dtype) for tensor in (x, A, B))
        return plain_lora_beside(x, y, A, B, fused.scaling, fused.dropout(x, flat(x)), fused.slices)


def _forward(y: Tensor, x: Tensor, A: Tensor, B: Tensor, fused: Fused) -> tuple[Tensor, Tensor]:
    """The sum (..., out_features), in y's dtype, and h (N, G·r)."""
    h = down(cast(flat(x), fused.dtype), cast(A, fused.dtype), fused.noise)
    up, size = fused.up(B), y.shape[-1]
    if y.dtype != fused.dtype:  # under autocast
        update = cast(up_slices(h, up, fused.slices, size), y.dtype)
        return torch.add(y, update.view(y.shape), alpha=fused.alpha), h
    if is_whole(fused.slices, size):
        z = y.new_empty(y.shape)  # made whole: users may not write to a view made in here
        torch.addmm(flat(y), h, up.T, alpha=fused.alpha, out=flat(z))
    else:
        z = y.clone(memory_format=torch.contiguous_format)
        add_slices_(flat(z), h, up, fused.slices, fused.alpha)
    return z, h
