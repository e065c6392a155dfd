"""Few cases in the place of a full product: every two values that occur together do so in one of the cases."""

import itertools
from collections.abc import Hashable, Iterable, Sequence


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
