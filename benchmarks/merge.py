"""How long does folding an adapter into its weight take?

9216×3072, r = 16, against one product added in place, `W.addmm_(B, A)`, which is the least that it takes.
`lora.merge` also checks that the result is finite, sums in float32 and measures what rounding loses; loralib's
`eval()` and PEFT's `merge()` add B A in the weight's dtype.

    python benchmarks/merge.py [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import loralib
import rivals
import torch
from harness import Case, main
from torch import nn

import lora

R = 16
# out_features, in_features, dtype
SHAPES = {
    "9216×3072, float32": (9216, 3072, torch.float32),
    "9216×3072, bfloat16": (9216, 3072, torch.bfloat16),
}


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    scale = 16 if quick else 1
    return {name: partial(case, o // scale, i // scale, dtype) for name, (o, i, dtype) in SHAPES.items()}


def case(o: int, i: int, dtype: torch.dtype) -> Case:
    base = nn.Linear(i, o, bias=False, dtype=dtype)
    theirs, peft_layer = rivals.with_loralib(base, R), rivals.with_peft(base, R)
    fused = loralib.MergedLinear(i, o, r=R, enable_lora=[True] * 3, bias=False, dtype=dtype)
    rivals.same_start(fused)
    theirs.merge_weights = True
    plain, ours = Adapted(base), Adapted(base, splits={"layer": (o // 3,) * 3})
    weight, A, B = rivals.with_lora(base, R).requires_grad_(False).parameters()
    return Case(
        {
            "addmm_": lambda: weight.addmm_(B, A, alpha=2),
            "loralib, Linear": theirs.eval,
            "loralib, MergedLinear": fused.eval,
            "PEFT, Linear": peft_layer.merge,
            "lora, Linear": plain.merge,
            "lora, MergedLinear": ours.merge,
        },
        setups={
            "loralib, Linear": theirs.train,
            "loralib, MergedLinear": fused.train,
            "PEFT, Linear": lambda: peft_layer.unmerge() if peft_layer.merged else None,
            "lora, Linear": plain.prepare,
            "lora, MergedLinear": ours.prepare,
        },
    )


class Adapted:
    """A layer to be merged again and again: after each time it is adapted anew."""

    def __init__(self, base: nn.Linear, **settings: object) -> None:
        self.base, self.settings = base, settings
        self.layer = base

    def prepare(self) -> None:
        self.layer = rivals.with_lora(self.base, R, **self.settings)

    def merge(self) -> None:
        lora.merge(self.layer)


if __name__ == "__main__":
    main(__file__, __doc__, cases)
