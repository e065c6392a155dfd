"""Two linear layers and an activation as one function: a gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.functional.fused import Fused, FusedFunction, Slices, choose
from lora.functional.linear import linear_backward, linear_forward, lora_linear


class Adapted(NamedTuple):
    """A linear layer with LoRA, as the arguments of `lora_linear`."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float
    dropout: float = 0.0
    slices: Slices | None = None


def lora_swiglu(x: Tensor, gate_up: Adapted, down: Adapted) -> Tensor:
    """The MLP of Llama and Phi-3: gate and up in one linear layer, SiLU, and down; LoRA on both layers.

        g, u = gate_up(x)        y = down(silu(g) ⊙ u)

    Keeps x, (g, u) and the two h = drop(·) Aᵀ for its backward; silu(g) ⊙ u and what SiLU would keep are computed
    again. Where the fused function does not apply, and where a bias trains, this is `plain_lora_swiglu`.

    Args:
        x: (..., hidden).
        gate_up: the layer that computes g and u, one after the other: its weight is (2 · intermediate, hidden).
        down: the layer back to (..., hidden): its weight is (hidden, intermediate).

    Returns:
        y (..., hidden).

    From "GLU Variants Improve Transformer", arXiv:2002.05202, section 2.

    >>> import torch, lora.functional
    >>> gate_up = lora.functional.Adapted(torch.ones(8, 2), None, torch.ones(1, 2), torch.zeros(8, 1), 1.0)
    >>> down = lora.functional.Adapted(torch.ones(2, 4), None, torch.ones(1, 4), torch.zeros(2, 1), 1.0)
    >>> lora.functional.lora_swiglu(torch.ones(3, 2), gate_up, down).shape
    torch.Size([3, 2])
    """
    fused = [choose(x, *layer) for layer in (gate_up, down)]
    biases = [layer.bias for layer in (gate_up, down)]
    if None in fused or any(bias is not None and bias.requires_grad for bias in biases):
        return plain_lora_swiglu(x, gate_up, down)
    return _LoRASwiGLU.run(x, gate_up.A, gate_up.B, down.A, down.B, gate_up, down, *fused)


def plain_lora_swiglu(x: Tensor, gate_up: Adapted, down: Adapted) -> Tensor:
    """What `lora_swiglu` computes, from `lora_linear` and operations that autograd knows."""
    return lora_linear(_activate(lora_linear(x, *gate_up)), *down)


def _activate(gu: Tensor) -> Tensor:
    gate, up = gu.chunk(2, -1)
    return F.silu(gate) * up


class _LoRASwiGLU(FusedFunction):
    """`plain_lora_swiglu`, fused; A and B of both layers are given apart too, for autograd to see them."""

    inputs = 5

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A1: Tensor,
        B1: Tensor,
        A2: Tensor,
        B2: Tensor,
        gate_up: Adapted,
        down: Adapted,
        *fused: Fused,
    ) -> Tensor:
        gu, h1 = linear_forward(x, *gate_up[:4], fused[0])  # (..., 2 · intermediate)
        y, h2 = linear_forward(_activate(gu), *down[:4], fused[1])  # (..., hidden)
        ctx.fused = fused
        ctx.save_for_backward(x, A1, B1, A2, B2, gate_up.weight, down.weight, gu, h1, h2)
        return y

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
        x, A1, B1, A2, B2, weight1, weight2, gu, h1, h2 = ctx.saved_tensors
        fused1, fused2 = ctx.fused
        needs_x, needs_A1, needs_B1, needs_A2, needs_B2, *_ = ctx.needs_input_grad
        h2 = h2 if needs_B2 else None
        activated = _activate(gu) if needs_A2 else None  # (..., intermediate)
        da, dA2, dB2 = linear_backward(dy, activated, weight2, A2, B2, h2, fused2, True)
        assert da is not None, "it was asked for"
        dgu = _activate_backward(da, gu)  # (..., 2 · intermediate)
        h1 = h1 if needs_B1 else None
        given = x if needs_A1 else None
        dx, dA1, dB1 = linear_backward(dgu, given, weight1, A1, B1, h1, fused1, needs_x)
        return dx, dA1, dB1, dA2, dB2

    @staticmethod
    def twin(ctx: Any, *inputs: Any) -> Tensor:
        raise RuntimeError(
            "lora_swiglu cannot be differentiated twice, or for many output gradients at once; "
            "compute with `lora.functional.plain_lora_swiglu`."
        )


def _activate_backward(da: Tensor, gu: Tensor) -> Tensor:
    """(dg, du) side by side, from the gradient of silu(g) ⊙ u."""
    gate, up = gu.chunk(2, -1)
    dgu = torch.empty_like(gu)
    dgate, dup = dgu.chunk(2, -1)
    torch.mul(da, F.silu(gate), out=dup)
    torch.ops.aten.silu_backward.grad_input(da * up, gate, grad_input=dgate)
    return dgu
