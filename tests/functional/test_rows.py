"""lora_linear_rows: many adapters in one batch, each as if it were alone with its rows."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from counting import Operations, kept_for_backward
from hypothesis import given
from hypothesis import strategies as st
from pairwise import in_tiers, pairwise
from torch.autograd import gradcheck, gradgradcheck

from lora.functional import Rows, Update, lora_linear, lora_linear_rows, plain_lora_linear_rows

FORMS = (lora_linear_rows, plain_lora_linear_rows)
each_form = pytest.mark.parametrize("form", FORMS, ids=["fused", "plain"])

SLICES = {"whole": (7, None), "outer": (9, ((0, 3), (5, 7))), "last": (6, ((4, 6),))}
PATTERNS = {
    "runs": [0, 0, None, 1, 1, 1],
    "scattered": [0, 1, 0, None, 1, 0],
    "both": [2, 2, 0, 1, 0, 0],
    "one": [1] * 6,
    "base": [None] * 6,
    "absent": [3, None, 3, 0, None, None],
    "few": [1, 0, 1],
}
each_pattern = pytest.mark.parametrize("owners", PATTERNS.values(), ids=PATTERNS)


def drawn_after(k):
    """The seed that `lora_linear` draws first after `torch.manual_seed(k)`."""
    torch.manual_seed(k)
    return int(torch.randint(2**62, ()))


def updates_of(out, slices, count=4, features=5, dtype=torch.float64, grad=True, dropout=0.0, rank=lambda k: k + 1):
    """An update of its own rank and scaling for each adapter."""
    groups, size = (1, out) if slices is None else (len(slices), sum(stop - start for start, stop in slices))
    return [
        Update(
            torch.randn(groups * rank(k), features, dtype=dtype, requires_grad=grad),
            torch.randn(size, rank(k), dtype=dtype, requires_grad=grad),
            0.5 + k / 4,
            dropout,
            slices,
            lambda k=k: drawn_after(k),
        )
        for k in range(count)
    ]


def problem(owners, out=7, slices=None, *lead, features=5, dtype=torch.float64, bias=True, **options):
    """x, weight, bias and updates, all random, and the rows."""
    x = torch.randn(*(lead or (len(owners),)), features, dtype=dtype, requires_grad=True)
    weight = torch.randn(out, features, dtype=dtype)
    b = torch.randn(out, dtype=dtype, requires_grad=True) if bias else None
    return x, weight, b, updates_of(out, slices, features=features, dtype=dtype, **options), Rows.of(owners)


def factors_of(updates):
    return [factor for update in updates for factor in (update.A, update.B)]


def gradients(y, *tensors, dy=None):
    """Gradients for those that have one; None for what took no part."""
    wanted = [tensor for tensor in tensors if tensor is not None]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) if dy is None else dy
    return torch.autograd.grad(y, wanted, dy, allow_unused=True)


def dense(x, weight, bias, updates, owners):
    """The equation row by row, by numpy in float64."""
    rows = x.detach().double().numpy()
    weight = weight.double().numpy()
    result = []
    for row, owner in zip(rows, owners, strict=True):
        W = weight.copy()
        if owner is not None:
            A, B, scaling, _, slices, _ = updates[owner]
            A, B = A.detach().double().numpy(), B.detach().double().numpy()
            place = a = 0
            for start, stop in slices or ((0, len(W)),):
                W[start:stop] += scaling * B[place : place + stop - start] @ A[a : a + B.shape[1]]
                place, a = place + stop - start, a + B.shape[1]
        result.append(row @ W.T + (0 if bias is None else bias.detach().double().numpy()))
    return np.array(result).reshape(*x.shape[:-1], len(weight))


# ---- which rows are whose ----------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([None, 0, 1, 2, 5]), max_size=12), st.integers(0, 3))
def test_rows_are_found_whole_and_in_order(owners, n):
    rows = Rows.of(owners).times(n)
    x = torch.arange(len(owners) * n)[:, None]
    assert rows.count == len(x)
    assert [part.adapter for part in rows.parts] == sorted({owner for owner in owners if owner is not None})
    for part, found in zip(rows.parts, rows.views(rows.parts, x, rows.gather(x)), strict=True):
        mine = [row * n + i for row, owner in enumerate(owners) if owner == part.adapter for i in range(n)]
        assert found.flatten().tolist() == mine
        if not part.gathered:
            assert found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_what_does_not_fit_is_refused():
    x, weight, b, updates, _ = problem(PATTERNS["runs"], 7, None, 2, 6)
    for form in FORMS:
        with pytest.raises(ValueError, match=r"of an input of shape \(2, 6, 5\) 2 or 12, not 3\.$"):
            form(x, weight, b, updates, Rows.of([0, 1, 0]))
        with pytest.raises(ValueError, match=r"there are 4 adapters, numbered from 0; rows are of \[4, 7\]\.$"):
            form(x, weight, b, updates, Rows.of([7, 4]))
    with pytest.raises(ValueError, match=r"numbered from 0; got \[-3, -1\]\.$"):
        Rows.of([0, -1, -3, None])


# ---- the equation ------------------------------------------------------------------------------------------------


@given(
    owners=st.lists(st.sampled_from([None, 0, 1, 2, 3]), max_size=8),
    slices=st.sampled_from(list(SLICES)),
    inner=st.lists(st.integers(0, 3), max_size=2),
    flat=st.booleans(),
    ranks=st.lists(st.integers(1, 8), min_size=4, max_size=4),
    bias=st.booleans(),
)
def test_it_is_the_equation(owners, slices, inner, flat, ranks, bias):
    out, parts = SLICES[slices]
    x, weight, b, updates, rows = problem(owners, out, parts, len(owners), *inner, bias=bias, rank=lambda k: ranks[k])
    each = math.prod(inner)
    per_token = [owner for owner in owners for _ in range(each)]
    given = Rows.of(per_token) if flat else rows
    tensors = x, b, *factors_of(updates)
    ours, theirs = (form(x, weight, b, updates, given) for form in FORMS)
    np.testing.assert_allclose(ours.detach(), dense(x, weight, b, updates, owners), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for got, expected in zip(gradients(ours, *tensors), gradients(theirs, *tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(lora_linear_rows(x, weight, b, updates, given), theirs, rtol=1e-12, atol=1e-12)


GIVEN = [*itertools.product(PATTERNS, SLICES, (0.0, 0.3))]


@each_form
@pytest.mark.parametrize(
    ("pattern", "slices", "dropout"),
    [
        ("few", "last", 0.3),
        ("absent", "whole", 0.0),
        *in_tiers(GIVEN, pairwise(GIVEN), pytest.mark.slow),
    ],
)
def test_its_gradients_are_right_and_so_are_theirs(form, pattern, slices, dropout):
    owners, (out, parts) = PATTERNS[pattern], SLICES[slices]
    x, weight, b, updates, rows = problem(owners, out, parts, dropout=dropout)

    def function(x, b, *factors):
        given = [u._replace(A=A, B=B) for u, A, B in zip(updates, factors[::2], factors[1::2], strict=True)]
        return form(x, weight, b, given, rows)

    present = [updates[part.adapter] for part in rows.parts]
    for update in updates:
        for factor in (update.A, update.B):
            factor.requires_grad_(any(update is one for one in present))
    tensors = x, b, *factors_of(updates)
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors, fast_mode=True)


@each_pattern
def test_each_adapter_may_have_slices_of_its_own(owners):
    x, weight, b, _, rows = problem(owners, 9)
    parts = None, ((0, 3), (5, 7)), ((0, 4), (5, 6)), ((4, 9),)
    updates = [updates_of(9, slices, rank=lambda k: 2)[k] for k, slices in enumerate(parts)]
    for form in (*FORMS, torch.no_grad()(lora_linear_rows)):
        y = form(x, weight, b, updates, rows).detach()
        np.testing.assert_allclose(y, dense(x, weight, b, updates, owners), rtol=1e-12, atol=1e-12)


@each_pattern
def test_an_adapter_that_adds_nothing_here_leaves_its_rows(owners):
    x, weight, b, updates, rows = problem(owners)
    without = [None if owner == 1 else owner for owner in owners]
    for form in FORMS:
        got = form(x, weight, b, [updates[0], None, *updates[2:]], rows)
        torch.testing.assert_close(got, form(x, weight, b, updates, Rows.of(without)), rtol=1e-12, atol=1e-12)


# ---- each as if it were alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("slices", [None, ((0, 16), (32, 48))], ids=["whole", "slices"])
@each_pattern
def test_every_adapter_has_to_the_bit_what_it_has_alone(owners, slices, dropout, dtype):
    """Over a base of zeros, whose product has the same bits whatever rows it is of."""
    x, weight, _, updates, rows = problem(
        owners, 48, slices, len(owners), 5, features=32, dtype=dtype, bias=False, dropout=dropout
    )
    weight = torch.zeros_like(weight)
    dy = torch.randn(*x.shape[:-1], 48, dtype=dtype)
    y = lora_linear_rows(x, weight, None, updates, rows)
    dx, *rest = gradients(y, x, *factors_of(updates), dy=dy) if any(u is not None for u in owners) else [None] * 9
    for k, update in enumerate(updates):
        mine = [row for row, owner in enumerate(owners) if owner == k]
        if not mine:
            assert rest[2 * k] is rest[2 * k + 1] is None
            continue
        x_k = x.detach()[mine].requires_grad_()
        torch.manual_seed(k)
        alone = lora_linear(x_k, weight, None, *update[:5])
        assert torch.equal(alone, y[mine])
        for got, expected in zip(
            (dx[mine], *rest[2 * k : 2 * k + 2]), gradients(alone, x_k, *update[:2], dy=dy[mine]), strict=True
        ):
            assert torch.equal(got, expected)


BAD = {
    "x": lambda x, updates, owners: x[owners.index(0)].fill_(math.nan),
    "A": lambda x, updates, owners: updates[0].A[0].fill_(math.inf),
    "B": lambda x, updates, owners: updates[0].B.fill_(math.nan),
    "overflow": lambda x, updates, owners: updates[0].A.fill_(torch.finfo(x.dtype).max),
}


@each_form
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("pattern", [name for name, owners in PATTERNS.items() if 0 in owners])
def test_what_is_not_finite_stays_with_its_rows(form, pattern, bad, dropout):
    owners = PATTERNS[pattern]
    x, weight, b, updates, rows = problem(owners, 7, ((0, 3), (5, 7)), len(owners), 2, dropout=dropout)
    b.requires_grad_(False)
    tensors = x, *factors_of(updates)
    good = form(x, weight, b, updates, rows)
    good_gradients = gradients(good, *tensors)
    with torch.no_grad():
        BAD[bad](x, updates, owners)
    y = form(x, weight, b, updates, rows)
    with torch.no_grad():
        without = form(x, weight, b, updates, rows)
    dx, dA, dB, *others = gradients(y, *tensors)
    mine = [row for row, owner in enumerate(owners) if owner == 0]
    rest = [row for row, owner in enumerate(owners) if owner != 0]
    assert not all(found[mine].isfinite().all() for found in (y, dx)) or not (
        dA.isfinite().all() and dB.isfinite().all()
    )
    assert torch.equal(without.isfinite(), y.isfinite())
    torch.testing.assert_close(without[rest], good[rest], rtol=1e-12, atol=1e-12)
    for got, expected in (
        (y[rest], good[rest]),
        (dx[rest], good_gradients[0][rest]),
        *zip(others, good_gradients[3:], strict=True),
    ):
        assert (got is expected is None) or torch.equal(got, expected)


@each_form
def test_an_overflowing_gradient_stays_with_its_rows(form):
    owners = [0, 1, 0, None, 1]
    x, weight, b, updates, rows = problem(owners)
    b.requires_grad_(False)
    y = form(x, weight, b, updates, rows)
    dy = torch.ones_like(y)
    dy[0] = math.nan
    dx, _, _, *others = gradients(y, x, *factors_of(updates), dy=dy)
    assert dx[1:].isfinite().all()
    assert all(gradient is None or gradient.isfinite().all() for gradient in others)


@each_form
@pytest.mark.parametrize("p", [1e-3, 0.25, 0.999])
def test_dropout_of_one_does_not_depend_on_others(form, p):
    owners = [0, 1, 0, None, 1]
    x, weight, b, updates, rows = problem(owners, 7, None, 5, 40, dropout=p)
    y = form(x, weight, b, updates, rows)
    fewer = form(x[[0, 2]], weight, b, updates, Rows.of([0, 0]))
    torch.testing.assert_close(y[[0, 2]], fewer, rtol=1e-12, atol=1e-12)
    others = [*updates[:1], updates[1]._replace(seed=lambda: 5)]
    torch.testing.assert_close(form(x, weight, b, others, rows)[[0, 2]], fewer, rtol=1e-12, atol=1e-12)


def test_no_seed_is_drawn_where_another_adapter_cannot_be_fused():
    x, weight, b, updates, rows = problem([0, 1], dropout=0.5)
    drawn = []
    updates[0] = updates[0]._replace(seed=lambda: drawn.append(0) or 7)
    updates[1] = updates[1]._replace(dropout=0.9999)  # rounds to all
    y = lora_linear_rows(x, weight, b, updates, rows)
    assert drawn == [0]
    assert torch.equal(y[1], F.linear(x, weight, b)[1])


@each_form
@pytest.mark.parametrize("p", [0.25, 0.999])
def test_dropout_keeps_what_is_expected(form, p):
    """Also where its probability would round to 1, and torch's generator draws from the seed."""
    x, A, B = torch.ones(2, 20_000, 1), torch.ones(1, 1), torch.ones(1, 1)
    update = Update(A, B, 1.0, p, None, lambda: 7)
    y = form(x, torch.zeros(1, 1), None, [update, update._replace(dropout=0.0)], Rows.of([0, 1]))
    p = round(p * 256) / 256 if p < 0.99 else p
    assert abs(y[0].double().mean().item() - 1) < 4 * (p / (1 - p) / 20_000) ** 0.5
    assert torch.equal(y[1], x[1])


def test_a_mask_is_the_same_in_both_forms():
    x, weight, b, updates, rows = problem(PATTERNS["both"], 7, None, 6, 9, dropout=0.5)
    ours, theirs = (form(x, weight, b, updates, rows) for form in FORMS)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ---- dtypes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_own_dtype_and_gives_gradients_in_theirs(x_dtype, dropout):
    x, weight, b, updates, rows = problem(PATTERNS["both"], dtype=torch.float32, dropout=dropout)
    x = x.detach().to(x_dtype).requires_grad_()
    tensors = x, b, *factors_of(updates[:3])
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear_rows(x, weight, b, updates, rows)
        grads = gradients(y, *tensors)
        with torch.no_grad():
            assert lora_linear_rows(x, weight, b, updates, rows).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [tensor.dtype for tensor in tensors]


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_pattern
def test_low_precision_stays_near_float64(owners, dtype, adapter):
    x, weight, b, updates, rows = problem(owners, 7, None, len(owners), 8, features=16, dtype=dtype)
    updates = [u._replace(A=u.A.detach().to(adapter), B=u.B.detach().to(adapter)) for u in updates]
    exact = dense(x, weight, b, updates, owners)
    for form in (*FORMS, torch.no_grad()(lora_linear_rows)):
        error = np.linalg.norm(form(x, weight, b, updates, rows).detach().double().numpy() - exact)
        assert error / np.linalg.norm(exact) < 20**0.5 * max(
            torch.finfo(dtype).eps, torch.finfo(adapter).eps
        )  # sums of up to 20 products


@each_pattern
def test_each_adapter_may_have_a_dtype_of_its_own(owners):
    x, weight, b, updates, rows = problem(owners, 48, None, len(owners), features=64, dtype=torch.float32)
    coarse = [*updates[:1], updates[1]._replace(A=updates[1].A.bfloat16(), B=updates[1].B.bfloat16()), *updates[2:]]
    coarse = [update._replace(scaling=1 / 3 + k) for k, update in enumerate(coarse)]
    exact = dense(x, weight, b, coarse, owners)
    for form in (*FORMS, torch.no_grad()(lora_linear_rows)):
        error = np.linalg.norm(form(x, weight, b, coarse, rows).detach().double().numpy() - exact)
        assert error / np.linalg.norm(exact) < 70**0.5 * torch.finfo(torch.float32).eps  # sums of up to 70 products


@pytest.mark.parametrize("scaling", [64.0, 128.0])
@pytest.mark.parametrize("form", [*FORMS, torch.no_grad()(lora_linear_rows)], ids=["fused", "plain", "at once"])
def test_in_float16_nothing_overflows_between(form, scaling):
    """s · A x is beyond float16 where s · B A x is not: B has the scaling."""
    x, weight = torch.full((4, 4), 16.0).half(), torch.zeros(4, 4).half()
    update = Update(torch.full((2, 4), 32.0).half(), torch.full((4, 2), 1e-4).half(), 64.0)
    y = form(x, weight, None, [update, update._replace(scaling=scaling)], Rows.of([0, 1, 0, None]))
    for row, s in enumerate((64.0, scaling, 64.0, 0.0)):
        expected = s * (x[0].double() @ update.A.T.double() @ update.B.T.double())
        torch.testing.assert_close(y[row].double(), expected, rtol=1e-2, atol=0)


def test_dtypes_that_do_not_fit_raise_what_torch_raises():
    x, weight, _, updates, rows = problem([0, 1], dtype=torch.float32)
    with pytest.raises(RuntimeError) as theirs:
        F.linear(x, weight.double())
    with pytest.raises(RuntimeError) as ours:
        lora_linear_rows(x, weight.double(), None, updates, rows)
    assert str(ours.value) == str(theirs.value)


# ---- where the fused function does not apply ----------------------------------------------------------------------


def test_a_trainable_weight_gets_its_gradient():
    x, weight, b, updates, rows = problem(PATTERNS["both"])
    tensors = x, weight.requires_grad_(), b, *factors_of(updates)
    ours, theirs = (gradients(form(x, weight, b, updates, rows), *tensors) for form in FORMS)
    assert ours[1] is not None
    for got, expected in zip(ours, theirs, strict=True):
        assert (got is expected is None) or torch.equal(got, expected)


class Marked(torch.Tensor):
    """A subclass that torch's own functions keep."""


@pytest.mark.parametrize("grad", [True, False])
def test_subclasses_take_the_plain_form(grad):
    x, weight, b, updates, rows = problem(PATTERNS["both"])
    updates[0] = updates[0]._replace(A=updates[0].A.detach().as_subclass(Marked))
    with torch.set_grad_enabled(grad):
        y, expected = (form(x, weight, b, updates, rows) for form in FORMS)
    assert type(y) is type(expected) is Marked
    assert torch.equal(y, expected)


def test_function_transforms_take_the_plain_form():
    x, weight, b, updates, rows = problem(PATTERNS["both"])
    expected = lora_linear_rows(x, weight, b, updates, rows)
    function = lambda x: lora_linear_rows(x, weight, b, updates, rows)  # noqa: E731
    y, pull = torch.func.vjp(function, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(pull(torch.ones_like(y))[0], torch.autograd.grad(expected.sum(), x)[0])
    many = torch.func.vmap(function)(torch.stack([x, x]))
    torch.testing.assert_close(many[1], expected)


@pytest.mark.slow
@each_pattern
def test_it_compiles_whole(owners):
    torch.compiler.reset()
    x, weight, b, updates, rows = problem(owners, 7, None, len(owners), 3)
    compiled = torch.compile(lora_linear_rows, fullgraph=True, backend="aot_eager")
    tensors = x, b, *factors_of(updates)
    y, expected = (function(x, weight, b, updates, rows) for function in (compiled, lora_linear_rows))
    for got, right in zip((y, *gradients(y, *tensors)), (expected, *gradients(expected, *tensors)), strict=True):
        torch.testing.assert_close(got, right)


def test_differentiating_twice_without_the_input_is_refused():
    x, weight, b, updates, rows = problem([0, 1])
    updates = [update._replace(A=update.A.detach()) for update in updates]
    y = lora_linear_rows(x, weight, b, updates, rows)
    with pytest.raises(
        RuntimeError, match=r"let lora_A train, or compute with `lora\.functional\.plain_lora_linear_rows`"
    ):
        torch.autograd.grad(y.square().sum(), [x, updates[0].B], create_graph=True)
    torch.autograd.grad(lora_linear_rows(x, weight, b, updates, rows).square().sum(), [x, updates[0].B])


def test_many_output_gradients_at_once():
    x, weight, b, updates, rows = problem(PATTERNS["both"])
    inputs = x, b, *factors_of(updates[:3])
    y = lora_linear_rows(x, weight, b, updates, rows)
    many = torch.randn(2, *y.shape, dtype=y.dtype)
    got = torch.autograd.grad(y, inputs, many, is_grads_batched=True, retain_graph=True)
    expected = zip(*(torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in many), strict=True)
    for many_gradients, one_by_one in zip(got, expected, strict=True):
        torch.testing.assert_close(many_gradients, torch.stack(one_by_one))


def test_rows_that_were_met_in_inference_mode_can_train_later():
    x, weight, b, updates, rows = problem(PATTERNS["scattered"])
    with torch.inference_mode():
        lora_linear_rows(x, weight, b, updates, rows)
    for form in FORMS:
        form(x, weight, b, updates, rows).sum().backward()


# ---- what is kept, made and done ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_pattern
def test_it_keeps_x_and_each_h_for_backward_and_not_a_byte_more(owners, dtype, dropout):
    x, weight, b, updates, rows = problem(owners, 48, None, len(owners), 4, features=64, dtype=dtype, dropout=dropout)
    b.requires_grad_(False)
    known = weight, b, *factors_of(updates)
    kept = kept_for_backward(lambda: lora_linear_rows(x, weight, b, updates, rows), *known)
    ranks = sum(4 * updates[owner].A.shape[0] for owner in owners if owner is not None)
    assert kept == (x.numel() * bool(rows.parts) + ranks) * x.element_size()


@pytest.mark.parametrize("trains", ["A", "B", "neither"])
def test_of_what_does_not_train_it_keeps_nothing(trains):
    x, weight, b, updates, rows = problem([0, 0, 1, 0], 48, None, 4, 4, features=64)
    b.requires_grad_(False)
    for update in updates:
        update.A.requires_grad_(trains == "A")
        update.B.requires_grad_(trains == "B")
    known = weight, b, *factors_of(updates)
    kept = kept_for_backward(lambda: lora_linear_rows(x, weight, b, updates, rows), *known)
    assert kept == {"A": x.numel(), "B": 4 * (3 * 1 + 2), "neither": 0}[trains] * 8


def counted(owners, count):
    """The operations of a forward and of its backward."""
    x, weight, b, updates, rows = problem(owners, 48, None, len(owners), 4, features=64, count=count, rank=lambda k: 2)
    b.requires_grad_(False)
    updates = [update._replace(scaling=0.5) for update in updates]  # with 1 a product is a mere mm
    rows.times(4).scattered(x.device)  # once for a batch
    with Operations() as forward:
        y = lora_linear_rows(x, weight, b, updates, rows)
    factors, dy = factors_of([updates[part.adapter] for part in rows.parts]), torch.ones_like(y)
    with Operations() as backward:
        torch.autograd.grad(y, [x, *factors], dy)
    return forward.names, backward.names


UPDATE = ["mm", "addmm_"]
BACK = ["addmm", "addmm", "addmm_", "mm"]  # dB, dh, dx, dA: scaled while they are computed


def test_runs_take_the_operations_of_their_adapters_and_absent_ones_none():
    assert counted([0, 0, None, 7], 8) == (["addmm", *UPDATE * 2], ["mm", *BACK * 2])
    assert counted([*range(8)], 8) == (["addmm", *UPDATE * 8], ["mm", *BACK * 8])


def test_scattered_rows_are_gathered_and_put_back():
    assert counted([0, 1, 0, None, 1], 8) == (
        ["addmm", *[*["index_select"] * 2, *UPDATE, "index_copy_"] * 2],
        ["mm", *[*["index_select"] * 3, *BACK, "index_copy_"] * 2],
    )


def inference(owners, count, each=4, rank=2, **options):
    """The operations of a forward that no backward follows, but for the base's product."""
    x, weight, b, updates, rows = problem(
        owners, 48, None, len(owners), each, features=64, count=count, rank=lambda k: rank, **options
    )
    updates = [update._replace(scaling=0.5) for update in updates]
    for _ in range(2):  # once for a batch, rows are found
        with torch.no_grad(), Operations() as counted:
            lora_linear_rows(x, weight, b, updates, rows)
    assert counted.names.count("addmm") == 1
    return [name for name in counted.names if name != "addmm"]


def test_without_a_backward_many_adapters_are_as_many_operations_as_one():
    at_once = ["stack", "stack", "bmm", "baddbmm_"]
    for count in (2, 4, 16):
        assert inference([*range(count)], count) == at_once
        assert inference([*reversed(range(count))], count) == at_once
        assert inference([None, *range(count), None], count) == at_once
        assert inference([*range(count)], count, each=2000) == at_once
        copied = [*at_once[:2], "index_select", "bmm", "bmm", "index_add_"]
        assert inference([*range(count)] * 2, count) == copied
        assert inference([*range(count), 0], count) == [*copied[:5], "index_select", "index_add_"]


@pytest.mark.parametrize(
    ("owners", "count", "each", "options"),
    [
        ([*[0] * 9, 1, 2], 3, 4, {}),  # the block would be more than twice as large
        ([0, 0, 1], 2, 500, {}),  # a copy of many rows
        ([0], 2, 4, {}),
        ([0, 1], 2, 4, {"dropout": 0.5}),
        ([0, 1], 2, 4, {"rank": 200}),  # a copy of large A and B
    ],
    ids=["uneven", "many", "one", "dropout", "large"],
)
def test_without_a_backward_some_are_still_computed_one_by_one(owners, count, each, options):
    names = inference(owners, count, each, **options)
    assert names.count("addmm_") == len({*owners})
    assert not {"bmm", "index_select", "stack"} & {*names}


@pytest.mark.parametrize("backward", [False, True])
def test_runs_are_not_copied(backward):
    x, weight, b, updates, rows = problem([0, 0, 1, None], 192, None, 4, 16, features=256, dtype=torch.float32)
    b.requires_grad_(False)

    def made(function):
        with Operations() as counted:
            y = function()
            if backward:
                torch.autograd.grad(y, [x, *factors_of(updates[:2])], torch.ones_like(y), allow_unused=True)
        return sum(counted.made)

    ours = made(lambda: lora_linear_rows(x, weight, b, updates, rows))
    frozen = made(lambda: F.linear(x, weight, b))
    hs, factors = 16 * (2 * 1 + 2), sum(factor.numel() for factor in factors_of(updates[:2]))
    assert ours - frozen <= 4 * (hs + (2 * hs + 3 * factors) * backward)
