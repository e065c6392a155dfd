"""Seeds of dropout that are not torch's own, and yet the same again where a forward runs again.

Activation checkpointing puts torch's random state back for that. So a number drawn from it tells one forward from
another, and a forward that runs again from a new one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_WAITING = 2**16  # forward passes of layers that may wait for their backward to run them again


class Replays:
    """Numbers that are made for each forward, and are the same again when it runs again."""

    def __init__(self) -> None:
        self._made: OrderedDict[int, int] = OrderedDict()

    def of_this_forward(self, make: Callable[[], int]) -> int:
        """What `make` makes for a forward; when it runs again, what it made the first time."""
        key = int(torch.randint(2**62, (), device="cpu"))
        if key not in self._made:
            self._made[key] = make()
            if len(self._made) > _WAITING:
                self._made.popitem(last=False)
        return self._made[key]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A context in which torch draws from this seed, and after which it goes on as it would have."""
    other = None if device.type == "cpu" else device
    with torch.random.fork_rng([] if other is None else [other], device_type=device.type):
        torch.default_generator.manual_seed(seed % 2**63)
        if other is not None:
            getattr(torch, other.type).manual_seed(seed % 2**63)
        yield
