"""The forms that adapters are exchanged in, against float64 numpy built by hand; no other library is needed here."""

import copy
import dataclasses
import math
import os
import tempfile
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import STORED, make, randomised, update
from exchange import (
    FORMATS,
    PREFIX,
    alone,
    close,
    float64,
    layers,
    model_of,
    peft_files,
    refused,
    scaling,
    single_update,
    true_update,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora
from lora.formats.portable import portable

# ---- one A and one B -------------------------------------------------------------------------------------------


@given(layers())
def test_the_update_of_an_adapter_without_its_model_is_the_equations(layer):
    adapter = alone(layer)
    got = adapter.delta("0", torch.float64)
    assert got.shape == layer.weight.shape
    close(got.detach().numpy(), true_update(layer))


@given(layers(), st.floats(-3, 3))
def test_a_scaling_set_by_hand_counts(layer, by_hand):
    expected = true_update(layer) / layer.scaling * by_hand
    layer.scaling = by_hand
    adapter = alone(layer)
    close(adapter.delta("0", torch.float64).detach().numpy(), expected)
    settings, A, B = adapter.modules["0"].single(*adapter.pair("0"))
    close(single_update(settings, A, B), expected)


@given(layers())
def test_a_single_pair_has_the_same_update_and_says_its_scaling_in_r_and_lora_alpha(layer):
    adapter = alone(layer)
    before = copy.deepcopy(adapter)
    settings, A, B = adapter.modules["0"].single(*adapter.pair("0"))
    assert settings["r"] == len(A)
    assert settings["scaling"] == layer.scaling
    close(scaling(settings), layer.scaling)
    close(single_update(settings, A, B), true_update(layer))
    assert adapter.modules == before.modules
    assert all(torch.equal(adapter.tensors[name], before.tensors[name]) for name in before.tensors)


@given(layers(kinds=["MergedLinear"]))
def test_of_a_merged_layer_A_is_copied_and_B_is_block_diagonal_with_zero_rows(layer):
    adapter = alone(layer)
    settings, A, B = adapter.modules["0"].single(*adapter.pair("0"))
    G = sum(layer.enable_lora)
    assert torch.equal(A, layer.lora_A)
    assert B.shape == (layer.out_features, G * layer.r)
    expected, g, b = torch.zeros_like(B), 0, 0
    starts = [0, *accumulate(layer.splits)]
    for start, size, enabled in zip(starts, layer.splits, layer.enable_lora, strict=False):
        if enabled:
            expected[start : start + size, g * layer.r : (g + 1) * layer.r] = layer.lora_B[b : b + size]
            g, b = g + 1, b + size
    assert torch.equal(B, expected)
    assert settings["r"] == G * layer.r
    grown = math.sqrt(G) if layer.use_rslora else G
    close(settings["lora_alpha"], grown * layer.lora_alpha)
    assert not {"splits", "enable_lora"} & settings.keys()


@given(layers(kinds=["Conv"]))
def test_of_loralibs_convolutions_the_rank_grows_with_the_blocks_and_the_groups(layer):
    settings, A, B = alone(layer).modules["0"].single(*alone(layer).pair("0"))
    k, n, groups = layer.kernel_size[0], len(layer.kernel_size), layer.groups
    grown = k ** (2 * (n // 2)) * groups**2
    assert settings["r"] == layer.r * grown
    close(settings["lora_alpha"], layer.lora_alpha * (math.sqrt(grown) if layer.use_rslora else grown))
    assert A.shape == (settings["r"], layer.in_channels // groups, *layer.kernel_size)
    assert B.shape == (layer.out_channels, settings["r"] // groups, *[1] * n)
    assert settings["factored"] is True


@given(st.lists(layers(), min_size=1, max_size=3))
def test_the_portable_form_has_one_rank_and_a_scaling_of_1_and_the_same_updates(several):
    adapter = lora.adapter_of(model_of(*several))
    made = portable(adapter)
    ranks = {settings["r"] for settings in made.modules.values()}
    assert len(ranks) == 1
    for i, layer in enumerate(several):
        settings, (A, B) = made.modules[str(i)], made.pair(str(i))
        assert settings["lora_alpha"] == settings["r"] == len(A)
        assert settings["scaling"] == 1
        assert settings["use_rslora"] is False
        groups = settings["base"].get("groups", 1)
        assert B.shape[1] * groups == len(A)
        close(single_update(settings, A, B), true_update(layer))


def test_the_portable_rank_is_the_largest_and_no_larger_than_groups_make_it():
    model = nn.Sequential(nn.Linear(4, 12), nn.Conv1d(6, 6, 3, groups=3))
    lora.inject(model, target_modules=["0", "1"], r=2, rank_pattern={"1": 3}, splits={"0": (8, 4)}, factored=True)
    assert portable(lora.adapter_of(model)).modules["0"]["r"] == 6  # the largest is 4, and groups of 3 divide it
    del model[1]
    assert portable(lora.adapter_of(model)).modules["0"]["r"] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_the_scaling_rounds_no_further_than_float32_does(dtype):
    layer = randomised(lora.Linear(5, 6, r=3, lora_alpha=7, dtype=dtype))
    made = portable(alone(layer))
    assert all(tensor.dtype == torch.float32 for tensor in made.tensors.values())
    close(single_update(made.modules["0"], *made.pair("0")), update(layer), 1e-6)


def test_the_portable_form_refuses_all_that_trains_in_full(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    lora.inject(model, target_modules=["a"], modules_to_save=["b"], bias="lora_only")
    expected = ["a.bias trains in full.", "b.weight trains in full.", "b.bias trains in full."]
    message = refused(lambda: lora.save_adapter(model, tmp_path / "a", format="portable"), *expected)
    assert message.count("\n") == 3
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("format", ["peft", "portable"])
def test_a_kind_of_the_users_own_has_a_form_of_loras_only(tmp_path, format):
    adapter = alone(lora.Linear(4, 4, r=2))
    modules = {"0": {**adapter.modules["0"], "base": {"kind": "Mine", "shape": [4, 4]}}}
    mine = dataclasses.replace(adapter, modules=modules)
    refused(lambda: lora.write_adapter(mine, tmp_path / "a", format), "0: is of the kind Mine, which only its model")
    lora.write_adapter(mine, tmp_path / "a")


def test_scalings_that_a_format_cannot_say_are_refused(tmp_path):
    layer = randomised(lora.Linear(4, 4, r=2))
    nn.init.constant_(layer.lora_B, 1e30)
    layer.scaling = 1e30
    refused(lambda: lora.save_adapter(model_of(layer), tmp_path / "a", format="portable"), "0.lora_B holds")
    adapter = lora.adapter_of(model_of(layer))
    modules = {"0": {**adapter.modules["0"], "scaling": 1.7e308}}  # no layer takes it
    refused(
        lambda: lora.write_adapter(dataclasses.replace(adapter, modules=modules), tmp_path / "a", format="peft"),
        "0: `scaling` must be a finite number of",
    )
    assert not os.listdir(tmp_path)


# ---- through files ---------------------------------------------------------------------------------------------


@given(st.lists(layers(dtype=torch.float32), min_size=1, max_size=3), st.lists(st.sampled_from(FORMATS), max_size=3))
def test_updates_stay_through_any_formats(several, formats):
    transposed = {bool(getattr(layer, "fan_in_fan_out", False)) for layer in several if isinstance(layer, nn.Linear)}
    if len(transposed) > 1:  # PEFT's configuration has one word for all layers; without it a model says it
        several = [layer for layer in several if not getattr(layer, "fan_in_fan_out", False)]
    model = model_of(*several)
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(model, Path(folder, "start"))
        adapter = lora.read_adapter(Path(folder, "start"))
        for i, format in enumerate(formats):
            before = copy.deepcopy(adapter)
            lora.write_adapter(adapter, Path(folder, str(i)), format)
            assert before.modules == adapter.modules
            assert all(torch.equal(adapter.tensors[name], before.tensors[name]) for name in before.tensors)
            adapter = lora.read_adapter(Path(folder, str(i)))
    for i, layer in enumerate(several):
        close(adapter.delta(str(i), torch.float64).numpy(), true_update(layer), 2e-6)


def test_peft_and_back_keeps_a_and_b_and_scalings_to_the_bit_where_there_is_one_pair(tmp_path):
    model = nn.Sequential(nn.Linear(4, 6), nn.Embedding(5, 3), nn.Conv2d(4, 6, (3, 1), groups=2))
    lora.inject(model, target_modules=["0", "1", "2"], r=4, alpha_pattern={"1": 0.3, "2": 7}, factored=True)
    for module in model:
        randomised(module)
    before = lora.adapter_of(model)
    lora.write_adapter(before, tmp_path / "a", "peft")
    after = lora.read_adapter(tmp_path / "a")
    assert after.format == "peft"
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
    for name, settings in after.modules.items():
        for key in ("r", "lora_alpha", "scaling"):
            assert settings[key] == before.modules[name][key]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pefts_names_and_configuration(tmp_path, use_rslora):
    model = nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4, bias=False)})})
    model.update({"emb": nn.Embedding(7, 4), "conv": nn.Conv1d(4, 6, 3, groups=2), "head": nn.LayerNorm(4)})
    fields = {"rank_pattern": {"attn.q": 6}, "alpha_pattern": {"emb": 3}, "modules_to_save": ["head"]}
    lora.inject(
        model,
        target_modules=["q", "k", "emb", "conv"],
        r=2,
        lora_dropout=0.1,
        bias="lora_only",
        factored=True,
        use_rslora=use_rslora,
        **fields,
    )
    lora.save_adapter(model, tmp_path / "a", format="peft")
    config, tensors = peft_files(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{PREFIX}attn.q.lora_A.weight": (6, 4),
        f"{PREFIX}attn.q.lora_B.weight": (4, 6),
        f"{PREFIX}attn.q.base_layer.bias": (4,),
        f"{PREFIX}attn.k.lora_A.weight": (2, 4),
        f"{PREFIX}attn.k.lora_B.weight": (4, 2),
        f"{PREFIX}emb.lora_embedding_A": (2, 7),
        f"{PREFIX}emb.lora_embedding_B": (4, 2),
        f"{PREFIX}conv.lora_A.weight": (2, 4, 3),
        f"{PREFIX}conv.lora_B.weight": (6, 1, 1),
        f"{PREFIX}conv.base_layer.bias": (6,),
        f"{PREFIX}head.weight": (4,),
        f"{PREFIX}head.bias": (4,),
    }
    expected = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "use_rslora": use_rslora,
        "fan_in_fan_out": False,
        "target_modules": ["attn.q", "attn.k", "emb", "conv"],
        "rank_pattern": {r"^attn\.q": 6},
        "alpha_pattern": {"^emb": 3},
        "modules_to_save": ["head"],
        "bias": "lora_only",
        "base_model_name_or_path": None,
    }
    assert {key: config[key] for key in expected} == expected


def test_a_convolutions_A_has_zeros_for_the_channels_of_other_groups(tmp_path):
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2))
    lora.inject(model, target_modules=["0"], r=2, factored=True)
    lora.save_adapter(model, tmp_path / "a", format="peft")
    A = peft_files(tmp_path / "a")[1][f"{PREFIX}0.lora_A.weight"]
    assert torch.equal(A[0, :2], model[0].lora_A[0])
    assert torch.equal(A[1, 2:], model[0].lora_A[1])
    assert not A[0, 2:].any()
    assert not A[1, :2].any()


def test_a_target_that_is_the_end_of_another_name_is_written_as_a_whole(tmp_path):
    model = nn.ModuleDict({"o": nn.Linear(4, 4), "block+": nn.ModuleDict({"o": nn.Linear(4, 4), "a": nn.Linear(4, 4)})})
    lora.inject(model, target_modules=r"o|block\+\.a", r=2)
    lora.save_adapter(model, tmp_path / "a", format="peft")
    assert peft_files(tmp_path / "a")[0]["target_modules"] == r"o|block\+\.a"


def test_a_config_with_what_is_not_ascii_is_utf8(tmp_path):
    model = nn.ModuleDict({"größe": nn.Linear(4, 4)})
    lora.inject(model, target_modules=["größe"], r=2)
    lora.save_adapter(model, tmp_path / "a", format="peft")
    assert peft_files(tmp_path / "a")[0]["target_modules"] == ["größe"]
    lora.load_adapter(model, tmp_path / "a")


def test_what_trains_in_full_and_has_no_place_in_pefts_format_is_refused(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.LayerNorm(4)})
    lora.inject(model, target_modules=["a"], r=2)
    model["b"].weight.requires_grad_(True)
    model["c"].weight.requires_grad_(True)
    model["c"].bias.requires_grad_(True)
    message = refused(
        lambda: lora.save_adapter(model, tmp_path / "a", format="peft"),
        "b.weight is trained on its own",
        "c.weight is tra",
    )
    assert "c.bias" not in message
    assert not (tmp_path / "a").exists()


def test_a_model_that_is_the_adapted_layer_itself_has_no_name_in_pefts_format(tmp_path):
    model = nn.Linear(4, 4)
    lora.inject(model, target_modules="all-linear", r=2)
    for format in ("peft", "portable"):
        refused(lambda format=format: lora.save_adapter(model, tmp_path / "a", format=format), "is itself the layer")
    assert not (tmp_path / "a").exists()


def test_folders_that_are_not_there_or_are_files(tmp_path):
    adapter = alone(lora.Linear(4, 4, r=2))
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="it is a file, and must be a folder"):
        lora.write_adapter(adapter, tmp_path / "file", "peft")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        lora.write_adapter(adapter, tmp_path / "a" / "b", "peft")
    with pytest.raises(ValueError, match="`format` must be one of 'lora', 'diffusers', 'peft', 'portable', got 'PEFT'"):
        lora.write_adapter(adapter, tmp_path / "a", "PEFT")


def test_a_folder_is_written_again(tmp_path):
    first, second = (alone(randomised(lora.Linear(4, 4, r=r))) for r in (2, 3))
    lora.write_adapter(first, tmp_path / "a", "peft")
    lora.write_adapter(second, tmp_path / "a", "peft")
    assert lora.read_adapter(tmp_path / "a").modules["0"]["r"] == 3
    assert len(os.listdir(tmp_path / "a")) == 2


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", ""])
def test_a_folder_may_be_named_by_its_files(tmp_path, name):
    lora.write_adapter(alone(lora.Linear(4, 4, r=2)), tmp_path / "a", "peft")
    assert lora.read_adapter(str(tmp_path / "a" / name)).format == "peft"


def test_another_file_in_a_folder_of_pefts_is_itself(tmp_path):
    lora.write_adapter(alone(lora.Linear(4, 4, r=2)), tmp_path / "a", "peft")
    lora.write_adapter(alone(lora.Linear(4, 4, r=3)), tmp_path / "a" / "mine.safetensors")
    assert lora.read_adapter(tmp_path / "a" / "mine.safetensors").modules["0"]["r"] == 3
    with pytest.raises(FileNotFoundError, match="there is no file"):
        lora.read_adapter(tmp_path / "a" / "other.safetensors")


@given(
    st.sampled_from(["r", "scaling", "splits", "enable_lora", "factored", "base", "shape", "kind", "groups"]), st.data()
)
def test_whatever_is_said_of_a_module_is_written_as_peft_or_refused(key, data):
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["linear", "embedding", "conv", "x"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "shape"]), inner),
        max_leaves=4,
    )
    adapter = alone(randomised(lora.MergedLinear(4, 4, r=2, enable_lora=[True, True])))
    modules = {"0": {**adapter.modules["0"], "base": dict(adapter.modules["0"].base)}}
    said = modules["0"]["base"] if key in ("shape", "kind", "groups") else modules["0"]
    said[key] = data.draw(anything)
    changed = dataclasses.replace(adapter, modules=modules)
    with tempfile.TemporaryDirectory() as folder:
        try:
            lora.write_adapter(changed, Path(folder, "a"), "peft")
        except lora.AdapterError:
            assert not os.listdir(folder)
        else:
            close(lora.read_adapter(Path(folder, "a")).delta("0").numpy(), changed.delta("0").detach().numpy(), 1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [([4], "two sizes"), ([1, 2, 4], "two sizes"), ([], "two sizes"), ([2**39, 2**39], "positive integers")],
)
def test_shapes_that_no_weight_has_are_refused_in_words(tmp_path, shape, message):
    adapter = alone(lora.Linear(4, 4, r=2))
    module = adapter.modules["0"]
    adapter.modules["0"] = dataclasses.replace(module, base=dataclasses.replace(module.base, shape=tuple(shape)))
    refused(lambda: lora.write_adapter(adapter, tmp_path / "a", "peft"), message)


@pytest.mark.parametrize("kind", [kind for kind in STORED if kind != "Linear transposed"])  # no plain layer is
@pytest.mark.parametrize("format", FORMATS)
def test_every_kind_of_layer_goes_into_a_plain_model(tmp_path, kind, format):
    layer = make(kind)
    model, plain = model_of(layer), nn.Sequential(copy.deepcopy(layer))
    lora.eject(plain)
    lora.save_adapter(model, tmp_path / "a", format=format)
    lora.load_adapter(plain, tmp_path / "a")
    close(float64(lora.adapter_of(plain).delta("0")), update(layer), 2e-6)
