"""Is every kind of layer right on a device, and does it never wait for it?

Outputs, and gradients of inputs, A, B and magnitudes, of each kind of layer and of a bank, on the device, against the
same layer in float64 on the CPU, where the tests hold it to the dense equation. On a GPU forward and backward also run
while torch refuses to wait (`torch.cuda.set_sync_debug_mode("error")`).

    python benchmarks/on_device.py --device cuda
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import lora

BASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Linear": lambda: (nn.Linear(96, 160), torch.randn(4, 32, 96)),
    "fused q, k, v": lambda: (nn.Linear(96, 192), torch.randn(4, 32, 96)),
    "Embedding": lambda: (nn.Embedding(50, 64), torch.randint(50, (4, 32))),
    "Conv2d, factored": lambda: (nn.Conv2d(8, 16, 3, padding=1), torch.randn(4, 8, 12, 12)),
    "Conv2d": lambda: (nn.Conv2d(8, 16, 3, padding=1), torch.randn(4, 8, 12, 12)),
}
OWN: dict[str, Mapping[str, Any]] = {
    "fused q, k, v": {"splits": {"0": (96, 48, 48)}, "enable_lora": {"0": (True, False, True)}},
    "Conv2d, factored": {"factored": True},
    "Conv2d": {"factored": False},
}
FURTHEST = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}  # from float64, relatively, by rounding


def config_of(name: str, use_dora: bool) -> lora.LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "use_dora": use_dora}
    return lora.LoraConfig(target_modules=["0"], **settings, **OWN.get(name, {}))


def one(name: str, use_dora: bool) -> tuple[nn.Module, Tensor]:
    """A model of one layer with one adapter, and its input."""
    torch.manual_seed(0)
    base, x = BASES[name]()
    model = nn.Sequential(base)
    lora.inject(model, config_of(name, use_dora))
    return model, x


def several(name: str, use_dora: bool) -> tuple[nn.Module, Tensor]:
    """The same with a bank of two adapters."""
    torch.manual_seed(0)
    base, x = BASES[name]()
    model = nn.Sequential(base)
    lora.bank(model, {"a": config_of(name, use_dora), "b": config_of(name, not use_dora)})
    return model, x


def step(model: nn.Module, x: Tensor, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Output and gradients on a device, of a copy of the model in this dtype."""
    model = copy.deepcopy(model).to(device, dtype)
    x = x.to(device, dtype).requires_grad_() if x.is_floating_point() else x.to(device)
    wanted = [p for p in model.parameters() if p.requires_grad] + [x] * x.is_floating_point()
    bank = lora.bank(model) if any(layer.lora_seats for layer in model) else None
    with bank.rows(["a", "b", "a", None]) if bank else nullcontext():
        model(x)  # what is computed once has been
        with no_waiting(device):
            y = model(x)
            gradients = torch.autograd.grad(y, wanted, torch.ones_like(y))
    return [y.detach(), *gradients]


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """A context in which what waits for a GPU is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def furthest(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """For each kind, dtype and way how far it is from float64, relatively, and how far it may be."""
    for name, make, use_dora, (dtype, most) in product(BASES, (one, several), (False, True), FURTHEST.items()):
        model, x = make(name, use_dora)
        model.to(dtype)  # both begin with numbers that this dtype has
        x = x.to(dtype) if x.is_floating_point() else x
        pairs = zip(step(model, x, dtype, device), step(model, x, torch.float64, torch.device("cpu")), strict=True)
        apart = [((ours.cpu().double() - exact).norm() / exact.norm()).item() for ours, exact in pairs]
        words = [name, str(dtype).removeprefix("torch."), *["DoRA"] * use_dora, *["bank"] * (make is several)]
        yield ", ".join(words), max(apart), most


def main(*arguments: str) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args(arguments or None)
    wrong = 0
    for name, apart, most in furthest(torch.device(chosen.device)):
        wrong += not apart <= most
        print(f"{name}: {apart:.1e}{'' if apart <= most else f', MORE THAN {most:.1e}'}", flush=True)
    print(f"{wrong} wrong on {chosen.device}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
