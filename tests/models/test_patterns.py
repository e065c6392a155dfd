"""Patterns that are looked up match what regular expressions would."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.models.patterns import Patterns, Words, ends_of, starts_of

# Letters of two kinds, dots, and what must be escaped or may be.
NAMES = st.text("ab.+_", max_size=6)
PATTERNS = st.lists(
    st.sampled_from(["a", "b", ".", r"\.", r"\_", r"\+", "_", "-", "^", "$", r"\$", "a|b", "(a)", ".*", "[ab]", "a+"]),
    max_size=5,
).map("".join)


@settings(max_examples=600, deadline=None)
@given(patterns=st.lists(PATTERNS, max_size=6, unique=True), names=st.lists(NAMES, min_size=1, max_size=3))
def test_patterns_match_as_regular_expressions_do(patterns, names):
    expected = [n for n, p in enumerate(patterns) if any(re.fullmatch(rf"(.*\.)?({p})", name) for name in names)]
    found = Patterns({pattern: number for number, pattern in enumerate(patterns)})
    assert found.matching(names) == expected
    assert found.value(names, -1) == next(iter(expected), -1)


@pytest.mark.parametrize(
    "pattern", ["layers.0.q_proj", r"^layers\.0\.q_proj", r"layers\.0\.q_proj$", "q.proj", "q_proj"]
)
def test_a_pattern_that_is_a_name_is_tried_with_no_other_names(pattern, monkeypatch):
    compiled = []
    monkeypatch.setattr(re, "compile", lambda *args: compiled.append(args))
    assert Patterns({pattern: 1}).matching(["layers.0.q_proj"]) == [0]
    assert compiled == []


@settings(max_examples=200, deadline=None)
@given(name=NAMES, target=NAMES)
def test_the_ends_of_a_name_are_what_matches_it(name, target):
    assert (target in ends_of(name)) is (name == target or name.endswith(f".{target}"))


@settings(max_examples=200, deadline=None)
@given(name=NAMES, other=NAMES)
def test_the_starts_of_a_name_are_what_is_around_it(name, other):
    assert (other in starts_of(name)) is name.startswith(f"{other}.")


@settings(max_examples=200, deadline=None)
@given(name=NAMES, words=st.lists(NAMES, max_size=6, unique=True))
def test_words_are_found_at_the_end_of_names_and_within(name, words):
    assert sorted(Words(words).ending(name)) == sorted(word for word in words if name.endswith(word))
    assert {*Words(words).within(name)} == {word for word in words if f".{word}." in f".{name}."}
