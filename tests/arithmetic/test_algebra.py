"""combine, subtract and scale against dense matrices in numpy's float64."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import STORED, example, make
from dense import (
    BLOCKS,
    absolute,
    adapter_of,
    assert_same,
    assert_unchanged,
    best,
    block_rank,
    constant,
    content,
    dense,
    terms,
    total,
    with_module,
)
from hypothesis import given
from hypothesis import strategies as st

import lora
from lora.arithmetic import combine, scale, subtract

METHODS = ["cat", "svd", "linear", "ties", "dare"]
kinds = pytest.mark.parametrize("kind", STORED)


def test_the_names_of_the_wing_are_names_of_the_library():
    assert lora.arithmetic.__all__ == ["Extracted", "Resized", "combine", "extract", "resize", "scale", "subtract"]
    assert all(getattr(lora.arithmetic, name) is getattr(lora, name) for name in lora.arithmetic.__all__)


# ---- cat, svd, linear ------------------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@kinds
@given(data=st.data())
def test_cat_is_the_weighted_sum(kind, data):
    ranks = data.draw(st.lists(st.sampled_from([2, 4, 6]), min_size=1, max_size=4))
    weights = data.draw(st.lists(st.sampled_from([-2, -0.3, 0, 1, 0.7]), min_size=len(ranks), max_size=len(ranks)))
    dtypes = data.draw(
        st.lists(
            st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
            min_size=len(ranks),
            max_size=len(ranks),
        )
    )
    scalings = data.draw(st.lists(st.sampled_from([0.25, -0.7, 3]), min_size=len(ranks), max_size=len(ranks)))
    adapters = [
        (adapter_of(kind, r, dtype, s, use_rslora=True), weight)
        for r, dtype, s, weight in zip(ranks, dtypes, scalings, weights, strict=True)
    ]
    before = [content(adapter) for adapter, _ in adapters]
    result = combine(adapters)
    settings, (A, B) = result.modules["0"], result.pair("0")
    widest = sum(torch.zeros(1, dtype=dtype) for dtype in dtypes).dtype
    assert A.dtype == B.dtype == widest
    assert (settings["r"], settings["lora_alpha"], settings["scaling"]) == (sum(ranks), sum(ranks), 1)
    assert settings["use_rslora"] is False
    # Each product of B and A is off by B's rounding alone; below the smallest normal number that is absolute. The two
    # sums of products that are compared here are off by a rounding for each product.
    magnitude = sum(abs(weight) * dense(absolute(adapter)) for adapter, weight in adapters)
    info = torch.finfo(widest)
    off = np.abs(dense(result) - total(adapters))
    sums = sum(ranks) * np.finfo(np.float64).eps
    assert (off <= (info.eps + sums) * magnitude + 100 * info.smallest_normal * info.eps).all()
    for (adapter, _), was in zip(adapters, before, strict=True):
        assert_unchanged(adapter, was)


@kinds
@pytest.mark.parametrize("r", [None, 2, 4, 8, 40])
def test_svd_is_the_best_approximation_of_each_block(kind, r):
    adapters = terms(kind)
    result = combine(adapters, "svd", r=r)
    assert result.modules["0"]["r"] == (r or 4)
    expected = total(adapters)
    for block, approximation in zip(BLOCKS[kind](expected), BLOCKS[kind](dense(result)), strict=True):
        assert_same(approximation, best(block, block_rank(kind, r or 4))[0], scale=np.abs(expected).max())
    assert np.count_nonzero(dense(result)) == np.count_nonzero(expected)


@kinds
def test_linear_adds_the_factors_as_peft_does(kind):
    adapters = terms(kind, (2, 2, 2), (0.5, -1.5, 0.0))
    result = combine(adapters, "linear")
    A, B = (np.zeros(tensor.shape) for tensor in adapters[0][0].pair("0"))
    for adapter, weight in adapters:
        w = weight * adapter.modules["0"]["scaling"]
        A += math.copysign(math.sqrt(abs(w)), w) * adapter.pair("0")[0].detach().numpy()
        B += math.sqrt(abs(w)) * adapter.pair("0")[1].detach().numpy()
    for got, expected in zip(result.pair("0"), (A, B), strict=True):
        assert_same(got.numpy(), expected)
    one = combine(adapters[1:2], "linear")
    assert_same(dense(one), total(adapters[1:2]))


def test_svd_of_factors_is_right_where_ranks_exceed_the_weight_and_updates_are_zero():
    adapters = [(adapter_of("Linear", 6, in_features=3, out_features=4), w) for w in (1, 2)]
    assert_same(dense(combine(adapters, "svd", r=3)), total(adapters))
    nothing = combine([(adapter, 0) for adapter, _ in adapters], "svd", r=2)
    assert not dense(nothing).any()


# ---- modules that differ ---------------------------------------------------------------------------------------

FUSED = {"in_features": 6, "out_features": 9}
FORMS = {
    "the union of the enabled splits": (
        ("MergedLinear", {"enable_lora": (True, False, False)}),
        ("MergedLinear", {"enable_lora": (True, False, True)}),
        {"splits": (4, 3, 2), "enable_lora": (True, False, True)},
    ),
    "disjoint splits": (
        ("MergedLinear", {"enable_lora": (False, False, True)}),
        ("MergedLinear", {"enable_lora": (True, True, False)}),
        {"splits": (4, 3, 2), "enable_lora": (True, True, True)},
    ),
    "other splits": (("MergedLinear", {}), ("MergedLinear", {"splits": (3, 3, 3)}), {"splits": None}),
    "merged and single": (("MergedLinear", {}), ("Linear", FUSED), {"splits": None}),
    "single and merged": (("Linear", FUSED), ("MergedLinear", {}), {"splits": None}),
    "convolutions": (("Conv2d", {}), ("Conv2d factored", {}), {"factored": True}),
}


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize(("one", "two", "form"), FORMS.values(), ids=FORMS)
def test_other_forms_of_one_module_are_brought_to_one(one, two, form, method):
    adapters = [(adapter_of(kind, **arguments), w) for (kind, arguments), w in ((one, 0.5), (two, -2))]
    result = combine(adapters, method, r=None if method == "cat" else 40)
    assert {option: result.modules["0"].get(option) for option in form} == form
    assert_same(dense(result), total(adapters))


def test_modules_that_only_some_adapters_have_are_kept_and_weighted():
    one, two = adapter_of("Linear"), adapter_of("Embedding", 4)
    result = combine([(one, 0.5), (with_module(two, "0", "embed"), 3)])
    assert list(result.modules) == ["0", "embed"]
    assert [settings["r"] for settings in result.modules.values()] == [2, 4]
    assert_same(dense(result), 0.5 * dense(one))
    assert_same(dense(result, "embed"), 3 * dense(two))


def test_what_is_known_of_the_base_stays():
    one, two = adapter_of("Linear", lora_dropout=0.25), adapter_of("Linear", lora_dropout=0.5)
    known = copy.deepcopy(two.modules["0"]["base"])
    module = one.modules["0"]
    one.modules["0"] = dataclasses.replace(module, base=dataclasses.replace(module.base, sample=None, shape=None))
    named = [lora.Adapter(a.modules, a.tensors, base_model=name) for a, name in ((one, "a"), (two, "a"), (two, "b"))]
    result = combine([(adapter, 1) for adapter in named[:2]])
    assert result.modules["0"]["base"] == known
    assert result.modules["0"]["lora_dropout"] == 0.25
    assert result.base_model == "a"
    assert combine([(adapter, 1) for adapter in named]).base_model is None


# ---- subtract, scale -------------------------------------------------------------------------------------------


@kinds
def test_subtract_is_the_difference(kind):
    a, b = adapter_of(kind, 2), adapter_of(kind, 4)
    result = subtract(a, b)
    assert result.modules["0"]["r"] == 6
    assert_same(dense(result), dense(a) - dense(b))


@kinds
@pytest.mark.parametrize("factor", [-2, 0, 0.3])
def test_scale_changes_the_scaling_alone(kind, factor):
    adapter = adapter_of(kind, use_rslora=True)
    before = content(adapter)
    result = scale(adapter, factor)
    assert_same(dense(result), factor * dense(adapter))
    assert result.modules["0"]["scaling"] == factor * adapter.modules["0"]["scaling"]
    assert result.modules["0"]["lora_alpha"] == factor * 3
    assert all(torch.equal(tensor, adapter.tensors[name]) for name, tensor in result.tensors.items())
    result.tensors["0.lora_A"].fill_(7)
    assert_unchanged(adapter, before)


@pytest.mark.parametrize("method", METHODS)
def test_results_share_nothing_with_what_they_are_made_of(method):
    adapter = adapter_of("Linear")
    before = content(adapter)
    result = combine([(adapter, 1)], method)
    for tensor in result.tensors.values():
        tensor.fill_(7)
    assert_unchanged(adapter, before)


# ---- through a file, into a model ------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_result_computes_what_its_dense_update_says(kind, method, tmp_path):
    layer = make(kind, r=0).double()
    constant(layer)
    adapters = terms(kind, (2, 2, 2))
    result = combine(adapters, method)
    lora.write_adapter(result, tmp_path / "adapter.safetensors")
    x = example(kind, torch.float64)
    model, plain = nn.Sequential(copy.deepcopy(layer)), copy.deepcopy(layer)
    lora.load_adapter(model, tmp_path / "adapter.safetensors")
    with torch.no_grad():
        # a constant base weight is the same transposed
        plain.weight.add_(torch.from_numpy(dense(result).reshape(plain.weight.shape)))
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


def test_two_trained_models_become_one(tmp_path):
    base = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    models = [copy.deepcopy(base) for _ in range(2)]
    for n, model in enumerate(models):
        lora.inject(model, target_modules=["0", "2"], r=2 + n)
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.lora_B)
    combined, sum_of_weights = copy.deepcopy(base), copy.deepcopy(base)
    trained = [lora.adapter_of(model) for model in models]
    lora.write_adapter(combine([(trained[0], 0.3), (trained[1], 0.6)]), tmp_path / "sum")
    lora.load_adapter(combined, tmp_path / "sum")
    with torch.no_grad():
        for model, w in zip(models, (0.3, 0.6), strict=True):
            for layer, mine in ((model[0], sum_of_weights[0]), (model[2], sum_of_weights[2])):
                mine.weight += w * layer.scaling * layer.lora_B @ layer.lora_A
    x = torch.randn(3, 6)
    torch.testing.assert_close(combined(x), sum_of_weights(x))
