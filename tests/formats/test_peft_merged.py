"""`enable_lora` of PEFT before 0.3, against its own grouped convolution."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exchange import peft_files, refuses, write_peft
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora

R, ALPHA = 2, 3  # as `write_peft` says them


def saved(folder, enabled, size, inputs=5):
    """A folder of PEFT's, and its update: its B was a convolution of two groups, whatever was enabled."""
    count = sum(enabled)
    A, B = torch.randn(R * count, inputs), torch.randn(size * count, R * count // 2, 1)
    update = np.zeros((size * len(enabled), inputs))
    rows = np.repeat(enabled, size)
    update[rows] = F.conv1d(A.double()[None], B.double(), groups=2)[0].numpy() * ALPHA / R
    tensors = {"0.lora_A.weight": A, "0.lora_B.weight": B}
    return write_peft(folder, tensors, enable_lora=enabled, merge_weights=False), update


@settings(deadline=None, max_examples=20)
@given(enabled=st.lists(st.booleans(), min_size=1, max_size=5).filter(any), size=st.integers(1, 3))
def test_the_update_is_that_of_its_convolution(tmp_path_factory, enabled, size):
    size *= 2  # of which two groups can be made
    path, update = saved(tmp_path_factory.mktemp("a") / "a", enabled, size)
    model = nn.Sequential(nn.Linear(5, len(update)))
    before = model[0].weight.detach().double().numpy().copy()
    lora.load_adapter(model, path)
    lora.merge(model)
    np.testing.assert_allclose(model[0].weight.detach().double().numpy() - before, update, rtol=1e-4, atol=1e-5)


def test_two_splits_are_merged_linears_own_form(tmp_path):
    path, update = saved(tmp_path / "a", [True, False, True], 4)
    adapter = lora.read_adapter(path)
    module = adapter.modules["0"]
    assert (module.r, module.splits, module.enable_lora) == (R, (4, 4, 4), (True, False, True))
    np.testing.assert_allclose(adapter.delta("0", torch.float64).numpy(), update, rtol=1e-6, atol=1e-6)
    model = nn.Sequential(nn.Linear(5, 12))
    lora.inject(model, target_modules=["0"], r=R, enable_lora={"0": [True, False, True]}, splits={"0": (4, 4, 4)})
    lora.load_adapter(model, path)  # into layers that are there
    np.testing.assert_allclose(lora.adapter_of(model).delta("0").numpy(), update, rtol=1e-5, atol=1e-5)


def test_today_it_is_written_as_one_pair(tmp_path):
    path, update = saved(tmp_path / "a", [True, True, True], 4)
    lora.write_adapter(lora.read_adapter(path), tmp_path / "b", "peft")
    config, _ = peft_files(tmp_path / "b")
    assert "enable_lora" not in config
    np.testing.assert_allclose(lora.read_adapter(tmp_path / "b").delta("0").numpy(), update, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("said", [1, "yes", [], [1, 0], [False, False], [True] * 65, {"0": True}], ids=str)
def test_what_it_must_say(tmp_path, said):
    tensors = {"0.lora_A.weight": torch.ones(4, 5), "0.lora_B.weight": torch.ones(4, 2, 1)}
    refuses(write_peft(tmp_path / "a", tensors, enable_lora=said), "`enable_lora` must ")


@pytest.mark.parametrize("shapes", [((4, 5), (4, 2)), ((2, 5), (4, 2, 1)), ((4, 5), (3, 2, 1)), ((4, 5), (4, 4, 1))])
def test_shapes_that_do_not_fit(tmp_path, shapes):
    A, B = map(torch.ones, shapes)
    path = write_peft(tmp_path / "a", {"0.lora_A.weight": A, "0.lora_B.weight": B}, enable_lora=[True, True])
    refuses(path, "do not fit r = 2 and `enable_lora` = [True, True].")
