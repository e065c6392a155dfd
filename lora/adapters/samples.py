"""A few values from all over a tensor, by which an adapter knows its base model again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from lora.layers import weights

# The dtypes that models are cast to. A sample is compared to the precision of the narrowest that holds its values.
_NARROWEST_FIRST = (torch.bfloat16, torch.float16, torch.float32)


def values_of(module: nn.Module | None, own: str, tensor: Tensor, count: int) -> tuple[float, ...] | None:
    """Values of a module's own tensor, the first, the last and others between; None if there are none, or not finite.

    `module` may be None for a tensor that is not sharded.
    """
    last = tensor.numel() - 1
    if last < 0:
        return None
    places = torch.tensor([k * last // (count - 1) for k in range(count)], device=tensor.device)
    sample = tuple[float, ...](weights.of(module, own, tensor).values_at(places).double().tolist())
    return sample if all(map(math.isfinite, sample)) else None


def same_sample(theirs: Sequence[float], ours: Sequence[float], slack: float = 0.0) -> bool:
    """Whether two samples are one tensor's: equal, or one of them rounded to another dtype than the other.

    Which dtype a value was rounded to shows in the value, and outlives a cast back to float32.

    >>> same_sample([0.1, 0.7], [0.10009765625, 0.69921875])  # the second are bfloat16's
    True
    >>> same_sample([0.1, 0.7], [0.1001, 0.6992])
    False
    """
    if len(theirs) != len(ours):
        return False
    a, b = (torch.tensor(sample, dtype=torch.float32) for sample in (theirs, ours))
    of_a, of_b = _precision(a), _precision(b)
    # Rounding moves a value by half of its precision, and again if it went through another dtype.
    tolerance = 0.0 if of_a == of_b else 0.625 * (of_a + of_b)
    # Half of the smallest step of float16, or of bfloat16, by which it moves what is below their normal numbers.
    smallest = 2**-25 if _holds(torch.float16, a) or _holds(torch.float16, b) else 2**-134 * (of_a != of_b)
    return bool(((a - b).abs() <= tolerance * torch.maximum(a.abs(), b.abs()) + smallest + slack).all())


def _precision(sample: Tensor) -> float:
    """The precision of the narrowest dtype that holds these values as they are."""
    return torch.finfo(next((dtype for dtype in _NARROWEST_FIRST if _holds(dtype, sample)), torch.float32)).eps


def _holds(dtype: torch.dtype, sample: Tensor) -> bool:
    return torch.equal(sample.to(dtype).float(), sample)
