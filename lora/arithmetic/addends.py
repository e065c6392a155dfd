"""What is to be added: one module of several adapters, brought to one form, and whether it is one module at all."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora.adapters.adapter import FORM, Adapter, ModuleAdapter
from lora.adapters.base import Base, sample_difference
from lora.adapters.single import Form, as_single
from lora.arithmetic.sums import Part
from lora.layers.layer import LoRALayer
from lora.layers.merged_linear import MergedLinearLoRA
from lora.models.blocks import block_rank, pairs_of

# What must agree between descriptions of one base weight.
_FACTS = ("kind", "groups", "shape", "fan_in_fan_out")
_ALWAYS_KNOWN = ("kind", "groups")


class Sum(NamedTuple):
    """A module of the result before it is computed: what is added, and what the result looks like."""

    parts: list[Part]
    like: LoRALayer
    settings: ModuleAdapter
    q: int
    dtype: torch.dtype


def sum_of(name: str, adapters: Sequence[tuple[Adapter, float]], method: str, r: int | None) -> Sum:
    """What makes up a module of the result; ValueError where the adapters' modules do not fit each other, or `r`."""
    forms = _alike([(adapter.modules[name], *adapter.pair(name)) for adapter, _ in adapters])
    layers = [settings.layer(A, B) for settings, A, B in forms]
    shapes = {(layer.lora_A.shape[1:], layer.lora_B.shape[0]) for layer in layers}
    if len(shapes) > 1:
        listed = ", ".join(f"{(*layer.lora_A.shape,)} and {(*layer.lora_B.shape,)}" for layer in layers)
        raise ValueError(f"lora_A and lora_B must be for one base weight, got the shapes {listed}.")
    ranks = [layer.r for layer in layers]
    if method == "linear" and len(set(ranks)) > 1:
        raise ValueError(f"all ranks must be equal for the method 'linear', got {', '.join(map(str, ranks))}.")
    weights = (weight * layer.scaling for layer, (_, weight) in zip(layers, adapters, strict=True))
    return Sum(
        [Part(weight, pairs_of(layer)) for weight, layer in zip(weights, layers, strict=True)],
        layers[0],
        replace(forms[0][0], base=_best_known([settings.base for settings, *_ in forms])),
        block_rank(layers[0], r or max(ranks)),
        widest(tensor for _, *pair in forms for tensor in pair),
    )


def _alike(forms: list[Form]) -> list[Form]:
    """The same updates, all in one form."""
    layers = [settings.layer(A, B) for settings, A, B in forms]
    if len({tuple(getattr(layer, option, None) for option in FORM) for layer in layers}) == 1:
        return forms
    merged = [layer for layer in layers if isinstance(layer, MergedLinearLoRA)]
    if len(merged) == len(layers) and len({layer.splits for layer in merged}) == 1:
        enable_lora = tuple(map(any, zip(*(layer.enable_lora for layer in merged), strict=True)))
        return [_widened(*form, layer, enable_lora) for form, layer in zip(forms, merged, strict=True)]
    return [as_single(*form) for form in forms]


def _widened(
    settings: ModuleAdapter, A: Tensor, B: Tensor, layer: MergedLinearLoRA, enable_lora: tuple[bool, ...]
) -> Form:
    """A merged linear layer's adapter with zeros for more enabled splits."""
    pairs, wide = iter(pairs_of(layer)), []
    zeros = functools.partial(torch.zeros, dtype=torch.float64)
    for size, own, enabled in zip(layer.splits, layer.enable_lora, enable_lora, strict=True):
        if enabled:
            wide.append(next(pairs) if own else (zeros(size, layer.r), zeros(layer.r, A.shape[1])))
    Bs, As = zip(*wide, strict=True)
    return replace(settings, enable_lora=enable_lora), torch.cat(As).to(A.dtype), torch.cat(Bs).to(B.dtype)


def _best_known(bases: Iterable[Base]) -> Base:
    """The first of the descriptions of one base weight that says most."""
    return max(bases, key=lambda base: (base.sample is not None, base.shape is not None))


def base_problems(bases: Mapping[int, Base], check_base: bool) -> Iterator[str]:
    """How the base weights of one module differ, by the numbers of the adapters."""
    known = _best_known(bases.values())
    first = next(n for n, base in bases.items() if base is known)
    for n, base in bases.items():
        of = f"the base weights of adapters {first} and {n} are not the same:"
        for fact in _FACTS:
            ours, theirs = getattr(known, fact), getattr(base, fact)
            if ours != theirs and (fact in _ALWAYS_KNOWN or (known.shape and base.shape)):
                yield f"{of} `{fact}` is {ours!r} and {theirs!r}."
        difference = sample_difference(known.sample, base.sample) if check_base else None
        if difference is not None:
            yield f"{of} sampled values differ by {100 * difference:.0f} %; `check_base=False` combines them."


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest dtype that holds the values of all."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
