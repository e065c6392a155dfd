"""`inspect` and `diff`: what an adapter trained, how large its updates are, and how far apart those of two are."""

from __future__ import annotations

import argparse
import importlib
import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.adapters.adapter import FORM, Adapter
from lora.adapters.base import Base
from lora.adapters.formats import read_adapter
from lora.adapters.saving import replace_file
from lora.arithmetic.distances import blocks, distance, relative
from lora.cli import (
    Subparsers,
    add_adapter,
    add_command,
    add_lora_alpha,
    check_output,
    dtype_word,
    number,
    path_argument,
    progress,
    read,
    show,
)
from lora.errors import clipped, is_number, join, short, table

# The kinds of layer that an adapter can be understood of without its model.
_KINDS = ("linear", "embedding", "conv")
# What is said of a module and of its base weight, and how.
_SETTINGS = ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_dropout", *FORM)
_BASE = ("kind", "shape", "dtype", "fan_in_fan_out", "groups")
_HEADER = ("module", "kind", "weight", "r", "scaling", "norm", "of base", "eff. rank", "parameters", "dtype")


def add(commands: Subparsers) -> None:
    """Enter the commands that look at adapters."""
    about = "show what an adapter trained, how large its updates are, and whether anything is wrong with it"
    example = "inspect adapter.safetensors --plot norms.png"
    parser = add_command(commands, run_inspect, "inspect", about, example, "--json", "--overwrite")
    add_adapter(parser, "file", "FILE")
    about = "draw the norms of the updates, layers x projections"
    parser.add_argument("--plot", type=path_argument, metavar="OUT.png", help=about)
    add_lora_alpha(parser)

    about = "compare two adapters; the exit code is 0 if they are the same function, and 1 if not"
    parser = add_command(commands, run_diff, "diff", about, "diff before.safetensors after.safetensors", "--json")
    for name in "AB":
        add_adapter(parser, name.lower(), name)
    about = "relative distance up to which updates are the same (default: 1e-6, a few roundings of float32)"
    parser.add_argument("--tolerance", type=number, default=1e-6, metavar="T", help=about)


def _finite(value: float) -> float | None:
    """The number, or None for what JSON has no word for."""
    return value if math.isfinite(value) else None


def _number(value: Any, absent: str = "?") -> str:
    return f"{value:.4g}" if is_number(value) else absent


# ---- inspect -------------------------------------------------------------------------------------------------------


def run_inspect(arguments: argparse.Namespace) -> int:
    """Look at an adapter; 1 if something is wrong with it."""
    if arguments.plot:
        check_output(arguments.plot, arguments.overwrite, [arguments.file])
    found = examine(_read(arguments.file, arguments.lora_alpha))
    if arguments.plot:
        heat_map({module["name"]: module["norm"] for module in found["modules"]}, arguments.plot)
    show(found, _inspected(found), arguments.json)
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
    base = settings.base if isinstance(settings.base, Base) else {}
    keys = [join(name, part) for part in settings.parameters]
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
        **{key: settings[key] for key in _SETTINGS if key in settings},
        "norm": _finite(norm),
        "relative_norm_estimate": _finite(norm / _size(base)) if measured else None,
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


def _inspected(found: Mapping[str, Any]) -> list[str]:
    kept = {*found["kept"]}
    lines = [f"format: {found['format']}, base model: {clipped(found['base_model'] or 'not said')}"]
    lines += table(_HEADER, [row for module in found["modules"] for row in _rows(module)]).split("\n")
    if any(module["relative_norm_estimate"] is not None for module in found["modules"]):
        lines.append("~: the base weight's norm is estimated from 16 of its values.")
    for tensor in found["trained_in_full"]:
        what = "kept of the base model" if tensor["name"] in kept else "trained in full"
        lines.append(f"{what}: {tensor['name']} {_shape(tensor['shape'])} {tensor['dtype']}")
    if found["sampled"]:
        lines.append(f"sampled of the base model: {found['sampled']} other tensors")
    lines.append(f"{len(found['modules'])} modules, {found['parameters']:,} parameters, {found['bytes']:,} bytes")
    return [*lines, *(f"problem: {clipped(problem)}" for problem in found["problems"])]


def _rows(module: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for the module, and one for each of its splits."""
    estimate = module["relative_norm_estimate"]
    of_base = "?" if estimate is None else f"~{100 * estimate:.2g} %"
    kind = f"{module['kind']}, DoRA" if module.get("use_dora") else str(module["kind"])  # whose g the norm leaves out
    r, scaling, norm, rank = (_number(module.get(key)) for key in ("r", "scaling", "norm", "effective_rank"))
    size = f"{module['parameters']:,}", module["dtype"]
    rows: list[tuple[str, ...]] = [
        (module["name"], kind, _shape(module["shape"]), r, scaling, norm, of_base, rank, *size)
    ]
    for block in module["blocks"]:
        if block["rows"]:
            name = "  rows {}:{}".format(*block["rows"])
            rows.append((name, "", "", "", "", _number(block["norm"]), "", _number(block["effective_rank"]), "", ""))
    return rows


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape)) if isinstance(shape, (list, tuple)) else "?"


# ---- diff ----------------------------------------------------------------------------------------------------------


def run_diff(arguments: argparse.Namespace) -> int:
    """Compare two adapters; 0 if they are the same function, 1 if not."""
    found = compare(read(arguments.a), read(arguments.b), arguments.tolerance)
    show(found, _compared(found), arguments.json)
    return 0 if found["same"] else 1


def compare(a: Adapter, b: Adapter, tolerance: float) -> dict[str, Any]:
    """All that `diff` says, as JSON can hold it."""
    shared = [name for name in a.modules if name in b.modules]
    modules = [_difference(a, b, name, tolerance) for name in progress(shared, "comparing")]
    theirs, ours = ({name: adapter.tensors[name] for name in adapter.trained_in_full} for adapter in (a, b))
    full = [_full(theirs.get(name), ours.get(name), name, tolerance) for name in theirs | ours]
    only = {"only_a": _only(a, b), "only_b": _only(b, a)}
    differs = any(entry["differs"] for entry in (*modules, *full, *only["only_a"], *only["only_b"]))
    return {"same": not differs, "tolerance": tolerance, **only, "modules": modules, "trained_in_full": full}


def _difference(a: Adapter, b: Adapter, name: str, tolerance: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "settings": dict(_differing(a.modules[name], b.modules[name]))}
    try:
        apart = distance(a, b, name)
    except ValueError as error:
        return {**entry, "differs": not _identical(a, b, name), "why": str(error)}
    share = relative(apart.distance, apart.norm_a)
    return {**entry, **asdict(apart), "relative_distance": _finite(share), "differs": share > tolerance}


def _identical(a: Adapter, b: Adapter, name: str) -> bool:
    """Whether modules that only their model understands are the same to the bit."""
    alike = a.modules[name] == b.modules[name]
    keys = [join(name, part) for part in a.modules[name].parameters]
    return alike and all(torch.equal(a.tensors[key], b.tensors[key]) for key in keys)


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    yield from ((key, [a.get(key), b.get(key)]) for key in _SETTINGS if a.get(key) != b.get(key))
    for key in _BASE:
        theirs, ours = a["base"].get(key), b["base"].get(key)
        if theirs != ours and theirs is not None and ours is not None:  # not every format knows the base
            yield f"base.{key}", [theirs, ours]


def _only(a: Adapter, b: Adapter) -> list[dict[str, Any]]:
    return [{"name": name, "differs": _is_update(a, name)} for name in a.modules if name not in b.modules]


def _is_update(adapter: Adapter, name: str) -> bool:
    """Whether a module that the other adapter lacks changes anything."""
    try:
        return any(block.norm > 0 for block in blocks(adapter, name))
    except ValueError:
        return True


def _full(theirs: Tensor | None, ours: Tensor | None, name: str, tolerance: float) -> dict[str, Any]:
    if theirs is None or ours is None:
        return {"name": name, "differs": True, "why": f"trained in full in {'B' if theirs is None else 'A'} only."}
    if theirs.shape != ours.shape:
        return {"name": name, "differs": True, "why": f"its shapes are {tuple(theirs.shape)} and {tuple(ours.shape)}."}
    apart = _apart(theirs.double(), ours.double())
    return {"name": name, "differs": not apart <= tolerance, "relative_distance": _finite(apart)}


def _apart(a: Tensor, b: Tensor) -> float:
    same = a == b  # infinities too, which have no difference
    return relative(float(torch.where(same, 0, a - b).norm()), float(torch.where(same & a.isinf(), 0, a).norm()))


def _compared(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"only in {side}: {entry['name']}" + ("" if entry["differs"] else " (its update is 0)")
        for side in "AB"
        for entry in found[f"only_{side.lower()}"]
    ]
    for entry in (*found["modules"], *found["trained_in_full"]):
        for key, (theirs, ours) in entry.get("settings", {}).items():
            lines.append(f"{entry['name']}: {key} is {_plainly(theirs)} in A and {_plainly(ours)} in B")
        if "why" in entry:
            lines.append(f"{entry['name']}: {entry['why']}")
    rows = [
        (
            entry["name"],
            _number(entry["relative_distance"], "-"),
            _number(entry.get("cosine"), "-"),
            _verdict(entry["differs"]),
        )
        for entry in (*found["modules"], *found["trained_in_full"])
        if "relative_distance" in entry
    ]
    if rows:
        lines += table(("module", "distance / norm of A", "cosine", ""), rows).split("\n")
    return [*lines, f"{_verdict(not found['same'])}, with a tolerance of {found['tolerance']:g}"]


def _plainly(value: Any) -> str:
    return clipped(value) if isinstance(value, str) else short(value)


def _verdict(differs: bool) -> str:
    return "different" if differs else "the same"


# ---- inspect --plot --------------------------------------------------------------------------------------------------


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
