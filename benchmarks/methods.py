"""Which method learns most in the same number of steps, and in how much memory? (methods_time.py: in how much time.)

SmolLM2-135M-Instruct in Phi-3's class learns to chat, as in examples/phi3_chat.py: the same rows in the same order for
every method, AdamW with a cosine schedule, no dropout, float32. Measured is the loss per token of conversations that
are held out. Each method, seed and learning rate has a process of its own; a seed sets the order of the data and how
the adapter starts, never which conversations are held out. What has been run and is in the results is not run again.

    python benchmarks/methods.py [--steps 40] [--seeds 0 1] [--methods LoRA DoRA] [--lrs 0.5 1 2] [--quick]

`--lrs` tries these multiples of each method's learning rate, and the table has the one with the lowest loss.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import chatting
import torch
from machine import machine, peak_mib
from methods_table import write
from torch import nn

import lora

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # which are no package
import phi3_chat
from phi3 import chats, loop, quantizing, starting

RESULTS = Path(__file__).parent / "results"
EVALUATIONS = 4  # after the start


@dataclass(frozen=True)
class Method:
    """What of the example's settings makes it this method, and its learning rate."""

    lr: float
    training: Mapping[str, Any] = field(default_factory=dict)
    peft: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    adapts: bool = True


# LoRA has r = 16 and a scaling of 2; so have all others, but for what is said here.
METHODS = {
    "LoRA": Method(1e-3),
    "rsLoRA, r=64": Method(5e-4, peft={"use_rslora": True, "r": 64, "lora_alpha": 16.0}),  # 16 / √64 = 2, too
    "DoRA": Method(1e-3, peft={"use_dora": True}),
    "LoRA+": Method(4e-4, training={"lr_ratio": 16.0}),
    "PiSSA": Method(2e-4, peft={"init_lora_weights": "pissa", "lora_alpha": 16.0}),  # a scaling of 1, as in its paper
    "EVA": Method(1e-3, peft={"init_lora_weights": "eva"}),
    "LoRA-FA": Method(2e-3, peft={"freeze_A": True}),
    "QLoRA, nf4": Method(1e-3, run={"quantize": "nf4"}),
    "QLoRA, nf4, LoftQ": Method(1e-3, peft={"init_lora_weights": "loftq"}, run={"quantize": "nf4"}),
    "full fine-tuning": Method(1e-4, adapts=False),
}


@dataclass(frozen=True, kw_only=True)
class Plan(chatting.Course):
    """One run; everything that its losses depend on."""

    method: str


def plans(chosen: argparse.Namespace) -> list[Plan]:
    """Every method once with the first seed, then with the next."""
    order = product(chosen.seeds, chosen.methods, chosen.lrs)
    return [plan_of(name, seed, factor, chosen.steps, chosen.rows) for seed, name, factor in order]


def plan_of(name: str, seed: int, factor: float, steps: int, rows: int) -> Plan:
    """The plan of one method, whose learning rate is multiplied by `factor`."""
    method = METHODS[name]
    changed = {"training": dict(method.training), "peft": dict(method.peft), "run": dict(method.run)}
    return Plan(seed, method.lr * factor, steps, rows, changed, method=name)


def run(plan: Plan, toy: Path | None = None) -> dict[str, Any]:
    """Train by one method; a toy on a few lines if there is a folder with them."""
    start = time.perf_counter()
    model, optimizer, data, training = set_up(plan, toy)
    setup = time.perf_counter() - start
    reset_peak()
    return {"setup seconds": setup, **train(model, optimizer, data, training), **sizes(model), "peak MiB": peak_mib()}


def set_up(plan: Plan, toy: Path | None = None) -> tuple[nn.Module, torch.optim.Optimizer, chats.Chats, dict[str, Any]]:
    """Model, optimizer, data and settings of a plan, before the first step."""
    model, data, training, peft, general = chatting.load(plan, toy)
    originals = quantizing.quantize(model, general["quantize"], peft)
    if METHODS[plan.method].adapts:
        phi3_chat.inject(model, peft)
        starting.start(model, peft, data, originals)
        optimizer = loop.make_optimizer(model, training)
    else:
        optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), weight_decay=0.0, fused=True)
    return model, optimizer, data, training


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: chats.Chats, training: dict[str, Any]
) -> dict[str, Any]:
    """Losses held out, by the step after which they were measured."""
    total = training["max_steps"]
    between = max(1, total // EVALUATIONS)
    held_out = {0: loop.held_out_loss(model, data.held_out)}
    for step in chatting.steps(model, optimizer, data, training):
        if step % between == 0 or step == total:
            held_out[step] = loop.held_out_loss(model, data.held_out)
    return {"held out": held_out}


def sizes(model: nn.Module) -> dict[str, Any]:
    """How many parameters train, and how large the file is that holds what they learnt."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    size = sum(parameter.nbytes for parameter in trained)
    if any(isinstance(module, lora.LoRALayer) for module in model.modules()):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            lora.save_adapter(model, path)
            size = path.stat().st_size
    return {"trained parameters": sum(parameter.numel() for parameter in trained), "saved MB": size / 1e6}


def reset_peak() -> None:
    """Forget the memory that loading the model and preparing took, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def apart(plan: Plan) -> dict[str, Any]:
    """The same in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run, plan).result()


def measure(wanted: Sequence[Plan], out: Path | None, toy: Path | None) -> list[str]:
    """Run what is not in the results yet; write them after each run. Returns the names of the plans that failed."""
    path = out / "methods.json" if out else None
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path and path.exists() else []
    about, failed = machine(), []
    for number, plan in enumerate(wanted, 1):
        name = f"{plan.method}, seed {plan.seed}, learning rate {plan.lr:g}"
        if any(done["plan"] == asdict(plan) for done in runs):
            print(f"[{number}/{len(wanted)}] {name}: done before", flush=True)
            continue
        try:
            result = run(plan, toy) if toy else apart(plan)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        runs.append(json.loads(json.dumps({"plan": asdict(plan), "result": result})))
        print(f"[{number}/{len(wanted)}] {name}: {list(result['held out'].values())}", flush=True)
        if path:
            save(path, {"machine": about, "runs": runs})
    ours = [done for done in runs if (done["plan"]["steps"], done["plan"]["rows"]) == (wanted[0].steps, wanted[0].rows)]
    if ours:
        seeds = sorted({done["plan"]["seed"] for done in ours})
        numbers = f"--steps {wanted[0].steps} --rows {wanted[0].rows} --seeds {' '.join(map(str, seeds))}"
        about["command"] = f"python benchmarks/methods.py {numbers}"
        write(out, __doc__, about, ours, list(METHODS))
    return failed


def save(path: Path, content: dict[str, Any]) -> None:
    """Write JSON beside `path` and rename it: a kill leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main(*argv: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps of a toy: whether it runs, not how well")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 40; 2 when quick)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1.0], metavar="TIMES")
    parser.add_argument("--rows", type=int, default=4, help="rows of 256 tokens in a step (default: 4)")
    parser.add_argument("--out", type=Path, help="folder for methods.json, .md and .png (default: results)")
    chosen = parser.parse_args(argv or None)
    chosen.steps = chosen.steps or (2 if chosen.quick else 40)
    out = chosen.out or (None if chosen.quick else RESULTS)
    with tempfile.TemporaryDirectory() as folder:
        failed = measure(plans(chosen), out, chatting.toy_folder(Path(folder)) if chosen.quick else None)
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
