"""Modules that compute with one adapter at a time: in a mixed batch they are divided, and each row is as alone."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from banks import ROWS, Net, alone, assert_close, assert_each_as_alone, banked
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import lora
from lora.banking.divided import Divided
from lora.models.readers import WeightReader

CONFIGS: dict[str, dict[str, Any]] = {"a": {}, "b": {"r": 3, "lora_alpha": 5}, "c": {"use_dora": True}}


class Attention(nn.Module):
    """torch's attention with every argument, of which some have rows elsewhere than in their first dimension."""

    def __init__(self, batch_first: bool, masks: str = "") -> None:
        super().__init__()
        self.x = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:  # (N, L, 6)
        L = x.shape[1]
        padded = x[..., 0] > 1  # (N, L)
        padded[:, 0] = False
        masks: dict[str, Any] = {}
        if "padding" in self.masks:
            masks["key_padding_mask"] = torch.zeros_like(x[..., 0]).masked_fill(padded, -3.0)
        if "heads" in self.masks:
            masks["attn_mask"] = (x[:, :, None, 1] * x[:, None, :, 2]).repeat_interleave(2, 0)  # (2 N, L, L)
        if "causal" in self.masks:
            masks["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(L, dtype=x.dtype)  # (L, L)
        first = self.x.batch_first
        q = x if first else x.transpose(0, 1)
        y, weights = self.x(q, q * 2, value=q + 1, **masks)
        y = y if first else y.transpose(0, 1)
        return torch.cat([y, weights], -1)


class Recurrent(nn.Module):
    """torch's recurrent layers, with states that go in, and come out."""

    def __init__(self, cls: Any, states: bool, **settings: Any) -> None:
        super().__init__()
        self.x = cls(6, 5, num_layers=2, **settings)
        self.states = states

    def forward(self, x: Tensor) -> Tensor:  # (N, L, 6)
        h = x[:, :2, :5].transpose(0, 1).contiguous()  # (2, N, 5)
        c = h[..., : self.x.hidden_size] * 2
        h = h[..., : self.x.proj_size or 5].contiguous()
        hx = ((h, c) if isinstance(self.x, nn.LSTM) else h) if self.states else None
        y, last = self.x(x if self.x.batch_first else x.transpose(0, 1), hx)
        y = y if self.x.batch_first else y.transpose(0, 1)
        last = torch.cat(last, -1) if isinstance(last, tuple) else last
        return torch.cat([y.flatten(1), last.transpose(0, 1).flatten(1)], 1)


class Cells(nn.Module):
    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.x = cls(6, 5)

    def forward(self, x: Tensor) -> Tensor:  # (N, L, 6)
        state = None
        for step in x.unbind(1):
            state = self.x(step, state)
        return torch.cat(state, -1) if isinstance(state, tuple) else state


class Fused(nn.Module):
    """A weight is read, and another layer is called, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(6, 6)
        self.x2 = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.x2(torch.tanh(F.linear(x, self.x.weight, self.x.bias)))


class ByMethod(nn.Module):
    """Another method reads, and somebody else calls it."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Linear(6, 6)

        def project(self, x: Tensor, scale: float, *, shift: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return F.linear(x, self.x.weight) * scale, {"shift": shift[:, None] * 2}

        def forward(self, x: Tensor) -> Tensor:
            return self.project(x, 1.0, shift=x[:, 0])[0]

    def __init__(self) -> None:
        super().__init__()
        self.head = self.Head()

    def forward(self, x: Tensor) -> Tensor:
        y, others = self.head.project(x, 2.0, shift=x[:, 0])
        return y + others["shift"] + self.head(x)


class Twice(nn.Linear):
    """A forward of its own, with further arguments."""

    def forward(self, input: Tensor, scale: Tensor | None = None, *, power: int = 1) -> Tensor:
        y = super().forward(input) ** power
        return y if scale is None else y * scale[:, None]


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = Twice(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.x(x, x.mean((1, 2), keepdim=False)[:, None], power=2) + self.x(x)


def encoder(**settings: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True, **settings)


MODULES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "attention": (lambda: Attention(True), ["x"]),
    "attention, padded": (lambda: Attention(True, "padding heads"), ["x"]),
    "attention, (L, N, E)": (lambda: Attention(False, "padding heads"), ["x"]),
    "attention, causal": (lambda: Attention(False, "causal"), ["x"]),
    "attention's output": (lambda: Attention(False), ["x.out_proj"]),
    "LSTM": (lambda: Recurrent(nn.LSTM, True), ["x"]),
    "LSTM, projected": (lambda: Recurrent(nn.LSTM, True, proj_size=3, batch_first=True), ["x"]),
    "GRU": (lambda: Recurrent(nn.GRU, True, batch_first=True), ["x"]),
    "RNN": (lambda: Recurrent(nn.RNN, False), ["x"]),
    "LSTM cell": (lambda: Cells(nn.LSTMCell), ["x"]),
    "GRU cell": (lambda: Cells(nn.GRUCell), ["x"]),
    "RNN cell": (lambda: Cells(nn.RNNCell), ["x"]),
    "read": (Fused, ["x", "x2"]),
    "by a method": (ByMethod, ["head.x"]),
    "forward of its own": (Scales, ["x"]),
    "encoder layer": (lambda: Net(encoder()), ["self_attn", "linear1"]),
    "encoder": (lambda: Net(nn.TransformerEncoder(encoder(), 2)), ["self_attn", "linear1", "linear2"]),
}


def moved(module: str, configs: dict[str, dict[str, Any]] = CONFIGS) -> tuple[nn.Module, nn.Module, lora.Bank]:
    torch.manual_seed(0)
    make, targets = MODULES[module]
    base = make().double().requires_grad_(False)
    return base, *banked(base, configs, targets)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("module", MODULES)
def test_each_row_and_adapter_is_as_alone(module: str) -> None:
    base, model, bank = moved(module)
    x = torch.randn(8, 5, 6, dtype=torch.float64)
    assert_each_as_alone(base, model, bank, x)
    assert_each_as_alone(base, model, bank, x, ["b", "b", None, None, None, None, None, None])
    assert_each_as_alone(base, model, bank, x, ["c"] * 8)
    for each in (base, model):
        each.eval()
    assert_each_as_alone(base, model, bank, x)


# ---- what stays as it is ---------------------------------------------------------------------------------------------

PARTS = ["attention", "LSTM", "LSTM cell", "read", "encoder"]
X = torch.randn(8, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def outputs(model: nn.Module, bank: lora.Bank) -> dict[str, Tensor]:
    """Of each adapter in all rows, of the base, and of a mixed batch."""
    found = {}
    with torch.no_grad():
        for name in (*bank, None):
            with bank.use(name):
                found[str(name)] = model(X)
        with bank.rows([name if name in bank else None for name in ROWS]):
            found["mixed"] = model(X)
    return found


def assert_outputs(model: nn.Module, bank: lora.Bank, expected: dict[str, Tensor]) -> None:
    found = outputs(model, bank)
    for name in found:
        assert_close(found[name], expected[name], 1e-10)


def by_models(base: nn.Module, bank: lora.Bank) -> dict[str, Tensor]:
    """What `outputs` must be, by models with one adapter."""
    with torch.no_grad():
        found = {str(name): alone(base, bank, name)(X) for name in (*bank, None)}
    rows = [str(name) if name in bank else "None" for name in ROWS]
    return found | {"mixed": torch.stack([found[name][row] for row, name in enumerate(rows)])}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("module", PARTS)
def test_adapters_come_go_are_replaced_and_kept(module: str, tmp_path: Path) -> None:
    base, model, bank = moved(module)
    assert_outputs(model, bank, by_models(base, bank))
    targets = MODULES[module][1]
    kept = bank.parameters("a")
    bank["d"] = lora.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    assert_outputs(model, bank, by_models(base, bank))
    bank["b"] = lora.LoraConfig(target_modules=targets, r=5, init_lora_weights=False)
    del bank["c"]
    assert_outputs(model, bank, by_models(base, bank))
    bank.save("b", tmp_path / "b")
    other = copy.deepcopy(base)
    lora.load_adapter(other, tmp_path / "b")
    assert_close(other(X), by_models(base, bank)["b"], 1e-12)
    bank["e"] = tmp_path / "b"
    bank.load("e", tmp_path / "b")
    assert_outputs(model, bank, by_models(base, bank))
    assert [*map(id, kept)] == [*map(id, bank.parameters("a"))]
    expected = by_models(base, bank)["a"]
    bank.keep("a")
    assert len(bank) == 0
    assert not any(isinstance(one, Divided) for one in model.modules())
    assert_close(model(X), expected, 1e-12)
    assert {id(p) for n, p in model.named_parameters() if "lora_" in n} == {*map(id, kept)}
    lora.save_adapter(model, tmp_path / "a")
    lora.eject(model)
    assert [*map(type, model.modules())] == [*map(type, base.modules())]
    assert_close(model(X), base(X), 0)


@pytest.mark.parametrize("module", PARTS)
@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_a_bank_of_their_own(module: str, twin: Callable[[nn.Module], nn.Module]) -> None:
    _, model, bank = moved(module)
    before = outputs(model, bank)
    other = twin(model)
    its = lora.bank(other)
    assert [*its] == [*bank]
    assert_outputs(other, its, before)
    with torch.no_grad():
        for parameter in its.parameters("a"):
            parameter.zero_()
    del its["b"]
    assert_outputs(model, bank, before)
    assert_close(outputs(other, its)["a"], before["None"], 1e-10)


@pytest.mark.parametrize("module", PARTS)
def test_a_model_without_adapters_is_plain_again(module: str) -> None:
    base, model, bank = moved(module)
    for name in [*bank]:
        del bank[name]
    assert [*map(type, model.modules())] == [*map(type, base.modules())]
    assert {*dict(model.named_parameters())} == {*dict(base.named_parameters())}
    assert_close(model(X), base(X), 0)


def test_only_what_reads_layers_of_the_bank_is_divided() -> None:
    torch.manual_seed(0)
    base = nn.ModuleList([Fused(), Fused(), nn.Linear(3, 3)]).requires_grad_(False)
    bank = lora.bank(base, {"a": lora.LoraConfig(target_modules=["0.x"], r=2)})
    bank["b"] = lora.LoraConfig(target_modules=["1.x"], r=2)
    assert [isinstance(module, Divided) for module in base] == [True, True, False]
    del bank["a"]
    assert [isinstance(module, (Divided, WeightReader)) for module in base] == [False, True, False]


def test_what_is_refused_leaves_what_reads_as_it_was() -> None:
    _, model, bank = moved("attention")
    before, classes = outputs(model, bank), [*map(type, model.modules())]
    with pytest.raises(ValueError, match="bank: nothing was changed"):
        bank["d"] = lora.LoraConfig(target_modules=["nowhere"], r=2)
    assert [*map(type, model.modules())] == classes
    assert_outputs(model, bank, before)


@pytest.mark.parametrize("module", ["attention", "LSTM cell", "forward of its own"])
def test_disabled_and_in_inference_mode(module: str) -> None:
    base, model, bank = moved(module)
    before = outputs(model, bank)["mixed"]
    with lora.disabled(model), bank.rows(ROWS):
        assert_close(model(X), base(X), 1e-12)
    with torch.inference_mode(), bank.rows(ROWS):
        assert_close(model(X).clone(), before, 1e-12)
    with torch.inference_mode(), bank.rows(ROWS):
        assert_close(model(X.clone()).clone(), before, 1e-12)
    assert_each_as_alone(base, model, bank, X)


# ---- randomness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["attention's output", "read", "encoder layer"])
def test_dropout_of_one_does_not_depend_on_the_others(module: str) -> None:
    configs = {name: {"lora_dropout": 0.5} for name in CONFIGS}
    _, model, bank = moved(module, configs)
    found = []
    for rows in (ROWS, ["b", "a", "a", None, None, "a", None, "b"], [None, "a", "a", None, None, "a", None, None]):
        for name in bank:
            bank.seed(name, 5)
        with bank.rows(rows):
            found.append([model(X)[[1, 2, 5]] for _ in range(2)])
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            assert_close(one, another, 1e-12)
    assert not torch.equal(*found[0])


def test_what_overflows_in_one_stays_there() -> None:
    for module in ("attention", "LSTM", "read"):
        _, model, bank = moved(module)
        rest = [row for row, name in enumerate(ROWS) if name != "a"]
        with bank.rows(ROWS):
            before = model(X)
        with torch.no_grad():
            bank.parameters("a")[0].fill_(float("nan"))
        with bank.rows(ROWS):
            y = model(X)
            y.sum().backward()
        assert torch.equal(y[rest], before[rest])
        assert y[1].isnan().any()
        for name in ("b", "c"):
            assert all(parameter.grad.isfinite().all() for parameter in bank.parameters(name))


# ---- what cannot be divided ------------------------------------------------------------------------------------------


class Given(nn.Module):
    """It computes with a weight, and with whatever else it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(6, 6)

    def forward(self, x: Tensor, *others: Any, back: Any = None) -> Any:
        y = F.linear(x, self.x.weight)
        return y if back is None else back(y)


class Cache:
    pass


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((torch.zeros(4, 4, 6), torch.zeros(4, 4)), "`argument 1` of shape (4, 4) may have a row of the batch"),
        ((torch.zeros(4, 5, 6), Cache()), "`argument 1` is a Cache, of which nobody knows the rows"),
        ((torch.zeros(4, 5, 6), {"of": [Cache()]}), "`argument 1['of']` is a Cache, of which nobody knows the rows"),
        ((pack_sequence([torch.zeros(2, 6)] * 4),), "it is given a packed sequence, whose rows are not in order"),
        ((torch.tensor(1.0),), "its input of shape () has no batch"),
        ((1,), "it is given no tensor"),
    ],
)
def test_what_cannot_be_divided_is_said(given: tuple[Any, ...], said: str) -> None:
    model = Net(Given())
    bank = lora.bank(model, {name: lora.LoraConfig(target_modules=["x.x"], r=2) for name in ("a", "b")})
    with bank.rows(["a", "b", None, "a"]), pytest.raises(RuntimeError) as raised:
        model(*given)
    assert str(raised.value).startswith("a Given around x.x: computes with one adapter at a time, and its arguments")
    assert said in str(raised.value)
    assert str(raised.value).endswith("Use `bank.use(name)` here, with a batch for each adapter.")
    with bank.rows(["a"] * 4), pytest.raises((RuntimeError, TypeError, AttributeError)) as raised:  # its own words
        model("no tensor")


@pytest.mark.parametrize(
    ("back", "said"),
    [
        (lambda y: y.sum(), "of 2, 1, 1 rows, its outputs have the shapes (), (), ()"),
        (lambda y: y.transpose(0, 1), "of 2, 1, 1 rows, its outputs have the shapes (5, 2, 6), (5, 1, 6), (5, 1, 6)"),
        (lambda y: (y, Cache()), "it gives a Cache, of which nobody knows the rows"),
        (lambda y: y if len(y) > 1 else [y], "it gives a Tensor and a list"),
        (lambda y: (y, len(y)), "it gives an int, of which nobody knows the rows"),
    ],
)
def test_outputs_that_cannot_be_put_together_are_said(back: Callable[[Tensor], Any], said: str) -> None:
    model = Net(Given())
    bank = lora.bank(model, {name: lora.LoraConfig(target_modules=["x.x"], r=2) for name in ("a", "b")})
    with bank.rows(["a", "b", None, "a"]), pytest.raises(RuntimeError) as raised:
        model(torch.zeros(4, 5, 6), back=back)
    assert said in str(raised.value)


def test_outputs_of_every_form_are_put_together() -> None:
    model = Net(Given())
    bank = lora.bank(model, {name: lora.LoraConfig(target_modules=["x.x"], r=2) for name in ("a", "b")})
    x, whole = torch.randn(4, 5, 6), torch.ones(3)
    with torch.no_grad(), bank.rows(["a", "b", None, "a"]):
        plain = model(x)
        y, (none, same, number), named = model(x, back=lambda y: (y, [None, whole, 3], {"y": y * 2}))
    assert torch.equal(y, plain)
    assert none is None
    assert same is whole
    assert number == 3
    assert torch.equal(named["y"], plain * 2)


def test_unbatched_inputs_and_other_counts_are_refused() -> None:
    _, model, bank = moved("attention")
    x = torch.randn(5, 6, dtype=torch.float64)
    with (
        bank.rows(["a", "b", None, "a", "a"]),
        pytest.raises(RuntimeError, match=r"its input of shape \(5, 6\) has no"),
    ):
        model.x(x, x, x)
    with bank.rows(["a", "b"]), pytest.raises(ValueError, match="the input of this layer has 8 × 5 rows, and the"):
        model(X)


def test_rows_of_adapters_that_are_elsewhere_are_computed_at_once() -> None:
    base = nn.Sequential(Fused(), nn.Linear(6, 6))
    bank = lora.bank(base)
    bank["a"] = lora.LoraConfig(target_modules=["0.x"], r=2)
    bank["b"] = lora.LoraConfig(target_modules=["1"], r=2)
    calls: list[int] = []
    base[0].x2.register_forward_hook(lambda module, args, y: calls.append(len(y)))
    with bank.rows(["b", None, "b"]):
        base(torch.randn(3, 6))
    with bank.rows(["b", "a", "b"]):
        base(torch.randn(3, 6))
    assert calls == [3, 2, 1]  # b's and the base's rows at once; then b's, and a's
