"""Tensor parallelism: random states, repeated forward passes, source ranks, and more of what is refused."""

import pytest
import torch
import torch.utils.checkpoint
from conftest import randomised
from test_parallel import SPLITS, gradients_of, mesh
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import parallelize_module

import lora
import lora.parallel


def masks_of_ranks_in_different_states():
    torch.manual_seed(100 + torch.distributed.get_rank())  # as where each rank seeds itself before it makes the model
    layer = lora.Linear(16, 32, r=16, lora_alpha=16, lora_dropout=0.5, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(16))
        layer.lora_B.copy_(torch.eye(16).repeat(2, 1))  # each half of the output is drop(x)
    model = parallelize_module(nn.Sequential(layer), mesh(), {"0": lora.parallel.ColwiseParallel()})
    return [model(torch.ones(3, 16)).detach() != 0 for _ in range(4)]


def test_ranks_in_different_states_when_they_divide_a_layer_drop_the_same_features(ranks):
    ours, theirs = ranks.run(masks_of_ranks_in_different_states)
    assert all(map(torch.equal, ours, theirs))
    assert 0.3 < torch.stack(ours).float().mean() < 0.7


def runs_again(reentrant):
    torch.manual_seed(5)
    layer = randomised(lora.Linear(8, 8, r=3, lora_dropout=0.5, dtype=torch.float64), 0.5)
    style = lora.parallel.ColwiseParallel(output_layouts=Replicate())
    model = parallelize_module(nn.Sequential(layer), mesh(), {"0": style})
    x = torch.randn(4, 8, dtype=torch.float64).requires_grad_()
    outputs, gradients = [], []
    for checkpointed in (False, True):
        torch.manual_seed(7 + torch.distributed.get_rank())
        y = x
        for _ in range(3):  # the same layer three times: three masks wait for backward
            y = torch.utils.checkpoint.checkpoint(model, y, use_reentrant=reentrant) if checkpointed else model(y)
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append(gradients_of(model))
        model.zero_grad()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_is_called_more_than_once_draws_each_dropout_again(ranks, reentrant):
    ranks.run(runs_again, reentrant)


def values_of_a_rank(source):
    made = {
        "col": lora.Linear(4, 6, r=2),
        "row": lora.Linear(6, 4, r=2),
        "qkv": lora.MergedLinear(4, sum(SPLITS), r=2, splits=SPLITS, enable_lora=True),
    }
    model = nn.ModuleDict(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.distributed.get_rank() + 1)
    col, row, merged = lora.parallel.ColwiseParallel, lora.parallel.RowwiseParallel, lora.parallel.MergedColwiseParallel
    styles = {"col": col(), "row": row(), "qkv": merged()}
    parallelize_module(model, mesh(), styles, src_data_rank=source)
    found = {"base": set(), "adapter": set()}
    for name, parameter in model.named_parameters():
        values = parameter.detach().to_local().flatten().tolist()
        found["adapter" if "lora_" in name else "base"].update(values)
    return found


@pytest.mark.parametrize(("source", "expected"), [(0, [{1}, {1}]), (1, [{2}, {2}]), (None, [{1}, {2}])])
def test_base_weights_come_from_the_rank_that_is_asked_for_and_adapters_from_one(ranks, source, expected):
    found = ranks.run(values_of_a_rank, source)
    assert [here["base"] for here in found] == expected
    assert found[0]["adapter"] == found[1]["adapter"]
    assert len(found[0]["adapter"]) == 1


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def refuses_more():
    def error(module, style, on=None):
        before = dict(module.named_parameters())
        with pytest.raises(ValueError, match="was not divided among ranks") as caught:
            parallelize_module(nn.Sequential(module), on or mesh(), {"0": style})
        assert all(before[name] is parameter for name, parameter in module.named_parameters()), "left as it was"
        return str(caught.value)

    col, row, merged = lora.parallel.ColwiseParallel, lora.parallel.RowwiseParallel, lora.parallel.MergedColwiseParallel
    own = nn.Sequential(OwnForward(4, 4))
    lora.inject(own, target_modules=["0"], r=2)
    waits = nn.Sequential(nn.Linear(4, 4))
    lora.inject(waits, target_modules=["0"], r=2, init_lora_weights="eva")
    qkv = lora.MergedLinear(8, sum(SPLITS), r=2, splits=SPLITS, enable_lora=True)
    return {
        "own": error(own[0], col()),
        "waits": error(waits[0], row()),
        "max_norm": error(lora.Embedding(6, 4, r=2, max_norm=1.0), col()),
        "mesh": error(lora.Linear(4, 4, r=2), col(), init_device_mesh("cpu", (2, 1))),
        "merged": error(qkv, merged(), init_device_mesh("cpu", (1, 2))),
    }


def test_more_that_cannot_be_divided_is_refused(ranks):
    told = ranks.run(refuses_more)[0]
    assert "or its forward is not its base class's" in told["own"]
    assert "it starts from its base weight or from data (`init_lora_weights='eva'`)" in told["waits"]
    assert "`max_norm`" in told["max_norm"]
    assert "the mesh must have one dimension, got 2" in told["mesh"]
    assert "the mesh must have one dimension, got 2" in told["merged"]


def test_a_models_own_plan_is_used_and_one_that_is_given_counts_more():
    model = nn.ModuleDict({"up": lora.Linear(4, 8, r=2), "down": lora.Linear(8, 4, r=2)})
    model.tp_plan = {"up": "colwise", "down": "rowwise"}
    assert sorted(lora.parallel.plan_of(model)) == ["down", "up"]
    assert sorted(lora.parallel.plan_of(model, {"up": "colwise"})) == ["up"]
    with pytest.raises(ValueError, match="there is no plan for this ModuleDict"):
        lora.parallel.plan_of(model, {})
