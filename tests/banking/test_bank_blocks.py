"""Which block holds: for forwards that backward computes again, and for adapters that were taken out."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from banks import alone, banked
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lora


def tower() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double().requires_grad_(False)


def made() -> tuple[nn.Module, nn.Module, lora.Bank]:
    """A model, and one with two adapters of the same shapes: nothing else tells one's forward from the other's."""
    base = tower()
    return base, *banked(base, {"a": {"r": 2}, "b": {"r": 2}}, ["0", "2"])


def inputs(seed: int) -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def in_another_thread(run: Callable[[], object]) -> list[BaseException]:
    """What a function raises in a thread, whose context is its own."""
    raised: list[BaseException] = []

    def caught() -> None:
        try:
            run()
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join()
    return raised


BLOCKS: dict[str, Callable[[lora.Bank], tuple[Any, Any]]] = {
    "use": lambda bank: (bank.use("a"), bank.use("b")),
    "rows": lambda bank: (bank.rows(["a", "b", None, "b"]), bank.rows(["b", "a", None, "b"])),
    "rows and use": lambda bank: (bank.rows(["a", "b", "a", "b"]), bank.use("b")),
    "base": lambda bank: (bank.use("a"), bank.use(None)),
}
# Of torch, for checkpoints in checkpoints, whose forward is without a graph.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
AGAIN = "backward computes checkpointed layers of a bank again, and their forward was in another block"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_backward_for_two_blocks_is_refused(blocks: str, reentrant: bool) -> None:
    _, model, bank = made()
    first, second = BLOCKS[blocks](bank)
    with first:
        loss = checkpoint(model, inputs(1), use_reentrant=reentrant).square().sum()
    with second:
        loss = loss + checkpoint(model, inputs(2), use_reentrant=reentrant).square().sum()
        with pytest.raises(RuntimeError, match=AGAIN):
            loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_block_around_another_is_another(reentrant: bool) -> None:
    _, model, bank = made()
    with bank.use("a"):
        with bank.use("b"):
            within = checkpoint(model, inputs(1), use_reentrant=reentrant).sum()
        around = checkpoint(model, inputs(1), use_reentrant=reentrant).sum()
        around.backward()
        with pytest.raises(RuntimeError, match=AGAIN):
            within.backward()


def in_two_blocks(bank: lora.Bank, run: Callable[[], Tensor]) -> None:
    with bank.use("a"):
        loss = run()
    with bank.use("a"):
        loss.backward()


def after_another(bank: lora.Bank, run: Callable[[], Tensor]) -> None:
    with bank.use("a"):
        loss = run()
        with bank.use("b"):
            run()
        loss.backward()


def twice(bank: lora.Bank, run: Callable[[], Tensor]) -> None:
    with bank.use("a"):
        loss = run() / 2
        loss.backward(retain_graph=True)
        loss.backward()


def in_a_thread(bank: lora.Bank, run: Callable[[], Tensor]) -> None:
    """Autograd numbers from 0 in each thread: what one records here has numbers of the other's block of b."""

    def outer() -> None:
        with bank.use("b"):
            for _ in range(100):
                torch.ones(1, requires_grad=True) * 2
        with bank.use("a"):
            context = contextvars.copy_context()
            raised.extend(in_another_thread(lambda: context.run(lambda: run().backward())))

    raised: list[BaseException] = []
    raised.extend(in_another_thread(outer))
    assert not raised


RIGHT = [in_two_blocks, after_another, twice, in_a_thread]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", RIGHT)
def test_what_is_computed_again_as_it_was_is_right(way: Callable[..., None], reentrant: bool) -> None:
    base, model, bank = made()
    x, again = inputs(1), inputs(1)
    way(bank, lambda: checkpoint(model, x, use_reentrant=reentrant).square().sum())
    plain = alone(base, bank, "a")
    plain(again).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_that_checkpointed_layers_enter_themselves(reentrant: bool) -> None:
    """It is entered again when they are computed again; not so for what is checkpointed in it once more."""
    base, model, bank = made()

    def run(x: Tensor, nested: bool) -> Tensor:
        with bank.use("b"):
            return checkpoint(model, x, use_reentrant=reentrant) if nested else model(x)

    x, again = inputs(1), inputs(1)
    with bank.use("a"):
        checkpoint(run, x, False, use_reentrant=reentrant).sum().backward()
    alone(base, bank, "b")(again).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-12, atol=1e-12)
    with bank.use("a"):
        y = checkpoint(run, x, True, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match=AGAIN):
            y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_in_checkpoints(reentrant: bool) -> None:
    base, model, bank = made()

    def run(x: Tensor) -> Tensor:
        return checkpoint(model[2], checkpoint(model[0], x, use_reentrant=reentrant), use_reentrant=reentrant)

    x, again = inputs(1), inputs(1)
    with bank.use("a"):
        checkpoint(run, x, use_reentrant=reentrant).square().sum().backward()
    plain = alone(base, bank, "a")
    plain[2](plain[0](again)).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-12, atol=1e-12)


# ---- adapters that were taken out ------------------------------------------------------------------------------------

CHOSEN: dict[str, Callable[[lora.Bank], Any]] = {
    "use": lambda bank: bank.use("b"),
    "rows": lambda bank: bank.rows(["a", "b", "a", None]),
}


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("how", CHOSEN)
def test_rows_of_an_adapter_that_was_taken_out_do_not_become_the_bases(how: str, within: bool) -> None:
    base, model, bank = made()
    x = inputs(1)
    block = CHOSEN[how](bank)
    if not within:
        del bank["b"]
    with block:
        if within:
            del bank["b"]
        with pytest.raises(RuntimeError, match="has rows of 'b', and the bank no longer has"):
            model(x)
        bank["b"] = lora.LoraConfig(target_modules=["0"], r=3, init_lora_weights=False)
        y = model(x)
    torch.testing.assert_close(y[1], alone(base, bank, "b")(x)[1], rtol=1e-12, atol=1e-12)


def test_a_block_goes_on_when_others_come_and_go() -> None:
    base, model, bank = made()
    x = inputs(1)
    with bank.rows(["a", None, "a", "a"]):
        del bank["b"]
        bank["c"] = lora.LoraConfig(target_modules=["0"], r=3, init_lora_weights=False)
        y = model(x)
    torch.testing.assert_close(y[[0, 2, 3]], alone(base, bank, "a")(x)[[0, 2, 3]], rtol=1e-12, atol=1e-12)


# ---- compiled models, which know no callers --------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["compiled", "blocks"])
def test_a_compiled_model_has_blocks_of_one_caller_at_a_time(first: str) -> None:
    torch._dynamo.reset()
    base, model, bank = made()
    compiled = torch.compile(model, backend="eager")
    x = inputs(1)
    said = "a block of this bank is open in another thread or task"

    def other() -> None:
        with bank.use("b"):
            compiled(x)

    with bank.use("a"):
        if first == "compiled":
            compiled(x)
        assert [said in str(error) for error in in_another_thread(other)] == [True]
        y = compiled(x)
    torch.testing.assert_close(y, alone(base, bank, "a")(x), rtol=1e-12, atol=1e-12)
    assert not in_another_thread(other)  # after it


@pytest.mark.parametrize("room", [{}, {"room": 2, "max_r": 2}])
def test_a_compiled_model_has_no_rows_of_an_adapter_that_was_taken_out(room: dict[str, int]) -> None:
    torch._dynamo.reset()
    model = tower()
    config = lora.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False)
    bank = lora.bank(model, {"a": config, "b": config}, **room)
    compiled = torch.compile(model, backend="eager")
    x = inputs(1)
    with bank.use("b"):
        compiled(x)
        del bank["b"]
        with pytest.raises(Exception, match="has rows of 'b', and the bank no longer has"):
            compiled(x)
