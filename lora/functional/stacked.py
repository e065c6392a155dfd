"""The updates of several adapters in a few operations: A and B of all of them stacked, for as many rows of each.

For a few rows, where a loop over adapters costs more in calls than in arithmetic. Adapters with fewer rows than the
one with most get copies of one of their own, so that nothing of one adapter meets another's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora.functional.fused import Slices, cast, exact_dtype, spread

# Up to how many rows are copied for a block, and how many times the work may grow by zeros and copies that fill up what
# is shorter.
_FEW, _WASTE = 1024, 2
# Up to how many bytes A and B of an adapter have, on the average, for a CPU to copy them sooner than to call three more
# operations; and for it to keep copies, where what is saved is worth the memory.
_COPIED, _KEPT = 2**17, 2**18


# Gives what `Block.stack` does, of A and B of the block's adapters.
Stack = Callable[["Block", Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]


class Block:
    """The rows of K adapters as a block (K, most), where `most` is how many rows the adapter with most rows has.

    Attributes:
        order: the adapters in the order of their first rows.
        most: how many rows each has in the block.
        owned: how many rows the adapters have.
        filled: how many rows the block has.
        run: where the block is, as it is, among all rows; None if rows must be copied for it.
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.order = sorted(range(len(rows)), key=lambda k: rows[k][0])
        self.most = max(map(len, rows))
        self.owned, self.filled = sum(map(len, rows)), len(rows) * self.most
        self._rows = [rows[k] for k in self.order]
        start = rows[self.order[0]][0]
        lined_up = all(
            (own[0], own[-1] + 1, len(own)) == (start + i * self.most, start + (i + 1) * self.most, self.most)
            for i, own in enumerate(self._rows)
        )
        self.run = slice(start, start + self.filled) if lined_up else None
        self._indices: dict[torch.device, list[Tensor]] = {}

    def pays(
        self, As: Sequence[Tensor], Bs: Sequence[Tensor], slices: Sequence[Slices | None], kept: bool = False
    ) -> bool:
        """Whether to compute the updates at once, for A, B and slices of each adapter, and not one after the other.

        `kept` says that what is stacked is kept, and stacked once for many forwards.

        Times over that of the base's product, of r = 8 on a core of an AMD EPYC 9004: one after the other → at once,
        and PEFT's loop:

            adapters × rows     576 → 576, float32     bfloat16                576 → 1536, float32    bfloat16
            4 × 1               2.7 → 2.4 (3.3)        6.1 → 4.0 (7.2)         1.8 → 1.8 (2.2)        4.1 → 2.8 (4.6)
            32 × 1              3.9 → 2.5 (5.7)        11.8 → 4.4 (29.7)       1.9 → 1.9 (2.8)        22.6 → 2.6 (24.2)
            32 × 32             1.2 → 1.1 (1.8)        2.2 → 1.7 (3.9)         1.1 → 1.1 (1.3)        1.4 → 1.3 (1.6)

            4 × 1, 3072 → 3072  1.1 → 1.0 (1.3)        1.5 → 1.3 (1.4)
            32 × 1, the same    1.2 → 1.6 (1.6)        1.9 → 1.1 (1.9)

        At once is not slower where the block is a view, and A and B are small. Where the block is copied, it is faster
        up to about 1,024 rows; above, one adapter after the other, whose rows stay in the processor's cache.
        """
        if len(Bs) == 1 or slices.count(slices[0]) < len(slices) or self.filled > _WASTE * self.owned:
            return False
        if self.filled > _FEW and self.run is None:
            return False
        ranks = [B.shape[1] for B in Bs]
        most = _KEPT if kept else _COPIED
        if Bs[0].is_cpu and sum(ranks) * (As[0].nbytes + Bs[0].nbytes) > most * ranks[0] * len(ranks):
            return False
        if ranks.count(ranks[0]) == len(ranks):
            return True
        one_piece = slices[0] is None or len(slices[0]) == 1
        return one_piece and len(ranks) * max(ranks) <= _WASTE * sum(ranks)

    def of(self, x: Tensor) -> Tensor:
        """The block (K, most, features) of x (N, features); a view, if it is a run of x's rows."""
        rows = x.index_select(0, self._on(x.device)[0]) if self.run is None else x[self.run]
        return rows.view(len(self.order), self.most, x.shape[1])

    def add_(self, y: Tensor, change: Tensor, alpha: float) -> None:
        """Add alpha times a block (K, most, features) to the rows of y (N, features) that it is of."""
        _, owned, places = self._on(y.device)
        change = change.flatten(0, 1)
        change = change if self.owned == self.filled else change.index_select(0, places)
        y.index_add_(0, owned, change, alpha=alpha)

    def _on(self, device: torch.device) -> list[Tensor]:
        """Which rows the block is put together from; each of them once; and where these are in the block."""
        if device not in self._indices:
            filled = [row for own in self._rows for row in (*own, *[own[0]] * (self.most - len(own)))]
            owned = [row for own in self._rows for row in own]
            places = [i * self.most + j for i, own in enumerate(self._rows) for j in range(len(own))]
            self._indices[device] = [torch.tensor(indices, device=device) for indices in (filled, owned, places)]
        return self._indices[device]

    def stack(self, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """A (K, G·r, in_features) and B (K, r, sizes), for G slices, in the block's order.

        Those of a lower rank are filled up with zeros; with several slices the rank must be the same for all.
        """
        As, Bs = [As[k] for k in self.order], [Bs[k] for k in self.order]
        if len({B.shape[1] for B in Bs}) == 1:
            return torch.stack(As), torch.stack(Bs).mT
        return _filled_up(As), _filled_up([B.T for B in Bs])

    def add_updates_(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scalings: Sequence[float], slices: Slices
    ) -> None:
        """Add what each adapter adds for its rows of x (N, in_features) to y (N, out_features), in place.

        Args:
            y: in x's dtype.
            x: in the dtype to compute in.
            A: (K, G·r, in_features), as `stack` gives it.
            B: (K, r, sizes).
            scalings: s of each adapter.
            slices: those of all adapters.
        """
        scaling = scalings[0] if len({*scalings}) == 1 else self._column(scalings, x)
        B, left = spread(B, scaling, x.dtype)
        h = torch.bmm(self.of(x), cast(A, x.dtype).mT)  # (K, most, G·r)
        if isinstance(left, Tensor):
            h, left = h.mul_(left), 1.0
        pieces = [(h, B)]
        if len(slices) > 1:
            sizes = [stop - start for start, stop in slices]
            pieces = [*zip(h.chunk(len(slices), -1), torch.split(B, sizes, -1), strict=True)]
        for (start, stop), (h_g, B_g) in zip(slices, pieces, strict=True):
            y_g = y[:, start:stop]
            if self.run is None:
                self.add_(y_g, torch.bmm(h_g, B_g), left)
            else:
                self.of(y_g).baddbmm_(h_g, B_g, alpha=left)

    def _column(self, scalings: Sequence[float], x: Tensor) -> Tensor:
        """(K, 1, 1), in the block's order."""
        column = [scalings[k] for k in self.order]
        return torch.tensor(column, dtype=exact_dtype(x.dtype), device=x.device)[:, None, None]


def _filled_up(factors: list[Tensor]) -> Tensor:
    dtype = reduce(torch.promote_types, (factor.dtype for factor in factors))
    return pad_sequence([cast(factor, dtype) for factor in factors], batch_first=True)
