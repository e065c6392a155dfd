"""What stays in memory of weights that FSDP2 has gathered and given up again: nothing, whatever a layer keeps."""

import contextlib
import gc
import time
import warnings

import pytest
import torch
from releases import since
from sharding import shard
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import lora

SIZE, BLOCKS = 96, 3  # of the weights, beside which two rows of activations are small


class Conv(lora.Conv1d):
    """A convolution of rows, (2, SIZE)."""

    def forward(self, x):
        return super().forward(x.unsqueeze(-1)).squeeze(-1).clone()  # no view, of which FSDP2 warns


class Embed(lora.Embedding):
    """An embedding of the positions of the largest features."""

    def forward(self, x):
        return super().forward(x.argmax(-1)) + x


KINDS = {
    "Linear": lambda **options: lora.Linear(SIZE, SIZE, **options),
    "Linear transposed": lambda **options: lora.Linear(SIZE, SIZE, fan_in_fan_out=True, **options),
    "MergedLinear": lambda **options: lora.MergedLinear(SIZE, SIZE, enable_lora=[True, False, True], **options),
    # Factored: loralib's own form makes the update as large as the weight, and keeps it.
    "Conv1d": lambda **options: Conv(SIZE, SIZE, 1, factored=True, **options),
    "Embedding": lambda lora_dropout=0.0, **options: Embed(SIZE, SIZE, **options),
}
POLICY = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
# The weights' dtype, options of `fully_shard`, and whether operations are cast.
HOW = {
    "float32": (torch.float32, {}, False),
    "a bfloat16 base": (torch.bfloat16, {}, False),
    "a policy": (torch.float32, POLICY, False),
    "autocast": (torch.float32, {}, True),
    "autocast over a bfloat16 base": (torch.bfloat16, {}, True),
}


def storages(tensors):
    """Of each storage the size, by address; of what has been given up it is 0."""
    found = {}
    for tensor in tensors:
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def living():
    """All tensors that Python knows."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects of torch warn when they are asked what they are
        found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    return [t for t in found if t.layout is torch.strided and t.device.type == "cpu" and not t.is_nested]


def _resident(kind, how, mode, use_dora, dropout, merge_weights):
    dtype, options, autocast = HOW[how]
    settings = {"r": 2, "lora_dropout": dropout, "merge_weights": merge_weights, "use_dora": use_dora, "dtype": dtype}
    model = nn.Sequential(*(nn.Sequential(KINDS[kind](**settings)) for _ in range(BLOCKS)))
    lora.mark_only_lora_as_trainable(model)
    for module in model.modules():
        for name, parameter in module.lora_parameters() if isinstance(module, lora.LoRALayer) else ():
            setattr(module, name, nn.Parameter(parameter.float()))
    shard(model, reshard_after_forward=True, **options).train(mode == "train")
    x = torch.randn(2, SIZE, dtype=dtype, requires_grad=mode == "train")
    before, saved = storages(living()), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    cast = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    weight = SIZE * SIZE * 2  # bytes, in the smaller of the dtypes
    with hooks, cast, torch.set_grad_enabled(mode == "train"):
        y = model(x)
    kept = sum(storages(saved).values())
    assert kept < weight, f"{kept} bytes are kept for backward, and one weight has {weight}"
    for _ in range(100):
        new = {where: size for where, size in storages(living()).items() if where not in before}
        if sum(new.values()) < weight:
            break
        time.sleep(0.05)  # gloo's thread lets go of the last gathered weight when it comes to it
    assert sum(new.values()) < weight, f"there are {sorted(new.values())} bytes more"
    assert mode == "served" or saved
    if mode == "train":
        y.float().square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# Each kind once, each way once.
ONCE = list(zip(KINDS, HOW, strict=True))
two_dtypes = since("2.9", "parameters of a group have one dtype")


@two_dtypes
@pytest.mark.parametrize(("kind", "how"), ONCE)
def test_no_weight_is_kept_for_backward(ranks, kind, how):
    ranks.run(_resident, kind, how, "train", False, 0.0, False)


@two_dtypes
@pytest.mark.slow
def test_no_weight_is_kept_where_a_layer_drops(ranks):
    for kind, how in ("Linear", "float32"), ("MergedLinear", "autocast"), ("Conv1d", "a bfloat16 base"):
        ranks.run(_resident, kind, how, "train", False, 0.5, False)


@two_dtypes
@pytest.mark.slow
def test_no_weight_is_kept_where_a_layer_has_magnitudes(ranks):
    for kind, how in ONCE:
        ranks.run(_resident, kind, how, "train", True, 0.0, False)


@two_dtypes
@pytest.mark.sampled(1)
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "DoRA"])
def test_no_merged_weight_is_kept_in_serving(ranks, use_dora):
    for kind, how in ONCE:
        ranks.run(_resident, kind, how, "served", use_dora, 0.0, True)
