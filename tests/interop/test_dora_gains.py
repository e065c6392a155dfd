"""DoRA with gains far from 1 computes what the equation says, to the roundings of its dtype."""

import copy

import peft
import pytest
import torch
from conftest import randomised
from torch import nn

import lora

GAINS = [1e-4, 0.01, 0.05, 0.999, 1.0, 1.001, 30.0, 1e3]
KINDS = {
    "linear": (nn.Linear(64, 48, bias=False), (64, 64)),
    "merged": (nn.Linear(64, 48, bias=False), (64, 64)),
    "conv": (nn.Conv1d(16, 12, 3, bias=False), (8, 16, 12)),
    "embedding": (nn.Embedding(32, 16), None),
}


def layer_of(kind, gain, dtype):
    """A layer whose gains are all this one, up to some roundings of float32."""
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(KINDS[kind][0])).to(dtype)
    more = {"splits": {"0": (16, 16, 16)}, "enable_lora": {"0": (True, False, True)}} if kind == "merged" else {}
    lora.inject(model, target_modules=["0"], r=4, use_dora=True, **more)
    randomised(model[0])
    with torch.no_grad():
        model[0].lora_B.mul_(0.01)  # what is rounded is the magnitude's part, not the update's
        model[0].lora_magnitude.copy_(model[0].lora_norms() * gain)
    return model[0]


def inputs(kind, dtype):
    shape = KINDS[kind][1]
    return torch.arange(32).view(2, 16) if shape is None else torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_outputs_and_merged_weights(kind, dtype):
    for gain in GAINS:
        layer = layer_of(kind, gain, dtype)
        x = inputs(kind, dtype)
        exact = copy.deepcopy(layer).double()
        expected = exact(x if x.dtype == torch.int64 else x.double())
        outputs = exact.lora_output_dims()[1] % expected.dim()
        others = [dim for dim in range(expected.dim()) if dim != outputs]  # of a fused layer some are not scaled
        error, size = ((layer(x).double() - expected).norm(dim=others), expected.norm(dim=others))
        roundings = 2 if dtype.itemsize == 2 else 8  # half precision is summed up in float32
        assert (error <= roundings * torch.finfo(dtype).eps * size).all()
        merged, W = copy.deepcopy(layer), exact.lora_compute_merged()
        merged.lora_merge()
        info = torch.finfo(dtype)
        step = info.smallest_normal * info.eps * W.numel() ** 0.5  # of numbers below the normal ones
        assert (merged.weight.double() - W).norm() <= 2 * info.eps * W.norm() + step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gain", [0.01, 0.05, 0.3, 3.0])
def test_the_error_is_like_pefts(gain, dtype):
    ours = layer_of("linear", gain, dtype)
    base = nn.Sequential(nn.Linear(64, 48, bias=False)).to(dtype)
    base[0].weight.data = ours.weight.detach().clone()
    theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=8, use_dora=True))
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.lora_A)
        layer.lora_B["default"].weight.copy_(ours.lora_B)
        layer.lora_magnitude_vector["default"].weight.copy_(ours.lora_magnitude)
        x = torch.randn(256, 64, dtype=dtype)
        expected = copy.deepcopy(ours).double()(x.double())
        errors = [(y.double() - expected).norm() / expected.norm() for y in (ours(x), theirs(x))]
    assert errors[0] <= 2 * errors[1]  # three roundings here, and two there
