"""The updates of several adapters in a few operations: A and B of all of them stacked, for as many rows of each.

For a few rows, where a loop over adapters costs more in calls than in arithmetic. Adapters with fewer rows than the
one with most get copies of one of their own, so that nothing of one adapter meets another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora.functional.fused import Slices, cast, exact_dtype, spread


class Block:
    """The rows of K adapters as a block (K, most), where `most` is how many rows the adapter with most rows has.

    Attributes:
        order: the adapters in the order of their first rows.
        most: how many rows each has in the block.
        run: where the block is, as it is, among all rows; None if rows must be put together for it.
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.order = sorted(range(len(rows)), key=lambda k: rows[k][0])
        self.most = max(map(len, rows))
        self._rows = [rows[k] for k in self.order]
        start = rows[self.order[0]][0]
        lined_up = all(
            (own[0], own[-1] + 1, len(own)) == (start + i * self.most, start + (i + 1) * self.most, self.most)
            for i, own in enumerate(self._rows)
        )
        self.run = slice(start, start + len(rows) * self.most) if lined_up else None
        self._indices: dict[torch.device, list[Tensor]] = {}

    def of(self, x: Tensor) -> Tensor:
        """The block (K, most, features) of x (N, features); a view, if it is a run of x's rows."""
        rows = x.index_select(0, self._on(x.device)[0]) if self.run is None else x[self.run]
        return rows.view(len(self.order), self.most, x.shape[1])

    def add_(self, y: Tensor, change: Tensor, alpha: float) -> None:
        """Add alpha times a block (K, most, features) to the rows of y (N, features) that it is of."""
        _, owned, places = self._on(y.device)
        change = change.flatten(0, 1)
        y.index_add_(0, owned, change if len(owned) == len(change) else change.index_select(0, places), alpha=alpha)

    def _on(self, device: torch.device) -> list[Tensor]:
        """Which rows the block is put together from; each of them once; and where these are in the block."""
        if device not in self._indices:
            filled = [row for own in self._rows for row in (*own, *[own[0]] * (self.most - len(own)))]
            owned = [row for own in self._rows for row in own]
            places = [i * self.most + j for i, own in enumerate(self._rows) for j in range(len(own))]
            self._indices[device] = [torch.tensor(indices, device=device) for indices in (filled, owned, places)]
        return self._indices[device]


def add_stacked_(
    y: Tensor,
    x: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    slices: Slices,
    block: Block,
) -> None:
    """Add to y (N, out_features) what each adapter adds for its rows of x (N, in_features), in place.

    Args:
        y: in x's dtype.
        x: in the dtype to compute in.
        As: (G·r, in_features), for G slices, of each adapter.
        Bs: (sum of the slices' sizes, r); with several slices r is the same for all adapters.
        scalings: s.
        slices: those of all adapters.
        block: the adapters' rows.
    """
    A = cast(_stack_A([As[k] for k in block.order]), x.dtype)  # (K, G·r, in_features)
    B = _stack_B([Bs[k] for k in block.order])  # (K, r, sizes)
    same = len(set(scalings)) == 1
    scaling = scalings[0] if same else _column([scalings[k] for k in block.order], x)
    B, left = spread(B, scaling, x.dtype)
    h = torch.bmm(block.of(x), A.mT)  # (K, most, G·r)
    if isinstance(left, Tensor):
        h, left = h.mul_(left), 1.0
    pieces = [(h, B)]
    if len(slices) > 1:
        sizes = [stop - start for start, stop in slices]
        pieces = [*zip(h.chunk(len(slices), -1), torch.split(B, sizes, -1), strict=True)]
    for (start, stop), (h_g, B_g) in zip(slices, pieces, strict=True):
        y_g = y[:, start:stop]
        if block.run is None:
            block.add_(y_g, torch.bmm(h_g, B_g), left)
        else:
            block.of(y_g).baddbmm_(h_g, B_g, alpha=left)


def _column(scalings: list[float], x: Tensor) -> Tensor:
    """(K, 1, 1)."""
    return torch.tensor(scalings, dtype=exact_dtype(x.dtype), device=x.device)[:, None, None]


def _stack_A(factors: list[Tensor]) -> Tensor:
    """(K, R, in_features) of several A, those of a lower rank filled up with zeros."""
    return torch.stack(factors) if len({*map(len, factors)}) == 1 else _filled_up(factors)


def _stack_B(factors: list[Tensor]) -> Tensor:
    """(K, r, sizes) of several B, those of a lower rank filled up with zeros."""
    same = len({factor.shape[1] for factor in factors}) == 1
    return torch.stack(factors).mT if same else _filled_up([factor.T for factor in factors])


def _filled_up(factors: list[Tensor]) -> Tensor:
    dtype = reduce(torch.promote_types, (factor.dtype for factor in factors))
    return pad_sequence([cast(factor, dtype) for factor in factors], batch_first=True)
