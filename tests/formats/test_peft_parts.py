"""Rows of embeddings and biases of B in PEFT's folders: in the places where they belong, or refused whole."""

import numpy as np
import pytest
import torch
from exchange import refused, refuses, write_peft
from torch import nn

import lora

A, B = torch.randn(2, 4), torch.randn(3, 2)
PAIR = {"0.lora_A.weight": A, "0.lora_B.weight": B}
BIAS = {"0.lora_B.bias": torch.randn(3)}
ROWS = {"1.token_adapter.trainable_tokens_delta": torch.randn(2, 5)}
S = 3 / 2  # lora_alpha / r, as `write_peft` says them


def model_of(bias=True):
    return nn.Sequential(nn.Linear(4, 3, bias=bias), nn.Embedding(6, 5))


def test_a_bias_of_b_is_scaled_and_added(tmp_path):
    model = model_of()
    expected = model[0].bias.detach().double().numpy() + S * BIAS["0.lora_B.bias"].double().numpy()
    lora.load_adapter(model, write_peft(tmp_path, PAIR | BIAS, lora_bias=True))
    np.testing.assert_allclose(model[0].bias.detach().numpy(), expected, rtol=1e-6)
    assert model[0].bias.requires_grad  # as PEFT's would train on


@pytest.mark.parametrize("said", [[4, 1], {"1": [4, 1]}], ids=["a list", "by name"])
def test_rows_take_the_places_of_rows(tmp_path, said):
    model = model_of()
    expected = model[1].weight.detach().clone().numpy()
    expected[[4, 1]] = ROWS["1.token_adapter.trainable_tokens_delta"].numpy()
    lora.load_adapter(model, write_peft(tmp_path, PAIR | ROWS, trainable_token_indices=said))
    assert (model[1].weight.detach().numpy() == expected).all()
    assert not model[1].weight.requires_grad
    lora.eject(model)
    assert not (model[1].weight.detach().numpy() == expected).all()


def test_names_of_raw_state_dicts(tmp_path):
    raw = {name.replace(".weight", ".default.weight"): tensor for name, tensor in PAIR.items()}
    raw |= {"0.lora_B.default.bias": BIAS["0.lora_B.bias"]}
    raw |= {f"{name}.default": tensor for name, tensor in ROWS.items()}
    lora.load_adapter(model_of(), write_peft(tmp_path, raw, lora_bias=True, trainable_token_indices=[1, 2]))


def test_only_with_the_model_are_parts_whole(tmp_path):
    path = write_peft(tmp_path / "in", PAIR | BIAS, lora_bias=True)
    adapter = lora.read_adapter(path)
    message = "only its model knows the tensors of which the file holds parts"
    for format in ("lora", "peft", "portable"):
        refused(lambda format=format: lora.write_adapter(adapter, tmp_path / "out", format), message)
    refused(lambda: lora.combine([(adapter, 0.5), (adapter, 0.5)]), "0.lora_B.bias trained in full")
    assert not (tmp_path / "out").exists()


BIASED, EACH = {"lora_bias": True}, "must list the indices of its rows, each once"
AT = "trainable_token_indices"
# What is in the file beside A and B, what its configuration says, and the error.
REFUSED = {
    "not announced": (BIAS, {}, "0.lora_B.bias: `lora_bias` is not set in the configuration."),
    "announced": ({}, BIASED, "`lora_bias` is set, and the file holds no bias of B."),
    "a number": (BIAS, {"lora_bias": 1}, "`lora_bias` must be true or false, got 1."),
    "no B": ({"1.lora_B.bias": torch.ones(3)}, BIASED, "1.lora_B.bias: is a bias of B, and there is no B."),
    "its shape": ({"0.lora_B.bias": torch.ones(4)}, BIASED, "0.lora_B.bias: must have the shape (3,), got (4,)"),
    "DoRA": (
        BIAS | {"0.lora_magnitude_vector": torch.ones(3)},
        BIASED | {"use_dora": True},
        "0.lora_B.bias: is a bias of B, which PEFT has neither with DoRA nor in embeddings.",
    ),
    "no indices": (ROWS, {}, "1.token_adapter.trainable_tokens_delta: `trainable_token_indices` is not set"),
    "of another module": (ROWS, {AT: {"2": [1, 2]}}, f"{EACH}, got None."),
    "twice": (ROWS, {AT: [1, 1]}, f"{EACH}, got [1, 1]."),
    "negative": (ROWS, {AT: [1, -1]}, f"{EACH}, got [1, -1]."),
    "huge": (ROWS, {AT: [1, 2**70]}, EACH),
    "too few": (ROWS, {AT: [1]}, "names 1 rows, and the file has the shape (2, 5)."),
    "beyond the vocabulary": (ROWS, {AT: [1, 6]}, "1.weight: the adapter has rows [1, 6] of 5 values for it, and its"),
    "no rows": ({}, {AT: [1]}, "`trainable_token_indices` is set, and the file holds no rows."),
    "no such module": (
        {"x.token_adapter.trainable_tokens_delta": torch.ones(1, 5)},
        {AT: [1]},
        "x.weight: there is no such module in the model.",
    ),
    "no embedding": (
        {"2.token_adapter.trainable_tokens_delta": torch.ones(1, 5)},
        {AT: [1]},
        "2.weight: the adapter changes a part of it, but the module has no such floating-point tensor.",
    ),
    "layers of the base again": (BIAS, {"layer_replication": [[0, 1]]}, "`layer_replication` is set"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused(tmp_path, case):
    tensors, options, message = REFUSED[case]
    refuses(write_peft(tmp_path, PAIR | tensors, **options), message, model=nn.Sequential(*model_of(), nn.ReLU()))


def test_a_layer_without_a_bias_is_to_be_given_one(tmp_path):
    path = write_peft(tmp_path, PAIR | BIAS, lora_bias=True)
    model = model_of(bias=False)
    message = "0.bias: the adapter adds to it, and the module has none: give it one of zeros, as in `module.bias = "
    refuses(path, message, model=model)
    model[0].bias = nn.Parameter(torch.zeros(model[0].out_features))
    lora.load_adapter(model, path)
    np.testing.assert_allclose(model[0].bias.detach().numpy(), S * BIAS["0.lora_B.bias"].numpy(), rtol=1e-6)
