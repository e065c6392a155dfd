"""The fused linear function is its plain twin, in less memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from counting import Operations, kept_for_backward
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lora.functional import lora_embedding, lora_linear, magnify, plain_lora_linear
from lora.functional.fused import Noise

SLICES = {"whole": (7, None), "outer": (9, ((0, 3), (5, 7))), "inner": (9, ((2, 4), (4, 9))), "last": (6, ((4, 6),))}


def problem(out, slices, *lead, features=5, r=2, dtype=torch.float64, bias=True, grad=True):
    """x, weight, bias, A, B of these sizes, all random."""
    groups, rows = (1, out) if slices is None else (len(slices), sum(stop - start for start, stop in slices))
    x = torch.randn(*lead, features, dtype=dtype, requires_grad=grad)
    weight = torch.randn(out, features, dtype=dtype)
    b = torch.randn(out, dtype=dtype, requires_grad=grad) if bias else None
    A = torch.randn(groups * r, features, dtype=dtype, requires_grad=grad)
    B = torch.randn(rows, r, dtype=dtype, requires_grad=grad)
    return x, weight, b, A, B


def gradients(function, tensors, *arguments):
    """The output of the function, and its gradients for those tensors that have one."""
    y = function(*tensors, *arguments)
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y, *torch.autograd.grad(y, wanted, dy, materialize_grads=True)  # 0 tokens leave some of torch's unused


# ---- the twin --------------------------------------------------------------------------------------------------


@given(
    slices=st.sampled_from(list(SLICES)),
    lead=st.lists(st.integers(0, 4), max_size=3),
    needs=st.sampled_from(list(itertools.product([True, False], repeat=4))[:-1]),
    bias=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "expanded", "strided"]),
)
def test_it_equals_its_plain_twin(slices, lead, needs, bias, layout):
    out, parts = SLICES[slices]
    x, weight, b, A, B = problem(out, parts, *lead, bias=bias)
    with torch.no_grad():
        if layout == "transposed":
            x = x.T.contiguous().T if x.dim() == 2 else x
        elif layout == "expanded" and lead:
            x = x[:1].expand(*lead, 5) if lead[0] else x
        elif layout == "strided":
            x = torch.randn(*lead, 10, dtype=x.dtype)[..., ::2]
    for tensor, needed in zip((x, b, A, B), needs, strict=True):
        if tensor is not None:
            tensor.requires_grad_(needed)
    if not any(tensor is not None and tensor.requires_grad for tensor in (x, b, A, B)):
        x.requires_grad_()
    ours = gradients(lora_linear, (x, weight, b, A, B), 0.7, 0.0, parts)
    theirs = gradients(plain_lora_linear, (x, weight, b, A, B), 0.7, 0.0, parts)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.sampled(5)  # all slices, with dropout and without
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("slices", SLICES)
def test_its_gradients_are_right_and_so_are_theirs(slices, dropout):
    out, parts = SLICES[slices]
    x, weight, b, A, B = problem(out, parts, 2, 3)

    def function(x, b, A, B):
        torch.manual_seed(1)  # one mask for all evaluations: finite differences see a backward that draws another
        return lora_linear(x, weight, b, A, B, 0.7, dropout, parts)

    assert gradcheck(function, (x, b, A, B))
    assert gradgradcheck(function, (x, b, A, B))


@pytest.mark.parametrize("rows", [1, 26, 49, 50])  # one row, equal chunks, and a smaller last one
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_many_chunks_of_noise_are_one_mask(dropout, rows, monkeypatch):
    monkeypatch.setattr("lora.functional.fused._CACHED", 64)
    x, weight, b, A, B = problem(7, None, rows)
    torch.manual_seed(1)
    ours = gradients(lora_linear, (x, weight, b, A, B), 0.7, dropout)
    torch.manual_seed(1)
    mask = Noise.draw(dropout, x).drop(torch.ones_like(x)) / (1 - round(dropout * 256) / 256) if dropout else 0.0
    theirs = gradients(plain_lora_linear, (x, weight, b, A, B), 0.7, mask)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # dA is summed in float32 over chunks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", ["whole", "outer"])
def test_low_precision_stays_near_float64(slices, dtype, adapter):
    out, parts = SLICES[slices]
    exact = problem(out, parts, 4, 8, features=16, r=4)
    x, weight, b, A, B = (tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) for tensor in exact)
    A, B = (tensor.detach().to(adapter).requires_grad_() for tensor in exact[3:])
    ours = gradients(lora_linear, (x, weight, b, A, B), 0.5, 0.0, parts)
    rounded = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, b, A, B)]
    theirs = gradients(plain_lora_linear, rounded, 0.5, 0.0, parts)
    eps = max(torch.finfo(dtype).eps, torch.finfo(adapter).eps)  # a float32 adapter is cast to x's dtype
    for got, expected, tensor in zip(ours, theirs, (x, x, b, A, B), strict=True):
        assert got.dtype == tensor.dtype
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 32**0.5 * eps  # sums of up to 32 products


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_own_dtype_and_gives_gradients_in_theirs(x_dtype, dropout):
    x, weight, b, A, B = problem(7, None, 4, 3, dtype=torch.float32)
    x = x.detach().to(x_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, *grads = gradients(lora_linear, (x, weight, b, A, B), 0.7, dropout)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [x_dtype, torch.float32, torch.float32, torch.float32]


def test_a_trainable_weight_gets_its_gradient():
    x, weight, b, A, B = problem(7, None, 4)
    ours = gradients(lora_linear, (x, weight.requires_grad_(), b, A, B), 0.7)
    theirs = gradients(plain_lora_linear, (x, weight, b, A, B), 0.7)
    assert len(ours) == 6
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_dtypes_that_do_not_fit_raise_what_torch_raises():
    x, weight, _, A, B = problem(7, None, 4, dtype=torch.float32)
    with pytest.raises(RuntimeError) as theirs:
        F.linear(x, weight.double())
    with pytest.raises(RuntimeError) as ours:
        lora_linear(x, weight.double(), None, A, B, 1.0)
    assert str(ours.value) == str(theirs.value)


# ---- differentiating twice -------------------------------------------------------------------------------------


def test_differentiating_twice_without_the_input_is_refused():
    x, weight, _, A, B = problem(7, None, 4)
    y = lora_linear(x, weight, None, A.requires_grad_(False), B, 0.7)
    with pytest.raises(RuntimeError, match=r"let lora_A train, or compute with `lora\.functional\.plain_lora_linear`"):
        torch.autograd.grad(y.square().sum(), [x, B], create_graph=True)
    torch.autograd.grad(lora_linear(x, weight, None, A, B, 0.7).square().sum(), [x, B])  # once is fine


def test_an_input_can_be_differentiated_twice_while_the_adapter_is_frozen():
    x, weight, _, A, B = problem(7, None, 4)

    def penalty(function):
        y = function(x, weight, None, A.detach(), B.detach(), 0.7)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(penalty(lora_linear), penalty(plain_lora_linear), rtol=1e-12, atol=1e-9)


FROZEN = {
    "linear": lambda x, A, B: lora_linear(x, torch.eye(4), None, torch.ones(2, 4), torch.ones(4, 2), 0.5),
    "magnify": lambda x, A, B: magnify(x, torch.tensor([1.0, 1.1, 1.2, 1.3])),
    "embedding": lambda x, A, B: lora_embedding(torch.tensor([2, 0]), torch.zeros(2, 4), A, B, 0.5),
}


@pytest.mark.parametrize("function", FROZEN.values(), ids=FROZEN)
def test_many_output_gradients_at_once_where_the_input_is_not_kept(function):
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((3, 4), (2, 3), (4, 2))]
    y = function(*inputs)
    many = torch.randn(2, *y.shape)
    options = {"retain_graph": True, "allow_unused": True}
    got = torch.autograd.grad(y, inputs, many, is_grads_batched=True, **options)
    expected = zip(*(torch.autograd.grad(y, inputs, dy, **options) for dy in many), strict=True)
    for many_gradients, one_by_one in zip(got, expected, strict=True):
        if many_gradients is not None:
            torch.testing.assert_close(many_gradients, torch.stack(one_by_one))


# ---- dropout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_is_unbiased_and_drops_as_often_as_it_says(p):
    x, A, B = torch.ones(4000, 8), torch.eye(8), torch.eye(8)
    y = lora_linear(x, torch.zeros(8, 8), None, A, B, 1.0, p)
    rounded = round(p * 256) / 256
    deviation = (rounded * (1 - rounded) / y.numel()) ** 0.5
    assert abs((y == 0).double().mean().item() - rounded) < 4 * deviation
    assert abs(y.double().mean().item() - 1) < 4 * deviation / (1 - rounded)
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rounded)))


def test_dropout_follows_manual_seed():
    tensors = problem(7, None, 30)
    torch.manual_seed(3)
    first, second = lora_linear(*tensors, 0.7, 0.5), lora_linear(*tensors, 0.7, 0.5)
    torch.manual_seed(3)
    assert torch.equal(lora_linear(*tensors, 0.7, 0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_without_rows_the_gradients_are_zeros(dropout):
    tensors = problem(7, None, 0)
    given = [tensor for tensor in tensors if tensor.requires_grad]
    found = torch.autograd.grad(lora_linear(*tensors, 0.7, dropout).sum(), given)
    assert [gradient.shape for gradient in found] == [tensor.shape for tensor in given]
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("p", [1e-3, 0.9999])
def test_a_probability_that_would_round_to_nothing_or_all_is_torchs_own_dropout(p):
    x, A, B = torch.ones(20000, 8), torch.eye(8), torch.eye(8)
    dropped = (lora_linear(x, torch.zeros(8, 8), None, A, B, 1.0, p) == 0).double().mean().item()
    assert abs(dropped - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropped", [1, 13, 127, 128, 129, 201, 254, 255])
def test_the_gate_keeps_exactly_what_is_above(dtype, dropped):
    levels = torch.arange(256, dtype=dtype)
    kept = Noise(dropped, 0).gate(torch.ones_like(levels), levels, out=torch.empty_like(levels))
    assert kept.sum().item() == 256 - dropped
    assert not kept[:dropped].any()


# ---- what is kept, made and done -------------------------------------------------------------------------------

N, FEATURES, OUT, R = 64, 256, 192, 8
QKV = ((0, 64), (64, 128), (128, 192))


def parts_of(tensors) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize(("slices", "groups"), [(None, 1), (QKV, 3)])
def test_it_keeps_x_and_h_for_backward_and_not_a_byte_more(slices, groups, dropout, dtype, adapter):
    x, weight, b, A, B = problem(OUT, slices, 2, N // 2, features=FEATURES, r=R, dtype=dtype)
    A, B = A.detach().to(adapter).requires_grad_(), B.detach().to(adapter).requires_grad_()
    kept = kept_for_backward(lambda: lora_linear(x, weight, b, A, B, 0.5, dropout, slices), weight, b, A, B)
    assert kept == (N * FEATURES + N * R * groups) * x.element_size()


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_with_a_frozen_A_it_keeps_h_alone(dropout):
    x, weight, b, A, B = problem(OUT, None, N, features=FEATURES, r=R)
    A.requires_grad_(False)
    assert kept_for_backward(lambda: lora_linear(x, weight, b, A, B, 0.5, dropout), weight, b, A, B) == N * R * 8


@pytest.mark.parametrize("slices", [None, QKV])
@pytest.mark.parametrize("backward", [False, True])
def test_it_makes_little_more_than_a_frozen_layer(slices, backward):
    x, weight, b, A, B = problem(OUT, slices, N, features=FEATURES, r=R, dtype=torch.float32)
    b.requires_grad_(False)
    dy = torch.randn(N, OUT)

    def made(function) -> int:
        with Operations() as counted:
            y = function()
            if backward:
                torch.autograd.grad(y, [t for t in (x, A, B) if t.requires_grad], dy, allow_unused=True)
        return sum(counted.made)

    ours = made(lambda: lora_linear(x, weight, b, A, B, 0.5, 0.0, slices))
    frozen = made(lambda: F.linear(x, weight, b))
    groups = len(slices or [()])
    rank_sized = 4 * (N * R * groups + (2 * A.numel() + 3 * B.numel()) * backward + N * R * groups * 2 * backward)
    assert ours - frozen <= rank_sized


def test_it_does_no_more_operations_than_the_arithmetic_takes():
    x, weight, b, A, B = problem(OUT, None, N, features=FEATURES, r=R, dtype=torch.float32)
    b.requires_grad_(False)
    with Operations() as forward:
        y = lora_linear(x, weight, b, A, B, 0.5)
    assert forward.names == ["addmm", "mm", "addmm_"]
    with torch.no_grad(), Operations() as alone:
        without = lora_linear(x, weight, b, A, B, 0.5)
    assert alone.names == forward.names
    assert torch.equal(without, y)
    dy = torch.randn_like(y)
    with Operations() as backward:
        torch.autograd.grad(y, [x, A, B], dy)
    # dx, dB, a small Bᵀ laid out for MKL, dh, dx += dh A, dA: scaled while they are computed
    assert backward.names == ["mm", "addmm", "clone", "addmm", "addmm_", "mm"]


@pytest.mark.parametrize("slices", [None, QKV])
@pytest.mark.parametrize(
    ("rows", "r", "dtype", "turned"),
    [
        *((rows, r, torch.float32, turned) for rows, r, turned in [(64, 15, 1), (63, 15, 0), (64, 16, 0)]),
        *((rows, 64, torch.float64, turned) for rows, turned in [(128, 1), (127, 0)]),
        *((rows, 8, dtype, dtype == torch.float16) for rows in (1, 64) for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_B_is_laid_out_anew_only_for_many_rows_of_few_columns(rows, r, dtype, turned, slices):
    x, weight, _, A, B = problem(OUT, slices, rows, features=FEATURES, r=r, dtype=dtype, bias=False)
    y = lora_linear(x, weight, None, A, B, 0.5, 0.0, slices)
    with Operations() as backward:
        torch.autograd.grad(y, [x, A, B], torch.randn_like(y))
    assert backward.names.count("clone") == turned * len(slices or [()])


@pytest.mark.parametrize("slices", [None, QKV])
@pytest.mark.parametrize(
    ("rows", "r", "dtype", "turned"),
    [
        *((rows, r, torch.float64, turned) for rows, r, turned in [(1, 2, 0), (2, 2, 1), (16, 8, 0), (17, 8, 1)]),
        *((rows, r, torch.bfloat16, turned) for rows, r, turned in [(4, 2, 0), (5, 2, 1), (N, 8, 0)]),
    ],
)
def test_the_gradient_of_B_lies_as_B_does_unless_there_are_many_rows_of_few_columns(rows, r, dtype, turned, slices):
    """Autograd copies a gradient that lies otherwise; and each way computes the same."""
    x, weight, _, A, B = problem(OUT, slices, rows, features=FEATURES, r=r, dtype=dtype, bias=False)
    dy = torch.randn(rows, OUT, dtype=x.dtype)
    got = torch.autograd.grad(lora_linear(x, weight, None, A, B, 0.5, 0.0, slices), B, dy)[0]
    expected = torch.autograd.grad(plain_lora_linear(x, weight, None, A, B, 0.5, 0.0, slices), B, dy)[0]
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous() == (not turned or slices is not None)  # those of slices are put together
