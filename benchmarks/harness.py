"""Time functions against each other: in one process, in turns, as ratios to the first of them, which is the limit.

Every script has `cases(quick)`, which maps the name of each case to a function that makes it, and calls `main`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chart import draw
from machine import machine, only

from lora.errors import table

RESULTS = Path(__file__).parent / "results"
LEAST_ROUNDS = 5
LEAST_SAMPLE = 5e-3  # seconds; what is shorter is repeated, for the clock and the caches to settle


@dataclass(frozen=True)
class Case:
    """Functions that do the same in different ways.

    Attributes:
        variants: what to time, by name; the first is the limit that the others are measured against.
        columns: what else to say of them: {"kept / x": {"frozen": 0.0, "lora": 1.01}}.
        setups: what to do before each run of a variant, untimed.
        note: a sentence below the table.
        charted: whether its ratios belong into the chart.
        instances: how many copies of it are built, which rounds take in turns: where its tensors lie in memory affects
            its speed.
    """

    variants: Mapping[str, Callable[[], object]]
    columns: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    setups: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    note: str = ""
    charted: bool = True
    instances: int = 1


def measure(case: Case, seconds: float, device: str = "cpu", others: Sequence[Case] = ()) -> list[dict[str, Any]]:
    """One row for each variant: medians of time, and of the ratio to the first variant in the same round.

    Args:
        others: other instances of the case, to take turns with it.
    """
    for instance in (case, *others):
        for name in case.variants:
            _run(instance, name, 1, device)  # the first call of all warms up
    repeats = {name: _repeats(case, name, device) for name in case.variants}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in case.variants}
    end = time.perf_counter() + seconds
    for n, instance in enumerate(itertools.cycle([case, *others])):
        if n >= LEAST_ROUNDS and time.perf_counter() >= end:
            break
        for name, taken in samples.items():
            taken.append(_run(instance, name, repeats[name], device))
    limit = next(iter(samples.values()))
    return [_row(case, name, taken, limit) for name, taken in samples.items()]


def _run(case: Case, name: str, repeats: int, device: str) -> tuple[float, float]:
    """Seconds of wall-clock and of this process' CPU time that one call takes."""
    case.setups.get(name, lambda: None)()
    function = case.variants[name]
    if repeats > 1:
        function()  # brings into the caches what others have driven out, which is much of the time of a short one
    _synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        function()
    _synchronize(device)
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def _synchronize(device: str) -> None:
    """Wait for what an accelerator still computes."""
    if device != "cpu":
        getattr(torch, torch.device(device).type).synchronize()


def _repeats(case: Case, name: str, device: str) -> int:
    wall, _ = _run(case, name, 1, device)
    return 1 if name in case.setups else max(1, round(LEAST_SAMPLE / wall))


def _row(case: Case, name: str, taken: Sequence[tuple[float, float]], limit: Sequence[tuple[float, float]]) -> dict:
    ratios = [wall / wall_0 for (wall, _), (wall_0, _) in zip(taken, limit, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    wall, cpu = (statistics.median(times) for times in zip(*taken, strict=True))
    beyond = statistics.median(cpu - cpu_0 for (_, cpu), (_, cpu_0) in zip(taken, limit, strict=True))
    return {
        "variant": name,
        "ms": 1e3 * wall,
        "ratio": ratio,
        "quartiles": [low, high],
        "CPU ms": 1e3 * cpu,
        "CPU ms beyond the first": 1e3 * beyond,
        **{column: values.get(name, "–") for column, values in case.columns.items()},
        "rounds": len(taken),
    }


def main(script: str, question: str, cases: Callable[[bool], Mapping[str, Callable[[], Case]]], *argv: str) -> None:
    """Run a script's cases, print a table of each, and write JSON, Markdown and a chart of all."""
    parser = argparse.ArgumentParser(description=question, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the sizes: whether it runs, not how fast")
    parser.add_argument("--seconds", type=float, help="time for each case (default: 30, or 0.1 when quick)")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases that have these words in their name")
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: results/, when run without options)")
    parser.add_argument("--keep", action="store_true", help="keep what the results there say of cases that are not run")
    chosen = parser.parse_args(argv or None)
    # Cases are made on the device, and measured without a default device: under one each call of torch's runs through
    # Python, which would be measured, too.
    making = partial(torch.device, chosen.device) if chosen.device != "cpu" else nullcontext
    seconds = chosen.seconds or (0.1 if chosen.quick else 30)
    with making():
        about, made = machine(), cases(chosen.quick)
    topic, results = Path(script).stem, {}
    where = "" if chosen.device == "cpu" else f" --device {chosen.device}"
    options = f"{' --quick' * chosen.quick}{where}{only(chosen.only)} --seconds {seconds:g}"
    about["command"] = f"python benchmarks/{topic}.py{options}"
    for name, make in made.items():
        if chosen.only in name:
            with making():
                case = make()
                others = [make() for _ in range(case.instances - 1)]
            rows = measure(case, seconds, chosen.device, others)
            results[name] = {"rows": rows, "note": case.note, "charted": case.charted, "machine": about}
            print(name, table(*_cells(results[name]["rows"])), case.note, sep="\n", end="\n\n", flush=True)
    in_part = chosen.quick or chosen.only or chosen.seconds
    out = chosen.out or (None if in_part else RESULTS)
    if out and results:
        file = out / f"{topic}.json"
        kept = json.loads(file.read_text())["results"] if chosen.keep and file.exists() else {}
        every = kept | results
        write(out, topic, question, {name: every[name] for name in made if name in every})


def write(out: Path, topic: str, question: str, results: dict[str, Any]) -> None:
    """The results as <topic>.json, .md and .png in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"results": results}, indent=1, ensure_ascii=False)
    (out / f"{topic}.json").write_text(text + "\n")
    parts = [f"# {topic}", question.strip(), f"![]({topic}.png)"]
    for name, result in results.items():
        header, rows = _cells(result["rows"])
        lines = [" | ".join(line) for line in (header, ["---"] * len(header), *rows)]
        parts += [f"## {name}", "\n".join(f"| {line} |" for line in lines), result["note"]]
    machines: dict[str, list[str]] = {}
    for name, result in results.items():
        machines.setdefault(json.dumps(result["machine"]), []).append(name)
    for about, names in machines.items():
        lines = {"cases": "; ".join(names)} if len(machines) > 1 else {}
        lines |= json.loads(about)
        parts += ["## Measured on", "\n".join(f"- {key}: {value}" for key, value in lines.items())]
    (out / f"{topic}.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    draw(out / f"{topic}.png", {name: result["rows"] for name, result in results.items() if result["charted"]})


def _cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    return list(rows[0]), [[_cell(value) for value in row.values()] for row in rows]


def _cell(value: object) -> str:
    if isinstance(value, list):
        return "–".join(map(_cell, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)
