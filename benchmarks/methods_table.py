"""What methods.py found, as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora.errors import table

Run = Mapping[str, Any]  # {"plan": …, "result": …}, as in methods.json

REFERENCE = "LoRA"  # whose loss before training is the base model's
NOTES = """
{steps} steps of {rows} rows. Before training the loss is {start:.4f}. Losses are means over the seeds, in brackets the
lowest and the highest. Of several learning rates the one with the lowest loss is shown. Peak memory is that of the
process while it trains. methods_time.md has the time of a step.
""".strip()


def write(out: Path | None, question: str, about: Mapping[str, str], runs: Sequence[Run], order: Sequence[str]) -> None:
    """Print the table, and put methods.md and methods.png into the folder `out`."""
    best = chosen(runs, order)
    tried = {method: {run["plan"]["lr"] for run in runs if run["plan"]["method"] == method} for method in best}
    rows = [row(method, sorted(tried[method]), kept) for method, kept in best.items()]
    header = list(rows[0])
    cells = [[str(value) for value in line.values()] for line in rows]
    print(table(header, cells))
    if not out:
        return
    lines = ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells)]
    start = statistics.mean(final(run, first=True) for run in best.get(REFERENCE, next(iter(best.values()))))
    plan = runs[0]["plan"]
    notes = NOTES.format(steps=plan["steps"], rows=plan["rows"], start=start)
    parts = ["# methods", question.strip(), "![](methods.png)", "\n".join(lines), notes]
    parts += ["## Measured on", "\n".join(f"- {key}: {value}" for key, value in about.items())]
    (out / "methods.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw(out / "methods.png", best)


def chosen(runs: Sequence[Run], order: Sequence[str]) -> dict[str, list[Run]]:
    """For each method its runs with the learning rate that did best, of those tried with the most seeds."""
    best = {}
    for method in order:
        by_lr: dict[float, list[Run]] = {}
        for run in runs:
            if run["plan"]["method"] == method:
                by_lr.setdefault(run["plan"]["lr"], []).append(run)
        if by_lr:
            best[method] = min(by_lr.values(), key=lambda group: (-len(group), statistics.mean(map(final, group))))
    return best


def final(run: Run, first: bool = False) -> float:
    """The held-out loss at the end, or before training."""
    return list(run["result"]["held out"].values())[0 if first else -1]


def row(method: str, tried: Sequence[float], runs: Sequence[Run]) -> dict[str, object]:
    """One line of the table."""
    losses, results = [final(run) for run in runs], [run["result"] for run in runs]
    lr = f"{runs[0]['plan']['lr']:.1e}"
    return {
        "method": method,
        "learning rate": lr if len(tried) == 1 else f"{lr} (of {', '.join(f'{other:.1e}' for other in tried)})",
        "held-out loss": spread(losses),
        "seeds": ", ".join(str(run["plan"]["seed"]) for run in runs),
        "peak MiB": f"{max(result['peak MiB'] for result in results):.0f}",
        "trained parameters": f"{results[0]['trained parameters']:,}",
        "saved MB": f"{results[0]['saved MB']:.2f}",
    }


def spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f}–{max(values):.4f})"


def draw(path: Path, best: Mapping[str, list[Run]]) -> None:
    """Held-out losses over the steps, and beside them bars of memory."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, memory = figure.subplots(1, 2, width_ratios=[3, 1])
    colours = {method: f"C{number}" for number, method in enumerate(best)}
    for method, runs in best.items():
        curves = [list(run["result"]["held out"].values()) for run in runs]
        steps = [int(step) for step in runs[0]["result"]["held out"]]
        means = [statistics.mean(values) for values in zip(*curves, strict=True)]
        style = "--" if method.startswith("full") else "-"
        losses.plot(
            steps, means, style, marker="o", markersize=3, color=colours[method], label=f"{method} {means[-1]:.3f}"
        )
        if len(curves) > 1:
            low, high = (list(map(pick, zip(*curves, strict=True))) for pick in (min, max))
            losses.fill_between(steps, low, high, color=colours[method], alpha=0.12, linewidth=0)
    losses.set(xlabel="step", ylabel="held-out loss per token (nats)")
    losses.legend(frameon=False, fontsize=8)
    losses.grid(alpha=0.3)
    peaks = {method: max(run["result"]["peak MiB"] for run in runs) / 1024 for method, runs in best.items()}
    _bars(memory, peaks, colours, "peak memory, GiB")
    figure.savefig(path, dpi=120)


def _bars(axes: Any, values: Mapping[str, float], colours: Mapping[str, str], title: str) -> None:
    bars = axes.barh(list(values), list(values.values()), color=[colours[method] for method in values])
    axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
