"""What does DoRA cost beyond LoRA, in time and in memory?

Forward and backward of a linear layer with r = 16, and gradients for the input, A, B and the magnitudes, against a
frozen `nn.Linear` with a gradient for the input. PEFT builds W₀ + s · B A in each forward, for its norm, and with
dropout computes W₀ x twice; lora takes the norm from ‖W₀‖², which it remembers, and small products. "The norm alone" is
‖W₀ + s · B A‖ for each output by itself; "anew" is with ‖W₀‖², as where nothing may be remembered (`torch.compile`).

    python benchmarks/dora.py [--quick]
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product

import peft
import rivals
import torch
from counts import kept, made, memory
from harness import Case, main
from torch import Tensor, nn

import lora

F32, BF16 = torch.float32, torch.bfloat16
R = 16
# in_features, out_features, tokens, dtype of the base, dtype of the adapter if it is another
SHAPES = {
    "4096→4096, 2048 tokens, float32": (4096, 4096, 2048, F32, None),
    "4096→4096, 2048 tokens, bfloat16": (4096, 4096, 2048, BF16, None),
    "4096→4096, 2048 tokens, bfloat16, float32 adapter": (4096, 4096, 2048, BF16, F32),
}
DROPOUTS = (0.0, 0.05)


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    scale = 16 if quick else 1
    found: dict[str, Callable[[], Case]] = {}
    for (name, (i, o, n, dtype, adapter)), p in product(SHAPES.items(), DROPOUTS):
        sizes = i // scale, o // scale, n // scale
        found[f"{name}, dropout {p:g}" if p else name] = partial(step, *sizes, dtype, adapter, p)
    for dtype in (F32, BF16):
        name = f"the norm alone, 4096→4096, {str(dtype).removeprefix('torch.')}"
        found[name] = partial(norm, 4096 // scale, 4096 // scale, dtype)
    return found


def step(i: int, o: int, n: int, dtype: torch.dtype, adapter: torch.dtype | None, dropout: float) -> Case:
    """A step with each library's LoRA and DoRA."""
    base = nn.Linear(i, o, bias=False, dtype=dtype)
    layers = rivals.layers(base, R, dropout, adapter)
    layers.pop("loralib", None)  # it has no DoRA
    layers |= {"PEFT, DoRA": with_peft(base, dropout, adapter), "lora, DoRA": with_lora(base, dropout, adapter)}
    x, dy = torch.randn(n, i, dtype=dtype, requires_grad=True), torch.randn(n, o, dtype=dtype)
    if not dropout:
        rivals.assert_equal(layers[name](x) for name in ("PEFT, DoRA", "lora, DoRA"))
    steps = {name: partial(rivals.step, layer, x, dy) for name, layer in layers.items()}
    mib = {name: kept(partial(layer, x), layer) / 2**20 for name, layer in layers.items()}
    return Case(steps, memory(steps, layers, x) | {"kept MiB": mib})


def norm(i: int, o: int, dtype: torch.dtype) -> Case:
    """‖W₀ + s · B A‖ for each output."""
    base = nn.Linear(i, o, bias=False, dtype=dtype)
    theirs, ours = with_peft(base), with_lora(base)
    ways = {
        "PEFT: W₀ + s · B A built": partial(built, theirs),
        "lora": ours.lora_norms,
        "lora, ‖W₀‖² anew": partial(anew, ours),
    }
    rivals.assert_equal(way().to(F32).to(dtype) for way in ways.values())
    return Case(ways, {"made MiB": {name: made(way) / 2**20 for name, way in ways.items()}})


@torch.no_grad()
def built(layer: nn.Module) -> Tensor:
    """As in the forward of PEFT's layer."""
    dora = layer.lora_magnitude_vector["default"]
    update = dora.get_lora_weight(layer.lora_A["default"], layer.lora_B["default"])
    return dora.get_weight_norm(layer.base_layer.weight, update, layer.scaling["default"])


def anew(layer: lora.LoRALayer) -> Tensor:
    layer._squares = None
    return layer.lora_norms()


def with_peft(base: nn.Module, dropout: float = 0.0, adapter_dtype: torch.dtype | None = None) -> nn.Module:
    holder = nn.ModuleDict({"layer": copy.deepcopy(base)})
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=dropout, target_modules=["layer"], use_dora=True)
    peft.get_peft_model(holder, config, autocast_adapter_dtype=adapter_dtype is not None)
    return same_magnitudes(rivals.same_start(holder["layer"]), base)


def with_lora(base: nn.Module, dropout: float = 0.0, adapter_dtype: torch.dtype | None = None) -> nn.Module:
    return same_magnitudes(rivals.with_lora(base, R, dropout, adapter_dtype, use_dora=True), base)


@torch.no_grad()
def same_magnitudes(layer: nn.Module, base: nn.Module) -> nn.Module:
    """The layer, with the magnitudes that DoRA starts from: before A and B had the values that they have now."""
    *_, magnitude = rivals.trainable(layer)
    magnitude.copy_(torch.linalg.vector_norm(base.weight, dim=1, dtype=F32))
    return layer


if __name__ == "__main__":
    main(__file__, __doc__, cases)
