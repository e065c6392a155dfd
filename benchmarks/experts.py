"""What does LoRA on a mixture's experts cost, which are parameters of three dimensions?

Forward and backward of transformers' experts with gate_up and down adapted at r = 8, and gradients for the input, A
and B, against the frozen block with a gradient for the input. The shapes are those of Mixtral (8 experts, 2 for each
token) and of Qwen3-MoE (128 experts, 8 for each token) at an eighth of their widths. "eager" is transformers'
loop over the experts that are met, "grouped_mm" its product of groups. "kept" is what autograd keeps for backward,
parameters aside, and "made" all new storage of a step (not counted where PEFT makes a gradient of all weights for each
expert that is met: the counter keeps all of it).

    python benchmarks/experts.py [--quick]
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import peft
import rivals
import torch
from counts import kept, made
from harness import Case, main
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import lora

R = 8
OWN = ("gate_up_proj", "down_proj")


class Shape(NamedTuple):
    """A block of experts, and what it is given."""

    experts: int
    chosen: int
    hidden: int
    intermediate: int
    tokens: int


SHAPES = {
    "Mixtral-like, 256 tokens": Shape(8, 2, 512, 1792, 256),
    "Qwen3-MoE-like, 256 tokens": Shape(128, 8, 256, 96, 256),
    "Qwen3-MoE-like, 2 tokens": Shape(128, 8, 256, 96, 2),
}


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    scale = 16 if quick else 1
    return {
        f"{name}, {how}": partial(case, shape, scale, how)
        for name, shape in SHAPES.items()
        for how in ("eager", "grouped_mm")
    }


def case(shape: Shape, scale: int, how: str) -> Case:
    experts, chosen, hidden, intermediate, tokens = shape
    # torch's product of groups wants rows of 16 bytes.
    hidden, intermediate, tokens = hidden // scale, -(-intermediate // (4 * scale)) * 4, -(-tokens // scale)
    config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts)
    config._experts_implementation = how
    base = MixtralExperts(config)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=hidden**-0.5)
    x, dy = torch.randn(tokens, hidden, requires_grad=True), torch.randn(tokens, hidden)
    routed = torch.rand(tokens, experts).topk(chosen).indices, torch.full((tokens, chosen), 1 / chosen)
    blocks = {"frozen": copy.deepcopy(base).requires_grad_(False), "PEFT": with_peft(base), "lora": with_lora(base)}
    with torch.no_grad():
        rivals.assert_equal(block(x, *routed) for block in blocks.values())  # B is zero
    steps = {name: partial(step, block, x, routed, dy) for name, block in blocks.items()}
    met, weights = len(routed[0].unique()), sum(parameter.nbytes for parameter in base.parameters()) / 2**20
    counted = [name for name in steps if name != "PEFT" or how != "eager" or met * weights < 1024]
    columns = {
        "kept MiB": {name: kept(partial(block, x, *routed), block) / 2**20 for name, block in blocks.items()},
        "made MiB": {name: made(steps[name]) / 2**20 for name in counted},
    }
    return Case(steps, columns, note=f"{met} of {experts} experts are met. All their weights have {weights:.1f} MiB.")


def with_peft(base: nn.Module) -> nn.Module:
    """The block in PEFT."""
    holder = nn.ModuleDict({"experts": copy.deepcopy(base)})
    names = [f"experts.{own}" for own in OWN]
    peft.get_peft_model(holder, peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=[], target_parameters=names))
    return holder["experts"]


def with_lora(base: nn.Module) -> nn.Module:
    """The block here."""
    holder = nn.ModuleDict({"experts": copy.deepcopy(base)})
    lora.inject(holder, target_parameters=[f"experts.{own}" for own in OWN], r=R, lora_alpha=2 * R)
    return holder["experts"]


def step(block: nn.Module, x: Tensor, routed: Any, dy: Tensor) -> None:
    """Forward and backward."""
    x.grad = None
    for parameter in block.parameters():
        parameter.grad = None
    block(x, *routed).backward(dy)


if __name__ == "__main__":
    main(__file__, __doc__, cases)
