"""How fast is one token through a layer, when text is generated?

576→960, r = 16, without gradients, against `nn.Linear`: with the adapter beside the weight (unmerged), in `eval()`
with a merged weight (loralib writes the base weight, lora keeps a cache beside it), and after `lora.merge`. "The two
products alone" are `nn.Linear` and LoRA's products into memory that is there already, with no layer around them.

    python benchmarks/decode.py [--quick]
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import rivals
import torch
from harness import Case, main
from torch import Tensor, nn

import lora

R = 16
INSTANCES = 8  # built once, two equal layers differ by up to 10 %, by where their weights lie
# in_features, out_features, dtype
SHAPES = {
    "576→960, one token, float32": (576, 960, torch.float32),
    "576→960, one token, bfloat16": (576, 960, torch.bfloat16),
}


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    return {name: partial(case, *sizes) for name, sizes in SHAPES.items()}


def case(i: int, o: int, dtype: torch.dtype) -> Case:
    base = nn.Linear(i, o, bias=False, dtype=dtype)
    layers = rivals.layers(base, R)
    loralib_merged, merged = rivals.with_loralib(base, R), nn.Sequential(rivals.with_lora(base, R))
    loralib_merged.merge_weights = True
    lora.merge(merged)
    layers = {
        "nn.Linear": layers["frozen"],
        "loralib, unmerged": layers["loralib"],
        "PEFT, unmerged": layers["PEFT"],
        "lora, unmerged": layers["lora"],
        "loralib, eval": loralib_merged,
        "lora, eval with its cache": rivals.with_lora(base, R, merge_weights=True),
        "lora, after lora.merge": merged[0],
    }
    x = torch.randn(1, i, dtype=dtype)
    placed = {name: copy.deepcopy(layer) for name, layer in shuffled(layers)}
    for layer in placed.values():
        layer.eval()
        infer(layer, x)  # makes the cache
    variants = {name: partial(infer, placed[name], x) for name in layers}
    variants["the two products alone"] = rivals.bound(variants["nn.Linear"], *products(x, o))
    return Case(variants, instances=INSTANCES)


def shuffled(layers: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """In an order of its own for each instance: which variant has the best place in memory is left to chance."""
    pairs = [*layers.items()]
    return [pairs[n] for n in torch.randperm(len(pairs))]


def products(x: Tensor, out_features: int) -> list[Callable[[], Tensor]]:
    """What one token costs in LoRA's arithmetic, without anything around it."""
    A, B = x.new_ones(R, x.shape[1]), x.new_ones(out_features, R)
    h, y = x.new_empty(1, R), x.new_zeros(1, out_features)
    return [partial(torch.mm, x, A.T, out=h), partial(y.addmm_, h, B.T)]


@torch.no_grad()
def infer(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


if __name__ == "__main__":
    main(__file__, __doc__, cases)
