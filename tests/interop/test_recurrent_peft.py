"""Recurrent layers, and attention with keys of another width, in PEFT's `target_parameters`: equal outputs."""

import copy

import peft
import pytest
import torch
import torch.nn as nn
from owners import adapters, moved
from peft_models import QUIET

import lora

pytestmark = [*QUIET] if isinstance(QUIET, list) else [QUIET]
pytestmark.append(pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"))
X = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 4, num_layers=2, bidirectional=True, proj_size=3)
        self.gru, self.cell, self.head = nn.GRU(6, 8), nn.RNNCell(8, 8), nn.Linear(8, 3)
        self.attn, self.alone = nn.MultiheadAttention(8, 2, kdim=6), nn.MultiheadAttention(8, 2)

    def forward(self, x):
        x, _ = self.gru(self.lstm(x)[0])
        x = torch.stack([self.cell(step) for step in x])
        x = self.attn(x, x[..., :6], x)[0]
        return self.head(self.alone(x, x, x)[0])


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def matrices(model):
    named = (name for name, weight in model.named_parameters() if weight.dim() == 2)
    return [name for name in named if not name.endswith(("head.weight", "out_proj.weight"))]


def test_what_peft_has_trained_is_loaded(base, tmp_path):
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["head"], target_parameters=matrices(base), init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    lora.load_adapter(model, tmp_path)
    assert {*adapters(model)} == {*matrices(base), "head.weight"}
    close(model(X), theirs(X))
    assert not torch.allclose(base(X), theirs(X))


def test_what_is_trained_here_is_loaded_by_peft(base, tmp_path):
    model = copy.deepcopy(base)
    whole = ["lstm", "gru", "cell", "attn", "alone", "head"]
    lora.inject(model, r=2, lora_alpha=4, target_modules=whole, exclude_modules=["out_proj"])
    moved(model)
    lora.save_adapter(model, tmp_path / "peft", format="peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    close(theirs(X), model(X))
    other = copy.deepcopy(base)
    lora.load_adapter(other, tmp_path / "peft")
    close(other(X), model(X))
