"""What does LoRA on a convolution cost beyond the frozen layer, factored and written out?

Forward and backward of a 3×3 convolution with r = 4, against a frozen `nn.Conv2d` with a gradient for the input.
loralib writes B A out as a second kernel; PEFT and `factored=True` convolve twice, with r channels in between.

    python benchmarks/conv.py [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import rivals
import torch
from counts import flops, kept
from harness import Case, main
from torch import nn

R = 4
# channels in and out, height and width, batch, dtype
SHAPES = {
    "256→256 at 32², batch of 4, float32": (256, 32, 4, torch.float32),
    "64→64 at 64², batch of 4, float32": (64, 64, 4, torch.float32),
    "256→256 at 32², batch of 4, bfloat16": (256, 32, 4, torch.bfloat16),
}


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    scale = 4 if quick else 1
    return {
        name: partial(case, channels // scale, size // scale, batch, dtype)
        for name, (channels, size, batch, dtype) in SHAPES.items()
    }


def case(channels: int, size: int, batch: int, dtype: torch.dtype) -> Case:
    base = nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=dtype)
    layers = rivals.layers(base, R)
    layers["lora, factored"] = layers.pop("lora")
    layers["lora, as loralib"] = rivals.with_lora(base, R, factored=False)
    x = torch.randn(batch, channels, size, size, dtype=dtype, requires_grad=True)
    dy = torch.randn(batch, channels, size, size, dtype=dtype)
    rivals.assert_equal(layers[name](x) for name in ("PEFT", "lora, factored"))
    rivals.assert_equal(layers[name](x) for name in ("loralib", "lora, as loralib"))
    steps = {name: partial(rivals.step, layer, x, dy) for name, layer in layers.items()}
    arithmetic = {name: flops(run) for name, run in steps.items()}
    columns = {
        "FLOPs / frozen": {name: count / arithmetic["frozen"] for name, count in arithmetic.items()},
        "kept / x": {name: kept(partial(layer, x), layer) / x.nbytes for name, layer in layers.items()},
    }
    return Case(steps, columns)


if __name__ == "__main__":
    main(__file__, __doc__, cases)
