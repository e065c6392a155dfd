"""FSDP2 over tensor parallelism, on four ranks of their own."""

import warnings

import pytest
import torch
from ranks import Ranks
from test_parallel import adapted, gradients_of, ids, plan, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import lora
import lora.parallel


@pytest.fixture(scope="module")
def four_ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


def sharded(mesh, **changes):
    model = adapted(**changes)
    parallelize_module(model, mesh["tp"], plan(model))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh["dp"])
    return model


def trains_and_saves(folder):
    # torch's own styles, too, return views of DTensors.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPModel\) returned a view")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    alone, model = adapted(), sharded(mesh)
    rows = ids().repeat(2, 1)  # 6, of which each half of the ranks has 3
    rows[3:] += 1
    rows %= 11
    mine = rows.chunk(2)[mesh["dp"].get_local_rank()]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (alone, model)]
    torch.testing.assert_close(model(mine), alone(mine))
    for _ in range(3):
        alone(rows).square().mean().backward()
        model(mine).square().mean().backward()
        expected = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.requires_grad}
        torch.testing.assert_close(gradients_of(model), expected)
        norms = [whole(nn.utils.clip_grad_norm_(m.parameters(), 0.1)) for m in (alone, model)]
        torch.testing.assert_close(norms[1], norms[0])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model(mine), alone(mine))
    path = f"{folder}/adapter.safetensors"
    lora.save_adapter(model, path)
    other = sharded(mesh)
    lora.load_adapter(other, path)
    torch.testing.assert_close(other(mine), alone(mine))
    lora.save_adapter(alone, alone_path := f"{folder}/alone-{torch.distributed.get_rank()}.safetensors")
    theirs, ours = lora.read_adapter(path), lora.read_adapter(alone_path)
    torch.testing.assert_close(theirs.tensors, ours.tensors)
    assert theirs.modules == ours.modules


@pytest.mark.slow
def test_fsdp_over_tensor_parallelism_trains_and_saves_as_one_process(four_ranks, tmp_path):
    four_ranks.run(trains_and_saves, str(tmp_path))
