"""examples/phi3/fused_mlp.py: the same losses and gradients, with less kept for backward."""

import copy

import pytest
import torch
from counting import kept_for_backward
from phi3 import fused_mlp, pretrained, tiny
from phi3.errors import UserError

import lora

IDS = torch.arange(24).view(2, 12)


def adapted(**fields):
    model = tiny.model(0)
    splits = {"gate_up_proj": pretrained.fused_splits(model.config)["gate_up_proj"]}
    lora.inject(model, **{"target_modules": ["gate_up_proj", "down_proj"], "r": 4, "splits": splits, **fields})
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def test_fusing_changes_no_loss_and_no_gradient():
    plain = adapted()
    fused = copy.deepcopy(plain)
    fused_mlp.fuse(fused)
    losses = [model(input_ids=IDS, labels=IDS, use_cache=False).loss for model in (plain, fused)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    ours = {name: p.grad for name, p in fused.named_parameters() if p.requires_grad}
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    torch.testing.assert_close(ours, theirs)


def test_fusing_keeps_less_for_backward():
    plain = adapted(lora_dropout=0.1)
    fused = copy.deepcopy(plain)
    fused_mlp.fuse(fused)
    kept = [kept_for_backward(lambda m=m: m(input_ids=IDS, use_cache=False), *m.parameters()) for m in (plain, fused)]
    assert kept[1] < kept[0]


def test_a_fused_model_evaluates_is_disabled_and_merged_as_any():
    model = adapted().eval()
    fused_mlp.fuse(model)
    with torch.no_grad():
        expected = model(IDS).logits
        with lora.disabled(model):
            base = model.train()(IDS).logits
        model.eval()
        assert not torch.allclose(base, expected)
        lora.merge(model)
        for training in (False, True):
            torch.testing.assert_close(model.train(training)(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_fused_is_refused():
    with pytest.raises(UserError, match="needs both gate_up_proj and down_proj"):
        fused_mlp.fuse(adapted(target_modules=["down_proj"], splits={}))
    with pytest.raises(UserError, match="models with Phi-3's MLP"):
        fused_mlp.fuse(torch.nn.Linear(2, 2))
