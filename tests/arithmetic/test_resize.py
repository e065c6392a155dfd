"""resize against the singular values of dense matrices in numpy's float64."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import STORED, example, make
from dense import BLOCKS, adapter_of, assert_same, assert_unchanged, best, block_rank, constant, content, dense
from hypothesis import given
from hypothesis import strategies as st

import lora
from lora.arithmetic import resize

kinds = pytest.mark.parametrize("kind", STORED)


def kept_share(kind, W, q):
    """The share of all blocks' Σσ² that rank q keeps of each."""
    energies = [best(block, q)[1] for block in BLOCKS[kind](W)]
    return sum(energy[:q].sum() for energy in energies) / sum(energy.sum() for energy in energies)


@kinds
@given(data=st.data())
def test_a_smaller_rank_is_the_best_approximation(kind, data):
    r, smaller = data.draw(st.sampled_from([(6, 4), (6, 2), (4, 2), (8, 2)]))
    adapter = adapter_of(kind, r, scaling=data.draw(st.sampled_from([-0.7, 2.5])))
    before = content(adapter)
    result, kept = resize(adapter, smaller)
    settings, q = result.modules["0"], block_rank(kind, smaller)
    assert (settings["r"], settings["scaling"]) == (smaller, adapter.modules["0"]["scaling"])
    assert settings["lora_alpha"] == settings["scaling"] * smaller
    for block, approximation in zip(BLOCKS[kind](dense(adapter)), BLOCKS[kind](dense(result)), strict=True):
        assert_same(approximation, best(block, q)[0], scale=np.abs(block).max())
    assert kept == {"0": pytest.approx(kept_share(kind, dense(adapter), q), rel=1e-12)}
    assert_unchanged(adapter, before)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_larger_rank_or_the_same_keeps_every_bit(kind, dtype):
    adapter = adapter_of(kind, 2, dtype, use_rslora=True)
    for r in (2, 6):
        result, kept = resize(adapter, r)
        assert kept == {"0": 1.0}
        assert result.modules["0"]["r"] == r
        assert result.modules["0"]["lora_alpha"] == pytest.approx(adapter.modules["0"]["scaling"] * r**0.5)
        assert result.pair("0")[0].dtype == dtype
        assert_same(dense(result), dense(adapter))
        for name, tensor in result.tensors.items():  # padding aside
            assert torch.equal(tensor[tensor != 0], adapter.tensors[name][adapter.tensors[name] != 0])
    assert all(
        torch.equal(tensor, adapter.tensors[name]) for name, tensor in resize(adapter, 2).adapter.tensors.items()
    )


@kinds
@pytest.mark.parametrize("energy", [1e-6, 0.5, 0.9, 0.99, 1])
def test_energy_takes_the_smallest_rank_that_keeps_it(kind, energy):
    adapter = adapter_of(kind, 6)
    result, kept = resize(adapter, energy=energy)
    r, step = result.modules["0"]["r"], 2 if kind == "Conv2d factored" else 1
    W = dense(adapter)
    assert kept["0"] == pytest.approx(kept_share(kind, W, block_rank(kind, r)), rel=1e-12)
    assert kept["0"] >= energy - 1e-15
    assert r == step or kept_share(kind, W, block_rank(kind, r - step)) < energy


def test_an_energy_that_takes_every_rank_keeps_every_bit():
    adapter = adapter_of("Linear", 3)
    result, kept = resize(adapter, energy=1)
    assert kept == {"0": 1.0}
    assert all(torch.equal(tensor, adapter.tensors[name]) for name, tensor in result.tensors.items())


def test_the_share_is_that_of_squares_by_hand():
    adapter = adapter_of("Linear", 3, in_features=3, out_features=3, scaling=-5)
    adapter.tensors["0.lora_A"].data.copy_(torch.eye(3))
    adapter.tensors["0.lora_B"].data.copy_(torch.diag(torch.tensor([1.0, 3, 2])))
    for options, r, share in [({"r": 1}, 1, 9 / 14), ({"r": 2}, 2, 13 / 14), ({"energy": 0.9}, 2, 13 / 14)]:
        result, kept = resize(adapter, **options)
        assert (result.modules["0"]["r"], kept["0"]) == (r, pytest.approx(share))
    assert_same(dense(resize(adapter, 1).adapter), -5 * np.diag([0, 3, 0]))


def test_an_update_of_zeros_needs_the_least_rank_and_keeps_all():
    adapter = adapter_of("Conv2d factored", 6)
    adapter.tensors["0.lora_B"].data.zero_()
    result, kept = resize(adapter, energy=1)
    assert (result.modules["0"]["r"], kept) == (2, {"0": 1.0})
    assert not dense(result).any()
    assert resize(adapter, 4).kept == {"0": 1.0}


def test_ranks_beyond_the_weights_are_dropped_without_loss():
    adapter = adapter_of("Linear", 8, in_features=3, out_features=4)
    result, kept = resize(adapter, energy=1)
    assert (result.modules["0"]["r"], kept["0"]) == (3, 1)
    assert_same(dense(result), dense(adapter))


def test_what_trained_in_full_stays(tmp_path):
    adapter = adapter_of("Linear", 4)
    adapter.tensors["0.bias"] = torch.arange(5.0).double()
    adapter.trained_in_full.append("0.bias")
    result = resize(adapter, 1).adapter
    assert result.trained_in_full == ["0.bias"]
    assert torch.equal(result.tensors["0.bias"], adapter.tensors["0.bias"])
    result.tensors["0.bias"].zero_()
    assert adapter.tensors["0.bias"].any()


@kinds
def test_a_saved_result_computes_what_its_dense_update_says(kind, tmp_path):
    layer = make(kind, r=0).double()
    constant(layer)
    result = resize(adapter_of(kind, 6), 2).adapter
    lora.write_adapter(result, tmp_path / "adapter.safetensors")
    model, plain, x = nn.Sequential(copy.deepcopy(layer)), copy.deepcopy(layer), example(kind, torch.float64)
    lora.load_adapter(model, tmp_path / "adapter.safetensors")
    with torch.no_grad():
        plain.weight.add_(torch.from_numpy(dense(result).reshape(plain.weight.shape)))
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
