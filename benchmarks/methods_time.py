"""How long is a training step by each method, as a ratio to LoRA's?

The models, data and settings of methods.py, all in this process, in turns: forward, backward and the optimizer's step.

    python benchmarks/methods_time.py [--quick]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from chatting import toy_folder
from harness import Case, main
from methods import METHODS, Plan, plan_of, set_up
from phi3 import loop

ROWS = 2


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    return {f"a step of {ROWS} rows": partial(case, quick)}


def case(quick: bool) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        toy = toy_folder(Path(folder)) if quick else None
        return Case({name: step_of(plan_of(name, 0, 1.0, 1, ROWS), toy) for name in METHODS})


def step_of(plan: Plan, toy: Path | None) -> Callable[[], object]:
    """A training step by one method, on the same rows each time."""
    model, optimizer, data, training = set_up(plan, toy)
    model.train()
    batches = [batch.to(model.device) for batch in data.order.step(0)]
    return partial(loop.train_step, model, optimizer, batches, plan.lr, training["max_grad_norm"])


if __name__ == "__main__":
    main(__file__, __doc__, cases)
