"""What rings and wings say alike: one error with every problem in it, names, numbers and tables in words."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TypeGuard

_MOST_ENDS = 1000  # that a name is compared with: a comparison takes some microseconds


class AdapterError(ValueError):
    """An adapter cannot be saved or loaded; the message lists every reason.

    >>> import lora
    >>> issubclass(lora.AdapterError, ValueError)
    True
    """


class Problems:
    """Collects problems, and raises them as one error at the end of its block, if there is any.

    with Problems("merge: nothing was changed") as problems:
        for name, layer in layers.items():
            with problems.at(name):  # a ValueError in here is one problem
                check(layer)
    """

    def __init__(self, what: str, error: type[ValueError] = ValueError) -> None:
        self.what, self.error = what, error
        self.found: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.found)

    def add(self, *problems: str) -> None:
        """Note problems."""
        self.found += problems

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """A context in which a ValueError is a problem of the module of this name, and not raised."""
        try:
            yield
        except ValueError as error:
            self.add(f"{name or 'the model'}: {error}")

    def raise_any(self) -> None:
        """Raise the error now, if there is a problem; to be called before what needs that there is none."""
        if self.found:
            raise self.error(f"{self.what}, because\n" + "\n".join(f"  - {problem}" for problem in self.found))

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.raise_any()


def raise_all(what: str, problems: Iterable[str], error: type[ValueError] = ValueError) -> None:
    """Raise one error that lists every problem, if there is any."""
    collected = Problems(what, error)
    collected.add(*problems)
    collected.raise_any()


def did_you_mean(target: str, names: Iterable[str]) -> str:
    """A hint for a name that matches nothing: names that are close to it, or else five of those that there are.

    >>> did_you_mean("q_porj", ["layers.0.q_proj", "layers.0.act"])
    " (did you mean 'q_proj'?)"
    >>> did_you_mean("wq", ["layers", "layers.0", "layers.0.q_proj"])
    " (names end in 'layers', 'q_proj', '0')"
    """
    ends = last_parts(names)
    close = difflib.get_close_matches(target.rsplit(".", 1)[-1], sorted(ends), n=3)
    if close:
        return f" (did you mean {', '.join(map(repr, close))}?)"
    words = [repr(end) for end in ends]
    listed = ", ".join([*words[:5], *(["…"] if words[5:] else [])])
    return f" (names end in {listed})" if words else ""


def last_parts(names: Iterable[str]) -> list[str]:
    """The last components of names, each once, for hints: at most a thousand, and numbers come last.

    >>> last_parts(["layers", "layers.0", "layers.0.q_proj", "layers.1", "layers.1.q_proj", ""])
    ['layers', 'q_proj', '0', '1']
    """
    ends = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if name)
    return sorted(ends, key=str.isdigit)[:_MOST_ENDS]


def join(module: str, name: str) -> str:
    """The full name of a module's own parameter; the root module's name is empty."""
    return f"{module}.{name}" if module else name


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value: object, least: int = 0) -> TypeGuard[int]:
    """Whether a value is an integer of at least `least`, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they need to be; numbers to the right."""
    cells = [list(header), *([f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [bool(rows) and isinstance(c, int | float) for c in (rows[0] if rows else header)]
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in cells
    )
