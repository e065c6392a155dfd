"""The fused convolution is its plain twin, in less memory."""

import pytest
import torch
from counting import Operations, kept_for_backward
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from lora.functional import Geometry, lora_conv, plain_lora_conv


def problem(dims, kernel=2, size=5, batch=2, dtype=torch.float64, r=2):
    """x, weight, bias, A and B, all random."""
    shape, window = (size,) * dims, (kernel,) * dims
    x = torch.randn(batch, 3, *shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 3, *window, dtype=dtype)
    bias = torch.randn(4, dtype=dtype, requires_grad=True)
    A = torch.randn(r, 3, *window, dtype=dtype, requires_grad=True)
    B = torch.randn(4, r, *(1,) * dims, dtype=dtype, requires_grad=True)
    return x, weight, bias, A, B


def gradients(function, tensors, *arguments):
    y = function(*tensors, *arguments)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y, *torch.autograd.grad(y, [tensor for tensor in tensors if tensor.requires_grad], dy)


@given(
    dims=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    batch=st.integers(0, 2),
    needs=st.sampled_from([(True, True, True), (True, False, True), (False, True, True), (True, True, False)]),
    channels_last=st.booleans(),
)
def test_it_equals_its_plain_twin(dims, kernel, stride, padding, dilation, batch, needs, channels_last):
    x, weight, bias, A, B = problem(dims, kernel, batch=batch)
    if channels_last and dims == 2:
        x = x.detach().to(memory_format=torch.channels_last)
    for tensor, needed in zip((x, A, B), needs, strict=True):
        tensor.requires_grad_(needed)
    geometry = Geometry((stride,) * dims, (padding,) * dims, (dilation,) * dims)
    ours = gradients(lora_conv, (x, weight, bias, A, B), 0.7, geometry)
    theirs = gradients(plain_lora_conv, (x, weight, bias, A, B), 0.7, geometry)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dims", [1, 2])
def test_its_gradients_are_right_and_so_are_theirs(dims, dropout):
    x, weight, bias, A, B = problem(dims, size=4)
    geometry = Geometry((1,) * dims, (1,) * dims, (1,) * dims)

    def function(x, bias, A, B):
        torch.manual_seed(1)  # one mask for all evaluations: finite differences see a backward that draws another
        return lora_conv(x, weight, bias, A, B, 0.7, geometry, dropout)

    assert gradcheck(function, (x, bias, A, B))
    assert gradgradcheck(function, (x, bias, A, B))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_keeps_x_and_h_for_backward_and_not_a_byte_more(dropout):
    x, weight, bias, A, B = problem(2, kernel=3, size=16, dtype=torch.float32)
    geometry = Geometry((1, 1), (1, 1), (1, 1))
    kept = kept_for_backward(lambda: lora_conv(x, weight, bias, A, B, 0.7, geometry, dropout), weight, bias, A, B)
    assert kept == (x.numel() + 2 * 2 * 16 * 16) * 4


def test_autocast_computes_in_its_own_dtype_and_gives_gradients_in_theirs():
    x, weight, bias, A, B = problem(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, *grads = gradients(lora_conv, (x, weight, bias, A, B), 0.7, Geometry((1, 1), (0, 0), (1, 1)))
    assert y.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in grads} == {torch.float32}


def test_its_backward_copies_no_gradient_of_the_output():
    x, W = torch.randn(3, 4, 9, 9, requires_grad=True), torch.randn(32, 4, 3, 3)
    A, B = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(32, 2, 1, 1, requires_grad=True)
    y = lora_conv(x, W, None, A, B, 0.5, Geometry((1, 1), (1, 1), (1, 1)))
    dy = torch.randn_like(y)
    with Operations() as counted:
        torch.autograd.grad(y, (x, A, B), dy)
    assert max(counted.made) < dy.nbytes
    assert "clone" not in counted.names
