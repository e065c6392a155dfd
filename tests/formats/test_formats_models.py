"""Adapters of other formats in models: exact or refused; no other library is needed here."""

import copy
import math
import tempfile
import time
from itertools import accumulate
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import randomised, update
from exchange import (
    close,
    float64,
    layers,
    peft_files,
    refused,
    values,
    write_peft,
)
from hypothesis import given
from hypothesis import strategies as st
from pairwise import every_two
from torch import nn
from toy_model import snapshot

import lora
from lora.adapters.renaming import renamed
from lora.errors import Problems

# ---- into models -----------------------------------------------------------------------------------------------


def models(**fields):
    """A base, and two models of it with LoRA: one trained, one that is to take that over."""
    torch.manual_seed(1)
    base = nn.ModuleDict({"qkv": nn.Linear(5, 12), "o": nn.Linear(4, 4), "conv": nn.Conv2d(4, 4, (3, 1), groups=2)})
    fields = {"r": 2, "splits": {"qkv": (6, 4, 2)}, "enable_lora": {"qkv": (True, False, True)}} | fields
    lora.inject(base, target_modules=["qkv", "o", "conv"], rank_pattern={"o": 9}, factored=True, **fields)
    trained, other = copy.deepcopy(base), copy.deepcopy(base)
    for module in (*trained.values(), *other.values()):
        randomised(module)
    return trained, other


def state(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("format", ["peft", "portable"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_model_takes_its_own_a_and_b_back_to_the_bit(tmp_path, format, use_rslora):
    trained, other = models(use_rslora=use_rslora)
    trained["qkv"].scaling = trained["o"].scaling = trained["conv"].scaling = 4.0  # folding it is exact
    lora.save_adapter(trained, tmp_path / "a", format=format)
    lora.load_adapter(other, tmp_path / "a")
    fold = 4 if format == "portable" else 1
    for name, tensor in state(trained).items():
        assert torch.equal(state(other)[name], tensor * (fold if name.endswith("lora_B") else 1)), name
    assert {module.scaling for module in other.values()} == {4 / fold}
    assert other["qkv"].splits == (6, 4, 2)


@pytest.mark.parametrize("zero", [[0], [1], [0, 1]], ids=["first", "second", "both"])
@pytest.mark.parametrize("format", ["peft", "portable"])
def test_an_a_whose_b_is_still_zero_comes_back_as_well(tmp_path, format, zero):
    trained, other = models()
    with torch.no_grad():
        for g, (start, stop) in enumerate([(0, 6), (6, 8)]):
            trained["qkv"].lora_B[start:stop] *= g not in zero
    lora.save_adapter(trained, tmp_path / "a", format=format)
    lora.load_adapter(other, tmp_path / "a")
    assert torch.equal(other["qkv"].lora_A, trained["qkv"].lora_A)


@given(layers(kinds=["MergedLinear"]), st.integers(0, 2), st.booleans())
def test_a_merged_layer_takes_one_a_for_every_split_and_its_rows_of_b(layer, padding, use_rslora):
    A, B = values(layer.r, layer.in_features), values(layer.out_features, layer.r)
    for start, size, enabled in zip(accumulate((0, *layer.splits[:-1])), layer.splits, layer.enable_lora, strict=True):
        B[start : start + size] *= enabled
    wide_A = torch.cat([A, torch.zeros(padding, layer.in_features, dtype=A.dtype)])
    wide_B = torch.cat([B, torch.zeros(layer.out_features, padding, dtype=A.dtype)], 1)
    with tempfile.TemporaryDirectory() as folder:
        tensors = {"0.lora_A.weight": wide_A, "0.lora_B.weight": wide_B}
        path = write_peft(Path(folder, "a"), tensors, r=layer.r + padding, use_rslora=use_rslora)
        lora.load_adapter(nn.Sequential(layer), path)
    assert torch.equal(layer.lora_A, A.repeat(sum(layer.enable_lora), 1))
    s = 3 / (math.sqrt(layer.r + padding) if use_rslora else layer.r + padding)
    assert layer.scaling == s
    expected = s * B.numpy() @ A.numpy()
    close(update(layer) * s / (layer.lora_alpha / layer.r), expected.T if layer.fan_in_fan_out else expected)


def test_an_update_that_the_models_form_cannot_hold_is_refused(tmp_path):
    _, other = models()
    write_peft(tmp_path / "a", {"qkv.lora_A.weight": torch.ones(2, 5), "qkv.lora_B.weight": torch.ones(12, 2)})
    del other["o"], other["conv"]
    before = snapshot(other)
    refused(lambda: lora.load_adapter(other, tmp_path / "a"), "qkv: has an update in the file that the model's splits")
    mixed = torch.ones(12, 4)
    write_peft(tmp_path / "a", {"qkv.lora_A.weight": torch.ones(4, 5), "qkv.lora_B.weight": mixed}, r=4)
    refused(lambda: lora.load_adapter(other, tmp_path / "a"), "qkv: has an update in the file that the model's splits")
    write_peft(tmp_path / "a", {"qkv.lora_A.weight": torch.ones(3, 5), "qkv.lora_B.weight": mixed[:, :3]}, r=3)
    refused(lambda: lora.load_adapter(other, tmp_path / "a"), "qkv: `r` is 3 in the file and 2 in the model.")
    write_peft(tmp_path / "a", {"qkv.lora_A.weight": torch.ones(2, 5), "qkv.lora_B.weight": torch.ones(11, 2)})
    refused(
        lambda: lora.load_adapter(other, tmp_path / "a"), "qkv: `splits` (=(6, 4, 2)) must add up to the 11 outputs"
    )
    assert snapshot(other) == before


def test_rank_that_adds_something_is_never_left_out(tmp_path):
    model = nn.Sequential(lora.Linear(4, 4, r=2))
    A, B = torch.zeros(3, 4), torch.zeros(4, 3)
    A[2, 0] = B[0, 2] = 1e-30
    write_peft(tmp_path / "a", {"0.lora_A.weight": A, "0.lora_B.weight": B}, r=3)
    refused(lambda: lora.load_adapter(model, tmp_path / "a"), "0: `r` is 3 in the file and 2 in the model.")
    B[0, 2] = 0
    write_peft(tmp_path / "a", {"0.lora_A.weight": A, "0.lora_B.weight": B}, r=3)
    lora.load_adapter(model, tmp_path / "a")
    assert model[0].scaling == 1


def test_an_unfactored_convolution_takes_no_factored_pair(tmp_path):
    model = nn.Sequential(lora.Conv2d(4, 4, 3, r=2))
    lora.save_adapter(model, tmp_path / "a", format="peft")
    refused(
        lambda: lora.load_adapter(model, tmp_path / "a"), "0: `factored` is True in the file and False in the model"
    )
    plain = nn.Sequential(copy.deepcopy(model[0]))
    lora.eject(plain)
    lora.load_adapter(plain, tmp_path / "a")
    close(float64(lora.adapter_of(plain).delta("0")), float64(lora.adapter_of(model).delta("0")), 1e-6)


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize(("theirs", "ours"), [("embedding_", nn.Linear(5, 7)), ("", nn.Embedding(5, 7))])
def test_an_adapter_for_another_kind_of_layer_is_refused_though_its_shapes_fit(tmp_path, theirs, ours, injected):
    end = "" if theirs else ".weight"
    write_peft(tmp_path / "a", {f"0.lora_{theirs}A{end}": torch.ones(2, 5), f"0.lora_{theirs}B{end}": torch.ones(7, 2)})
    model = nn.Sequential(copy.deepcopy(ours))
    if injected:
        lora.inject(model, target_modules=["0"], r=2)
    before = snapshot(model)
    refused(lambda: lora.load_adapter(model, tmp_path / "a", check_base=False), "0: has an adapter of the kind")
    assert snapshot(model) == before


@pytest.mark.parametrize("injected", [False, True])
def test_values_are_cast_to_the_models_dtype_if_none_changes(tmp_path, injected):
    exact, rounded = torch.full((2, 4), 1.5), torch.full((2, 4), 1 / 3)
    for A, fits in ((exact, True), (rounded, not injected)):
        model = nn.Sequential(nn.Linear(4, 4))
        if injected:
            lora.inject(model, target_modules=["0"], r=2, adapter_dtype=torch.bfloat16)
        write_peft(tmp_path / "a", {"0.lora_A.weight": A, "0.lora_B.weight": torch.ones(4, 2)})
        if fits:
            lora.load_adapter(model, tmp_path / "a")
            assert torch.equal(model[0].lora_A.float(), A)
            assert model[0].lora_A.dtype == (torch.bfloat16 if injected else torch.float32)
        else:
            refused(
                lambda model=model: lora.load_adapter(model, tmp_path / "a"),
                "must be of dtype torch.bfloat16, got torch",
            )


@every_two(
    prefix=["", "module.", "_orig_mod.", "base_model.model.", "module._orig_mod.base_model.model."],
    wrap={"plain": lambda m: m, "parallel": nn.DataParallel, "compiled": lambda m: torch.compile(m, backend="eager")},
    injected=[False, True],
)
def test_prefixes_of_wrappers_do_not_count(tmp_path, prefix, wrap, injected):
    model = nn.ModuleDict({"a": nn.ModuleDict({"module": nn.Linear(4, 4)}), "head": nn.Linear(4, 2)})
    model.register_parameter("token", nn.Parameter(torch.zeros(3)))
    if injected:
        lora.inject(model, target_modules=["a.module"], modules_to_save=["head"], r=2)
    tensors = {"a.module.lora_A": torch.full((2, 4), 2.0), "a.module.lora_B": torch.full((4, 2), 3.0)}
    tensors |= {"head.weight": torch.ones(2, 4), "head.bias": torch.ones(2), "token": torch.full((3,), 5.0)}
    safetensors.torch.save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "a")
    lora.load_adapter(wrap(model), tmp_path / "a", lora_alpha=4)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert model["a"]["module"].scaling == 2


def test_two_names_for_one_module_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    tensors = {f"{prefix}0.lora_{part}": torch.ones(4, 4) for prefix in ("", "module.") for part in "AB"}
    tensors |= {"module.0.bias": torch.ones(4), "0.bias": torch.ones(4)}
    safetensors.torch.save_file(tensors, tmp_path / "a")
    before = snapshot(model)
    messages = ("0, module.0: several names for 0.", "0.bias, module.0.bias: several names for 0.bias.")
    refused(lambda: lora.load_adapter(model, tmp_path / "a", lora_alpha=4), *messages)
    assert snapshot(model) == before


def test_names_are_compared_in_one_pass():
    names = [f"experts.{n}" for n in range(4_000)]
    rest = {f"{name}.{own}": {"shape": [1], "sample": [0.0]} for name in names for own in ("weight", "bias")}
    began = time.process_time()
    renamed(lora.Adapter({}, {}, rest=rest), dict.fromkeys(names, nn.Identity()), Problems("load_adapter"))
    assert time.process_time() - began < 3  # each with each would be 6 · 10⁷ comparisons: ten times as long


@pytest.mark.parametrize("format", ["peft", "portable"])
@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models_are_saved_under_their_own_names(tmp_path, wrap, format):
    trained, other = models()
    lora.save_adapter(wrap(trained), tmp_path / "a", format=format)
    assert set(peft_files(tmp_path / "a")[0]["target_modules"]) == {"qkv", "o", "conv"}
    lora.load_adapter(other, tmp_path / "a")
    assert torch.equal(other["qkv"].lora_A, trained["qkv"].lora_A)


@pytest.mark.parametrize("format", ["peft", "portable"])
def test_models_with_more_or_less_lora_than_the_file_are_refused(tmp_path, format):
    trained, other = models()
    lora.save_adapter(trained, tmp_path / "a", format=format)
    less = copy.deepcopy(other)
    del less["o"]
    before = snapshot(less)
    refused(lambda: lora.load_adapter(less, tmp_path / "a"), "o: there is no such module in the model.")
    assert snapshot(less) == before
    other["more"] = lora.Linear(4, 4, r=2)
    before = snapshot(other)
    refused(
        lambda: lora.load_adapter(other, tmp_path / "a"), "more: has LoRA in the model, and no adapter in the file."
    )
    assert snapshot(other) == before
