"""Losses of the same training by several libraries: run one after the other, kept, compared and drawn."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kept import page, save
from machine import machine
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Losses = Mapping[str, Sequence[float]]  # of each step, by library; the first is what the others are compared with


class Training(NamedTuple):
    """What one training tells: its loss in each step, and numbers that have a column each."""

    losses: Sequence[float]
    numbers: Mapping[str, float] = {}


def run(
    path: Path | None, question: str, command: str, wanted: Mapping[str, Callable[[], Training]]
) -> dict[str, Training]:
    """The losses of each library, kept as each has run; what the file has from the same command is not run again.

    Args:
        path: <name>.json, beside which <name>.md and <name>.png are written; nothing is kept if None.
        question: what <name>.md says before its table.
        command: what makes the same losses.
        wanted: by library, what trains.
    """
    kept = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    if kept.get("machine", {}).get("command") != command:
        kept = {"machine": machine() | {"command": command}, "losses": {}, "numbers": {}}
    try:
        for name, train in wanted.items():
            if name not in kept["losses"]:
                kept["losses"][name], kept["numbers"][name] = train()
                if path:
                    save(path, kept)
    finally:
        found = {name: Training(losses, kept["numbers"][name]) for name, losses in kept["losses"].items()}
        if path and found:
            write(path, question, kept["machine"], found)
    print("\n".join(compared(found)))
    return found


def write(path: Path, question: str, about: Mapping[str, str], found: Mapping[str, Training]) -> None:
    """What has been run so far as <name>.md, and drawn as <name>.png."""
    draw(path.with_suffix(".png"), {name: training.losses for name, training in found.items()})
    text = page(path.stem, question, about, ["\n".join(compared(found))])
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def apart(found: Losses) -> dict[str, list[float]]:
    """For each library but the first, how far each of its losses is from the first one's, relative to that."""
    first, *others = found.values()
    names = list(found)[1:]
    return {n: [abs(a - b) / a for a, b in zip(first, its, strict=True)] for n, its in zip(names, others, strict=True)}


def compared(found: Mapping[str, Training]) -> list[str]:
    """The lines of a table; the root of the mean of the squared differences is "rms"."""
    first, *_ = found
    away = {first: [0.0]} | apart({name: training.losses for name, training in found.items()})
    columns = [
        "",
        f"largest difference from {first}'s loss",
        "in step",
        "rms",
        "mean loss of the first tenth",
        "of the last",
    ]
    named = list(dict.fromkeys(name for training in found.values() for name in training.numbers))
    columns += named
    rows = [columns, ["---"] * len(columns)]
    for name, (losses, numbers) in found.items():
        largest = max(away[name])
        rms = math.sqrt(statistics.fmean(difference**2 for difference in away[name]))
        where = [f"{largest:.1e}", str(away[name].index(largest) + 1), f"{rms:.1e}"] if largest else ["0", "–", "0"]
        tenth = max(1, len(losses) // 10)
        course = [f"{statistics.mean(part):.5f}" for part in (losses[:tenth], losses[-tenth:])]
        more = (f"{numbers[column]:.5f}" if column in numbers else "–" for column in named)
        rows.append([name, *where, *course, *more])
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def draw(path: Path, found: Losses) -> None:
    """The losses, and below them how far they are apart."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True)
    for number, (name, losses) in enumerate(found.items()):
        above.plot(range(1, len(losses) + 1), losses, linewidth=5 * 0.6**number, label=name)  # one line, if the same
    above.set_ylabel("loss of the batch")
    above.legend(frameon=False, loc="upper right")
    for number, differences in enumerate(apart(found).values(), 1):
        floored = [max(difference, 2**-24) for difference in differences]  # float32 knows no smaller one but 0
        below.plot(range(1, len(floored) + 1), floored, linewidth=0.8, color=f"C{number}")
    below.set_yscale("log")
    below.set_ylabel(f"relative difference from {next(iter(found))}'s")
    below.set_xlabel("step")
    figure.savefig(path, dpi=100)
