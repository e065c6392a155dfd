"""How A and B start: the names of all ways, and those that need nothing but a layer's shapes, as functions of it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lora.functional.fused import exact_dtype

Layer = Any  # a LoRALayer, whose file imports this one

#: True, False, a name, or a function of a layer that writes its `lora_A` and `lora_B`.
Init = bool | str | Callable[[Layer], Any]

# Those that need the base weight, which `lora.inject` and `lora.initialize` know, and a constructor does not.
OF_WEIGHT = ("pissa", "pissa_niter_[n]", "olora")
# Those that need data: `lora.calibrate` runs them.
OF_DATA = ("eva", "lora_ga", "corda")
# Those that need the weight as it was before it was quantised.
OF_ORIGINAL = ("loftq",)

_NITER = re.compile(r"pissa_niter_([0-9]{1,4})")


def kaiming(layer: Layer) -> None:
    """The kind's own: A ~ kaiming uniform (a = √5) and B = 0; for embeddings A = 0 and B ~ N(0, 1)."""
    layer.reset_lora_parameters()


def random(layer: Layer) -> None:
    """A and B both random, so that the layer does not start as its base: for tests."""
    for factor in (layer.lora_A, layer.lora_B):
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


def gaussian(layer: Layer) -> None:
    """A ~ N(0, 1/r²) and B = 0; embeddings as by default, as in PEFT."""
    layer.reset_lora_parameters()
    if layer.lora_starts_at_zero == "lora_B":
        nn.init.normal_(layer.lora_A, std=1 / layer.r)


@torch.no_grad()
def orthogonal(layer: Layer) -> None:
    """A and B random and not zero, with B A = 0 to rounding: A from the odd rows of an orthogonal Q, B from the even.

        A = R_a Q_odd / 10,  B = R_b Q_even / 10        R ~ N(0, 1)

    ValueError if the rank of a block (of a split, of a group) is odd.
    """
    problem = odd_problem(layer)
    if problem:
        raise ValueError(problem)
    q = layer.lora_block_rank()
    columns = layer.lora_flat(layer.lora_A, layer.lora_B)[0].shape[1]
    As, Bs = [], []
    for size in layer.lora_block_rows():
        Q = torch.linalg.qr(_randn(layer, q, q))[0]
        As.append(Q[0::2].T @ _randn(layer, q // 2, columns) / 10)  # (q, columns)
        Bs.append(_randn(layer, size, q // 2) @ Q[1::2] / 10)  # (size, q)
    layer.lora_A.copy_(torch.cat(As).view_as(layer.lora_A))
    layer.lora_B.copy_(torch.cat(Bs).view_as(layer.lora_B))


def odd_problem(layer: Layer) -> str | None:
    """What is wrong with a rank for "orthogonal"; None if nothing is."""
    q = layer.lora_block_rank()
    return f"`r` must be even, for each group, when `init_lora_weights='orthogonal'`, got {q}." if q % 2 else None


def _randn(layer: Layer, rows: int, columns: int) -> Tensor:
    dtype = exact_dtype(layer.lora_A.dtype)
    return torch.randn(rows, columns, device=layer.lora_A.device, dtype=dtype)


# PEFT's names.
OF_SHAPE: dict[bool | str, Callable[[Layer], None]] = {
    True: kaiming,
    False: random,
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
}


def needs_more(init: Init) -> bool:
    """Whether A and B cannot start so before the base weight, or data, are known."""
    return isinstance(init, str) and init not in OF_SHAPE


def niter_of(init: str) -> int | None:
    """n of "pissa_niter_[n]"; None for other names."""
    match = _NITER.fullmatch(init)
    return int(match[1]) if match else None


def init_problem(init: object) -> str | None:
    """What is wrong with a choice of initialiser; None if nothing is."""
    if isinstance(init, bool) or (callable(init) and not isinstance(init, type)):
        return None
    names = [*(name for name in OF_SHAPE if isinstance(name, str)), *OF_WEIGHT, *OF_DATA, *OF_ORIGINAL]
    if isinstance(init, str) and (init in names or niter_of(init) is not None) and init != "pissa_niter_[n]":
        return None
    close = difflib.get_close_matches(init, names, n=1) if isinstance(init, str) else []
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    listed = ", ".join(map(repr, names))
    return f"`init_lora_weights` must be a bool, a function of a layer, or one of {listed}, got {init!r}{hint}."


def constructor_problem(init: object) -> str | None:
    """What is wrong with a choice of initialiser where the pretrained weight is not there yet; None if nothing is."""
    problem = init_problem(init)
    if problem is None and isinstance(init, str) and needs_more(init) and init not in OF_DATA:
        return f"`init_lora_weights={init!r}` needs the pretrained weight: load it, then call `lora.initialize`."
    return problem


def from_shapes(layer: Layer, init: Init) -> None:
    """Write `lora_A` and `lora_B`; as by default where the way needs more than the layer's shapes."""
    if needs_more(init):
        layer.reset_lora_parameters()
    elif isinstance(init, (bool, str)):
        OF_SHAPE[init](layer)
    else:
        with torch.no_grad():
            init(layer)
