"""Methods that make one layer of the weights of several, as `fuse_qkv_projections` of diffusers' does."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import lora


class Attention(nn.Module):
    """As in diffusers: a layer for q, k and v each, and a method that makes one of them for serving."""

    def __init__(self, bias=True):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8, bias), nn.Linear(8, 4, bias), nn.Linear(8, 4, bias)
        self.to_out, self.fused = nn.Linear(8, 8), False

    @torch.no_grad()
    def fuse_projections(self, fuse=True):
        weights = torch.cat([self.to_q.weight.data, self.to_k.weight.data, self.to_v.weight.data])
        self.to_qkv = nn.Linear(weights.shape[1], weights.shape[0], self.to_q.bias is not None)
        self.to_qkv.weight.copy_(weights)
        if self.to_q.bias is not None:
            self.to_qkv.bias.copy_(torch.cat([self.to_q.bias, self.to_k.bias, self.to_v.bias]))
        self.fused = fuse

    def forward(self, x):
        q, k, v = self.to_qkv(x).split([8, 4, 4], -1) if self.fused else (self.to_q(x), self.to_k(x), self.to_v(x))
        return self.to_out(q * torch.cat([k, v], -1))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention(bias=False)])

    def fuse_qkv_projections(self):
        for module in self.modules():
            if isinstance(module, Attention):
                module.fuse_projections()

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


X = torch.randn(3, 8)
NAMES = ["to_q", "to_v", "to_out"]


def adapted(names=NAMES, fused=False):
    model = Model()
    if fused:
        model.fuse_qkv_projections()
    lora.inject(model, target_modules=names, r=2, init_lora_weights=False)
    return model


def test_it_is_refused_with_what_to_do():
    model = adapted()
    before, state = model(X), [*model.state_dict()]
    said = "`fuse_projections` makes a layer of the weights of to_q, to_v, in which their adapters would do nothing."
    with pytest.raises(RuntimeError, match=re.escape(said) + r" Merge them first \(`lora.merge`\), or call it before"):
        model.fuse_qkv_projections()
    assert [*model.state_dict()] == state
    assert torch.equal(model(X), before)
    assert type(model.blocks[0]).__name__ == "Attention"


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_refuses_it_too(way):
    with pytest.raises(RuntimeError, match="makes a layer of the weights of to_q, to_v,"):
        way(adapted()).fuse_qkv_projections()


@pytest.mark.parametrize("away", [lora.merge, lora.eject])
def test_what_is_merged_or_taken_out_may_be_fused(away):
    model = adapted()
    away(model)
    assert type(model.blocks[0]) is Attention
    expected = model(X)
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(X), expected)


def test_what_was_fused_before_is_adapted_as_one():
    model = Model()
    model.fuse_qkv_projections()
    fields = {"splits": {"to_qkv": (8, 4, 4)}, "enable_lora": {"to_qkv": (True, False, True)}}
    lora.inject(model, target_modules=["to_qkv"], r=2, init_lora_weights=False, **fields)
    adapted_output = model(X)
    with lora.disabled(model):
        assert not torch.allclose(model(X), adapted_output)


def test_what_takes_no_part_does_not_keep_others_from_it():
    model = adapted(names=["to_out"])
    expected = model(X)
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(X), expected)


def test_an_instance_with_a_forward_of_its_own_is_adapted_as_ever():
    model = Model()
    forward = model.blocks[0].forward
    model.blocks[0].forward = lambda x: forward(x)
    lora.inject(model, target_modules=NAMES, r=2)
    assert model.blocks[0].to_q.r == 2
