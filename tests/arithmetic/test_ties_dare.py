"""The methods of combine that choose values: ties and dare against their papers, value by value."""

import math

import numpy as np
import pytest
import torch
from conftest import STORED
from dense import BLOCKS, adapter_of, assert_same, best, block_rank, dense, terms, total, with_module

import lora
from lora.arithmetic import combine

kinds = pytest.mark.parametrize("kind", STORED)


def ties_by_the_paper(updates, density):
    """arXiv:2306.01708, algorithm 1: trim, elect, disjoint mean; value by value."""
    trimmed = []
    for update in updates:
        threshold = np.sort(np.abs(update))[::-1][round(density * update.size) - 1]
        trimmed.append([value if abs(value) >= threshold else 0.0 for value in update])
    merged = []
    for values in zip(*trimmed, strict=True):
        sign = np.sign(sum(values))
        agreeing = [value for value in values if value and np.sign(value) == sign]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return np.array(merged)


def flat(kind, W):
    return np.concatenate([block.ravel() for block in BLOCKS[kind](W)])


@kinds
@pytest.mark.parametrize("density", [0.2, 0.5, 1])
def test_ties_is_the_papers(kind, density):
    adapters = terms(kind)
    result = combine(adapters, "ties", r=40, density=density)
    expected = ties_by_the_paper([flat(kind, weight * dense(adapter)) for adapter, weight in adapters], density)
    assert_same(flat(kind, dense(result)), expected)
    smaller = combine(adapters, "ties", r=2, density=density)
    for block, whole in zip(BLOCKS[kind](dense(smaller)), BLOCKS[kind](dense(result)), strict=True):
        assert_same(block, best(whole, block_rank(kind, 2))[0], scale=np.abs(whole).max())


def test_ties_of_opposite_updates_is_nothing():
    one = adapter_of("Linear")
    assert not dense(combine([(one, 1), (one, -1)], "ties", r=5)).any()


@kinds
def test_dare_drops_at_random_and_rescales(kind):
    adapters = terms(kind, (2, 2), (0.5, -1.5))
    a, b = (flat(kind, weight * dense(adapter)) for adapter, weight in adapters)
    seen = np.zeros((4, a.size), dtype=int)
    for seed in range(60):
        got = flat(kind, dense(combine(adapters, "dare", r=40, density=0.25, seed=seed)))
        differences = np.abs(np.stack([0 * a, a / 0.25, b / 0.25, (a + b) / 0.25]) - got)
        assert (differences.min(0) < 1e-9).all()
        seen[differences.argmin(0), np.arange(a.size)] += 1
    shares = seen.sum(1) / seen.sum()
    sigma = math.sqrt(0.25 / seen.sum())
    np.testing.assert_allclose(shares, [0.75**2, 0.25 * 0.75, 0.25 * 0.75, 0.25**2], rtol=0, atol=5 * sigma)
    assert_same(dense(combine(adapters, "dare", r=40, density=1)), total(adapters))


def test_dare_goes_by_the_seed_and_leaves_the_global_generator_alone():
    adapters = terms("Linear")
    state = torch.get_rng_state()
    one, same, other = (dense(combine(adapters, "dare", seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert (one == same).all()
    assert (one != other).any()


def test_dare_draws_anew_for_each_module():
    one = adapter_of("Linear")
    both = lora.Adapter({**one.modules, "1": one.modules["0"]}, {**one.tensors, **with_module(one, "0", "1").tensors})
    result = combine([(both, 1)], "dare", r=5)
    assert (dense(result, "0") != dense(result, "1")).any()
