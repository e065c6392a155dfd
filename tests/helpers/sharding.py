"""What the tests of sharded models share: models to shard, and the whole values of what is sharded."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy_model import Model

import lora

# Every kind of layer of the toy model, in blocks and in the root; of a rank below the number of ranks.
FIELDS = {
    "target_modules": ["q_proj", "v_proj", "up_proj", "embed", "head"],
    "splits": {"q_proj": (4, 2, 2)},
    "enable_lora": {"q_proj": [True, False, True]},
    "r": 1,
}


def shard(model, **options):
    """The model, sharded over all ranks: each block by itself, and the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*getattr(model, "layers", model.children()), model]:
        fully_shard(module, mesh=mesh, **options)
    return model


@torch.no_grad()
def adapted(model=None, **fields):
    """The toy model with LoRA, which has trained; in float64, so that rounding does not hide anything."""
    model = Model().double() if model is None else model
    lora.inject(model, **{**FIELDS, **fields})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) / 4)
    return model


def twins(**fields):
    """One model twice: to shard, and to compute with in one process."""
    model = adapted(**fields)
    return model, copy.deepcopy(model)


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mine(batch: Tensor) -> Tensor:
    """This rank's part of a batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(model, batch, **options):
    return model(batch, **options).float().square().mean()


def assert_same(model, one, what=lambda parameter: parameter, **tolerance):
    """Each parameter that trains (or its gradient) is whole what it is in one process."""
    expected = {name: what(p) for name, p in one.named_parameters() if p.requires_grad}
    got = {name: whole(what(p)) for name, p in model.named_parameters() if p.requires_grad}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def gradient(parameter):
    return parameter.grad
