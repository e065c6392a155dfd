"""LoRA beside a layer of which only the output is known: the fused function is its plain twin, in less memory."""

import itertools

import numpy as np
import pytest
import torch
from counting import Operations, kept_for_backward
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from lora.functional import lora_beside, lora_linear, plain_lora_beside

# Sizes of the output, and its slices.
SLICES = {"whole": (7, None), "outer": (9, ((0, 3), (5, 7))), "inner": (9, ((2, 4), (4, 9))), "last": (6, ((4, 6),))}


def problem(out, slices, *lead, features=5, r=2, dtype=torch.float64):
    """x, y, A, B of these sizes, all random, and all with gradients."""
    groups, rows = (1, out) if slices is None else (len(slices), sum(stop - start for start, stop in slices))
    shapes = (*lead, features), (*lead, out), (groups * r, features), (rows, r)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def gradients(function, tensors, *arguments):
    """The output of the function, and its gradients for those tensors that have one."""
    out = function(*tensors, *arguments)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    d_out = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return out, *torch.autograd.grad(out, wanted, d_out)


def expected(x, y, A, B, scaling, slices):
    """The equation, by numpy in float64."""
    x, out, A, B = (tensor.detach().double().numpy() for tensor in (x, y, A, B))
    out, slices = out.copy(), slices or ((0, out.shape[-1]),)
    r, start_B = len(A) // len(slices), 0
    for group, (start, stop) in enumerate(slices):
        B_g = B[start_B : start_B + stop - start]
        out[..., start:stop] += scaling * x @ A[group * r : (group + 1) * r].T @ B_g.T
        start_B += stop - start
    return out


@given(
    slices=st.sampled_from(list(SLICES)),
    lead=st.lists(st.integers(0, 4), max_size=3),
    needs=st.sampled_from(list(itertools.product([True, False], repeat=4))[:-1]),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
)
def test_it_is_the_equation_and_its_plain_twin(slices, lead, needs, layout):
    out, parts = SLICES[slices]
    x, y, A, B = problem(out, parts, *lead)
    with torch.no_grad():
        if layout == "transposed" and len(lead) == 1:
            x, y = x.T.contiguous().T, y.T.contiguous().T
        elif layout == "strided":
            x, y = torch.randn(*lead, 10, dtype=x.dtype)[..., ::2], torch.randn(*lead, 2 * out, dtype=y.dtype)[..., ::2]
    tensors = [tensor.detach().requires_grad_(needed) for tensor, needed in zip((x, y, A, B), needs, strict=True)]
    ours, theirs = (gradients(function, tensors, 0.7, 0.0, parts) for function in (lora_beside, plain_lora_beside))
    for got, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours[0].detach().numpy(), expected(*tensors, 0.7, parts), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(lora_beside(*tensors, 0.7, 0.0, parts), ours[0])


@pytest.mark.sampled(5)  # all slices, with dropout and without
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("slices", SLICES)
def test_its_gradients_are_right_and_so_are_theirs(slices, dropout):
    out, parts = SLICES[slices]

    def function(*tensors):
        torch.manual_seed(1)  # one mask for all evaluations: finite differences see a backward that draws another
        return lora_beside(*tensors, 0.7, dropout, parts)

    tensors = problem(out, parts, 2, 3)
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("rows", [1, 26, 50])  # one row, equal chunks, and a smaller last one
def test_it_drops_what_a_dense_layers_function_drops(rows, monkeypatch):
    monkeypatch.setattr("lora.functional.fused._CACHED", 64)
    x, _, A, B = problem(7, None, rows)
    weight = torch.randn(7, 5, dtype=x.dtype)
    torch.manual_seed(1)
    ours = gradients(lambda x, A, B: lora_beside(x, x @ weight.T, A, B, 0.7, 0.3), (x, A, B))
    torch.manual_seed(1)
    theirs = gradients(lambda x, A, B: lora_linear(x, weight, None, A, B, 0.7, 0.3), (x, A, B))
    for got, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("slices", ["whole", "outer"])
def test_low_precision_stays_near_float64(slices, dtype, adapter):
    out, parts = SLICES[slices]
    exact = problem(out, parts, 4, 8, features=16, r=4)
    dtypes = dtype, dtype, adapter, adapter
    tensors = [t.detach().to(wanted).requires_grad_() for t, wanted in zip(exact, dtypes, strict=True)]
    ours = gradients(lora_beside, tensors, 0.5, 0.0, parts)
    rounded = [tensor.detach().double().requires_grad_() for tensor in tensors]
    theirs = gradients(plain_lora_beside, rounded, 0.5, 0.0, parts)
    eps = max(torch.finfo(dtype).eps, torch.finfo(adapter).eps)  # a float32 adapter is cast to x's dtype
    for got, other, tensor in zip(ours, theirs, (tensors[1], *tensors), strict=True):
        assert got.dtype == tensor.dtype
        assert (got.double() - other).norm() / other.norm() < 32**0.5 * eps  # sums of up to 32 products


def test_float16_reaches_what_its_product_with_the_scaling_does_not():
    """B is small at the start: c · h overflows where c · h Bᵀ does not."""
    x, y = torch.full((2, 4), 50.0, dtype=torch.float16), torch.zeros(2, 3, dtype=torch.float16)
    A, B = torch.full((1, 4), 10.0, dtype=torch.float16), torch.full((3, 1), 1e-3, dtype=torch.float16)
    out = lora_beside(x, y, A, B, 64.0)  # h = 2000, 64 h > 65,504
    torch.testing.assert_close(
        out.double(), torch.full((2, 3), 2000 * 64 * 1e-3, dtype=torch.float64), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("slices", ["whole", "outer"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", list(itertools.product([torch.float32, torch.bfloat16], repeat=2)))
def test_under_autocast_it_gives_the_dtypes_of_what_it_was_given(dtypes, dropout, slices):
    """A quantised layer's output is in its input's dtype, or in autocast's; what is added, in the output's."""
    out, parts = SLICES[slices]
    x, y, A, B = problem(out, parts, 4, 3, dtype=torch.float32)
    x, y = (t.detach().to(dtype).requires_grad_() for t, dtype in zip((x, y), dtypes, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(lora_beside, (x, y, A, B), 0.7, dropout, parts)
        kept = kept_for_backward(lambda: lora_beside(x, y, A, B, 0.7, dropout, parts), x, A, B)
    assert [t.dtype for t in got] == [y.dtype, x.dtype, y.dtype, torch.float32, torch.float32]
    assert kept == 12 * len(A) * 2  # h in bfloat16, and x itself
    if dropout == 0:
        exact = gradients(
            plain_lora_beside, [t.detach().double().requires_grad_() for t in (x, y, A, B)], 0.7, 0.0, parts
        )
        for value, other in zip(got, exact, strict=True):
            assert (value.double() - other).norm() <= 2**-6 * other.norm()  # h, and dh, are rounded to 8 bits


def test_a_wider_input_than_the_output():
    """A class that computes in float32, and gives bfloat16."""
    x, y, A, B = problem(7, None, 4, dtype=torch.float32)
    y = y.detach().bfloat16().requires_grad_()
    out, dx, dy, dA, dB = gradients(lora_beside, (x, y, A, B), 0.7)
    assert [t.dtype for t in (out, dx, dy, dA, dB)] == [y.dtype, x.dtype, y.dtype, A.dtype, B.dtype]
    np.testing.assert_allclose(out.detach().float().numpy(), expected(x, y, A, B, 0.7, None), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(
    ("x_shape", "y_shape"),
    [
        ((4, 5), (7,)),
        ((4, 5), (1, 7)),
        ((1, 5), (4, 7)),
        ((4, 3, 5), (1, 3, 7)),
        ((5,), (4, 7)),
        ((2, 3, 5), (2, 3, 1)),
    ],
)
def test_an_output_that_is_not_of_the_inputs_rows_is_broadcast(x_shape, y_shape, trains):
    """A class may give its bias, say, whatever the input."""
    _, _, A, B = problem(7, None)
    x, y = torch.randn(x_shape, dtype=A.dtype), torch.randn(y_shape, dtype=A.dtype)
    with torch.set_grad_enabled(trains):
        out = lora_beside(x, y, A, B, 0.7)
    update = 0.7 * x.numpy() @ A.detach().numpy().T @ B.detach().numpy().T
    np.testing.assert_allclose(out.detach().numpy(), y.numpy() + update, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trains", [True, False])
def test_an_output_of_other_rows_is_an_error(trains):
    _, _, A, B = problem(7, None)
    with torch.set_grad_enabled(trains), pytest.raises(RuntimeError, match="must match the size of tensor"):
        lora_beside(torch.ones(2, 3, 5, dtype=A.dtype), torch.ones(3, 2, 7, dtype=A.dtype), A, B, 0.7)


def test_integers_are_an_error_and_not_an_update_of_zero():
    _, y, A, B = problem(7, None, 4)
    with pytest.raises(RuntimeError, match="dtype"):
        lora_beside(torch.ones(4, 5, dtype=torch.int64), y, A, B, 0.7)


def test_the_seed_that_is_given_is_the_one_that_is_drawn_from():
    tensors = problem(7, None, 30)
    torch.manual_seed(3)
    expected = lora_beside(*tensors, 0.7, 0.5)
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    before = torch.random.get_rng_state()
    assert torch.equal(lora_beside(*tensors, 0.7, 0.5, seed=lambda: seed), expected)
    assert torch.equal(torch.random.get_rng_state(), before)
    lora_beside(*tensors, 0.7, 0.0, seed=lambda: pytest.fail("nothing is dropped"))


def test_the_gradient_of_an_input_that_was_not_kept_is_in_its_own_dtype():
    """Large gradients of an output in float16, for an input in float32."""
    x, y, A, B = problem(7, None, 4, dtype=torch.float32)
    y = y.detach().half()
    out = lora_beside(x, y, A.detach(), B.detach() * 1e3, 1.0)
    d_out = torch.full_like(out, 6e4)
    expected = (d_out.double() @ (B.detach().double() * 1e3) @ A.detach().double()).float()
    (many,) = torch.autograd.grad(out, x, d_out[None], is_grads_batched=True, retain_graph=True)
    for got in (many[0], *torch.autograd.grad(out, x, d_out, create_graph=True)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_differentiating_twice_without_the_input_is_refused():
    x, y, A, B = problem(7, None, 4)
    out = lora_beside(x, y, A.requires_grad_(False), B, 0.7)
    with pytest.raises(RuntimeError, match=r"let lora_A train, or compute with `lora\.functional\.plain_lora_beside`"):
        torch.autograd.grad(out.square().sum(), [x, B], create_graph=True)


def test_many_output_gradients_at_once_where_neither_input_nor_output_is_kept():
    x, y, A, B = problem(7, None, 4)
    out = lora_beside(x, y, A.detach(), B.detach(), 0.7)
    many = torch.randn(3, *out.shape, dtype=out.dtype)
    got = torch.autograd.grad(out, [x, y], many, is_grads_batched=True, retain_graph=True)
    one_by_one = zip(*(torch.autograd.grad(out, [x, y], d, retain_graph=True) for d in many), strict=True)
    for gradient, each in zip(got, one_by_one, strict=True):
        torch.testing.assert_close(gradient, torch.stack(each))


def test_the_output_is_new_and_may_be_written_to():
    x, y, A, B = problem(7, None, 2, 3)
    before = y.detach().clone()
    out = lora_beside(x, y, A, B, 0.7)
    out += 1
    assert torch.equal(y, before)
    torch.autograd.grad(out.sum(), [x, y, A, B])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_without_rows_the_gradients_are_zeros(dropout):
    tensors = problem(7, None, 0)
    found = torch.autograd.grad(lora_beside(*tensors, 0.7, dropout).sum(), tensors)
    assert [gradient.shape for gradient in found] == [tensor.shape for tensor in tensors]
    assert not any(gradient.any() for gradient in found)


# ---- what is kept, made and done -----------------------------------------------------------------------------------

N, FEATURES, OUT, R = 64, 128, 192, 8


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize(("trains_A", "trains_B"), [(True, True), (True, False), (False, True), (False, False)])
def test_it_keeps_x_for_A_and_h_for_B_and_not_a_byte_more(trains_A, trains_B, dropout):
    x, y, A, B = problem(OUT, None, N, features=FEATURES, r=R)
    A.requires_grad_(trains_A), B.requires_grad_(trains_B)
    kept = kept_for_backward(lambda: lora_beside(x, y, A, B, 0.5, dropout), A, B)
    assert kept == 8 * N * (FEATURES * trains_A + R * trains_B)


def test_it_does_no_more_operations_than_the_arithmetic_takes():
    x, y, A, B = problem(OUT, None, N, features=FEATURES, r=R, dtype=torch.float32)
    with Operations() as forward:
        out = lora_beside(x, y, A, B, 0.5)
    assert forward.names == ["mm", "addmm"]
    with torch.no_grad(), Operations() as alone:
        lora_beside(x, y, A, B, 0.5)
    assert alone.names == forward.names
    d_out = torch.randn_like(out)
    with Operations() as backward:
        torch.autograd.grad(out, [x, y, A, B], d_out)
    # dB, a small Bᵀ laid out for MKL, dh, dx, dA: scaled while they are computed
    assert backward.names == ["addmm", "clone", "addmm", "mm", "mm"]


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_it_makes_one_tensor_of_the_outputs_size_and_one_of_the_inputs(dropout):
    x, y, A, B = problem(OUT, None, N, features=FEATURES, r=R, dtype=torch.float32)
    with Operations() as forward:
        out = lora_beside(x, y, A, B, 0.5, dropout)
    assert sorted(size for size in forward.made if size >= 4 * N * OUT) == [4 * N * OUT]
    d_out = torch.randn_like(out)
    with Operations() as backward:
        torch.autograd.grad(out, [x, A, B], d_out)
    noise = [4 * N * FEATURES] * (dropout > 0)  # a chunk of it, here all
    assert sorted(size for size in backward.made if size >= 4 * N * FEATURES) == [4 * N * FEATURES, *noise]
