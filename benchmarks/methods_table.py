"""What methods.py found, as tables and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kept import Run, markdown, page
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora.errors import table

BEFORE, FULL, LORA = "before training", "full fine-tuning", "LoRA, r = 16, all"
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for 95 %, by the number of values
NOTES = """
{steps} steps of 8 problems, which take one of each choice's rates. ± is the half of a 95 % interval of the mean over
the seeds (Student's t). "Rate" is the best of those that the second table has; "× full's" is its ratio to the best
rate of full fine-tuning. "Beyond LoRA's" is the loss less that of LoRA with r = 16 in all layers, seed by seed: a
seed's problems are the same for all. "Prose" is by how much the loss per token of prose has risen from {prose:.3f}:
what was forgotten.
""".strip()


def write(
    out: Path | None, question: str | None, about: Mapping[str, str], runs: Sequence[Run], order: Sequence[str]
) -> None:
    """Print the table, and put methods.md and methods.png into the folder `out`."""
    best = {choice: found for choice in order if (found := best_of(runs, choice))}
    rows = [row(choice, best) for choice in best]
    header = list(rows[0])
    print(table(header, [list(line.values()) for line in rows]))
    if not out:
        return
    steps = max(run["plan"]["steps"] for run in runs)
    notes = NOTES.format(steps=steps, prose=best[BEFORE][0]["result"]["prose"])
    rates = "## Rates\n\nThe loss on the problems by which rates are chosen: a mean where there are several seeds."
    parts = [markdown(rows), notes, rates, markdown(tried_rates(runs, order))]
    (out / "methods.md").write_text(page("methods", question, about, parts), encoding="utf-8")
    draw(out / "methods.png", runs, best)


def by_rate(runs: Sequence[Run], choice: str) -> dict[float, list[Run]]:
    """The runs of one choice, by their learning rates."""
    ours = [run for run in runs if run["plan"]["choice"] == choice]
    return {
        rate: [run for run in ours if run["plan"]["rate"] == rate]
        for rate in sorted({run["plan"]["rate"] for run in ours})
    }


def best_of(runs: Sequence[Run], choice: str) -> list[Run]:
    """The runs of a choice at its best rate: of those with the most seeds, the lowest mean where rates are chosen."""
    groups = by_rate(runs, choice).values()
    return min(groups, key=lambda group: (-len(group), validation(group)), default=[])


def validation(runs: Sequence[Run]) -> float:
    loss = statistics.mean(values(runs, "validation"))
    return loss if math.isfinite(loss) else math.inf


def values(runs: Sequence[Run], what: str) -> list[float]:
    return [run["result"][what] for run in runs]


def half_interval(found: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean."""
    return T_95[len(found)] * statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan


def mean(found: Sequence[float], digits: int = 3) -> str:
    """A mean with its interval, if there are several values."""
    half = half_interval(found)
    return f"{statistics.mean(found):.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def row(choice: str, best: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """One line of the table."""
    runs, [before] = best[choice], values(best[BEFORE], "prose")
    rate = runs[0]["plan"]["rate"]
    full = best[FULL][0]["plan"]["rate"] if FULL in best else math.nan
    return {
        "choice": choice,
        "rate": f"{rate:.0e}" if rate else "–",
        "× full's": f"{rate / full:.2g}" if rate and full == full else "–",
        "exact match": mean(values(runs, "exact")),
        "loss": mean(values(runs, "loss")),
        "beyond LoRA's": beyond(runs, best.get(LORA, [])) if choice not in (BEFORE, LORA) else "–",
        "prose": mean([prose - before for prose in values(runs, "prose")]),
        "trained parameters": f"{runs[0]['result']['trained parameters']:,}" if rate else "–",
        "seeds": str(len(runs)) if rate else "–",
    }


def beyond(runs: Sequence[Run], others: Sequence[Run]) -> str:
    """By how much the loss is above that of other runs with the same seeds."""
    theirs = {run["plan"]["seed"]: run["result"]["loss"] for run in others}
    pairs = [(run["result"]["loss"], theirs.get(run["plan"]["seed"])) for run in runs]
    found = [ours - its for ours, its in pairs if its is not None]
    return mean(found) if found else "–"


def tried_rates(runs: Sequence[Run], order: Sequence[str]) -> list[dict[str, str]]:
    """A line for each choice, a column for each rate that any of them tried."""
    tried = {choice: found for choice in order if choice != BEFORE and (found := by_rate(runs, choice))}
    rates = sorted({rate for groups in tried.values() for rate in groups})
    losses = {
        choice: {rate: f"{validation(group):.3f}" for rate, group in found.items()} for choice, found in tried.items()
    }
    return [
        {"choice": choice} | {f"{rate:.0e}": found.get(rate, "") for rate in rates} for choice, found in losses.items()
    ]


def draw(path: Path, runs: Sequence[Run], best: Mapping[str, Sequence[Run]]) -> None:
    """Losses over learning rates; and beside it, of each choice at its best rate, what it learnt and what it forgot."""
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    rates, learnt, forgotten = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
    [before] = values(best[BEFORE], "prose")
    choices = [choice for choice in best if choice != BEFORE]
    marks = {"all": "-", "MLP": "--", "attention": ":"}
    ranks: list[str] = []
    for line, choice in enumerate(choices):
        rank, _, where = choice.partition(", r = ")[2].partition(", ")
        if where in marks and rank not in ranks:
            ranks.append(rank)
        colour = f"C{ranks.index(rank)}" if where in marks else "black"
        if where in marks or choice == FULL:
            found = by_rate(runs, choice)
            losses = [validation(group) for group in found.values()]
            rates.plot([*found], losses, marks.get(where, "-"), marker="o", markersize=4, color=colour, label=choice)
        risen = [prose - before for prose in values(best[choice], "prose")]
        for axes, each in ((learnt, values(best[choice], "loss")), (forgotten, risen)):
            half = half_interval(each) if len(each) > 1 else None
            axes.errorbar(statistics.mean(each), line, xerr=half, fmt="o", markersize=4, color=colour, elinewidth=0.8)
    rates.set(xscale="log", xlabel="learning rate", ylabel="loss where rates are chosen")
    rates.set_ylim(top=min(rates.get_ylim()[1], 2.0))
    rates.legend(frameon=False, fontsize=7, loc="upper center")
    for axes, label in (
        (learnt, "learnt: loss on the test's problems"),
        (forgotten, "forgotten: rise of the loss on prose"),
    ):
        axes.set_xlabel(label)
        axes.set_yticks(range(len(choices)), choices if axes is learnt else [""] * len(choices), fontsize=8)
        axes.invert_yaxis()
    for axes in (rates, learnt, forgotten):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
