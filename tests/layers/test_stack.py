"""The kind for stacks of matrices: how A, B and the magnitudes start, what is saved, and what merges."""

import copy
import io
import math
import pickle

import pytest
import torch
from stacks import Computes, Model, by_hand, stack

import lora

E, ROWS, COLUMNS = 3, 6, 5
each_form = pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
SETTINGS = [
    {},
    {"use_dora": True},
    {"use_rslora": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
]


def base(transposed, dtype=torch.float64):
    return Model(Computes(E, ROWS, COLUMNS, is_transposed=transposed)).to(dtype)


def product(W):
    return torch.ones(2, COLUMNS, dtype=W.dtype) @ W[1].mT


@each_form
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_starts_as_its_base_and_is_saved_copied_merged_and_ejected(settings, transposed, tmp_path):
    plain = base(transposed)
    model, start = copy.deepcopy(plain), product(plain[0].weight)
    lora.inject(model, target_modules=["0"], r=2, lora_alpha=3, **settings)
    layer = model[0]
    out, size = (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((E, 2, size), (E, out, 2))
    torch.testing.assert_close(model(product), start, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for _, parameter in layer.lora_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    y = model(product)
    assert not torch.allclose(y, start)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(product), y)
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    other = copy.deepcopy(plain)
    lora.load_adapter(other, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(other(product), y, rtol=1e-12, atol=1e-12)
    with lora.disabled(model):
        torch.testing.assert_close(model(product), start, rtol=1e-12, atol=1e-12)
    merged = lora.merged_state_dict(model)
    assert list(merged) == list(plain.state_dict())
    lora.eject(other)
    torch.testing.assert_close(other(product), start, rtol=1e-12, atol=1e-12)
    assert vars(other[0]).keys() == vars(plain[0]).keys()
    lora.merge(model)
    assert type(model[0]) is Computes
    assert torch.equal(model[0].weight, merged["0.weight"])
    torch.testing.assert_close(model(product), y, rtol=1e-12, atol=1e-12)


@each_form
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_is_rounded_once(dtype, use_dora, transposed):
    model = stack(E, ROWS, COLUMNS, transposed=transposed, use_dora=use_dora, dtype=dtype)
    right = by_hand(model[0])
    merged = lora.merged_state_dict(model)["0.weight"]
    assert merged.dtype == dtype
    eps, exact = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    room = 32 * exact * right.abs().max() + (eps / 2 * right.abs() if dtype != torch.float32 else 0)
    # In the norms of DoRA products with a weight in bfloat16 are in bfloat16.
    assert ((merged.double() - right).abs() <= room * (2 if use_dora else 1)).all()


def test_each_matrix_starts_as_one_alone_would():
    model = Model(Computes(64, 8, 50))
    lora.inject(model, target_modules=["0"], r=4)
    A, bound = model[0].lora_A, 1 / math.sqrt(50)  # of a linear layer of 50 inputs
    assert A.abs().max() <= bound
    assert A.abs().amax((1, 2)).min() > 0.9 * bound
    assert not model[0].lora_B.any()


@each_form
def test_dora_has_a_magnitude_for_each_output_of_each_matrix(transposed):
    plain = base(transposed)
    model = copy.deepcopy(plain)
    lora.inject(model, target_modules=["0"], r=2, use_dora=True)
    along = 1 if transposed else 2
    torch.testing.assert_close(model[0].lora_magnitude, plain[0].weight.norm(dim=along).flatten())


@each_form
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_weight_is_of_each_matrix(init, transposed):
    model = base(transposed)
    matrices = [W.T if transposed else W for W in model[0].weight.detach().clone()]
    lora.inject(model, target_modules=["0"], r=2, lora_alpha=2, init_lora_weights=init)
    for W, A, B in zip(matrices, model[0].lora_A, model[0].lora_B, strict=True):
        if init == "pissa":
            U, S, Vt = torch.linalg.svd(W)
            torch.testing.assert_close(B @ A, U[:, :2] * S[:2] @ Vt[:2])
        else:
            Q, R = torch.linalg.qr(W)
            torch.testing.assert_close(B @ A, Q[:, :2] @ R[:2])


def test_a_rank_is_at_most_that_of_one_matrix():
    model = base(False)
    with pytest.raises(ValueError, match="0: r must be at most 5, the rank of a matrix of 6 × 5; `r` is 6"):
        lora.inject(model, target_modules=["0"], r=6, init_lora_weights="pissa")
    assert type(model[0]) is Computes
    lora.inject(model, target_modules=["0"], r=6)


def test_a_state_dict_is_loaded_and_meta_is_filled():
    model = stack(E, ROWS, COLUMNS)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    with torch.device("meta"):
        twin = stack(E, ROWS, COLUMNS)
    twin.load_state_dict(torch.load(buffer), assign=True)
    assert torch.equal(twin(product), model(product))


def test_an_adapter_is_combined_and_resized_without_its_model():
    """Its blocks are the matrices."""
    first, second = (stack(E, ROWS, COLUMNS) for _ in range(2))
    second.load_state_dict({**second.state_dict(), "0.weight": first[0].weight})
    layer = first[0]
    A, B = layer.lora_flat(layer.lora_A, layer.lora_B)
    assert (A.shape, B.shape) == ((E * 2, COLUMNS), (E * ROWS, 2))
    for formed, own in zip(layer.lora_formed(A, B), (layer.lora_A, layer.lora_B), strict=True):
        assert torch.equal(formed, own)


@each_form
def test_it_is_swapped(transposed):
    model = stack(E, ROWS, COLUMNS, transposed=transposed)
    y = model(product)
    lora.prepare_for_swap(model, 4)
    assert model[0].lora_A.shape[1] == model[0].lora_B.shape[2] == 4
    torch.testing.assert_close(model(product), y)
