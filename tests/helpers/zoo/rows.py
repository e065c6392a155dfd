"""What a row of the zoo is: a tiny model with random weights, what goes in, and what is known of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

#: Faults of PEFT's.
DEAD = "PEFT's LoRA stands beside a layer's forward, and does nothing where its parent reads the weight instead"
REWRITTEN = "PEFT takes gate_proj, up_proj and down_proj of such models for parts of their experts, wherever they are"

REFUSED = "PEFT adapts no projection that Mamba's kernels might be given"


def in_peft(why: str) -> dict[str, str]:
    return {"goes_to_peft": why, "comes_from_peft": why}


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        make: builds the model. What it needs is imported there, so that the table costs nothing.
        inputs: makes what goes into its forward.
        targets: what is adapted.
        train: whether it is looked at as it trains: its forward is another one then.
        unused: the adapters that this architecture does not use, or whose gradient is zero, as a regular expression of
            their names.
        faults: by the name of a check, why it fails. A check that does not fail then fails the test.
        settings: further settings of `inject`.
        dtype: float32 where the model can have no other.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    targets: Any = "all-linear"
    train: bool = False
    unused: str = ""
    faults: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64


def config(name: str, /, **settings: Any) -> Callable[[], Any]:
    """A config of transformers', made when it is needed."""

    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**{key: now(value) for key, value in settings.items()})

    return make


def now(value: Any) -> Any:
    return value() if callable(value) else value


def of(name: str, inputs: Callable[[], dict[str, Any]], /, config_name: str = "", **settings: Any) -> Row:
    """A row for a class of transformers', whose config's name is its own but for what it is for, and its settings."""
    about = {one.name: settings.pop(one.name) for one in fields(Row) if one.name in settings}
    family = re.split(r"For[A-Z]|Model$|ModelWith|LMHead|WithLM|MTModel", name)[0]
    configuration = config(config_name or f"{family}Config", **settings)

    def make() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, name)(configuration())
        return made

    return Row(make, inputs, **about)


# ---- what goes in -----------------------------------------------------------------------------------------------


def random(*shape: int) -> Tensor:
    """Random numbers, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ids(*shape: int) -> Tensor:
    """Random ids of words, always the same."""
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(1))


def words() -> dict[str, Tensor]:
    return {"input_ids": ids(2, 6)}


def words_twice() -> dict[str, Tensor]:
    return {"input_ids": ids(2, 6), "decoder_input_ids": ids(2, 4)}


def image(*shape: int, **others: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    """Pixels of a shape, and more."""
    return lambda: {"pixel_values": random(*shape), **{name: make() for name, make in others.items()}}


def sound() -> dict[str, Tensor]:
    return {"input_values": random(2, 1000)}
