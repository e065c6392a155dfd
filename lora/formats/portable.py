"""Adapters in the form that every library reads: one pair for each module, all of one rank, with a scaling of 1."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lora.adapters.adapter import Adapter, Form, ModuleAdapter
from lora.errors import AdapterError, Problems, join, raise_all
from lora.functional.fused import exact_dtype
from lora.models.blocks import at_block_rank

_MOST_TIMES, _FEW_VALUES = 64, 2**22  # by how much a form may be larger than the one that it is made of


def singles(adapter: Adapter, what: str) -> dict[str, Form]:
    """Every module of the adapter as a single pair; AdapterError that lists all that cannot be."""
    forms: dict[str, Form] = {}
    before = after = 0
    with Problems(what, AdapterError) as problems:
        for name, settings in adapter.modules.items():
            with problems.at(name):
                pair = adapter.pair(name)
                before += sum(tensor.numel() for tensor in pair)
                after += _values(settings, *pair)
        check_growth(before, after, problems)
        problems.raise_any()
        for name, settings in adapter.modules.items():
            with problems.at(name):
                forms[name] = settings.single(*adapter.pair(name))
    return forms


def check_growth(before: int, after: int, problems: Problems, more: str = "") -> None:
    """Note a problem if a form of an adapter has very many more values than the one that it is made of.

    Three splits in one pair are up to 3 times as many, and a rank of 8 at one of 128 is 16 times as many.
    """
    if after > _MOST_TIMES * before + _FEW_VALUES:
        problems.add(
            f"it would have {after} values{more}, and has {before}: more than {_MOST_TIMES} times as many are not made."
        )


def _values(settings: ModuleAdapter, A: Tensor, B: Tensor) -> int:
    """How many values a module's single pair has in PEFT's form, by its settings, which need not fit A and B."""
    groups, kernel = settings.base.groups, (settings.base.shape or ())[2:]
    of_A, of_B = A.numel(), B.numel()
    if settings.splits is not None:
        of_B = max(of_B, sum(settings.splits) * A.shape[0])
    elif settings.factored is False and kernel:
        of_A *= (groups * kernel[0] ** (len(kernel) // 2)) ** 2
        of_B *= groups**2
    return of_A * groups + of_B  # kernels for the channels of other groups, too


def portable(adapter: Adapter, function: str = "write_adapter") -> Adapter:
    """The same adapter with one rank for all modules, and a scaling of 1 that every reader agrees on.

    Each scaling is folded into B, and A and B are padded with zeros to the largest rank: r = lora_alpha = that rank.
    B is float32 at least, so that folding rounds no further than float32 does. The base weight that PEFT saves beside
    every adapted embedding is left out.

    Raises:
        AdapterError: something trains in full, or is a part of the base model that its files lack (rows that were
            added, buffers that moved), for which the form has no place; or a kind of layer is a user's own.
    """
    what = f"{function}: the adapter has no portable form"
    dora = [name for name, settings in adapter.modules.items() if settings.use_dora]
    problems = [f"{name} has a magnitude (DoRA), which no scaling can say: merge it." for name in dora]
    # PEFT's own files hold the weight of every adapted embedding; those with samples of the rest, only of resized ones.
    kept = {*adapter.kept}
    beside = set() if adapter.rest else {about.base.weight_name(name) for name, about in adapter.modules.items()} & kept
    full = [name for name in adapter.trained_in_full if name not in beside]
    base_part = "is a part of the base model, and has no place there"
    problems += [f"{name} {base_part if name in kept else 'trains in full'}." for name in full]
    raise_all(what, problems, AdapterError)
    forms = singles(adapter, what)
    groups = math.lcm(*(settings.base.groups for settings, _, _ in forms.values()))
    rank = -(-max(settings.r for settings, _, _ in forms.values()) // groups) * groups
    values = sum(rank * (A.numel() + B.numel()) // settings.r for settings, A, B in forms.values())
    with Problems(what, AdapterError) as growth:
        check_growth(sum(A.numel() + B.numel() for _, A, B in forms.values()), values, growth, f", at rank {rank}")
    modules: dict[str, ModuleAdapter] = {}
    tensors: dict[str, Tensor] = {}
    for name, (settings, A, B) in forms.items():
        A, B = at_block_rank(settings.layer(A, B), A, B, rank // settings.base.groups)
        B = B.to(exact_dtype(B.dtype)) * float(settings.scaling)
        modules[name] = settings.with_scaling_one(rank)
        tensors |= {join(name, "lora_A"): A.to(B.dtype), join(name, "lora_B"): B}
    made = replace(adapter, modules=modules, tensors=tensors, trained_in_full=[], kept=[])
    raise_all(what, made.problems(), AdapterError)  # a scaling may have made an infinity
    return made


# ---- convolutions with groups ---------------------------------------------------------------------------------------


def over_all_channels(A: Tensor, groups: int) -> Tensor:
    """A of a convolution with groups as PEFT has it: with kernels, zero ones, for the channels of other groups, too."""
    if groups == 1:
        return A
    r, size, *kernel = A.shape
    wide = A.new_zeros(groups, r // groups, groups, size, *kernel)
    for group, rows in enumerate(A.view(groups, r // groups, size, *kernel)):
        wide[group, :, group] = rows
    return wide.view(r, groups * size, *kernel)


def within_groups(A: Tensor, groups: int) -> Tensor:
    """The inverse of `over_all_channels`; ValueError where a group reads the channels of another."""
    r, size, *kernel = A.shape
    if groups == 1:
        return A
    if size % groups:
        raise ValueError(f"`groups` (={groups}) must divide the {size} input channels of lora_A.")
    own = torch.stack([A.view(groups, r // groups, groups, -1)[group, :, group] for group in range(groups)])
    narrow = own.reshape(r, size // groups, *kernel)
    if torch.count_nonzero(narrow) != torch.count_nonzero(A):
        raise ValueError(f"its update mixes the {groups} groups of the convolution, which no weight of the layer can.")
    return narrow
