"""PiSSA and OLoRA against numpy's decompositions in float64, for every kind of layer."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import DTYPES, STORED, example, make, update
from dense import BLOCKS, best, block_rank
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora
from lora.models.spectral import olora, pissa
from lora.models.start import start_from

kinds = pytest.mark.parametrize("kind", STORED)


def blocks(kind, layer):
    return BLOCKS[kind](layer.weight.detach().double().numpy())


def weights(kind, layer):
    """The products s · B A that a start hands over, and what numpy has for the blocks of the weight."""
    return [(layer.scaling * (B @ A)).numpy() for B, A in pissa(layer)], blocks(kind, layer)


def spread(rows, columns, dtype=torch.float32):
    """A matrix whose singular values fall from 1 as 0.9^i."""
    U, V = (np.linalg.qr(np.random.default_rng(i).normal(size=(n, n)))[0] for i, n in enumerate((rows, columns)))
    p = min(rows, columns)
    return torch.from_numpy(U[:, :p] * 0.9 ** np.arange(p) @ V[:p]).to(dtype)


# ---- PiSSA -----------------------------------------------------------------------------------------------------


@kinds
@given(alpha=st.floats(0.1, 50), use_rslora=st.booleans())
def test_pissa_takes_the_best_approximation_of_each_block(kind, alpha, use_rslora):
    layer = make(kind, lora_alpha=alpha, use_rslora=use_rslora).double()
    products, wanted = weights(kind, layer)
    q = block_rank(kind, layer.r)
    for (B, A), product, block in zip(pissa(layer), products, wanted, strict=True):
        np.testing.assert_allclose(product, best(block, q)[0], rtol=0, atol=1e-13 * np.abs(block).max())
        values = np.linalg.svd(block, compute_uv=False)[:q] / layer.scaling
        np.testing.assert_allclose((B.T @ B).numpy(), np.diag(values), rtol=0, atol=1e-12 * values.max())
        np.testing.assert_allclose((A @ A.T).numpy(), np.diag(values), rtol=0, atol=1e-12 * values.max())


@kinds
@pytest.mark.parametrize("start", [pissa, olora], ids=["pissa", "olora"])
def test_a_started_layer_computes_what_it_did_and_its_base_does_not(kind, start):
    layer = make(kind).double()
    before, weight, x = copy.deepcopy(layer), layer.weight.clone(), example(kind, torch.float64)
    nn.init.zeros_(before.lora_B)
    start_from(layer, start(layer), writes_base=True)
    assert (layer.weight - weight).abs().max() > 0.1 * weight.abs().max()
    torch.testing.assert_close(layer(x), before(x), rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        layer.weight.detach().numpy() + update(layer).reshape(weight.shape), weight.detach().numpy(), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (90, 90)])
def test_a_few_iterations_are_nearly_as_good_as_the_svd(shape):
    layer = lora.Linear(shape[1], shape[0], r=8)
    layer.weight.data.copy_(spread(*shape))
    W = layer.weight.detach().double().numpy()
    optimum = np.linalg.norm(W - best(W, 8)[0])
    pairs = [pissa(layer, niter)[0] for niter in (0, 1, 4)]
    errors = [np.linalg.norm(W - layer.scaling * (B @ A).numpy()) for B, A in pairs]
    assert errors[0] > errors[1] > errors[2] > optimum * (1 - 1e-6)
    assert errors[2] < optimum * (1 + 1e-4)


def test_the_randomised_svd_is_exact_where_its_sketch_holds_all():
    layer = make("Linear", in_features=9, out_features=20, r=3).double()
    [(B, A)], [(exact_B, exact_A)] = pissa(layer, 0), pissa(layer)
    torch.testing.assert_close(B @ A, exact_B @ exact_A, rtol=0, atol=1e-13)


def test_the_randomised_svd_is_always_the_same_and_moves_no_global_generator():
    layer = lora.Linear(64, 64, r=4)
    state = torch.get_rng_state()
    [(B, A)] = pissa(layer, 2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    [(again_B, again_A)] = pissa(layer, 2)
    assert torch.equal(B, again_B)
    assert torch.equal(A, again_A)


# ---- OLoRA -----------------------------------------------------------------------------------------------------


@kinds
def test_olora_takes_the_first_columns_and_rows_of_the_qr_decomposition(kind):
    layer = make(kind).double()
    q = block_rank(kind, layer.r)
    for (B, A), block in zip(olora(layer), blocks(kind, layer), strict=True):
        Q, R = np.linalg.qr(block)
        np.testing.assert_allclose((B @ A).numpy(), Q[:, :q] @ R[:q], rtol=0, atol=1e-13)
        np.testing.assert_allclose((B.T @ B).numpy(), np.eye(q), rtol=0, atol=1e-13)
        np.testing.assert_allclose(np.tril(A.numpy(), -1), 0, atol=1e-14)


# ---- dtypes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [pissa, lambda layer: pissa(layer, 1), olora], ids=["pissa", "niter", "olora"])
def test_computed_in_float32_or_better_whatever_the_weight_and_autocast(dtype, start):
    layer = lora.Linear(48, 32, r=4, dtype=dtype)
    [(B, A)] = start(layer)
    assert B.dtype == A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not B.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        [(cast_B, cast_A)] = start(layer)
    assert torch.equal(B, cast_B)
    assert torch.equal(A, cast_A)


# ---- through inject --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_3", "olora"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_injected_model_starts_as_its_base(how, use_dora):
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    base, x = copy.deepcopy(model), torch.randn(7, 6, dtype=torch.float64)
    splits = {"splits": {"0": (4, 3, 2)}, "enable_lora": {"0": (True, False, True)}}
    lora.inject(model, target_modules=["0", "2"], r=2, init_lora_weights=how, use_dora=use_dora, **splits)
    assert not torch.equal(model[0].weight, base[0].weight)
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=1e-12)
    assert torch.equal(model[0].weight[4:7], base[0].weight[4:7])  # a split that is not enabled
    lora.eject(model)
    torch.testing.assert_close(model[0].weight, base[0].weight, rtol=0, atol=1e-14)


# ---- what cannot be --------------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    pass


class DoubledLoRA(lora.LoRALayer):
    @classmethod
    def lora_shapes(cls, base, r, **settings):
        return (r, base.in_features), (base.out_features, r)

    def lora_delta(self, A, B):
        return B @ A


class LoRADoubled(DoubledLoRA, Doubled):
    def __init__(self):
        nn.Linear.__init__(self, 4, 4)
        self.lora_add(2)


def refused(start, layer, *words):
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="cannot start") as error:
        start(layer)
    assert all(word in str(error.value) for word in words), str(error.value)
    for name, tensor in layer.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


@pytest.mark.parametrize("start", [pissa, olora], ids=["pissa", "olora"])
def test_weights_that_cannot_be_taken_apart(start):
    refused(start, LoRADoubled(), "kind", "LoRADoubled")
    refused(start, lora.Embedding(6, 4, r=2, max_norm=1.0), "max_norm")
    refused(start, lora.Linear(6, 4, r=5), "at most 4", "4 × 6", "`r` is 5")
    refused(start, make("MergedLinear", r=3), "at most 2", "2 × 6")
    refused(start, make("Conv2d factored", r=8), "at most 3", "rank of a block is 4")
    refused(start, lora.Linear(6, 4, r=2, device="meta"), "meta")
    layer = lora.Linear(6, 4, r=2)
    layer.weight.data[1, 2] = math.nan
    refused(start, layer, "NaN")


def test_pissa_needs_a_scaling_above_0_and_a_count_of_iterations():
    for scaling in (0.0, -1.0):
        layer = lora.Linear(6, 4, r=5)
        layer.scaling = scaling
        refused(pissa, layer, f"`scaling` must be above 0, got {scaling}")
    for niter in (-1, 1.5, True, "4"):
        refused(lambda layer, niter=niter: pissa(layer, niter), lora.Linear(6, 4, r=2), "`niter` must be", repr(niter))


def test_pissa_has_nothing_to_take_from_a_weight_of_zeros():
    layer = make("MergedLinear")
    layer.weight.data[:4] = 0
    refused(pissa, layer, "all zeros")
    olora(layer)


def test_one_error_lists_all():
    layer = lora.Embedding(6, 4, r=2, max_norm=1.0)
    layer.scaling = -1.0
    refused(lambda layer: pissa(layer, -3), layer, "niter", "scaling", "max_norm")
