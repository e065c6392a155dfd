"""Where the length is the number of rows: models that compute with (length, batch, features), and places."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from banks import alone, assert_close, banked
from releases import through_a_compiler
from torch import Tensor

import lora


class Tagger(nn.Module):
    """A recurrent layer in torch's own order, or batch first, and a head."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 6, batch_first=batch_first)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


NAMES = ["a", "b", "a", None]
SAID = "the rows of the batch may be in the first dimension of this layer's input, or in the second: both are of size 4"


def tagger(batch_first: bool) -> tuple[nn.Module, nn.Module, lora.Bank]:
    torch.manual_seed(0)
    base = Tagger(batch_first).double().requires_grad_(False)
    return base, *banked(base, {"a": {}, "b": {"r": 3}}, ["head"])


def test_as_many_rows_as_tokens_may_be_either() -> None:
    base, model, bank = tagger(batch_first=False)
    x = torch.randn(4, 4, 6, dtype=torch.float64)  # (length, rows, features)
    with bank.rows(NAMES), pytest.raises(RuntimeError, match=f"head: {SAID}, and rnn takes"):
        model(x)
    for names in (["a"] * 4, [None] * 4):  # whatever they are
        with bank.rows(names):
            assert_close(model(x), alone(base, bank, names[0])(x), 1e-12)
    with bank.rows([NAMES] * 4, per="token"):
        y = model(x)
    for n, name in enumerate(NAMES):
        assert_close(y[:, n], alone(base, bank, name)(x)[:, n], 1e-12)


def test_batch_first_there_is_no_doubt() -> None:
    base, model, bank = tagger(batch_first=True)
    x = torch.randn(4, 4, 6, dtype=torch.float64)
    with bank.rows(NAMES):
        y = model(x)
    for n, name in enumerate(NAMES):
        assert_close(y[n], alone(base, bank, name)(x)[n], 1e-12)


def test_a_decoder_layer_in_torchs_own_order() -> None:
    torch.manual_seed(0)
    base = nn.TransformerDecoderLayer(6, 2, 8, dropout=0.0).double().requires_grad_(False)
    model, bank = banked(base, {"a": {}, "b": {"r": 3}}, ["linear1"])
    x = torch.randn(4, 4, 6, dtype=torch.float64)
    with bank.rows(NAMES), pytest.raises(RuntimeError, match=f"linear1: {SAID}, and self_attn takes"):
        model(x, x)


class Placed(nn.Module):
    """Tokens and their places, which are given without a batch, or with one."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims, self.tokens, self.wpe = dims, nn.Embedding(9, 6), nn.Embedding(9, 6)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        return self.tokens(ids) + self.wpe(places if self.dims == 1 else places.expand(len(ids), -1))


@pytest.mark.parametrize("dims", [1, 2])
def test_places_are_not_rows(dims: int) -> None:
    torch.manual_seed(0)
    base = Placed(dims).double().requires_grad_(False)
    model, bank = banked(base, {"a": {}, "b": {"r": 3}, "c": {"target_modules": ["tokens"]}}, ["tokens", "wpe"])
    ids = torch.randint(9, (4, 4))
    with bank.rows(NAMES), pytest.raises(RuntimeError, match="wpe: is an embedding of places by its name"):
        model(ids)
    with bank.rows(["c", None, "c", "c"]):  # not in these adapters
        y = model(ids)
    assert_close(y[2], alone(base, bank, "c")(ids)[2], 1e-12)
    with bank.rows(["a"] * 4):
        assert_close(model(ids), alone(base, bank, "a")(ids), 1e-12)


def test_compiled_models_are_in_the_same_doubt() -> None:
    _, model, bank = tagger(batch_first=False)
    said = through_a_compiler("or in the second: both are of size 4, and rnn takes")
    head = torch.compile(model.head, backend="eager", fullgraph=True, dynamic=False)
    x = torch.randn(4, 4, 6, dtype=torch.float64)
    with bank.rows(NAMES), torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match=said):
        head(x)
