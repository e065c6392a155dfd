"""What a layer of a bank keeps while the same rows come again: A and B, stacked, until anything about them changes."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from banks import alone, banked
from counting import Operations
from torch import nn

import lora

ROWS = ["a", "b", "c", None]
CONFIGS = {"a": {"lora_alpha": 3}, "b": {"lora_alpha": 5}, "c": {"use_rslora": True}}


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12, dtype=torch.float64)).eval()


def served(configs=CONFIGS, forwards=3):
    """A bank that has answered for these rows, and keeps what it needs for it."""
    model, bank = banked(base(), configs, targets=["0"])
    model.eval()
    x = torch.randn(len(ROWS), 16, dtype=torch.float64)
    for _ in range(forwards):
        answer(model, bank, x)
    return model, bank, x


@torch.no_grad()
def answer(model, bank, x, rows=ROWS):
    with bank.rows(rows):
        return model(x)


def stacked(model, bank, x, rows=ROWS):
    """How many tensors are stacked for an answer."""
    with Operations() as operations:
        answer(model, bank, x, rows)
    return sum(name in ("stack", "cat", "pad_sequence") for name in operations.names)


def assert_right(model, bank, x, rows=ROWS):
    y = answer(model, bank, x, rows)
    for row, name in enumerate(rows):
        with torch.no_grad():
            torch.testing.assert_close(y[row : row + 1], alone(base(), bank, name)(x[row : row + 1]))


def test_what_is_stacked_is_kept_from_the_second_time_on():
    model, bank, x = served(forwards=0)
    assert [stacked(model, bank, x) for _ in range(4)] == [2, 2, 0, 0]
    assert_right(model, bank, x)


@pytest.mark.parametrize(("r", "stacks"), [(9, [2, 2, 0]), (10, [0, 2, 0]), (19, [0, 2, 0]), (20, [0, 0, 0])])
def test_large_ones_are_not_copied_for_it(r, stacks):
    """A and B of 1,024 + 640 features have 13 KiB for each rank: up to 128 KiB they are copied, up to 256 KiB kept."""
    base = nn.Sequential(nn.Linear(1024, 640, dtype=torch.float64)).eval()
    model, bank = banked(base, {name: {"r": r} for name in "abc"}, targets=["0"])
    x = torch.randn(4, 1024, dtype=torch.float64)
    assert [stacked(model.eval(), bank, x) for _ in range(3)] == stacks
    y = answer(model, bank, x)
    for row, name in enumerate(ROWS):
        with torch.no_grad(), bank.use(name):
            torch.testing.assert_close(y[row], model(x)[row])


def test_rows_that_do_not_come_again_are_not_kept():
    model, bank, x = served()
    other = ["b", "a", None, "c"]
    for _ in range(2):
        assert [stacked(model, bank, x, rows) for rows in (other, ROWS)] == [2, 2]
    assert [stacked(model, bank, x), stacked(model, bank, x)] == [2, 0]
    for rows in (other, ["a", "a", "b", "b"], ["c"] * 4, ROWS):
        for _ in range(3):
            assert_right(model, bank, x, rows)


def write(change):
    def by(model, bank):
        with torch.no_grad():
            change(bank.parameters("b"))

    return by


def learn(model, bank):
    optimizer = torch.optim.SGD(bank.parameters("b"), lr=1.0)
    with bank.use("b"):
        model(torch.ones(2, 16, dtype=torch.float64)).sum().backward()
    optimizer.step()


CHANGES = {
    "a step of an optimizer": learn,
    "a write in place": write(lambda parameters: parameters[1].mul_(-2)),
    "a write past the version counter": write(lambda parameters: parameters[0].data.mul_(-2)),
    "a write by numpy": write(lambda parameters: parameters[1].detach().numpy().__imul__(-2)),
    "other memory": write(lambda parameters: setattr(parameters[0], "data", -parameters[0].data)),
    "a scaling": lambda model, bank: setattr(model[0].lora_seats["b"], "scaling", 7.0),
    "another adapter": lambda model, bank: bank.__setitem__("b", bank["a"]),
    "one that comes": lambda model, bank: bank.__setitem__("d", bank["a"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen(change):
    model, bank, x = served()
    before = answer(model, bank, x)
    change(model, bank)
    assert_right(model, bank, x)
    assert torch.equal(answer(model, bank, x)[[0, 2, 3]], before[[0, 2, 3]])


def test_an_adapter_that_was_taken_out_and_came_back_otherwise_is_the_new_one():
    model, bank, x = served()
    new = copy.deepcopy(bank["b"])
    for tensor in new.tensors.values():
        tensor.data.mul_(-2)
    del bank["b"]
    bank["b"] = new
    for _ in range(3):
        assert_right(model, bank, x)


def test_nothing_of_an_adapter_that_was_taken_out_stays_in_memory():
    model, bank, x = served()
    gone = [weakref.ref(parameter) for parameter in bank.parameters("b")]
    assert stacked(model, bank, x) == 0
    del bank["b"]
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_training_keeps_nothing():
    model, bank, x = served()
    model.train()
    assert [stacked(model, bank, x) for _ in range(3)] == [2, 2, 2]
    model.eval()
    assert [stacked(model, bank, x) for _ in range(3)] == [2, 2, 0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_begin_without_it(copied):
    model, bank, x = served()
    twin = copied(model)
    its = lora.bank(twin)
    with torch.no_grad():
        its.parameters("a")[1].mul_(3)
    assert_right(twin, its, x)
    assert_right(model, bank, x)


def test_a_model_that_is_cast_keeps_nothing_of_the_old_dtype():
    model, bank, x = served()
    model.float()
    x = x.float()
    assert [stacked(model, bank, x) for _ in range(3)] == [2, 2, 0]
    assert answer(model, bank, x).dtype == torch.float32


@pytest.mark.parametrize("rank", [{"a": 2, "b": 2, "c": 2}, {"a": 1, "b": 2, "c": 2}], ids=["one rank", "two"])
def test_what_was_kept_in_inference_mode_serves_without_gradients_and_lets_the_model_train(rank):
    configs = {name: {**config, "r": rank[name]} for name, config in CONFIGS.items()}
    model, bank, x = served(configs, forwards=0)
    with torch.inference_mode():
        for _ in range(3):
            answer(model, bank, x)
    assert stacked(model, bank, x) == 0
    with bank.rows(ROWS):
        model(x).sum().backward()
    assert_right(model, bank, x)


def test_threads_with_rows_of_their_own_get_their_own_answers():
    model, bank, x = served()
    orders = [ROWS, ["b", "a", None, "c"], ["c", "b", "a", "a"]]
    expected = [answer(model, bank, x, rows) for rows in orders]
    wrong = []

    def ask(rows, right):
        for _ in range(60):
            if not torch.allclose(answer(model, bank, x, rows), right):
                wrong.append(rows)

    threads = [threading.Thread(target=ask, args=pair) for pair in zip(orders, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
