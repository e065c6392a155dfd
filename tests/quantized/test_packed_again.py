"""`lora.merge(model, packed=True)`: weights in 4 bits stay so; with batches they keep what nearest codes lose."""

import copy
import itertools
import math

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from packed import R, adapted, array, merged
from test_quantized_bnb import DTYPES, FOUR_BIT, NAMES, assert_same_bits, bits, dense, dequantised, quantised
from torch import nn

import lora
from lora.functional.codes import change_for_inputs
from lora.layers import weights

IN = 128
EACH = list(zip(FOUR_BIT, itertools.cycle(DTYPES), strict=False))


def batches(n=3, dtype=torch.float32):
    """Inputs that go along with each other, as those of a model's layers do."""
    mixing = torch.randn(IN, IN) * torch.linspace(0.1, 1, IN) ** 32  # in a few directions
    return [(torch.randn(4, 100, IN) @ mixing.T + 0.2).to(dtype) for _ in range(n)]


def small(layer, size=0.01, **settings):
    """The layer with an adapter of this share of its weight."""
    adapted(layer, **settings)
    with torch.no_grad():
        W = dequantised(layer).float()
        layer.lora_B.mul_(size * W.norm() / (layer.scaling * layer.lora_B @ layer.lora_A).norm())
    return layer


def share(error, change, seen):
    x = np.concatenate([array(x.flatten(0, -2)) for x in seen])
    return math.sqrt(((error @ x.T) ** 2).sum() / ((change @ x.T) ** 2).sum())


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_of_a_small_update_more_is_kept(name, dtype):
    layer = small(quantised(name, dtype))
    cls, before, W = type(layer).lora_base_class, array(dequantised(layer)), merged(dequantised(layer), layer)
    model, seen = nn.Sequential(layer), batches(dtype=dtype)
    nearest = copy.deepcopy(model)
    (row,) = lora.merge(model, seen, packed=True).modules
    lora.merge(nearest, packed=True)
    errors = [array(dequantised(one[0])) - W for one in (model, nearest)]
    lost = [share(error, W - before, seen) for error in errors]
    assert lost[0] < 0.75
    assert lost[1] > 0.9
    assert row.lost_on_inputs == pytest.approx(lost[0], rel=0.02)
    assert row.nearest_on_inputs == pytest.approx(lost[1], rel=0.02)
    assert row.lost == pytest.approx(np.linalg.norm(errors[0]) / np.linalg.norm(W - before), rel=0.02)
    assert (row.packed, row.lost_packed) == ("Params4bit", None)
    # A plain layer of the package's own, in the same form; the size of a text in it depends on its numbers.
    assert type(model[0]) is cls
    sizes = [{key: part.shape for key, part in bits(one[0]).items() if "__" not in key} for one in (model, nearest)]
    assert sizes[0] == sizes[1]
    assert model[0].quant_state is model[0].weight.quant_state


@pytest.mark.parametrize("size", [1, 10])
@pytest.mark.parametrize("name", FOUR_BIT)
def test_of_a_large_update_less_is_lost_than_by_nearest_codes(name, size):
    """Though the old codes are far from it, and the old constants' own constants too small."""
    layer = small(quantised(name), size)
    before, W = array(dequantised(layer)), merged(dequantised(layer), layer)
    model, seen = nn.Sequential(layer), batches()
    nearest = copy.deepcopy(model)
    (row,) = lora.merge(model, seen, packed=True).modules
    lora.merge(nearest, packed=True)
    lost = [share(array(dequantised(one[0])) - W, W - before, seen) for one in (model, nearest)]
    assert lost[0] < 0.6 * lost[1]
    assert row.lost_on_inputs == pytest.approx(lost[0], rel=0.02)


@pytest.mark.parametrize("name", ["nf4", "nf4 double"])
def test_an_update_whose_square_is_no_number_breaks_nothing(name):
    layer = small(quantised(name))
    with torch.no_grad():
        layer.lora_A[:] = 1
        layer.lora_B[3] = 1e38 / layer.scaling / R
    model = nn.Sequential(layer)
    lora.merge(model, batches(), packed=True)
    assert dequantised(model[0]).isfinite().all()


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_the_package_reads_the_numbers_that_were_chosen_to_the_bit(name, dtype, tmp_path):
    """Before and after they went through a file of its own."""
    layer = quantised(name, dtype, base=nn.Linear(IN, 320, dtype=dtype))  # more blocks than share a constant
    coded = weights.read_codes(layer)
    assert torch.equal(coded.dense(), dequantised(layer))
    before = bits(layer)
    weights.write_codes(layer, coded)
    assert_same_bits(bits(layer), before)
    (x,) = batches(1)
    x = x.flatten(0, 1)
    weight = coded.dense().float() + 0.01 * torch.randn(320, 1) @ torch.randn(1, IN) / 30
    chosen = change_for_inputs(weight, x.T @ x / len(x), coded)
    assert not torch.equal(chosen.scales, coded.scales)
    weights.write_codes(layer, chosen)
    assert torch.equal(dequantised(layer), chosen.dense())
    other = quantised(name, dtype, base=nn.Linear(IN, 320, dtype=dtype))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    state = torch.load(tmp_path / "layer.pt")
    other.weight = bnb.nn.Params4bit.from_prequantized(
        state["weight"], {key: part for key, part in state.items() if key.startswith("weight.")}, device="cpu"
    )
    other.bias = layer.bias
    assert torch.equal(dequantised(other), chosen.dense())
    assert torch.equal(other(x.to(dtype)), layer(x.to(dtype)))


@pytest.mark.parametrize("name", NAMES)
def test_without_batches_it_is_what_the_package_would_quantise(name):
    layer = small(quantised(name))
    base = dense()
    with torch.no_grad():
        base.weight.copy_(torch.from_numpy(merged(dequantised(layer), layer)))
        base.bias.copy_(layer.bias)
    model = nn.Sequential(layer)
    report = lora.merge(model, packed=True)
    torch.testing.assert_close(dequantised(model[0]), dequantised(quantised(name, base=base)), rtol=1e-4, atol=1e-4)
    assert report.lost > (0.2 if name == "int8" else 0.8)
    assert str(report).split("\n")[0].endswith("update lost to rounding  packed as")


@pytest.mark.parametrize("given", [None, batches()])
@pytest.mark.parametrize("name", NAMES)
def test_an_update_of_nothing_changes_no_bit(name, given):
    layer = quantised(name)
    before = bits(layer)
    model = nn.Sequential(layer)
    lora.inject(model, target_modules=["0"], r=2)
    assert lora.merge(model, given, packed=True).lost == 0
    assert_same_bits(bits(model[0]), before)


def test_what_is_not_known_by_codes_is_packed_to_nearest():
    """int8, and rows that are not of whole blocks; a dense layer beside them is rounded for its inputs as ever."""
    model = nn.ModuleList([small(quantised("int8")), nn.Linear(IN, 8).bfloat16()])
    lora.inject(model, target_modules=["1"], r=2)
    nn.init.normal_(model[1].lora_B, std=0.01)
    twin = copy.deepcopy(model)
    both = lambda model, x: (model[0](x), model[1](x.bfloat16()))  # noqa: E731
    first, second = lora.merge(model, batches(), step=both, packed=True).modules
    lora.merge(twin, packed=True)
    assert_same_bits(bits(model[0]), bits(twin[0]))
    assert (first.packed, first.lost_on_inputs) == ("Int8Params", None)
    assert (second.packed, second.lost_on_inputs is None) == (None, False)
    odd = bnb.nn.Linear4bit(96, 64, quant_type="nf4").to("cpu")
    assert weights.read_codes(odd) is None


def test_where_nothing_is_packed_it_is_refused():
    model = nn.Sequential(lora.Linear(4, 4, r=2))
    said = r"^merge: nothing was changed, because\n.*`packed` is for packed weights, and no LoRA layer has one\."
    with pytest.raises(ValueError, match=said):
        lora.merge(model, packed=True)
    assert model[0].r == 2


def test_packed_is_a_flag_and_no_format():
    model = nn.Sequential(quantised("nf4", torch.float32))
    adapted(model[0])
    with pytest.raises(TypeError, match=r"^merge: `packed` must be True or False, got 'nf4'\.$"):
        lora.merge(model, packed="nf4")
    assert model[0].r == R


def test_a_packed_weight_that_is_tied_needs_a_copy():
    """`merged_state_dict`, which unties dense weights, takes no packed ones."""
    layer = quantised("nf4", torch.float32)
    model = nn.Sequential(layer, quantised("nf4", torch.float32))
    model[1].weight = layer.weight
    adapted(layer)
    said = r"0: its weight is tied to that of 1, which would change too; give one a copy of the weight\.$"
    with pytest.raises(ValueError, match=said):
        lora.merge(model, packed=True)


@pytest.mark.parametrize("name", ["nf4", "nf4 double", "int8"])
def test_what_fails_half_way_leaves_every_bit(name, monkeypatch):
    model = nn.Sequential(small(quantised(name)), small(quantised(name, base=nn.Linear(64, IN))))
    seen, x = batches(1), torch.randn(3, IN)
    expected, before = model(x), [bits(layer) for layer in model]
    what = "write_weight" if name == "int8" else "write_codes"
    write = getattr(weights, what)

    def fails(layer, value):
        write(layer, value)
        if layer is model[1]:
            raise KeyError("mine")

    monkeypatch.setattr(weights, what, fails)
    with pytest.raises(KeyError, match="mine"):
        lora.merge(model, seen, packed=True)
    for layer, its in zip(model, before, strict=True):
        assert_same_bits(bits(layer), its)
    assert torch.equal(model(x), expected)
