"""When text is generated, token by token: what a layer does for each, and which writes its merged weight notices."""

import math

import pytest
import torch
from conftest import KINDS, assert_equation, make
from counting import Operations, calls
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def layer_of(in_features=96, out_features=80, r=16, dtype=torch.float32, **settings):
    layer = lora.Linear(in_features, out_features, r=r, dtype=dtype, **settings).eval()
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


@torch.no_grad()
def counted(layer, x):
    """Calls, of Python's functions and of C's, and operations, for one token."""
    layer(x)
    with Operations() as operations:
        layer(x)
    return calls(lambda: layer(x)), operations.names


# ---- what a token costs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 96), (1, 1, 96)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_merged_weight_is_served_in_one_operation_and_few_calls(shape, bias):
    x = torch.randn(shape)
    base_calls, base_operations = counted(nn.Linear(96, 80, bias=bias), x)
    ours, operations = counted(layer_of(bias=bias), x)
    assert operations == base_operations
    assert ours - base_calls <= 20


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_beside_the_weight_there_are_three_operations_and_few_calls(bias, train):
    layer, x = layer_of(bias=bias, merge_weights=train).train(train), torch.randn(1, 96)
    base_calls, base_operations = counted(nn.Linear(96, 80, bias=bias), x)
    ours, operations = counted(layer, x)
    assert operations == [*base_operations, "mm", "addmm_"]
    assert ours - base_calls <= 55 + 5 * train  # the checks of layers that train


# ---- which writes it notices -------------------------------------------------------------------------------------


def row_of_A(layer):
    layer.lora_A.data[3].mul_(-2)


def column_of_B(layer):
    layer.lora_B.data[:, 3].mul_(-2)


def half_of_B(layer):
    layer.lora_B.data[: len(layer.lora_B) // 2].mul_(-2)


def half_of_W(layer):
    layer.weight.data[len(layer.weight) // 2 :].mul_(-2)


def by_numpy(layer):
    layer.lora_A.detach().view(torch.uint8).numpy()[:] = 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "write", [row_of_A, column_of_B, half_of_B, half_of_W, by_numpy], ids=lambda write: write.__name__
)
def test_writes_past_the_version_counter_are_noticed_by_a_sample(write, dtype):
    layer = layer_of(dtype=dtype)
    with torch.no_grad():
        first = layer.lora_merged_weight()
        assert layer.lora_merged_weight() is first
        write(layer)
        assert layer.lora_merged_weight() is not first
        assert torch.equal(layer.lora_merged_weight(), layer.lora_compute_merged())


def assert_noticed(layer, part):
    """That a write to this part of A or B is, as a loop that prunes ranks makes it."""
    with torch.no_grad():
        first = layer.lora_merged_weight()
        assert layer.lora_merged_weight() is first
        part.zero_()
        assert layer.lora_merged_weight() is not first


def parts(layer):
    """The rows of A and the columns of B."""
    return [*layer.lora_A.data.unbind(0), *layer.lora_B.data.unbind(1)]


@given(st.integers(1, 64), st.integers(1, 130), st.integers(1, 130), st.booleans(), st.data())
def test_a_write_to_any_row_of_A_or_column_of_B_is_noticed(r, in_features, out_features, transposed, data):
    layer = layer_of(max(r, in_features), max(r, out_features), r)
    if transposed:
        for name in ("lora_A", "lora_B"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach().T.contiguous().T))
    nn.init.uniform_(layer.lora_A, 0.1, 1)
    nn.init.uniform_(layer.lora_B, 0.1, 1)
    assert_noticed(layer, data.draw(st.sampled_from(parts(layer))))


@given(st.sampled_from(KINDS), st.integers(1, 3), st.data())
def test_a_write_to_any_of_them_is_noticed_in_every_kind_of_layer(kind, r, data):
    layer = make(kind, r=r).eval()
    assert_noticed(layer, data.draw(st.sampled_from(parts(layer))))


LARGER = {
    "fused": lambda: lora.MergedLinear(60, 90, r=16, enable_lora=[True] * 3),
    "factored": lambda: lora.Conv2d(16, 64, 3, r=16, factored=True),
    "written out": lambda: lora.Conv2d(16, 32, 3, r=16),
}


@pytest.mark.parametrize("build", LARGER.values(), ids=LARGER)
def test_larger_ones_too(build):
    layer = build().eval()
    nn.init.normal_(layer.lora_B)
    for part in parts(layer):
        assert_noticed(layer, part)


def test_a_weight_that_is_turned_in_its_place_is_noticed():
    layer = layer_of(8, 8, r=2)
    with torch.no_grad():
        layer.lora_merged_weight()
        layer.weight.data = layer.weight.data.T
        torch.testing.assert_close(layer.lora_merged_weight(), layer.lora_compute_merged(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("form", ["transposed", "with gaps"])
def test_in_tensors_that_lie_otherwise_too(name, form):
    layer = layer_of()
    tensor = getattr(layer, name).detach()
    other = tensor.T.contiguous().T if form == "transposed" else torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]
    setattr(layer, name, nn.Parameter(other, requires_grad=name != "weight"))
    assert not getattr(layer, name).is_contiguous()
    with torch.no_grad():
        first = layer.lora_merged_weight()
        getattr(layer, name).data.mul_(-2)
        assert layer.lora_merged_weight() is not first


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_without_a_version_counter_each_value_of_the_adapter_is_compared(name):
    with torch.inference_mode():
        layer, x = layer_of(), torch.randn(3, 96)
        layer(x)
        first = layer.lora_merged_weight()
        assert layer.lora_merged_weight() is first
        getattr(layer, name).view(-1)[1] += 3
        assert layer.lora_merged_weight() is not first
        assert_equation(layer, x)


def test_a_merged_weight_of_nan_is_kept_too():
    layer = layer_of()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(math.nan)
        assert layer.lora_merged_weight() is layer.lora_merged_weight()


def test_the_sample_leaves_storages_as_they_were():
    """FSDP gives their memory back between forwards."""
    layer, x = layer_of(), torch.randn(1, 96)
    with torch.no_grad():
        layer(x)
        assert all(parameter.untyped_storage().resizable() for parameter in layer.parameters())
        size = layer.lora_A.untyped_storage().nbytes()
        A = layer.lora_A.clone()
        layer.lora_A.untyped_storage().resize_(0)
        assert not layer._merged.is_current(layer.lora_sources(), layer.scaling)
        layer.lora_A.untyped_storage().resize_(size)
        layer.lora_A.copy_(-A)
        torch.testing.assert_close(layer(x), layer.lora_forward_with(x, layer.lora_compute_merged()))


def test_what_wants_gradients_is_not_served_and_is_again_without_them():
    layer, x = layer_of(), torch.randn(1, 96)
    with torch.no_grad():
        layer(x)
    y = layer(x)
    assert y.requires_grad
    layer.lora_A.requires_grad_(False)
    layer.lora_B.requires_grad_(False)
    layer.bias.requires_grad_(False)
    with Operations() as operations:
        assert not layer(x).requires_grad
    assert operations.names == ["addmm"]
