"""Several conversations in one row, as if each had a row of its own."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phi3.chat_data import IGNORED, Tokens

Row = list[Tokens]


class Batch(NamedTuple):
    """Rows padded to one length.

    There is no attention mask: transformers reads off the position ids where a conversation starts
    (they count from 0 again) and lets no token attend to another conversation's.
    """

    input_ids: Tensor  # (rows, length)
    labels: Tensor  # (rows, length), IGNORED where there is no loss
    position_ids: Tensor  # (rows, length)
    size: int  # tokens that are not padding

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(part.to(device) for part in self[:3]), self.size)

    @property
    def labelled(self) -> int:
        """How many tokens the loss is over."""
        return int((self.labels != IGNORED).sum())


def pack(stretches: Sequence[Tokens], max_length: int) -> list[Row]:
    """Best fit, longest first: each stretch goes to the fullest row that still has room for it."""
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for stretch in sorted(stretches, key=lambda stretch: len(stretch.input_ids), reverse=True):
        length = len(stretch.input_ids)
        at = bisect_left(room, (length, 0))
        if at == len(room):
            left, row = max_length, len(rows)
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(stretch)
        insort(room, (left - length, row))
    return rows


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Padding is one more conversation at the end of a row, without labels."""
    width = max(sum(len(stretch.input_ids) for stretch in row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    size = 0
    for number, row in enumerate(rows):
        start = 0
        for stretch in row:
            stop = start + len(stretch.input_ids)
            input_ids[number, start:stop] = torch.tensor(stretch.input_ids)
            labels[number, start:stop] = torch.tensor(stretch.labels)
            position_ids[number, start:stop] = torch.arange(stop - start)
            start = stop
        position_ids[number, start:] = torch.arange(width - start)
        size += start
    return Batch(input_ids, labels, position_ids, size)


class Order(NamedTuple):
    """Which rows each step sees: a function of the step, so that a resumed run needs no memory of it."""

    rows: list[Row]
    batch_size: int
    accumulation: int
    seed: int
    pad_id: int
    rank: int = 0  # which share of each step's rows is ours …
    ranks: int = 1  # … of so many

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // (self.batch_size * self.accumulation))

    def step(self, step: int) -> list[Batch]:
        """The batches whose gradients step number `step` (from 0) adds up: this process's share of them."""
        epoch, place = divmod(step, self.steps_per_epoch)
        shuffled = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + epoch))
        per_step = self.batch_size * self.accumulation
        chosen = [self.rows[at] for at in shuffled[place * per_step : (place + 1) * per_step].tolist()]
        return list(batches(share(chosen, self.rank, self.ranks), self.batch_size, self.pad_id))


def share(rows: Sequence[Row], rank: int, ranks: int) -> list[Row]:
    """Every so many of the rows; as many for each rank, so that all do the same: the last may be one without labels."""
    ours = list(rows[rank::ranks])
    if len(ours) < -(-len(rows) // ranks):
        ours.append([Tokens(rows[0][0].input_ids[:2], [IGNORED] * 2)])
    return ours


def batches(rows: Sequence[Row], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """The rows in turn, `batch_size` at a time."""
    for start in range(0, len(rows), batch_size):
        yield collate(rows[start : start + batch_size], pad_id)
