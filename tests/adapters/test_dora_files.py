"""DoRA in state dicts, copies and files; out of a model again; and what it can learn."""

import copy
import io
import pickle

import pytest
import torch
from conftest import KINDS, LAYERS
from counting import Operations
from magnitudes import dora, input_of
from torch import nn
from toy_model import IDS, Model

import lora

each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("assign", [False, True])
def test_a_pretrained_state_dict_sets_the_magnitudes(kind, assign):
    cls, arguments, _ = LAYERS[kind]
    pretrained, x = cls(**arguments), input_of(kind)  # r = 0
    model = nn.Sequential(cls(**arguments, r=2, use_dora=True))
    state = {f"0.{name}": tensor * 3 for name, tensor in pretrained.state_dict().items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=assign)
    assert (sorted(missing), unexpected) == (["0.lora_A", "0.lora_B", "0.lora_magnitude"], [])
    pretrained.load_state_dict({name.removeprefix("0."): tensor for name, tensor in state.items()})
    assert torch.equal(model(x), pretrained(x))


def test_a_layer_that_waited_on_the_meta_device_gets_its_weight():
    pretrained, x = nn.Linear(6, 5), torch.randn(2, 6)
    with torch.device("meta"):
        model = nn.Sequential(lora.Linear(6, 5, r=2, use_dora=True))
    state = {f"0.{name}": tensor for name, tensor in pretrained.state_dict().items()}
    model.load_state_dict(state, strict=False, assign=True)
    model[0].lora_A, model[0].lora_B = (nn.Parameter(torch.zeros(shape)) for shape in ((2, 6), (5, 2)))
    model[0].lora_magnitude = nn.Parameter(torch.zeros(5))
    model[0].lora_start_adapter()
    assert torch.equal(model(x), pretrained(x))


@each_kind
def test_materialised_from_the_meta_device(kind):
    cls, arguments, _ = LAYERS[kind]
    layer = cls(**arguments, r=2, use_dora=True, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    x = input_of(kind)
    with lora.disabled(layer):
        expected = layer(x)
    assert torch.equal(layer(x), expected)


@each_kind
def test_trained_magnitudes_come_back_from_state_dicts(kind):
    layer, x = dora(kind), input_of(kind)
    twin = dora(kind)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert "0.lora_magnitude" in lora.lora_state_dict(nn.Sequential(layer))


@each_kind
def test_copies_and_pickles(kind):
    layer, x = dora(kind), input_of(kind)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.weight.mul_(2), twin.lora_magnitude.mul_(3)
        assert not torch.equal(twin(x), expected)
    assert torch.equal(layer(x), expected)


def injected(**fields):
    base = Model()
    model = copy.deepcopy(base)
    lora.inject(model, **{"target_modules": ["embed", "q_proj", "up_proj"], "r": 2, "use_dora": True, **fields})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn(parameter.shape) * 0.3)
    return base, model


def test_eject_and_disabled_give_the_base_back():
    base, model = injected()
    expected = base(IDS)
    assert not torch.allclose(model(IDS), expected)
    with lora.disabled(model):
        assert torch.equal(model(IDS), expected)
    lora.eject(model)
    assert torch.equal(model(IDS), expected)
    assert list(model.state_dict()) == list(base.state_dict())
    assert not any("lora" in name or name == "_squares" for module in model.modules() for name in vars(module))


def test_merging_a_model():
    _, model = injected()
    expected, state = model(IDS), lora.merged_state_dict(model)
    lora.merge(model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("into", ["plain", "injected"])
def test_files(tmp_path, into):
    base, model = injected(use_rslora=True)
    lora.save_adapter(model, tmp_path / "a.safetensors")
    twin = copy.deepcopy(base)
    if into == "injected":
        fields = {"target_modules": ["embed", "q_proj", "up_proj"], "r": 2, "use_rslora": True}
        lora.inject(twin, **fields, use_dora=True)
    lora.load_adapter(twin, tmp_path / "a.safetensors")
    assert torch.equal(twin(IDS), model(IDS))
    without = copy.deepcopy(base)
    lora.inject(without, target_modules=["embed", "q_proj", "up_proj"], r=2, use_rslora=True)
    with pytest.raises(lora.AdapterError, match="use_dora"):
        lora.load_adapter(without, tmp_path / "a.safetensors")


def test_a_frozen_magnitude_stays():
    layer = lora.Linear(6, 5, r=2, use_dora=True)
    layer.lora_magnitude.requires_grad_(False)
    layer(torch.randn(3, 6)).square().sum().backward()
    assert layer.lora_magnitude.grad is None
    assert layer.lora_B.grad.any()


def test_training_learns_a_magnitude_that_lora_cannot():
    """A weight that is twice the base's, at rank 1."""
    torch.manual_seed(1)
    x, layer = torch.randn(64, 8), lora.Linear(8, 8, r=1, use_dora=True, bias=False)
    y = x @ (2 * layer.weight.detach()).T
    optimizer = torch.optim.Adam([layer.lora_magnitude], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-4
    with Operations() as counted:
        layer(x)
    assert "linalg_vector_norm" not in counted.names
