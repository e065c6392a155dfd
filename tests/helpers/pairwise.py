"""Few cases in the place of a full product: every two values that occur together do so in one of the cases."""

import itertools
from collections.abc import Hashable, Iterable, Sequence

import pytest


def pairs(row: Sequence[Hashable]) -> set[tuple]:
    """Every two values of a row, each with its column."""
    return set(itertools.combinations(enumerate(row), 2))


def pairwise(rows: Iterable[tuple]) -> list[tuple]:
    """Some of these rows, in their order, that have every pair of values that any of the rows has.

    The greedy choice, always the same: the row that adds the most pairs, and of several such rows the first.

    >>> pairwise([(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)])
    [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]
    """
    rows = list(rows)
    of_each = [pairs(row) for row in rows]
    missing, chosen = set().union(*of_each), set()
    while missing:
        best = max(range(len(rows)), key=lambda i: len(of_each[i] & missing))
        chosen.add(best)
        missing -= of_each[best]
    few = [rows[i] for i in sorted(chosen)]
    assert set().union(*map(pairs, few)) == set().union(*of_each)
    return few


def in_tiers(rows: Iterable[tuple], few: Iterable[tuple], *marks: pytest.MarkDecorator) -> list:
    """All rows as cases of a test: those among a few have these marks, and all others are exhaustive ones."""
    few = set(few)
    return [pytest.param(*row, marks=marks if row in few else pytest.mark.exhaustive) for row in rows]


def every_two(**values: Iterable) -> pytest.MarkDecorator:
    """Parametrize a test by some of all combinations, in which every two values meet; of a dict, keys are the ids."""
    columns = [
        list(of.items()) if isinstance(of, dict) else [(getattr(value, "__name__", str(value)), value) for value in of]
        for of in values.values()
    ]
    cases = []
    for row in pairwise(itertools.product(*(range(len(column)) for column in columns))):
        chosen = [column[i] for column, i in zip(columns, row, strict=True)]
        cases.append(pytest.param(*(value for _, value in chosen), id="-".join(id for id, _ in chosen)))
    return pytest.mark.parametrize(list(values), cases)
