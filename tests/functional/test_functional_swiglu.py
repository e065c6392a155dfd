"""The fused MLP is its plain twin, and keeps less for backward."""

import pytest
import torch
import torch.nn.functional as F
from counting import kept_for_backward
from torch.autograd import gradcheck

from lora.functional import Adapted, lora_swiglu, plain_lora_swiglu

HIDDEN, INTERMEDIATE = 6, 8
HALVES = ((0, INTERMEDIATE), (INTERMEDIATE, 2 * INTERMEDIATE))


def layer(out, features, slices, *, r=2, dtype=torch.float64, bias=False, dropout=0.0):
    groups = len(slices or ((),))
    return Adapted(
        torch.randn(out, features, dtype=dtype),
        torch.randn(out, dtype=dtype) if bias else None,
        torch.randn(groups * r, features, dtype=dtype, requires_grad=True),
        torch.randn(sum(j - i for i, j in slices) if slices else out, r, dtype=dtype, requires_grad=True),
        0.7,
        dropout,
        slices,
    )


def problem(slices=HALVES, hidden=HIDDEN, intermediate=INTERMEDIATE, lead=(2, 3), **options):
    dtype = options.get("dtype", torch.float64)
    x = torch.randn(*lead, hidden, dtype=dtype, requires_grad=True)
    return x, layer(2 * intermediate, hidden, slices, **options), layer(hidden, intermediate, None, **options)


def gradients(function, x, gate_up, down):
    y = function(x, gate_up, down)
    wanted = [t for t in (x, gate_up.A, gate_up.B, down.A, down.B) if t.requires_grad]
    return y, *torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))


@pytest.mark.parametrize("slices", [HALVES, None, HALVES[1:]], ids=["both", "as one", "up only"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_equation(slices, bias):
    x, gate_up, down = problem(slices, bias=bias)

    def dense(adapted):
        update = torch.zeros_like(adapted.weight)
        row = a = 0
        for start, stop in adapted.slices or ((0, len(adapted.weight)),):
            part = adapted.B[row : row + stop - start] @ adapted.A[a : a + 2]
            update = torch.cat([update[:start], part, update[stop:]])
            row, a = row + stop - start, a + 2
        return adapted.weight + 0.7 * update

    def equation(x, gate_up, down):
        gate, up = F.linear(x, dense(gate_up), gate_up.bias).chunk(2, -1)
        return F.linear(gate * torch.sigmoid(gate) * up, dense(down), down.bias)

    for function in (lora_swiglu, plain_lora_swiglu):
        ours = gradients(function, x, gate_up, down)
        for got, expected in zip(ours, gradients(equation, x, gate_up, down), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_its_gradients_are_right(dropout):
    x, gate_up, down = problem(dropout=dropout)

    def function(x, A1, B1, A2, B2):
        torch.manual_seed(1)  # one mask for all evaluations: finite differences see a backward that draws another
        return lora_swiglu(x, gate_up._replace(A=A1, B=B1), down._replace(A=A2, B=B2))

    assert gradcheck(function, (x, gate_up.A, gate_up.B, down.A, down.B))


@pytest.mark.parametrize("frozen", ["x", "A1", "B1", "A2", "B2"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    x, gate_up, down = problem()
    names = dict(zip(("x", "A1", "B1", "A2", "B2"), gradients(lora_swiglu, x, gate_up, down)[1:], strict=True))
    del names[frozen]
    {"x": x, "A1": gate_up.A, "B1": gate_up.B, "A2": down.A, "B2": down.B}[frozen].requires_grad_(False)
    for got, expected in zip(gradients(lora_swiglu, x, gate_up, down)[1:], names.values(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_the_input_gate_and_up_and_no_activation(dtype, dropout):
    N, hidden, intermediate, r = 32, 48, 128, 2
    halves = ((0, intermediate), (intermediate, 2 * intermediate))
    x, gate_up, down = problem(halves, hidden, intermediate, (N,), dtype=dtype, dropout=dropout)
    known = [t for adapted in (gate_up, down) for t in adapted[:4] if t is not None]
    fused = kept_for_backward(lambda: lora_swiglu(x, gate_up, down), *known)
    assert fused == N * (hidden + 2 * intermediate + 3 * r) * x.element_size()
    assert kept_for_backward(lambda: plain_lora_swiglu(x, gate_up, down), *known) > 1.5 * fused


def test_a_bias_that_trains_gets_its_gradient():
    x, gate_up, down = problem(bias=True)
    down.bias.requires_grad_()
    (got,) = torch.autograd.grad(lora_swiglu(x, gate_up, down).sum(), down.bias)
    torch.testing.assert_close(got, torch.full_like(got, 6))


def test_differentiating_twice_is_refused_and_the_way_out_is_named():
    x, gate_up, down = problem()
    y = lora_swiglu(x, gate_up, down)
    with pytest.raises(RuntimeError, match=r"compute with `lora\.functional\.plain_lora_swiglu`"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_autocast_computes_in_its_own_dtype():
    x, gate_up, down = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, *grads = gradients(lora_swiglu, x, gate_up, down)
    assert y.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in grads} == {torch.float32}
