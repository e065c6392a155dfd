"""What to choose: which learning rate, rank, layers and method learn most from the same examples?

SmolLM2-135M-Instruct in Phi-3's class learns to add and to subtract numbers of two digits, as reasoning-gym sets such
problems ("71 - 26 =", " 45"): AdamW with a cosine schedule, no dropout, float32, the same number of steps for all.
Each choice is compared at its best learning rate, by the loss on problems that neither train nor test: from a first
guess the search goes on in half decades until both neighbours of the best are worse with the first seed; then the best
is run with all. A seed sets how the adapter starts and which problems train, never which test.

Measured is the exact match on held-out problems (greedy decoding gives the answer and ends), their loss per token, and
what has been forgotten: by how much the loss on prose has risen, which nothing here trains.

    pip install -e ".[study]"
    python benchmarks/methods.py [--steps 120] [--seeds 0 1 2] [--only "r = 16" DoRA] [--quick]

What has been run and is in the results is not run again. methods_time.py has the time of a step, and its memory.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import problems
import torch
import torch.nn.functional as F
from kept import Runs, search
from methods_table import BEFORE, FULL, write
from torch import nn

import lora

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # which are no package
from phi3 import loop, pretrained, quantizing

RESULTS = Path(__file__).parent / "results"
ROWS = 8  # problems in a step
MAX_GRAD_NORM = 1.0
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "learning_rate": 1.0}
TARGETS = {
    "attention": ["qkv_proj", "o_proj"],
    "MLP": ["gate_up_proj", "down_proj"],
    "all": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Choice:
    """What is chosen but for the learning rate, and the number of the rate with which the search for that begins."""

    rate: int  # as rate_of has it: -6 is 1e-3
    config: Mapping[str, Any] = field(default_factory=dict)  # of the adapter, where it differs from PLAIN
    lr_ratio: float = 1.0
    quantize: str | None = None
    adapts: bool = True


PLAIN = {"r": 16, "lora_alpha": 32.0, "target_modules": TARGETS["all"]}
# lora_alpha is the same at all ranks: so, it is said, is the best learning rate.
LORA = {
    f"LoRA, r = {r}, {where}": Choice(-6, {"r": r, "target_modules": TARGETS[where]})
    for r in (16, 1, 256)
    for where in ("all", "MLP", "attention")
}
METHODS = {
    "rsLoRA, r = 64": Choice(-7, {"use_rslora": True, "r": 64, "lora_alpha": 16.0}),  # 16 / √64 = 2, as PLAIN's
    "DoRA": Choice(-6, {"use_dora": True}),
    "LoRA+": Choice(-7, lr_ratio=16.0),
    "PiSSA": Choice(-7, {"init_lora_weights": "pissa", "lora_alpha": 16.0}),  # a scaling of 1, as in its paper
    "EVA": Choice(-6, {"init_lora_weights": "eva"}),
    "LoRA-FA": Choice(-5, {"freeze_A": True}),
    "QLoRA, nf4": Choice(-6, quantize="nf4"),
    "QLoRA, nf4, LoftQ": Choice(-6, {"init_lora_weights": "loftq"}, quantize="nf4"),
}
CHOICES = {BEFORE: Choice(0, adapts=False), FULL: Choice(-8, adapts=False), **LORA, **METHODS}


def rate_of(number: int) -> float:
    """The learning rate of a number, two for each power of ten: -6 is 1e-3, -5 is 3e-3, -4 is 1e-2."""
    return float(f"{(1, 3)[number % 2]}e{number // 2}")


@dataclass(frozen=True)
class Plan:
    """One run; everything that its result depends on."""

    choice: str
    rate: float
    seed: int
    steps: int


def run(plan: Plan, quick: bool = False) -> dict[str, Any]:
    """Train a copy of the pretrained model as planned, and ask it."""
    world = problems.toy() if quick else problems.world()
    lesson = world.lesson(plan.seed, plan.steps * ROWS)
    batches = [problems.batch_of(lesson[first : first + ROWS]) for first in range(0, len(lesson), ROWS)]
    torch.manual_seed(plan.seed)
    model = copy.deepcopy(world.model)
    optimizer = set_up(model, CHOICES[plan.choice], plan.rate, batches)
    for step, batch in enumerate(batches):
        train_step(model, optimizer, batch, loop.learning_rate_at(step, plan.steps, SCHEDULE))
    test = problems.scores(model, world.test)
    return {
        "exact": test.exact,
        "loss": test.loss,
        "validation": problems.scores(model, world.validation).loss,
        "prose": problems.loss_on(model, world.prose),
        "trained parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }


def set_up(model: nn.Module, choice: Choice, rate: float, batches: Sequence[Any] = ()) -> torch.optim.Optimizer:
    """Let what is chosen of a model train; some starts look at the first batches."""
    if not choice.adapts:
        return torch.optim.AdamW(model.requires_grad_(True).parameters(), rate, weight_decay=0.0, fused=True)
    config = PLAIN | {"splits": pretrained.fused_splits(model.config, PLAIN["target_modules"])} | choice.config
    config["splits"] = {name: parts for name, parts in config["splits"].items() if name in config["target_modules"]}
    start = config.get("init_lora_weights", True)
    originals = quantizing.quantize(model, choice.quantize, {"modules_to_save": None, "init_lora_weights": start})
    lora.inject(model, lora.LoraConfig(**config | ({"init_lora_weights": True} if start == "loftq" else {})))
    if start == "eva":
        lora.calibrate(model, [{"input_ids": ids, "labels": labels} for ids, labels in batches[:4]], ignore_index=None)
    elif start == "loftq":
        lora.loftq(model, originals, 5)
    return torch.optim.AdamW(lora.param_groups(model, rate, choice.lr_ratio), fused=True)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, times: float) -> None:
    """One step, at so many times each group's learning rate."""
    logits, words, _ = problems.predictions(model, *batch)
    F.cross_entropy(logits, words).backward()
    groups = optimizer.param_groups
    nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group["params"]], MAX_GRAD_NORM)
    for group in groups:
        group["lr"] = times * group.setdefault("peak", group["lr"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def fill(runs: Runs, choices: Sequence[str], seeds: Sequence[int], steps: int, workers: int) -> None:
    """What the search for each choice's best rate needs."""
    runs.result(Plan(BEFORE, 0.0, 0, 0))

    def fill_in(choice: str) -> None:
        def loss_at(rate: int, seed: int) -> float:
            return runs.result(Plan(choice, rate_of(rate), seed, steps))["validation"]

        search(loss_at, CHOICES[choice].rate, seeds)

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(fill_in, choices))  # which raises what was raised


def main(*argv: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of a toy: whether it runs, not how well")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 120; 10 when quick)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one's runs choose the rate")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORDS", help="choices with any of these in the name"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once, of one thread each")
    parser.add_argument("--out", type=Path, help="folder for methods.json, .md and .png (default: results)")
    chosen = parser.parse_args(argv or None)
    steps = chosen.steps or (10 if chosen.quick else 120)
    out = chosen.out or (None if chosen.quick else RESULTS)
    choices = [name for name in CHOICES if name != BEFORE and any(words in name for words in chosen.only)]
    with nullcontext() if chosen.quick else workers_of(chosen.workers) as processes:
        do = (lambda plan: run(plan, True)) if chosen.quick else (lambda plan: processes.submit(run, plan).result())
        runs = Runs(out / "methods.json" if out else None, do)
        try:
            fill(runs, choices, chosen.seeds, steps, 1 if chosen.quick else chosen.workers)
        finally:  # what an interrupted run has found is written, too
            about = {**runs.about, "command": f"python benchmarks/methods.py --steps {steps}, {chosen.workers} at once"}
            done = [run for run in runs.done if run["plan"]["steps"] in (0, steps)]
            if done:
                write(out, __doc__, about, done, list(CHOICES))


def workers_of(number: int) -> ProcessPoolExecutor:
    """Processes of one thread each: for a few short rows two of these do more than one of two threads."""
    return ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))


if __name__ == "__main__":
    main()
