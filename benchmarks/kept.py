"""Runs that are kept, the search for the best learning rate among them, and tables of what they found."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from machine import machine

Run = Mapping[str, Any]  # {"plan": …, "result": …}


class Runs:
    """What has been run, the file that holds it if there is one, and the doing of what has not."""

    def __init__(
        self, path: Path | None, do: Callable[[Any], Mapping[str, Any]], about: Mapping[str, str] = {}
    ) -> None:
        self.path, self.do, self.about, self.lock = path, do, machine() | about, Lock()
        self.done: list[Run] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path and path.exists() else []

    def result(self, plan: Any) -> Mapping[str, Any]:
        """The result of a plan, a dataclass that says all that it depends on: from the file, or of a new run."""
        wanted = json.loads(json.dumps(asdict(plan)))
        for run in self.done:
            if run["plan"] == wanted:
                return run["result"]
        result = self.do(plan)
        with self.lock:
            self.done.append({"plan": wanted, "result": result})
            shown = ", ".join(f"{key} {value:.4g}" for key, value in result.items())
            named = ", ".join(f"{key} {value}" for key, value in wanted.items() if not isinstance(value, dict))
            print(f"{named}: {shown}", flush=True)
            if self.path:
                save(self.path, {"machine": self.about, "runs": self.done})
        return result


def save(path: Path, content: object) -> None:
    """Write JSON beside `path` and rename it: a kill leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def search(loss_at: Callable[[int, int], float], first: int, seeds: Sequence[int], most: int = 12) -> dict[int, float]:
    """The losses of learning rates, which have numbers, by (rate, seed): those that were tried, the best one first.

    A rate is tried with the first seed, and its neighbours, until both of the best one's are worse. The best is then
    run with all seeds, and counts with its mean; if another is the best then, so is that. No more than `most` rates are
    tried. A loss that is not finite is worse than any other; of rates that are equally bad, the lowest is the best.
    """
    losses: dict[int, float] = {}  # of the first seed, or the mean of all
    complete: set[int] = set()

    def loss_of(rate: int, some: Sequence[int]) -> float:
        loss = statistics.mean(loss_at(rate, seed) for seed in some)
        return loss if math.isfinite(loss) else math.inf

    while True:
        best = min(losses, key=lambda rate: (losses[rate], rate), default=None)
        near = [first] if best is None else [rate for rate in (best + 1, best - 1) if rate not in losses]
        if near and len(losses) < most:
            losses[near[0]] = loss_of(near[0], seeds[:1])
        elif best in complete:
            return {best: losses[best]} | losses
        else:
            complete.add(best)
            losses[best] = loss_of(best, seeds)


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of rows that have the same columns."""
    return "\n".join(_line(cells) for cells in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)))


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def page(title: str, question: str, about: Mapping[str, str], parts: Sequence[str]) -> str:
    """Results as a page: the question, a picture of the same name, the parts, and what they were measured on."""
    measured = "\n".join(f"- {key}: {value}" for key, value in about.items())
    return "\n\n".join([f"# {title}", question.strip(), f"![]({title}.png)", *parts, "## Measured on", measured]) + "\n"
