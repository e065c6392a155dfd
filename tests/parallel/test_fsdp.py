"""FSDP2: two ranks train what one process trains on the whole batch, whatever is sharded and how."""

import copy

import pytest
import torch
import torch.distributed as dist
from conftest import KINDS, LAYERS, example, make
from releases import since
from sharding import adapted, assert_same, gradient, loss_of, mine, shard, twins, whole
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from toy_model import IDS, Block

import lora

WITH_DORA = [kind for kind in KINDS if "factored" not in kind and kind != "Linear transposed"]


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def assert_trains_as_one(model, one, batch, steps=3, **tolerance):
    """A few steps of AdamW, the sharded model on its part of the batch, the other one on all of it."""
    optimizers = optimizer_of(model), optimizer_of(one)
    for _ in range(steps):
        for part, data, optimizer in zip((model, one), (mine(batch), batch), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(part, data).backward()
        assert_same(model, one, gradient, **tolerance)
        for optimizer in optimizers:
            optimizer.step()
        assert_same(model, one, **tolerance)
    assert all(type(p) is DTensor for p in model.parameters() if p.requires_grad and p.grad is not None)


# ---- training ----------------------------------------------------------------------------------------------------


def _a_layer(kind, use_dora, itself):
    layer = make(kind, r=2 if "groups" in LAYERS[kind][1] else 1, use_dora=use_dora)
    layer.reset_magnitude()
    model = nn.Sequential(layer) if itself else nn.Sequential(nn.Sequential(layer))
    lora.mark_only_lora_as_trainable(model)
    model = model.double()
    one, batch = copy.deepcopy(model), torch.cat([example(kind, torch.float64) for _ in range(2)])
    assert_trains_as_one(shard(model), one, batch)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("itself", [True, False], ids=["itself", "in a block"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_layer_trains_as_one_process(ranks, kind, itself):
    ranks.run(_a_layer, kind, False, itself)


@pytest.mark.parametrize("kind", WITH_DORA)
def test_a_sharded_layer_with_magnitudes_trains_as_one_process(ranks, kind):
    ranks.run(_a_layer, kind, True, False)


def _a_model(fields, options):
    model, one = twins(**fields)
    assert_trains_as_one(shard(model, **options), one, IDS)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"bias": "all", "modules_to_save": ["norm"]}, {"merge_weights": True}, {"freeze_A": True}],
    ids=["plain", "DoRA", "in full", "merge_weights", "frozen A"],
)
def test_a_model_trains_as_one_process(ranks, fields, reshard):
    ranks.run(_a_model, fields, {"reshard_after_forward": reshard})


def _with_dropout(checkpointed):
    model, one = twins(lora_dropout=0.4)
    shard(model)
    if checkpointed:
        for block in model.layers:
            block.forward = _checkpointed(block)
    torch.manual_seed(10 + dist.get_rank())
    loss_of(model, mine(IDS)).backward()
    for rank, part in enumerate(IDS.chunk(2)):  # one process, with the random states of both
        torch.manual_seed(10 + rank)
        (loss_of(one, part) / 2).backward()
    assert_same(model, one, gradient)


def _checkpointed(block):
    return lambda x: checkpoint(Block.forward, block, x, use_reentrant=False)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_each_rank_drops_by_its_own_random_state(ranks, checkpointed):
    ranks.run(_with_dropout, checkpointed)


def _mixed(reshard):
    model, one = twins_in(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    shard(model, reshard_after_forward=reshard)
    for _ in range(2):
        loss_of(model, mine(IDS)).backward()
    for part in [*IDS.chunk(2)] * 2:
        loss_of(one, part).backward()
    # In one process the halves' gradients are added one after the other; two ranks add sums.
    assert_same(model, one, lambda p: p.grad * (1 if isinstance(p, DTensor) else 0.5), rtol=1e-6, atol=1e-6)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def twins_in(dtype):
    model = adapted()
    model.to(dtype)
    for module in model.modules():
        for name, parameter in module.lora_parameters() if isinstance(module, lora.LoRALayer) else ():
            setattr(module, name, nn.Parameter(parameter.float()))
    return model, copy.deepcopy(model)


@since("2.9", "parameters of a group have one dtype")
@pytest.mark.parametrize("reshard", [True, False])
def test_a_frozen_base_in_bfloat16_and_adapters_in_float32_share_a_group(ranks, reshard):
    ranks.run(_mixed, reshard)


def _policy():
    model, one = twins()
    model, one = model.float(), one.float()
    half = copy.deepcopy(one).bfloat16()
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    y = model(mine(IDS))
    assert torch.equal(y, half(mine(IDS)))
    y.float().square().mean().backward()
    for part in IDS.chunk(2):
        half.zero_grad()
        loss_of(half, part).backward()
        for p, q in zip(one.parameters(), half.parameters(), strict=True):
            if p.requires_grad:
                p.grad = q.grad.float() / 2 + (0 if p.grad is None else p.grad)
    assert_same(model, one, gradient, rtol=0, atol=0)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@since("2.9", "gradients under a policy are rounded once more")
def test_a_policy_of_mixed_precision_computes_as_a_model_in_that_precision(ranks):
    ranks.run(_policy)


def _accumulation():
    model, one = twins()
    shard(model)
    optimizers = optimizer_of(model), optimizer_of(one)
    batches = [IDS, (IDS + 1) % 10, (IDS + 5) % 10]
    for n, batch in enumerate(batches):
        model.set_requires_gradient_sync(n == len(batches) - 1)
        loss_of(model, mine(batch)).backward()
        loss_of(one, batch).backward()
    assert_same(model, one, gradient)
    norms = [nn.utils.clip_grad_norm_(part.parameters(), 0.01) for part in (model, one)]
    torch.testing.assert_close(whole(norms[0]), norms[1])
    assert_same(model, one, gradient)
    for optimizer in optimizers:
        optimizer.step()
    assert_same(model, one)


def test_gradients_accumulate_without_reductions_and_are_clipped_by_their_whole_norm(ranks):
    ranks.run(_accumulation)


def _unsharded():
    model, one = twins()
    shard(model)
    with torch.no_grad():
        model(IDS)  # leaves the root's parameters whole in their places
    groups = lora.param_groups(model, lr=0.05)
    assert all(type(p) is DTensor for group in groups for p in group["params"])
    assert lora.lora_state_dict(model).keys() == lora.lora_state_dict(one).keys()
    assert all(type(t) is DTensor for t in lora.lora_state_dict(model).values())


def test_what_a_forward_pass_has_gathered_is_not_taken_for_the_parameters(ranks):
    ranks.run(_unsharded)


# ---- serving ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _eval(use_dora, reshard):
    model, one = twins(merge_weights=True, use_dora=use_dora)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    shard(model, reshard_after_forward=reshard)
    optimizer = optimizer_of(model)
    for step in range(6):
        model.train(step == 3)
        torch.testing.assert_close(model(IDS), one(IDS))
        assert all(m._merged is None for m in model.modules() if isinstance(m, lora.LoRALayer))
        with torch.enable_grad():
            loss_of(model, mine(IDS)).backward()  # in eval(), too
        optimizer.step()
        for p, q in zip(model.parameters(), one.parameters(), strict=True):
            if q.requires_grad:
                q.copy_(whole(p))
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(whole(parameter), before[name])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "DoRA"])
def test_serving_merged_weights_neither_loses_nor_doubles_the_update(ranks, use_dora, reshard):
    ranks.run(_eval, use_dora, reshard)


def _disabled():
    model, one = twins()
    shard(model)
    with lora.disabled(model), lora.disabled(one):
        torch.testing.assert_close(model(IDS), one(IDS))
    torch.testing.assert_close(model(IDS), one(IDS))


def test_disabled_gives_the_base_model(ranks):
    ranks.run(_disabled)
