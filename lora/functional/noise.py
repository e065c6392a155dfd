"""Dropout that is drawn again in the backward pass instead of being remembered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_LEVELS = 256  # one random byte decides on one value
_CACHED = 2**20  # values of noise that stay in a processor's cache while they are used


@dataclass(frozen=True)
class Noise:
    """The dropout of one forward pass over an x of shape (N, features), as the seed that it comes from.

    Attributes:
        dropped: how many of 256 levels of noise drop a value, 1 to 255.
        seed: drawn from torch's default generator, so that manual seeds and activation checkpointing replay it.
    """

    dropped: int
    seed: int

    @staticmethod
    def draw(p: float, x: Tensor) -> Noise | None:
        """Noise of a probability rounded to a multiple of 1/256; None where it would be 0 or 1, or has no replay."""
        dropped = round(p * _LEVELS)
        replays = x.device.type == "cpu" or (x.is_cuda and not torch.cuda.is_current_stream_capturing())
        return (
            Noise(dropped, int(torch.randint(2**62, (), device="cpu"))) if replays and 0 < dropped < _LEVELS else None
        )

    @property
    def rescale(self) -> float:
        """What the values that are kept are multiplied by, for the expectation to be that without dropout."""
        return _LEVELS / (_LEVELS - self.dropped)

    def chunks(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Row by row of x (N, features), in chunks: which rows, and their noise (n, features) in x's dtype.

        The noise is written over by the next chunk, and may be written over by the caller.
        """
        rows, features = x.shape
        pieces = max(1, round(rows * features / _CACHED)) if x.device.type == "cpu" else 1
        step = max(1, -(-rows // pieces))  # of equal size: a small rest would cost as many calls as a whole chunk
        generator = torch.Generator(x.device).manual_seed(self.seed)
        words = torch.empty(min(step, rows), -(-features // 8), dtype=torch.int64, device=x.device)
        noise = x.new_empty(min(step, rows), features)
        for start in range(0, rows, step):
            n = min(step, rows - start)
            # Without bounds the top bit of each word would always be 0.
            bytes_ = words[:n].random_(-(2**63), None, generator=generator).view(torch.uint8)
            yield slice(start, start + n), noise[:n].copy_(bytes_[:, :features])

    def gate(self, x: Tensor, noise: Tensor, out: Tensor) -> Tensor:
        """x where the noise keeps it and 0 elsewhere, without the rescaling; `out` may be `noise` or `x` itself."""
        # One pass, 4 to 8 times faster on a CPU than `where` with a mask: x where noise > threshold, else 0.
        gated: Tensor = torch.ops.aten.threshold_backward.grad_input(x, noise, self.dropped - 1, grad_input=out)
        return gated

    def mask(self, x: Tensor) -> Tensor:
        """The whole mask, (N, features) of 0 and 1 in x's dtype."""
        pieces = [self.gate(torch.ones_like(chunk), chunk, out=chunk).clone() for _, chunk in self.chunks(x)]
        return torch.cat(pieces) if pieces else torch.ones_like(x)
