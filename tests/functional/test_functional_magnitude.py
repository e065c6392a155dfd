"""The fused magnitudes are their plain twin, and the equation in float64, in less memory."""

import itertools
import math

import numpy as np
import pytest
import torch
from counting import Operations, kept_for_backward
from hypothesis import given
from hypothesis import strategies as st
from pairwise import every_two
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lora.functional import magnify, plain_magnify

NEEDS = list(itertools.product([True, False], repeat=3))[:-1]
# shape of y, and the dimension that counts the outputs
SHAPES = {
    "matrix": ((3, 5), -1),
    "one row": ((5,), -1),
    "no rows": ((0, 5), -1),
    "no positions": ((2, 3, 0), 1),
    "tokens": ((2, 3, 5), -1),
    "conv1d": ((2, 3, 5), 1),
    "conv2d": ((2, 3, 4, 5), 1),
    "conv2d, counted from the end": ((2, 3, 4, 5), -3),
    "conv3d without a batch": ((3, 2, 2, 4), -4),
    "first": ((3, 5), 0),
}


def problem(shape, dim, dtype=torch.float64, bias=True, needs=(True, True, True)):
    """y, g, b, all random."""
    y, g = torch.randn(shape, dtype=dtype), torch.randn(shape[dim], dtype=dtype)
    b = torch.randn(shape[dim], dtype=dtype) if bias else None
    for tensor, needed in zip((y, g, b), needs, strict=True):
        if tensor is not None:
            tensor.requires_grad_(needed)
    return y, g, b


def gradients(function, tensors, dim):
    """The output, and its gradients for those tensors that have one."""
    z = function(*tensors, dim)
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    dz = torch.linspace(-1, 2, z.numel(), dtype=z.dtype).view(z.shape)
    return z, *(torch.autograd.grad(z, wanted, dz) if wanted else ())


def by_numpy(y, g, b, dim, dz):
    """z, dy, dg, db from the equation, in float64; all tensors as arrays."""
    shape = [1] * y.ndim
    shape[dim] = -1
    others = tuple(i for i in range(y.ndim) if i != dim % y.ndim)
    centred = y - b.reshape(shape)
    return (
        g.reshape(shape) * centred + b.reshape(shape),
        g.reshape(shape) * dz,
        (dz * centred).sum(others),
        (1 - g) * dz.sum(others),
    )


# ---- what it computes ------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    data=st.data(),
    bias=st.booleans(),
    needs=st.sampled_from(NEEDS),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
)
def test_it_equals_its_plain_twin(shape, data, bias, needs, layout):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    y, g, b = problem(tuple(shape), dim, bias=bias)
    with torch.no_grad():
        if layout == "transposed":
            y = torch.randn(shape[::-1], dtype=y.dtype).permute(*reversed(range(len(shape))))
        elif layout == "strided":
            y = torch.randn(*shape[:-1], 2 * shape[-1], dtype=y.dtype)[..., ::2]
            g = torch.randn(2 * len(g), dtype=g.dtype)[::2]
        elif layout == "expanded":
            y = torch.randn(1, *shape[1:], dtype=y.dtype).expand(shape)
    for tensor, needed in zip((y, g, b), needs, strict=True):
        if tensor is not None:
            tensor.requires_grad_(needed)
    ours, theirs = (gradients(function, (y, g, b), dim) for function in (magnify, plain_magnify))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@every_two(
    shape_and_dim=SHAPES,
    dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
    function=[magnify, plain_magnify],
)
def test_it_is_the_equation(shape_and_dim, dtype, function):
    shape, dim = shape_and_dim
    y, g, b = problem(shape, dim, dtype)
    dz = torch.randn(shape, dtype=dtype)
    z = function(y, g, b, dim)
    got = z, *torch.autograd.grad(z, (y, g, b), dz)
    *arrays, d = (tensor.detach().double().numpy() for tensor in (y, g, b, dz))
    terms, eps = max(1, y.numel() // shape[dim]), torch.finfo(dtype).eps
    # No two terms cancel.
    largest_of_all = by_numpy(np.abs(arrays[0]), -np.abs(arrays[1]), -np.abs(arrays[2]), dim, np.abs(d))
    for value, expected, largest in zip(got, by_numpy(*arrays, dim, d), largest_of_all, strict=True):
        assert value.dtype == dtype
        error = np.abs(value.detach().double().numpy() - expected)
        assert (error <= 4 * math.sqrt(terms) * eps * np.abs(largest)).all()


@given(
    exponents=st.lists(st.floats(-4, 4), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    function=st.sampled_from([magnify, plain_magnify]),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_gain_costs_a_few_roundings_of_the_output(exponents, dtype, function, bias, seed):
    """Not of g − 1, which is as large as 1 where g is small."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.promote_types(dtype, torch.float32)
    n, eps, tiny = len(exponents), torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    g = (10 ** torch.tensor(exponents, dtype=torch.float64)).to(exact).requires_grad_()
    y, dz, b = (torch.rand(shape, generator=generator).sub(0.5).to(dtype) for shape in ((16, n), (16, n), n))
    y.requires_grad_()
    z = function(y, g, b if bias else None)
    dy, dg = torch.autograd.grad(z, (y, g), dz)
    assert (z.dtype, dy.dtype, dg.dtype) == (dtype, dtype, exact)
    Y, G, B, D = (tensor.detach().double() for tensor in (y, g, b if bias else torch.zeros_like(b), dz))
    # At most: of each product, of the sums, of the gain's lower part and of the offset.
    assert ((z.double() - (G * (Y - B) + B)).abs() <= 3 * (eps * (G * Y.abs() + (1 - G).abs() * B.abs()) + tiny)).all()
    assert ((dy.double() - G * D).abs() <= 2 * (eps * (G * D).abs() + tiny)).all()
    terms = (D.abs() * (Y.abs() + B.abs())).sum(0)
    assert ((dg.double() - (D * (Y - B)).sum(0)).abs() <= 2 * eps * terms + 16 * tiny).all()


@pytest.mark.parametrize("function", [magnify, plain_magnify])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_with_a_gain_of_one_nothing_changes_not_a_bit(dtype, bias, function):
    y, _, b = problem((64, 33), -1, dtype, bias)
    y = y * torch.logspace(-4, 4, 33, dtype=dtype)
    for one in (torch.ones(33, dtype=dtype), torch.ones(33)):
        assert torch.equal(function(y, one, b), y)


def test_it_writes_nothing_that_it_is_given():
    tensors = problem((4, 5), -1)
    before = [tensor.detach().clone() for tensor in tensors]
    z = magnify(*tensors)
    z.sum().backward()
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_long_sum_in_low_precision_is_taken_in_float32(dtype):
    y, g, _ = problem((2**14, 3), -1, dtype, bias=False)
    y = (torch.rand(2**14, 3) + 0.5).to(dtype).requires_grad_()
    (got,) = torch.autograd.grad(magnify(y, g), g, torch.ones_like(y))
    expected = y.detach().double().sum(0)
    assert ((got.double() - expected) / expected).abs().max() <= torch.finfo(dtype).eps


# ---- its gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "dim"), [SHAPES[name] for name in ("matrix", "one row", "conv2d", "first")])
def test_its_gradients_are_right_and_so_are_theirs(shape, dim, bias):
    tensors = problem(shape, dim, bias=bias)
    assert gradcheck(lambda *inputs: magnify(*inputs, dim), tensors)
    assert gradgradcheck(lambda *inputs: magnify(*inputs, dim), tensors)
    assert gradcheck(lambda *inputs: magnify(*inputs, dim), tensors, check_batched_grad=True)


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_second_derivatives_for_what_needs_them(needs):
    def second(function):
        torch.manual_seed(0)
        tensors = problem((3, 4), -1, needs=needs)
        dz = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        first = torch.autograd.grad(function(*tensors), wanted, dz, create_graph=True)
        total = sum((gradient**2).sum() for gradient in first)
        return torch.autograd.grad(total, [*wanted, dz], materialize_grads=True)

    for got, expected in zip(second(magnify), second(plain_magnify), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# ---- transforms, compilation, autocast -------------------------------------------------------------------------


def test_it_compiles_without_a_graph_break():
    torch._dynamo.reset()
    compiled = torch.compile(magnify, fullgraph=True, backend="aot_eager")
    tensors = problem((3, 5), -1)
    ours, theirs = (gradients(function, tensors, -1) for function in (compiled, plain_magnify))
    torch.testing.assert_close(ours, theirs)


# torch's own forward-mode rules are made with torch.jit.script, which torch deprecates (by another warning in each
# release: in 2.13 a DeprecationWarning, in 2.14 a FutureWarning; so the words alone are named).
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_function_transforms():
    y, g, b = problem((6, 3, 5), -1, needs=(False, False, False))
    g, b = torch.randn(2, 6, 5, dtype=y.dtype)
    got = torch.func.vmap(magnify)(y, g, b)
    for i in range(6):
        torch.testing.assert_close(got[i], plain_magnify(y[i], g[i], b[i]))
    jacobian = torch.func.jacrev(lambda g: magnify(y[0], g, b[0]).sum(0))(g[0])
    torch.testing.assert_close(jacobian, torch.diag((y[0] - b[0]).sum(0)))
    _, tangent = torch.func.jvp(lambda g: magnify(y[0], g, b[0]), (g[0],), (torch.ones_like(g[0]),))
    torch.testing.assert_close(tangent, y[0] - b[0])


def test_a_batch_of_gradients():
    y, g, b = problem((3, 5), -1)
    z = magnify(y, g, b)
    many = torch.randn(4, 3, 5, dtype=z.dtype)
    got = torch.autograd.grad(z, (y, g, b), many, is_grads_batched=True)
    for i, dz in enumerate(many):
        expected = torch.autograd.grad(plain_magnify(y, g, b), (y, g, b), dz)
        torch.testing.assert_close(tuple(gradient[i] for gradient in got), expected)


def test_outputs_in_another_dtype_than_the_bias_stay_in_theirs():
    y, g, _ = problem((3, 5), -1, torch.bfloat16)
    b = torch.randn(5, requires_grad=True)
    z = magnify(y, g, b)
    assert z.dtype == torch.bfloat16
    z.sum().backward()
    assert (y.grad.dtype, g.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_under_autocast_it_computes_in_the_dtype_that_it_is_given():
    tensors = problem((3, 5), -1, torch.float32)
    plain = gradients(magnify, tensors, -1)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(magnify, tensors, -1)
    assert all(map(torch.equal, plain, cast))


# ---- what it costs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_it_keeps_its_input_and_nothing_else(bias):
    y, g, b = problem((128, 32), -1, torch.float32, bias)
    known = [tensor for tensor in (g, b) if tensor is not None]
    leaf = y.detach()  # so that it has storage of its own
    assert kept_for_backward(lambda: magnify(y, g, b), *known) == leaf.numel() * 4
    assert kept_for_backward(lambda: magnify(y, g.detach(), b), g, *known) == 0  # a frozen magnitude


def test_a_step_makes_two_tensors_of_the_outputs_size():
    y, g, b = problem((256, 64), -1, torch.float32)
    y, dz = y * 1, torch.randn(256, 64)
    with Operations() as counted:
        torch.autograd.grad(magnify(y, g, b), (y, g, b), dz)
    large = [size for size in counted.made if size >= y.numel() * 4]
    assert len(large) <= 3  # z, dy, and what the sum of a gradient's products is taken from
    assert counted.largest == y.numel()
    assert len(counted.names) <= 16  # one part, as it fits into a cache


def test_no_part_of_a_large_sum_is_larger_than_a_cache():
    y, g, _ = problem((2**12, 256), -1, torch.float32, bias=False)
    y.detach_()
    z = magnify(y, g)
    with Operations() as counted:
        torch.autograd.grad(z, g, torch.ones_like(z))
    assert counted.largest <= 2**12 * 256  # the ones
    made: list[Tensor] = counted.made
    assert sum(size > 2**18 * 4 for size in made) == 1
