"""lora.Embedding: the equation, and every option of nn.Embedding with it."""

from contextlib import nullcontext

import pytest
import torch
from conftest import assert_equation, plain_twin, randomised, update
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora

IDS = torch.tensor([[0, 3, 3, 6], [1, 3, 2, 2]])


def embedding(**options):
    return randomised(lora.Embedding(7, 5, **{"r": 2, "lora_alpha": 3, "dtype": torch.float64, **options}))


@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    shape=st.lists(st.integers(0, 3), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    ids=st.sampled_from([torch.int64, torch.int32]),
    training=st.booleans(),
    merge=st.booleans(),
    grad=st.booleans(),
)
def test_it_computes_the_equation(sizes, shape, dtype, ids, training, merge, grad):
    rows, dim, r = sizes
    layer = randomised(lora.Embedding(rows, dim, r, 3, merge, dtype=dtype)).train(training)
    with torch.set_grad_enabled(grad):
        assert_equation(layer, torch.randint(rows, shape, dtype=ids))


def test_its_gradients_are_those_of_the_equation():
    layer = embedding()
    W, A, B = layer.weight.detach(), layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_()
    layer(IDS).square().sum().backward()
    (W + 3 / 2 * (B @ A).T)[IDS].square().sum().backward()
    torch.testing.assert_close((layer.lora_A.grad, layer.lora_B.grad), (A.grad, B.grad))


def test_a_starts_at_zero_and_b_at_random_so_that_ids_never_seen_keep_their_embedding():
    layer = lora.Embedding(7, 5, r=2)
    assert not layer.lora_A.any()
    assert layer.lora_B.all()
    seen = torch.tensor([1, 2])
    layer(seen).sum().backward()
    with torch.no_grad():
        layer.lora_A -= layer.lora_A.grad
        layer.lora_B -= layer.lora_B.grad
        moved = (layer(torch.arange(7)) != layer.weight).any(1)
    assert moved.nonzero().flatten().tolist() == seen.tolist()


# ---- padding_idx, max_norm, sparse, scale_grad_by_freq, _weight -------------------------------------------------


@pytest.mark.parametrize("padding_idx", [3, -4])
def test_padding_starts_at_zero_and_receives_no_gradient(padding_idx):
    layer = embedding(padding_idx=padding_idx)
    assert layer.padding_idx == 3
    assert not layer.weight[3].any()
    layer(IDS).sum().backward()
    assert not layer.lora_A.grad[:, 3].any()
    assert layer.lora_A.grad[:, 2].any()


@pytest.mark.parametrize("training", [True, False])
def test_padding_of_a_fresh_layer_stays_zero_while_it_trains(training):
    layer = lora.Embedding(7, 5, r=2, padding_idx=3).train(training)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        layer(IDS).sum().backward()
        optimizer.step()
    assert not layer(torch.tensor(3)).any()


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients", "disabled", "r = 0"])
def test_max_norm_bounds_the_pretrained_rows_as_torch_does(norm_type, mode):
    weight = torch.randn(7, 5, dtype=torch.float64)
    options = {"max_norm": 1.5, "norm_type": norm_type, "_weight": weight.clone()}
    layer = embedding(**options, r=0 if mode == "r = 0" else 2).train(mode == "train")
    expected = nn.Embedding(7, 5, **(options | {"_weight": weight.clone()}))(IDS)
    if mode not in ("disabled", "r = 0"):
        expected = expected + torch.from_numpy(update(layer))[IDS]
    off = lora.disabled(layer) if mode == "disabled" else nullcontext()
    with torch.set_grad_enabled(mode != "eval without gradients"), off:
        torch.testing.assert_close(layer(IDS), expected)


@pytest.mark.parametrize("training", [True, False])
def test_max_norm_writes_neither_a_nor_the_base_weight(training):
    layer = embedding(max_norm=0.1).train(training)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    layer(IDS).sum().backward()
    with torch.no_grad():
        layer(IDS)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_max_norm_leaves_rows_of_zeros_and_their_gradients_finite():
    layer = embedding(max_norm=1.0, padding_idx=3)
    layer.weight.requires_grad_(True)
    layer(IDS).sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert torch.equal(layer(torch.tensor(3)), torch.from_numpy(update(layer))[3])


def test_a_sparse_embedding_gives_a_sparse_gradient_of_the_same_values():
    dense, sparse = embedding(), embedding(sparse=True)
    sparse.load_state_dict(dense.state_dict())
    for layer in (dense, sparse):
        layer(IDS).square().sum().backward()
    assert sparse.lora_A.grad.is_sparse
    torch.testing.assert_close(sparse.lora_A.grad.to_dense(), dense.lora_A.grad)
    torch.testing.assert_close(sparse.lora_B.grad, dense.lora_B.grad)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # in torch's optimizers
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad])
def test_sparse_gradients_suit_torchs_sparse_optimizers(optimizer):
    layer = embedding(sparse=True)
    before = layer.lora_A.detach().clone()
    step = optimizer([layer.lora_A], lr=0.1)
    layer(IDS).square().sum().backward()
    step.step()
    assert (layer.lora_A != before).any(0).tolist() == [True, True, True, True, False, False, True]


def test_a_sparse_plain_embedding_is_torchs():
    layer = embedding(sparse=True, r=0)
    layer(IDS).sum().backward()
    assert layer.weight.grad.is_sparse


def test_scale_grad_by_freq_divides_by_how_often_an_id_is_in_the_batch():
    plain, scaled = embedding(), embedding(scale_grad_by_freq=True)
    scaled.load_state_dict(plain.state_dict())
    for layer in (plain, scaled):
        layer(IDS).square().sum().backward()
    counts = torch.bincount(IDS.flatten(), minlength=7).clamp(min=1)
    torch.testing.assert_close(scaled.lora_A.grad, plain.lora_A.grad / counts)


@pytest.mark.parametrize("r", [0, 2])
def test_a_given_weight_is_kept(r):
    weight = torch.randn(7, 5)
    layer = lora.Embedding(7, 5, r=r, _weight=weight.clone())
    assert torch.equal(layer.weight, weight)
    assert layer.weight.requires_grad == (r == 0)
    if r:
        assert not layer.lora_A.any()
        assert layer.lora_B.all()


def test_freeze_freezes_a_plain_embedding():
    assert not lora.Embedding(7, 5, _freeze=True).weight.requires_grad


def test_from_pretrained_makes_a_plain_embedding():
    weight = torch.randn(7, 5)
    layer = lora.Embedding.from_pretrained(weight, padding_idx=1)
    assert isinstance(layer, lora.Embedding)
    assert torch.equal(layer(IDS), weight[IDS])


# ---- heads that are tied to the embedding -----------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, head=nn.Linear, **options):
        super().__init__()
        self.embedding = embedding(dtype=torch.float32)
        self.head = head(5, 7, bias=False, **options)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


@pytest.mark.parametrize("head", [nn.Linear, lora.Linear])
def test_a_tied_heads_logits_agree_in_train_and_eval(head):
    model = Tied(head)
    trained = model.train()(IDS)
    with torch.no_grad():
        evaluated = model.eval()(IDS)
        back = model.train()(IDS)
    torch.testing.assert_close(evaluated, trained)
    assert torch.equal(back, trained)
    assert model.head.weight is model.embedding.weight


def test_a_tied_head_with_an_adapter_of_its_own_uses_each_adapter_once():
    model = Tied(lora.Linear, r=3)
    randomised(model.head)
    expected = plain_twin(model.head)(plain_twin(model.embedding)(IDS))
    for training in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(model.train(training)(IDS).double(), expected, rtol=1e-5, atol=1e-5)


# ---- r = 0, words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"max_norm": 1.0}, {"sparse": True}])
def test_with_r_of_zero_it_is_a_plain_trainable_embedding(options):
    layer, plain = lora.Embedding(7, 5, **options), nn.Embedding(7, 5, **options)
    plain.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer(IDS), plain(IDS))
    assert torch.equal(layer.weight, plain.weight), "torch's max_norm writes the rows it looks up"
    assert layer.weight.requires_grad
    assert repr(layer) == repr(plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"r": -1}, "`r` must be an integer of at least 0, got -1."), ({"lora_alpha": None}, "`lora_alpha` must be")],
)
def test_settings_out_of_range_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        lora.Embedding(7, 5, **{"r": 2, **arguments})


@pytest.mark.parametrize("ids", [torch.tensor([7]), torch.tensor([-1])])
@pytest.mark.parametrize("training", [True, False])
def test_ids_out_of_range_raise_as_torchs_do(ids, training):
    with pytest.raises(IndexError), torch.no_grad():
        embedding().train(training)(ids)
