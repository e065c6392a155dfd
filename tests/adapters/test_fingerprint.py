"""What an adapter remembers of its base: another base is refused, the same one in another dtype or packing is not."""

import copy
import json
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import STORED, make, randomised
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy_model import Model, snapshot

import lora
from lora.adapters.base import Base

Q0 = "layers.0.attn.q_proj"


def saved(path, base=None, **fields):
    base = Model() if base is None else base
    model = copy.deepcopy(base)
    lora.inject(model, **{"target_modules": ["q_proj", "embed"], "r": 2, **fields})
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            randomised(module)
    lora.save_adapter(model, path)
    return base, model


def refused(model, path, *messages):
    before = snapshot(model)
    with pytest.raises(lora.AdapterError) as caught:
        lora.load_adapter(model, path)
    assert snapshot(model) == before
    for message in messages:
        assert message in str(caught.value)
    return str(caught.value)


either = pytest.mark.parametrize("injected", [False, True], ids=["plain", "injected"])


def another(base, injected):
    model = copy.deepcopy(base)
    if injected:
        lora.inject(model, target_modules=["q_proj", "embed"], r=2)
    return model


# ---- what is remembered ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORED)
def test_kind_shape_dtype_and_sample_are_in_the_file(tmp_path, kind):
    layer = make(kind)
    lora.save_adapter(nn.Sequential(layer), tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", framework="pt") as file:
        base = json.loads(file.metadata()["lora"])["modules"]["0"]["base"]
    words = {"Linear": "linear", "MergedLinear": "linear", "Embedding": "embedding"}
    expected = {"kind": words.get(kind.split()[0], "conv"), "shape": list(layer.weight.shape), "dtype": "float32"}
    expected["margin"] = 0.0  # the weight was never written
    if expected["kind"] == "linear":
        expected["fan_in_fan_out"] = kind == "Linear transposed"
    if expected["kind"] == "conv":
        expected["groups"] = layer.groups
        expected["beyond_peft"] = ""  # of dilation and padding modes
    sample = base.pop("sample")
    assert base == expected
    values = layer.weight.detach().numpy().ravel()
    assert len(sample) == 16
    assert set(np.float32(sample)) <= set(values)
    assert (sample[0], sample[-1]) == (values[0], values[-1])
    assert sample == [float(values[k * (len(values) - 1) // 15]) for k in range(16)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_of_the_base_is_remembered(tmp_path, dtype):
    saved(tmp_path / "a", Model().to(dtype))
    assert lora.read_adapter(tmp_path / "a").modules[Q0]["base"]["dtype"] == str(dtype).removeprefix("torch.")


def test_the_name_of_a_transformers_model_is_remembered(tmp_path):
    base = Model()
    base.config = type("Config", (), {"_name_or_path": "somebody/model"})()
    saved(tmp_path / "a", base)
    assert lora.read_adapter(tmp_path / "a").base_model == "somebody/model"
    lora.load_adapter(base, tmp_path / "a")


@pytest.mark.parametrize("name", [None, "", 3, object()], ids=["None", "empty", "3", "object"])
def test_a_model_whose_name_is_none_has_none(tmp_path, name):
    base = Model()
    base.config = type("Config", (), {"_name_or_path": name})
    saved(tmp_path / "a", base)
    assert lora.read_adapter(tmp_path / "a").base_model is None


def test_a_kind_of_the_users_is_remembered_by_its_name():
    class Scale(lora.LoRALayer):
        pass

    class Scaled(Scale, nn.Linear):
        pass

    layer = Scaled(4, 3)
    assert Base.of(layer).kind == "Scale"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_has_no_sample_and_loads(tmp_path, value):
    base = nn.Sequential(nn.Linear(4, 4, bias=False))
    nn.init.constant_(base[0].weight, value)
    saved(tmp_path / "a", base, target_modules=["0"])
    assert lora.read_adapter(tmp_path / "a").modules["0"]["base"]["sample"] is None
    lora.load_adapter(nn.Sequential(nn.Linear(4, 4, bias=False)), tmp_path / "a")


# ---- what is compared ------------------------------------------------------------------------------------------


@either
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_base_in_another_dtype_is_the_same(tmp_path, dtype, injected):
    base, _ = saved(tmp_path / "a")
    model = another(base, injected)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    lora.load_adapter(model, tmp_path / "a")
    assert model.layers[0].attn["q_proj"].lora_B.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_and_from_a_narrow_dtype_to_a_wide_one(tmp_path, dtype):
    base = Model()
    saved(tmp_path / "a", copy.deepcopy(base).to(dtype))
    lora.load_adapter(base, tmp_path / "a")


@either
def test_another_base_of_the_same_shapes_is_refused_for_each_module_unless_told_otherwise(tmp_path, injected):
    base, trained = saved(tmp_path / "a")
    model = another(Model(), injected)
    message = refused(model, tmp_path / "a", f"{Q0}: the base weight is not the one", "embed: the base weight is not")
    assert message.count("check_base=False") == 4  # of three adapted weights, and of all others together
    assert "head.weight: the values are not those" in message
    lora.load_adapter(model, tmp_path / "a", check_base=False)
    assert torch.equal(model.layers[0].attn["q_proj"].lora_B, trained.layers[0].attn["q_proj"].lora_B)
    assert base is not model


@either
@pytest.mark.parametrize("factor", [0.9, 1.05, -1, 0])
def test_a_base_that_was_changed_is_refused(tmp_path, factor, injected):
    base, _ = saved(tmp_path / "a")
    model = another(base, injected)
    with torch.no_grad():
        model.layers[0].attn["q_proj"].weight.mul_(factor)
    message = refused(model, tmp_path / "a", f"{Q0}: the base weight is not the one that the adapter was trained on")
    assert "embed" not in message


def test_a_base_that_lora_was_merged_into_is_another(tmp_path):
    _, trained = saved(tmp_path / "a")
    lora.merge(trained)
    refused(trained, tmp_path / "a", f"{Q0}: the base weight is not the one")


def test_a_base_of_another_shape_says_both(tmp_path):
    base = nn.Sequential(nn.Linear(4, 6))
    saved(tmp_path / "a", base, target_modules=["0"])
    lora.eject(base) if isinstance(base[0], lora.LoRALayer) else None
    refused(nn.Sequential(nn.Linear(4, 5)), tmp_path / "a", "0.lora_B must have the shape (5, 2), got (6, 2)")
    other = nn.Sequential(nn.Linear(4, 5))
    adapter = lora.read_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match=re.escape("its shape is (5, 4), and was (6, 4).")):
        adapter.modules["0"].base.check(other[0])


def test_a_transposed_base_is_another_though_it_is_square(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4))
    saved(tmp_path / "a", base, target_modules=["0"])
    with torch.no_grad():
        base[0].weight.copy_(base[0].weight.T.clone())
    refused(base, tmp_path / "a", "0: the base weight is not the one")


@pytest.mark.parametrize("format", ["lora", "peft", "portable"])
def test_every_format_knows_its_base(tmp_path, format):
    base = nn.Sequential(nn.Linear(4, 4, bias=False))
    _, model = saved(tmp_path / "x", base, target_modules=["0"])
    lora.save_adapter(model, tmp_path / "a", format=format)
    refused(nn.Sequential(nn.Linear(4, 4, bias=False)), tmp_path / "a", "0: the base weight is not the one")


def test_a_folder_of_pefts_own_has_nothing_to_compare(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4, bias=False))
    _, model = saved(tmp_path / "x", base, target_modules=["0"])
    lora.save_adapter(model, tmp_path / "a", format="peft")
    file = tmp_path / "a" / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file), file)  # as PEFT writes it, without metadata
    lora.load_adapter(nn.Sequential(nn.Linear(4, 4, bias=False)), tmp_path / "a")


def test_a_base_of_zeros_is_itself(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(base[0].weight)
    saved(tmp_path / "a", base, target_modules=["0"])
    lora.load_adapter(base, tmp_path / "a")


def test_a_weight_on_the_meta_device_has_a_shape_and_no_sample():
    with torch.device("meta"):
        layer = lora.Linear(4, 6, r=2)
    about = Base.of(layer)
    assert about.shape == (6, 4)
    assert about.sample is None


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=40).filter(lambda values: np.linalg.norm(values) > 1e-3),
    st.floats(0, 0.1),
)
def test_sampled_values_that_do_not_say_how_exact_they_are_may_differ_by_one_per_cent(values, change):
    layer = nn.Linear(len(values), 1, dtype=torch.float64)
    layer.weight.data = torch.tensor([values], dtype=torch.float64)
    sample = [values[k * (len(values) - 1) // 15] for k in range(16)]
    if np.linalg.norm(sample) < 1e-3 or abs(change / (1 + change) - 0.01) < 1e-6:
        return
    about = Base(kind="linear", sample=tuple(value * (1 + change) for value in sample))
    if change / (1 + change) > 0.01:
        with pytest.raises(ValueError, match="the base weight is not the one"):
            about.check(layer)
    else:
        about.check(layer)


def test_a_sample_beyond_floats_is_another():
    about = Base(kind="linear", sample=(1.7e308,) * 16)
    with pytest.raises(ValueError, match="the base weight is not the one"):
        about.check(nn.Linear(4, 4))
