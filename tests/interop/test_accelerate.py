"""accelerate: models with LoRA that it prepares, in one process and in two, and models that it has put hooks into."""

import contextlib
import copy
import os
import re
import unittest.mock

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, cpu_offload, dispatch_model, hooks
from accelerate.state import AcceleratorState
from conftest import randomised
from test_ddp import ROUNDING, Net, adapted, batches_of, share
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import lora


@contextlib.contextmanager
def accelerator(**options):
    """One that knows of the process group, if there is one, and leaves nothing behind for the next test."""
    group = {}
    if dist.is_initialized():
        rank = str(dist.get_rank())
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}
    with unittest.mock.patch.dict(os.environ, {**group, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}):
        AcceleratorState._reset_state(True)
        yield Accelerator(cpu=True, **options)
        AcceleratorState._reset_state(True)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def train(model, optimizer, batches, part=lambda batch: batch, backward=torch.Tensor.backward, dtype=None):
    for batch in batches:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = model(part(batch))
        backward((y if dtype is None else y.float()).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_one_process_trains_as_without_it(tmp_path):
    model = adapted(modules_to_save=["head"])
    alone, path = copy.deepcopy(model), tmp_path / "adapter.safetensors"
    expected = train(alone, optimizer_of(alone), batches_of(3))
    with accelerator() as own:
        prepared, optimizer = own.prepare(model, optimizer_of(model))
        got = train(prepared, optimizer, batches_of(3), backward=own.backward)
        assert own.unwrap_model(prepared) is model
        lora.save_adapter(prepared, path)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    other = adapted(modules_to_save=["head"])
    lora.load_adapter(other, path)
    assert torch.equal(other(batches_of(1)[0]), alone(batches_of(1)[0]))


def two_train(folder, dtype, options):
    model = adapted().to(dtype)
    alone = copy.deepcopy(model)
    path, ids = f"{folder}/adapter.safetensors", batches_of(1)[0]
    with accelerator(**options) as own:
        assert own.num_processes == dist.get_world_size()
        prepared, optimizer = own.prepare(model, optimizer_of(model))
        assert type(prepared) is DDP
        assert own.unwrap_model(prepared) is model
        assert all(isinstance(block, lora.Linear) for block in model.blocks)
        expected = train(alone, optimizer_of(alone), batches_of(3), dtype=torch.bfloat16 if options else None)
        got = train(prepared, optimizer, batches_of(3), share, own.backward)
        if own.is_main_process:
            lora.save_adapter(prepared, path)
        own.wait_for_everyone()
        y = prepared(ids)
        assert y.dtype == dtype
        for wrapped in (prepared, own.unwrap_model(prepared)):
            randomised(model.blocks[0])
            assert not torch.equal(prepared(ids), y)
            lora.load_adapter(wrapped, path)
            assert torch.equal(prepared(ids), y)
        with pytest.raises(ValueError, match=r"the model is wrapped in DistributedDataParallel, .*give its `\.module`"):
            lora.inject(own.prepare(Net()), target_modules=["head"], r=2)
        lora.merge(own.unwrap_model(prepared))
        torch.testing.assert_close(model(ids), y, rtol=0.02 if options else 1e-9, atol=0.02 if options else 1e-9)
    return {name.removeprefix("module."): p for name, p in got.items()}, expected


def test_two_processes_train_as_one_with_the_whole_batches(ranks, tmp_path):
    for got, expected in ranks.run(two_train, str(tmp_path), torch.float64, {}):
        torch.testing.assert_close(got, expected, **ROUNDING)


@pytest.mark.slow
def test_two_processes_train_in_mixed_precision(ranks, tmp_path):
    (first, expected), (second, _) = ranks.run(two_train, str(tmp_path), torch.float32, {"mixed_precision": "bf16"})
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    # bfloat16 rounds to 2⁻⁹, and AdamW's steps of 0.02 make of that what they will: three of them bound it.
    torch.testing.assert_close(first, expected, rtol=0, atol=2 * 3 * 0.02)
    assert {p.dtype for p in first.values()} == {torch.float32}


def test_mixed_precision_is_that_of_autocast():
    model, ids = adapted().float(), batches_of(1)[0]
    alone = copy.deepcopy(model)
    expected = train(alone, optimizer_of(alone), batches_of(3), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = alone(ids)
    with accelerator(mixed_precision="bf16") as own:
        prepared, optimizer = own.prepare(model, optimizer_of(model))
        got = train(prepared, optimizer, batches_of(3), backward=own.backward)
        assert torch.equal(prepared(ids), y.float())
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


# ---- after it has prepared a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_layers_of_a_prepared_model_can_be_adapted_merged_and_given_back(precision, tmp_path):
    ids, path = batches_of(1)[0], tmp_path / "adapter.safetensors"
    with accelerator(mixed_precision=precision) as own:
        model = own.prepare(Net().float())
        before = model(ids)
        lora.inject(model, target_modules=["blocks.0", "head"], r=2)
        assert torch.equal(model(ids), before)
        for layer in (model.blocks[0], model.head):
            randomised(layer, 0.3)
        model(ids).sum().backward()
        assert model.head.lora_A.grad.any()
        y = model(ids).detach()
        assert not torch.equal(y, before)
        lora.save_adapter(model, path)
        twin = copy.deepcopy(model)
        lora.merge(twin)
        bound = 1e-5 if precision == "no" else 0.05
        torch.testing.assert_close(twin(ids), y, rtol=bound, atol=bound)
        lora.eject(model)
        assert torch.equal(model(ids), before)
        lora.load_adapter(model, path)
        assert torch.equal(model(ids), y)


def test_a_layer_that_is_the_whole_model_is_adapted_before_mixed_precision_or_after():
    x = torch.randn(3, 6)
    with accelerator(mixed_precision="bf16") as own:
        layer = own.prepare(nn.Linear(6, 4))
        with pytest.raises(ValueError, match="the instance has its own `forward` attribute"):
            lora.inject(layer, target_modules=[""], r=2)
        lora.inject(own.unwrap_model(layer, keep_fp32_wrapper=False), target_modules=[""], r=2)
        assert type(layer) is lora.Linear
        assert torch.equal(randomised(layer)(x), lora.Linear.forward(layer, x))
        layer = own.prepare(randomised(lora.Linear(6, 4, r=2)))
        y = layer(x)
        for undo in (lora.merge, lora.eject):
            with pytest.raises(ValueError, match="nothing was changed") as caught:
                undo(layer)
            assert str(caught.value).splitlines()[1:] == [f"  - the model: {BOUND}"]
            assert torch.equal(layer(x), y)
        lora.merge(own.unwrap_model(layer, keep_fp32_wrapper=False))
        torch.testing.assert_close(layer(x), y, rtol=0.02, atol=0.02)


BOUND = (
    "the instance has its own `forward` attribute, which would go on calling LoRA's; remove it first, as "
    "`accelerate.hooks.remove_hook_from_module` and `Accelerator.unwrap_model(model, keep_fp32_wrapper=False)` do."
)


def hooked():
    """The model with the hooks that `dispatch_model` puts into its layers."""
    model = adapted()
    for layer in (model.blocks[0], model.blocks[2]):
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


def test_hooks_in_lora_layers_change_nothing():
    model, alone = hooked(), adapted()
    got = train(model, optimizer_of(model), batches_of(3))
    torch.testing.assert_close(got, train(alone, optimizer_of(alone), batches_of(3)), rtol=0, atol=0)


@pytest.mark.parametrize("undo", [lora.merge, lora.eject])
def test_a_layer_with_a_hook_stays_a_lora_layer(undo):
    model, ids = hooked(), batches_of(1)[0]
    y = model(ids)
    with pytest.raises(ValueError, match=f"{undo.__name__}: nothing was changed") as caught:
        undo(model)
    assert str(caught.value).splitlines()[1:] == [f"  - blocks.0: {BOUND}", f"  - blocks.2: {BOUND}"]
    assert torch.equal(model(ids), y)
    hooks.remove_hook_from_module(model, recurse=True)
    alone = adapted()
    undo(alone)
    undo(model)
    assert torch.equal(model(ids), alone(ids))


def test_a_layer_whose_hook_is_gone_is_a_layer_like_any():
    model, ids = Net(), batches_of(1)[0]
    for layer in (model.blocks[0], model.blocks[2]):
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    with pytest.raises(ValueError, match=r"blocks\.0: the instance has its own .*\n.*blocks\.2: the inst"):
        lora.inject(model, target_modules=["blocks.0", "blocks.1", "blocks.2"], r=2)
    hooks.remove_hook_from_module(model, recurse=True)
    assert "forward" in vars(model.blocks[0])  # of nn.Linear, and bound to it
    before = model(ids)
    with pytest.raises(ValueError, match="nothing was changed"):
        lora.inject(model, target_modules=["blocks.0", "nowhere"], r=2)
    lora.inject(model, target_modules=["blocks.0", "blocks.1", "blocks.2"], r=2)
    for block in model.blocks:
        randomised(block)
    y = model(ids)
    assert not torch.allclose(y, before)
    lora.eject(model)
    assert torch.equal(model(ids), before)


def test_a_model_is_adapted_before_it_is_dispatched_or_between():
    alone, ids, devices = adapted(), batches_of(1)[0], {"": "cpu"}
    y = alone(ids)
    model = dispatch_model(adapted(), devices, force_hooks=True)
    assert torch.equal(model(ids), y)
    got = train(model, optimizer_of(model), batches_of(3))
    torch.testing.assert_close(got, train(alone, optimizer_of(alone), batches_of(3)), rtol=0, atol=0)
    model = dispatch_model(Net(), devices, force_hooks=True)
    with pytest.raises(
        ValueError, match=r"blocks\.0: .* inject first, and dispatch then; or take them out with"
    ) as caught:
        lora.inject(model, target_modules=["blocks.0", "head"], r=2)
    namespace = {"accelerate": accelerate, "model": model}
    exec(re.search("`(accelerate.hooks.remove_hook_from_module.*?)`", str(caught.value)).group(1), namespace)
    before = model(ids)
    lora.inject(model, target_modules=["blocks.0", "head"], r=2)
    randomised(model.head)
    y = model(ids)
    assert not torch.equal(y, before)
    assert torch.equal(dispatch_model(model, devices, force_hooks=True)(ids), y)


def test_an_offloaded_model_computes_the_same_and_is_not_saved_without_its_values(tmp_path):
    model, ids, path = adapted(), batches_of(1)[0], tmp_path / "adapter.safetensors"
    lora.save_adapter(model, path)
    before, y = path.read_bytes(), model(ids)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.blocks[0].lora_A.is_meta
    for mode in (True, False):
        with torch.no_grad():
            assert torch.equal(model.train(mode)(ids), y)
    uses = (lora.save_adapter, lora.load_adapter)
    for use in uses:
        with pytest.raises(lora.AdapterError, match=r"(?s)blocks\.0.*blocks\.2.* no values.*meta device"):
            use(model, path)
    with pytest.raises(ValueError, match=r"(?s)merge: nothing was changed.*blocks\.1: has no values yet"):
        lora.merge(model)
    assert path.read_bytes() == before
