"""What does LoRA on a linear layer cost beyond the frozen layer, in time and in memory?

Forward and backward with r = 16 and gradients for the input, A and B, against a frozen `nn.Linear` with a gradient
for the input. "Isolated" cases replace the base layer's own products by filling their results with zeros, which
large shapes hide LoRA in: there, read the CPU time beyond the first. "kept" is what autograd keeps for backward,
"made" all new storage of a step, both in sizes of what they are a ratio to. "The six products alone" are the frozen
layer and LoRA's products into memory that is there already, with no dropout and no layer around them.

    python benchmarks/linear.py [--quick]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product

import rivals
import torch
from counts import WithoutBase, memory
from harness import Case, main
from torch import Tensor, nn

F32, BF16 = torch.float32, torch.bfloat16
R = 16
# in_features, out_features, tokens, dtype of the base, dtype of the adapter if it is another
SHAPES = {
    "qkv 3072→9216, 2048 tokens, float32": (3072, 9216, 2048, F32, None),
    "qkv 3072→9216, 2048 tokens, bfloat16": (3072, 9216, 2048, BF16, None),
    "qkv 3072→9216, 2048 tokens, bfloat16, float32 adapter": (3072, 9216, 2048, BF16, F32),
    "down 8192→3072, 2048 tokens, bfloat16": (8192, 3072, 2048, BF16, None),
    "576→960, 512 tokens, float32": (576, 960, 512, F32, None),
    "576→960, 512 tokens, bfloat16": (576, 960, 512, BF16, None),
}
DROPOUTS = (0.0, 0.05)


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    scale = 16 if quick else 1
    found: dict[str, Callable[[], Case]] = {}
    for (name, (i, o, n, dtype, adapter)), p in product(SHAPES.items(), DROPOUTS):
        sizes = i // scale, o // scale, n // scale, dtype, adapter, p
        full = f"{name}, dropout {p:g}" if p else name
        found |= {full: partial(case, *sizes), f"isolated: {full}": partial(case, *sizes, isolated=True)}
    i, o, n, dtype, _ = SHAPES["qkv 3072→9216, 2048 tokens, bfloat16"]
    found["frozen A (LoRA-FA), bfloat16"] = partial(frozen_A, i // scale, o // scale, n // scale, dtype)
    return found


def case(
    i: int, o: int, n: int, dtype: torch.dtype, adapter: torch.dtype | None, dropout: float, isolated: bool = False
) -> Case:
    """One shape in all libraries."""
    layers = rivals.layers(nn.Linear(i, o, bias=False, dtype=dtype), R, dropout, adapter)
    note = "" if "loralib" in layers else "loralib raises an error about the dtypes."
    return against_frozen(layers, i, o, n, dtype, dropout, isolated, note)


def frozen_A(i: int, o: int, n: int, dtype: torch.dtype) -> Case:
    """Only B trains."""
    layers = rivals.layers(nn.Linear(i, o, bias=False, dtype=dtype), R)
    for layer in list(layers.values())[1:]:
        rivals.trainable(layer)[0].requires_grad_(False)
    return against_frozen(layers, i, o, n, dtype, 0.0)


def against_frozen(
    layers: Mapping[str, nn.Module],
    i: int,
    o: int,
    n: int,
    dtype: torch.dtype,
    dropout: float,
    isolated: bool = False,
    note: str = "",
) -> Case:
    x, dy = torch.randn(n, i, dtype=dtype, requires_grad=True), torch.randn(n, o, dtype=dtype)
    if not dropout:
        rivals.assert_equal(layer(x) for name, layer in layers.items() if name != "frozen")
    steps = {name: partial(rivals.step, layer, x, dy) for name, layer in layers.items()}
    columns = memory(steps, layers, x)
    if not dropout and not isolated:
        steps["the six products alone"] = rivals.bound(steps["frozen"], *products(x.detach(), dy))
    if isolated:
        weights = [w for layer in layers.values() for w in layer.parameters() if not w.requires_grad]
        steps = {name: partial(without_base, weights, run) for name, run in steps.items()}
    return Case(steps, columns, note=note, charted=not isolated)


def products(x: Tensor, dy: Tensor) -> list[Callable[[], Tensor]]:
    """LoRA's arithmetic without anything around it, each product in the layout that is fastest here."""
    (n, i), o = x.shape, dy.shape[1]
    A, B, h, Bt = x.new_ones(R, i), x.new_ones(o, R), x.new_empty(n, R), x.new_ones(R, o)
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    dA, dB = torch.empty_like(A), torch.empty_like(Bt)
    return [
        partial(torch.mm, x, A.T, out=h),
        partial(y.addmm_, h, B.T),
        partial(torch.mm, dy, Bt.T, out=h),
        partial(dx.addmm_, h, A),
        partial(torch.mm, h.T, x, out=dA),
        partial(torch.mm, h.T, dy, out=dB),
    ]


def without_base(weights: list[Tensor], run: Callable[[], None]) -> None:
    with WithoutBase(weights):
        run()


if __name__ == "__main__":
    main(__file__, __doc__, cases)
