"""What the commands share: how they enter the parser, read adapters, look after their output, and print JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora.adapters.adapter import Adapter
from lora.adapters.files import as_path, check_place, kind
from lora.adapters.formats import FORMATS, place_of, read_adapter, write_adapter
from lora.errors import AdapterError

if TYPE_CHECKING:  # generic for type checkers only
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = argparse._SubParsersAction

Run = Callable[[argparse.Namespace], int]
# What the library's errors advise, and what it is called here.
_ADVICE = {"`check_base=False`": "`--no-check-base`", "give `lora_alpha`,": "give `--lora-alpha`,"}


def add_command(commands: Subparsers, run: Run, name: str, about: str, example: str) -> argparse.ArgumentParser:
    """Enter a command, which `run` does and whose help has an example."""
    parser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"example:\n  python -m lora {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json"""
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """--overwrite"""
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def add_check_base(parser: argparse.ArgumentParser) -> None:
    """--no-check-base"""
    parser.add_argument(
        "--no-check-base",
        dest="check_base",
        action="store_false",
        help="do not compare sampled values of the base weights with those that the adapter remembers",
    )


def add_format(parser: argparse.ArgumentParser, **options: Any) -> None:
    """--format"""
    about = "lora: one file; peft: PEFT's folder; portable: that with one rank and scaling 1"
    parser.add_argument(
        "--format", choices=[name for name, entry in FORMATS.items() if entry.write is not None], help=about, **options
    )


def path_argument(text: str) -> Path:
    """A path; ArgumentTypeError if it is empty, as unset variables of a shell are."""
    try:
        return as_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).replace("`path` ", "")) from None


def number(text: str) -> float:
    """A finite number; ValueError otherwise.

    >>> number("0.5")
    0.5
    """
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {text}")
    return value


def read(path: Path) -> Adapter:
    """`lora.read_adapter`, for commands that work with the updates: of loralib's files only the model knows them."""
    try:
        return read_adapter(path)
    except AdapterError:
        with suppress(TypeError):  # of another format
            read_adapter(path, lora_alpha=1)  # raises what else is wrong
            raise AdapterError(
                f"{path} is a file of loralib's, which says neither lora_alpha nor what kinds of layers it is for: "
                "load it into its model in Python first (`lora.load_adapter(model, path, lora_alpha=X)`), and save it "
                "from there (`lora.save_adapter(model, new_path)`)."
            ) from None
        raise


def in_options(message: str) -> str:
    """An error of the library's, whose advice is in arguments of functions, in the words of the command line.

    >>> in_options("`check_base=False` loads it all the same.")
    '`--no-check-base` loads it all the same.'
    """
    for argument, option in _ADVICE.items():
        message = message.replace(argument, option)
    return message


def output(arguments: argparse.Namespace, inputs: Sequence[Path]) -> Path:
    """Where `arguments.out` is written in `arguments.format`, checked by `check_output`."""
    out = place_of(arguments.out, arguments.format)
    check_output(out, arguments.overwrite, inputs, "file" if arguments.format == "lora" else "folder")
    return out


def write(adapter: Adapter, out: Path, format: str) -> str:
    """Write to `out`, and say what was written, in a line."""
    write_adapter(adapter, out, format)
    ranks = sorted({settings["r"] for settings in adapter.modules.values()})
    return f"{out}: {len(adapter.modules)} modules, r = {', '.join(map(str, ranks))}"


def check_output(out: Path, overwrite: bool, inputs: Sequence[Path], wanted: str = "file") -> None:
    """OSError or ValueError if the file or folder `out` cannot be written, or would replace what is not to be."""
    whole = Path(os.path.realpath(out))
    files = {file for format in FORMATS.values() for file in format.files}
    for given in inputs:
        real = Path(os.path.realpath(given))
        if whole in (real, *real.parents, *(Path(os.path.realpath(real / name)) for name in files)):
            raise ValueError(f"{out} must not be an input, or hold one, or be in one: {given}.")
    check_place(out, wanted)
    if kind(out) and not overwrite:
        raise FileExistsError(f"{out} exists; --overwrite replaces it.")


def finite(value: float) -> float | None:
    """The number, or None for what JSON has no word for.

    >>> finite(1.5), finite(float("nan"))
    (1.5, None)
    """
    return value if math.isfinite(value) else None


def print_json(content: object) -> None:
    """On stdout, which then holds nothing else."""
    print(json.dumps(content, indent=2, allow_nan=False))
