"""LoRA on bitsandbytes' quantised layers."""

import copy
import itertools
import pickle

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from counting import kept_for_backward
from packed import (
    ROWS,
    R,
    adapted,
    array,
    assert_adapters_travel,
    assert_dora,
    assert_dora_starts,
    assert_equation,
    assert_merges,
    assert_rounded,
    kept,
    merged,
)
from pairwise import every_two
from torch import nn

import lora
from lora.layers import weights

IN, OUT = 128, 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FOUR_BIT = {
    f"{quant_type}{' double' * double}": {"quant_type": quant_type, "compress_statistics": double}
    for quant_type, double in itertools.product(("nf4", "fp4"), (False, True))
} | {"nf4 in bfloat16 storage": {"quant_type": "nf4", "quant_storage": torch.bfloat16}}
NAMES = [*FOUR_BIT, "int8"]


def dense(dtype=torch.float32, inputs=IN, outputs=OUT):
    return nn.Linear(inputs, outputs, dtype=dtype)


def quantised(name, dtype=torch.float32, base=None, **settings):
    """A quantised copy of a dense layer."""
    base = base or dense(dtype)
    cls, own = (bnb.nn.Linear4bit, FOUR_BIT[name]) if name in FOUR_BIT else (bnb.nn.Linear8bitLt, {})
    if name == "int8":
        settings = {"has_fp16_weights": False, **settings}
    else:
        settings = {"compute_dtype": base.weight.dtype, **settings}
    layer = cls(base.in_features, base.out_features, **own, **settings).to(base.weight.dtype)
    layer.load_state_dict(base.state_dict())
    return layer.to("cpu")  # here it is quantised


def dequantised(layer):
    """The weight by the package's own functions."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    values = layer.state if layer.weight.CB is None else layer.weight
    return (values.CB.double() * values.SCB.double()[:, None] / 127).to(layer.bias.dtype)


def bits(layer):
    """All of the layer's state, as bytes."""
    state = copy.deepcopy(layer).state_dict()
    return {name: tensor.clone().reshape(-1).view(torch.uint8) for name, tensor in state.items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_reads_what_the_package_reads(name, dtype):
    layer = quantised(name, dtype)
    W = weights.read_weight(layer)
    assert (W.dtype, W.shape, W.requires_grad) == (dtype, (OUT, IN), False)
    torch.testing.assert_close(W, dequantised(layer), rtol=torch.finfo(dtype).eps, atol=0)
    layer(torch.randn(2, IN, dtype=dtype))  # after which an int8 layer keeps its values elsewhere
    assert torch.equal(weights.read_weight(layer), W)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_writing_what_it_reads_changes_no_bit(name, dtype):
    layer = quantised(name, dtype)
    before = bits(layer)
    weights.write_weight(layer, weights.read_weight(layer))
    assert_same_bits(bits(layer), before)


@every_two(name=NAMES, dtype=DTYPES, forward_first=[False, True])
def test_writes_what_the_package_would_quantise(name, dtype, forward_first):
    base, layer = dense(dtype), quantised(name, dtype)
    expected = quantised(name, dtype, base)
    x = torch.randn(3, IN, dtype=dtype)
    if forward_first:
        layer(x)
    weight, cls = layer.weight, type(layer.weight)
    weights.write_weight(layer, base.weight)
    assert layer.weight is weight
    assert (type(weight), weight.requires_grad) == (cls, False)
    with torch.no_grad():
        layer.bias.copy_(base.bias)
    assert layer.weight.dtype == expected.weight.dtype
    if name in FOUR_BIT:
        assert layer.quant_state is layer.weight.quant_state  # from which FSDP's layers restore it
    assert_same_bits(bits(layer), bits(expected))
    assert torch.equal(layer(x), expected(x))
    assert torch.equal(weights.read_weight(layer), weights.read_weight(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_equation(name, dtype):
    layer = quantised(name, dtype)
    W = dequantised(layer)
    assert_equation(adapted(layer), W, dtype)


@pytest.mark.parametrize("name", FOUR_BIT)
def test_computes_in_bfloat16_where_told(name):
    layer = quantised(name, compute_dtype=torch.bfloat16)
    W, x = dequantised(layer).double(), torch.randn(3, IN)
    base = layer(x).detach()
    torch.testing.assert_close(base.double(), x.double() @ W.T + layer.bias.double(), rtol=2**-6, atol=2**-6)
    adapted(layer)
    update = layer.scaling * (x @ layer.lora_A.T @ layer.lora_B.T)  # in float32, like x
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x) - base, update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_x_and_h_for_backward_and_no_dropped_copy(name, dropout, dtype):
    layer, x = quantised(name, dtype), torch.randn(2, 32, IN, dtype=dtype, requires_grad=True)
    base = kept_for_backward(lambda: layer(x))
    layer = adapted(layer, lora_dropout=dropout)
    kept = kept_for_backward(lambda: layer(x), layer.lora_A, layer.lora_B)
    assert kept - base == 64 * (IN + R) * x.element_size()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_dropped_in_eval(name):
    layer, x = adapted(quantised(name), lora_dropout=0.5), torch.randn(3, IN)
    y, base = layer.eval()(x), layer.lora_base_forward(x)
    update = layer.scaling * (x.double() @ layer.lora_A.T.double() @ layer.lora_B.T.double())
    torch.testing.assert_close((y - base).double(), update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_split_outputs(name):
    layer = quantised(name)
    x = torch.randn(3, IN)
    before = layer(x).detach()
    adapted(layer, splits={"0": (32, 16, 16)}, enable_lora={"0": (True, False, True)})
    got = (layer(x) - before).detach()
    h = x @ layer.lora_A.T
    update = torch.cat([h[:, :R] @ layer.lora_B[:32].T, torch.zeros(3, 16), h[:, R:] @ layer.lora_B[32:].T], dim=1)
    torch.testing.assert_close(got, layer.scaling * update.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_keeps_nothing_of_the_weights_size(name):
    layer = quantised(name)
    x = torch.randn(ROWS, IN, requires_grad=True)
    bare = kept(layer, x)
    assert kept(adapted(layer), x) - bare <= 4 * R * ROWS  # A x


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_the_same_function(name):
    layer = adapted(quantised(name))
    x = torch.randn(3, IN)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(weights.read_weight(twin), weights.read_weight(layer))
        assert twin.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_disabled_and_ejected_it_is_the_quantised_layer(name):
    layer = quantised(name)
    model, x = nn.Sequential(layer), torch.randn(3, IN)
    cls, before, state = type(layer), layer(x), bits(layer)
    adapted(layer)
    with lora.disabled(model):
        assert torch.equal(model(x), before)
    lora.eject(model)
    assert type(layer) is cls
    assert torch.equal(model(x), before)
    assert_same_bits(bits(layer), state)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_go_between_quantised_and_dense_bases(name, tmp_path):
    base = dense()
    assert_adapters_travel(quantised(name, base=base), base, tmp_path / "a.safetensors")


@every_two(name=NAMES, dtype=DTYPES, use_dora=[False, True])
def test_merges_into_a_plain_layer(name, dtype, use_dora):
    layer = quantised(name, dtype)
    W = dequantised(layer)
    assert_merges(adapted(layer, use_dora=use_dora), W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_without_a_bias_is_merged_in_the_dtype_of_the_models_other_numbers(dtype):
    """It computes in that of its input; nothing says which that will be."""
    layer = bnb.nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(OUT, IN).half(), requires_grad=False, has_fp16_weights=False)
    model = nn.Sequential(nn.LayerNorm(IN, dtype=dtype), layer).to("cpu")
    W = bnb.functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
    exact, x = merged(W, adapted(layer)), torch.randn(3, IN).to(dtype)
    size = np.abs(array(W)) + layer.scaling * np.abs(array(layer.lora_B)) @ np.abs(array(layer.lora_A))
    (row,) = lora.merge(model).modules
    assert (layer.weight.dtype, row.dtype) == (dtype, str(dtype).removeprefix("torch."))
    assert_rounded(layer.weight, exact, size, torch.finfo(dtype).eps)
    lost = np.linalg.norm(array(layer.weight) - exact) / np.linalg.norm(exact - array(W))
    assert row.lost == pytest.approx(lost, rel=1e-2, abs=1e-6)
    assert model(x).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_dora(name):
    layer = quantised(name)
    W = dequantised(layer)
    assert_dora(adapted(layer, use_dora=True), W)


@pytest.mark.parametrize("name", NAMES)
def test_dora_starts_from_the_base_layers_function(name):
    assert_dora_starts(quantised(name))


def test_before_it_is_quantised_the_weight_is_dense():
    for layer in (bnb.nn.Linear4bit(IN, OUT, quant_type="nf4"), bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)):
        W = torch.randn(OUT, IN)
        weights.write_weight(layer, W)
        assert torch.equal(weights.read_weight(layer), W)
        assert weights.why_not_train(layer) is None
        adapted(layer)
        layer.to("cpu")
        assert layer.weight.dtype in (torch.uint8, torch.int8)
        assert_equation(layer, dequantised(layer), torch.float32)


def test_int8_layers_that_keep_their_weight():
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=True).to("cpu")
    W = layer.weight.detach().clone()
    layer(torch.randn(2, IN))
    assert torch.equal(weights.read_weight(layer), W)
    weights.write_weight(layer, 2 * W)
    assert torch.equal(layer.weight, 2 * W)


def test_embeddings():
    for cls in (bnb.nn.EmbeddingNF4, bnb.nn.Embedding8bit):
        layer = cls(24, 64).to("cpu")
        ids = torch.arange(24)
        W = weights.read_weight(layer)
        torch.testing.assert_close(layer(ids), W, rtol=1e-5, atol=1e-6)
        adapted(layer)
        exact = W + layer.scaling * (layer.lora_B @ layer.lora_A).T
        torch.testing.assert_close(layer(ids), exact, rtol=1e-4, atol=1e-5)


# ---- inference on CPUs that have AVX512-BF16, for which bitsandbytes repacks weights -----------------------------


@pytest.fixture
def on_such_a_cpu(monkeypatch):
    """A CPU that bitsandbytes believes to be one."""
    monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


def repacked(name, base=None):
    """A layer after such a CPU's inference."""
    layer = quantised(name, base=base)
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    return layer


@pytest.mark.parametrize("outputs", [OUT, 20])  # it repacks by 32 rows, and fails with fewer
@pytest.mark.parametrize("name", FOUR_BIT)
def test_evaluating_does_not_touch_an_adapted_weight(on_such_a_cpu, name, outputs):
    layer = quantised(name, base=dense(outputs=outputs))
    assert layer.support_avx512bf16_for_cpu
    W = dequantised(layer)
    model = nn.Sequential(adapted(layer))
    before, x = bits(layer), torch.randn(3, IN)
    expected = model(x)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert_same_bits(bits(layer), before)
    model.train()
    assert_equation(layer, W, torch.float32)
    lora.eject(model)
    assert layer.support_avx512bf16_for_cpu


@pytest.mark.parametrize("done", [lora.eject, lora.merge])
def test_evaluating_does_not_touch_the_layers_between(on_such_a_cpu, done):
    model = nn.Sequential(quantised("nf4"), quantised("nf4", base=dense(inputs=OUT)))
    lora.inject(model, target_modules=["0"], r=R)
    x = torch.randn(3, IN)
    model(x).sum().backward()
    before, gradient = bits(model[1]), model[0].lora_B.grad.clone()
    model.eval()
    with torch.no_grad():
        model(x)
    assert_same_bits(bits(model[1]), before)
    model.train().zero_grad()
    model(x).sum().backward()
    assert torch.equal(model[0].lora_B.grad, gradient)
    done(model)
    assert model[1].support_avx512bf16_for_cpu


@pytest.mark.parametrize("name", FOUR_BIT)
def test_a_repacked_weight_is_not_trained_on(name):
    base = dense()
    layer, W = repacked(name, base), dequantised(quantised(name, base=base))
    eps = 2**-5 if "double" in name else 2**-8  # its constants were rounded to bfloat16; some are quantised once more
    torch.testing.assert_close(weights.read_weight(layer), W, rtol=eps, atol=0)
    assert layer.weight.quant_state.packing_format_for_cpu  # which reading did not change
    with pytest.raises(ValueError, match=r"0: bitsandbytes has repacked its weight.*load the model again"):
        adapted(layer)
    weights.write_weight(layer, base.weight)
    assert_equation(adapted(layer), W, torch.float32)


@pytest.mark.parametrize("name", FOUR_BIT)
def test_a_repacked_weight_is_written(name):
    base, layer = dense(), repacked(name)
    expected = quantised(name, base=base)
    weights.write_weight(layer, base.weight)
    with torch.no_grad():
        layer.bias.copy_(base.bias)
    assert layer.weight.dtype == expected.weight.dtype
    assert_same_bits(bits(layer), bits(expected))
