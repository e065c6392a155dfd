"""Parameters that DeepSpeed's ZeRO-3 keeps in parts, which are empty outside of `GatheredParameters`: nothing empty is
handed out, and nothing is lost. (Emulated: the same attributes on plain tensors.)"""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn
from toy_model import IDS, Model, snapshot

import lora


def partition(parameters):
    """Leave of parameters what ZeRO-3 does, and keep their values as it does, out of reach."""
    for number, parameter in enumerate(parameters):
        parameter.ds_id, parameter.ds_shape, parameter.ds_values = number, parameter.shape, parameter.data
        parameter.data = torch.empty(0)


@contextlib.contextmanager
def gathered(parameters):
    parameters = [p for p in parameters if hasattr(p, "ds_id")]
    for parameter in parameters:
        parameter.data = parameter.ds_values
    yield
    for parameter in parameters:
        parameter.data = torch.empty(0)


def adapted():
    torch.manual_seed(1)
    model = Model()
    lora.inject(model, target_modules=["q_proj", "up_proj"], r=2, modules_to_save=["head"], use_dora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_()
    return model


def complaints(names, model):
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    return [
        f"  - {name} is empty: DeepSpeed's ZeRO-3 keeps its {shapes[name]} in parts; do this within "
        "`deepspeed.zero.GatheredParameters(parameters)`."
        for name in names
    ]


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_nothing_empty_is_saved_or_handed_out(tmp_path):
    model, path = adapted(), tmp_path / "adapter.safetensors"
    lora.save_adapter(adapted(), path)
    before = path.read_bytes()
    partition(model.parameters())
    uses = {
        f"save_adapter: {path} is not written, because": [lambda: lora.save_adapter(model, path)],
        f"save_adapter: {tmp_path / 'peft'} is not written, because": [
            lambda: lora.save_adapter(model, tmp_path / "peft", format="peft")
        ],
        "adapter_of: no adapter was taken, because": [lambda: lora.adapter_of(model)],
        "lora_state_dict: a tensor is in parts, because": [lambda: lora.lora_state_dict(model)],
    }
    for first, functions in uses.items():
        for function in functions:
            with pytest.raises(ValueError, match="ZeRO-3") as caught:
                function()
            said = str(caught.value).splitlines()
            assert said[0] == first
            assert sorted(said[1:]) == sorted(complaints(trained(model), model))
            assert isinstance(caught.value, lora.AdapterError) == ("adapter" in first)
    assert path.read_bytes() == before
    assert not (tmp_path / "peft").exists()


def test_only_what_is_in_parts_is_complained_of():
    model = adapted()
    partition([model.layers[1].attn["q_proj"].lora_B, model.embed.weight])
    expected = complaints(["layers.1.attn.q_proj.lora_B"], model)
    for function in (lora.adapter_of, lora.lora_state_dict):
        with pytest.raises(ValueError, match="ZeRO-3") as caught:
            function(model)
        assert str(caught.value).splitlines()[1:] == expected


def test_nothing_is_loaded_into_parts(tmp_path):
    model, path = adapted(), tmp_path / "adapter.safetensors"
    lora.save_adapter(model, path)
    partition(model.parameters())
    before = snapshot(model)
    with pytest.raises(lora.AdapterError) as caught:
        lora.load_adapter(model, path)
    said = str(caught.value).splitlines()
    assert said[0] == f"load_adapter: {path} is not loaded, because"
    assert sorted(said[1:]) == sorted(complaints(trained(model), model))
    assert snapshot(model) == before


@pytest.mark.parametrize("merge", [lora.merge, lora.merged_state_dict])
@pytest.mark.parametrize("own", ["weight", "bias", "lora_A", "lora_B", "lora_magnitude"])
def test_nothing_in_parts_is_merged(merge, own):
    model = adapted()
    names = [f"layers.{n}.mlp.up_proj.{own}" for n in range(2)]
    partition([model.get_parameter(name) for name in names])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"nothing was (changed|returned)") as caught:
        merge(model)
    assert str(caught.value).splitlines()[1:] == complaints(names, model)
    assert snapshot(model) == before


def test_what_is_gathered_is_saved_and_loaded_while_the_base_stays_in_parts(tmp_path):
    expected, path, usual = adapted(), tmp_path / "adapter.safetensors", tmp_path / "usual.safetensors"
    lora.save_adapter(expected, usual)
    model = adapted()
    partition(model.parameters())
    adapters = [p for p in model.parameters() if p.requires_grad]
    with gathered(adapters):
        lora.save_adapter(model, path)
        state = lora.lora_state_dict(model)
    torch.testing.assert_close(state, lora.lora_state_dict(expected), rtol=0, atol=0)
    for source in (path, usual):
        for loaded in (adapted(), Model()):
            loaded.load_state_dict({k: v for k, v in expected.state_dict().items() if "lora" not in k}, strict=False)
            lora.load_adapter(loaded, source)
            assert torch.equal(loaded(IDS), expected(IDS))
        with torch.no_grad(), gathered(adapters):
            for parameter in adapters:
                parameter.zero_()
            lora.load_adapter(model, source)
        with gathered(model.parameters()):
            assert torch.equal(model(IDS), expected(IDS))


def test_the_shape_of_a_base_in_parts_is_known():
    model, wrong = adapted(), adapted()
    partition(model.parameters())
    with gathered([p for p in model.parameters() if p.requires_grad]):
        adapter = lora.adapter_of(model)
        module = adapter.modules["layers.0.mlp.up_proj"]
        assert module["base"]["shape"] == (12, 8)
        wrong = lora.adapter_of(wrong)
        other = dataclasses.replace(module, base=dataclasses.replace(module.base, shape=(12, 9)))
        wrong.modules["layers.0.mlp.up_proj"] = other
        with pytest.raises(lora.AdapterError, match=r"its shape is \(12, 8\), and was \(12, 9\)"):
            lora.load_adapter(model, wrong)


def test_a_base_in_parts_is_given_adapters_as_one_that_is_whole():
    model = nn.Sequential(nn.Linear(6, 5))
    partition(model.parameters())
    lora.inject(model, target_modules=["0"], r=2)
    assert (model[0].lora_A.shape, model[0].lora_B.shape) == ((2, 6), (5, 2))
    with gathered(model.parameters()):
        assert torch.equal(model(torch.ones(6)), nn.functional.linear(torch.ones(6), model[0].weight, model[0].bias))
