"""Every kind of layer in a mixed batch: each row as its adapter alone makes it, and each adapter's gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from banks import ROWS, Net, assert_close, assert_each_as_alone, banked
from torch import Tensor

import lora

Inputs = Callable[[], Tensor]

# ---- kinds ---------------------------------------------------------------------------------------------------------

SPLITS, OUTER, MIDDLE = {"x": (4, 3, 2)}, {"x": (True, False, True)}, {"x": (False, True, False)}
CONV: dict[str, Any] = {"padding": 1, "dtype": torch.float64}
IDS = torch.randint(12, (8, 3), generator=torch.Generator().manual_seed(3))


def floats(*shape: int) -> Inputs:
    return lambda: torch.randn(8, *shape, dtype=torch.float64)


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


# For each: the layer, its input, and the settings of the adapters.
KINDS: dict[str, tuple[Callable[[], nn.Module], Inputs, dict[str, dict[str, Any]]]] = {
    "Linear": (lambda: nn.Linear(5, 9).double(), floats(4, 5), {"a": {}, "b": {"r": 5}, "c": {"use_rslora": True}}),
    "Linear, of vectors": (lambda: nn.Linear(5, 9).double(), floats(5), {"a": {}, "b": {"r": 5}, "c": {}}),
    "Linear, without bias": (lambda: nn.Linear(5, 9, bias=False).double(), floats(5), {"a": {}, "b": {}, "c": {}}),
    "Linear, DoRA": (
        lambda: nn.Linear(5, 9).double(),
        floats(4, 5),
        {"a": {"use_dora": True}, "b": {}, "c": {"use_dora": True, "r": 3}},
    ),
    "splits": (
        lambda: nn.Linear(5, 9).double(),
        floats(4, 5),
        {
            "a": {"splits": SPLITS, "enable_lora": OUTER},
            "b": {"splits": SPLITS, "enable_lora": MIDDLE, "r": 3},
            "c": {},
        },
    ),
    "splits, DoRA": (
        lambda: nn.Linear(5, 9).double(),
        floats(5),
        {
            "a": {"splits": SPLITS, "enable_lora": OUTER, "use_dora": True},
            "b": {"splits": {"x": (5, 4)}, "use_dora": True},
            "c": {"splits": SPLITS, "enable_lora": MIDDLE},
        },
    ),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, **CONV), floats(4, 7), {"a": {}, "b": {"factored": True}, "c": {"r": 3}}),
    "Conv2d": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, **CONV),
        floats(4, 5, 6),
        {"a": {}, "b": {"factored": True, "r": 4}, "c": {"use_dora": True}},
    ),
    "Conv3d": (
        lambda: nn.Conv3d(2, 3, 2, **CONV),
        floats(2, 3, 4, 3),
        {"a": {"factored": True, "use_dora": True}, "b": {}, "c": {"factored": True}},
    ),
    "Embedding": (lambda: nn.Embedding(12, 5).double(), lambda: IDS, {"a": {}, "b": {"use_dora": True}, "c": {}}),
    "Embedding, of one id": (lambda: nn.Embedding(12, 5).double(), lambda: IDS[:, 0], {"a": {}, "b": {}, "c": {}}),
    "Embedding, padded": (
        lambda: nn.Embedding(12, 5, padding_idx=int(IDS[1, 0])).double(),
        lambda: IDS,
        {"a": {}, "b": {"use_dora": True}, "c": {}},
    ),
    "Embedding, max_norm": (
        lambda: nn.Embedding(12, 5, max_norm=1.0).double(),
        lambda: IDS,
        {"a": {}, "b": {"use_dora": True}, "c": {}},
    ),
    "Embedding by frequency": (
        lambda: nn.Embedding(12, 5, scale_grad_by_freq=True).double(),
        lambda: IDS,
        {"a": {}, "b": {}, "c": {}},
    ),
    "Embedding, scaled": (lambda: Scaled(12, 5).double(), lambda: IDS, {"a": {}, "b": {"use_dora": True}, "c": {}}),
}


@pytest.mark.sampled(15)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_and_adapter_is_as_alone(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    make, inputs, configs = KINDS[kind]
    base = Net(make()).requires_grad_(False).train(training)
    model, bank = banked(base, configs)
    x = inputs()
    assert_each_as_alone(base, model, bank, x)
    assert_each_as_alone(base, model, bank, x, ["b", "b", "b", None, None, None, None, None])
    assert_each_as_alone(base, model, bank, x, ["c"] * 8)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Linear", "Linear, DoRA", "splits", "Conv2d", "Embedding"])
def test_every_dtype_comes_out_as_alone(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, inputs, configs = KINDS[kind]
    base = Net(make()).requires_grad_(False).to(dtype)
    model, bank = banked(base, configs)
    x = inputs()
    # Sums of at most 40 numbers, each rounded once, in another order.
    assert_each_as_alone(
        base, model, bank, x.to(dtype) if x.is_floating_point() else x, rtol=8 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("kind", ["Linear", "Linear, DoRA", "Conv2d"])
def test_under_autocast_it_is_as_alone(kind: str) -> None:
    torch.manual_seed(0)
    make, inputs, configs = KINDS[kind]
    base = Net(make()).requires_grad_(False).float()
    model, bank = banked(base, configs)
    eps = torch.finfo(torch.bfloat16).eps
    assert_each_as_alone(
        base, model, bank, inputs().float(), rtol=8 * eps, context=lambda: torch.autocast("cpu", torch.bfloat16)
    )


# ---- one cannot reach another ----------------------------------------------------------------------------------------


def outcome(model: nn.Module, bank: lora.AdapterBank, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The outputs, and the gradients of all adapters; of x, which is the last, too."""
    for parameter in model.parameters():
        parameter.grad = None
    given = x.clone().requires_grad_(x.is_floating_point())
    with bank.rows(ROWS):
        y = model(given)
        (y * dy).sum().backward()
    gradients = {name: [parameter.grad for parameter in bank.parameters(name)] for name in bank}
    return y.detach(), gradients | {"x": [given.grad] if x.is_floating_point() else []}


@pytest.mark.sampled(12)
@pytest.mark.parametrize("where", ["A", "B", "magnitude", "input", "loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_overflows_in_one_stays_there(kind: str, value: float, where: str) -> None:
    torch.manual_seed(0)
    make, inputs, configs = KINDS[kind]
    base = Net(make()).requires_grad_(False)
    model, bank = banked(base, configs)
    x = inputs()
    dy = torch.randn_like(base(x))
    mine = [row for row, name in enumerate(ROWS) if name == "c"]
    rest = [row for row, name in enumerate(ROWS) if name != "c"]
    before, its = outcome(model, bank, x, dy)
    if where == "input" and x.is_floating_point():
        x[mine] = value
    elif where == "loss":
        dy[mine] = value
    else:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name == f"x.lora_{where}_c":
                    parameter.fill_(value)
    after, now = outcome(model, bank, x, dy)
    assert torch.equal(after[rest], before[rest])
    for name in ("a", "b"):
        assert all(torch.equal(one, other) for one, other in zip(now[name], its[name], strict=True))
    assert all(torch.equal(one[rest], other[rest]) for one, other in zip(now["x"], its["x"], strict=True))


@pytest.mark.parametrize("kind", ["Linear", "Linear, DoRA", "Conv1d", "Conv2d", "Conv3d"])
def test_dropout_of_one_does_not_depend_on_the_others(kind: str) -> None:
    torch.manual_seed(0)
    make, inputs, configs = KINDS[kind]
    base = Net(make()).requires_grad_(False)
    model, bank = banked(base, {name: {**config, "lora_dropout": 0.5} for name, config in configs.items()})
    x = inputs()
    found = []
    for rows in (ROWS, ["b", "a", "a", None, None, "a", None, "b"], [None, "a", "a", None, None, "a", None, None]):
        for name in bank:
            bank.seed(name, 5)
        with bank.rows(rows):
            found.append([model(x)[[1, 2, 5]] for _ in range(2)])
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            assert_close(one, another, 1e-12)
    assert not torch.equal(*found[0])  # each forward drops others
    with bank.use(None):
        assert not torch.equal(found[0][0], model(x)[[1, 2, 5]])


def test_adapters_of_different_modules() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)).double().requires_grad_(False)
    configs = {
        "a": {"target_modules": ["0", "3"]},
        "b": {"target_modules": ["2"], "use_dora": True},
        "c": {"target_modules": ["0", "2"], "r": 4},
    }
    model, bank = banked(base, configs)
    assert_each_as_alone(base, model, bank, torch.randn(8, 5, dtype=torch.float64))
    assert_each_as_alone(base, model, bank, torch.randn(8, 2, 5, dtype=torch.float64), ["b"] * 3 + [None] * 5)
