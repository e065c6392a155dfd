"""`convert`, `combine` and `resize`: adapters made of adapters."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lora.adapters.paths import as_path
from lora.arithmetic import combine, resize
from lora.arithmetic.algebra import METHODS
from lora.cli import (
    Subparsers,
    add_adapter,
    add_command,
    add_lora_alpha,
    add_output,
    number,
    output,
    progress,
    read,
    say,
    write,
)
from lora.errors import short, table


def add(commands: Subparsers) -> None:
    """Enter the commands that write adapters."""
    about, example = "write an adapter in another format", "convert adapter.safetensors folder --format peft"
    parser = add_command(commands, run_convert, "convert", about, example, "--overwrite")
    add_adapter(parser, "file", "IN")
    add_output(parser, required=True)
    add_lora_alpha(parser)

    about = "add up adapters, each with a weight"
    example = "combine both.safetensors one.safetensors=0.7 two.safetensors=0.3 --method svd --r 16"
    parser = add_command(commands, run_combine, "combine", about, example, "--no-check-base", "--overwrite")
    add_output(parser, default="lora")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER[=WEIGHT]", help="an adapter, and its weight if not 1")
    about = "how to add up, as help(lora.combine) explains (default: cat)"
    parser.add_argument("--method", choices=[*METHODS], default="cat", help=about)
    parser.add_argument("--r", type=int, metavar="R", help="rank of the result, for svd, ties and dare")
    about = "share of values that ties and dare keep (default: 0.5)"
    parser.add_argument("--density", type=number, default=0.5, metavar="D", help=about)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of dare (default: 0)")

    about, example = "write an adapter at another rank", "resize adapter.safetensors small.safetensors --r 8"
    parser = add_command(commands, run_resize, "resize", about, example, "--overwrite")
    add_adapter(parser, "file", "IN")
    add_output(parser, default="lora")
    rank = parser.add_mutually_exclusive_group(required=True)
    rank.add_argument("--r", type=int, metavar="R", help="the rank of every module")
    about = "the smallest rank of each module that keeps this share of its squared norm"
    rank.add_argument("--energy", type=number, metavar="E", help=about)


def run_convert(arguments: argparse.Namespace) -> int:
    """Write an adapter in another format."""
    out = output(arguments, [arguments.file])
    say([write(read(arguments.file, arguments.lora_alpha), out, arguments.format)])
    return 0


def run_combine(arguments: argparse.Namespace) -> int:
    """Write the weighted sum of adapters."""
    weighted = [_weighted(text) for text in arguments.adapters]
    out = output(arguments, [path for path, _ in weighted])
    adapters = [(read(path), weight) for path, weight in progress(weighted, "reading")]
    how = {key: getattr(arguments, key) for key in ("r", "density", "seed", "check_base")}
    say([write(combine(adapters, arguments.method, **how), out, arguments.format)])
    return 0


def run_resize(arguments: argparse.Namespace) -> int:
    """Write an adapter at another rank, and say what it keeps."""
    out = output(arguments, [arguments.file])
    before = read(arguments.file)
    after, kept = resize(before, arguments.r, energy=arguments.energy)
    written = write(after, out, arguments.format)
    rows = [
        (name, before.modules[name].r, after.modules[name].r, f"{100 * share:.2f} %") for name, share in kept.items()
    ]
    say([*table(("module", "r", "new r", "energy kept"), rows).split("\n"), written])
    return 0


def _weighted(text: str) -> tuple[Path, float]:
    """`ADAPTER=WEIGHT` taken apart; a path may hold an equals sign itself."""
    path, equals, weight = text.rpartition("=")
    if not equals or os.path.exists(text):
        return as_path(text, "ADAPTER"), 1.0
    adapter = as_path(path, "ADAPTER")
    try:
        return adapter, number(weight)
    except ValueError:
        raise ValueError(f"the weight of {path} must be a finite number, got {short(weight)}.") from None
