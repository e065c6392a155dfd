"""Patterns for names that come from a stranger's file: matched as PEFT does, where that is sure to end."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_LONGEST = 1000
# Matching goes through all ways in which a pattern may lie on a name, at worst; more than these take too long.
_MOST_WAYS = 10**7


def pattern_problem(pattern: str) -> str | None:
    """Why a regular expression is not used: it may take forever, or is none; None if it is fine."""
    if len(pattern) > _LONGEST or re.search(r"\)[*+?{]|\(\?", _bare(pattern)) or ways(pattern, 1) > _MOST_WAYS:
        return f"{pattern[:80]!r} is too intricate to be matched safely."
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{pattern[:80]!r} is no regular expression: {error}."
    return None


def ways(pattern: str, length: int) -> int:
    """In how many ways a pattern without repeated groups may lie on a name of this length, at most.

    >>> ways("q_proj|v_proj", 20), ways(r".*\\.(q|v)_proj", 20)
    (42, 462)
    """
    bare = _bare(pattern)
    repeats = 1 + len(re.findall(r"[*+{]", bare))  # `.*` and its like; one is ours
    choices = math.prod(1 + part.count("|") for part in re.split(r"[()]", bare)) << bare.count("?")
    return choices * math.comb(length + repeats, repeats)


def _bare(pattern: str) -> str:
    return re.sub(r"\\.|\[[^\]]*\]", "x", pattern)  # escapes and sets of characters stand for one character


class Patterns:
    """Values by pattern: a name has that of the first pattern which it, or its end after a dot, matches."""

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        self._patterns = [(key, re.compile(rf"(.*\.)?({key})$"), value) for key, value in patterns.items()]

    def value_for(self, name: str, default: Any) -> Any:
        """The value for a name; ValueError where finding it may take too long."""
        for key, pattern, value in self._patterns:
            if ways(key, len(name)) > _MOST_WAYS:
                raise ValueError(f"{key[:80]!r} is too intricate to be matched safely with a name so long.")
            if pattern.match(name):
                return value
        return default
