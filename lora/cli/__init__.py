"""The commands of `python -m lora`, a file for each few, and what they share: options, reading, output, JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from lora.adapters.adapter import Adapter
from lora.adapters.formats import FORMATS, place_of, read_adapter, write_adapter
from lora.adapters.paths import as_path, check_place, kind
from lora.errors import AdapterError, clipped, is_number, visible

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
T = TypeVar("T")
_FLAGS: dict[str, dict[str, Any]] = {
    "--json": {"action": "store_true", "help": "print JSON and nothing else"},
    "--overwrite": {"action": "store_true", "help": "replace what is there"},
    "--no-check-base": {
        "dest": "check_base",
        "action": "store_false",
        "help": "do not check, by sampled values, that the base weights are the same",
    },
}
# What the library's errors advise, and what it is called here.
_ADVICE = {"`check_base=False`": "`--no-check-base`", "give `lora_alpha`,": "give `--lora-alpha`,"}
_BAR = 30  # characters
_LONGEST_LINE = 10_000


# ---- arguments -----------------------------------------------------------------------------------------------------


def add_command(
    commands: Subparsers, run: Callable[[argparse.Namespace], int], name: str, about: str, example: str, *flags: str
) -> argparse.ArgumentParser:
    """Enter a command, which `run` does, whose help has an example, and which has these of the shared flags."""
    parser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"example:\n  python -m lora {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    for flag in flags:
        parser.add_argument(flag, **_FLAGS[flag])
    return parser


def add_adapter(parser: argparse.ArgumentParser, name: str, metavar: str) -> None:
    """Enter an argument that names an adapter."""
    parser.add_argument(name, type=path_argument, metavar=metavar, help="an adapter in any format")


def add_output(parser: argparse.ArgumentParser, **format: Any) -> None:
    """Enter where to write an adapter, and in which format."""
    parser.add_argument("out", metavar="OUT", help="a file or a folder for the format lora, a folder for the others")
    about = (
        "lora: one file; peft: PEFT's folder; portable: the same with one rank for all and scaling 1; diffusers: the "
        "folder of its pytorch_lora_weights.safetensors"
    )
    writable = [name for name, entry in FORMATS.items() if entry.write is not None]
    parser.add_argument("--format", choices=writable, help=about, **format)


def add_lora_alpha(parser: argparse.ArgumentParser) -> None:
    """Enter what the user says of an adapter whose file does not."""
    about = "the lora_alpha of training, where the file does not say it"
    parser.add_argument("--lora-alpha", type=number, metavar="X", help=about)


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


# ---- adapters in and out -------------------------------------------------------------------------------------------


def read(path: Path, lora_alpha: float | None = None) -> Adapter:
    """`lora.read_adapter`, for commands that need the updates, which of a loralib file only its model knows."""
    try:
        return read_adapter(path, lora_alpha=lora_alpha)
    except TypeError as error:  # a `lora_alpha` that the file says
        raise ValueError(str(error)) from None
    except AdapterError:
        with suppress(TypeError):  # of another format
            format = read_adapter(path, lora_alpha=1).format  # raises what else is wrong
            raise AdapterError(
                f"{path} is a file of loralib's, which says neither lora_alpha nor what kinds of layers it is for: "
                "load it into its model in Python first (`lora.load_adapter(model, path, lora_alpha=X)`), and save it "
                "from there (`lora.save_adapter(model, new_path)`)."
                if format == "loralib"
                else f"{path} has no scaling: give the one of training with `lora convert {path} NEW --format lora "
                "--lora-alpha X`."
            ) from None
        raise


def output(arguments: argparse.Namespace, inputs: Sequence[Path]) -> Path:
    """Where `arguments.out` is written in `arguments.format`, checked by `check_output`."""
    out = place_of(arguments.out, arguments.format)
    check_output(out, arguments.overwrite, inputs, "file" if arguments.format == "lora" else "folder")
    return out


def check_output(out: Path, overwrite: bool, inputs: Sequence[Path], wanted: str = "file") -> None:
    """OSError or ValueError if the file or folder `out` cannot be written, or must not replace what is there."""
    whole = Path(os.path.realpath(out))
    files = {file for format in FORMATS.values() for file in format.files}
    for given in inputs:
        real = Path(os.path.realpath(given))
        if whole in (real, *real.parents, *(Path(os.path.realpath(real / name)) for name in files)):
            raise ValueError(f"{out} must not be an input, hold one or be inside one: {given}.")
    check_place(out, wanted)
    if kind(out) and not overwrite:
        raise FileExistsError(f"{out} exists; --overwrite replaces it.")


def write(adapter: Adapter, out: Path, format: str) -> str:
    """Write to `out`, and say what was written, in a line."""
    write_adapter(adapter, out, format)
    ranks = sorted({module.r for module in adapter.modules.values()})
    return f"{out}: {len(adapter.modules)} modules, r = {', '.join(map(str, ranks))}"


# ---- what is said --------------------------------------------------------------------------------------------------


def in_options(message: str) -> str:
    """An error of the library's, whose advice is in arguments of functions, in the words of the command line.

    >>> in_options("`check_base=False` loads it all the same.")
    '`--no-check-base` loads it all the same.'
    """
    for argument, option in _ADVICE.items():
        message = message.replace(argument, option)
    return message


def show(found: dict[str, Any], lines: Iterable[str], as_json: bool) -> None:
    """Print what a command found, as lines or as JSON."""
    if as_json:
        print(json.dumps(_as_json(found), indent=2, allow_nan=False))
    else:
        say(lines)


def say(lines: Iterable[str]) -> None:
    """Print lines, in which nothing of a file's reaches the terminal but what can be seen."""
    for line in lines:
        print(clipped(visible(line), _LONGEST_LINE))


def _as_json(value: Any) -> Any:
    """A value for JSON: a number that JSON has no word for is None, and so is an integer of very many digits."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(part) for part in value]
    if isinstance(value, (int, float)) and not is_number(value):
        return value if isinstance(value, bool) else None
    return value


def dtype_word(dtype: torch.dtype) -> str:
    """A dtype without the word torch.

    >>> dtype_word(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def progress(items: Collection[T], what: str) -> Iterator[T]:
    """The items one by one, with a bar on stderr that counts them; without it if stderr is no terminal.

    >>> list(progress([1, 2], "counting"))
    [1, 2]
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield from items
        return
    try:
        for done, item in enumerate(items):
            filled = _BAR * done // len(items)
            print(f"\r{what} [{'#' * filled:{_BAR}}] {done}/{len(items)}", end="", file=sys.stderr, flush=True)
            yield item
    finally:  # the line is empty again, whatever ended the work
        print(f"\r{' ' * (len(what) + _BAR + 24)}\r", end="", file=sys.stderr, flush=True)
