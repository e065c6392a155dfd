"""The fused cross entropy over a frozen head is the formula in float64, and never has all logits."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from counting import Operations, kept_for_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from lora.functional import cross_entropy as module
from lora.functional import linear_cross_entropy, plain_linear_cross_entropy

FUNCTIONS = {"fused": linear_cross_entropy, "plain": plain_linear_cross_entropy}
REDUCTIONS = ("mean", "sum", "none")


def problem(*lead, features=5, classes=7, dtype=torch.float64, bias=True, ignored=0.3, ignore_index=-100):
    """hidden, weight, labels and bias of these sizes, all random."""
    hidden = torch.randn(*lead, features, dtype=dtype, requires_grad=True)
    labels = torch.randint(classes, lead)
    labels[torch.rand(lead) < ignored] = ignore_index
    weight, b = torch.randn(classes, features, dtype=dtype), torch.randn(classes, dtype=dtype)
    return hidden, weight, labels, b if bias else None


def formula(hidden, weight, labels, bias, ignore_index=-100, softcap=None):
    """The losses (...) and the gradient of each by its own row (..., features), in numpy's float64."""
    x, W = (tensor.detach().double().numpy() for tensor in (hidden, weight))
    z = x @ W.T + (0 if bias is None else bias.detach().double().numpy())
    slope = 1.0 if softcap is None else np.cosh(z / softcap) ** -2
    z = z if softcap is None else softcap * np.tanh(z / softcap)
    z = z - z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    counts = labels.numpy() != ignore_index
    onehot = np.eye(W.shape[0])[np.where(counts, labels.numpy(), 0)]
    losses = np.where(counts, -(log_p * onehot).sum(-1), 0.0)
    gradient = np.where(counts[..., None], ((np.exp(log_p) - onehot) * slope) @ W, 0.0)
    return torch.from_numpy(losses), torch.from_numpy(gradient)


def expected(hidden, weight, labels, bias, reduction, ignore_index=-100, softcap=None):
    """The loss, what it is differentiated from above by, and the gradient of hidden, by the formula."""
    losses, gradient = formula(hidden, weight, labels, bias, ignore_index, softcap)
    if reduction == "none":
        dy = torch.linspace(-1, 1, labels.numel(), dtype=torch.float64).view(labels.shape)
        return losses, dy, gradient * dy.unsqueeze(-1)
    n = (labels != ignore_index).sum() if reduction == "mean" else 1
    dy = torch.tensor(0.7, dtype=torch.float64)
    # Of no row that counts torch's mean is NaN, and its gradient 0.
    return losses.sum() / n, dy, gradient * dy / max(1, n)


def loss_and_gradient(function, hidden, weight, labels, bias, dy, **options):
    loss = function(hidden, weight, labels, bias, **options)
    return loss, torch.autograd.grad(loss, hidden, dy.to(loss.dtype))[0]


# ---- the formula ---------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    classes=st.integers(1, 9),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    ignore_index=st.sampled_from([-100, 0, 3]),
    reduction=st.sampled_from(REDUCTIONS),
    logits=st.integers(1, 60),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    softcap=st.sampled_from([None, 1, 3.5]),
)
def test_it_is_the_formula(lead, classes, bias, ignored, ignore_index, reduction, logits, layout, softcap):
    options = {"ignore_index": min(ignore_index, classes - 1), "reduction": reduction, "softcap": softcap}
    hidden, weight, labels, b = problem(
        *lead, classes=classes, bias=bias, ignored=ignored, ignore_index=options["ignore_index"]
    )
    hidden, labels = hidden.detach(), torch.stack([labels, labels], -1)[..., 0]  # not contiguous
    if layout == "transposed":
        hidden, weight = hidden.T.contiguous().T if len(lead) == 1 else hidden, weight.T.contiguous().T
    elif layout == "strided":
        hidden = torch.stack([hidden, hidden], -1)[..., 0]
    hidden.requires_grad_()
    loss, dy, gradient = expected(hidden, weight, labels, b, **options)
    plain = loss_and_gradient(plain_linear_cross_entropy, hidden, weight, labels, b, dy, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LOGITS", {"cpu": logits})  # at a time: from one row to all
        fused = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, b, dy, **options)
        with torch.no_grad():
            alone = linear_cross_entropy(hidden, weight, labels, b, **options)
    for got in (fused, plain, (alone, gradient)):
        torch.testing.assert_close(got, (loss, gradient), rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_its_gradients_are_right(reduction, softcap):
    hidden, weight, labels, b = problem(2, 3)
    options = {"reduction": reduction, "softcap": softcap}
    assert gradcheck(lambda hidden: linear_cross_entropy(hidden, weight, labels, b, **options), hidden)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_soft_cap_bounds_what_the_softmax_is_given(function):
    """Against torch's own operations, of logits far beyond the cap: every slope is nearly 0, and yet not 0."""
    hidden, weight, labels, b = problem(40)
    hidden = (4 * hidden.detach()).requires_grad_()
    u = F.linear(hidden, weight, b)
    assert u.abs().max() > 10
    loss = F.cross_entropy(2 * torch.tanh(u / 2), labels)
    dy = torch.tensor(1.0, dtype=torch.float64)
    theirs = loss, torch.autograd.grad(loss, hidden, dy)[0]
    ours = loss_and_gradient(function, hidden, weight, labels, b, dy, softcap=2)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert loss < F.cross_entropy(u, labels) - 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [4, 0])
def test_where_no_row_counts_it_is_what_torch_gives(rows, reduction):
    hidden, weight, labels, b = problem(rows, ignored=1.0)
    loss = F.cross_entropy(F.linear(hidden, weight, b), labels, reduction=reduction)
    dy = torch.ones_like(loss)
    ours = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, b, dy, reduction=reduction)
    theirs = loss, torch.autograd.grad(loss, hidden, dy)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert loss.isnan().any() == (reduction == "mean")


def test_a_mean_of_each_row_is_that_of_the_row_alone():
    hidden, weight, labels, _ = problem(3, 4)
    labels[1] = -100
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none")
    means = losses.sum(1) / (labels != -100).sum(1)
    gradient = torch.autograd.grad(means, hidden, torch.tensor([1.0, 2.0, 3.0]).double())[0]
    for row, factor in ((0, 1), (2, 3)):
        alone = hidden[row].detach().requires_grad_()
        loss = F.cross_entropy(F.linear(alone, weight), labels[row])
        torch.testing.assert_close(means[row], loss)
        torch.testing.assert_close(gradient[row], factor * torch.autograd.grad(loss, alone)[0])
    assert means[1].isnan()
    assert not gradient[1].any()


def test_what_is_certain_still_has_a_gradient():
    """Of a softmax that is 1 but for 1e-5, bfloat16 has nothing left: it is rounded after the label's 1 is taken."""
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[11.5, 1.0], [0.0, -1.0]], dtype=torch.bfloat16)
    loss, dy, gradient = expected(hidden, weight, torch.tensor([0]), None, "mean")
    ours = loss_and_gradient(linear_cross_entropy, hidden, weight, torch.tensor([0]), None, dy)
    torch.testing.assert_close(ours[1].double(), gradient, rtol=4 * torch.finfo(torch.bfloat16).eps, atol=0)
    torch.testing.assert_close(ours[0].double(), loss, rtol=0, atol=torch.finfo(torch.float32).eps)


# ---- dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_stays_near_float64(dtype, reduction, softcap):
    torch.manual_seed(0)
    exact = problem(8, 8, features=16, classes=100)
    hidden, weight, b = (t.detach().to(dtype) for t in (exact[0], exact[1], exact[3]))
    hidden, labels = hidden.requires_grad_(), exact[2]
    loss, dy, gradient = expected(hidden, weight, labels, b, reduction, softcap=softcap)
    options = {"reduction": reduction, "softcap": softcap}
    got, dhidden = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, b, dy, **options)
    assert got.dtype == torch.float32
    assert dhidden.dtype == dtype
    # The logits are rounded to dtype, the softmax and the loss are not.
    size = F.linear(hidden, weight, b).abs().max().item()
    each = torch.finfo(dtype).eps * size / 2 + 8 * torch.finfo(torch.float32).eps * size
    scale = {"mean": 1.0, "sum": labels.numel(), "none": 1.0}[reduction]
    torch.testing.assert_close(got.double(), loss, rtol=0, atol=2 * each * scale)
    # What an error of a logit is to p, and the roundings of p − onehot, of the product, and of its scaling.
    error = (dhidden.double() - gradient).norm() / gradient.norm()
    assert error < 2 * each + 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_own_dtype_and_gives_gradients_in_theirs(hidden_dtype):
    hidden, weight, labels, b = problem(4, 3, dtype=torch.float32)
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, b, torch.tensor(1.0))
        theirs = loss_and_gradient(plain_linear_cross_entropy, hidden, weight, labels, b, torch.tensor(1.0))
    in_bfloat16 = hidden.detach().bfloat16().requires_grad_(), weight.bfloat16(), labels, b.bfloat16()
    outside = loss_and_gradient(linear_cross_entropy, *in_bfloat16, torch.tensor(1.0))
    assert ours[0].dtype == theirs[0].dtype == torch.float32
    assert ours[1].dtype == theirs[1].dtype == hidden_dtype
    assert torch.equal(ours[0], outside[0])
    torch.testing.assert_close(ours[0], theirs[0])
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(ours[1], theirs[1], rtol=4 * eps, atol=4 * eps * theirs[1].abs().max().item())


def test_a_mean_over_many_rows_is_no_zero_in_float16():
    """p / N ends below what float16 can hold: only the product is scaled."""
    hidden, weight, _, _ = problem(1, features=4, classes=50, dtype=torch.float16)
    many = hidden.detach().expand(2**15, 4).requires_grad_()
    labels = torch.zeros(2**15, dtype=torch.int64)
    _, dy, gradient = expected(many, weight, labels, None, "mean")
    _, ours = loss_and_gradient(linear_cross_entropy, many, weight, labels, None, dy * 2**15)
    scaled = gradient * 2**15
    error = (ours.double() - scaled).norm() / scaled.norm()
    assert error < 16 * torch.finfo(torch.float16).eps


def test_dtypes_that_do_not_fit_raise_what_torch_raises():
    hidden, weight, labels, _ = problem(4)
    with pytest.raises(RuntimeError) as theirs:
        F.linear(hidden, weight.float())
    with pytest.raises(RuntimeError) as ours:
        linear_cross_entropy(hidden, weight.float(), labels)
    assert str(ours.value) == str(theirs.value)


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [7, -1, 10**9])
@pytest.mark.parametrize("gradient", [True, False])
def test_a_label_out_of_range_raises_what_torch_raises(label, gradient):
    hidden, weight, labels, b = problem(4)
    labels[2] = label
    with pytest.raises(IndexError) as theirs:
        F.cross_entropy(F.linear(hidden, weight, b), labels)
    with pytest.raises(IndexError) as ours:
        linear_cross_entropy(hidden.detach().requires_grad_(gradient), weight, labels, b)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_is_given_wrong_is_said(function):
    hidden, weight, labels, _ = problem(2, 3)
    with pytest.raises(ValueError, match=r"hidden is \(2, 3, 5\), labels are \(2, 2\)\."):
        function(hidden, weight, labels[:, 1:])
    with pytest.raises(ValueError, match=r"labels are \(3, 2\)"):  # as many, in another order
        function(hidden, weight, labels.T)
    with pytest.raises(ValueError, match=r"must be one of 'mean', 'sum', 'none', got 'max'\."):
        function(hidden, weight, labels, reduction="max")


@pytest.mark.parametrize("softcap", [0, -1.0, float("inf"), float("nan"), True, "30", 1e39, 1e-39])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_is_no_soft_cap_is_refused(function, softcap):
    hidden, weight, labels, _ = problem(2)
    said = (
        "linear_cross_entropy: softcap must be None or a number above 0 that float32 can hold, "
        f"from 1.18e-38 to 3.4e+38; got {softcap!r}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        function(hidden, weight, labels, softcap=softcap)


@pytest.mark.parametrize("softcap", [3.4e38, 1.2e-38])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_widest_and_the_narrowest_soft_cap(function, softcap):
    hidden, weight, labels, _ = problem(5)
    losses = function(hidden.float(), weight.float(), labels, softcap=softcap, reduction="none")
    logits = F.linear(hidden, weight)  # so far below the widest cap that it leaves them as they are
    expected = F.cross_entropy(logits if softcap > 1 else 0 * logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected.float(), rtol=1e-5, atol=1e-5)


# ---- where the twin is taken ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("trains", ["weight", "bias"])
def test_a_head_that_trains_gets_its_gradient(trains, softcap):
    hidden, weight, labels, b = problem(4)
    (weight if trains == "weight" else b).requires_grad_()
    wanted = [hidden, weight if trains == "weight" else b]
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, b, softcap=softcap), wanted)
    theirs = torch.autograd.grad(plain_linear_cross_entropy(hidden, weight, labels, b, softcap=softcap), wanted)
    assert all(map(torch.equal, ours, theirs))


def test_a_head_that_would_train_is_measured_in_chunks(monkeypatch):
    monkeypatch.setattr(module, "_LOGITS", {"cpu": 64})
    hidden, weight, labels, b = problem(16, classes=32)
    with torch.no_grad(), Operations() as counted:
        linear_cross_entropy(hidden, weight.requires_grad_(), labels, b)
    assert counted.largest == 64


def test_a_frozen_parameter_is_a_frozen_tensor():
    hidden, weight, labels, b = problem(4)
    frozen = [nn.Parameter(tensor, requires_grad=False) for tensor in (weight, b)]
    kept = kept_for_backward(
        lambda: linear_cross_entropy(hidden, frozen[0], labels, frozen[1], reduction="sum"), labels
    )
    assert kept == hidden.nbytes  # and no logits


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_compiler_has_the_plain_one_in_one_graph(softcap):
    hidden, weight, labels, b = problem(4, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    ours = loss_and_gradient(compiled, hidden, weight, labels, b, torch.tensor(1.0), softcap=softcap)
    theirs = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, b, torch.tensor(1.0), softcap=softcap)
    torch.testing.assert_close(ours, theirs)


def test_without_values_it_has_a_shape():
    with torch.device("meta"):
        hidden, weight, labels = torch.empty(2, 3, 5), torch.empty(7, 5), torch.empty(2, 3, dtype=torch.int64)
    assert linear_cross_entropy(hidden, weight, labels, reduction="none").shape == (2, 3)


# ---- what is kept, made and done -----------------------------------------------------------------------------------

N, FEATURES, CLASSES, CHUNK = 64, 32, 1024, 2**13  # 8 rows at a time


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_LOGITS", {"cpu": CHUNK})


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_keeps_the_gradient_of_hidden_and_not_a_byte_more(dtype, reduction, softcap):
    hidden, weight, labels, b = problem(2, N // 2, features=FEATURES, classes=CLASSES, dtype=dtype)
    options = {"reduction": reduction, "softcap": softcap}
    kept = kept_for_backward(lambda: linear_cross_entropy(hidden, weight, labels, b, **options), labels)
    count = 8 if reduction == "mean" else 0  # of the rows that count
    assert kept == N * FEATURES * dtype.itemsize + count


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [True, False])
def test_it_never_has_more_logits_than_a_chunk(dtype, gradient, softcap, small_chunks):
    hidden, weight, labels, b = problem(N, features=FEATURES, classes=CLASSES, dtype=dtype)
    with Operations() as counted:
        loss = linear_cross_entropy(hidden.detach().requires_grad_(gradient), weight, labels, b, softcap=softcap)
        if gradient:
            loss.backward()
    as_large = [made for made in counted.made if made >= CHUNK * dtype.itemsize]
    # One in float32, in which they are computed or rounded; and with another dtype, one in that. For the gradient of a
    # soft cap, one in float32 with its slopes.
    slopes = [CHUNK * 4] if softcap and gradient else []
    assert sorted(as_large) == sorted([*{CHUNK * 4, CHUNK * dtype.itemsize}, *slopes])


def test_it_does_no_more_operations_than_the_arithmetic_takes(small_chunks):
    hidden, weight, labels, b = problem(N, features=FEATURES, classes=CLASSES, dtype=torch.float32)
    with Operations() as forward:
        loss = linear_cross_entropy(hidden, weight, labels, b, reduction="sum")
    chunks = N * CLASSES // CHUNK
    assert forward.flops == 2 * 2 * N * FEATURES * CLASSES  # the logits, and the gradient of hidden
    chunk = ["addmm", "log_softmax", "nll_loss_forward", "copy_", "exp_", "new_full", "scatter_add_", "mm"]
    names = [name.lstrip("_") for name in forward.names if name != "promote_types"]
    assert names == ["eq", "masked_fill", "empty_like", *chunk * chunks, "sum"]
    with Operations() as backward:
        loss.backward()
    assert backward.flops == 0


def test_a_chunk_on_a_cpu_is_32_mib():
    hidden, weight, labels, _ = problem(250, features=1, classes=2**16, dtype=torch.float32, bias=False)
    with torch.no_grad(), Operations() as counted:
        linear_cross_entropy(hidden, weight, labels)
    assert 0.9 * 2**23 < counted.largest <= 2**23
