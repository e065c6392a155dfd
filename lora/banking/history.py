"""In which block of a bank a forward was that is computed again: activation checkpointing does so in backward.

Two blocks whose losses are summed have one backward, and that is in one block at most. Autograd numbers what it
records, in each thread, and tells the number of what it computes: so the block is known in which that was recorded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from threading import get_ident
from typing import Any, NamedTuple

import torch

_BLOCKS = 2**8  # that were left and may wait for their backward


class Span(NamedTuple):
    """What autograd recorded in a block.

    Attributes:
        thread: that which entered the block.
        begin, end: the numbers in this thread; no end while the block is open.
        again: whether it was entered by what backward computes again; all of that is in it, then.
        key: what was chosen in it.
    """

    thread: int
    begin: int
    end: float
    again: bool
    key: Hashable

    def holds(self, thread: int, number: int) -> bool:
        return self.thread == thread and self.begin <= number < self.end


class History:
    """The blocks of a bank that were left.

    Attributes:
        left: their spans.
        threads: whether the model was called in another thread than the block was entered in, which numbers for itself.
    """

    def __init__(self) -> None:
        self.left: deque[Span] = deque(maxlen=_BLOCKS)
        self.threads = False

    def __reduce__(self) -> tuple[Any, ...]:
        return History, ()  # a copy of a model has a graph of its own

    def leave(self, span: Span, choice: Any) -> None:
        """A block is left, in which this was chosen."""
        now = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        if span.thread == get_ident() and now > span.begin:
            self.left.append(span._replace(end=now, key=choice.key))

    def check(self, opened: Sequence[Any]) -> None:
        """See that what backward computes now was recorded in a block of the same choice.

        Args:
            opened: what is chosen in the open blocks, the innermost, which is the one that counts, last.

        Raises:
            RuntimeError: it was recorded in a block of another choice.
        """
        span = opened[-1].span
        node: Any = torch._C._current_autograd_node()
        if span is None or span.again or node is None or self.threads:
            return
        number = node._sequence_nr()
        open_ones = [one.span._replace(key=one.key) for one in opened if one.span is not None]
        found = [one for one in (*self.left, *open_ones) if one.holds(span.thread, number)]
        if found and max(found, key=_begin).key != opened[-1].key:
            raise RuntimeError(
                "backward computes checkpointed layers of a bank again, and their forward was in another block than "
                "the one that is open now, with other adapters. Call the backward of each block's loss within that "
                "block: gradients add up."
            )


def begun() -> Span:
    """Where a block begins."""
    again = torch._C._current_graph_task_id() != -1
    return Span(get_ident(), torch.autograd._get_sequence_nr(), float("inf"), again, None)  # type: ignore[attr-defined]


def _begin(span: Span) -> int:
    return span.begin
