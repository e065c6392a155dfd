"""`plan`: how much memory fine-tuning a model takes on each rank, by engine, before anything is loaded."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from lora.cli.options import Subparsers, add_command, add_json, path_argument, print_json
from lora.planning import ENGINES, TERMS, Decoder, Plan, Rank, Training, plan, read_decoder
from lora.planning.decoder import ARCHITECTURES
from lora.planning.engines import TITLES
from lora.planning.sharding import Layout
from lora.planning.terms import KEPT, LETTERS
from lora.planning.training import ADAPTER_DTYPES, BASE_DTYPES, OPTIMIZERS
from lora.report import table

_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_UNITS |= {f"{unit}ib": size for unit, size in _UNITS.items() if unit in "kmgt" and unit}
_UNITS |= {f"{unit}b": 1000**power for power, unit in enumerate("kmgt", 1)}
_UNIT_NAMES = {2**30: "GiB", 2**20: "MiB"}
_DEFAULTS = Training()


def add(commands: Subparsers) -> None:
    """Enter the command."""
    about = "say how much memory fine-tuning a model takes on each rank, by engine"
    parser = add_command(commands, run, "plan", about, "plan config.json --ranks 8 --tp 8 --memory 24GiB")
    parser.epilog = f"{parser.epilog}\n\n{_formulas()}"
    parser.add_argument(
        "config", type=path_argument, metavar="CONFIG", help=f"config.json of a {', '.join(ARCHITECTURES)} model"
    )
    _add_adapter(parser)
    _add_training(parser)
    _add_engines(parser)
    add_json(parser)


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapter")
    group.add_argument("--r", type=int, default=_DEFAULTS.r, help="rank of the updates (default: %(default)s)")
    group.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="layers to adapt, or all-linear: those in the blocks (default)",
    )
    group.add_argument("--use-dora", action="store_true", help="train a magnitude for each output")
    group.add_argument("--freeze-A", action="store_true", help="leave A as it starts (LoRA-FA)")
    group.add_argument("--split-fused", action="store_true", help="an update for each part of a fused projection")
    group.add_argument(
        "--adapter-dtype", choices=ADAPTER_DTYPES, default=_DEFAULTS.adapter_dtype, help="default: %(default)s"
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--base-dtype", choices=BASE_DTYPES, default=_DEFAULTS.base_dtype, help="default: %(default)s")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default=_DEFAULTS.optimizer, help="default: %(default)s")
    for name, about in (("batch_size", "rows that a rank computes at once"), ("seq_len", "tokens of a row")):
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=int, default=getattr(_DEFAULTS, name), help=f"{about} (default: %(default)s)")
    group.add_argument("--gradient-checkpointing", action="store_true", help="compute each block again in backward")
    group.add_argument("--fused-mlp", action="store_true", help="the MLP as one function, `lora_swiglu`")


def _add_engines(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engines")
    group.add_argument("--ranks", type=int, default=1, metavar="N", help="of DDP and FSDP2 (default: 1)")
    group.add_argument("--tp", type=int, default=1, metavar="N", help="ranks of tensor parallelism (default: 1)")
    group.add_argument("--loss-parallel", action="store_true", help="under TP the loss from logits that stay sharded")
    group.add_argument("--engine", nargs="+", choices=ENGINES, help="default: all that --ranks and --tp allow")
    group.add_argument(
        "--memory", type=size, metavar="SIZE", help="of a device, such as 24GiB: say which engine is the first to fit"
    )


def size(text: str) -> int:
    """A number of bytes; ValueError if it is none.

    >>> size("24GiB"), size("1.5 GB"), size("512")
    (25769803776, 1500000000, 512)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"must be a size such as 24GiB, 24GB or 500MiB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def run(arguments: argparse.Namespace) -> int:
    """Print the plans; 1 if none fits the memory that is given."""
    decoder, training = read_decoder(arguments.config), _training(arguments)
    plans = [plan(decoder, training, engine) for engine in arguments.engine or _allowed(training)]
    if arguments.engine and all(made.problems for made in plans):
        listed = "\n".join(f"  - {made.title}: {problem}" for made in plans for problem in made.problems)
        raise ValueError(f"there is no plan, because\n{listed}")
    fitting = next((made for made in plans if made.terms and made.total <= (arguments.memory or 0)), None)
    if arguments.json:
        print_json(_content(decoder, training, plans, arguments.memory, fitting))
    else:
        print(_text(decoder, training, plans, arguments.memory, fitting))
    return 1 if arguments.memory is not None and fitting is None else 0


def _training(arguments: argparse.Namespace) -> Training:
    wanted = {name.name: getattr(arguments, name.name) for name in fields(Training)}
    names = tuple(arguments.target_modules)
    return Training(**wanted | {"target_modules": "all-linear" if names == ("all-linear",) else names})


def _allowed(training: Training) -> list[str]:
    """The engines that have as many ranks as they need."""
    enough = {"ranks": training.ranks > 1, "tp": training.tp > 1}
    return [name for name in ENGINES if all(there for what, there in enough.items() if f"{{{what}}}" in TITLES[name])]


def _content(
    decoder: Decoder, training: Training, plans: Sequence[Plan], memory: int | None, fitting: Plan | None
) -> dict[str, Any]:
    """All that `plan` says, as JSON can hold it."""
    return {
        "model_type": decoder.model_type,
        "parameters": _parameters(decoder, training),
        "training": asdict(training),
        "engines": [
            {
                "engine": made.engine,
                "processes": made.processes,
                "problems": list(made.problems),
                "bytes": made.terms,
                "total": made.total if made.terms else None,
            }
            for made in plans
        ],
        "memory": memory,
        "fits": fitting.engine if fitting else None,
    }


def _parameters(decoder: Decoder, training: Training) -> dict[str, int]:
    """How many values the model has, the adapters have, and train."""
    found = Rank(decoder, training, Layout()).tensors
    wanted = {
        "base": [tensor for tensor in found if not tensor.adapter],
        "adapters": [tensor for tensor in found if tensor.adapter],
        "trained": [tensor for tensor in found if tensor.trains],
    }
    return {name: sum(t.times * t.values(Layout()) for t in kept) for name, kept in wanted.items()}


# ---- as a text ---------------------------------------------------------------------------------------------------


def _text(decoder: Decoder, training: Training, plans: Sequence[Plan], memory: int | None, fitting: Plan | None) -> str:
    counts = _parameters(decoder, training)
    unit = 2**30 if max((made.total for made in plans if made.terms), default=0) >= 2**32 else 2**20
    checkpointing = "with" if training.gradient_checkpointing else "without"
    lines = [
        f"{decoder.model_type}: {decoder.blocks} blocks, {counts['base']:,} parameters in {training.base_dtype}, "
        f"{counts['adapters']:,} in adapters of r = {training.r} in {training.adapter_dtype}, of which "
        f"{counts['trained']:,} train",
        f"{training.batch_size} × {training.seq_len:,} tokens on each rank, {checkpointing} gradient checkpointing, "
        f"{training.optimizer}",
        "",
        table((f"{_UNIT_NAMES[unit]} on each rank", *(made.title for made in plans)), _rows(plans, unit)),
        "",
        "( ): not there at the peak, and not counted. Beyond this: the libraries, fragments of the allocator.",
    ]
    lines += [f"{made.title}: {problem}" for made in plans for problem in made.problems]
    if memory is not None:
        lines.append(_decision(training, plans, memory, fitting, unit))
    return "\n".join(lines)


def _rows(plans: Sequence[Plan], unit: int) -> list[list[str]]:
    rows = [[term.name, *(_cell(made, term.name, unit) for made in plans)] for term in TERMS]
    shown = [row for row in rows if any(made.terms.get(row[0]) for made in plans)]
    totals = ["total", *(number(made.total, unit) if made.terms else "–" for made in plans)]
    widths = [
        max(map(len, column)) for column in zip(["", *(made.title for made in plans)], *shown, totals, strict=True)
    ]
    return [[row[0], *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in [*shown, totals]]


def _cell(made: Plan, name: str, unit: int) -> str:
    if not made.terms:
        return "–"
    count = number(made.terms[name], unit)
    return count if name in made.counted else f"({count})"


def number(count: int, unit: int) -> str:
    """Bytes in a unit.

    >>> number(3 * 2**30, 2**30), number(2**20, 2**20)
    ('3.000', '1.0')
    """
    return f"{count / unit:,.{3 if unit == 2**30 else 1}f}"


def _decision(training: Training, plans: Sequence[Plan], memory: int, fitting: Plan | None, unit: int) -> str:
    def said(count: int) -> str:
        return f"{number(count, unit)} {_UNIT_NAMES[unit]}"

    if fitting:
        return f"the first that fits in {said(memory)}: {fitting.title}, with {said(fitting.total)} on each rank"
    possible = [made for made in plans if made.terms]
    if not possible:
        return f"none fits in {said(memory)}: there is no plan"
    least = min(possible, key=lambda made: made.total)
    less = ["more ranks", "a shorter --seq-len"]
    less += ["--gradient-checkpointing"] * (not training.gradient_checkpointing)
    less += ["--base-dtype nf4"] * (training.base_dtype != "nf4")
    return (
        f"none fits in {said(memory)}; the least is {least.title}, with {said(least.total)} on each rank\n"
        f"less is taken with {', '.join(less)}"
    )


def _formulas() -> str:
    """All terms with their formulas."""
    lines = []
    for title, terms in {"bytes on each rank:": TERMS, "block, for each token of T:": KEPT}.items():
        lines += [title, *(f"  {term.name}: {term.formula}" for term in terms)]
    known = {name: dtype.formula for name, dtype in BASE_DTYPES.items()}
    lines += ["base weights, for each value:", *(f"  {name}: {formula}" for name, formula in known.items())]
    known = {name: optimizer.formula for name, optimizer in OPTIMIZERS.items()}
    lines += ["optimizer state, for each value:", *(f"  {name}: {formula}" for name, formula in known.items())]
    return "\n".join([*lines, LETTERS])
