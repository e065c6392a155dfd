"""torch.distributed.checkpoint: adapters alone, by every rank, asynchronously, and for another number of ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharding import adapted, assert_same, loss_of, mine, shard, whole
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from toy_model import IDS, Model

import lora


def another(**fields):
    """The same base with another adapter."""
    torch.manual_seed(0)
    base = Model().double()
    torch.manual_seed(8)
    return adapted(base, **fields)


def trained(steps=2, **fields):
    """A sharded model that two ranks have trained, and its optimizer."""
    torch.manual_seed(0)
    model = shard(adapted(**fields))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    step(model, optimizer, steps)
    return model, optimizer


def step(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, mine(IDS)).backward()
        optimizer.step()


def alone(model):
    """A model of one process with what a sharded one has."""
    one = another()
    state = {name: whole(tensor) for name, tensor in lora.lora_state_dict(model).items()}
    assert not one.load_state_dict(state, strict=False).unexpected_keys
    return one


def _two_to_two(folder, asynchronous):
    model, _ = trained()
    state = lora.lora_state_dict(model)
    assert all(type(tensor) is DTensor for tensor in state.values())
    assert all("lora_" in name for name in state)
    one = alone(model)
    if asynchronous:
        future = dcp.async_save({"adapter": state}, checkpoint_id=folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)  # what was staged is saved
        future.result()
    else:
        dcp.save({"adapter": state}, checkpoint_id=folder)
    other = shard(another())
    other(IDS)  # leaves the root's parameters whole
    dcp.load({"adapter": lora.lora_state_dict(other)}, checkpoint_id=folder)  # in place
    assert_same(other, one, rtol=0, atol=0)
    assert torch.equal(other(IDS), one(IDS))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["save", "async_save"])
def test_adapters_alone_are_saved_and_loaded_in_place(ranks, tmp_path, asynchronous):
    ranks.run(_two_to_two, tmp_path, asynchronous)


def _save(folder):
    model, _ = trained(splits={}, enable_lora={})
    dcp.save({"adapter": lora.lora_state_dict(model)}, checkpoint_id=folder / "dcp")
    lora.save_adapter(model, folder / "adapter")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_two_ranks_save_one_process_loads(ranks, tmp_path):
    ranks.run(_save, tmp_path)
    model, expected = another(splits={}, enable_lora={}), another(splits={}, enable_lora={})
    lora.load_adapter(expected, tmp_path / "adapter", check_base=False)
    dcp.load({"adapter": lora.lora_state_dict(model)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_same(model, expected, rtol=0, atol=0)
    lora.save_adapter(model, tmp_path / "again")
    adapter, again = lora.read_adapter(tmp_path / "adapter"), lora.read_adapter(tmp_path / "again")
    assert all(torch.equal(adapter.tensors[name], again.tensors[name]) for name in adapter.tensors)


def _load(folder):
    one = another()
    other = shard(adapted(copy.deepcopy(Model().double())))
    dcp.load({"adapter": lora.lora_state_dict(other)}, checkpoint_id=folder)
    assert_same(other, one, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_one_process_saves_two_ranks_load(ranks, tmp_path):
    dcp.save({"adapter": lora.lora_state_dict(another())}, checkpoint_id=tmp_path, no_dist=True)
    ranks.run(_load, tmp_path)


def _resumed(folder):
    model, optimizer = trained()
    state = {"adapter": lora.lora_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    other, its = trained(steps=0)
    state = {"adapter": lora.lora_state_dict(other), "optimizer": get_optimizer_state_dict(other, its)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(other, its, state["optimizer"])
    for _ in range(3):
        step(model, optimizer)
        step(other, its)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(whole(p), whole(q))


def test_a_run_goes_on_with_adapters_and_optimizer_as_it_was(ranks, tmp_path):
    ranks.run(_resumed, tmp_path)


def _missing(folder):
    model, _ = trained()
    state = lora.lora_state_dict(model)
    del state["head.lora_A"]
    dcp.save({"adapter": state}, checkpoint_id=folder)
    with pytest.raises(dcp.CheckpointException, match=r"Missing key in checkpoint state_dict: adapter\.head\.lora_A"):
        dcp.load({"adapter": lora.lora_state_dict(model)}, checkpoint_id=folder)
    dist.barrier()


def test_a_key_that_is_missing_is_noticed(ranks, tmp_path):
    ranks.run(_missing, tmp_path)
