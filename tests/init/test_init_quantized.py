"""LoftQ, and the initialisers that write the base weight, on bitsandbytes' quantised layers."""

import copy

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from dense import best
from torch import nn

import lora

SETTINGS = {"target_modules": ["0", "2"], "r": 8, "lora_alpha": 12}


def plain_model():
    return nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 128))


def quantised(plain, quant_type="nf4", double=False):
    """A copy of the model whose linear layers are bitsandbytes' 4-bit layers, or 8-bit ones."""
    model = copy.deepcopy(plain)
    for i in (0, 2):
        arguments = plain[i].in_features, plain[i].out_features
        if quant_type == "int8":
            model[i] = bnb.nn.Linear8bitLt(*arguments, has_fp16_weights=False)
        else:
            model[i] = bnb.nn.Linear4bit(*arguments, quant_type=quant_type, compress_statistics=double)
        model[i].load_state_dict(plain[i].state_dict())
    return model.to("cpu")  # here it is quantised


def weights_of(plain):
    return {f"{i}.weight": plain[i].weight.detach() for i in (0, 2)}


def update(layer):
    return layer.scaling * (layer.lora_B.double() @ layer.lora_A.double()).detach().numpy()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_loftq_makes_up_for_what_quantising_has_lost(quant_type, double):
    plain = plain_model()
    model = quantised(plain, quant_type, double)
    lora.inject(model, **SETTINGS)
    report = lora.loftq(model, weights_of(plain))
    for module, i in zip(report.modules, (0, 2), strict=True):
        W = plain[i].weight.detach().double().numpy()
        Q = bnb.functional.dequantize_4bit(model[i].weight.data, model[i].weight.quant_state).double().numpy()
        approximation, energy = best(W - Q, 8)
        np.testing.assert_allclose(update(model[i]), approximation, rtol=0, atol=1e-5 * np.abs(W).max())
        assert module.before == pytest.approx(np.sqrt(energy.sum()) / np.linalg.norm(W), rel=1e-4)
        assert module.after == pytest.approx(np.sqrt(energy[8:].sum()) / np.linalg.norm(W), rel=1e-4)
        assert module.after < 0.85 * module.before


def test_more_steps_bring_the_weight_nearer():
    plain = plain_model()
    after = []
    for steps in (1, 2, 3, 5):
        model = quantised(plain)
        lora.inject(model, **SETTINGS)
        report = lora.loftq(model, weights_of(plain), steps)
        after.append(np.array([module.after for module in report.modules]))
        for module, i in zip(report.modules, (0, 2), strict=True):
            W = plain[i].weight.detach().double().numpy()
            Q = bnb.functional.dequantize_4bit(model[i].weight.data, model[i].weight.quant_state).double().numpy()
            assert module.after == pytest.approx(np.linalg.norm(W - Q - update(model[i])) / np.linalg.norm(W), rel=1e-4)
    assert np.all(after[1] < after[0])
    assert np.all(after[2] <= after[1] * (1 + 1e-6))
    assert np.all(after[3] <= after[2] * (1 + 1e-6))


def test_int8_bases_start_too():
    plain = plain_model()
    model = quantised(plain, "int8")
    lora.inject(model, **SETTINGS)
    report = lora.loftq(model, weights_of(plain))
    assert all(module.after < 0.9 * module.before for module in report.modules)


def test_an_unquantised_base_loads_what_training_has_added(tmp_path):
    plain = plain_model()
    model = quantised(plain)
    lora.inject(model, **SETTINGS)
    lora.loftq(model, weights_of(plain))
    with torch.no_grad():
        model[2].lora_B.add_(0.05)
    with pytest.warns(UserWarning, match="1 of 2 adapters are as they started, and others have learnt: 0. "):
        lora.save_adapter(model, tmp_path / "adapter.safetensors")
    other = copy.deepcopy(plain)
    lora.load_adapter(other, tmp_path / "adapter.safetensors")
    A, largest = model[2].lora_A.double().detach().numpy(), np.abs(update(model[2])).max()
    np.testing.assert_allclose(update(other[0]), 0, atol=1e-6 * largest)
    np.testing.assert_allclose(update(other[2]), 12 / 8 * np.full((128, 8), 0.05) @ A, rtol=0, atol=1e-6 * largest)


X_128 = torch.randn(9, 128)


@pytest.mark.parametrize("how", ["pissa", "olora", "lora_ga", "corda"])
def test_what_would_quantise_the_base_anew_is_refused(how):
    model = quantised(plain_model())
    before = model(X_128).detach()

    def begin():
        lora.inject(model, **SETTINGS, init_lora_weights=how)
        lora.calibrate(model, [X_128], step=lambda model, batch: model(batch).square().mean())

    with pytest.raises(ValueError, match=r"0: its base weight is packed, .* use `lora.loftq`"):
        begin()
    assert torch.equal(model(X_128) if how in ("pissa", "olora") else model.eval()(X_128), before)


@pytest.mark.parametrize("steps", [1, 3])
def test_eject_after_loftq_leaves_what_was_quantised(steps):
    plain = plain_model()
    model = quantised(plain)
    before = model[0].weight.clone()
    lora.inject(model, **SETTINGS)
    lora.loftq(model, weights_of(plain), steps=steps)
    lora.eject(model)
    if steps == 1:
        assert torch.equal(model[0].weight, before)
    off = (lora.layers.weights.read_weight(model[0]) - plain[0].weight).norm() / plain[0].weight.norm()
    assert off < 0.15


@pytest.mark.parametrize("how", ["eva"])
def test_calibration_on_quantised_bases(how):
    model = quantised(plain_model())
    x = torch.randn(200, 128) @ torch.diag(0.97 ** torch.arange(128.0))
    before = model(x).detach()
    lora.inject(model, **SETTINGS, init_lora_weights=how)
    lora.calibrate(model, [x], step=lambda model, batch: model(batch).square().mean())
    off = (model(x) - before).norm() / before.norm()
    assert off < 1e-6
    model(x).sum().backward()
    assert all(model[i].lora_A.grad is not None for i in (0, 2))
