"""Patterns for names that come from a stranger's file: matched as PEFT does, where that is sure to end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LONGEST = 1000
# Of `.*`, `+` and their like; each makes the time that a match may take grow with another power of the name's length.
_MOST_REPEATS = 4


def pattern_problem(pattern: str) -> str | None:
    """Why a regular expression is not used: it may take forever, or is none; None if it is fine."""
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)  # escapes and sets of characters stand for one character
    repeats = len(re.findall(r"[*+{]", bare))
    if len(pattern) > _LONGEST or repeats > _MOST_REPEATS or re.search(r"\)[*+?{]|\(\?", bare):
        return f"{pattern[:80]!r} is too intricate to be matched safely."
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{pattern[:80]!r} is no regular expression: {error}."
    return None


class Patterns:
    """Values by pattern: a name has that of the first pattern which it, or its end after a dot, matches."""

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        self._patterns = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in patterns.items()]

    def value_for(self, name: str, default: Any) -> Any:
        return next((value for pattern, value in self._patterns if pattern.match(name)), default)
