"""What does LoRA on a fused projection (query, key and value in one) cost beyond the frozen layer?

Forward and backward with r = 16 for each enabled split, against a frozen `nn.Linear` with a gradient for the input.
loralib knows equal splits alone, and PEFT no splits at all: with a rank of its own for each part it takes three layers,
which the last cases compare.

    python benchmarks/merged.py [--quick]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import loralib
import rivals
import torch
from counts import flops, kept
from harness import Case, main
from torch import Tensor, nn
from torch.utils._pytree import tree_map

F32, BF16 = torch.float32, torch.bfloat16
R = 16
# in_features, splits, which of them are enabled, tokens, dtype, dropout
SHAPES = {
    "3072→3·3072, q, k and v, 2048 tokens, float32": (3072, (3072,) * 3, (1, 1, 1), 2048, F32, 0.0),
    "3072→3·3072, q, k and v, 2048 tokens, float32, dropout 0.05": (3072, (3072,) * 3, (1, 1, 1), 2048, F32, 0.05),
    "3072→3·3072, q and v, 2048 tokens, float32": (3072, (3072,) * 3, (1, 0, 1), 2048, F32, 0.0),
    "3072→3·3072, q, k and v, 2048 tokens, bfloat16": (3072, (3072,) * 3, (1, 1, 1), 2048, BF16, 0.0),
    "4096→4096+1024+1024, q, k and v, 2048 tokens, bfloat16": (4096, (4096, 1024, 1024), (1, 1, 1), 2048, BF16, 0.0),
    "576→576+192+192, q, k and v, 512 tokens, float32": (576, (576, 192, 192), (1, 1, 1), 512, F32, 0.0),
}
THREE = {
    "q, k and v as three layers or one, 3072→3·3072, 2048 tokens, bfloat16": (3072, (3072,) * 3, 2048, BF16, 0.0),
    "q, k and v as three layers or one, 3072→3·3072, 2048 tokens, bfloat16, dropout 0.05": (
        3072,
        (3072,) * 3,
        2048,
        BF16,
        0.05,
    ),
}


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    scale = 16 if quick else 1
    found = {}
    for name, (i, splits, enabled, n, dtype, p) in SHAPES.items():
        sizes = i // scale, tuple(size // scale for size in splits)
        found[name] = partial(fused, *sizes, enabled, n // scale, dtype, p)
    for name, (i, splits, n, dtype, p) in THREE.items():
        sizes = i // scale, tuple(size // scale for size in splits)
        found[name] = partial(three_or_one, *sizes, n // scale, dtype, p)
    return found


def fused(i: int, splits: Sequence[int], enabled: Sequence[int], n: int, dtype: torch.dtype, dropout: float) -> Case:
    """One fused projection."""
    base = nn.Linear(i, sum(splits), bias=False, dtype=dtype)
    layers = {"frozen": base.requires_grad_(False)}
    if len(set(splits)) == 1:
        layers["loralib"] = merged_loralib(base, enabled, dropout)
    layers["lora"] = merged_lora(base, splits, enabled, dropout)
    x = torch.randn(n, i, dtype=dtype, requires_grad=True)
    if not dropout:
        rivals.assert_equal(layer(x) for name, layer in layers.items() if name != "frozen")
    return against_frozen(layers, x)


def three_or_one(i: int, splits: Sequence[int], n: int, dtype: torch.dtype, dropout: float) -> Case:
    """Three projections of one x, or one that lora has fused."""
    bases = [nn.Linear(i, size, bias=False, dtype=dtype) for size in splits]
    fused_base = nn.Linear(i, sum(splits), bias=False, dtype=dtype)
    fused_base.load_state_dict({"weight": torch.cat([base.weight for base in bases])})
    threes = [rivals.layers(base, R, dropout) for base in bases]
    layers = {name: SideBySide([three[name] for three in threes]) for name in threes[0]}
    layers["lora, MergedLinear"] = merged_lora(fused_base, splits, (1, 1, 1), dropout)
    return against_frozen(layers, torch.randn(n, i, dtype=dtype, requires_grad=True))


class SideBySide(nn.Module):
    """Layers of one input."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self.parts]


def merged_loralib(base: nn.Linear, enabled: Sequence[int], dropout: float) -> nn.Module:
    options = {"r": R, "lora_alpha": 2 * R, "lora_dropout": dropout, "enable_lora": [bool(on) for on in enabled]}
    layer = loralib.MergedLinear(base.in_features, base.out_features, bias=False, dtype=base.weight.dtype, **options)
    layer.load_state_dict(base.state_dict(), strict=False)
    return rivals.same_start(layer)


def merged_lora(base: nn.Linear, splits: Sequence[int], enabled: Sequence[int], dropout: float) -> nn.Module:
    return rivals.with_lora(base, R, dropout, splits={"layer": splits}, enable_lora={"layer": enabled})


def against_frozen(layers: Mapping[str, nn.Module], x: Tensor) -> Case:
    gradients = {name: tree_map(torch.randn_like, layer(x)) for name, layer in layers.items()}
    steps = {name: partial(rivals.step, layer, x, gradients[name]) for name, layer in layers.items()}
    arithmetic = {name: flops(run) for name, run in steps.items()}
    columns = {
        "FLOPs / frozen": {name: count / arithmetic["frozen"] for name, count in arithmetic.items()},
        "kept / x": {name: kept(partial(layer, x), layer) / x.nbytes for name, layer in layers.items()},
    }
    return Case(steps, columns)


if __name__ == "__main__":
    main(__file__, __doc__, cases)
