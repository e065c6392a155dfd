"""How long is a training step by each method, as a ratio to LoRA's, and how much memory does it take?

The example's pretrained model and the choices of methods.py, on 2 rows of 256 random tokens that are all labels:
forward, backward and the optimizer's step. Times are of this process, in turns; the peak of memory is that of a
process of its own for each method, in two steps. A start that looks at data ("EVA") looks at the same rows.

    python benchmarks/methods_time.py [--quick]
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from harness import Case, main
from machine import peak_mib
from methods import CHOICES, FULL, METHODS, rate_of, set_up, train_step

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # which are no package
from phi3 import fetch, pretrained, tiny

ROWS, LENGTH = 2, 256
PLAIN = "LoRA, r = 16, all"


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    return {f"a step of {ROWS} rows of {LENGTH} tokens": partial(case, quick)}


def case(quick: bool) -> Case:
    names = [PLAIN, *METHODS, FULL]
    peaks = {name: peak_of(name, quick) for name in names}
    return Case({name: step_of(name, quick) for name in names}, {"peak MiB": peaks})


def step_of(name: str, quick: bool) -> Callable[[], object]:
    """A training step by one method, on the same rows each time."""
    torch.manual_seed(0)
    if quick:
        model = tiny.model()
    else:
        model = pretrained.load(pretrained.SMOLLM2, fetch.default_cache_dir(), dtype=torch.float32)[0]
        for parameter in model.parameters():  # out of the file, whose pages would count as the process's memory
            parameter.data = parameter.data.clone()
    ids = torch.randint(model.config.vocab_size, (ROWS, LENGTH))
    optimizer = set_up(model, CHOICES[name], rate_of(CHOICES[name].rate), [(ids, ids)])
    return partial(train_step, model, optimizer, (ids, ids), times=0.0)  # which changes nothing from step to step


def peak_of(name: str, quick: bool) -> float:
    """The most memory of a new process that takes two steps; of this one if quick, as a process takes seconds."""
    if quick:
        return peak_after(name, quick)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(peak_after, name, quick).result()


def peak_after(name: str, quick: bool) -> float:
    step = step_of(name, quick)
    for _ in range(2):
        step()
    return peak_mib()


if __name__ == "__main__":
    main(__file__, __doc__, cases)
