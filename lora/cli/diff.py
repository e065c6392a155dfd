"""`diff`: how far apart the functions of two adapters are."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lora.adapters.adapter import Adapter, parameters_of
from lora.arithmetic.distances import blocks, distance, relative
from lora.cli import SETTINGS, Subparsers, add_adapter, add_command, finite, number, progress, read, show
from lora.errors import join, table

_BASE = ("kind", "shape", "dtype", "fan_in_fan_out", "groups")


def add(commands: Subparsers) -> None:
    """Enter the command."""
    about = "compare two adapters; the exit code is 0 if they are the same function, and 1 if not"
    parser = add_command(commands, run, "diff", about, "diff before.safetensors after.safetensors", "--json")
    for name in "AB":
        add_adapter(parser, name.lower(), name)
    about = "relative distance up to which updates are the same (default: 1e-6, a few roundings of float32)"
    parser.add_argument("--tolerance", type=number, default=1e-6, metavar="T", help=about)


def run(arguments: argparse.Namespace) -> int:
    """Compare two adapters; 0 if they are the same function, 1 if not."""
    found = compare(read(arguments.a), read(arguments.b), arguments.tolerance)
    show(found, _text(found), arguments.json)
    return 0 if found["same"] else 1


def compare(a: Adapter, b: Adapter, tolerance: float) -> dict[str, Any]:
    """All that `diff` says, as JSON can hold it."""
    shared = [name for name in a.modules if name in b.modules]
    modules = [_module(a, b, name, tolerance) for name in progress(shared, "comparing")]
    full = [_full(a, b, name, tolerance) for name in dict.fromkeys((*a.trained_in_full, *b.trained_in_full))]
    only = {"only_a": _only(a, b), "only_b": _only(b, a)}
    differs = any(entry["differs"] for entry in (*modules, *full, *only["only_a"], *only["only_b"]))
    return {"same": not differs, "tolerance": tolerance, **only, "modules": modules, "trained_in_full": full}


def _module(a: Adapter, b: Adapter, name: str, tolerance: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "settings": dict(_differing(a.modules[name], b.modules[name]))}
    try:
        apart = distance(a, b, name)
    except ValueError as error:
        return {**entry, "differs": not _identical(a, b, name), "why": str(error)}
    return {
        **entry,
        "norm_a": apart.norm_a,
        "norm_b": apart.norm_b,
        "distance": apart.distance,
        "relative_distance": finite(apart.relative),
        "cosine": apart.cosine,
        "differs": apart.relative > tolerance,
    }


def _identical(a: Adapter, b: Adapter, name: str) -> bool:
    """Whether modules that only their model understands are the same to the bit."""
    alike = a.modules[name] == b.modules[name]
    keys = [join(name, part) for part in parameters_of(a.modules[name])]
    return alike and all(torch.equal(a.tensors[key], b.tensors[key]) for key in keys)


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    yield from ((key, [a.get(key), b.get(key)]) for key in SETTINGS if a.get(key) != b.get(key))
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


def _full(a: Adapter, b: Adapter, name: str, tolerance: float) -> dict[str, Any]:
    theirs, ours = (adapter.tensors[name] if name in adapter.trained_in_full else None for adapter in (a, b))
    if theirs is None or ours is None:
        return {"name": name, "differs": True, "why": f"trained in full in {'B' if theirs is None else 'A'} only."}
    if theirs.shape != ours.shape:
        return {"name": name, "differs": True, "why": f"its shapes are {tuple(theirs.shape)} and {tuple(ours.shape)}."}
    apart = _apart(theirs.double(), ours.double())
    return {"name": name, "differs": not apart <= tolerance, "relative_distance": finite(apart)}


def _apart(a: Tensor, b: Tensor) -> float:
    same = a == b  # infinities too, which have no difference
    return relative(float(torch.where(same, 0, a - b).norm()), float(torch.where(same & a.isinf(), 0, a).norm()))


# ---- as a text ---------------------------------------------------------------------------------------------------


def _text(found: Mapping[str, Any]) -> str:
    lines = []
    for side in ("a", "b"):
        for entry in found[f"only_{side}"]:
            lines.append(
                f"only in {side.upper()}: {entry['name']}" + ("" if entry["differs"] else " (its update is 0)")
            )
    for entry in (*found["modules"], *found["trained_in_full"]):
        for key, (theirs, ours) in entry.get("settings", {}).items():
            lines.append(f"{entry['name']}: {key} is {theirs} in A and {ours} in B")
        if "why" in entry:
            lines.append(f"{entry['name']}: {entry['why']}")
    rows = [
        (entry["name"], _number(entry["relative_distance"]), _number(entry.get("cosine")), _word(entry["differs"]))
        for entry in (*found["modules"], *found["trained_in_full"])
        if "relative_distance" in entry
    ]
    if rows:
        lines.append(table(("module", "distance / norm of A", "cosine", ""), rows))
    lines.append(f"{_word(not found['same'])}, with a tolerance of {found['tolerance']:g}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _word(differs: bool) -> str:
    return "different" if differs else "the same"
