"""Ratios as bars that begin at the limit, 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

_COLOURS = {"loralib": "#c44e52", "PEFT": "#dd8452", "lora": "#4c72b0", "": "#8c8c8c"}  # by how a name begins


def draw(path: Path, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A PNG with a group of bars for each case: each variant's time as a ratio to the first one's, with quartiles."""
    figure = Figure(figsize=(9, 1 + 0.25 * sum(len(rows) for rows in results.values())), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    y, ticks = 0.0, {}
    for case, (first, *others) in results.items():
        ticks[y + (len(others) - 1) / 2] = f"{case}\n({first['variant']}: {first['ms']:.3g} ms)"
        for row in others:
            (low, high), ratio = row["quartiles"], row["ratio"]
            axes.barh(y, ratio - 1, left=1, color=_colour(row["variant"]), height=0.85)
            axes.plot([low, high], [y, y], color="black", linewidth=1)
            axes.annotate(f" {row['variant']} {ratio:.2f}", (max(high, 1), y), va="center", fontsize=7)
            y += 1
        y += 0.8
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel("time, as a ratio to the first variant (in brackets): shorter is better")
    axes.spines[["top", "right"]].set_visible(False)
    shown = {_colour(row["variant"]) for _, *others in results.values() for row in others}
    handles = [Patch(color=colour, label=name) for name, colour in _COLOURS.items() if name and colour in shown]
    axes.legend(handles=handles, loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)


def _colour(variant: str) -> str:
    return next(colour for name, colour in _COLOURS.items() if variant.startswith(name))
