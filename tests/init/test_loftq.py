"""LoftQ on a quantiser of the tests' own, against numpy's SVD of what quantising loses."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from dense import best
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy_model import snapshot

import lora


class Packed(nn.Linear):
    """A linear layer whose weight is integers of a few bits, and a scale for each row."""

    bits = 3

    def pack(self, weight):
        self.step = weight.abs().amax(1, keepdim=True).clamp(min=1e-9) / (2 ** (self.bits - 1) - 1)
        self.weight = nn.Parameter((weight / self.step).round().to(torch.int8), requires_grad=False)

    def unpack(self):
        return self.weight * self.step

    def forward(self, x):
        return nn.functional.linear(x, self.unpack(), self.bias)


lora.register_weight(Packed, Packed.unpack, Packed.pack)


def packed(plain, bits=3):
    """The model with its linear layers quantised, and their weights from before."""
    model = copy.deepcopy(plain)
    for _, layer in linears(model):
        layer.__class__, layer.bits = Packed, bits
        layer.pack(layer.weight.detach())
    return model, {f"{name}.weight": layer.weight.detach().clone() for name, layer in linears(plain)}


def linears(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def plain_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 9, bias=False)).double()


def adapted(plain=None, bits=3, **fields):
    plain = plain_model() if plain is None else plain
    model, weights = packed(plain, bits)
    lora.inject(
        model, **{"target_modules": ["0", "2"], "r": 3, "lora_alpha": 5, "adapter_dtype": torch.float64} | fields
    )
    return model, weights, plain


def update(layer):
    """s · B A of a layer with one block."""
    return layer.scaling * (layer.lora_B @ layer.lora_A).detach().double().numpy()


def left(model, weights):
    """‖W − Q − s · B A‖ / ‖W‖ of every layer."""
    layers = [(weights[f"{name}.weight"].numpy(), layer) for name, layer in linears(model)]
    return [np.linalg.norm(W - layer.unpack().numpy() - update(layer)) / np.linalg.norm(W) for W, layer in layers]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_and_b_make_up_for_the_most_that_their_rank_can(use_rslora):
    model, weights, _ = adapted(use_rslora=use_rslora)
    bases = [layer.unpack().clone() for _, layer in linears(model)]
    report = lora.loftq(model, weights)
    for module, base, (name, layer) in zip(report.modules, bases, linears(model), strict=True):
        lost, W = (weights[f"{name}.weight"] - base).numpy(), weights[f"{name}.weight"].numpy()
        approximation, energy = best(lost, 3)
        np.testing.assert_allclose(update(layer), approximation, rtol=0, atol=1e-13)
        assert torch.equal(layer.unpack(), base)
        assert (module.name, module.r) == (name, 3)
        assert module.before == pytest.approx(math.sqrt(energy.sum()) / np.linalg.norm(W), rel=1e-12)
        assert module.after == pytest.approx(math.sqrt(energy[3:].sum()) / np.linalg.norm(W), rel=1e-12)
    assert str(report).splitlines()[0] == "module  r  lost before  lost now"
    assert str(report).splitlines()[2].split()[:2] == ["2", "3"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("bits", [2, 3, 4])
@given(seed=st.integers(0, 50))
def test_more_steps_are_never_worse(bits, seed):
    errors = []
    for steps in (1, 2, 3, 6):
        model, weights, _ = adapted(plain_model(seed), bits)
        report = lora.loftq(model, weights, steps)
        errors.append(left(model, weights))
        np.testing.assert_allclose([module.after for module in report.modules], errors[-1], rtol=1e-9)
    for fewer, more in itertools.pairwise(errors):
        assert np.all(np.array(more) <= np.array(fewer) * (1 + 1e-9))


def test_a_few_steps_are_better_than_one():
    model, weights, _ = adapted(bits=4, r=6)
    once = lora.loftq(model, weights)
    again = lora.loftq(adapted(bits=4, r=6)[0], weights, 5)
    for module, better in zip(once.modules, again.modules, strict=True):
        assert module.before == better.before
        assert better.after < 0.98 * module.after < 0.9 * module.before


def test_the_second_step_is_that_of_the_paper():
    model, weights, _ = adapted(bits=4, r=6)
    _, layer = linears(model)[0]
    W = weights["0.weight"]
    first = torch.from_numpy(best((W - layer.unpack()).numpy(), 6)[0])
    other = packed(nn.Sequential(nn.Linear(12, 16)).double(), 4)[0][0]
    other.pack(W - first)
    lora.loftq(model, weights, steps=2)
    torch.testing.assert_close(layer.unpack(), other.unpack(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(update(layer), best((W - other.unpack()).numpy(), 6)[0], rtol=0, atol=1e-12)


def test_a_randomised_svd_is_near_the_exact_one():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(80, 70), nn.Tanh(), nn.Linear(70, 90)).double()
    exact, fast = (lora.loftq(*adapted(plain, r=4)[:2], niter=niter) for niter in (None, 4))
    for one, other in zip(exact.modules, fast.modules, strict=True):
        assert one.after < other.after < one.after * 1.01


def test_the_model_comes_nearer_to_the_one_that_was_quantised():
    x = torch.randn(50, 12).double()
    model, weights, plain = adapted(r=6)
    before = (model(x) - plain(x)).norm()
    lora.loftq(model, weights)
    after = (model(x) - plain(x)).norm()
    assert after < 0.7 * before
    with lora.disabled(model):
        assert abs((model(x) - plain(x)).norm() - after) < 1e-6


def test_an_unquantised_base_loads_what_training_has_added(tmp_path):
    model, weights, plain = adapted()
    lora.loftq(model, weights)
    untrained = tmp_path / "untrained.safetensors"
    lora.save_adapter(model, untrained)
    with torch.no_grad():
        for _, layer in linears(model):
            layer.lora_B.add_(0.1)
    started = {name: copy.deepcopy(layer) for name, layer in linears(model)}
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    x = torch.randn(5, 12).double()
    one, other = copy.deepcopy(plain), copy.deepcopy(plain)
    lora.load_adapter(one, untrained)
    torch.testing.assert_close(one(x), plain(x), rtol=0, atol=1e-6)
    lora.load_adapter(other, tmp_path / "adapter.safetensors")
    for name, layer in linears(other):
        A = started[name].lora_A.detach().numpy()
        added = started[name].scaling * np.full((len(layer.lora_B), 3), 0.1) @ A
        np.testing.assert_allclose(update(layer), added, rtol=0, atol=1e-6)


def test_splits_are_matrices_of_their_own():
    splits = {"splits": {"0": (7, 5, 4)}, "enable_lora": {"0": (True, False, True)}}
    model, weights, _ = adapted(**splits)
    layer = model[0]
    lost = (weights["0.weight"] - layer.unpack()).numpy()
    lora.loftq(model, weights)
    A, B = layer.lora_A.detach().numpy(), layer.lora_B.detach().numpy()
    np.testing.assert_allclose(layer.scaling * B[:7] @ A[:3], best(lost[:7], 3)[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(layer.scaling * B[7:] @ A[3:], best(lost[12:], 3)[0], rtol=0, atol=1e-13)


def test_dora_starts_with_a_gain_of_1():
    model, weights, _ = adapted(use_dora=True)
    lora.loftq(model, weights)
    x = torch.randn(4, 12).double()
    W = model[0].unpack() + torch.from_numpy(update(model[0]))
    torch.testing.assert_close(model[0](x), nn.functional.linear(x, W, model[0].bias))


def test_weights_from_a_function_and_by_any_name_of_a_shared_module():
    plain = plain_model()
    model, weights = packed(plain)
    model.append(model[0])
    lora.inject(model, target_modules=["0", "2"], r=3)
    asked = []

    def read(name):
        asked.append(name)
        return {"3.weight": weights["0.weight"].float(), "2.weight": nn.Parameter(weights["2.weight"])}[name]

    report = lora.loftq(model, read)
    assert [module.name for module in report.modules] == ["0", "2"]
    assert all(module.after < module.before for module in report.modules)
    assert asked == ["0.weight", "3.weight", "2.weight"] * 2


def test_within_autocast_and_inference_mode():
    for context in (torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        plain = plain_model().float()
        model, weights, _ = adapted(plain)
        other = copy.deepcopy(model)
        lora.loftq(other, weights, 2)
        with context():
            lora.loftq(model, weights, 2)
        for (_, one), (_, two) in zip(linears(model), linears(other), strict=True):
            torch.testing.assert_close(one.lora_B @ one.lora_A, two.lora_B @ two.lora_A)
            assert not one.weight.is_inference()
        model(torch.ones(12)).sum().backward()


# ---- what cannot be --------------------------------------------------------------------------------------------


def refused(model, weights, *words, **options):
    before = snapshot(model)
    with pytest.raises(ValueError, match="loftq") as error:
        lora.loftq(model, weights, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert snapshot(model) == before
    return str(error.value)


def test_all_problems_are_listed_at_once_and_nothing_is_changed():
    model, weights, _ = adapted()
    del weights["0.weight"]
    weights["2.weight"][1, 1] = math.inf
    refused(model, weights, "0: `weights` has no 0.weight", "2: the weight holds NaN or infinity", steps=3)
    model, weights, _ = adapted()
    model[0].scaling = -1.0
    weights["2.weight"] = weights["2.weight"].T
    refused(model, weights, "0: `scaling` must be above 0", "(9, 16), got (16, 9)")
    message = refused(model, "weights", "`weights` must be a mapping, or a function of a name", steps=0, niter=-1)
    assert "`steps` must be an integer of at least 1, got 0" in message
    assert "`niter` must be None or an integer of at least 0, got -1" in message


def test_more_steps_do_not_write_a_weight_that_is_another_modules_too():
    model, weights = packed(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double())
    model[1].weight, model[1].step = model[0].weight, model[0].step
    lora.inject(model, target_modules=["0"], r=2)
    refused(model, weights, "0: its weight is tied to that of 1", steps=2)
    lora.loftq(model, weights)


def test_nothing_lost_is_nothing_to_start_from():
    model, weights, _ = adapted()
    refused(model, weights | {"2.weight": model[2].unpack()}, "2: its base has lost nothing of the weight")


def test_ranks_and_bases_that_leave_nothing_to_do():
    model, weights, _ = adapted(r=10)
    assert "0:" not in refused(model, weights, "2: r must be at most 9")
    plain = plain_model()
    lora.inject(plain, target_modules=["0", "2"], r=2)
    refused(plain, weights, "no LoRA layer has a base that is quantised")
    mixed, weights, _ = adapted()
    mixed.append(lora.Linear(9, 3, r=2))
    before = mixed[-1].lora_A.clone()
    lora.loftq(mixed, weights)
    assert torch.equal(mixed[-1].lora_A, before)
    assert mixed[0].lora_B.any()
    with pytest.raises(ValueError, match="there is no LoRA layer"):
        lora.loftq(plain_model(), weights)
