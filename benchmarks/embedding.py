"""What does LoRA on an embedding cost?

Forward and backward of 2048 ids, vocabulary 32064, 3072 features, r = 16, against the frozen `nn.Embedding`, which
only looks up: there is nothing to differentiate. "made" is all new storage of a step.

    python benchmarks/embedding.py [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import rivals
import torch
from counts import kept, made
from harness import Case, main
from torch import nn

R = 16
# vocabulary, features, ids, dtype
SHAPES = {
    "32064×3072, 2048 ids, float32": (32064, 3072, 2048, torch.float32),
    "32064×3072, 2048 ids, bfloat16": (32064, 3072, 2048, torch.bfloat16),
}


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    scale = 16 if quick else 1
    return {name: partial(case, *(n // scale for n in sizes), dtype) for name, (*sizes, dtype) in SHAPES.items()}


def case(vocabulary: int, features: int, n: int, dtype: torch.dtype) -> Case:
    layers = rivals.layers(nn.Embedding(vocabulary, features, dtype=dtype), R)
    ids, dy = torch.randint(vocabulary, (n,)), torch.randn(n, features, dtype=dtype)
    rivals.assert_equal(layer(ids) for name, layer in layers.items() if name != "frozen")
    steps = {name: partial(rivals.step, layer, ids, dy) for name, layer in layers.items()}
    columns = {
        "made MiB": {name: made(run) / 2**20 for name, run in steps.items()},
        "kept MiB": {name: kept(partial(layer, ids), layer) / 2**20 for name, layer in layers.items()},
    }
    return Case(steps, columns)


if __name__ == "__main__":
    main(__file__, __doc__, cases)
