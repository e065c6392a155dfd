"""`inspect`: what an adapter trained, how large it is, and whether it is sound."""

from __future__ import annotations

import argparse
import importlib
import io
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora.adapters.adapter import Adapter, parameters_of
from lora.adapters.files import replace_file
from lora.adapters.formats import read_adapter
from lora.arithmetic.distances import blocks
from lora.cli import (
    SETTINGS,
    Subparsers,
    add_adapter,
    add_command,
    check_output,
    dtype_word,
    finite,
    number,
    path_argument,
    progress,
    show,
)
from lora.errors import join, table

# The kinds of layer that an adapter can be understood of without its model.
_KINDS = ("linear", "embedding", "conv")


def add(commands: Subparsers) -> None:
    """Enter the command."""
    about = "show what an adapter trained, how large its updates are, and whether anything is wrong with it"
    example = "inspect adapter.safetensors --plot norms.png"
    parser = add_command(commands, run, "inspect", about, example, "--json", "--overwrite")
    add_adapter(parser, "file", "FILE")
    about = "draw the norms of the updates, layers x projections"
    parser.add_argument("--plot", type=path_argument, metavar="OUT.png", help=about)
    about = "the lora_alpha of training, which loralib's files lack"
    parser.add_argument("--lora-alpha", type=number, metavar="X", help=about)


def run(arguments: argparse.Namespace) -> int:
    """Look at an adapter; 1 if something is wrong with it."""
    if arguments.plot:
        check_output(arguments.plot, arguments.overwrite, [arguments.file])
    found = examine(_read(arguments.file, arguments.lora_alpha))
    if arguments.plot:
        heat_map({module["name"]: module["norm"] for module in found["modules"]}, arguments.plot)
    show(found, _text(found), arguments.json)
    return 1 if found["problems"] else 0


def _read(file: Path, lora_alpha: float | None) -> Adapter:
    """An adapter that need not be sound; a `lora_alpha` that does not belong there is a mistake of the user's."""
    try:
        return read_adapter(file, lora_alpha=lora_alpha, check=False)
    except TypeError as error:
        raise ValueError(str(error)) from None


def examine(adapter: Adapter) -> dict[str, Any]:
    """All that `inspect` says, as JSON can hold it; what is wrong is under "problems"."""
    problems = list(adapter.problems())
    modules = [_module(adapter, name, problems) for name in progress(adapter.modules, "inspecting")]
    full = {name: adapter.tensors[name] for name in adapter.trained_in_full if name in adapter.tensors}
    return {
        "format": adapter.format,
        "base_model": adapter.base_model,
        "modules": modules,
        "trained_in_full": [
            {"name": name, "shape": list(tensor.shape), "dtype": dtype_word(tensor.dtype)}
            for name, tensor in full.items()
        ],
        "modules_to_save": adapter.modules_to_save,
        "kept": adapter.kept,
        "sampled": len(adapter.rest),
        **_sizes(adapter.tensors),
        "problems": problems,
    }


def _module(adapter: Adapter, name: str, problems: list[str]) -> dict[str, Any]:
    settings = adapter.modules[name]
    base = settings.get("base")
    base = base if isinstance(base, dict) else {}
    keys = [join(name, part) for part in parameters_of(settings)]
    own = {key: adapter.tensors[key] for key in keys if key in adapter.tensors}
    alone = replace(adapter, modules={name: settings}, tensors=own, trained_in_full=[], kept=[], rest={})
    measured = []
    if not any(alone.problems()):
        try:
            measured = blocks(alone, name)
        except ValueError as error:
            if base["kind"] in _KINDS:  # of others only the model knows what A and B are
                problems.append(f"{name}: {error}")
    norm = math.hypot(*(block.norm for block in measured)) if measured else math.nan
    return {
        "name": name,
        "kind": base.get("kind"),
        "shape": base.get("shape"),
        "dtype": ", ".join(dict.fromkeys(dtype_word(tensor.dtype) for tensor in own.values())),
        **{key: settings[key] for key in SETTINGS if key in settings},
        "norm": finite(norm),
        "relative_norm_estimate": finite(norm / _size(base)) if measured else None,
        # r must do for the most demanding split: the largest says whether a smaller one would.
        "effective_rank": max((block.effective_rank for block in measured), default=None),
        "blocks": [asdict(block) for block in measured],
        **_sizes(own),
    }


def _size(base: Mapping[str, Any]) -> float:
    """The norm of the base weight, estimated from the values that the adapter remembers of it; NaN if it has none."""
    shape, sample = base.get("shape"), base.get("sample")
    if not shape or not sample or not any(sample):
        return math.nan
    return math.hypot(*sample) * math.sqrt(math.prod(shape) / len(sample))


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    }


# ---- as a text ---------------------------------------------------------------------------------------------------

_HEADER = ("module", "kind", "weight", "r", "scaling", "norm", "of base", "eff. rank", "parameters", "dtype")


def _text(found: Mapping[str, Any]) -> str:
    lines = [f"format: {found['format']}, base model: {found['base_model'] or 'not said'}"]
    lines.append(table(_HEADER, [row for module in found["modules"] for row in _rows(module)]))
    if any(module["relative_norm_estimate"] is not None for module in found["modules"]):
        lines.append("~: the base weight's norm is estimated from 16 of its values.")
    for tensor in found["trained_in_full"]:
        what = "kept of the base model" if tensor["name"] in found["kept"] else "trained in full"
        lines.append(f"{what}: {tensor['name']} {_shape(tensor['shape'])} {tensor['dtype']}")
    if found["sampled"]:
        lines.append(f"sampled of the base model: {found['sampled']} other tensors")
    lines.append(f"{len(found['modules'])} modules, {found['parameters']:,} parameters, {found['bytes']:,} bytes")
    lines += [f"problem: {problem}" for problem in found["problems"]]
    return "\n".join(lines)


def _rows(module: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for the module, and one for each of its splits."""
    estimate = module["relative_norm_estimate"]
    share = "?" if estimate is None else f"~{100 * estimate:.2g} %"
    kind = f"{module['kind']}, DoRA" if module.get("use_dora") else str(module["kind"])  # whose g the norm leaves out
    named = module["name"], kind, _shape(module["shape"])
    chosen = _number(module, "r"), _number(module, "scaling")
    measured = _number(module, "norm"), share, _number(module, "effective_rank")
    rows: list[tuple[str, ...]] = [(*named, *chosen, *measured, f"{module['parameters']:,}", module["dtype"])]
    for block in module["blocks"]:
        if block["rows"]:
            start, stop = block["rows"]
            norm, rank = _number(block, "norm"), _number(block, "effective_rank")
            rows.append((f"  rows {start}:{stop}", "", "", "", "", norm, "", rank, "", ""))
    return rows


def _number(of: Mapping[str, Any], key: str) -> str:
    value = of.get(key)
    return f"{value:.4g}" if isinstance(value, (int, float)) else "?"


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape)) if isinstance(shape, list) else "?"


# ---- as a plot -----------------------------------------------------------------------------------------------------


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
    places = {name: re.fullmatch(r"(?:(.*?)\.)?(\d+)(?:\.(.*))?", name) for name in norms}  # around the first number
    stacks = {found[1] for found in places.values() if found}
    cells: dict[tuple[int, str], float | None] = {}  # by layer, -1 for none, and column
    for name, found in places.items():
        stack, layer, rest = found.groups("") if found else ("", "-1", name)
        cells[int(layer), f"{stack}.{rest}" if found and len(stacks) > 1 else rest] = norms[name]
    layers = sorted({layer for layer, _ in cells})
    columns = list(dict.fromkeys(column for _, column in cells))
    drawn = [[cells.get((layer, column)) for column in columns] for layer in layers]
    values = [[math.nan if norm is None else norm for norm in row] for row in drawn]
    return ["-" if layer < 0 else str(layer) for layer in layers], columns, values
