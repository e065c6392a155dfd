"""What does LoRA on a gated MLP cost beyond the frozen MLP, layer by layer and as one function?

Llama's and Phi-3's MLP, gate and up in one linear layer, SiLU, and down, with r = 16 on both layers: forward and
backward with gradients for the input, A and B, against the frozen MLP with a gradient for the input. "lora, one
function" is `lora.functional.lora_swiglu`, which computes the activation again in backward.

    python benchmarks/swiglu.py [--quick]
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product

import rivals
import torch
import torch.nn.functional as F
from counts import memory
from harness import Case, main
from torch import Tensor, nn

from lora.functional import lora_swiglu

R = 16
# hidden, intermediate, tokens, dtype
SHAPES = {
    "3072→8192, 2048 tokens, bfloat16": (3072, 8192, 2048, torch.bfloat16),
    "576→1536, 1024 tokens, float32": (576, 1536, 1024, torch.float32),
    "576→1536, 1024 tokens, bfloat16": (576, 1536, 1024, torch.bfloat16),
}


class MLP(nn.Module):
    """The MLP as transformers has it."""

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False, dtype=dtype)
        self.down = nn.Linear(intermediate, hidden, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class FusedMLP(MLP):
    """The same in one function."""

    def forward(self, x: Tensor) -> Tensor:
        return lora_swiglu(x, self.gate_up.lora_adapted(), self.down.lora_adapted())


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    scale = 16 if quick else 1
    return {
        f"{name}, dropout {p:g}" if p else name: partial(case, i // scale, o // scale, n // scale, dtype, p)
        for (name, (i, o, n, dtype)), p in product(SHAPES.items(), (0.0, 0.05))
    }


def case(hidden: int, intermediate: int, n: int, dtype: torch.dtype, dropout: float) -> Case:
    frozen = MLP(hidden, intermediate, dtype).requires_grad_(False)
    mlps: dict[str, nn.Module] = {"frozen": frozen}
    makers = {"loralib": rivals.with_loralib, "PEFT": rivals.with_peft, "lora": rivals.with_lora}
    for name, make in makers.items():
        mlps[name] = copy.deepcopy(frozen)
        for own, layer in frozen.named_children():
            setattr(mlps[name], own, make(layer, R, dropout))
    mlps["lora, one function"] = copy.deepcopy(mlps["lora"])
    mlps["lora, one function"].__class__ = FusedMLP
    x, dy = torch.randn(n, hidden, dtype=dtype, requires_grad=True), torch.randn(n, hidden, dtype=dtype)
    if not dropout:
        rivals.assert_equal(mlp(x) for name, mlp in mlps.items() if name != "frozen")
    steps = {name: partial(rivals.step, mlp, x, dy) for name, mlp in mlps.items()}
    return Case(steps, memory(steps, mlps, x))


if __name__ == "__main__":
    main(__file__, __doc__, cases)
