"""Codes and scales for inputs: less of a small change is lost than by coding anew, in no row more than all of it."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lora.functional import codes
from lora.functional.codes import Coded, change_for_inputs

VALUES = torch.tensor([-1.0, -0.55, -0.2, 0.0, 0.15, 0.4, 0.7, 1.0])


def problem(rows=12, blocks=4, size=16, dtype=torch.float32, share=0.005, seen=2000, storable=None):
    """A coded weight, one that differs from it by a little of low rank, and inputs of which a few directions count."""
    columns = blocks * size
    coded = Coded(torch.randint(8, (rows, columns)), VALUES, torch.rand(rows, blocks) + 0.5, dtype, storable)
    if storable:
        scales = torch.stack([storable(scale, b) for b, scale in enumerate(coded.scales.T)], 1)
        coded = coded._replace(scales=scales)
    base = coded.dense().double()
    change = torch.randn(rows, 3).double() @ torch.randn(3, columns).double()
    weight = base + change * share * base.norm() / change.norm()
    mixing = torch.randn(columns, columns).double() * torch.linspace(0.1, 1, columns).double() ** 16
    x = torch.randn(seen, columns).double() @ mixing.T + 0.3
    return coded, weight, x


def errors(weight, coded, x):
    """Σ ((W − Q) x)² of each row, in numpy and float64; Q by its own formula."""
    size = coded.codes.shape[1] // coded.scales.shape[1]
    Q = coded.values.numpy()[coded.codes.numpy()] * np.repeat(coded.scales.numpy(), size, 1)
    Q = torch.from_numpy(Q).to(coded.dtype).double().numpy()
    return (((weight.numpy() - Q) @ x.numpy().T) ** 2).sum(1)


def anew(weight, coded):
    """Every block's scale its largest size, and every code the nearest."""
    blocks = weight.unflatten(1, (coded.scales.shape[1], -1))
    scales = blocks.abs().amax(2)
    near = (blocks / scales[..., None])[..., None].sub(VALUES.double()).abs().argmin(-1)
    return coded._replace(codes=near.flatten(1), scales=scales.float())


@pytest.mark.parametrize("share", [0.02, 0.005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_small_change_is_kept_where_coding_anew_loses_it(dtype, share):
    torch.manual_seed(0)
    coded, weight, x = problem(dtype=dtype, share=share)
    found = change_for_inputs(weight, x.T @ x / len(x), coded)
    lost, all_of_it, nearest = (errors(weight, one, x) for one in (found, coded, anew(weight, coded)))
    assert (lost <= all_of_it).all()
    assert lost.sum() < all_of_it.sum() / 2
    assert nearest.sum() > all_of_it.sum()
    assert found.codes.dtype == torch.int64
    assert (found.codes == coded.codes).double().mean() > 0.9


def test_a_scale_alone_is_that_of_least_squares():
    coded, weight, x = problem(rows=5, blocks=1, share=1e-5)
    H = x.T @ x / len(x)
    found = change_for_inputs(weight, H, coded)
    assert torch.equal(found.codes, coded.codes)
    damped = H.numpy() + 0.01 * np.trace(H) / len(H) * np.eye(len(H))
    C = VALUES.numpy()[coded.codes.numpy()].astype(np.float64)
    for row, w, scale in zip(C, weight.numpy(), found.scales[:, 0], strict=True):
        np.testing.assert_allclose(scale, row @ damped @ w / (row @ damped @ row), rtol=1e-6)


def test_at_its_end_no_other_code_loses_less(monkeypatch):
    monkeypatch.setattr(codes, "_TURNS", 12)
    coded, weight, x = problem(rows=4, blocks=2, size=8, share=0.3)
    H = x.T @ x / len(x)
    found = change_for_inputs(weight, H, coded, damping=1e-9)
    assert not torch.equal(found.codes, coded.codes)
    least = errors(weight, found, x)
    for column in range(16):
        for value in range(8):
            other = found.codes.clone()
            other[:, column] = value
            assert (errors(weight, found._replace(codes=other), x) >= least * (1 - 1e-6)).all()


def test_what_can_be_stored_is_what_comes_out():
    def storable(scales, block):
        step = 2.0 ** -(6 + block)
        return (scales / step).round() * step

    coded, weight, x = problem(storable=storable)
    found = change_for_inputs(weight, x.T @ x / len(x), coded)
    assert not torch.equal(found.scales, coded.scales)
    for block, scale in enumerate(found.scales.T):
        assert torch.equal(storable(scale, block), scale)
    assert errors(weight, found, x).sum() < errors(weight, coded, x).sum() / 2


def test_without_inputs_nothing_changes():
    coded, weight, x = problem()
    found = change_for_inputs(weight, 0 * (x.T @ x), coded)
    assert torch.equal(found.codes, coded.codes)
    assert torch.equal(found.scales, coded.scales)


@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    size=st.integers(1, 9),
    seen=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    share=st.sampled_from([0.0, 1e-4, 0.01, 1.0]),
    zero=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
def test_no_row_loses_more_than_its_change(rows, blocks, size, seen, dtype, share, zero, seed):
    torch.manual_seed(seed)
    coded, weight, x = problem(rows, blocks, size, dtype, share, seen)
    if zero:  # a block of zeros may have the scale 0
        coded.scales[:, 0] = 0
    before, given = errors(weight, coded, x), [part.clone() for part in (coded.codes, coded.scales, weight)]
    found = change_for_inputs(weight, x.T @ x / seen, coded)
    assert found.scales.isfinite().all()
    assert all(map(torch.equal, given, (coded.codes, coded.scales, weight)))
    assert (errors(weight, found, x) <= before * (1 + 1e-9)).all()
    if share == 0 and not zero:
        assert torch.equal(found.codes, coded.codes)
        assert torch.equal(found.scales, coded.scales)
