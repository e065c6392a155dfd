"""DoRA computes its equation, for every kind and form of layer: outputs, gradients, merged weights."""

import pytest
import torch
from conftest import KINDS, LAYERS, STORED, make, randomised, with_float32_adapter
from magnitudes import FORMS, assert_formula, base_weight, delta, dora, input_of, leaves, merged, norms
from torch import nn

import lora

each_form = pytest.mark.parametrize("form", FORMS)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize(
    ("form", "bias_trains"), [*((form, True) for form in FORMS), *((kind, False) for kind in KINDS)]
)
def test_outputs_and_gradients_are_the_formulas(form, bias_trains):
    layer = dora(form, dtype=torch.float64)
    if getattr(layer, "bias", None) is not None:
        layer.bias.requires_grad_(bias_trains)
    x = input_of(form, torch.float64)
    assert_formula(layer, x.requires_grad_() if x.is_floating_point() else x)


@pytest.mark.parametrize("form", [*STORED, "Embedding with both"])
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [
        (torch.float32, "its dtype"),
        (torch.bfloat16, "its dtype"),
        (torch.bfloat16, "float32"),
        (torch.float16, "float32"),
    ],
)
def test_in_other_dtypes_to_rounding(form, dtype, adapter):
    layer = dora(form).to(dtype)
    if adapter == "float32":
        layer = with_float32_adapter(layer)
        layer.lora_magnitude = nn.Parameter(layer.lora_magnitude.float())
    x = input_of(form, dtype)
    assert_formula(layer, x.requires_grad_() if x.is_floating_point() else x)


@each_form
def test_norms_are_those_of_the_sum(form):
    layer = dora(form, dtype=torch.float64)
    W = leaves(layer)
    layer.lora_magnitude.data.fill_(1)
    total = merged_without_gain(layer)
    torch.testing.assert_close(layer.lora_norms(), norms(layer, total), rtol=1e-12, atol=1e-12)
    assert layer.lora_norms().shape == layer.lora_magnitude.shape == W["lora_magnitude"].shape


def merged_without_gain(layer):
    """W₀ + s · B A: what merging without DoRA would give."""
    tensors = {name: tensor.detach() for name, tensor in leaves(layer).items()}
    return base_weight(layer, tensors["weight"]) + layer.scaling * delta(layer, tensors["lora_A"], tensors["lora_B"])


@each_form
def test_it_starts_as_its_base_to_the_bit(form):
    kind, own = FORMS[form]
    cls, arguments, _ = LAYERS[kind]
    layer, x = cls(**{**arguments, **own, "r": 2, "use_dora": True}), input_of(form)
    with lora.disabled(layer):
        expected = layer(x)
    assert torch.equal(layer(x), expected)
    layer.eval()
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_injected_it_starts_as_its_base_in_every_dtype(kind, dtype):
    cls, arguments, _ = LAYERS[kind]
    layer = cls(**arguments, dtype=dtype)  # r = 0: a base layer by another name
    fields = {"factored": layer.factored} if hasattr(layer, "factored") else {}
    if kind == "MergedLinear":
        fields = {"splits": {"0": (4, 3, 2)}, "enable_lora": {"0": (True, False, True)}}
    x, model = input_of(kind, dtype), nn.Sequential(layer)
    if kind == "Linear transposed":
        lora.eject(model)
    expected = model(x)
    lora.inject(model, target_modules=["0"], r=2, use_dora=True, **fields)
    assert torch.equal(model(x), expected)
    assert model[0].lora_magnitude.dtype == torch.promote_types(dtype, torch.float32)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_constructed_in_low_precision_it_starts_as_its_base(kind, dtype):
    cls, arguments, _ = LAYERS[kind]
    layer, x = cls(**arguments, dtype=dtype, r=2, use_dora=True), input_of(kind, dtype)
    with lora.disabled(layer):
        expected = layer(x)
    assert torch.equal(layer(x), expected)
    assert layer.lora_magnitude.dtype == torch.float32


# ---- at the edge -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["Linear", "Conv2d", "Conv2d factored", "Embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_that_undoes_the_weight_leaves_finite_numbers(form, dtype):
    layer, x = dora(form, dtype=dtype), input_of(form, dtype)
    with torch.no_grad():
        layer.weight.copy_(-layer.scaling * layer.lora_delta(layer.lora_A, layer.lora_B))
        if form == "Linear":
            layer.weight[0].mul_(1.5)  # one that is left
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(parameter.grad.isfinite().all() for _, parameter in layer.lora_parameters())
    with torch.no_grad():
        assert layer.eval()(x).isfinite().all()
    lora.merge(nn.Sequential(layer))
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("form", ["Linear", "MergedLinear", "Conv2d", "Conv2d factored"])
def test_outputs_whose_weights_are_zero_start_as_they_are_and_learn(form):
    kind, own = FORMS[form]
    cls, arguments, _ = LAYERS[kind]
    layer, x = cls(**{**arguments, **own, "r": 2, "use_dora": True}), input_of(form)
    with torch.no_grad():
        layer.weight[:2] = 0
    layer.reset_magnitude()
    with lora.disabled(layer):
        expected = layer(x)
    assert torch.equal(layer(x), expected)
    optimizer = torch.optim.SGD([parameter for _, parameter in layer.lora_parameters()], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - 1).square().sum().backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for _, parameter in layer.lora_parameters())
    dim = layer.lora_output_dims()[1]
    assert ((layer(x) - expected).abs().movedim(dim, 0).flatten(1).amax(1)[:2] > 1e-4).all()
    assert (layer.lora_magnitude[:2] != 0).all()


def test_no_direction_means_a_gain_of_one():
    layer = lora.Linear(3, 2, r=1, use_dora=True, bias=False)
    nn.init.zeros_(layer.weight)
    layer.reset_magnitude()
    nn.init.ones_(layer.lora_A)
    (dB,) = torch.autograd.grad(layer(torch.ones(3)).sum(), layer.lora_B)
    assert torch.equal(dB, torch.full((2, 1), 3.0))


def test_splits_without_lora_stay_as_they_are():
    layer, x = dora("MergedLinear"), input_of("MergedLinear")
    assert layer.lora_magnitude.shape == (6,)
    with lora.disabled(layer):
        expected = layer(x)
    got = layer(x)
    assert torch.equal(got[..., 4:7], expected[..., 4:7])
    assert not torch.allclose(got[..., :4], expected[..., :4])
    gradients = torch.autograd.grad(got[..., 4:7].sum(), [p for _, p in layer.lora_parameters()])
    assert not any(gradient.any() for gradient in gradients)
    merged_weight = layer.lora_compute_merged()
    assert torch.equal(merged_weight[4:7], layer.weight[4:7])


@pytest.mark.parametrize("size", [1e-20, 1e-4, 1e4, 1e18])
def test_norms_of_small_and_large_weights(size):
    layer = lora.Linear(64, 8, r=2, use_dora=True, bias=False)
    with torch.no_grad():
        layer.weight.mul_(size)
        layer.lora_B.normal_().mul_(size)
    expected = (layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).norm(dim=1)
    if 1e-18 < size < 1e18:  # squares of others leave float32
        torch.testing.assert_close(layer.lora_norms().double(), expected, rtol=1e-5, atol=0)
    x = torch.randn(4, 64)
    assert layer(x).isfinite().all()


def test_kinds_without_outputs_of_their_own_refuse_it():
    class Odd(nn.Module):
        pass

    with pytest.raises(ValueError, match="use_dora"):
        lora.inject(nn.Sequential(nn.Linear(3, 3)), target_modules=["0"], r=2, use_dora="yes")
    assert lora.Linear(3, 3, r=0, use_dora=True).use_dora is False


# ---- merging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *((form, torch.float64) for form in FORMS),
        *((kind, torch.bfloat16) for kind in STORED),
        ("Linear", torch.float32),
    ],
)
def test_merged_weights_are_the_formulas(form, dtype):
    layer = dora(form).to(dtype)
    expected, eps = merged(layer), torch.finfo(dtype).eps
    assert (layer.lora_compute_merged().double() - expected).abs().max() <= 16 * eps * max(1, expected.abs().max())
    state = nn.Sequential(layer).state_dict()
    if getattr(layer, "max_norm", None) is None:
        known = lora.merged_state_dict(nn.Sequential(layer))
        assert torch.equal(known["0.weight"], layer.lora_compute_merged())
        assert set(known) == {name for name in state if "lora_" not in name}


@each_form
def test_merging_keeps_outputs(form):
    layer, x = dora(form, dtype=torch.float64), input_of(form, torch.float64)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-12, atol=1e-12)
    model = nn.Sequential(layer)
    report = lora.merge(model)
    assert type(model[0]).__module__.startswith("torch.nn")
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert report.lost < 1e-12


@pytest.mark.parametrize("transposed", [False, True])
def test_merging_in_parts_takes_each_rows_own_gain(transposed):
    fields = {"splits": (600, 100, 600), "enable_lora": (1, 0, 1), "fan_in_fan_out": transposed}
    layer = randomised(lora.MergedLinear(32, 1300, r=2, use_dora=True, **fields), std=0.2)
    layer = with_float32_adapter(layer.to(torch.bfloat16))
    expected = merged(layer)
    error = (layer.lora_compute_merged().double() - expected).abs()
    assert (error <= 2**-7 * expected.abs() + 1e-6).all()  # of W, and of W₀ Aᵀ in the norm


def test_what_merging_reports_as_lost_is_what_rounding_took():
    layer = with_float32_adapter(lora.Linear(64, 32, r=2, use_dora=True).to(torch.bfloat16))
    nn.init.normal_(layer.lora_B, std=0.01)
    layer.lora_magnitude.data.mul_(1 + 0.01 * torch.randn(32))
    exact, before = merged(layer), layer.weight.double()
    report = lora.merge(nn.Sequential(layer))
    lost = (layer.weight.double() - exact).norm() / (exact - before).norm()
    assert report.modules[0].lost == pytest.approx(lost.item(), rel=0.02)
    assert lost > 0.01


def test_magnitudes_that_would_not_be_finite_when_merged_are_named():
    layer = make("Linear", use_dora=True).to(torch.float16)
    nn.init.constant_(layer.lora_magnitude, 6e4)
    layer.scaling = 1e-6
    layer.lora_magnitude.data = torch.full((5,), 1e7)
    with pytest.raises(ValueError, match="would not be finite"):
        lora.merge(nn.Sequential(layer))
