"""A bank on several ranks: each trains its rows, and the adapters are those of one process that has all rows."""

import unittest.mock

import pytest
import torch
import torch.distributed as dist
from releases import since
from sharding import mine, shard, whole
from torch import nn
from torch.distributed import pipelining as pipe
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from toy_model import IDS, Model

import lora
import lora.parallel
from lora.parallel import ddp

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


def _replicated():
    model, bank = banked()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    assert lora.bank(wrapped) == bank
    with unittest.mock.patch.object(ddp, "_unsynchronised", wraps=ddp._unsynchronised) as looked:
        assert_as_one(model, bank, wrapped)
    assert looked.call_count == 1  # by the first layer, for all layers and all their adapters
    with pytest.raises(ValueError, match="is wrapped in DistributedDataParallel"):
        lora.bank(wrapped, {"dave": CONFIGS["alice"]})
    bank["dave"] = CONFIGS["alice"]  # by a handle that knows of no wrapper
    with bank.use("dave"), pytest.raises(RuntimeError, match="lora_A_dave: was put in after the model was wrapped"):
        wrapped(mine(BATCH))


def test_replicas_with_rows_of_different_adapters_train_as_one_process(ranks):
    ranks.run(_replicated)


# ---- what is refused -----------------------------------------------------------------------------------------------


def _refused():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, _ = banked()
    for style in (lora.parallel.ColwiseParallel, lora.parallel.RowwiseParallel, lora.parallel.MergedColwiseParallel):
        given = style((8, 4)) if style is lora.parallel.MergedColwiseParallel else style()
        with pytest.raises(ValueError, match=r"it has a bank of adapters \(alice, bob\), .*`bank.keep\(name\)`"):
            parallelize_module(model, mesh, {"layers.0.mlp.up_proj": given})
    assert not any(lora.layers.weights.is_sharded(parameter) for parameter in model.parameters())

    model, bank = banked()
    one, its = banked()
    parallelize_module(model, mesh, {"layers.0.mlp.up_proj": ColwiseParallel(output_layouts=Replicate())})
    with bank.use("bob"), its.use("bob"):
        torch.testing.assert_close(model(BATCH), one(BATCH), rtol=1e-9, atol=1e-12)
    words = r"layers\.0\.mlp\.up_proj: its input is divided among ranks \(.*DTensor.*`bank.use\(name\)`"
    with bank.rows(ROWS), pytest.raises(RuntimeError, match=words):
        model(BATCH)
    with pytest.raises(ValueError, match=r"dave: layers\.0\.mlp\.up_proj: is sharded"):
        bank["dave"] = CONFIGS["alice"]

    model, _ = banked()
    wrapper = FullyShardedDataParallel(model.float(), use_orig_params=True, device_id=torch.device("cpu"))
    words = "the model is wrapped in FullyShardedDataParallel"
    with pytest.raises(ValueError, match=words):
        lora.bank(wrapper, {"dave": CONFIGS["alice"]})
    with pytest.raises(ValueError, match=words):
        lora.bank(wrapper)["alice"]


@since("2.11", "lora.parallel divides no layers")
def test_what_cannot_divide_a_bank_says_so(ranks):
    ranks.run(_refused)


# ---- pipelines -----------------------------------------------------------------------------------------------------

WIDTH = 6


def stages():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH)).double() for _ in range(2)]


def with_bank(model):
    torch.manual_seed(1)
    both = {name: lora.LoraConfig(target_modules="all-linear", r=r, init_lora_weights=False) for name, r in ROW_RANKS}
    return lora.bank(model, both)


ROW_RANKS = (("alice", 1), ("bob", 2))


def _staged():
    rank = dist.get_rank()
    parts = stages()
    banks = [with_bank(part) for part in parts]
    torch.manual_seed(2)
    x, target = torch.randn(8, WIDTH).double(), torch.randn(8, WIDTH).double()
    loss_of = nn.functional.mse_loss
    stage = pipe.PipelineStage(parts[rank], rank, 2, torch.device("cpu"))
    schedule = pipe.ScheduleGPipe(stage, 4, loss_fn=loss_of)
    with banks[rank].use("bob"):  # for all microbatches; each rank has the bank of its stage
        schedule.step(*((x,) if rank == 0 else ()), **({"target": target} if rank == 1 else {}))
    ones = stages()
    its = [with_bank(part) for part in ones]
    with its[0].use("bob"), its[1].use("bob"):
        loss_of(ones[1](ones[0](x)), target).backward()
    for parameter, other in zip(banks[rank].parameters("bob"), its[rank].parameters("bob"), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in banks[rank].parameters("alice"))


@pytest.mark.slow
def test_stages_of_a_pipeline_have_a_bank_each(ranks):
    ranks.run(_staged)
