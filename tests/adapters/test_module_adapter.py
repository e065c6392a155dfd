"""A module's adapter as an object: it reads as the mapping that a file holds, and cannot be changed."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from conftest import KINDS, make, randomised
from torch import nn

import lora
from lora.adapters.adapter import ModuleAdapter

SAID = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "scaling": 2.0}
BASE = {"kind": "linear", "shape": [2, 3]}


def module(**changes):
    return ModuleAdapter.from_mapping({**SAID, "base": BASE, **changes})


def test_it_reads_as_the_mapping_that_it_was_made_of():
    said = module(enable_lora=[True, False], splits=[1, 1])
    assert (said["r"], said.get("lora_alpha"), said["base"]["shape"], said["splits"]) == (4, 8, (2, 3), (1, 1))
    assert {**SAID, "enable_lora": (True, False)}.items() <= dict(said).items()
    assert "factored" not in said
    assert said.get("factored") is None
    assert said["base"].get("groups", 1) == 1
    with pytest.raises(KeyError):
        said["factored"]
    assert said == module(enable_lora=[True, False], splits=[1, 1]) != module()
    assert copy.deepcopy(said) == said == pickle.loads(pickle.dumps(said))


def test_a_file_may_leave_open_whether_there_is_a_magnitude():
    adapter = lora.Adapter(
        {"0": module(r=1, use_dora=None)}, {"0.lora_A": torch.ones(1, 3), "0.lora_B": torch.ones(2, 1)}
    )
    model = nn.Sequential(nn.Linear(3, 2))
    lora.load_adapter(model, adapter)
    assert model[0].use_dora is adapter.modules["0"]["use_dora"] is False


def test_a_mapping_that_is_put_in_later_is_named(tmp_path):
    adapter = lora.Adapter({"0": module(r=1)}, {"0.lora_A": torch.ones(1, 3), "0.lora_B": torch.ones(2, 1)})
    adapter.modules["0"] = {**SAID, "r": 1, "base": BASE}
    with pytest.raises(lora.AdapterError, match=r"`modules` must hold ModuleAdapters.*'0'"):
        lora.write_adapter(adapter, tmp_path / "a")
    assert not [*tmp_path.iterdir()]


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        module().r = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        module().base.shape = (1, 1)
    with pytest.raises(TypeError):
        module()["r"] = 2
    assert dataclasses.replace(module(), r=2).r == 2


@pytest.mark.parametrize("kind", KINDS)
def test_that_of_a_layer_is_written_and_read_as_it_is(kind, tmp_path):
    model = nn.Sequential(randomised(make(kind)))
    adapter = lora.adapter_of(model)
    lora.write_adapter(adapter, tmp_path / "a")
    read = lora.read_adapter(tmp_path / "a")
    assert read.modules == adapter.modules
    assert list(read.modules["0"]) == list(adapter.modules["0"])


def test_what_a_later_release_says_is_written_again(tmp_path):
    later = module(base={**BASE, "note": "x"}, r=1, scaling=8.0, colour="red")
    adapter = lora.Adapter({"up": later}, {"up.lora_A": torch.ones(1, 3), "up.lora_B": torch.ones(2, 1)})
    lora.write_adapter(adapter, tmp_path / "a")
    again = lora.read_adapter(tmp_path / "a").modules["up"]
    assert (again["colour"], again["base"]["note"]) == ("red", "x")
    assert again.at_rank(2)["colour"] == "red"


@pytest.mark.parametrize(("use_rslora", "root"), [(False, 1), (True, 2)])
def test_another_rank_keeps_the_scaling(use_rslora, root):
    other = module(use_rslora=use_rslora).at_rank(9)
    assert (other.r, other.scaling, other.lora_alpha) == (9, 2.0, 2.0 * 9 ** (1 / root))
    with pytest.raises(ValueError, match="takes a `lora_alpha` beyond floats"):
        module(scaling=1e308).at_rank(9)


def test_what_is_no_mapping_is_refused():
    with pytest.raises(TypeError, match="`modules` must map names to mappings of settings, not so for up"):
        lora.Adapter({"up": 3}, {})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scaling": math.nan}, "`scaling` must be a finite number, got nan."),
        ({"splits": "ab"}, "`splits` must be a list of numbers, got 'ab'."),
        ({"enable_lora": [True, "no"]}, "`enable_lora` must be a list of numbers, got (True, 'no')."),
        ({"base": 3}, "`base` must describe the base weight, got 3."),
        ({"base": {"shape": [2, 3]}}, "`base` must describe the base weight, got {"),
    ],
)
def test_what_is_wrong_with_it_is_said(changes, problem):
    assert any(said.startswith(problem) for said in module(**changes).problems())
