"""What would a GPU see: how many kernels does each layer launch, how many bytes do they move, and does any wait?

Counted by torch's dispatcher, so that no GPU is needed: an operation that is no view and no mere allocation is a
launch, and moves each tensor that it is given, and each that it makes, once. (A library's product of large matrices
reads more often; all variants' do alike.) A number that is read from a tensor is a wait, on a GPU. Sizes are those of
a few hundred tokens: counts of launches hold for all. r = 16, gradients for the input, A and B.

    python benchmarks/launches.py [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import quantized
import rivals
import torch
from counts import aten
from machine import machine
from merged import merged_lora, merged_loralib
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESULTS = Path(__file__).parent / "results" / "launches.md"
R, F32, BF16 = 16, torch.float32, torch.bfloat16

# They give memory a name, or ask for some, and run nothing.
_NO_LAUNCH = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach}
_WAITS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.is_nonzero, aten.unique_dim, aten._unique2}


class Counts(NamedTuple):
    """What operations of a computation would be on a GPU."""

    launches: int
    megabytes: float
    waits: int


class Launches(TorchDispatchMode):
    """Counts what runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = self.waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        packet = function.overloadpacket
        # What is drawn on the CPU for a seed is so wherever the layer is.
        of_seed = all(tensor.numel() <= 1 and tensor.dtype == torch.int64 for tensor in _tensors((args, output)))
        if of_seed or function.is_view or packet in _NO_LAUNCH:
            return output
        self.waits += packet in _WAITS
        self.launches += 1
        moved = {(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in _tensors((args, kwargs, output))}
        self.bytes += sum(moved.values())
        return output

    def counts(self) -> Counts:
        return Counts(self.launches, self.bytes / 1e6, self.waits)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def count(layer: nn.Module, x: Tensor) -> tuple[Counts, Counts]:
    """Forward and backward of a layer."""
    wanted = [tensor for tensor in (x, *rivals.trainable(layer)) if tensor.requires_grad]
    with Launches() as forward:
        y = layer(x)
    dy = torch.ones_like(y)
    with Launches() as backward:
        torch.autograd.grad(y, wanted, dy)
    return forward.counts(), backward.counts()


# ---- the layers ------------------------------------------------------------------------------------------------------


def cases(quick: bool) -> dict[str, Callable[[], tuple[Mapping[str, nn.Module], Tensor]]]:
    scale = 8 if quick else 1
    small, large, n = 512 // scale, 1024 // scale, 256 // scale
    found: dict[str, Callable[[], tuple[Mapping[str, nn.Module], Tensor]]] = {}
    for dropout in (0.0, 0.05):
        words = f", dropout {dropout:g}" if dropout else ""
        found[f"Linear, float32{words}"] = partial(linear, small, large, n, F32, None, dropout)
        found[f"Linear, bfloat16{words}"] = partial(linear, small, large, n, BF16, None, dropout)
        found[f"Linear, bfloat16, float32 adapter{words}"] = partial(linear, small, large, n, BF16, F32, dropout)
        found[f"fused q, k, v: q and v, float32{words}"] = partial(fused, small, n, dropout)
        found[f"NF4, float32{words}"] = partial(quantised, small, large, n, F32, dropout)
        found[f"NF4, bfloat16, float32 adapter{words}"] = partial(quantised, small, large, n, BF16, dropout)
    found["Linear with DoRA, float32"] = partial(dora, small, large, n)
    found["Embedding, float32"] = partial(embedding, large, small, n)
    found["Conv2d, kernel 3, float32"] = partial(convolution, 64 // scale, 16)
    return found


def linear(i: int, o: int, n: int, dtype: torch.dtype, adapter: torch.dtype | None, dropout: float) -> Any:
    base = nn.Linear(i, o, bias=False, dtype=dtype)
    return rivals.layers(base, R, dropout, adapter), torch.randn(n, i, dtype=dtype, requires_grad=True)


def quantised(i: int, o: int, n: int, dtype: torch.dtype, dropout: float) -> Any:
    return quantized.layers(i, o, dtype, F32, dropout), torch.randn(n, i, dtype=dtype, requires_grad=True)


def fused(i: int, n: int, dropout: float) -> Any:
    base, splits, enabled = nn.Linear(i, 3 * i, bias=False).requires_grad_(False), (i,) * 3, (1, 0, 1)
    layers = {"frozen": base, "loralib": merged_loralib(base, enabled, dropout)}
    return layers | {"lora": merged_lora(base, splits, enabled, dropout)}, torch.randn(n, i, requires_grad=True)


def dora(i: int, o: int, n: int) -> Any:
    base = nn.Linear(i, o, bias=False)
    layers = {"frozen": rivals.layers(base, R)["frozen"], "PEFT": rivals.with_peft(base, R, use_dora=True)}
    return layers | {"lora": rivals.with_lora(base, R, use_dora=True)}, torch.randn(n, i, requires_grad=True)


def embedding(words: int, features: int, n: int) -> Any:
    layers = rivals.layers(nn.Embedding(words, features), R)
    del layers["frozen"]  # it has no gradient
    return layers, torch.randint(words, (n,))


def convolution(channels: int, size: int) -> Any:
    layers = rivals.layers(nn.Conv2d(channels, channels, 3, padding=1, bias=False), 4)
    layers["lora, factored"] = layers.pop("lora")
    base = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    layers["lora, as loralib"] = rivals.with_lora(base, 4, factored=False)
    return layers, torch.randn(2, channels, size, size, requires_grad=True)


# ---- what was counted ------------------------------------------------------------------------------------------------


def measured(quick: bool) -> dict[str, dict[str, tuple[Counts, Counts]]]:
    """Forward and backward of each layer of each case."""
    found = {}
    for name, make in cases(quick).items():
        layers, x = make()
        found[name] = {}
        for library, layer in layers.items():
            count(layer, x)  # what is done once, such as norms that are kept, is done
            found[name][library] = count(layer, x)
    return found


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at an eighth of the sizes: whether it runs")
    parser.add_argument("--out", type=Path, default=None, help="the file to write (default: in results/, if not quick)")
    chosen = parser.parse_args(arguments or None)
    assert __doc__ is not None
    lines = ["# launches", "", *__doc__.strip().splitlines(), ""]
    lines.append("| layer | variant | launches forward | backward | MB moved forward | backward | waits |")
    lines.append("|---|---|---|---|---|---|---|")
    for name, libraries in measured(chosen.quick).items():
        for library, (forward, backward) in libraries.items():
            launches = f"{forward.launches} | {backward.launches}"
            moved = f"{forward.megabytes:.2f} | {backward.megabytes:.2f}"
            lines.append(f"| {name} | {library} | {launches} | {moved} | {forward.waits + backward.waits} |")
    lines += ["", "## Counted on", "", *(f"- {key}: {value}" for key, value in machine().items())]
    print("\n".join(lines))
    out = chosen.out or (None if chosen.quick else RESULTS)
    if out is not None:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
