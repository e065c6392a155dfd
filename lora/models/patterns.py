"""Names and patterns that mean modules: looked up by the ends of names, so that many cost no more than one each.

    a name      matches a module's full name, or its last components
    a pattern   is a regular expression, which matches the same as a whole

Most patterns are plain: names in which a dot, as in any regular expression, stands for any character. These are looked
up as well; only others are tried one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

# A plain pattern: perhaps anchors, and between them characters that stand for themselves, dots, and escapes of what is
# neither letter nor digit.
_PLAIN = re.compile(r"(\^?)((?:[^\\^$*+?{}\[\]|()]|\\[^a-zA-Z0-9])*)\$?")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


def ends_of(name: str) -> Iterator[str]:
    """A module's full name, and what follows each of its dots: all names that match it.

    >>> list(ends_of("layers.0.q_proj"))
    ['layers.0.q_proj', '0.q_proj', 'q_proj']
    """
    yield name
    place = name.find(".")
    while place >= 0:
        yield name[place + 1 :]
        place = name.find(".", place + 1)


def starts_of(name: str) -> Iterator[str]:
    """The names of the modules around one of this name, without the root and itself.

    >>> list(starts_of("layers.0.q_proj"))
    ['layers', 'layers.0']
    """
    place = name.find(".")
    while place >= 0:
        yield name[:place]
        place = name.find(".", place + 1)


def is_plain(pattern: str) -> bool:
    """Whether a pattern is a name, in which dots stand for any character and others may be escaped."""
    return _PLAIN.fullmatch(pattern) is not None


def at_end(pattern: str) -> str:
    """The regular expression that a whole name has to match for a pattern."""
    return rf"(.*\.)?({pattern})"


class Words:
    """Many words, of which those that a name holds are looked up.

    >>> words = Words(["q_proj", "proj", "layers.0"])
    >>> sorted(words.ending("layers.0.q_proj")), words.within("layers.0.q_proj")
    (['proj', 'q_proj'], ['q_proj', 'layers.0'])
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._by_length: dict[int, set[str]] = {}
        self._by_parts: dict[int, set[str]] = {}
        for word in words:
            self._by_length.setdefault(len(word), set()).add(word)
            self._by_parts.setdefault(1 + word.count("."), set()).add(word)

    def ending(self, name: str) -> list[str]:
        """Those that a name ends in, at any letter."""
        ends = ((name[len(name) - n :], words) for n, words in self._by_length.items() if n <= len(name))
        return [end for end, words in ends if end in words]

    def within(self, name: str) -> list[str]:
        """Those that are components of a name, one after the other."""
        parts = name.split(".")
        runs = (
            (".".join(parts[first : first + count]), words)
            for count, words in self._by_parts.items()
            for first in range(len(parts) - count + 1)
        )
        return [run for run, words in runs if run in words]


class _Form(NamedTuple):
    """What plain patterns of one length have in common: whether only full names count, and where their dots are."""

    whole: bool
    dots: tuple[int, ...]

    def masked(self, end: str) -> str:
        """A name of this length as the patterns have it."""
        if not self.dots:
            return end
        places = (0, *(dot + 1 for dot in self.dots)), (*self.dots, len(end))
        return ".".join(end[start:stop] for start, stop in zip(*places, strict=True))


class Patterns(Generic[T]):
    """Patterns, in order, with their values.

    >>> patterns = Patterns({"layers.0.q_proj": 4, "(q|v)_proj": 8})
    >>> patterns.value(["layers.0.q_proj"], 1), patterns.value(["layers.1.v_proj"], 1), patterns.value(["head"], 1)
    (4, 8, 1)
    """

    def __init__(self, patterns: Mapping[str, T]) -> None:
        self._values = [*patterns.values()]
        self._others: list[tuple[int, re.Pattern[str]]] = []
        self._plain: dict[int, dict[_Form, dict[str, list[int]]]] = {}
        for number, pattern in enumerate(patterns):
            if plain := _PLAIN.fullmatch(pattern):
                anchor, bare = plain.groups()
                marked = _ESCAPED.sub("\0", bare)  # what is escaped is no dot, and one character
                text = _ESCAPED.sub(r"\1", bare)
                form = _Form(bool(anchor), tuple(place for place, letter in enumerate(marked) if letter == "."))
                self._plain.setdefault(len(text), {}).setdefault(form, {}).setdefault(text, []).append(number)
            else:
                self._others.append((number, re.compile(at_end(pattern))))

    def matching(self, names: Sequence[str]) -> list[int]:
        """The numbers of the patterns that match any of a module's names, in order."""
        tried = (number for number, pattern in self._others if any(map(pattern.fullmatch, names)))
        return sorted({*self._looked_up(names), *tried})

    def value(self, names: Sequence[str], default: T) -> T:
        """The value of the first pattern that matches any of a module's names."""
        first = min(self._looked_up(names), default=None)
        for number, pattern in self._others:
            if first is not None and first < number:
                break
            if any(map(pattern.fullmatch, names)):
                return self._values[number]
        return default if first is None else self._values[first]

    def lookups(self, names: Iterable[str]) -> Iterator[int]:
        """How many comparisons of a component each name costs, apart from the patterns that are tried."""
        weights = {n: sum(1 + len(form.dots) for form in forms) for n, forms in self._plain.items()}
        yield from (sum(weights.get(len(end), 0) for end in ends_of(name)) for name in names)

    def _looked_up(self, names: Iterable[str]) -> Iterator[int]:
        for name in names:
            for end in ends_of(name) if self._plain else ():
                for form, numbers in self._plain.get(len(end), {}).items():
                    if not form.whole or len(end) == len(name):
                        yield from numbers.get(form.masked(end), ())
