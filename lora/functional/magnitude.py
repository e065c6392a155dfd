"""DoRA's magnitudes as a function: outputs scaled one by one, around their bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora.functional.fused import FusedFunction, cast, exact_dtype, is_plain

_CACHED = 2**18  # values of a product that stay in a processor's cache until they are summed


def magnify(y: Tensor, gain: Tensor, bias: Tensor | None = None, dim: int = -1) -> Tensor:
    """Scale each output of a layer, but not its bias, by a gain.

        z = g ⊙ y + (1 − g) ⊙ b        that is, g ⊙ (y − b) + b; with g = 1 exactly y

    A gain may be of a higher precision than y, as DoRA's is, which moves in small steps and may be small: it counts as
    a sum of two numbers in y's dtype. Keeps y for its backward, nothing else of that size. Where the fused function
    does not apply (`torch.compile`, function transforms, tensor subclasses) this is `plain_magnify`; the two agree to
    rounding.

    Args:
        y: the layer's output, with its bias.
        gain: g, one for each output.
        bias: b, one for each output, or None.
        dim: the dimension of y that counts the outputs. Default: the last.

    Returns:
        z, in the shape and dtype of y.

    From "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, section 4.1.

    >>> import torch, lora.functional
    >>> lora.functional.magnify(torch.tensor([[3.0, 3.0]]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    tensor([[3., 5.]])
    """
    fits = gain.dtype == y.dtype or gain.dtype == exact_dtype(y.dtype)
    if not (fits and is_plain(y, gain, bias)) or (bias is not None and bias.dtype != y.dtype):
        return plain_magnify(y, gain, bias, dim)
    return _Magnify.run(y, gain, bias, dim)


def plain_magnify(y: Tensor, gain: Tensor, bias: Tensor | None = None, dim: int = -1) -> Tensor:
    """The equation of `magnify` in operations that autograd knows."""
    shape = _along(y, dim)
    high, low = _parts_of_gain(gain, y.dtype)
    # The larger part last: then the sum is rounded once.
    z = y * high.view(shape) if low is None else torch.addcmul(y * low.view(shape), y, high.view(shape))
    return z if bias is None else z + _offset(gain, bias, y.dtype).view(shape)


class _Magnify(FusedFunction):
    """`plain_magnify`, fused:   dy = g ⊙ dz,   dg = Σ dz ⊙ (y − b),   db = (1 − g) ⊙ Σ dz."""

    inputs = 3

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, bias: Tensor | None, dim: int) -> Tensor:
        ctx.dim, ctx.unsaved = dim, ((y.shape, y.dtype),)
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, gain, bias)
        return _scaled(y, gain, dim, None if bias is None else _offset(gain, bias, y.dtype))

    @staticmethod
    def gradients(ctx: Any, dz: Tensor) -> Sequence[Tensor | None]:
        (y, gain, bias), dim = ctx.saved_tensors, ctx.dim
        needs_y, needs_gain, needs_bias, _ = ctx.needs_input_grad
        dy = _scaled(dz, gain, dim) if needs_y else None
        dg = db = None
        if needs_bias or (needs_gain and bias is not None):
            total = _by_output(dz, dim).sum((0, 2))  # (outputs)
            db = ((1 - gain) * total).to(total.dtype) if needs_bias else None
        if needs_gain:
            dg = _products(y, dz, dim)
            # Layerwise casting has put the bias in a dtype to store it in meanwhile.
            dg = dg if bias is None else dg - cast(bias, dg.dtype) * total
            dg = cast(dg, gain.dtype)
        return dy, dg, db

    @staticmethod
    def twin(ctx: Any, y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        return plain_magnify(y, gain, bias, ctx.dim)


def _parts_of_gain(gain: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A gain as the sum of two numbers in this dtype, the second without a gradient; as one, where that is exact."""
    high = cast(gain, dtype)
    if gain.dtype.itemsize <= dtype.itemsize:
        return high, None
    return high, (gain - high).detach().to(dtype)


def _offset(gain: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(1 − g) ⊙ b."""
    return ((1 - gain) * bias).to(dtype)


def _scaled(y: Tensor, gain: Tensor, dim: int, offset: Tensor | None = None) -> Tensor:
    """g ⊙ y, and an offset of each output, in one new tensor."""
    shape = _along(y, dim)
    high, low = _parts_of_gain(gain, y.dtype)
    first, last = (high, None) if low is None else (low, high)
    z = y * first.view(shape) if offset is None else torch.addcmul(offset.view(shape), first.view(shape), y)
    return z if last is None else z.addcmul_(last.view(shape), y)  # the larger part last: the sum is rounded once


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
