"""What does LoRA on a convolution cost beyond the frozen layer, factored and written out?

Forward and backward of a 3×3 convolution with r = 4, against a frozen `nn.Conv2d` with a gradient for the input.
loralib writes B A out as a second kernel; PEFT and `factored=True` convolve twice, with r channels in between.
"The factored products alone" are the frozen layer and those convolutions, with no layer around them.

    python benchmarks/conv.py [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import rivals
import torch
from counts import flops, kept
from harness import Case, main
from torch import Tensor, nn

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
    products = narrow(layers["lora, factored"], x.detach(), dy)
    arithmetic = {name: flops(run) for name, run in steps.items()}
    columns = {
        "FLOPs / frozen": {name: count / arithmetic["frozen"] for name, count in arithmetic.items()},
        "kept / x": {name: kept(partial(layer, x), layer) / x.nbytes for name, layer in layers.items()},
    }
    steps["the factored products alone"] = rivals.bound(steps["frozen"], *products)
    return Case(steps, columns)


def narrow(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Callable[[], object]]:
    """The arithmetic of `factored=True` without anything around it: convolutions of r channels, and products."""
    A, B = layer.lora_A.detach(), layer.lora_B.detach().flatten(1)  # (r, channels, 3, 3), (channels, r)
    h = torch.conv2d(x, A, padding=1)
    y, dh, rows = torch.zeros_like(dy).flatten(2), torch.empty_like(h.flatten(2)), dy.flatten(2)
    geometry = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    return [
        partial(torch.conv2d, x, A, padding=1),
        partial(y.baddbmm_, B.expand(len(y), -1, -1), h.flatten(2)),
        partial(torch.bmm, h.flatten(2), rows.mT),
        partial(torch.bmm, B.T.expand(len(y), -1, -1), rows, out=dh),
        partial(torch.ops.aten.convolution_backward, h, x, A, [R], *geometry, [True, True, False]),
    ]


if __name__ == "__main__":
    main(__file__, __doc__, cases)
