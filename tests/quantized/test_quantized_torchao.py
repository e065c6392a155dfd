"""LoRA on nn.Linear layers whose weights are torchao's quantised tensors."""

import copy
import io

import pytest
import torch
import torchao.quantization as ao
from counting import kept_for_backward
from packed import (
    ROWS,
    R,
    adapted,
    assert_adapters_travel,
    assert_dora,
    assert_dora_starts,
    assert_equation,
    assert_merges,
    kept,
    merged,
)
from pairwise import every_two
from torch import nn
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

import lora
from lora.layers import weights

IN, OUT = 128, 128
DTYPES = [torch.float32, torch.bfloat16]
SYMMETRIC, ASYMMETRIC = ao.MappingType.SYMMETRIC, ao.MappingType.ASYMMETRIC
INT4 = {"weight_dtype": torch.int4, "granularity": ao.PerGroup(32)}
CONFIGS = {
    "int8 by row": ao.Int8WeightOnlyConfig(),
    "int8 by group": ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32)),
    "int8 by tensor": ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()),
    "fp8": ao.Float8WeightOnlyConfig(),
    "int4": ao.IntxWeightOnlyConfig(**INT4),
    "int4 asymmetric": ao.IntxWeightOnlyConfig(**INT4, mapping_type=ASYMMETRIC),
    "int8 by intx": ao.IntxWeightOnlyConfig(),
}
NAMES = [*CONFIGS, "nf4"]
DYNAMIC = {
    "int8": ao.Int8DynamicActivationInt8WeightConfig(),
    "int8 asymmetric": ao.Int8DynamicActivationInt8WeightConfig(act_mapping_type=ASYMMETRIC),
    "intx": ao.Int8DynamicActivationIntxWeightConfig(),
}


def dense(dtype=torch.float32):
    return nn.Linear(IN, OUT, dtype=dtype)


def quantised(name, dtype=torch.float32, base=None):
    """A quantised copy of a dense layer."""
    layer = copy.deepcopy(base) if base else dense(dtype)
    if name == "nf4":
        layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), 64, 64), requires_grad=False)
    else:
        ao.quantize_(layer, (CONFIGS | DYNAMIC)[name])
        del layer.extra_repr  # which keeps the layer from being pickled
    return layer


def dequantised(layer):
    """The weight by the package's own functions."""
    weight = layer.weight
    return weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.dequantize()


def saved_and_loaded(layer):
    """By torch.save: pickle alone does not know torch's 8-bit floats."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_same_bits(one, other):
    names, about = one.__tensor_flatten__()
    assert (names, str(about)) == (other.__tensor_flatten__()[0], str(other.__tensor_flatten__()[1]))
    for name in names:
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_reads_what_the_package_reads(name, dtype):
    layer = quantised(name, dtype)
    W = weights.read_weight(layer)
    assert type(W) is torch.Tensor
    assert (W.dtype, W.shape, W.requires_grad) == (dtype, (OUT, IN), False)
    assert torch.equal(W, dequantised(layer))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_writing_what_it_reads_changes_no_bit(name, dtype):
    layer = quantised(name, dtype)
    before = copy.deepcopy(layer.weight)
    weights.write_weight(layer, weights.read_weight(layer))
    assert_same_bits(layer.weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*NAMES, *DYNAMIC])
def test_writes_what_the_package_would_quantise(name, dtype):
    base, layer = dense(dtype), quantised(name, dtype)
    expected = quantised(name, dtype, base)
    weight, cls = layer.weight, type(layer.weight)
    weights.write_weight(layer, base.weight)
    assert layer.weight is weight
    assert (type(weight), weight.requires_grad) == (cls, False)
    assert_same_bits(layer.weight, expected.weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_equation(name, dtype):
    layer = quantised(name, dtype)
    W = dequantised(layer)
    assert_equation(adapted(layer), W, dtype)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_keeps_x_and_h_for_backward_and_no_dropped_copy(name, dropout):
    layer, x = quantised(name), torch.randn(64, IN, requires_grad=True)
    base = kept_for_backward(lambda: layer(x), x)
    layer = adapted(layer, lora_dropout=dropout)
    kept = kept_for_backward(lambda: layer(x), x, layer.lora_A, layer.lora_B)
    assert kept - base == 64 * R * 4


@pytest.mark.parametrize("name", NAMES)
def test_split_outputs(name):
    layer = quantised(name)
    x = torch.randn(3, IN)
    before = layer(x).detach()
    adapted(layer, splits={"0": (64, 32, 32)}, enable_lora={"0": (True, False, True)})
    h = x @ layer.lora_A.T
    update = torch.cat([h[:, :R] @ layer.lora_B[:64].T, torch.zeros(3, 32), h[:, R:] @ layer.lora_B[64:].T], dim=1)
    torch.testing.assert_close(layer(x) - before, layer.scaling * update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_keeps_nothing_of_the_weights_size(name):
    layer = quantised(name)
    x = torch.randn(ROWS, IN, requires_grad=True)
    bare = kept(layer, x)
    assert kept(adapted(layer), x) - bare <= 4 * R * ROWS  # A x


@pytest.mark.parametrize("name", NAMES)
def test_evaluating_and_copies_are_the_same_function(name):
    layer = adapted(quantised(name), merge_weights=True)
    x = torch.randn(3, IN)
    y, W = layer(x), weights.read_weight(layer)
    for twin in (layer.eval(), copy.deepcopy(layer), saved_and_loaded(layer)):
        with torch.no_grad():
            torch.testing.assert_close(twin(x), y, rtol=1e-4, atol=1e-5)
        assert torch.equal(weights.read_weight(twin), W)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_piece(name):
    layer = adapted(quantised(name))
    x = torch.randn(3, IN)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_disabled_and_ejected_it_is_the_quantised_layer(name):
    layer = quantised(name)
    model, x, weight = nn.Sequential(layer), torch.randn(3, IN), copy.deepcopy(layer.weight)
    before = layer(x)
    adapted(layer)
    with lora.disabled(model):
        assert torch.equal(model(x), before)
    lora.eject(model)
    assert type(layer) is nn.Linear
    assert torch.equal(model(x), before)
    assert_same_bits(layer.weight, weight)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_go_between_quantised_and_dense_bases(name, tmp_path):
    base = dense()
    assert_adapters_travel(quantised(name, base=base), base, tmp_path / "a.safetensors")


@every_two(name=NAMES, dtype=DTYPES, use_dora=[False, True])
def test_merges_into_a_plain_layer(name, dtype, use_dora):
    layer = quantised(name, dtype)
    W = dequantised(layer)
    assert_merges(adapted(layer, use_dora=use_dora), W)


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_that_stays_packed_is_what_the_package_would_quantise(name):
    layer, base = adapted(quantised(name)), dense()
    with torch.no_grad():
        base.weight.copy_(torch.from_numpy(merged(dequantised(layer), layer)))
        base.bias.copy_(layer.bias)
    model, x = nn.Sequential(layer), torch.randn(ROWS, IN)
    twin = copy.deepcopy(model)
    lora.merge(twin, [x], packed=True)  # by the inputs only what is known by codes of 4 bits is rounded
    report, cls = lora.merge(model, packed=True), type(layer.weight)
    assert type(model[0]) is nn.Linear
    assert report.modules[0].packed == cls.__name__
    assert_same_bits(model[0].weight, twin[0].weight)
    W, expected = dequantised(model[0]), dequantised(quantised(name, base=base))
    apart = (W - expected).abs() > 1e-5 * expected.abs().max()  # W and its scales are rounded twice
    assert apart.sum() <= 32  # of 16,384: one group at most, whose zero point lay between two
    torch.testing.assert_close(model(x), nn.functional.linear(x, W, model[0].bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_dora(name):
    layer = quantised(name)
    W = dequantised(layer)
    assert_dora(adapted(layer, use_dora=True), W)


@pytest.mark.parametrize("name", NAMES)
def test_dora_starts_from_the_base_layers_function(name):
    assert_dora_starts(quantised(name))


@pytest.mark.parametrize("name", DYNAMIC)
def test_what_quantises_inputs_gives_them_no_gradient_and_is_refused(name):
    layer = quantised(name)
    x = torch.randn(3, IN, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is None  # the reason
    model = nn.Sequential(nn.Linear(IN, IN), layer)
    with pytest.raises(ValueError, match=r"1: its weight, a torchao \w+, quantises the layer's input as well"):
        lora.inject(model, target_modules=["0", "1"], r=2)
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]
