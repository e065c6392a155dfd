"""Forwards of many rows that no backward follows: from a temporary W + s · B A, where that is less work."""

import pytest
import torch
from counting import Operations
from hypothesis import given
from hypothesis import strategies as st

import lora
from lora.functional import lora_linear

IN, OUT, R = 256, 384, 4
ENOUGH = 308  # x and y together are twice the weight: 308 (256 + 384) >= 2 · 256 · 384
FOLDED, BESIDE = ["addmm", "addmm"], ["addmm", "mm", "addmm_"]


def problem(rows, dtype=torch.float32, size=1.0, in_features=IN, out_features=OUT):
    x, W, b = torch.randn(rows, in_features), torch.randn(out_features, in_features), torch.randn(out_features)
    A, B = torch.randn(R, in_features), size * torch.randn(out_features, R) / R**0.5
    return [tensor.to(dtype) for tensor in (x, W, b, A, B)]


@torch.no_grad()
def computed(tensors, *arguments, **options):
    """y, the names of the operations, and the bytes of the largest storage that was made beside y."""
    with Operations() as counted:
        y = lora_linear(*tensors, 0.7, *arguments, **options)
    made = sorted(counted.made)
    made.remove(y.untyped_storage().nbytes())
    return y, counted.names, made[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_begins_where_x_and_y_are_twice_the_weight_and_makes_one_more_weight(dtype):
    for rows, expected in ((ENOUGH - 1, BESIDE), (ENOUGH, FOLDED)):
        tensors = problem(rows, dtype)
        _, names, made = computed(tensors)
        assert names == expected
        assert made == dtype.itemsize * (IN * OUT if expected is FOLDED else rows * R)
        _, names, _ = computed([tensors[0].view(1, rows, IN), *tensors[1:]])
        assert [name for name in names if name != "_unsafe_view"] == expected


@given(
    rows=st.integers(1, 600),
    in_features=st.integers(250, 290),
    out_features=st.integers(270, 290),
    size=st.sampled_from([1e-4, 1e-2, 1.0]),
)
def test_it_is_as_exact_as_the_other_way(rows, in_features, out_features, size):
    tensors = problem(rows, torch.float32, size, in_features, out_features)
    x, W, b, A, B = (tensor.double() for tensor in tensors)
    exact = x @ (W + 0.7 * B @ A).T + b
    errors = [(computed(tensors, fold=fold)[0] - exact).abs().max() for fold in (True, False)]
    # What each sum may have been rounded by: the parts of its terms, in_features and two more of them.
    bound = 2**-24 * (x.abs() @ (W.abs() + 0.7 * B.abs() @ A.abs()).T + b.abs()).max() * (in_features + R + 2)
    assert max(errors) <= bound


def test_of_updates_as_training_makes_them_the_errors_are_as_large_as_the_other_way():
    for size in (1e-4, 1e-2):
        tensors = problem(1200, torch.float32, size, 512, 512)
        x, W, b, A, B = (tensor.double() for tensor in tensors)
        exact = x @ (W + 0.7 * B @ A).T + b
        folded, beside = ((computed(tensors, fold=fold)[0] - exact).norm() for fold in (True, False))
        assert folded <= 1.02 * beside
        assert not torch.equal(computed(tensors)[0], computed(tensors, fold=False)[0]), "both are the same way"


def test_small_layers_compute_the_same_as_with_gradients_to_the_bit():
    tensors = problem(1000, in_features=200, out_features=200)
    y, names, _ = computed(tensors)
    assert names == BESIDE
    assert torch.equal(y, lora_linear(*tensors[:3], *(t.requires_grad_() for t in tensors[3:]), 0.7))


SLICES = [(0, 40), (50, 96)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_low_precision_it_is_not_done_since_the_rounded_weight_would_lose_of_the_update(dtype):
    _, names, _ = computed(problem(4 * ENOUGH, dtype))
    assert names[-1] == "addmm_"


@pytest.mark.parametrize(
    ("arguments", "options"),
    [((0.5,), {}), ((0.0, SLICES), {}), ((), {"fold": False})],
    ids=["dropout", "slices", "off"],
)
def test_nor_with_dropout_nor_of_some_outputs_nor_where_the_caller_forbids_it(arguments, options):
    x, W, b, A, B = problem(4 * ENOUGH)
    if len(arguments) == 2:
        A, B = torch.cat([A, A]), B[:86]
    _, names, made = computed([x, W, b, A, B], *arguments, **options)
    assert "addmm_" in names
    assert made < 4 * IN * OUT or arguments == (0.5,)


def test_nor_in_training_where_h_is_needed_all_the_same():
    x, W, b, A, B = problem(4 * ENOUGH)
    with Operations() as counted:
        lora_linear(x, W, b, A.requires_grad_(), B.requires_grad_(), 0.7)
    assert counted.names == BESIDE


def test_a_layer_folds_unless_its_weight_is_gathered_from_shards():
    layer, x = lora.Linear(IN, OUT, r=R, merge_weights=False).eval(), torch.randn(ENOUGH, IN)
    for sharded, expected in ((False, FOLDED), (True, BESIDE)):
        layer._subclassed = sharded  # as FSDP leaves it, which puts its DTensors there between forwards
        with torch.no_grad(), Operations() as counted:
            layer(x)
        assert counted.names == expected
