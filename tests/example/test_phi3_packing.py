"""examples/phi3/packing.py: rows that several conversations share without knowing of each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from phi3 import packing, tiny
from phi3.chat_data import IGNORED, Tokens


def stretch(length: int, seed: int = 0) -> Tokens:
    ids = torch.randint(7, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Tokens(ids, [IGNORED, *ids[1:]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_logits_are_those_of_the_separate_conversations(attention):
    model = tiny.model()
    model.set_attn_implementation(attention)
    row, alone = [stretch(9, 1), stretch(5, 2), stretch(1, 3), stretch(7, 4)], [stretch(30, 5)]
    batch = packing.collate([row, alone], pad_id=2)
    assert batch.input_ids.shape == (2, 30)  # the first row is padded
    packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    start = 0
    for part in row:
        stop = start + len(part.input_ids)
        separate = model(input_ids=torch.tensor([part.input_ids])).logits[0]
        torch.testing.assert_close(packed[0, start:stop], separate)
        start = stop
    torch.testing.assert_close(packed[1], model(input_ids=torch.tensor([alone[0].input_ids])).logits[0])


def test_collating():
    batch = packing.collate(
        [[Tokens([5, 6, 7], [IGNORED, 6, 7]), Tokens([8, 9], [IGNORED, 9])], [stretch(8)]], pad_id=0
    )
    assert batch.input_ids[0].tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.labels[0].tolist() == [IGNORED, 6, 7, IGNORED, 9, IGNORED, IGNORED, IGNORED]
    assert batch.size == 13
    assert batch.labelled == 3 + 7
    moved = batch.to(torch.device("cpu"))
    assert moved.size == 13
    assert torch.equal(moved.labels, batch.labels)


@given(st.lists(st.integers(1, 64)))
def test_packing_loses_nothing_and_overfills_no_row(lengths):
    stretches = [stretch(length, seed) for seed, length in enumerate(lengths)]
    rows = packing.pack(stretches, max_length=64)
    sizes = [sum(len(part.input_ids) for part in row) for row in rows]
    assert sorted(map(str, stretches)) == sorted(str(part) for row in rows for part in row)
    assert max(sizes, default=0) <= 64
    assert sum(size <= 32 for size in sizes) <= 1  # two such rows would have been one


def order(rows=11, **changes) -> packing.Order:
    made = [[stretch(3, seed)] for seed in range(rows)]
    return packing.Order(made, **{"batch_size": 2, "accumulation": 2, "seed": 0, "pad_id": 2} | changes)


def rows_of(batches) -> list[str]:
    return [str(row) for batch in batches for row in batch.input_ids.tolist()]


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own():
    data = order()
    assert data.steps_per_epoch == 3
    epochs = [[row for step in range(start, start + 3) for row in rows_of(data.step(step))] for start in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(str(row[0].input_ids) for row in data.rows)
    assert epochs[0] != epochs[1]


def test_a_step_depends_on_nothing_but_its_number_and_the_seed():
    torch.manual_seed(1)
    first = rows_of(order().step(4))
    torch.manual_seed(2)
    assert rows_of(order().step(4)) == first != rows_of(order(seed=5).step(4))


def test_a_step_has_as_many_batches_as_it_accumulates():
    assert [batch.input_ids.shape[0] for batch in order().step(0)] == [2, 2]
    assert [batch.input_ids.shape[0] for batch in order().step(2)] == [2, 1]  # what is left of the epoch
    assert len(order(accumulation=1).step(0)) == 1
