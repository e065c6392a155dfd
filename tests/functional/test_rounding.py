"""Rounding for inputs: less of the products' error than to nearest, in no row more; GPTQ's own arithmetic first."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lora.functional import rounding
from lora.functional.rounding import lost_in_rows, round_for_inputs

HALVES = [torch.bfloat16, torch.float16]


def inputs(columns, n=2000):
    """Rows of which a few directions hold most of the variance, as of the inputs of a model's layers."""
    mixing = torch.randn(columns, columns).double() * torch.linspace(0.02, 1, columns).double() ** 2
    return torch.randn(n, columns).double() @ mixing.T + 0.3


def moments_of(x):
    return x.T @ x / len(x)


def updated(rows, columns, dtype, share=0.005):
    """A weight on the dtype's grid and a small update of low rank, in float64."""
    weight = torch.randn(rows, columns).to(dtype).double()
    update = torch.randn(rows, 3).double() @ torch.randn(3, columns).double()
    return weight + update * share / update.square().mean().sqrt()


def errors(weight, rounded, x):
    """Σ ((W − Q) x)² of each row, in numpy and float64."""
    return (((weight - rounded.double()).numpy() @ x.numpy().T) ** 2).sum(1)


@pytest.mark.parametrize("dtype", HALVES)
def test_products_with_correlated_inputs_keep_more(dtype):
    x, weight = inputs(150), updated(12, 150, dtype)
    rounded = round_for_inputs(weight.float(), moments_of(x).float(), dtype)
    assert rounded.dtype == dtype
    ours, nearest = errors(weight, rounded, x), errors(weight, weight.to(dtype), x)
    assert (ours <= nearest).all()
    assert ours.sum() < nearest.sum() / 4  # half of the error
    # Every number has moved by a few steps of the grid at most: what is lost is spread, not piled up.
    step = torch.finfo(dtype).eps * weight.abs().clamp(min=0.5)
    assert bool(((rounded.double() - weight).abs() <= 8 * step).all())


def gptq(weight, moments, dtype, damping=0.01):
    """The paper's algorithm 1, with blocks of one column: errors go along the rows of the Cholesky factor of H⁻¹."""
    H = moments.numpy() + damping * np.trace(moments) / len(moments) * np.eye(len(moments))
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    W, Q = weight.numpy().copy(), np.empty(weight.shape)
    for j in range(len(H)):
        Q[:, j] = torch.from_numpy(W[:, j]).to(dtype).double().numpy()
        W[:, j:] -= np.outer((W[:, j] - Q[:, j]) / U[j, j], U[j, j:])
    return torch.from_numpy(Q).to(dtype)


@pytest.mark.parametrize("columns", [7, 128, 150, 300])
def test_the_first_time_over_the_columns_is_gptq(columns, monkeypatch):
    monkeypatch.setattr(rounding, "_SWEEPS", 0)
    x, weight = inputs(columns), updated(5, columns, torch.bfloat16)
    moments = moments_of(x)
    theirs = gptq(weight, moments, torch.bfloat16)
    nearest = weight.to(torch.bfloat16)
    better = errors(weight, theirs, x) < errors(weight, nearest, x)
    assert better.any()
    expected = torch.where(torch.from_numpy(better)[:, None], theirs, nearest)
    assert torch.equal(round_for_inputs(weight, moments, torch.bfloat16), expected)


def test_each_time_after_that_loses_less(monkeypatch):
    x, weight = inputs(140), updated(16, 140, torch.bfloat16)
    lost = []
    for sweeps in range(4):
        monkeypatch.setattr(rounding, "_SWEEPS", sweeps)
        rounded = round_for_inputs(weight, moments_of(x), torch.bfloat16, damping=1e-6)
        lost.append(errors(weight, rounded, x).sum())
    assert lost[3] < lost[2] < lost[1] < lost[0]
    assert lost[1] < 0.8 * lost[0]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("diagonal", [[2.0], [1.0, 2.0, 3.0], [0.0, 1.0, 0.0], [0.0]], ids=str)
def test_inputs_that_say_nothing_of_each_other_round_to_nearest(dtype, diagonal):
    weight = torch.randn(9, len(diagonal))
    assert torch.equal(round_for_inputs(weight, torch.diag(torch.tensor(diagonal)), dtype), weight.to(dtype))


def test_no_number_is_rounded_to_more_than_the_dtype_holds():
    x = torch.randn(500, 1).double() * torch.tensor([1, 0.1]).double() + torch.randn(500, 2).double() * 1e-4
    weight = torch.full((3, 2), 65504.0 - 17)  # neighbours are 32 apart; the second would take over 15 several times
    rounded = round_for_inputs(weight, moments_of(x).float(), torch.float16)
    assert rounded.tolist() == [[65472.0, 65504.0]] * 3
    assert (errors(weight.double(), rounded, x) < errors(weight.double(), weight.half(), x)).all()


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 140),
    seen=st.integers(0, 40),
    dtype=st.sampled_from(HALVES),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
    share=st.sampled_from([0.0, 0.003, 0.3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_no_row_loses_more_than_to_nearest(rows, columns, seen, dtype, size, share, seed):
    torch.manual_seed(seed)
    x = inputs(columns, seen) * size
    moments = (x.T @ x / max(seen, 1)).float()
    weight = updated(rows, columns, dtype, share).float()
    nearest = weight.to(dtype)
    ours, theirs = (weight - one.float() for one in (round_for_inputs(weight, moments, dtype), nearest))
    # Which is less was decided in float32, where sums of `columns` products in both orders are rounded.
    most = torch.linalg.matrix_norm(moments.double(), 2) * (ours.square().sum(1) + theirs.square().sum(1)).double()
    slack = 4 * columns * torch.finfo(torch.float32).eps * most
    exact = [lost_in_rows(one.double(), moments.double()) for one in (ours, theirs)]
    assert bool((exact[0] <= exact[1] + slack).all())


def test_the_loss_of_rows_is_the_mean_square_of_their_products():
    x, error = inputs(9, 50), torch.randn(4, 9).double()
    expected = ((error.numpy() @ x.numpy().T) ** 2).mean(1)
    np.testing.assert_allclose(lost_in_rows(error, moments_of(x)), expected)
