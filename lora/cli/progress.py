"""A bar for long work, on stderr and only where somebody looks at it."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import TypeVar

T = TypeVar("T")
_WIDTH = 30


def progress(items: Collection[T], what: str) -> Iterator[T]:
    """The items one by one, with a bar that counts them; nothing but the items if stderr is no terminal.

    >>> list(progress([1, 2], "counting"))
    [1, 2]
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield from items
        return
    try:
        for done, item in enumerate(items):
            filled = _WIDTH * done // len(items)
            print(f"\r{what} [{'#' * filled:{_WIDTH}}] {done}/{len(items)}", end="", file=sys.stderr, flush=True)
            yield item
    finally:  # the line is empty again, whatever ended the work
        print(f"\r{' ' * (len(what) + _WIDTH + 24)}\r", end="", file=sys.stderr, flush=True)
