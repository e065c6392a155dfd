"""Models with a bank of adapters that have moved, and what each row and adapter is when it is alone."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import lora

ROWS = ["c", "a", "a", None, "b", "a", None, "c"]  # b has one row, a has two runs of them, c another way round


class Net(nn.Module):
    """A layer, "x", alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.x = layer

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.x(*inputs, **named)


def banked(
    base: nn.Module, configs: dict[str, dict[str, Any]], targets: Sequence[str] = ("x",)
) -> tuple[nn.Module, lora.AdapterBank]:
    """A copy of a model with a bank, of which all tensors have moved."""
    model = copy.deepcopy(base)
    torch.manual_seed(1)
    settings = {name: {"target_modules": [*targets], "r": 2, **config} for name, config in configs.items()}
    bank = lora.bank(model, {name: lora.LoraConfig(**config) for name, config in settings.items()})
    with torch.no_grad():
        for name in bank:
            for parameter in bank.parameters(name):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, bank


def alone(base: nn.Module, bank: lora.AdapterBank, name: str | None) -> nn.Module:
    """A copy of a model with one adapter, or none, as its only one."""
    model = copy.deepcopy(base)
    if name is not None:
        lora.load_adapter(model, copy.deepcopy(bank[name]))
    return model.train(base.training)


def trained(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}


def assert_each_as_alone(
    base: nn.Module,
    model: nn.Module,
    bank: lora.AdapterBank,
    x: Tensor,
    rows: Sequence[str | None] = ROWS,
    rtol: float = 1e-10,
    context: Callable[[], Any] = torch.enable_grad,
) -> None:
    """Outputs, and the gradients of x and of each adapter, of a mixed batch; in training and in evaluation."""
    for parameter in model.parameters():
        parameter.grad = None
    floats = x.is_floating_point()
    given = x.clone().requires_grad_(floats)
    with context(), bank.rows(rows):
        y = model(given)
    torch.manual_seed(2)
    dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    with bank.rows(rows):
        (y * dy).sum().backward()
    for name in dict.fromkeys(rows):
        at = [row for row, its in enumerate(rows) if its == name]
        other, its = alone(base, bank, name), x[at].clone().requires_grad_(floats)
        with context():
            expected = other(its)
        assert_close(y[at], expected, rtol)
        if expected.requires_grad:
            (expected * dy[at]).sum().backward()
        if floats:
            assert_close(given.grad[at], its.grad, rtol)
        for key, tensor in () if name is None else trained(other).items():
            assert_close(model.get_parameter(f"{key}_{name}").grad, tensor, rtol)
    for name in {*bank} - {*rows}:
        assert all(parameter.grad is None for parameter in bank.parameters(name))


def assert_close(got: Tensor, expected: Tensor, rtol: float) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * float(expected.detach().abs().max() + 1e-30))
