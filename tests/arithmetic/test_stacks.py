"""Arithmetic of adapters of experts: each matrix of a stack is a block of its own. Oracles are dense, in numpy."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn as nn

import lora
from lora.__main__ import main


class Experts(nn.Module):
    """A stack (4, 5, 6), stored as it says or transposed, and a matrix."""

    def __init__(self, is_transposed=False):
        super().__init__()
        self.is_transposed = is_transposed
        stack = torch.randn(4, 5, 6, dtype=torch.float64)
        self.up = nn.Parameter(stack.mT.contiguous() if is_transposed else stack)
        self.down = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))

    def forward(self, x):
        outputs = [x @ (W if self.is_transposed else W.T) for W in self.up]
        return sum(outputs).tanh() @ self.down.T


def model(is_transposed):
    torch.manual_seed(0)
    return nn.ModuleDict({"experts": Experts(is_transposed)})


def trained(is_transposed, seed, r=2, lora_alpha=3, **settings):
    net = model(is_transposed)
    names = ["experts.up", "experts.down"]
    lora.inject(net, target_parameters=names, r=r, lora_alpha=lora_alpha, adapter_dtype=torch.float64, **settings)
    torch.manual_seed(seed)
    for name, parameter in net.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return net


def update(net, own, scaling):
    """s · B A in numpy, as the parameter is stored."""
    A, B = (getattr(net["experts"], f"{own}_lora_{which}").detach().numpy() for which in "AB")
    delta = scaling * B @ A
    return np.swapaxes(delta, -1, -2) if own == "up" and net["experts"].is_transposed else delta


def cut(delta, r):
    """The best approximation of each matrix at a rank."""
    U, S, V = np.linalg.svd(delta, full_matrices=False)
    return (U[..., :r] * S[..., None, :r]) @ V[..., :r, :]


both = pytest.mark.parametrize("is_transposed", [False, True])


@both
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_combined(is_transposed, method):
    one, other = trained(is_transposed, 1), trained(is_transposed, 2, r=1)
    got = lora.combine([(lora.adapter_of(one), 0.5), (lora.adapter_of(other), -2)], method)
    for own in ("up", "down"):
        expected = 0.5 * update(one, own, 1.5) - 2 * update(other, own, 3)
        expected = expected if method == "cat" else cut(expected, 2)
        np.testing.assert_allclose(got.delta(f"experts.{own}", torch.float64).numpy(), expected, atol=1e-9)


@both
def test_resized_and_scaled(is_transposed):
    net = trained(is_transposed, 1)
    adapter = lora.adapter_of(net)
    smaller, kept = lora.resize(adapter, r=1)
    for own in ("up", "down"):
        delta = update(net, own, 1.5)
        np.testing.assert_allclose(smaller.delta(f"experts.{own}", torch.float64).numpy(), cut(delta, 1), atol=1e-9)
        energy = np.linalg.svd(delta, compute_uv=False) ** 2
        assert kept[f"experts.{own}"] == pytest.approx(energy[..., 0].sum() / energy.sum())
        np.testing.assert_allclose(
            lora.scale(adapter, 2).delta(f"experts.{own}", torch.float64).numpy(), 2 * delta, atol=1e-9
        )


@both
def test_extracted(is_transposed):
    base, net = model(is_transposed), trained(is_transposed, 1)
    finetuned = copy.deepcopy(net)
    lora.merge(finetuned)
    got = lora.extract(base, finetuned, r=2, target_parameters=["up", "down"])
    assert [*got.adapter.modules] == ["experts.up", "experts.down"]
    assert got.adapter.trained_in_full == []
    for own in ("up", "down"):
        np.testing.assert_allclose(
            got.adapter.delta(f"experts.{own}", torch.float64).numpy(), update(net, own, 1.5), atol=1e-9
        )
    lora.load_adapter(base, got.adapter)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.allclose(base["experts"](x), finetuned["experts"](x))


def test_parameters_that_are_not_named_are_kept_in_full():
    base, finetuned = model(False), model(False)
    with torch.no_grad():
        finetuned["experts"].up += 1
        finetuned["experts"].down += torch.ones(6, 1, dtype=torch.float64)
    got = lora.extract(base, finetuned, r=1, target_parameters=["down"])
    assert [*got.adapter.modules] == ["experts.down"]
    assert got.adapter.trained_in_full == ["experts.up"]


@both
def test_the_command_line_knows_them(is_transposed, tmp_path, capsys):
    net = trained(is_transposed, 1)
    path = tmp_path / "a.safetensors"
    lora.save_adapter(net, path)
    assert main(["inspect", str(path), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["modules"]}
    assert rows["experts.up"]["kind"] == "stack"
    norm = np.linalg.norm(update(net, "up", 1.5))
    assert rows["experts.up"]["norm"] == pytest.approx(norm, rel=1e-3)
