"""FSDP2 shards a module's own parameters, and what LoRA adds beside them: what trains is what one process trains."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from sharding import adapted, assert_same, gradient, loss_of, mine, shard, twins
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import lora

X = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Mixture(nn.Module):
    """Experts as one stack, and a matrix."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 5, 6))
        self.down = nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        outputs = [F.linear(x, self.experts[e]) * x[:, e : e + 1] for e in range(3)]
        return F.linear(sum(outputs).tanh(), self.down)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), Mixture(), Mixture()).double()


FIELDS = {"target_modules": ["0"], "target_parameters": ["experts", "down"], "splits": {}, "enable_lora": {}, "r": 1}


def _training(fields, options, checkpointed):
    sharded, one = twins(model=plain(), **FIELDS, **fields)
    shard(sharded, **options)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 0.05) for m in (sharded, one)]
    for _ in range(2):
        for model, batch, optimizer in zip((sharded, one), (mine(X), X), optimizers, strict=True):
            optimizer.zero_grad()
            if checkpointed:
                checkpoint(model, batch, use_reentrant=False).square().mean().backward()
            else:
                loss_of(model, batch).backward()
        assert_same(sharded, one, gradient)
        for optimizer in optimizers:
            optimizer.step()
        assert_same(sharded, one)
    assert type(sharded[1].experts_lora_A) is DTensor
    assert len(lora.check(sharded).idle) == 0


@pytest.mark.parametrize(
    ("fields", "options", "checkpointed"),
    [
        ({}, {}, False),
        ({"use_dora": True}, {}, False),
        ({"merge_weights": True, "use_rslora": True}, {"reshard_after_forward": False}, False),
        ({}, {}, True),
    ],
    ids=["plain", "DoRA", "whole after forward", "checkpointed"],
)
def test_parameters_train_as_in_one_process(ranks, fields, options, checkpointed):
    ranks.run(_training, fields, options, checkpointed)


def _files(folder, fields):
    sharded, one = twins(model=plain(), **FIELDS, **fields)
    shard(sharded)
    sharded(X)
    lora.save_adapter(sharded, folder / "two")
    expected, got = lora.adapter_of(one), lora.read_adapter(folder / "two")
    assert got.modules == expected.modules
    assert all(torch.equal(got.tensors[name], expected.tensors[name]) for name in expected.tensors)
    other = shard(adapted(plain(), **FIELDS, **fields))
    lora.load_adapter(other, folder / "two")
    with torch.no_grad():
        assert torch.allclose(other(X), one(X))


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["plain", "DoRA"])
def test_files_of_sharded_parameters_are_those_of_one_process(ranks, tmp_path, fields):
    ranks.run(_files, tmp_path, fields)


def _refused():
    model = shard(plain())
    with pytest.raises(ValueError, match=r"1\.experts: is sharded; an adapter added now would not be") as caught:
        lora.inject(model, target_parameters=["experts"], r=1)
    assert "2.experts: is sharded" in str(caught.value)
    model = shard(adapted(plain(), **FIELDS))
    with pytest.raises(ValueError, match=r"1\.experts: is sharded; save the adapter"):
        lora.merge(model)


def test_what_is_sharded_already_is_refused(ranks):
    ranks.run(_refused)


class Sequence(nn.Module):
    """Attention and a recurrent layer, which keep their matrices for themselves."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.lstm = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x):
        x = x.unflatten(1, (2, 3)).repeat(1, 1, 2)  # (rows, 6) -> (rows, 2, 6)
        return self.lstm(self.attn(x, x, x, need_weights=False)[0])[0].contiguous()  # FSDP2 warns of views


def _sequence(use_dora):
    torch.manual_seed(0)
    fields = {"target_modules": ["attn", "lstm"], "splits": {}, "enable_lora": {}, "r": 1, "use_dora": use_dora}
    sharded, one = twins(model=nn.Sequential(nn.Identity(), Sequence()).double(), **fields)
    shard(sharded)
    for model, batch in ((sharded, mine(X)), (one, X)):
        loss_of(model, batch).backward()
    assert_same(sharded, one, gradient)
    adapter, expected = lora.adapter_of(sharded), lora.adapter_of(one)
    assert adapter.modules == expected.modules
    assert all(torch.equal(adapter.tensors[name], expected.tensors[name]) for name in expected.tensors)


@pytest.mark.parametrize("use_dora", [False, True])
def test_attention_and_recurrent_layers_are_sharded(ranks, use_dora):
    ranks.run(_sequence, use_dora)
