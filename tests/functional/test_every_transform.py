"""Every fused function under every way that torch differentiates: right, or refused in words."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from lora.functional import (
    Adapted,
    Geometry,
    Lookup,
    linear_cross_entropy,
    lora_conv,
    lora_embedding,
    lora_linear,
    lora_swiglu,
    magnify,
)

# torch's own forward-mode rules are made with torch.jit.script, which torch deprecates, in other words in each release.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script")
GENERATOR = torch.Generator().manual_seed(0)


def some(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


W, bias, A, B, wide, narrow = some(6, 4), some(6), some(2, 4), some(6, 2), some(8, 4), some(4, 4)
kernel, ids, rows = some(4, 2, 3), torch.tensor([0, 2, 2]), some(5, 4)
FACTORS = some(2, 5), some(4, 2)  # of an embedding
ONE = Geometry((1,), (0,), (1,))
LABELS = torch.tensor([0, 5, 2])


def embedding(how):
    return lambda A, B: lora_embedding(ids, rows[ids].clone(), A, B, 0.5, how)


FUNCTIONS = {
    "linear": (lambda x, A, B: lora_linear(x, W, bias, A, B, 0.5), (some(3, 4), A, B)),
    "linear, A alone": (lambda x, A: lora_linear(x, W, bias, A, B, 0.5), (some(3, 4), A)),
    "linear, B alone": (lambda x, B: lora_linear(x, W, bias, A, B, 0.5), (some(3, 4), B)),
    "merged": (
        lambda x, A, B: lora_linear(x, W, bias, A, B, 0.5, 0.0, [(0, 2), (3, 6)]),
        (some(3, 4), some(4, 4), some(5, 2)),
    ),
    "swiglu": (
        lambda x, A, B, C, D: lora_swiglu(x, Adapted(wide, None, A, B, 0.5), Adapted(narrow, None, C, D, 0.5)),
        (some(3, 4), A, some(8, 2), some(2, 4), some(4, 2)),
    ),
    "conv": (
        lambda x, A, B: lora_conv(x, kernel, None, A, B, 0.5, ONE),
        (some(2, 2, 5), some(2, 2, 3), some(4, 2, 1)),
    ),
    "embedding": (embedding(Lookup()), FACTORS),
    "embedding, sparse": (embedding(Lookup(sparse=True)), FACTORS),
    "embedding, by frequency": (embedding(Lookup(scale_grad_by_freq=True)), FACTORS),
    "embedding, padded": (embedding(Lookup(padding_idx=2)), FACTORS),
    "magnify": (magnify, (some(3, 4), some(4), some(4))),
    "cross entropy": (lambda hidden: linear_cross_entropy(hidden, W, LABELS, bias), (some(3, 4),)),
    "cross entropy, capped": (lambda hidden: linear_cross_entropy(hidden, W, LABELS, bias, softcap=2.0), (some(3, 4),)),
    "cross entropy, by row": (
        lambda hidden: linear_cross_entropy(hidden, W, LABELS, ignore_index=5, reduction="none"),
        (some(3, 4),),
    ),
}
# What does not keep what a second derivative needs: how it says so.
REFUSED = {
    "linear, B alone": "many output gradients at once.* needs the layer's input",
    "swiglu": "cannot be differentiated twice, or for many output gradients at once",
}
# What keeps enough for many output gradients at once, and too little for a second derivative.
REFUSED_TWICE = dict.fromkeys(
    ("cross entropy", "cross entropy, capped", "cross entropy, by row"),
    r"cannot be differentiated twice; compute with `lora\.functional\.plain_linear_cross_entropy`",
)
# Frequencies and padding change gradients alone: these are not the derivatives of what is computed.
DERIVED = [name for name in FUNCTIONS if name not in ("embedding, by frequency", "embedding, padded")]


def leaves(tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def many_gradients(function, tensors):
    tensors = leaves(tensors)
    y = function(*tensors)
    many = some(3, *y.shape)
    got = torch.autograd.grad(y, tensors, many, is_grads_batched=True)
    y = function(*tensors)
    for i, dy in enumerate(many):
        for batched, one in zip(got, torch.autograd.grad(y, tensors, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(batched[i], one.to_dense() if one.is_sparse else one)


def second_derivatives(function, tensors):
    assert gradgradcheck(function, leaves(tensors))


def vectorised_jacobian(function, tensors):
    got = torch.autograd.functional.jacobian(function, tuple(tensors), vectorize=True)
    torch.testing.assert_close(got, torch.func.jacrev(function, tuple(range(len(tensors))))(*tensors))


def forward_mode(function, tensors):
    assert gradcheck(function, leaves(tensors), check_forward_ad=True, check_backward_ad=False)


def vmap(function, tensors):
    got = torch.func.vmap(function)(*(torch.stack([tensor, 2 * tensor]) for tensor in tensors))
    torch.testing.assert_close(got[1], function(*(2 * tensor for tensor in tensors)))


def jacobians_of_both_modes(function, tensors):
    which = tuple(range(len(tensors)))
    forward, backward = (way(function, which)(*tensors) for way in (torch.func.jacfwd, torch.func.jacrev))
    torch.testing.assert_close(forward, backward)


@pytest.mark.parametrize("way", [many_gradients, second_derivatives, vectorised_jacobian])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_through_the_hand_written_backward(name, way):
    function, tensors = FUNCTIONS[name]
    refused = REFUSED | REFUSED_TWICE if way is second_derivatives else REFUSED
    if name in refused:
        with pytest.raises(RuntimeError, match=refused[name]):
            way(function, tensors)
    elif way is many_gradients or name in DERIVED:
        way(function, tensors)


@pytest.mark.parametrize("way", [forward_mode, vmap, jacobians_of_both_modes])
@pytest.mark.parametrize("name", DERIVED)
def test_through_the_plain_twin(name, way):
    way(*FUNCTIONS[name])
