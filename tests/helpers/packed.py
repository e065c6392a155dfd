"""What the tests of quantised bases share: the equation by numpy in float64, with the dequantised weight."""

import copy
import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_packed

import lora

R, ALPHA, ROWS = 4, 6, 5
S = ALPHA / R


def adapted(layer: nn.Module, r: int = R, **settings) -> lora.LoRALayer:
    """The layer with an adapter whose A and B are both random."""
    lora.inject(nn.Sequential(layer), target_modules=["0"], r=r, lora_alpha=ALPHA, **settings)
    with torch.no_grad():
        for _, parameter in layer.lora_parameters():
            if parameter.dim() > 1:  # a magnitude is left as it is
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return layer


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def assert_rounded(got: Tensor, exact: np.ndarray, size: np.ndarray, eps: float) -> None:
    """Equal but for rounding: a few units in the last place of the sum of all terms' magnitudes."""
    assert np.all(np.abs(array(got) - exact) <= 4 * eps * size + 1e-30)


def assert_equation(layer: lora.LoRALayer, W: Tensor, dtype: torch.dtype) -> None:
    """Output and gradients for x, A and B of W₀ + s · B A, in training, with W₀ = W."""
    out_features, in_features = W.shape
    x = torch.randn(2, ROWS, in_features).to(dtype).requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == dtype
    assert layer.weight.grad is None
    eps, eps_AB = (torch.finfo(tensor.dtype).eps for tensor in (x, layer.lora_A))
    A, B, b, W = (array(tensor) for tensor in (layer.lora_A, layer.lora_B, layer.bias, W))
    x, dy, dx = array(x).reshape(-1, in_features), array(dy).reshape(-1, out_features), x.grad.reshape(-1, in_features)

    def value(f):  # and the sum of its terms' magnitudes
        operands = {"x": x, "A": A, "B": B, "W": W, "b": b, "dy": dy}
        return f(**operands), f(**{name: np.abs(operand) for name, operand in operands.items()})

    assert_rounded(y.reshape(-1, out_features), *value(lambda x, A, B, W, b, dy: x @ W.T + b + S * x @ A.T @ B.T), eps)
    assert_rounded(dx, *value(lambda x, A, B, W, b, dy: dy @ W + S * dy @ B @ A), eps)
    assert_rounded(layer.lora_A.grad, *value(lambda x, A, B, W, b, dy: S * (dy @ B).T @ x), max(eps, eps_AB))
    assert_rounded(layer.lora_B.grad, *value(lambda x, A, B, W, b, dy: S * dy.T @ (x @ A.T)), max(eps, eps_AB))


def kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps while the layer computes, but for x and what the layer has anyway."""
    aside = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters()) if not is_packed(tensor)}
    bytes_at: dict[int, int] = {}
    alive = []  # so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        if not is_packed(tensor):
            bytes_at[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(size for address, size in bytes_at.items() if address not in aside)


def merged(W: Tensor, layer: lora.LoRALayer) -> np.ndarray:
    """W₀ + s · B A by numpy; with DoRA its rows times m / ‖W₀ + s · B A‖."""
    total = array(W) + layer.scaling * array(layer.lora_B) @ array(layer.lora_A)
    if layer.use_dora:
        total *= (array(layer.lora_magnitude) / np.linalg.norm(total, axis=1))[:, None]
    return total


def assert_merges(layer: lora.LoRALayer, W: Tensor) -> lora.LoRALayer:
    """Merging leaves a plain layer that computes the same, with the update in the dequantised weight."""
    model, exact, weight = nn.Sequential(layer), merged(W, layer), type(layer.weight).__name__
    x = torch.randn(ROWS, W.shape[1]).to(W.dtype)
    size = np.abs(array(W)) + S * np.abs(array(layer.lora_B)) @ np.abs(array(layer.lora_A))
    with torch.no_grad():
        before = model(x)
        report = lora.merge(model)
        assert type(model[0]) is nn.Linear
        assert type(model[0].weight) is nn.Parameter
        assert model[0].weight.dtype == W.dtype
        eps = torch.finfo(W.dtype).eps
        assert_rounded(model[0].weight, exact, size, eps)
        assert_rounded(model(x), array(before), np.abs(array(x)) @ size.T + 1, eps)
    (row,) = report.modules
    assert row.packed == weight
    assert row.lost_packed > 0
    assert weight in str(report)
    return layer


def assert_dora(layer: lora.LoRALayer, W: Tensor) -> None:
    """Outputs and gradients of DoRA (arXiv:2402.09353, section 4.3: the norm is a constant), dropout and bias aside."""
    with torch.no_grad():
        layer.lora_magnitude.mul_(torch.rand(layer.lora_magnitude.shape) + 0.5)
    x = torch.randn(ROWS, W.shape[1], dtype=W.dtype, requires_grad=True)
    y = layer(x)
    dy = torch.randn(y.shape, dtype=y.dtype)
    y.backward(dy)
    A, B, m, b, W, dx, x, dy = map(
        array, (layer.lora_A, layer.lora_B, layer.lora_magnitude, layer.bias, W, x.grad, x, dy)
    )
    V = W + S * B @ A
    norm = np.linalg.norm(V, axis=1)
    g = m / norm
    exact = {
        "y": (y, x @ V.T * g + b),
        "x": (torch.from_numpy(dx), (dy * g) @ V),
        "A": (layer.lora_A.grad, S * (dy * g @ B).T @ x),
        "B": (layer.lora_B.grad, S * (dy * g).T @ (x @ A.T)),
        "m": (layer.lora_magnitude.grad, (dy * (x @ V.T)).sum(0) / norm),
    }
    for name, (got, expected) in exact.items():
        np.testing.assert_allclose(array(got), expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=name)


def assert_adapters_travel(layer: nn.Module, base: nn.Linear, path: Path) -> None:
    """An adapter of either of these, the quantised and the dense layer, does the same in the other and in itself."""
    twins = [nn.Sequential(layer), nn.Sequential(base)]
    x = torch.randn(3, base.in_features)
    for source, target in itertools.product(twins, twins):
        model, other = copy.deepcopy(source), copy.deepcopy(target)
        adapted(model[0])
        lora.save_adapter(model, path)
        before = other(x)
        lora.load_adapter(other, path)
        update = (x @ model[0].lora_A.T @ model[0].lora_B.T) * model[0].scaling
        torch.testing.assert_close(other(x) - before, update, rtol=1e-4, atol=1e-5)


def assert_dora_starts(layer: nn.Module) -> None:
    """With magnitudes the layer starts from its base's function."""
    x = torch.randn(3, layer.in_features)
    before = layer(x).detach()
    lora.inject(nn.Sequential(layer), target_modules=["0"], r=R, use_dora=True)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
