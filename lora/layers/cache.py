"""A tensor computed from a layer's own, as a cache: when it may be kept, and when it is out of date."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

# A tensor; what reads its address, and the address that it had; the version that it had; what reads a sample of its
# values, and the values that they were. The two that read are bound once: this is asked with each token.
_Known = tuple[Tensor, Callable[[], int], int, int | None, Callable[[], bytes] | None, bytes | None]
# Of each row of A and each column of B, at a rank of up to 16, one value or more. They are scattered in memory: to look
# at 64 of each took a quarter of what serving the merged weight takes beyond `nn.Linear`, with one token.
_SAMPLED = 16
Value = TypeVar("Value", Tensor, tuple[Tensor, Tensor])
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Cached:
    """A merged weight, or what else is computed from base weights, adapters (in this order) and a scaling.

    Changes are seen by identity, address and version counter, which torch's own operations count, an optimizer's too.
    Writes through `.data` and by numpy escape the counter. On a CPU, where reading costs no synchronisation, a sample
    of each tensor is compared for these: 16 values or some more, evenly spread over rows and columns, with the last. A
    write that changes none of them is not seen. Of an adapter that has no counter, being made in inference mode, all
    values are compared. (`lora.merge` leaves layers that compare nothing.)
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
        for source, (known, read_address, address, version, read, values) in zip(sources, self.known, strict=True):
            if source is not known or read_address() != address:
                return False
            if version is not None and known._version != version:
                return False
            if read is not None and read() != values:
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
    readable = source.device.type == "cpu" and source.numel() > 0
    if not readable:
        return source, source.data_ptr, source.data_ptr(), version, None, None
    # Of its `memoryview`, which copies values that are scattered twice as fast as the array itself.
    read = _values(source, every=of_adapter and version is None).data.tobytes
    return source, source.data_ptr, source.data_ptr(), version, read, read()


def _values(tensor: Tensor, every: bool) -> np.ndarray:
    """A sample of a tensor's values, or all, as an array of integers in its memory: there NaN is equal to itself."""
    tensor = tensor.data  # no view that autograd knows, which would keep torch from swapping the tensor
    if not every:
        # In the order in which they lie in memory, where the tensor has no gaps.
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
        if tensor.is_contiguous():
            step = _step(tensor)
            tensor = tensor.view(-1)[(tensor.numel() - 1) % step :: step]
        else:
            tensor = tensor[-1]
    # Not by `tensor.numpy()`, after which a storage can no longer be resized.
    array: np.ndarray = np.from_dlpack(tensor.view(_WORDS[tensor.element_size()]))
    return array


def _step(tensor: Tensor) -> int:
    """How far apart the values of a sample are: prime to the length of a row, or all would be of the same columns."""
    step = -(-tensor.numel() // _SAMPLED)
    while math.gcd(step, tensor.shape[-1]) > 1:
        step -= 1
    return step
