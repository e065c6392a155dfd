"""`inspect`: what an adapter trained, how large it is, and whether it is sound."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora.adapters.adapter import Adapter, parameters_of
from lora.adapters.formats import read_adapter
from lora.arithmetic.distances import blocks
from lora.cli.options import (
    Subparsers,
    add_command,
    add_json,
    add_overwrite,
    check_output,
    finite,
    number,
    path_argument,
    print_json,
)
from lora.cli.plot import heat_map
from lora.cli.progress import progress
from lora.errors import join, table

# The kinds of layer that an adapter can be understood of without its model.
_KINDS = ("linear", "embedding", "conv")
_SETTINGS = (
    "r",
    "lora_alpha",
    "scaling",
    "use_rslora",
    "use_dora",
    "lora_dropout",
    "splits",
    "enable_lora",
    "factored",
)


def add(commands: Subparsers) -> None:
    """Enter the command."""
    about = "say what an adapter trained, how large its updates are, and whether anything is wrong with it"
    parser = add_command(commands, run, "inspect", about, "inspect adapter.safetensors --plot norms.png")
    parser.add_argument("file", type=path_argument, metavar="FILE", help="an adapter in any format")
    parser.add_argument(
        "--plot", type=path_argument, metavar="OUT.png", help="draw the updates' norms, layers x projections"
    )
    parser.add_argument(
        "--lora-alpha", type=number, metavar="X", help="lora_alpha of training, for loralib's files, which lack it"
    )
    add_json(parser)
    add_overwrite(parser)


def run(arguments: argparse.Namespace) -> int:
    """Look at an adapter; 1 if something is wrong with it."""
    if arguments.plot:
        check_output(arguments.plot, arguments.overwrite, [arguments.file])
    found = examine(_read(arguments.file, arguments.lora_alpha))
    if arguments.plot:
        heat_map({module["name"]: module["norm"] for module in found["modules"]}, arguments.plot)
    if arguments.json:
        print_json(found)
    else:
        print(_text(found))
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
            {"name": name, "shape": list(tensor.shape), "dtype": _dtype(tensor)} for name, tensor in full.items()
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
        "dtype": ", ".join(dict.fromkeys(map(_dtype, own.values()))),
        **{key: settings[key] for key in _SETTINGS if key in settings},
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


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
