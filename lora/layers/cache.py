"""A tensor computed from a layer's own, as a cache: when it may be kept, and when it is out of date."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Cached:
    """A merged weight, or what else is computed from the base weight, the adapter (in this order) and the scaling.

    Changes are seen by identity, address and version counter. Writes through `.data` escape the counter, so on the
    CPU, where reading costs no synchronisation, the adapter is also compared by value, and the base weight by a sample
    of its values. (`lora.merge` leaves layers that compare nothing.)
    """

    tensor: Tensor

    def __init__(self, sources: Sequence[Tensor], scaling: float) -> None:
        self.scaling = scaling
        self.sources = tuple(sources)  # not weakly: torch does not swap tensors that have weak references
        self.states = [_state(source) for source in sources]
        self.watched = _watch(*sources)
        self.values = [watched.clone() for watched in self.watched]

    def is_current(self, sources: Sequence[Tensor], scaling: float) -> bool:
        """Whether `sources` and `scaling` are still what this was computed from."""
        return (
            scaling == self.scaling
            and all(map(operator.is_, self.sources, sources))
            and [_state(source) for source in sources] == self.states
            and all(map(torch.equal, self.watched, self.values))
        )

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a pickled or copied layer computes its own


def remembered(holder: Any, own: str, sources: Sequence[Tensor], scaling: float, make: Callable[[], Tensor]) -> Tensor:
    """What `make` computes from `sources` and the scaling, kept in an attribute of the holder until they change."""
    kept: Cached | None = getattr(holder, own)
    if kept is None or not kept.is_current(sources, scaling):
        with torch.inference_mode(False):
            # What it is computed from is noted first: what another thread changes meanwhile makes it out of date.
            kept = Cached(sources, scaling)
            kept.tensor = make()
        setattr(holder, own, kept)
    return kept.tensor


def _state(source: Tensor) -> tuple[int, int]:
    return source.data_ptr(), -1 if source.is_inference() else source._version


def _watch(weight: Tensor, *adapter: Tensor) -> list[Tensor]:
    """Views of what is compared by value."""
    if weight.device.type != "cpu":
        return []
    weight = weight.data  # no view that autograd knows, which would keep torch from swapping the tensor
    sample = weight.view(-1)[:: weight.numel() // 256 + 1] if weight.is_contiguous() else weight[0]
    return [sample, *map(_words, adapter)]


def _words(tensor: Tensor) -> Tensor:
    """The tensor as 64-bit words where it can be seen so: faster to compare, and NaN is equal to itself."""
    tensor = tensor.data
    whole = tensor.is_contiguous() and not any(
        n * tensor.element_size() % 8 for n in (tensor.numel(), tensor.storage_offset())
    )
    return tensor.view(-1).view(torch.int64) if whole else tensor
