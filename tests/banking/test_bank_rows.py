"""Which rows are whose: by row, by token, of flattened batches; in nested blocks, threads and tasks; checkpointed."""

import asyncio
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from banks import Net, alone, assert_close, banked
from expert_models import EXPERTS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import checkpoint

import lora
from lora.banking.divided import Divided

CONFIGS: dict[str, dict[str, Any]] = {"a": {}, "b": {"r": 3, "lora_alpha": 5}, "c": {"use_dora": True}}


def linear() -> tuple[nn.Module, nn.Module, lora.AdapterBank]:
    torch.manual_seed(0)
    base = Net(nn.Linear(5, 6).double()).requires_grad_(False)
    return base, *banked(base, CONFIGS)


def token_by_token(base: nn.Module, bank: lora.AdapterBank, x: Tensor, names: list[str | None]) -> Tensor:
    """What each token's adapter makes of it, alone: x (tokens, …)."""
    models = {name: alone(base, bank, name) for name in dict.fromkeys(names)}
    return torch.cat([models[name](x[n : n + 1]) for n, name in enumerate(names)])


# ---- by token --------------------------------------------------------------------------------------------------------

TOKENS: list[list[str | None]] = [["a", "b", None, "a"], ["c", "c", "c", None], [None, "b", "b", "a"]]
FLAT = [name for row in TOKENS for name in row]


@pytest.mark.parametrize("kind", ["linear", "embedding", "own forward"])
def test_each_token_has_an_adapter(kind: str) -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 3

    torch.manual_seed(0)
    layer = {"linear": nn.Linear, "embedding": nn.Embedding, "own forward": Scaled}[kind](11, 6).double()
    base = Net(layer).requires_grad_(False)
    model, bank = banked(base, CONFIGS)
    x = torch.randn(3, 4, 11, dtype=torch.float64) if kind == "linear" else torch.randint(11, (3, 4))
    expected = token_by_token(base, bank, x.flatten(0, 1), FLAT)
    numbers = [[-1 if name is None else [*bank].index(name) for name in row] for row in TOKENS]
    for names in (TOKENS, numbers, torch.tensor(numbers)):
        with bank.rows(names, per="token"):
            assert_close(model(x), expected.view(3, 4, 6), 1e-12)
            assert_close(model(x.flatten(0, 1)), expected, 1e-12)  # as mixtures of experts flatten them
    with bank.rows(FLAT, per="token"):  # packed: one row, or none
        assert_close(model(x.flatten(0, 1)), expected, 1e-12)
        assert_close(model(x.flatten(0, 1)[None]), expected[None], 1e-12)


def test_gradients_of_packed_sequences_are_those_of_each_alone() -> None:
    base, model, bank = linear()
    x = torch.randn(1, 12, 5, dtype=torch.float64)
    names = ["a"] * 5 + ["c"] * 4 + ["a"] * 3
    with bank.rows([names], per="token"):
        (model(x) ** 2).sum().backward()
    for name in ("a", "c"):
        its = alone(base, bank, name)
        (its(x[0, [n for n, other in enumerate(names) if other == name]]) ** 2).sum().backward()
        for key, parameter in its.named_parameters():
            if "lora_" in key:
                assert_close(model.get_parameter(f"{key}_{name}").grad, parameter.grad, 1e-12)
    assert all(parameter.grad is None for parameter in bank.parameters("b"))


@pytest.mark.parametrize(
    ("names", "how", "shape", "said"),
    [
        (
            ["a", "b"],
            {},
            (3, 4, 5),
            "x: the input of this layer has 3 × 4 rows, and the bank was given adapters for 2 ",
        ),
        (["a", "b"], {}, (8, 5), "has 8 rows, and the bank was given adapters for 2 rows. Where a model flattens"),
        (["a", "b"], {}, (1, 2, 5), "has 1 × 2 rows, and the bank was given adapters for 2 rows."),
        (["a", "b"], {"flattened": True}, (3, 5), "has 3 rows, and the bank was given adapters for 2 rows."),
        (["a", "b"], {}, (5,), "has no rows, and the bank was given adapters for 2 rows."),
        (TOKENS, {"per": "token"}, (4, 3, 5), "has 4 × 3 rows, and the bank was given adapters for 3 × 4 tokens."),
        (FLAT, {"per": "token"}, (3, 4, 5), "has 3 × 4 rows, and the bank was given adapters for 12 tokens."),
    ],
)
def test_a_layer_that_cannot_know_says_so(names: Any, how: dict[str, Any], shape: tuple[int, ...], said: str) -> None:
    _, model, bank = linear()
    with bank.rows(names, **how), pytest.raises(ValueError, match=re.escape(said)) as raised:
        model(torch.zeros(shape, dtype=torch.float64))
    assert str(raised.value).endswith(
        "Where a model flattens its tokens or packs sequences, say the adapter of each token, with `bank.rows(names, "
        'per="token")`, or that they stand row by row, with `bank.rows(names, flattened=True)`; `bank.use(name)` is '
        "for one adapter in all rows."
    )


@pytest.mark.parametrize(
    ("names", "how", "said"),
    [
        ([["a"], ["b", "c"]], {"per": "token"}, "the lists must be of one length, got (1,), (2,)."),
        (
            torch.empty(2, device="meta"),
            {},
            "`names` must have values that can be read, and those of this Tensor cannot be: it is on the meta",
        ),
        ([["a"]], {}, "`names` must be a list with an entry for each row, got one of the shape (1, 1)."),
        ([], {}, "`names` must be a list with an entry for each row, got one of the shape (0,)."),
        ("a", {}, "`names` must be a list with an entry for each row, got one of the shape ()."),
        ("a", {"per": "token"}, "`names` must be a list of lists, or one of all tokens, got one of the shape ()."),
        (["a"], {"per": "batch"}, "`per` must be 'row' or 'token', got 'batch'."),
        (["a", "d", 3, -2, True], {}, "there is no adapter 'd'"),
        ([{}, "a", ["b"]], {}, "the lists must be of one length, got (), (1,)."),
        ([{}, "a"], {}, "there is no adapter {}"),
        (["a"], {"per": "token", "flattened": True}, "`flattened` is for rows, and `per` is 'token'"),
    ],
)
def test_rows_that_cannot_be_are_refused(names: Any, how: dict[str, Any], said: str) -> None:
    _, _, bank = linear()
    with pytest.raises(ValueError, match=re.escape(said)):
        bank.rows(names, **how)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_a_trace_takes_names_and_refuses_a_tensor_that_it_traces(mode: str) -> None:
    base, model, bank = linear()
    x, names = torch.randn(3, 5, dtype=torch.float64), ["c", None, "a"]

    def forward(rows: Any) -> Any:
        def run(tensors: dict[str, Tensor], x: Tensor, numbers: Tensor) -> Tensor:
            with bank.rows(numbers if rows is None else rows):
                return torch.func.functional_call(model, tensors, (x,))

        return make_fx(run, tracing_mode=mode)(dict(model.named_parameters()), x, torch.tensor([2, -1, 0]))

    traced = forward(names)
    y = traced(dict(model.named_parameters()), x, torch.tensor([0, 0, 0]))
    assert_close(y, token_by_token(base, bank, x[:, None], names)[:, 0], 1e-12)
    with pytest.raises(ValueError, match="`names` must have values that can be read, and those of this FakeTensor can"):
        forward(None)
    with FakeTensorMode(shape_env=ShapeEnv()):
        for dtype in (torch.int32, torch.float32, torch.bool):
            with pytest.raises(ValueError, match="those of this FakeTensor cannot be"):
                bank.rows(torch.zeros(3, dtype=dtype))


def test_numbers_may_be_numpys() -> None:
    _, model, bank = linear()
    x = torch.randn(3, 5, dtype=torch.float64)
    with bank.rows([2, -1, 0]):
        expected = model(x)
    for numbers in (np.array([2, -1, 0]), [np.int64(2), np.int32(-1), 0], torch.tensor([2, -1, 0])):
        with bank.rows(numbers):
            assert torch.equal(model(x), expected)


def test_flattened_rows_stand_one_after_the_other() -> None:
    base, model, bank = linear()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    names = ["c", None, "a"]
    expected = token_by_token(base, bank, x, names)
    with bank.rows(names, flattened=True):
        assert_close(model(x), expected, 1e-12)
        assert_close(model(x.flatten(0, 1)), expected.flatten(0, 1), 1e-12)
        assert_close(model(x.view(6, 2, 5)), expected.view(6, 2, 6), 1e-12)


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 6), lambda: nn.MultiheadAttention(5, 1, batch_first=True)])
def test_flattened_rows_may_not_stand_in_the_second_dimension(make: Any) -> None:
    torch.manual_seed(0)
    model, bank = banked(Net(make()), {"a": {}, "b": {}})
    x = torch.randn(6, 2, 5)  # (length, rows, features), perhaps
    inputs = (x,) if isinstance(model.x, nn.Linear) else (x, x, x)
    said = (
        r"of the 6 × 2 rows of this layer's input, those of `bank.rows\(names, flattened=True\)` may be the 6, or the 2"
    )
    with bank.rows(["a", "b"], flattened=True), pytest.raises(ValueError, match=said):
        model(*inputs)
    with bank.rows(["a", "a"], flattened=True):
        model(*inputs)


# ---- experts ---------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A stack of matrices, of which each token meets one; as many tokens as features, and as experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 6, 12))
        self.down_proj = nn.Parameter(torch.randn(4, 12, 6))

    def forward(self, hidden_states: Tensor, index: Tensor) -> Tensor:
        y = torch.zeros_like(hidden_states)
        for e in range(4):
            at = (index[:, 0] == e).nonzero()[:, 0]
            h = torch.relu(hidden_states[at] @ self.gate_up_proj[e].mT.mT)
            y = y.index_add(0, at, h @ self.down_proj[e])
        return y


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:  # (N, L, 6)
        flat = x.flatten(0, 1)
        index = flat[:, :1].sigmoid().mul(4).long()  # (N·L, 1)
        return self.experts(flat, index).view(x.shape)


def mixture() -> tuple[nn.Module, nn.Module, lora.AdapterBank]:
    torch.manual_seed(0)
    base = Mixture().double().requires_grad_(False)
    configs = {name: {**config, "target_parameters": EXPERTS} for name, config in CONFIGS.items()}
    return base, *banked(base, configs, [])


FOUR: list[str | None] = ["b", "a", None, "a"]


def each_row(base: nn.Module, bank: lora.AdapterBank, x: Tensor, names: list[str | None]) -> Tensor:
    return torch.cat([alone(base, bank, name)(x[n : n + 1]) for n, name in enumerate(names)])


def test_experts_find_the_adapters_of_flattened_tokens() -> None:
    base, model, bank = mixture()
    assert isinstance(model.experts, Divided)
    for length in (3, 1):
        x = torch.randn(4, length, 6, dtype=torch.float64)
        expected = each_row(base, bank, x, FOUR)
        with bank.rows(FOUR, flattened=True):
            assert_close(model(x), expected, 1e-12)
        with bank.rows([[name] * length for name in FOUR], per="token"):
            assert_close(model(x), expected, 1e-12)
        with bank.rows([name for name in FOUR for _ in range(length)], per="token"):
            assert_close(model(x), expected, 1e-12)
        with bank.rows(["b"] * 4):  # whose tokens these are does not matter
            assert_close(model(x), each_row(base, bank, x, ["b"] * 4), 1e-12)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    with bank.rows(FOUR), pytest.raises(ValueError, match="has 12 rows, and the bank was given adapters for 4 rows"):
        model(x)


def test_experts_of_as_many_tokens_as_features() -> None:
    base, model, bank = mixture()
    x = torch.randn(2, 3, 6, dtype=torch.float64)  # 6 tokens of 6 features
    with bank.rows(["b", "a"], flattened=True):
        assert_close(model(x), each_row(base, bank, x, ["b", "a"]), 1e-12)


def test_experts_learn_as_alone() -> None:
    base, model, bank = mixture()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    with bank.rows(FOUR, flattened=True):
        (model(x) ** 2).sum().backward()
    for name in ("a", "b"):
        its = alone(base, bank, name)
        (its(x[[n for n, other in enumerate(FOUR) if other == name]]) ** 2).sum().backward()
        for key, parameter in its.named_parameters():
            if "lora_" in key:
                assert_close(model.get_parameter(f"{key}_{name}").grad, parameter.grad, 1e-12)


class EachSeesAll(nn.Module):
    """As Llama 4's: a forward that is given all tokens once for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, hidden_states: Tensor) -> Tensor:  # (4 · tokens, 6)
        return (hidden_states.view(4, -1, 6) @ self.gate_up_proj).view(-1, 6)


def test_tokens_that_come_once_for_each_expert_are_nobodys() -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"experts": EachSeesAll()}).double()
    model, bank = banked(base, {n: {"target_parameters": ["experts.gate_up_proj"]} for n in ("a", "b")}, [])
    x = torch.randn(24, 6, dtype=torch.float64)  # of 2 rows with 3 tokens each
    said = "`hidden_states` may have its tokens once for each expert, and nothing says whose they are"
    with bank.rows(["a", "b"], flattened=True), pytest.raises(RuntimeError, match=said):
        model["experts"](x)
    with bank.rows(["a", "a"], flattened=True):
        assert_close(model["experts"](x), alone(base, bank, "a")["experts"](x), 1e-12)


class Routed(nn.Module):
    """Experts that are modules, each of which gets the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(6, 6)}) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:  # (N, L, 6)
        flat = x.flatten(0, 1)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            at = ((flat[:, 0] > 0) == bool(e)).nonzero()[:, 0]
            y = y.index_add(0, at, expert["w1"](flat[at]))
        return y.view(x.shape)


def test_an_expert_that_is_a_module_is_given_nobody_knows_whose_tokens() -> None:
    torch.manual_seed(0)
    base = Routed().double().requires_grad_(False)
    model, bank = banked(base, {"a": {}, "b": {"target_modules": ["experts.0.w1"]}}, ["experts.0.w1", "experts.1.w1"])
    x = torch.ones(4, 1, 6, dtype=torch.float64)
    x[:2] = -1  # each expert gets 2 tokens, as many as there may be rows
    said = r"experts.0.w1: is of one expert among several, which gets tokens that a router chose: nobody knows whose"
    for how in ({}, {"flattened": True}, {"per": "token"}):
        with bank.rows(["a", "b"], **how), pytest.raises(RuntimeError, match=said):
            model(x)
    with bank.rows(["a"] * 4):  # all have one
        assert_close(model(x), alone(base, bank, "a")(x), 1e-12)
    with bank.rows([None] * 4):
        assert_close(model(x), base(x), 1e-12)


# ---- activation checkpointing ----------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3)])
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.reentrant: bool | None = None

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.x, self.attend):
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def blocks(dropout: float) -> tuple[nn.Module, nn.Module, lora.AdapterBank]:
    torch.manual_seed(0)
    base = Blocks().double().requires_grad_(False)
    configs = {name: {**config, "lora_dropout": dropout} for name, config in CONFIGS.items()}
    return base, *banked(base, configs, [*(f"x.{n}.{m}" for n in range(3) for m in (0, 2)), "attention"])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_those_without(reentrant: bool, dropout: float) -> None:
    _, model, bank = blocks(dropout)
    x = torch.randn(6, 4, 6, dtype=torch.float64)
    names = ["a", "b", None, "c", "a", "b"]
    found = []
    for how in (None, reentrant):
        model.reentrant = how
        model.zero_grad()
        given = x.clone().requires_grad_()
        for name in bank:
            bank.seed(name, 3)
        with bank.rows(names):
            y = model(given)
            (y**2).sum().backward()
        found.append([y, given.grad, *(p.grad for name in bank for p in bank.parameters(name))])
    for one, other in zip(*found, strict=True):
        assert_close(other, one, 1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_outside_of_the_block_says_what_is_missing(reentrant: bool) -> None:
    _, model, bank = blocks(0.0)
    model.reentrant = reentrant
    with bank.rows(["a", "b"]):
        loss = model(torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)).sum()
    with pytest.raises(
        RuntimeError, match="A backward through checkpointed layers computes them again, and belongs in"
    ):
        loss.backward()


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_the_innermost_block_holds_and_the_one_around_it_after_that() -> None:
    base, model, bank = linear()
    x = torch.randn(2, 5, dtype=torch.float64)
    y = {name: alone(base, bank, name)(x) for name in (*bank, None)}
    with bank.use("a"):
        assert_close(model(x), y["a"], 1e-12)
        with bank.rows(["b", None]):
            assert_close(model(x), torch.stack([y["b"][0], y[None][1]]), 1e-12)
            with bank.use(None):
                assert_close(model(x), y[None], 1e-12)
            assert_close(model(x), torch.stack([y["b"][0], y[None][1]]), 1e-12)
        with pytest.raises(KeyError, match="left by an error"), bank.use("c"):
            raise KeyError("left by an error")
        assert_close(model(x), y["a"], 1e-12)
        with lora.disabled(model):
            assert_close(model(x), y[None], 1e-12)
    with pytest.raises(RuntimeError, match=r"no adapter is chosen: this model has a bank of them \(a, b, c\)"):
        model(x)


def test_a_block_is_entered_once_at_a_time() -> None:
    base, model, bank = linear()
    x = torch.randn(2, 5, dtype=torch.float64)
    block = bank.rows(["a", "b"])
    for _ in range(2):  # one after the other
        with block:
            expected = model(x)
    with block:
        with pytest.raises(RuntimeError, match="this block of a bank was entered already"):
            block.__enter__()
        assert_close(model(x), expected, 0)
    assert_close(expected, each_row(base, bank, x, ["a", "b"]), 1e-12)


def test_banks_of_two_models_are_chosen_apart() -> None:
    base, one, its = linear()
    _, other, others = linear()
    x = torch.randn(2, 5, dtype=torch.float64)
    with its.use("a"), others.rows(["b", "c"]):
        assert_close(one(x), alone(base, its, "a")(x), 1e-12)
        assert_close(other(x), each_row(base, others, x, ["b", "c"]), 1e-12)


def test_threads_choose_for_themselves() -> None:
    base, model, bank = linear()
    x = torch.randn(2, 5, dtype=torch.float64)
    barrier, found, failed = threading.Barrier(3), {}, []

    def compute(name: str) -> None:
        with bank.use(name):
            barrier.wait()
            found[name] = [model(x) for _ in range(20)]

    def without() -> None:
        barrier.wait()
        try:
            model(x)
        except RuntimeError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=compute, args=(name,)) for name in ("a", "b")]
    threads.append(threading.Thread(target=without))
    with bank.use("c"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name in ("a", "b"):
        assert len(found[name]) == 20
        for y in found[name]:
            assert_close(y, alone(base, bank, name)(x), 1e-12)
    assert len(failed) == 1  # a new thread has no block


def test_tasks_choose_for_themselves() -> None:
    base, model, bank = linear()
    x = torch.randn(2, 5, dtype=torch.float64)

    async def compute(names: list[str | None]) -> list[Tensor]:
        found = []
        with bank.rows(names):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(model(x))
        return found

    async def both() -> list[list[Tensor]]:
        return await asyncio.gather(compute(["a", "b"]), compute(["c", None]))

    for names, found in zip((["a", "b"], ["c", None]), asyncio.run(both()), strict=True):
        for y in found:
            assert_close(y, each_row(base, bank, x, names), 1e-12)


def test_a_generators_block_holds_where_it_is_consumed_until_it_ends() -> None:
    base, model, bank = linear()
    x = torch.randn(2, 5, dtype=torch.float64)

    def steps() -> Iterator[Tensor]:
        with bank.use("a"):
            for _ in range(3):
                yield model(x)

    generator = steps()
    first = next(generator)
    assert_close(first, alone(base, bank, "a")(x), 1e-12)
    generator.close()
    with pytest.raises(RuntimeError, match="no adapter is chosen"):
        model(x)


def test_names_come_in_arrays_and_truths_are_no_numbers() -> None:
    base, model, bank = linear()
    weight = next(base.parameters())
    x = torch.randn(3, weight.shape[1], dtype=weight.dtype)
    with bank.rows(["a", "b", "a"]):
        expected = model(x)
    for names in (np.array(["a", "b", "a"]), np.array([0, 1, 0]), torch.tensor([0, 1, 0])):
        with bank.rows(names):
            assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="there is no adapter True"):
        bank.rows([1, True, 0])
