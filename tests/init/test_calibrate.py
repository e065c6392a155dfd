"""EVA, LoRA-GA and CorDA against numpy, from the inputs and gradients that a copy of the model has."""

import math

import numpy as np
import pytest
import torch
from calibration import (
    BATCHES,
    adapted,
    assert_lora_ga,
    assert_same_function,
    loss_of,
    numbers,
    principal,
    projector,
    seen,
    waiting,
)
from torch import nn

import lora

# ---- EVA -------------------------------------------------------------------------------------------------------


def test_eva_starts_a_from_the_principal_directions_of_the_inputs():
    model, base = waiting("eva")
    report = lora.calibrate(model, BATCHES)
    inputs, _ = seen(base, BATCHES)
    assert report.batches == 3
    assert [module.name for module in report.modules] == list(adapted(model))
    for module, (name, layer) in zip(report.modules, adapted(model).items(), strict=True):
        directions, shares = principal(inputs[name], 2)
        A = numbers(layer.lora_A)
        np.testing.assert_allclose(A @ A.T, np.eye(2), atol=1e-12)
        np.testing.assert_allclose(projector(A), projector(directions), atol=1e-9)
        assert (module.method, module.r, module.share) == ("eva", 2, pytest.approx(shares[:2].sum(), rel=1e-6))
        assert not layer.lora_B.any()
    assert_same_function(model, base, started=False)


def test_a_large_mean_costs_no_precision():
    x = torch.randn(4, 500, 6) * torch.tensor([3.0, 2.0, 1.0, 0.3, 0.2, 0.1]) + 1000
    model, _ = waiting("eva", nn.Sequential(nn.Linear(6, 3)), target_modules=["0"])
    lora.calibrate(model, x.unbind())
    directions, _ = principal(x.flatten(0, 1).double().numpy(), 2)
    np.testing.assert_allclose(projector(numbers(model[0].lora_A)), projector(directions), atol=1e-4)


def test_wide_inputs_of_which_only_the_leading_directions_are_computed():
    base, x = nn.Sequential(nn.Linear(60, 5)).double(), torch.randn(500, 60).double() * 0.9 ** torch.arange(60)
    model, _ = waiting("eva", base, target_modules=["0"])
    [module] = lora.calibrate(model, [x]).modules
    directions, shares = principal(x.numpy(), 2)
    np.testing.assert_allclose(projector(numbers(model[0].lora_A)), projector(directions), atol=1e-4)
    assert module.share == pytest.approx(shares[:2].sum(), rel=1e-6)


def test_all_splits_start_from_the_same_inputs():
    model, base = waiting("eva", nn.Sequential(nn.Linear(6, 9)).double(), target_modules=["0"], splits={"0": (4, 3, 2)})
    x = torch.randn(20, 6, dtype=torch.float64)
    lora.calibrate(model, [x])
    A = numbers(model[0].lora_A).reshape(3, 2, 6)
    for split in A:
        np.testing.assert_allclose(projector(split), projector(principal(x.numpy(), 2)[0]), atol=1e-9)
    torch.testing.assert_close(model(x), base(x))


class Tokens(nn.Module):
    """(N, L, 5) -> (N, L, 3), with what a language model is called with; `flat` puts the tokens in one row."""

    def __init__(self, flat=False):
        super().__init__()
        self.proj, self.flat = nn.Linear(5, 3).double(), flat

    def forward(self, x, attention_mask=None, labels=None):
        return self.proj(x.flatten(0, 1) if self.flat else x)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("ignored", "keys"),
    [
        (-100, ["attention_mask", "labels"]),
        (-100, ["attention_mask"]),
        (None, ["attention_mask", "labels"]),
        (None, ["labels"]),
        (7, []),
    ],
)
def test_positions_that_are_padding_or_have_no_label_do_not_count(flat, ignored, keys):
    x, mask, labels = torch.randn(3, 8, 5).double(), torch.rand(3, 8) > 0.3, torch.randint(5, (3, 8))
    labels[torch.rand(3, 8) > 0.5] = -100
    batch = {
        "x": x,
        **{key: value for key, value in (("attention_mask", mask.long()), ("labels", labels)) if key in keys},
    }
    model, _ = waiting("eva", Tokens(flat), target_modules=["proj"])
    lora.calibrate(model, [batch], ignore_index=ignored)
    counted = torch.ones(3, 8, dtype=bool)
    if "attention_mask" in keys:
        counted &= mask
    if "labels" in keys and ignored == -100:
        counted &= labels != -100
    assert counted.sum() > 3 or not keys
    directions, _ = principal(x[counted].numpy(), 2)
    np.testing.assert_allclose(projector(numbers(model.proj.lora_A)), projector(directions), atol=1e-9)


class Parallel(nn.Module):
    """Layers beside each other, whose inputs spread differently."""

    def __init__(self, *spreads):
        super().__init__()
        self.spreads = [torch.tensor(spread) for spread in spreads]
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in spreads)

    def forward(self, x):
        return sum(layer(x * spread) for layer, spread in zip(self.layers, self.spreads, strict=True))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_rho_moves_ranks_to_where_they_explain_most_and_keeps_the_scalings(use_rslora):
    # variances 1:1:1:1, 1:0.01:0.0001:0 and 1:0.25:0.04:0, so that the shares are known
    base = Parallel([1.0, 1.0, 1.0, 1.0], [1.0, 0.1, 0.01, 0.0], [1.0, 0.5, 0.2, 0.0])
    x = torch.cat([torch.eye(4), -torch.eye(4)]) * 2
    model, _ = waiting("eva", base, target_modules=["layers.0", "layers.1", "layers.2"], use_rslora=use_rslora)
    scaling, before = model.layers[0].scaling, base(x)
    model.layers[2].lora_A.requires_grad_(False)
    report = lora.calibrate(model, [x], rho=2)
    # beside the first of each: 0.25, 0.25, 0.25 · 0.0099 · 0.194, 0.031; three of these are taken
    assert [module.r for module in report.modules] == [4, 1, 1]
    for layer, r in zip(model.layers, (4, 1, 1), strict=True):
        assert (layer.r, layer.lora_A.shape, layer.lora_B.shape) == (r, (r, 4), (4, r))
        assert layer.scaling == scaling
        assert layer.lora_alpha == pytest.approx(scaling * (math.sqrt(r) if use_rslora else r))
    assert [p.requires_grad for layer in model.layers for p in (layer.lora_A, layer.lora_B)] == [True] * 4 + [
        False,
        True,
    ]
    assert torch.equal(model(x), before)
    assert [module.share for module in report.modules] == pytest.approx([1, 1 / 1.0101, 1 / 1.29], rel=1e-5)
    assert lora.adapter_of(model).modules["layers.0"]["r"] == 4


def test_rho_1_and_a_larger_one_that_moves_nothing_keep_the_parameters():
    for rho in (1, 1.2):
        model, _ = waiting("eva")
        parameters = [id(p) for p in model.parameters()]
        report = lora.calibrate(model, BATCHES, rho=rho)
        assert {module.r for module in report.modules} == {2}
        assert [id(p) for p in model.parameters()] == parameters


# ---- LoRA-GA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [16.0, 2])
def test_lora_ga_starts_from_the_gradient_of_the_weight(gamma):
    model, base = waiting("lora_ga")
    report = lora.calibrate(model, BATCHES, step=loss_of, stable_gamma=gamma)
    _, gradients = seen(base, BATCHES)
    for module, (name, layer) in zip(report.modules, adapted(model).items(), strict=True):
        share = assert_lora_ga(numbers(layer.lora_A), numbers(layer.lora_B), gradients[name], 2, gamma)
        assert (module.method, module.r, module.share) == ("lora_ga", 2, pytest.approx(share, rel=1e-6))
    assert_same_function(model, base, started=True)


def test_lora_ga_leaves_gradients_and_flags_alone():
    model, _ = waiting("lora_ga", modules_to_save=["norm"])
    model.embed.weight.requires_grad_(True)
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    lora.calibrate(model, BATCHES, step=loss_of)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags


@pytest.mark.parametrize("transposed", [False, True])
def test_lora_ga_of_splits_and_of_transposed_weights(transposed):
    layer = lora.MergedLinear(
        7, 12, r=2, splits=(5, 3, 4), enable_lora=(True, False, True), fan_in_fan_out=transposed,
        init_lora_weights="lora_ga", dtype=torch.float64,
    )  # fmt: skip
    model, x, target = nn.Sequential(layer), torch.randn(9, 7).double(), torch.randn(9, 12).double()
    before, weight = model.eval()(x), (layer.weight.T if transposed else layer.weight).detach().clone()
    model.train()
    lora.calibrate(model, [(x,)], step=lambda model, batch: ((model(*batch) - target) ** 2).sum())
    gradient = numbers(2 * (x @ weight.T + layer.bias - target).T @ x)
    A, B = numbers(layer.lora_A), numbers(layer.lora_B)
    assert_lora_ga(A[:2], B[:5], gradient[:5], 2)
    assert_lora_ga(A[2:], B[5:], gradient[8:], 2)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def test_lora_ga_under_activation_checkpoints_counts_once():
    base = nn.Sequential(
        nn.Linear(5, 6), Checkpointed(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)))
    ).double()
    x = torch.randn(10, 5).double()
    model, base = waiting("lora_ga", base, target_modules="all-linear")
    report = lora.calibrate(model, [x], step=loss_of)
    _, gradients = seen(base, [x])
    for name, layer in adapted(model).items():
        assert_lora_ga(numbers(layer.lora_A), numbers(layer.lora_B), gradients[name], 2)
    assert len(report.modules) == 3


def test_an_input_that_was_changed_in_place_is_refused():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            x = x + 1
            y = self.a(x)
            x += 2
            return self.b(x + y)

    model, _ = waiting("lora_ga", InPlace(), target_modules=["a", "b"])
    with pytest.raises(ValueError, match="a: its input was changed in place") as error:
        lora.calibrate(model, [torch.randn(3, 5)], step=loss_of)
    assert "b:" not in str(error.value)


# ---- CorDA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corda_method", ["ipm", "kpm"])
def test_corda_starts_from_the_weight_as_the_inputs_see_it(corda_method):
    model, base = waiting("corda", target_modules=["q_proj", "up_proj", "down_proj"])
    report = lora.calibrate(model, BATCHES, corda_method=corda_method)
    inputs, _ = seen(base, BATCHES)
    for module, (name, layer) in zip(report.modules, adapted(model).items(), strict=True):
        x, W = inputs[name], numbers(base.get_submodule(name).weight)
        C = x.T @ x / len(x)
        C = C / C.diagonal().mean() + 0.01 * np.eye(len(C))
        U, S, Vt = np.linalg.svd(W @ C, full_matrices=False)
        which = slice(2) if corda_method == "ipm" else slice(-2, None)
        product = U[:, which] * S[which] @ Vt[which] @ np.linalg.inv(C)
        A, B = numbers(layer.lora_A), numbers(layer.lora_B)
        np.testing.assert_allclose(layer.scaling * B @ A, product, rtol=0, atol=1e-8 * np.abs(product).max())
        np.testing.assert_allclose((B.T @ B).diagonal(), S[which] / layer.scaling, rtol=1e-6)
        share = (S[which] ** 2).sum() / (S**2).sum()
        assert (module.method, module.share) == ("corda", pytest.approx(share, rel=1e-6))
    assert_same_function(model, base, started=True)


def test_corda_does_not_see_how_large_the_inputs_are():
    base, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(30, 6).double()
    models = [waiting("corda", base, target_modules=["0"])[0] for _ in range(2)]
    for model, size in zip(models, (1.0, 1e4), strict=True):
        lora.calibrate(model, [x * size])
    for name in ("lora_A", "lora_B"):
        one, other = (numbers(getattr(model[0], name)) for model in models)
        np.testing.assert_allclose(np.abs(one), np.abs(other), rtol=1e-8)
