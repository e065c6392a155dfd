"""Modules that keep a stack of matrices in one parameter, and W of it by hand."""

import torch
import torch.nn as nn

import lora
from lora.layers.stack import StackLoRA


class Stack(nn.Module):
    """A weight (E, rows, columns), which is (E, out, in) or, where it says so, transposed."""

    def __init__(self, *shape, is_transposed=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)
        self.is_transposed = is_transposed


class Computes(Stack):
    """Its forward is whatever it is given beside an input, a function of the weight."""

    def forward(self, input, function):
        return function(self.weight)


class Model(nn.Sequential):
    def forward(self, function):
        return self[0](torch.zeros(1), function)


lora.register(Stack, StackLoRA)


def stack(*shape, transposed=False, dtype=torch.float64, **settings):
    """A model of one stack, whose A, B and magnitudes are random."""
    model = Model(Computes(*shape, is_transposed=transposed)).to(dtype)
    lora.inject(model, target_modules=["0"], **{"r": 2, "lora_alpha": 3, **settings})
    with torch.no_grad():
        for _, parameter in model[0].lora_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def by_hand(layer, dtype=torch.float64):
    """g ⊙ (W₀ + s · B A), one matrix at a time, in torch's operations, which autograd knows."""
    rows = []
    for e, W0 in enumerate(layer.weight.detach().to(dtype)):
        update = layer.lora_B[e].to(dtype) @ layer.lora_A[e].to(dtype) * (layer.lora_alpha / layer.r)
        W = W0 + (update.T if layer.is_transposed else update)
        if layer.use_dora:
            outputs = W.T if layer.is_transposed else W
            gain = layer.lora_magnitude.view(len(layer.weight), -1)[e].to(dtype) / outputs.norm(dim=1).detach()
            W = (outputs * gain[:, None]).T if layer.is_transposed else outputs * gain[:, None]
        rows.append(W)
    return torch.stack(rows)


def gradients(y, *tensors):
    """Of all tensors, for random numbers that are the same in each call."""
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return torch.autograd.grad(y, tensors, upstream)
