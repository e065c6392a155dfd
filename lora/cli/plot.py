"""A heat map of the updates' norms: layers by projections."""

from __future__ import annotations

import importlib
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path

from lora.adapters.files import replace_file


def heat_map(norms: Mapping[str, float | None], path: Path) -> None:
    """Draw each module's norm at its layer and projection; modules without a norm are left blank.

    Raises:
        ValueError: matplotlib is not installed, or does not know the kind of file that the name ends with.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
        backend = importlib.import_module("matplotlib.backends.backend_agg")
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    rows, columns, values = grid(norms)
    figure = figures.Figure(figsize=(2.5 + 0.7 * len(columns), 2 + 0.28 * len(rows)), layout="constrained")
    backend.FigureCanvasAgg(figure)  # objects of our own: pyplot's state is the user's
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylabel("layer")
    axes.set_facecolor("lightgrey")
    figure.colorbar(image, ax=axes, label="norm of the update")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format=path.suffix[1:] or "png")
    replace_file(path, drawn.getvalue())


def grid(norms: Mapping[str, float | None]) -> tuple[list[str], list[str], list[list[float]]]:
    """Rows (layers), columns (projections) and values, NaN where there is none.

    >>> grid({"layers.0.q": 1.0, "layers.1.q": 2.0, "head": 3.0})
    (['-', '0', '1'], ['q', 'head'], [[nan, 3.0], [1.0, nan], [2.0, nan]])
    """
    if not norms:
        raise ValueError("there is no module to draw.")
    places = {name: _place(name) for name in norms}
    stacks = {stack for stack, layer, _ in places.values() if layer is not None}
    cells = {}
    for name, (stack, layer, rest) in places.items():
        column = f"{stack}.{rest}" if layer is not None and len(stacks) > 1 else rest
        cells[layer, column] = norms[name]
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: -1 if layer is None else layer)
    columns = list(dict.fromkeys(column for _, column in cells))
    values = [[_value(cells.get((layer, column))) for column in columns] for layer in layers]
    return ["-" if layer is None else str(layer) for layer in layers], columns, values


def _value(norm: float | None) -> float:
    return math.nan if norm is None else norm


def _place(name: str) -> tuple[str, int | None, str]:
    """What stands before the first number in a name, the number, and what stands after it."""
    found = re.fullmatch(r"(?:(.*?)\.)?(\d+)(?:\.(.*))?", name)
    return (found[1] or "", int(found[2]), found[3] or "") if found else ("", None, name)
