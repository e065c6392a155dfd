"""DoRA's magnitudes as a function: outputs scaled one by one, around their bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora.functional.fused import FusedFunction, cast, exact_dtype, is_plain

_CACHED = 2**18  # values of a product that stay in a processor's cache until they are summed


def magnify(y: Tensor, excess: Tensor, bias: Tensor | None = None, dim: int = -1) -> Tensor:
    """Scale each output of a layer, but not its bias, by 1 + `excess`.

        z = y + e ⊙ (y − b)        that is, (1 + e) ⊙ (y − b) + b; with e = 0, y to the bit

    Keeps y for its backward, nothing else of that size. Where the fused function does not apply (`torch.compile`,
    function transforms, tensor subclasses) this is `plain_magnify`; the two agree to rounding.

    Args:
        y: the layer's output, with its bias.
        excess: e, one for each output; g − 1 of DoRA, which is small and would lose its digits in a g of low precision.
        bias: b, one for each output, or None.
        dim: the dimension of y that counts the outputs. Default: the last.

    Returns:
        z, in the shape of y.

    From "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, section 4.1.

    >>> import torch, lora.functional
    >>> lora.functional.magnify(torch.tensor([[3.0, 3.0]]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    tensor([[3., 5.]])
    """
    if not is_plain(y, excess, bias) or not y.dtype == excess.dtype == (y if bias is None else bias).dtype:
        return plain_magnify(y, excess, bias, dim)
    return _Magnify.run(y, excess, bias, dim)


def plain_magnify(y: Tensor, excess: Tensor, bias: Tensor | None = None, dim: int = -1) -> Tensor:
    """The equation of `magnify` in operations that autograd knows."""
    shape = _along(y, dim)
    scaled = y if bias is None else y - bias.view(shape).to(y.dtype)
    return y + (excess.view(shape) * scaled).to(y.dtype)


class _Magnify(FusedFunction):
    """`plain_magnify`, fused:   dy = (1 + e) ⊙ dz,   de = Σ dz ⊙ (y − b),   db = −e ⊙ Σ dz."""

    inputs = 3

    @staticmethod
    def forward(ctx: Any, y: Tensor, excess: Tensor, bias: Tensor | None, dim: int) -> Tensor:
        shape = _along(y, dim)
        e = excess.view(shape)
        z = torch.addcmul(y, e, y)
        if bias is not None:
            z.sub_(e * bias.view(shape))
        ctx.dim, ctx.shape = dim, y.shape
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, excess, bias)
        return z

    @staticmethod
    def gradients(ctx: Any, dz: Tensor) -> Sequence[Tensor | None]:
        (y, excess, bias), dim = ctx.saved_tensors, ctx.dim
        needs_y, needs_excess, needs_bias, _ = ctx.needs_input_grad
        dy = torch.addcmul(dz, excess.view(_along(dz, dim)), dz) if needs_y else None
        de = db = None
        if needs_bias or (needs_excess and bias is not None):
            total = _by_output(dz, dim).sum((0, 2))  # (outputs)
            db = -excess * total if needs_bias else None
        if needs_excess:
            de = _products(y, dz, dim).to(excess.dtype)
            # Layerwise casting has put the bias in a dtype to store it in meanwhile.
            de = de if bias is None else de - cast(bias, total.dtype) * total
        return dy, de, db

    @staticmethod
    def twin(ctx: Any, y: Tensor, excess: Tensor, bias: Tensor | None) -> Tensor:
        return plain_magnify(y, excess, bias, ctx.dim)


def _along(y: Tensor, dim: int) -> list[int]:
    """The shape of one number for each output, to be broadcast to y."""
    shape = [1] * y.dim()
    shape[dim] = -1
    return shape


def _by_output(y: Tensor, dim: int) -> Tensor:
    """y as (N, outputs, L)."""
    dim %= y.dim()
    return y.reshape(y.shape[:dim].numel(), y.shape[dim], y.shape[dim + 1 :].numel())


def _products(y: Tensor, dz: Tensor, dim: int) -> Tensor:
    """Σ dz ⊙ y for each output, in float32 at least."""
    dtype = exact_dtype(y.dtype)
    total = torch.zeros(y.shape[dim], dtype=dtype, device=y.device)
    for y_part, dz_part in _parts(_by_output(y, dim), _by_output(dz, dim)):
        total += (y_part * dz_part).sum((0, 2), dtype=dtype)
    return total


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of these (N, outputs, L), small enough for a processor's cache; of an accelerator's, all at once."""
    first = tensors[0]
    pieces = first.numel() // _CACHED if first.device.type == "cpu" else 1
    step = max(1, -(-first.shape[0] // max(1, pieces)))
    return zip(*(torch.split(tensor, step) for tensor in tensors), strict=True)
