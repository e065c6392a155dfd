"""A model that is cast to a dtype to store weights in (float8): what trains keeps its own, and computes right."""

import copy

import pytest
import torch
from conftest import KINDS, example, make, plain_twin, randomised
from pairwise import every_two
from releases import since
from torch import nn
from toy_model import snapshot

import lora

FLOATS = {d for d in vars(torch).values() if isinstance(d, torch.dtype) and d.is_floating_point}
STORAGE = sorted((d for d in FLOATS if d.itemsize < 2 and "float8" in str(d)), key=str)


@pytest.fixture(params=["set data", "overwrite", "swap"])
def conversion(request):
    """The ways in which torch gives a module's parameters another dtype."""
    future = torch.__future__
    future.set_overwrite_module_params_on_conversion(request.param == "overwrite")
    future.set_swap_module_params_on_conversion(request.param == "swap")
    yield
    future.set_overwrite_module_params_on_conversion(False)
    future.set_swap_module_params_on_conversion(False)


def model_with_gradients(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)
    lora.inject(model, target_modules=["0"], r=2, use_dora=True, bias="lora_only")
    randomised(model[0])
    model(torch.randn(3, 6, dtype=dtype)).square().sum().backward()
    return model


def trained_in(layer):
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


@pytest.mark.usefixtures("conversion")
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_a_cast_of_the_model_leaves_what_trains_as_it_is(storage):
    model = model_with_gradients()
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in trained_in(model[0]).items()}
    assert before.keys() == {"bias", "lora_A", "lora_B", "lora_magnitude"}
    model.to(storage)
    assert (model[0].weight.dtype, model[1].weight.dtype) == (storage, storage)
    for name, parameter in trained_in(model[0]).items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.equal(parameter, before[name][0])
        assert torch.equal(parameter.grad, before[name][1])


@pytest.mark.usefixtures("conversion")
def test_a_frozen_factor_stays_too_and_a_bare_layer_is_cast():
    model = nn.Sequential(nn.Linear(4, 4))
    lora.inject(model, target_modules=["0"], r=2, freeze_A=True)
    model.append(lora.Linear(4, 4))  # with r = 0: the base class's behaviour
    model.to(torch.float8_e4m3fn)
    assert (model[0].lora_A.dtype, model[0].lora_B.dtype) == (torch.float32, torch.float32)
    assert model[1].weight.dtype == torch.float8_e4m3fn


@pytest.mark.usefixtures("conversion")
def test_devices_and_wider_dtypes_are_followed():
    model = model_with_gradients().to("meta", torch.float8_e5m2)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in trained_in(model[0]).values()} == {torch.float32}
    assert {p.grad.device.type for p in trained_in(model[0]).values()} == {"meta"}
    model.to_empty(device="cpu")
    assert {p.dtype for p in trained_in(model[0]).values()} == {torch.float32}
    assert model[0].weight.dtype == torch.float8_e5m2
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert {p.dtype for p in model.to(dtype).parameters()} == {dtype}
        assert {p.grad.dtype for p in trained_in(model[0]).values()} == {dtype}
    model.to(torch.float8_e4m3fn)
    assert {p.dtype for p in trained_in(model[0]).values()} == {torch.float64}


@since("2.8", "there is no dtype of four bits")
def test_a_dtype_that_torch_cannot_cast_to_leaves_the_adapter():
    model = model_with_gradients()
    before = {name: p.detach().clone() for name, p in trained_in(model[0]).items()}
    with pytest.raises(NotImplementedError, match="Float4"):
        model.to(torch.float4_e2m1fn_x2)
    assert all(torch.equal(p, before[name]) for name, p in trained_in(model[0]).items())
    on_meta = model_with_gradients().to("meta").to(torch.float4_e2m1fn_x2)  # nothing to compute
    assert {p.dtype for p in trained_in(on_meta[0]).values()} == {torch.float32}


def layerwise(model, storage, compute):
    """As diffusers does it: layers are in `storage` between forwards, and cast before and after each."""
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            layer.to(storage)
            layer.register_forward_pre_hook(lambda layer, _: layer.to(compute) and None)
            layer.register_forward_hook(lambda layer, *_: layer.to(storage) and None)
    return model


@every_two(kind=KINDS, use_dora=[False, True], merge_weights=[False, True])
def test_layerwise_casting_rounds_the_base_and_nothing_else(kind, use_dora, merge_weights):
    layer = make(kind, use_dora=use_dora, merge_weights=merge_weights)
    stored = copy.deepcopy(layer)  # the same with what float8 leaves of the base
    for name in ("weight", "bias"):
        if getattr(stored, name, None) is not None:
            getattr(stored, name).data = getattr(stored, name).detach().to(torch.float8_e4m3fn).float()
    if getattr(layer, "bias", None) is not None:
        layer.bias.requires_grad_(False)
    layerwise(layer, torch.float8_e4m3fn, torch.float32)
    x = example(kind)
    for training in (True, False):
        layer.train(training), stored.train(training)
        with torch.set_grad_enabled(training):
            for _ in range(2):
                torch.testing.assert_close(layer(x), stored(x), rtol=1e-5, atol=1e-5)
    assert layer.weight.dtype == torch.float8_e4m3fn
    weights = torch.randn_like(stored(x))
    layer.train(), stored.train()
    (layer(x) * weights).sum().backward()
    (stored(x) * weights).sum().backward()
    for name, parameter in stored.lora_parameters():
        torch.testing.assert_close(getattr(layer, name).grad, parameter.grad, rtol=1e-4, atol=1e-4)
    if not use_dora:
        torch.testing.assert_close(layer(x).double(), plain_twin(stored)(x if kind == "Embedding" else x.double()),
                                   rtol=1e-4, atol=1e-4)  # fmt: skip


def test_training_under_layerwise_casting_steps_in_the_adapters_dtype():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    lora.inject(model, target_modules=["0", "2"], r=2)
    layerwise(model, torch.float8_e4m3fn, torch.float32)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x, start = torch.randn(16, 6), model[0].lora_A.detach().clone()
    torch.nn.init.normal_(model[0].lora_B)
    model(x).square().sum().backward()
    gradient = model[0].lora_A.grad.clone()
    optimizer.step()
    model(x)
    torch.testing.assert_close(model[0].lora_A, start - 1e-4 * gradient)  # float8 would swallow such a step
    assert not torch.equal(model[0].lora_A, start)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [True, False])
def test_computing_with_a_stored_weight_says_what_must_hold(kind, grad):
    layer = make(kind, merge_weights=False).to(torch.float8_e4m3fn)
    before = snapshot(layer)
    message = (
        "the base weight is stored in torch.float8_e4m3fn, which nothing is computed in; before each forward the layer "
        "must be cast to the dtype of its input"
    )
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=message):
        layer(example(kind))
    assert snapshot(layer) == before
    layer.float()(example(kind))


@pytest.mark.parametrize("fold", [lora.merge, lora.merged_state_dict])
def test_nothing_is_merged_into_a_stored_weight(fold):
    model = model_with_gradients()
    model.to(torch.float8_e4m3fn)
    with pytest.raises(
        ValueError, match=r"0: its weight is stored in torch\.float8_e4m3fn, which would lose the update"
    ):
        fold(model)
    model.to(torch.float32)
    fold(model)
