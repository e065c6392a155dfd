"""Runs that are kept, the search for the best learning rate among them, and tables of what they found."""

from __future__ import annotations

import json
import math
import os
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


def search(loss_at: Callable[[int], float], first: int, most: int = 12) -> dict[int, float]:
    """The losses of learning rates, which have numbers, until both neighbours of the best are worse; the best first.

    A loss that is not finite counts as infinite; of rates that are equally good, as when all diverge, the lowest wins.
    No more than `most` are tried.
    """
    losses: dict[int, float] = {}
    rate: int | None = first
    while rate is not None and len(losses) < most:
        loss = loss_at(rate)
        losses[rate] = loss if math.isfinite(loss) else math.inf
        best = min(losses, key=lambda each: (losses[each], each))
        rate = next((each for each in (best - 1, best + 1) if each not in losses), None)
    return dict(sorted(losses.items(), key=lambda each: (each[1], each[0])))


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of rows that have the same columns."""
    return "\n".join(_line(cells) for cells in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)))


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def page(title: str, question: str, about: Mapping[str, str], parts: Sequence[str]) -> str:
    """Results as a page: the question, a picture of the same name, the parts, and what they were measured on."""
    measured = "\n".join(f"- {key}: {value}" for key, value in about.items())
    return "\n\n".join([f"# {title}", question.strip(), f"![]({title}.png)", *parts, "## Measured on", measured]) + "\n"
