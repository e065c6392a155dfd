"""LoRA for products of groups of rows, each with a matrix of its own: experts, of which each sees its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.functional.fused import Fused, FusedFunction, cast, choose, drop, spread, without_autocast

#: x (N, in) and weights (E, in, out), of which the e-th is for the rows before the e-th of `ends` -> (N, out).
Product = Callable[[Tensor, Tensor, Tensor], Tensor]
# Bytes of which torch's own such product wants each row to have a multiple; a rank is filled up with zeros.
_ALIGNED = 16


def lora_grouped(
    x: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    scaling: float,
    ends: Tensor,
    product: Product,
    dropout: float = 0.0,
) -> Tensor:
    """A product of groups with a low-rank update, which builds no product of `left` and `right`.

        y_e = x_e W_e + s · drop(x_e) L_e R_e        for the rows x_e of each of E groups

    Where the fused function does not apply (on accelerators, whose kernels need not be told where groups end; and as in
    `lora_linear`) this is `plain_lora_grouped`; the two agree to rounding.

    Args:
        x: (N, in), its rows in the order of their groups.
        weight: (E, in, out).
        left: (E, in, r); cast to x's dtype.
        right: (E, r, out); cast to x's dtype.
        scaling: s.
        ends: (E), the row after each group's last; rows after the last group are in none, and what they become is
            `product`'s affair.
        product: what computes such products, with a gradient for its first two arguments.
        dropout: probability of dropping a value of x before L.

    Returns:
        y (N, out).
    """
    with without_autocast(x.device):  # such products are not for it
        on_cpu = x.device.type == "cpu"  # there it costs nothing to read the ends
        fused = choose(x, weight, None, left, right, scaling, dropout) if on_cpu else None
        if fused is None:
            return plain_lora_grouped(x, weight, left, right, scaling, ends, product, dropout)
        return _LoRAGrouped.run(x, weight, left, right, Groups(ends, product), fused)


def plain_lora_grouped(
    x: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    scaling: float,
    ends: Tensor,
    product: Product,
    dropout: float | Tensor = 0.0,
) -> Tensor:
    """The equation of `lora_grouped` in operations that autograd knows."""
    y = product(x, weight, ends)  # (N, out)
    right, rest = spread(right, scaling, x.dtype)
    extra = -left.shape[2] % (_ALIGNED // x.dtype.itemsize)
    h = product(drop(x, dropout), F.pad(left.to(x.dtype), (0, extra)), ends)  # (N, r + extra)
    return y + (product(h, F.pad(right, (0, 0, 0, extra)), ends) * rest).to(y.dtype)


class Groups(NamedTuple):
    """Where groups end, and what computes their products."""

    ends: Tensor
    product: Product

    def rows(self) -> Iterator[tuple[int, slice]]:
        """Each group that has rows: its number, and which they are."""
        start = 0
        for e, end in enumerate(self.ends.tolist()):
            if end > start:
                yield e, slice(start, end)
                start = end


class _LoRAGrouped(FusedFunction):
    """`plain_lora_grouped`, fused. Saves x (if L trains) and h (if R does), and inputs that are not copies.

    With D the dropout's mask and c = s / (1 - p), for the rows of each group:

        h = (D ⊙ x) L              y  = x W + c · h R
        dh = c · dy Rᵀ             dx = dy Wᵀ + D ⊙ (dh Lᵀ)
        dR = c · hᵀ dy             dL = (D ⊙ x)ᵀ dh
    """

    inputs = 4

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, left: Tensor, right: Tensor, groups: Groups, fused: Fused
    ) -> Tensor:
        left_, right_ = cast(left, fused.dtype), fused.up(right)
        y = groups.product(x, weight, groups.ends)  # (N, out)
        h = x.new_zeros(x.shape[0], left.shape[2])  # (N, r)
        dropped = _dropped(x, fused)
        for e, rows in groups.rows():
            y[rows].addmm_(torch.mm(dropped[rows], left_[e], out=h[rows]), right_[e], alpha=fused.alpha)
        _, _, needs_left, needs_right, *_ = ctx.needs_input_grad
        ctx.groups, ctx.fused, ctx.unsaved = groups, fused, ((x.shape, x.dtype),)
        ctx.save_for_backward(x if needs_left else None, weight, left, right, h if needs_right else None)
        return y

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
        x, weight, left, right, h = ctx.saved_tensors
        fused: Fused = ctx.fused
        needs_x, _, needs_left, needs_right, *_ = ctx.needs_input_grad
        left_, right_ = cast(left, fused.dtype), fused.up(right)
        dy = dy.contiguous()  # of a sum it is one number, seen everywhere, which kernels do not take
        dx = ctx.groups.product(dy, weight.mT, ctx.groups.ends) if needs_x else None  # (N, in)
        dleft = torch.zeros_like(left) if needs_left else None
        dright = torch.zeros_like(right) if needs_right else None
        dropped = None if x is None else _dropped(x, fused)
        noise = None if fused.noise is None or dx is None else fused.noise.drop(torch.ones_like(dx))
        for e, rows in ctx.groups.rows():
            if dright is not None:
                fused.of_B(torch.mm(h[rows].T, dy[rows]), right, out=dright[e])
            if dx is None and dropped is None:
                continue
            dh = fused.scaled_(torch.mm(dy[rows], right_[e].T))  # (n, r)
            if dx is not None:
                if noise is None:
                    dx[rows].addmm_(dh, left_[e].T)
                else:
                    dx[rows].addcmul_(noise[rows], torch.mm(dh, left_[e].T))
            if dleft is not None and dropped is not None:
                dleft[e] = torch.mm(dropped[rows].T, dh)
        return dx, None, dleft, dright

    @staticmethod
    def twin(ctx: Any, *inputs: Any) -> Tensor:
        if ctx.needs_input_grad[3] and not ctx.needs_input_grad[2]:
            raise RuntimeError(
                "differentiating twice, or for many output gradients at once, needs the layer's input, which is not "
                "kept while one of lora_A and lora_B trains alone; let both train, or compute with "
                "`lora.functional.grouped.plain_lora_grouped`."
            )
        fused: Fused = ctx.fused
        x, weight, left, right = (cast(tensor, fused.dtype) for tensor in inputs)
        groups: Groups = ctx.groups
        dropout = fused.dropout(x, x)
        return plain_lora_grouped(x, weight, left, right, fused.scaling, groups.ends, groups.product, dropout)


def _dropped(x: Tensor, fused: Fused) -> Tensor:
    """D ⊙ x, without the rescaling."""
    return x if fused.noise is None else fused.noise.drop(x)
