"""A tensor computed from a layer's own, as a cache: when it may be kept, and when it is out of date."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor


class _Known(NamedTuple):
    """A source as it was. What reads is bound once: it is called with each token."""

    tensor: Tensor
    read_address: Callable[[], int]
    address: int
    strides: tuple[int, ...] | None  # of a base weight, which may be turned in its place: `weight.data = weight.data.T`
    version: int | None
    read_sample: Callable[[], bytes] | None
    sample: bytes | None


# How many values of a tensor are compared, at least and at most. Each lies in another cache line: to compare 64 of each
# tensor took a sixth of what serving the merged weight takes beyond `nn.Linear`, with one token.
_LEAST_SAMPLED, _MOST_SAMPLED = 16, 64
Value = TypeVar("Value", Tensor, tuple[Tensor, Tensor])
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Cached:
    """A merged weight, or what else is computed from base weights, adapters (in this order) and a scaling.

    Changes are seen by identity, address, a base weight's strides, and version counter, which torch's own operations
    count, an optimizer's too. Writes through `.data` and by numpy escape the counter. On a CPU, where reading costs no
    synchronisation, a sample of each tensor is compared for these: about 16 values, evenly spread, the last among them;
    up to rank 64 every row of A and every column of B has one; of a tensor with gaps it is the last row. A write that
    changes none of them is not seen. Of an adapter that has no counter, being made in inference mode, all values are
    compared. (`lora.merge` leaves layers that compare nothing.)
    """

    value: Any

    def __init__(self, sources: Sequence[Tensor], scaling: float, bases: int = 1) -> None:
        self.scaling = scaling
        # Not weakly: torch does not swap tensors that have weak references.
        self.known = tuple(_known(source, n >= bases) for n, source in enumerate(sources))

    def is_current(self, sources: Sequence[Tensor], scaling: float) -> bool:
        """Whether `sources` and `scaling` are still what this was computed from."""
        if scaling != self.scaling or len(sources) != len(self.known):
            return False
        # The address comes first: memory that was given back must not be read.
        for n, (known, read_address, address, strides, version, read_sample, sample) in enumerate(self.known):
            if sources[n] is not known or read_address() != address:
                return False
            if strides is not None and known.stride() != strides:
                return False
            if version is not None and known._version != version:
                return False
            if read_sample is not None and read_sample() != sample:
                return False
        return True

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a pickled or copied layer computes its own


def remembered(
    holder: Any,
    own: str,
    sources: Sequence[Tensor],
    scaling: float,
    make: Callable[[], Value],
    bases: int = 1,
) -> Value:
    """What `make` computes from `sources` and the scaling, kept in an attribute of the holder until they change.

    The first of the sources, as many as `bases`, are base weights.
    """
    kept: Cached | None = getattr(holder, own)
    if kept is None or not kept.is_current(sources, scaling):
        with torch.inference_mode(False):
            # What it is computed from is noted first: what another thread changes meanwhile makes it out of date.
            kept = Cached(sources, scaling, bases)
            kept.value = make()
        setattr(holder, own, kept)
    value: Value = kept.value
    return value


def _known(source: Tensor, of_adapter: bool) -> _Known:
    version = None if source.is_inference() else source._version
    place = source.data_ptr, source.data_ptr(), None if of_adapter else source.stride()
    if source.device.type != "cpu" or source.numel() == 0:
        return _Known(source, *place, version, None, None)
    # Through a `memoryview`, which copies scattered values twice as fast as the array does.
    read_sample = _values(source, of_adapter, every=of_adapter and version is None).data.tobytes
    return _Known(source, *place, version, read_sample, read_sample())


def _values(tensor: Tensor, of_adapter: bool, every: bool) -> np.ndarray:
    """A sample of a tensor's values, or all, as an array of integers in its memory: there NaN is equal to itself."""
    tensor = tensor.data  # no view that autograd knows, which would keep torch from swapping the tensor
    if not every:
        rank = min(tensor.shape[:2]) if of_adapter and tensor.dim() > 1 else 0
        # In the order in which they lie in memory, where the tensor has no gaps.
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
        if tensor.is_contiguous():
            step = _step(tensor.numel(), max(_LEAST_SAMPLED, min(rank, _MOST_SAMPLED)))
            tensor = tensor.view(-1)[(tensor.numel() - 1) % step :: step]
        else:
            tensor = tensor[-1]
    # Not by `tensor.numpy()`, after which a storage can no longer be resized.
    array: np.ndarray = np.from_dlpack(tensor.view(_WORDS[tensor.element_size()]))
    return array


def _step(numel: int, sampled: int) -> int:
    """How far apart the values of a sample are: coprime with all sizes, or they would be of the same columns."""
    step = -(-numel // sampled)
    while math.gcd(step, numel) > 1:
        step -= 1
    return step
