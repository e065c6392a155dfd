"""What lora knows of other packages' packed weights: a file for each package, none of which is imported by lora."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Read = Callable[[Any], Tensor]
Write = Callable[[Any, Tensor], None]
WhyNot = Callable[[Any], str | None]


class Packing(NamedTuple):
    """What is known of one kind of packed weight; each function takes the module that owns the weight."""

    read_weight: Read
    write_weight: Write
    why_not_train: WhyNot = lambda module: None
    #: Called when the module gets an adapter (True) and when it loses it (False).
    set_up: Callable[[Any, bool], None] = lambda module, adapted: None
