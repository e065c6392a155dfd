"""A bank on several ranks: each trains its rows, and the adapters are those of one process that has all rows."""


import pytest
import torch
import torch.distributed as dist
from sharding import mine, shard, whole
from torch.nn.parallel import DistributedDataParallel
from toy_model import IDS, Model

import lora
import lora.parallel

CONFIGS = {
    "alice": lora.LoraConfig(target_modules=["q_proj", "up_proj", "embed"], r=2, lora_alpha=3),
    "bob": lora.LoraConfig(target_modules=["up_proj", "down_proj"], r=3, use_dora=True),
    "carol": lora.LoraConfig(target_modules=["head", "q_proj"], r=1),
}
ROWS = ["alice", None, "bob", "alice"]  # bob has rows on the second rank alone, and carol on none
BATCH = torch.cat([IDS, IDS.flip(0)])


def banked():
    torch.manual_seed(0)
    model = Model().double()
    bank = lora.bank(model, CONFIGS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in bank:
            for parameter in bank.parameters(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return model, bank


def optimizers_of(bank):
    return {name: torch.optim.AdamW(bank.parameters(name), lr=0.05) for name in bank}


def stepped(model, bank, batch, rows, optimizers):
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    with bank.rows(rows):
        model(batch).square().mean().backward()
    gradients = {name: [p.grad for p in bank.parameters(name)] for name in bank}
    for name, optimizer in optimizers.items():
        if name in ROWS:  # of all ranks
            optimizer.step()
    return gradients


def my_rows():
    half = len(ROWS) // dist.get_world_size()
    return ROWS[dist.get_rank() * half :][:half]


def assert_as_one(model, bank, wrapped, steps=3):
    """Some steps of AdamW, each rank on its rows, and one process on all."""
    one, its = banked()
    ours, theirs = optimizers_of(bank), optimizers_of(its)
    for _ in range(steps):
        got = stepped(wrapped, bank, mine(BATCH), my_rows(), ours)
        expected = stepped(one, its, BATCH, ROWS, theirs)
        for name, gradients in expected.items():
            for gradient, other in zip(got[name], gradients, strict=True):
                if other is None:  # FSDP2 gives zeros to what has no row on any rank
                    assert gradient is None or not whole(gradient).any()
                else:
                    torch.testing.assert_close(whole(gradient), other, rtol=1e-9, atol=1e-12)
        for name in bank:
            for parameter, other in zip(bank.parameters(name), its.parameters(name), strict=True):
                torch.testing.assert_close(whole(parameter), other, rtol=1e-9, atol=1e-12)
    return one, its


def _sharded(folder, reshard):
    model, bank = banked()
    shard(model, reshard_after_forward=reshard)
    _, its = assert_as_one(model, bank, model)
    for name in bank:
        adapter, other = bank[name], its[name]  # on all ranks, whole
        assert dict(adapter.modules) == dict(other.modules)
        for key, tensor in other.tensors.items():
            torch.testing.assert_close(adapter.tensors[key], tensor.detach(), rtol=1e-9, atol=1e-12)
        bank.save(name, folder / name)
        bank.load(name, folder / name)
    its.save("bob", folder / f"one {dist.get_rank()}")
    saved, one = lora.read_adapter(folder / "bob"), lora.read_adapter(folder / f"one {dist.get_rank()}")
    assert dict(saved.modules) == dict(one.modules)
    own = [*map(id, bank.parameters("alice"))]
    for change in (
        lambda: bank.update({"dave": CONFIGS["alice"]}),
        lambda: bank.update({"dave": saved}),
        lambda: bank.update({"bob": saved}),
        lambda: bank.pop("bob"),
        lambda: bank.keep("bob"),
        lambda: bank.keep(None),
    ):
        with pytest.raises(ValueError, match="is sharded"):
            change()
    assert [*bank] == [*CONFIGS]
    assert [*map(id, bank.parameters("alice"))] == own


@pytest.mark.parametrize("reshard", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fully_sharded_ranks_train_as_one_process(ranks, tmp_path, reshard):
    ranks.run(_sharded, tmp_path, reshard)


def _replicated(static):
    model, bank = banked()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    assert lora.bank(wrapped) == bank
    assert_as_one(model, bank, wrapped)
    with pytest.raises(ValueError, match="is wrapped in DistributedDataParallel"):
        lora.bank(wrapped, {"dave": CONFIGS["alice"]})
    bank["dave"] = CONFIGS["alice"]  # by a handle that knows of no wrapper
    with bank.use("dave"), pytest.raises(RuntimeError, match="lora_A_dave: was put in after the model was wrapped"):
        wrapped(mine(BATCH))


def test_replicas_with_rows_of_different_adapters_train_as_one_process(ranks):
    ranks.run(_replicated, False)
