"""Regular expressions of a stranger's: which are matched, and what all of a file's may cost.

Nothing stops Python's `re` once it has begun, and it goes through all ways in which an expression may lie on a name, at
worst. So the ways are counted first: for each expression by itself, and for all of a file's with all of its names.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora.errors import short
from lora.models.patterns import Patterns, is_plain

_LONGEST_PATTERN = 1000
_MOST_WAYS = 10**7  # of one expression
# What all of a file's may cost together: a second or two. A step takes some 10 nanoseconds.
_MOST_STEPS = 10**8
_STEPS_OF_A_MATCH, _STEPS_OF_A_LOOKUP, _STEPS_OF_A_LETTER = 100, 50, 500  # of a letter to compile
_SCANNED = 16  # letters that are passed over in one step
_TOKENS = re.compile(r"\\.|\[[^\]]*\]|\{[^}]*\}|.", re.DOTALL)
_QUANTIFIERS = "*+?{"
# Groups that capture nothing, or by name, and looks ahead and back; what is escaped or in a set is none.
_MARKS = re.compile(r"\\.|\[[^\]]*\]|(?P<mark>\(\?(?::|P<\w+>|=|!|<=|<!))", re.DOTALL)
# A group, in a bare pattern, that repeats letters which match in one way: as many times as they fit, like one letter.
# What matches no letter, or none for sure, must not be in it: nothing would end that.
_EMPTY = re.compile(r"(?<!\\)(?:\\\\)*\\[AbBZz0-9]")
_REPEATED = re.compile(r"\([^()|*+?{^$]+\)[*+{]")


def pattern_problem(pattern: str, length: int = 1) -> str | None:
    """Why a regular expression is not matched with names of up to this length; None if it is."""
    if is_plain(pattern):  # it is looked up
        return None
    if len(pattern) > _LONGEST_PATTERN or _nested(pattern) or ways(pattern, length) > _MOST_WAYS:
        long = " with a name so long" if length > 1 else ""
        return f"{short(pattern)} is too intricate to be matched safely{long}."
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{short(pattern)} is no regular expression: {error}."
    return None


def cost_problem(options: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str | None:
    """Why all patterns of a file are not matched with all of its names; None if they are."""
    left = _MOST_STEPS
    for cost in _costs(options, names):
        left -= cost
        if left < 0:
            listed = " and ".join(f"`{option}`" for option in options)
            return f"to match all patterns of {listed} with {len(names)} names would take too long."
    return None


def ways(pattern: str, length: int) -> int:
    """In how many ways a pattern without repeated groups may lie on a name of this length, at most.

    >>> ways("q_proj|v_proj", 20), ways(r".*\\.(q|v)_proj", 20)
    (42, 462)
    """
    bare = _bare(pattern)
    repeats = 1 + _repeats(bare)  # `.*` and its like; one is that of `at_end`
    return _choices(bare) * math.comb(length + repeats, repeats)


def _costs(options: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Iterator[int]:
    """The steps that it takes, part by part; parts are small, so that what is too much is soon known."""
    for patterns in options.values():
        intricate = [pattern for pattern in patterns if not is_plain(pattern)]
        yield _STEPS_OF_A_MATCH * len(intricate) * len(names)
        yield from (_STEPS_OF_A_LETTER * (len(pattern) + 20) for pattern in intricate)
        expressions = [_Expression.of(pattern) for pattern in intricate]
        yield from (expression.steps(name) for name in names for expression in expressions)
        looked_up = Patterns({pattern: None for pattern in patterns if is_plain(pattern)})
        yield from (_STEPS_OF_A_LOOKUP * count for count in looked_up.lookups(names))


class _Expression(NamedTuple):
    """What the cost of an expression goes by.

    Attributes:
        choices: in how many ways its alternatives and what may be absent can be chosen.
        looks: whether it looks ahead or back.
        after: for each part that repeats a letter the letters that must follow it, which may be none.
    """

    choices: int
    looks: bool
    after: list[str]

    @classmethod
    def of(cls, pattern: str) -> _Expression:
        tokens, looks = _TOKENS.findall(_unmarked(pattern)), _looks(pattern)
        after = [_literals(tokens[n + 1 :], looks) for n, token in enumerate(tokens) if token[0] in "*+{"]
        odd = "[]" in pattern or "[^]" in pattern  # sets that begin with a bracket
        return cls(_choices(_bare(pattern)), looks, [""] * _repeats(_bare(pattern)) if odd else after)

    def steps(self, name: str) -> int:
        """How many steps a match with this name takes at most."""
        ends = self.choices * (1 + name.count("."))  # `at_end` lets a match begin after any dot
        anywhere = ends * _places(len(name), len(self.after), self.looks)
        if not any(self.after):
            return anywhere
        # What repeats can end only before the letters that follow it: at no more places than the rarest of them has.
        # Where it has none, all that is before them is tried nevertheless.
        places = (min(map(name.count, letters)) if letters else len(name) + 1 for letters in self.after)
        return min(anywhere, ends * math.prod(max(place, 1) for place in places) * (1 + len(name) // _SCANNED))


def _literals(tokens: Sequence[str], looks: bool) -> str:
    """The letters that must come first in these, past the end of a group; one that may be absent does not count.

    Where there are looks the group may be one, and what follows it does not come after what is in it.
    """
    found, passed = "", ("?", "+") if looks else ("?", "+", ")")
    tokens = [*itertools.dropwhile(lambda token: token in passed, tokens)]
    for token, following in itertools.zip_longest(tokens, tokens[1:], fillvalue=" "):
        escaped = len(token) == 2 and not token[1].isalnum()
        if (not escaped and (len(token) > 1 or token in ".^$|()*+?{[")) or following[0] in _QUANTIFIERS:
            break
        found += token[-1]
    return found


def _places(length: int, repeats: int, looks: bool) -> int:
    """In how many ways parts that repeat a letter may end in a name: one after the other, or, in looks, anywhere."""
    return int((length + 1) ** repeats if looks else math.comb(length + repeats, repeats))


def _nested(pattern: str) -> bool:
    """Whether a group is repeated that may match in several ways, or nothing, or is of a kind that is not counted."""
    said = _MARKS.sub(lambda found: "(^" if _is_look(found) else found[0], _EMPTY.sub("^", pattern))
    return re.search(r"\)[*+{]|\(\?", _REPEATED.sub("x*", _bare(said))) is not None


def _looks(pattern: str) -> bool:
    return any(map(_is_look, _MARKS.finditer(pattern)))


def _is_look(found: re.Match[str]) -> bool:
    return bool(found["mark"]) and found["mark"][2] in "=!<"


def _unmarked(pattern: str) -> str:
    """A pattern whose groups of a known kind are plain ones."""
    return _MARKS.sub(lambda found: "(" if found["mark"] else found[0], pattern)


def _repeats(bare: str) -> int:
    return len(re.findall(r"[*+{]", bare))


def _choices(bare: str) -> int:
    return math.prod(1 + part.count("|") for part in re.split(r"[()]", bare)) << bare.count("?")


def _bare(pattern: str) -> str:
    """A pattern in which escapes and sets of characters stand for one character, and groups have no marks."""
    return re.sub(r"\\.|\[[^\]]*\]", "x", _unmarked(pattern))
