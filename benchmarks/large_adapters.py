"""How does the cost of a whole model grow with its number of modules?

A mixture of experts as separate layers: blocks of 64 experts with three `nn.Linear(64, 64, bias=False)` each, at r = 8.
18,432 of them (96 blocks) take 600 MB with what they are compared with. CPU seconds of one process, for a part of the
blocks, for twice as many, and for all; and CPU milliseconds for each module, which stay alike where the cost is linear.

    python benchmarks/large_adapters.py [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine
from torch import nn

import lora
from lora.__main__ import main as command

EXPERTS, WIDTH, R = 64, 64, 8


def model(blocks: int, experts: int) -> nn.Module:
    """Its layers, without a forward, which is not asked for."""
    names = ("gate_proj", "up_proj", "down_proj")
    made = [
        nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in names}) for _ in range(experts)
        )
        for _ in range(blocks)
    ]
    return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"experts": block}) for block in made)})


def steps(blocks: int, experts: int, folder: Path) -> dict[str, Callable[[], object]]:
    """What is measured, in this order."""
    torch.manual_seed(0)
    base = model(blocks, experts)
    ours, theirs, report = str(folder / "adapter.safetensors"), str(folder / "peft"), list[object]()
    targets = ["gate_proj", "up_proj", "down_proj"]

    def disabled() -> None:
        with lora.disabled(base):
            pass

    def inspect() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert command(["inspect", ours]) == 0

    return {
        "inject": lambda: report.append(lora.inject(base, target_modules=targets, r=R)),
        "print the report": lambda: str(report[0]),
        "param_groups": lambda: lora.param_groups(base, lr=1e-4),
        "disabled": disabled,
        "save_adapter": lambda: lora.save_adapter(base, ours),
        "load_adapter, adapted": lambda: lora.load_adapter(base, ours),
        "read_adapter": lambda: lora.read_adapter(ours),
        "inspect": inspect,
        "save_adapter, PEFT": lambda: lora.save_adapter(base, theirs, format="peft"),
        "load_adapter, PEFT": lambda: lora.load_adapter(base, theirs),
        "eject": lambda: lora.eject(base),
        "load_adapter, plain": lambda: lora.load_adapter(base, ours),
        "merged_state_dict": lambda: lora.merged_state_dict(base),
        "merge": lambda: lora.merge(base),
    }


def measure(blocks: int, experts: int) -> dict[str, float]:
    """CPU seconds of each step."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, step in steps(blocks, experts, Path(folder)).items():
            start = time.process_time()
            step()
            seconds[name] = time.process_time() - start
    return seconds


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at a few modules: whether it runs, not how fast")
    chosen = parser.parse_args(arguments or None)
    experts = 2 if chosen.quick else EXPERTS
    sizes = (1, 2, 4) if chosen.quick else (24, 48, 96)
    measured = {blocks * experts * 3: measure(blocks, experts) for blocks in sizes}
    print(" ".join(f"{key}: {value}." for key, value in machine().items()))
    print(f"\n| CPU s (ms for each module) | {' | '.join(f'{n:,}' for n in measured)} |\n|---|{'---|' * len(measured)}")
    for name in next(iter(measured.values())):
        cells = (f"{times[name]:.2f} ({1000 * times[name] / n:.3f})" for n, times in measured.items())
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
