"""lora.MergedLinear: splits, masks, dimensions, and what a forward pass costs."""

import operator
import re

import pytest
import torch
from conftest import assert_equation, plain_twin, randomised, with_float32_adapter
from counting import operations
from hypothesis import given
from hypothesis import strategies as st
from pairwise import every_two
from torch import nn
from torch.autograd import gradcheck

import lora


@st.composite
def fused(draw):
    """Splits and a mask for them, in all the forms that users write."""
    splits = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    mask = [draw(st.booleans()) for _ in splits]
    as_entry = draw(st.sampled_from([bool, int]))
    as_sequence = draw(st.sampled_from([list, tuple]))
    return as_sequence(splits), as_sequence(map(as_entry, mask))


@given(
    fused=fused(),
    n=st.integers(1, 6),
    r=st.integers(0, 3),
    leading=st.lists(st.integers(0, 3), max_size=3),
    transposed=st.booleans(),
    bias=st.booleans(),
    training=st.booleans(),
    grad=st.booleans(),
)
def test_it_computes_the_equation(fused, n, r, leading, transposed, bias, training, grad):
    splits, mask = fused
    options = {"fan_in_fan_out": transposed, "bias": bias, "dtype": torch.float64}
    layer = randomised(lora.MergedLinear(n, sum(splits), r, 3, enable_lora=mask, splits=splits, **options))
    with torch.set_grad_enabled(grad):
        assert_equation(layer.train(training), torch.randn(*leading, n, dtype=torch.float64))


@every_two(
    mask=[(1, 0, 1), (1, 1, 1), (0, 1, 0)],
    dropout=[0.0, 0.4],
    trained=[("x", "A", "B", "bias"), ("A",), ("B",), ("x",)],
)
def test_its_gradients_are_right_whichever_are_wanted(mask, dropout, trained):
    layer = lora.MergedLinear(4, 9, 2, 3, dropout, mask, splits=(4, 3, 2), dtype=torch.float64)
    randomised(layer)
    tensors = {"x": torch.randn(2, 3, 4, dtype=torch.float64), "A": layer.lora_A, "B": layer.lora_B, "bias": layer.bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)

    def function(*_):
        torch.manual_seed(1)  # the same features are dropped at every call
        return layer(tensors["x"])

    assert gradcheck(function, [tensors[name] for name in trained], nondet_tol=0)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_inputs_have_one_to_four_dimensions(leading, training):
    layer = randomised(lora.MergedLinear(6, 9, 2, enable_lora=[1, 0, 1], dtype=torch.float64)).train(training)
    x = torch.randn(*leading, 6, dtype=torch.float64, requires_grad=True)
    assert_equation(layer, x)
    layer(x).square().sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(plain_twin(layer)(x).square().sum(), x)[0])


@pytest.mark.parametrize("training", [True, False])
def test_a_split_that_is_not_enabled_computes_what_the_base_does_bitwise(training):
    layer = randomised(lora.MergedLinear(6, 9, 2, enable_lora=[1, 0, 1], splits=(4, 3, 2))).train(training)
    x = torch.randn(5, 6)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x)[:, 4:7], base[:, 4:7])


@pytest.mark.parametrize("mask", [[True, False, True], (True, False, True), [1, 0, 1], (1, 0, 1), (True, 0, 1)])
def test_a_mask_is_bools_or_ints_in_a_list_or_a_tuple(mask):
    layer = lora.MergedLinear(6, 9, 2, enable_lora=mask)
    assert layer.enable_lora == (True, False, True)
    assert layer.splits == (3, 3, 3)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((4, 6), (6, 2))


@pytest.mark.parametrize(("mask", "enabled"), [(True, (True, True)), (False, (False, False))])
def test_one_bool_speaks_for_all_splits(mask, enabled):
    assert lora.MergedLinear(6, 9, 2, enable_lora=mask, splits=(5, 4)).enable_lora == enabled


def test_grouped_query_attention_shapes():
    layer = lora.MergedLinear(576, 960, r=4, enable_lora=[1, 0, 1], splits=(576, 192, 192))
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((8, 576), (768, 4))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("arguments", [{"r": 2}, {"r": 0, "enable_lora": [True]}, {"r": 2, "enable_lora": (0, 0)}])
def test_with_nothing_enabled_it_is_a_plain_trainable_linear(arguments, mode):
    layer, plain = lora.MergedLinear(6, 4, **arguments).train(mode), nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), plain(x))
    assert all(parameter.requires_grad for parameter in layer.parameters())
    assert list(layer.lora_parameters()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_lora": [1, 1]}, "`out_features` (=9) must be divisible by the 2 entries of `enable_lora`; "),
        ({"enable_lora": []}, "`enable_lora` must hold at least one entry, each a bool, 0 or 1, got []."),
        ({"enable_lora": [2]}, "`enable_lora` must hold at least one entry, each a bool, 0 or 1, got [2]."),
        ({"enable_lora": "101"}, "`enable_lora` must hold at least one entry, each a bool, 0 or 1, got '101'."),
        ({"enable_lora": [None]}, "`enable_lora` must hold at least one entry, each a bool, 0 or 1, got [None]."),
        ({"enable_lora": [1, 1], "splits": (4, 4)}, "`splits` (=(4, 4)) must be positive and add up to "),
        ({"enable_lora": [1, 1], "splits": (9, 0)}, "`splits` (=(9, 0)) must be positive and add up to "),
        ({"enable_lora": [1, 1], "splits": (10, -1)}, "`splits` (=(10, -1)) must be positive and add up to "),
        (
            {"enable_lora": [1], "splits": (4, 5)},
            "`enable_lora` (=(True,)) must have one entry for each of the splits ",
        ),
        ({"splits": (4, 5)}, "`enable_lora` (=(False,)) must have one entry for each of the splits (4, 5)."),
    ],
)
@pytest.mark.parametrize("r", [0, 2])
def test_masks_and_splits_that_do_not_fit_raise_and_are_repeated(arguments, message, r):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        lora.MergedLinear(6, 9, r=r, **arguments)


# ---- what it costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [(1, 1, 1), (1, 0, 1), (0, 0, 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_forward_pass_costs_at_most_a_tenth_more_than_nn_linears(mask, dropout):
    plain = operations(nn.Linear(256, 768), 4, 64).flops
    assert plain == 2 * 4 * 64 * 256 * 768
    layer = lora.MergedLinear(256, 768, r=8, lora_dropout=dropout, enable_lora=mask)
    assert plain < operations(layer, 4, 64).flops <= 1.1 * plain


LAYERS = {
    "Linear": lambda **options: lora.Linear(256, 768, r=8, lora_dropout=0.1, **options),
    "Linear transposed": lambda **options: lora.Linear(256, 768, r=8, fan_in_fan_out=True, **options),
    "MergedLinear": lambda **options: lora.MergedLinear(256, 768, r=8, enable_lora=[1, 0, 1], **options),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("dtype", "input_dtype", "autocast"),
    [
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
    ],
)
def test_nothing_of_the_weights_size_is_saved_for_backward(kind, dtype, input_dtype, autocast):
    layer = with_float32_adapter(randomised(LAYERS[kind](dtype=dtype)))
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    x = torch.randn(32, 256, dtype=input_dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, operator.pos), torch.autocast("cpu", enabled=autocast):
        layer(x)
    sizes = [size for address, size in saved.items() if address not in own]
    assert saved, "the hook saw nothing"
    assert max(sizes, default=0) <= 32 * 256, "an input is the largest"


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_makes_no_tensor_of_the_weights_size(kind, dtype):
    layer = with_float32_adapter(randomised(LAYERS[kind](dtype=dtype)))
    made = operations(layer, 32, dtype=dtype, backward=True).largest
    assert made <= 32 * 768, "an output is the largest"
