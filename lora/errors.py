"""What rings and wings say alike: one error with every problem in it, names, numbers and tables in words.

Files of strangers have names and values of any length, with control characters and newlines in them. Whatever is put
together here for a screen or a log has none, but for the newlines of its own, and is of bounded length.
"""

from __future__ import annotations

import difflib
import reprlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import TypeGuard

_LONGEST = 1_000  # characters of one problem, of which the first and the last are shown
_LONGEST_CELL = 512  # as long as names of tensors may be
_LONGEST_MESSAGE = 16_000
_MOST_ENDS = 1000  # that a name is compared with: a comparison takes some microseconds
_MOST = 100  # problems that one error lists
_SOME = 8  # names in one line
_LARGEST = 2**63 - 1  # what torch has for sizes
_GREATEST = sys.float_info.max


# ---- what a stranger says --------------------------------------------------------------------------------------------


def visible(text: str, keep: str = "") -> str:
    """A text whose control characters, newlines, marks of direction and the like are escapes; `keep` stays as it is.

    >>> print(visible("\\x1b[2Jé\\n\\u202e名"))
    \\x1b[2Jé\\n\\u202e名
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def clipped(text: str, most: int = _LONGEST) -> str:
    """A text of bounded length: its begin and its end.

    >>> clipped("abcdefghijklmnopq", 9)
    'abcd … pq'
    """
    if len(text) <= most:
        return text
    tail = max(most // 4, 1)
    return f"{text[: most - tail - 3]} … {text[-tail:]}"


class _Short(reprlib.Repr):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, most, most
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 20

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write numbers of more than 4300 digits.
        return repr(x) if -_LARGEST <= x <= 2 * _LARGEST + 1 else f"an integer of {x.bit_length()} bits"


def short(value: object, most: int = 80) -> str:
    """Any value for an error: its `repr`, in one line of bounded length.

    >>> short("a" * 1000, 12), short(10**5000), short([1, 2.5, None])
    ("'aaa...aaaa'", 'an integer of 16610 bits', '[1, 2.5, None]')
    """
    return clipped(visible(_Short(most).repr(value)), 2 * most)


# ---- errors ----------------------------------------------------------------------------------------------------------


class AdapterError(ValueError):
    """An adapter cannot be saved or loaded; the message lists every reason.

    >>> import lora
    >>> issubclass(lora.AdapterError, ValueError)
    True
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(clipped(visible(message, "\n"), 2 * _LONGEST_MESSAGE))


class Problems:
    """Collects problems, and raises them as one error at the end of its block, if there is any.

    with Problems("merge: nothing was changed") as problems:
        for name, layer in layers.items():
            with problems.at(name):  # a ValueError in here is one problem
                check(layer)
    """

    def __init__(self, what: str, error: type[ValueError] = ValueError, most: int = _MOST) -> None:
        self.what, self.error, self.most = what, error, most
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
            lines = (f"  - {line}" for line in listed(self.found, self.most))
            raise self.error("\n".join([f"{visible(self.what)}, because", *lines]))

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.raise_any()


def listed(problems: Sequence[str], most: int = _MOST) -> Iterator[str]:
    """A line for each problem; of very many the first, and how many more there are."""
    room = _LONGEST_MESSAGE
    for number, problem in enumerate(problems):
        line = clipped(visible(problem))
        room -= len(line)
        if number == most or (room < 0 and number):
            yield f"and {len(problems) - number} more."
            return
        yield line


def raise_all(what: str, problems: Iterable[str], error: type[ValueError] = ValueError, most: int = _MOST) -> None:
    """Raise one error that lists every problem, or the first of very many, if there is any."""
    collected = Problems(what, error, most)
    collected.add(*problems)
    collected.raise_any()


def some(names: Iterable[str], count: int) -> str:
    """Names in a line, of which there are this many; of very many the first, and how many more there are.

    >>> some("abc", 3), some(map(str, range(1000)), 1000)[-16:]
    ('a, b, c', '7 and 992 others')
    """
    more = f" and {count - _SOME} others" if count > _SOME + 1 else ""
    return ", ".join(islice(names, _SOME if more else None)) + more


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
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _GREATEST


def is_count(value: object, least: int = 0) -> TypeGuard[int]:
    """Whether a value is an integer of at least `least` that torch can hold, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def with_article(word: str) -> str:
    """A word, such as the name of a class, after "a" or "an".

    >>> with_article("Linear"), with_article("EmbeddingBag")
    ('a Linear', 'an EmbeddingBag')
    """
    return f"{'an' if word[:1].lower() in set('aeio') else 'a'} {word}"


def instance(value: object) -> str:
    """What a value is, by its class.

    >>> instance([]), instance(1.5)
    ('a list', 'a float')
    """
    return with_article(type(value).__name__)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they need to be; numbers to the right."""
    written = ([f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows)
    cells = [list(header), *([clipped(visible(cell), _LONGEST_CELL) for cell in row] for row in written)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [bool(rows) and isinstance(c, int | float) for c in (rows[0] if rows else header)]
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in cells
    )
