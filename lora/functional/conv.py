"""LoRA for convolutions as a function: r filters, then a convolution of kernel 1 that adds into the base's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.functional.fused import Fused, FusedFunction, Noise, cast, choose, drop, spread

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Geometry(NamedTuple):
    """Where a convolution's kernel goes: one number for each dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    geometry: Geometry,
    dropout: float = 0.0,
) -> Tensor:
    """A convolution with a low-rank update, factored: A has r filters, B a kernel of 1.

        y = W ∗ x + b + s · B ∗ (A ∗ drop(x))

    Keeps x and A ∗ drop(x) for its backward, dropout included. Where the fused function does not apply (a trainable
    or subclassed weight, `torch.compile`, function transforms) this is `plain_lora_conv`; the two agree to rounding.

    Args:
        x: (N, in_channels, *size), with one, two or three sizes.
        weight: (out_channels, in_channels, *kernel).
        bias: (out_channels), or None.
        A: (r, in_channels, *kernel); cast to x's dtype.
        B: (out_channels, r, 1, …); cast to x's dtype.
        scaling: s.
        geometry: stride, padding and dilation.
        dropout: probability of dropping a value of x on the LoRA path, as in `lora_linear`. Default: 0.

    Returns:
        y (N, out_channels, *out_size).

    Raises:
        RuntimeError: the dtypes of x and weight differ, as torch's convolutions raise it.

    From loralib, which applies arXiv:2106.09685 to convolutions, in the form of PEFT.

    >>> import torch, lora.functional
    >>> x, W, A, B = torch.ones(1, 2, 5), torch.ones(4, 2, 3), torch.ones(1, 2, 3), torch.ones(4, 1, 1)
    >>> lora.functional.lora_conv(x, W, None, A, B, 0.5, lora.functional.Geometry((1,), (0,), (1,))).shape
    torch.Size([1, 4, 3])
    """
    fused = choose(x, weight, bias, A, B, scaling, dropout)
    if fused is None:
        return plain_lora_conv(x, weight, bias, A, B, scaling, geometry, dropout)
    return _LoRAConv.run(x, weight, bias, A, B, fused, geometry)


def plain_lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    geometry: Geometry,
    dropout: float | Tensor = 0.0,
) -> Tensor:
    """The equation of `lora_conv` in operations that autograd knows; `dropout` may be what to multiply x by."""
    convolve = CONVOLUTIONS[weight.dim() - 2]
    y: Tensor = convolve(x, weight, bias, *geometry)  # (N, out_channels, *out_size)
    h = convolve(drop(x, dropout), A.to(x.dtype), None, *geometry)  # (N, r, *out_size)
    B, left = spread(B, scaling, x.dtype)
    return y + (convolve(h, B) * left).to(y.dtype)


class _LoRAConv(FusedFunction):
    """`plain_lora_conv`, fused. With L output places and h (N, r, L), B (out_channels, r):

    h = A ∗ (D ⊙ x)            y  = W ∗ x + b,   y += c · B h
    dh = c · Bᵀ dy             dx = Wᵀ ∗ dy + D ⊙ (Aᵀ ∗ dh)
    dB = c · Σ dy hᵀ           dA = dh ∗ (D ⊙ x)

    (In float16 B has the factor c in y and dh.)
    """

    inputs = 5

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, fused: Fused, geometry: Geometry
    ) -> Tensor:
        x_, weight_, A_ = (cast(t, fused.dtype) for t in (x, weight, A))
        convolve = CONVOLUTIONS[weight.dim() - 2]
        y: Tensor = convolve(x_, weight_, cast(bias, fused.dtype), *geometry)
        h = convolve(_dropped(x_, fused.noise), A_, None, *geometry).flatten(2)  # (N, r, L)
        y.flatten(2).baddbmm_(fused.up(B).flatten(1).expand(len(y), -1, -1), h, alpha=fused.alpha)
        ctx.fused, ctx.geometry = fused, geometry
        ctx.save_for_backward(x, weight, bias, A, B, h if ctx.needs_input_grad[4] else None)
        return y

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
        x, weight, _, A, B, h = ctx.saved_tensors
        fused, geometry, (needs_x, _, needs_bias, needs_A, needs_B, *_) = ctx.fused, ctx.geometry, ctx.needs_input_grad
        x_ = cast(x, fused.dtype)
        dx = dA = dB = dbias = None
        rows = dy.flatten(2)  # (N, out_channels, L)
        if needs_x or needs_bias:
            dx, _, dbias = _gradients(dy, x_, cast(weight, fused.dtype), geometry, (needs_x, False, needs_bias))
        if needs_B:
            dB = fused.of_B(torch.bmm(h, rows.mT).sum(0).T.reshape(B.shape), B)
        if needs_x or needs_A:
            up = fused.up(B).flatten(1).T.expand(len(dy), -1, -1)  # by `matmul` dy would be copied
            dh = fused.scaled_(torch.bmm(up, rows))  # (N, r, L)
            dh = dh.view(len(dy), len(A), *dy.shape[2:])
            needs = (needs_x, needs_A, False)
            update, dA, _ = _gradients(dh, _dropped(x_, fused.noise), cast(A, fused.dtype), geometry, needs)
            if dx is not None and update is not None:
                dx += _dropped(update, fused.noise)
        return dx, None, dbias, dA, dB

    @staticmethod
    def twin(ctx: Any, *inputs: Any) -> Tensor:
        fused: Fused = ctx.fused
        x, weight, bias, A, B = (cast(tensor, fused.dtype) for tensor in inputs)
        return plain_lora_conv(x, weight, bias, A, B, fused.scaling, ctx.geometry, fused.dropout(x, x.flatten(1)))


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a convolution for its input, weight and bias, those that are needed."""
    no_padding_of_output = (0,) * len(geometry.stride)
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        dy, x, weight, [weight.shape[0]], *geometry, False, no_padding_of_output, 1, needs
    )
    return gradients


def _dropped(x: Tensor, noise: Noise | None) -> Tensor:
    """D ⊙ x, of which noise takes a row for each sample: (N, in_channels · sizes)."""
    return x if noise is None else noise.drop(x.flatten(1)).view(x.shape)
