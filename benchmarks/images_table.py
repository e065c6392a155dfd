"""What images.py found, as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kept import markdown, page
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora.errors import table

NOTES = """
Means over the seeds, in brackets the lowest and the highest. Trained parameters and MB are of what is saved beside the
pretrained network: of full fine-tuning, all of it. A merged network's scores differ from the unmerged one's by at most
{merged:.1e}, and switched off each adapted network is the pretrained one to the bit.
""".strip()


class Row(NamedTuple):
    """A method: its learning rate in half decades, those tried, and the results of each seed."""

    method: str
    rate: int
    tried: Sequence[int]
    results: Sequence[Mapping[str, Any]]

    def values(self, name: str) -> list[float]:
        return [result[name] for result in self.results]


def spread(form: Callable[[float], str]) -> Callable[[Sequence[float]], str]:
    """The mean, and the lowest and the highest of several values."""

    def text(values: Sequence[float]) -> str:
        mean, low, high = (form(value) for value in (statistics.mean(values), min(values), max(values)))
        return f"{mean} ({low}–{high})" if low != high else mean

    return text


percent = spread(lambda value: f"{100 * value:.1f}")
COLUMNS = {
    "test accuracy": ("test accuracy, %", percent),
    "test loss": ("test loss", spread("{:.3f}".format)),
    "KL on photographs": ("KL on photographs", spread("{:.2g}".format)),
    "same first class": ("same first class, %", percent),
    "trained parameters": ("trained parameters", spread("{:,.0f}".format)),
    "saved MB": ("saved MB", spread("{:.2f}".format)),
}


def rates(row: Row) -> str:
    tried = ", ".join(f"{10 ** (rate / 2):.1e}" for rate in row.tried)
    return f"{10 ** (row.rate / 2):.1e} (of {tried})"


def write(out: Path | None, question: str, about: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Print the table, and put images.md and images.png into the folder `out`."""
    header = ["method", "learning rate", *(title for title, _ in COLUMNS.values())]
    cells = [[r.method, rates(r), *(form(r.values(name)) for name, (_, form) in COLUMNS.items())] for r in rows]
    print(table(header, cells))
    if not out:
        return
    differences = [result.get("merged, largest difference of scores", 0.0) for row in rows for result in row.results]
    parts = [markdown([dict(zip(header, line, strict=True)) for line in cells]), NOTES.format(merged=max(differences))]
    (out / "images.md").write_text(page("images", question, about, parts), encoding="utf-8")
    draw(out / "images.png", rows)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """What was learnt beside what was forgotten: a bar for each method, a dot for each seed."""
    figure = Figure(figsize=(10, 1.2 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "test error, %": lambda row: [100 * (1 - value) for value in row.values("test accuracy")],
        "forgotten: KL on photographs": lambda row: row.values("KL on photographs"),
    }
    for axes, (title, values_of) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for y, row in enumerate(rows):
            values = values_of(row)
            axes.barh(y, statistics.mean(values), color="tab:green" if "LoRA" in row.method else "tab:grey", height=0.7)
            axes.plot(values, [y] * len(values), "k.", markersize=4)
            axes.annotate(f" {statistics.mean(values):.2g}", (max(values), y), va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [row.method for row in rows], fontsize=8)
        axes.set_xlabel(title + ": shorter is better")
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
