"""The two files of a folder are of one save, or are refused; an edit that decides nothing is fine."""

import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_models import QUIET, Net, by_peft
from saves import adapter, held, update

import lora
from lora.adapters import files
from lora.formats import peft_folder

pytestmark = QUIET
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
    lora.inject(model, target_modules=["0"], modules_to_save=["1"], r=2, lora_alpha=16, lora_dropout=0.25)
    torch.nn.init.ones_(model[0].lora_B)
    lora.save_adapter(model, folder / "saved", "peft")
    shutil.copytree(folder / "saved", folder / "damaged")
    return folder


@pytest.fixture
def saved(folder, tmp_path):
    return shutil.copytree(folder / "saved", tmp_path / "a")


def edited(folder, **fields):
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | fields), encoding="utf-8")


# ---- damaged -------------------------------------------------------------------------------------------------------


def flipped(folder, name, bit):
    content = bytearray((folder / "saved" / name).read_bytes())
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    (folder / "damaged" / name).write_bytes(content)


def is_refused_or_the_same(folder):
    try:
        read = lora.read_adapter(folder / "damaged")
    except lora.AdapterError:
        return True
    return update(read) == update(lora.read_adapter(folder / "saved"))


def every_bit(folder, step):
    bits = range(0, 8 * (folder / "saved" / CONFIG).stat().st_size, step)
    for bit in bits:
        flipped(folder, CONFIG, bit)
        assert is_refused_or_the_same(folder), f"bit {bit} may be flipped"
    shutil.copy(folder / "saved" / CONFIG, folder / "damaged" / CONFIG)
    return len(bits)


@pytest.mark.exhaustive
def test_no_flipped_bit_of_a_configuration_gives_another_function(folder):
    assert every_bit(folder, 1) > 3000


def test_no_flipped_bit_of_a_configuration_of_many_gives_another_function(folder):
    assert every_bit(folder, 29) > 100


@pytest.mark.parametrize("format", ["peft", "portable"])
@given(data=st.data())
def test_no_flipped_bit_of_the_weights_gives_another_function(folder, data, format):
    flipped(folder, WEIGHTS, data.draw(st.integers(0, 10**7)))
    assert is_refused_or_the_same(folder)
    shutil.copy(folder / "saved" / WEIGHTS, folder / "damaged" / WEIGHTS)


# ---- edited --------------------------------------------------------------------------------------------------------

HARMLESS = {
    "another path of the base model": {"base_model_name_or_path": "/models/mine"},
    "a task": {"task_type": "CAUSAL_LM"},
    "to train": {"inference_mode": False},
    "what lora does not know": {"peft_version": "0.18.0"},
    "what is a default": {"rank_pattern": None, "alpha_pattern": {}},
}


@pytest.mark.parametrize("fields", HARMLESS.values(), ids=HARMLESS)
def test_an_edit_that_decides_nothing_is_fine(saved, fields):
    before = lora.read_adapter(saved)
    edited(saved, **fields)
    after = lora.read_adapter(saved)
    assert update(after) == update(before)
    assert after.base_model == fields.get("base_model_name_or_path")


def test_another_order_of_names_is_fine(tmp_path):
    lora.write_adapter(adapter(2), tmp_path / "a", "peft")
    edited(tmp_path / "a", target_modules=["1", "0"])
    assert list(lora.read_adapter(tmp_path / "a").modules) == ["0", "1"]


DECIDES = {
    "lora_alpha": (32, "`lora_alpha` is 32, and was 16 when adapter_model.safetensors was written."),
    "r": (4, "`r` is 4, and was 2 when"),
    "lora_dropout": (0.5, "`lora_dropout` is 0.5, and was 0.25 when"),
    "use_rslora": (True, "`use_rslora` is True, and was False when"),
    "use_dora": (True, "`use_dora` is True, and was False when"),
    "fan_in_fan_out": (True, "`fan_in_fan_out` is True, and was False when"),
    "bias": ("all", "`bias` is 'all', and was 'none' when"),
    "rank_pattern": ({"0": 4}, "`rank_pattern` is not what it was when"),
    "alpha_pattern": ({"0": 4}, "`alpha_pattern` is not what it was when"),
    "target_modules": (["0", "2"], "`target_modules` is not what it was when"),
    "modules_to_save": (None, "`modules_to_save` is not what it was when"),
}


@pytest.mark.parametrize(("name", "value", "message"), [(name, *case) for name, case in DECIDES.items()], ids=DECIDES)
def test_an_edit_that_decides_the_function_is_refused_with_what_to_do(saved, name, value, message):
    edited(saved, **{name: value})
    for path in (saved, saved / WEIGHTS):
        with pytest.raises(lora.AdapterError) as caught:
            lora.read_adapter(path)
        assert str(caught.value).startswith(f"read_adapter: {saved} is not loaded, because\n")
        assert message in str(caught.value)
        assert f"If what it says is meant, name it: {saved / CONFIG}. If not, remove it" in str(caught.value)


def test_one_error_lists_all_that_was_edited(saved):
    edited(saved, lora_alpha=1, r=1, bias="lora_only")
    with pytest.raises(lora.AdapterError) as caught:
        lora.read_adapter(saved)
    assert str(caught.value).count("was written.") == 3


def test_an_edit_that_is_meant_counts_where_it_is_named(saved, folder):
    before = lora.read_adapter(saved).delta("0")
    edited(saved, lora_alpha=32)
    assert torch.equal(lora.read_adapter(saved / CONFIG).delta("0"), 2 * before)
    (saved / CONFIG).unlink()
    assert update(lora.read_adapter(saved)) == update(lora.read_adapter(folder / "saved"))


# ---- of two saves --------------------------------------------------------------------------------------------------


def test_weights_of_a_save_that_got_no_further_are_read_as_they_were_written(tmp_path):
    known = {"old": adapter(1), "new": adapter(2), "other": adapter(3)}
    for name, one in known.items():
        lora.write_adapter(one, tmp_path / name, "peft")
    shutil.copytree(tmp_path / "old", tmp_path / "a")
    known = {name: lora.read_adapter(tmp_path / name) for name in known}
    lora.write_adapter(known["new"], tmp_path / "a", "peft")
    shutil.copy(tmp_path / "old" / CONFIG, tmp_path / "a" / CONFIG)
    for path in (tmp_path / "a", tmp_path / "a" / CONFIG, tmp_path / "a" / WEIGHTS):
        assert held(path, known) == "new"
    lora.write_adapter(known["other"], tmp_path / "a", "peft")  # and saved over
    assert held(tmp_path / "a", known) == "other"
    shutil.copy(tmp_path / "new" / CONFIG, tmp_path / "a" / CONFIG)
    with pytest.raises(lora.AdapterError, match="was edited, or is damaged"):
        lora.read_adapter(tmp_path / "a")


def test_the_same_adapter_saved_again_says_the_same(tmp_path):
    for path in ("a", "a", "b"):
        lora.write_adapter(adapter(2), tmp_path / path, "peft")
    first, second = (files.read_header(tmp_path / path / WEIGHTS) for path in ("a", "b"))
    assert first == second
    assert (tmp_path / "a" / CONFIG).read_bytes() == (tmp_path / "b" / CONFIG).read_bytes()


@pytest.mark.parametrize("named", ["", CONFIG, WEIGHTS])
def test_a_reader_between_two_saves_reads_again(tmp_path, monkeypatch, named):
    known = {}
    for n, name in enumerate(("old", "new", "newer"), 1):
        lora.write_adapter(adapter(n), tmp_path / "a", "peft")
        known[name] = lora.read_adapter(tmp_path / "a")
    lora.write_adapter(known["old"], tmp_path / "a", "peft")
    real, times = peft_folder._config_in, []

    def then_twice(folder):
        text = real(folder)
        if not times:  # of "old"; the weights that are read are of "newer", written where "new" was
            times.append(folder)
            for name in ("new", "newer"):
                lora.write_adapter(known[name], folder, "peft")
        return text

    monkeypatch.setattr(peft_folder, "_config_in", then_twice)
    assert held(tmp_path / "a" / named, known) == "newer"


# ---- PEFT's --------------------------------------------------------------------------------------------------------


def test_peft_saves_over_a_folder_of_ours_and_we_over_one_of_pefts(tmp_path):
    base = Net()
    mine = by_peft(base, tmp_path / "theirs", r=4, lora_alpha=7, target_modules=["o"])
    by_peft(base, tmp_path / "a", r=2, target_modules=["qkv"])
    lora.write_adapter(lora.read_adapter(tmp_path / "a"), tmp_path / "a", "peft")
    assert lora.read_adapter(tmp_path / "a").modules["qkv"].r == 2
    mine.save_pretrained(tmp_path / "a")
    assert lora.read_adapter(tmp_path / "a").modules["o"].r == 4
    edited(tmp_path / "a", lora_alpha=14)  # nothing is bound
    assert lora.read_adapter(tmp_path / "a").modules["o"].lora_alpha == 14


def test_weights_without_settings_need_their_configuration(saved):
    tensors = safetensors.torch.load_file(saved / WEIGHTS)
    safetensors.torch.save_file(tensors, saved / WEIGHTS, {"format": "pt"})
    edited(saved, lora_alpha=32)
    assert lora.read_adapter(saved).modules["0"].lora_alpha == 32
    os.unlink(saved / CONFIG)
    with pytest.raises(FileNotFoundError, match=r"there is no adapter_config\.json"):
        lora.read_adapter(saved)
