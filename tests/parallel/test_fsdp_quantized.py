"""NF4 weights under FSDP2, which only the base's own forward computes with rightly."""

import copy

import torch
import torchao  # noqa: F401 (so that this file is left out where only the runtime dependencies are)
from sharding import assert_same, gradient, loss_of, mine, shard
from torch import nn
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor, to_nf4

import lora


def _nf4(folder):
    model = nn.Sequential(nn.Sequential(nn.Linear(128, 128, bias=False)))
    layer = model[0][0]
    layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), 64, 64), requires_grad=False)
    lora.inject(model, target_modules=["0.0"], r=2)
    nn.init.normal_(layer.lora_B)
    one, batch = copy.deepcopy(model), torch.randn(4, 128)
    shard(model)
    assert type(layer.weight.to_local()) is NF4Tensor
    assert torch.equal(model(batch), one(batch))
    loss_of(model, mine(batch)).backward()
    loss_of(one, batch).backward()
    assert_same(model, one, gradient, rtol=1e-5, atol=1e-5)
    lora.save_adapter(model, folder / "adapter")
    lora.load_adapter(model, folder / "adapter")
    assert lora.adapter_of(model).modules == lora.adapter_of(one).modules


def test_a_sharded_packed_base_trains_and_is_saved(ranks, tmp_path):
    ranks.run(_nf4, tmp_path)
