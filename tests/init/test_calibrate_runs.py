"""Calibration with batches and losses of every form, in every mode, dtype and context."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from calibration import BATCHES, METHODS, adapted, assert_lora_ga, loss_of, numbers, principal, projector, seen, waiting
from torch import nn
from toy_model import IDS, Model

import lora

methods = pytest.mark.parametrize("how", METHODS)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(5, 4)

    def forward(self, x, y=None):
        output = self.proj(x if y is None else x + y)
        return SimpleNamespace(loss=output.square().sum())


class AsDict(Named):
    def forward(self, x, y=None):
        return {"loss": super().forward(x, y).loss[None]}


@methods
@pytest.mark.parametrize("cls", [Named, AsDict])
def test_batches_of_every_form_and_losses_of_every_form_are_the_same(how, cls):
    x, y, base = torch.randn(9, 5), torch.randn(9, 5), cls()
    forms = [{"x": x, "y": y}, (x, y), [x, y], x + y]
    results = []
    for batch in forms:
        model, _ = waiting(how, base, target_modules=["proj"])
        lora.calibrate(model, (b for b in [batch, batch]))
        results.append((model.proj.lora_A, model.proj.lora_B))
    for A, B in results[1:]:
        torch.testing.assert_close(A, results[0][0])
        torch.testing.assert_close(B, results[0][1])


def test_methods_side_by_side_in_one_model():
    model, base = waiting(True)
    for how, block in zip(("eva", "lora_ga"), model.layers, strict=True):
        lora.initialize(block, how)
    lora.initialize(model.head, "corda")
    report = lora.calibrate(model, BATCHES, step=loss_of)
    assert [module.method for module in report.modules] == ["eva"] * 4 + ["lora_ga"] * 4 + ["corda"]
    assert str(report).splitlines()[0].split() == ["module", "method", "r", "explained"]
    assert str(report).splitlines()[1].split()[:3] == ["layers.0.attn.q_proj", "eva", "2"]
    inputs, gradients = seen(base, BATCHES)
    first, second = (model.layers[i].mlp["up_proj"] for i in range(2))
    directions, _ = principal(inputs["layers.0.mlp.up_proj"], 2)
    np.testing.assert_allclose(projector(numbers(first.lora_A)), projector(directions), atol=1e-9)
    assert_lora_ga(numbers(second.lora_A), numbers(second.lora_B), gradients["layers.1.mlp.up_proj"], 2)
    torch.testing.assert_close(model(IDS), base(IDS), rtol=0, atol=1e-10)


@methods
def test_adapters_and_their_dropout_do_not_count(how):
    model, base = waiting(True, target_modules=["q_proj", "up_proj"], lora_dropout=0.5)
    for layer in adapted(model).values():
        nn.init.normal_(layer.lora_B)
    for layer in adapted(model).values():
        layer.lora_needs_data = how
    other, _ = waiting(how, base, target_modules=["q_proj", "up_proj"])
    for each in (model, other):
        lora.calibrate(each, BATCHES, step=loss_of)
    for mine, theirs in zip(adapted(model).values(), adapted(other).values(), strict=True):
        torch.testing.assert_close(mine.lora_A, theirs.lora_A)
        torch.testing.assert_close(mine.lora_B, theirs.lora_B)


@methods
@pytest.mark.parametrize("training", [True, False])
def test_the_model_runs_in_the_mode_that_it_is_in(how, training):
    modes = []
    model, _ = waiting(how)
    model.train(training)
    model.norm_hook = model.layers[0].norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    lora.calibrate(model, BATCHES, step=loss_of)
    assert modes == [training] * 3
    assert all(module.training == training for module in model.modules())


@methods
def test_only_lora_ga_makes_a_graph(how):
    modes = []
    model, _ = waiting(how)

    def step(model, batch):
        modes.append(torch.is_grad_enabled())
        return loss_of(model, batch)

    lora.calibrate(model, BATCHES, step=step)
    assert modes == [how == "lora_ga"] * 3


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bases_in_low_precision_start_from_statistics_in_float32(how, dtype):
    base = Model().to(dtype)
    model, _ = waiting(how, base, target_modules=["q_proj", "up_proj"])
    lora.calibrate(model, BATCHES, step=lambda model, batch: model(batch).float().square().mean())
    inputs, _ = seen(base, BATCHES, lambda model, batch: model(batch).float().square().mean())
    for name, layer in adapted(model).items():
        assert layer.lora_A.dtype == torch.float32
        if how == "eva":
            directions, _ = principal(inputs[name], 2)
            np.testing.assert_allclose(projector(numbers(layer.lora_A)), projector(directions), atol=1e-3)
    torch.testing.assert_close(model(IDS), base(IDS), rtol=0.1, atol=0.05)


@methods
def test_dora_starts_with_a_gain_of_1(how):
    model, base = waiting(how, use_dora=True)
    lora.calibrate(model, BATCHES, step=loss_of)
    torch.testing.assert_close(model(IDS), base(IDS), rtol=0, atol=1e-10)


@methods
def test_training_begins_after_calibration_not_before(how):
    model, _ = waiting(how)
    with pytest.raises(RuntimeError, match="calibrate"):
        model(IDS)
    lora.calibrate(model, BATCHES, step=loss_of)
    model(IDS).sum().backward()
    assert all(layer.lora_A.grad is not None for layer in adapted(model).values())
    with pytest.raises(ValueError, match="no layer waits for data"):
        lora.calibrate(model, BATCHES)


@methods
@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_within_any_context(how, within):
    base = Model().float()
    results = []
    for context in (contextlib.nullcontext, within):
        model, _ = waiting(how, base, target_modules=["q_proj"])
        with context():
            lora.calibrate(model, BATCHES, step=loss_of)
        layer = model.layers[0].attn["q_proj"]
        assert not layer.lora_A.is_inference()
        results.append(numbers(layer.lora_A))
        update = layer.scaling * numbers(layer.lora_B) @ numbers(layer.lora_A)
        W = numbers(base.layers[0].attn["q_proj"].weight)
        np.testing.assert_allclose(numbers(layer.weight) + update, W, rtol=0, atol=1e-6)
    if how != "lora_ga":  # whose gradients autocast changes
        np.testing.assert_allclose(projector(results[0]), projector(results[1]), atol=1e-4)
    model(IDS).sum().backward()
