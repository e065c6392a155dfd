"""Arithmetic on adapters, without a model: weighted sums, differences, other scalings."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.adapters.adapter import FORM, PARAMETERS, Adapter, Form, ModuleAdapter
from lora.adapters.base import Base, difference, percent, sample_difference
from lora.errors import AdapterError, Problems, is_count, is_number, join, raise_all, short
from lora.layers.layer import LoRALayer
from lora.layers.linear import MergedLinearLoRA
from lora.models.blocks import Pair, block_rank, cut, dense_spectrum, layer_rank, pairs_of, spectrum, tensors_of


def combine(
    adapters: Sequence[tuple[Adapter, float]],
    method: str = "cat",
    *,
    r: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    check_base: bool = True,
) -> Adapter:
    """The adapter whose update is the weighted sum of other adapters' updates.

        ΔW = Σ wᵢ ΔWᵢ        ΔWᵢ = sᵢ · Bᵢ Aᵢ

    ==========  ==================================================================================================
    "cat"       exact, at rank Σ rᵢ: the Aᵢ one below the other, the wᵢ sᵢ Bᵢ side by side
    "svd"       the best approximation of the sum at rank `r`, by QR of "cat" and an SVD of its core
    "linear"    PEFT's: A = Σ ±√|wᵢ sᵢ| Aᵢ, B = Σ √|wᵢ sᵢ| Bᵢ at the rank that all have. Cheap, and not the sum: the
                product has cross terms Bᵢ Aⱼ. Exact for one adapter.
    "ties"      arXiv:2306.01708: of each wᵢ ΔWᵢ keep the `density` largest values, elect for each place the sign of
                their sum, and take the mean of the values with that sign. Then as "svd".
    "dare"      arXiv:2311.03099: drop values of each ΔWᵢ at random, each with probability 1 − density, divide those
                that are left by density, and add up. Then as "svd".
    ==========  ==================================================================================================

    "ties" and "dare" make ΔW dense, one module at a time; what they choose is exact, and its approximation at rank `r`
    the best there is. Values are counted for each module, over the splits that any adapter enables.

    A module that only some adapters have gets the sum of those. Where adapters have it in different forms, the result
    has the one that holds all: of merged linear layers the union of the enabled splits, otherwise a single linear
    layer or a factored convolution.

    Args:
        adapters: pairs of an adapter and its weight, which may be negative or zero; the adapters stay as they are.
        method: "cat", "svd", "linear", "ties" or "dare". Default: "cat".
        r: rank of the result, for "svd", "ties" and "dare". Default: for each module the largest of its ranks.
        density: share of the values that "ties" and "dare" keep. Default: 0.5.
        seed: of the generator that "dare" draws from; the global one is not touched. Default: 0.
        check_base: raise if sampled values of the base models differ between adapters, or what these hold of them
            (rows that were added, running statistics), of which the first adapter's counts otherwise. Default: True.

    Returns:
        An adapter of scaling 1 with lora_alpha = r, on the CPU, in the widest dtype of its inputs; sums are taken in
        float64 and rounded once. A module's `lora_dropout` is that of its first adapter; `base_model` is kept if all
        agree.

    Raises:
        ValueError: a weight is not a finite number, `method`, `r` or `density` is out of range, or `r` is given for a
            method that has none.
        AdapterError: an adapter is not sound, or holds tensors that trained in full, which are not updates; base
            weights are not the same, a module is of a user's own kind, or a rank does not fit. One error lists all.

    >>> import torch, lora
    >>> settings = {"r": 1, "lora_alpha": 2, "lora_dropout": 0.0, "use_rslora": False, "scaling": 2.0}
    >>> settings["base"] = {"kind": "linear", "shape": [1, 3]}
    >>> one = lora.Adapter({"up": settings}, {"up.lora_A": torch.ones(1, 3), "up.lora_B": torch.ones(1, 1)})
    >>> both = lora.combine([(one, 0.5), (one, 2)])
    >>> both.modules["up"]["r"], both.delta("up")
    (2, tensor([[5., 5., 5.]]))
    """
    adapters = list(adapters)
    what = "combine: nothing was computed"
    raise_all(what, _argument_problems(adapters, method, r, density, seed))
    check([adapter for adapter, _ in adapters], what, in_full=False)
    sums: dict[str, _Sum] = {}
    kept: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    with Problems(what, AdapterError) as problems:
        modules_of: dict[str, dict[int, tuple[Adapter, float]]] = {}
        for n, pair in enumerate(adapters):
            for name in pair[0].modules:
                modules_of.setdefault(name, {})[n] = pair
        for name, having in modules_of.items():
            bases = {n: adapter.modules[name].base for n, (adapter, _) in having.items()}
            found = list(_base_problems(bases, check_base))
            problems.add(*(f"{name}: {problem}" for problem in found))
            if not found:  # other bases have other shapes
                with problems.at(name):
                    sums[name] = _sum_of(name, [*having.values()], method, r)
        for n, (adapter, _) in enumerate(adapters):
            problems.add(*(_rest_problems(n, adapter, kept, rest) if check_base else ()))
            for name in adapter.kept:
                kept.setdefault(name, adapter.tensors[name])
            for name, about in adapter.rest.items():
                rest.setdefault(name, about)
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, ModuleAdapter] = {}
    tensors: dict[str, Tensor] = {}
    for name, addends in sums.items():
        pairs = METHODS[method](addends.parts, _Options(addends.q, density, generator))
        rank = layer_rank(addends.like, pairs[0][0].shape[1])
        modules[name] = addends.module.with_scaling_one(rank)
        tensors |= named(name, tensors_of(addends.like, pairs), addends.dtype)
    tensors |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in kept.items()}
    result = Adapter(
        modules,
        tensors,
        trained_in_full=[*kept],
        kept=[*kept],
        rest={name: about for name, about in rest.items() if name not in kept},
        base_model=_common(adapter.base_model for adapter, _ in adapters),
        format=_common(adapter.format for adapter, _ in adapters) or "lora",
    )
    return sound(result, what)


def subtract(a: Adapter, b: Adapter, *, check_base: bool = True) -> Adapter:
    """The adapter whose update is that of `a` less that of `b`: exact, at the sum of their ranks.

        ΔW = ΔW_a − ΔW_b

    Args:
        a, b: adapters of one base model; they stay as they are.
        check_base: raise if sampled values of the base weights differ. Default: True.

    Raises:
        AdapterError: as `lora.combine`.

    >>> import torch, lora
    >>> settings = {"r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "use_rslora": False, "scaling": 1.0}
    >>> settings["base"] = {"kind": "linear", "shape": [1, 3]}
    >>> one = lora.Adapter({"up": settings}, {"up.lora_A": torch.ones(1, 3), "up.lora_B": torch.ones(1, 1)})
    >>> lora.subtract(one, one).delta("up")
    tensor([[0., 0., 0.]])
    """
    return combine([(a, 1), (b, -1)], check_base=check_base)


def scale(adapter: Adapter, factor: float) -> Adapter:
    """The adapter whose update is `factor` times that of another: `scaling` and `lora_alpha` change, A and B do not.

    Args:
        adapter: any adapter; it stays as it is.
        factor: any finite number.

    Raises:
        ValueError: `factor` is not a finite number.
        AdapterError: the adapter is not sound, or holds tensors that trained in full, which are not updates.

    >>> import torch, lora
    >>> settings = {"r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "use_rslora": False, "scaling": 1.0}
    >>> settings["base"] = {"kind": "linear", "shape": [1, 3]}
    >>> one = lora.Adapter({"up": settings}, {"up.lora_A": torch.ones(1, 3), "up.lora_B": torch.ones(1, 1)})
    >>> lora.scale(one, -2).delta("up")
    tensor([[-2., -2., -2.]])
    """
    what = "scale: nothing was computed"
    if not is_number(factor):
        raise_all(what, [f"`factor` must be a finite number, got {short(factor)}."])
    check([adapter], what, in_full=False)
    result = copied(adapter)
    for name, module in adapter.modules.items():
        scaling, lora_alpha = module.scaling * factor, module.lora_alpha * factor
        result.modules[name] = replace(module, scaling=scaling, lora_alpha=lora_alpha)
    return sound(result, what)


# ---- what is added up: one module of several adapters, brought to one form -----------------------------------------

# What must agree between descriptions of one base weight.
_FACTS = ("kind", "groups", "shape", "fan_in_fan_out")
_ALWAYS_KNOWN = ("kind", "groups")


class _Part(NamedTuple):
    """One adapter's share in a module of the result: `weight` · B A, block by block."""

    weight: float
    pairs: list[Pair]


class _Sum(NamedTuple):
    """A module of the result before it is computed: what is added, and what the result looks like."""

    parts: list[_Part]
    like: LoRALayer
    module: ModuleAdapter
    q: int
    dtype: torch.dtype


def _sum_of(name: str, adapters: Sequence[tuple[Adapter, float]], method: str, r: int | None) -> _Sum:
    """What makes up a module of the result; ValueError where the adapters' modules do not fit each other, or `r`."""
    forms = _alike([(adapter.modules[name], *adapter.pair(name)) for adapter, _ in adapters])
    layers = [module.layer(A, B) for module, A, B in forms]
    if len({layer.lora_shapes_without_rank() for layer in layers}) > 1:
        listed = ", ".join(f"{(*layer.lora_A.shape,)} and {(*layer.lora_B.shape,)}" for layer in layers)
        raise ValueError(f"lora_A and lora_B must be for one base weight, got the shapes {listed}.")
    ranks = [layer.r for layer in layers]
    if method == "linear" and len(set(ranks)) > 1:
        raise ValueError(f"all ranks must be equal for the method 'linear', got {', '.join(map(str, ranks))}.")
    base = _best_known([module.base for module, *_ in forms])
    return _Sum(
        [
            _Part(weight * layer.lora_scaling, pairs_of(layer))
            for layer, (_, weight) in zip(layers, adapters, strict=True)
        ],
        layers[0],
        replace(forms[0][0], base=base),
        block_rank(layers[0], r or max(ranks)),
        widest(tensor for _, *pair in forms for tensor in pair),
    )


def _alike(forms: list[Form]) -> list[Form]:
    """The same updates, all in one form."""
    layers = [module.layer(A, B) for module, A, B in forms]
    if len({tuple(getattr(layer, option, None) for option in FORM) for layer in layers}) == 1:
        return forms
    merged = [layer for layer in layers if isinstance(layer, MergedLinearLoRA)]
    if len(merged) == len(layers) and len({layer.splits for layer in merged}) == 1:
        enable_lora = tuple(map(any, zip(*(layer.enable_lora for layer in merged), strict=True)))
        return [_widened(module, layer, enable_lora) for (module, *_), layer in zip(forms, merged, strict=True)]
    return [module.single(A, B) for module, A, B in forms]


def _widened(module: ModuleAdapter, layer: MergedLinearLoRA, enable_lora: tuple[bool, ...]) -> Form:
    """A merged linear layer's adapter with zeros for more enabled splits."""
    pairs, wide = iter(pairs_of(layer)), []
    zeros = functools.partial(torch.zeros, dtype=torch.float64)
    for size, own, enabled in zip(layer.splits, layer.enable_lora, enable_lora, strict=True):
        if enabled:
            wide.append(next(pairs) if own else (zeros(size, layer.r), zeros(layer.r, layer.lora_A.shape[1])))
    Bs, As = zip(*wide, strict=True)
    A, B = torch.cat(As).to(layer.lora_A.dtype), torch.cat(Bs).to(layer.lora_B.dtype)
    return replace(module, enable_lora=enable_lora), A, B


def _best_known(bases: Iterable[Base]) -> Base:
    """The first of the descriptions of one base weight that says most."""
    return max(bases, key=lambda base: (base.sample is not None, base.shape is not None))


# ---- the methods: parts are added up, block by block ---------------------------------------------------------------


class _Options(NamedTuple):
    """What a method is told beside the parts: the rank of a block, and which values the sparse ones keep."""

    q: int
    density: float
    generator: torch.Generator


def _cat(parts: Sequence[_Part], options: _Options) -> list[Pair]:
    blocks = zip(*([(B * part.weight, A) for B, A in part.pairs] for part in parts), strict=True)
    return [(torch.cat([B for B, _ in block], 1), torch.cat([A for _, A in block])) for block in blocks]


def _svd(parts: Sequence[_Part], options: _Options) -> list[Pair]:
    return [cut(spectrum(B, A), options.q) for B, A in _cat(parts, options)]


def _linear(parts: Sequence[_Part], options: _Options) -> list[Pair]:
    roots = [math.sqrt(abs(part.weight)) for part in parts]
    signed = [math.copysign(root, part.weight) for root, part in zip(roots, parts, strict=True)]
    blocks = zip(*(part.pairs for part in parts), strict=True)
    return [(_weighted(roots, (B for B, _ in block)), _weighted(signed, (A for _, A in block))) for block in blocks]


def _weighted(weights: Iterable[float], tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]).sum(0)


def _ties(parts: Sequence[_Part], options: _Options) -> list[Pair]:
    updates = torch.stack([_trimmed(_flat(part), options.density) for part in parts])  # (adapters, values)
    agree = updates.sign() == updates.sum(0).sign()
    return _factored(torch.where(agree, updates, 0).sum(0) / agree.sum(0).clamp(min=1), parts, options)


def _trimmed(update: Tensor, density: float) -> Tensor:
    largest = update.abs().topk(max(1, round(density * update.numel()))).indices
    return torch.zeros_like(update).index_copy_(0, largest, update[largest])


def _dare(parts: Sequence[_Part], options: _Options) -> list[Pair]:
    return _factored(torch.stack([_dropped(_flat(part), options) for part in parts]).sum(0), parts, options)


def _dropped(update: Tensor, options: _Options) -> Tensor:
    kept = torch.rand(update.shape, dtype=torch.float64, generator=options.generator) < options.density
    return torch.where(kept, update / options.density, 0)


def _flat(part: _Part) -> Tensor:
    """All values of an update, the blocks one after the other."""
    return torch.cat([(B @ A * part.weight).flatten() for B, A in part.pairs])


def _factored(values: Tensor, parts: Sequence[_Part], options: _Options) -> list[Pair]:
    shapes = [(B.shape[0], A.shape[1]) for B, A in parts[0].pairs]
    blocks = torch.split(values, [rows * columns for rows, columns in shapes])
    return [cut(dense_spectrum(block.view(shape)), options.q) for block, shape in zip(blocks, shapes, strict=True)]


METHODS: dict[str, Callable[[Sequence[_Part], _Options], list[Pair]]] = {
    "cat": _cat,
    "svd": _svd,
    "linear": _linear,
    "ties": _ties,
    "dare": _dare,
}
_OF_ANY_RANK = ("svd", "ties", "dare")


# ---- what goes in, and what comes out ------------------------------------------------------------------------------


def _argument_problems(adapters: Sequence[Any], method: Any, r: Any, density: Any, seed: Any) -> Iterator[str]:
    if not adapters:
        yield "there must be at least one adapter."
    for n, pair in enumerate(adapters):
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Adapter) and is_number(pair[1])):
            yield f"`adapters` must hold pairs of a lora.Adapter and a finite number, got {pair!r:.80} at {n}."
    if method not in METHODS:
        yield f"`method` must be one of {', '.join(map(repr, METHODS))}, got {short(method)}."
    elif r is not None and method not in _OF_ANY_RANK:
        yield f"`r` is for the methods {', '.join(map(repr, _OF_ANY_RANK))}; {method!r} takes none."
    if r is not None and not is_count(r, 1):
        yield f"`r` must be an integer of at least 1, got {short(r)}."
    if not (is_number(density) and 0 < density <= 1):
        yield f"`density` must be above 0 and at most 1, got {short(density)}."
    if not is_count(seed) or seed >= 2**63:
        yield f"`seed` must be an integer from 0 to 2**63 - 1, got {short(seed)}."


def _base_problems(bases: Mapping[int, Base], check_base: bool) -> Iterator[str]:
    """How the base weights of one module differ, by the numbers of the adapters."""
    known = _best_known(bases.values())
    first = next(n for n, base in bases.items() if base is known)
    for n, base in bases.items():
        of = f"the base weights of adapters {first} and {n} are not the same:"
        for fact in _FACTS:
            ours, theirs = getattr(known, fact), getattr(base, fact)
            if ours != theirs and (fact in _ALWAYS_KNOWN or (known.shape and base.shape)):
                yield f"{of} `{fact}` is {short(ours)} and {short(theirs)}."
        apart = sample_difference(known, base) if check_base else None
        if apart is not None:
            yield f"{of} sampled values differ by {percent(apart)}; `check_base=False` combines them anyway."


def _rest_problems(
    n: int, adapter: Adapter, kept: Mapping[str, Tensor], rest: Mapping[str, dict[str, Any]]
) -> Iterator[str]:
    """Where the base model of an adapter differs from that of the ones before, beside the weights that are adapted."""
    for name in adapter.kept:
        if name in kept and not torch.equal(kept[name].cpu(), adapter.tensors[name].cpu()):
            yield (
                f"{name}: adapter {n} and an earlier one hold different values for this part of the base model; "
                "`check_base=False` takes the first."
            )
    for name, about in adapter.rest.items():
        if name in rest and difference(rest[name], about):
            yield (
                f"{name}: adapter {n} was trained in another base model than an earlier one; `check_base=False` "
                "combines them anyway."
            )


def check(adapters: Sequence[Adapter], what: str, in_full: bool = True) -> None:
    """AdapterError that lists all that is wrong with adapters; what trained in full, too, where that has no place."""
    with Problems(what, AdapterError) as problems:
        for n, adapter in enumerate(adapters):
            found = [*adapter.problems()]
            dora = [name for name, module in adapter.modules.items() if module.get("use_dora")]
            found += [f"{name} has a magnitude (DoRA), so that B A alone is not its update." for name in dora]
            kept = {*adapter.kept}
            trained = [name for name in adapter.trained_in_full if name not in kept and not in_full]
            found += [f"{name} trained in full, and is not an update." for name in trained]
            prefix = f"adapter {n}: " if len(adapters) > 1 else ""
            problems.add(*(f"{prefix}{problem}" for problem in found))


def sound(adapter: Adapter, what: str) -> Adapter:
    """The adapter itself; AdapterError if its numbers have grown too large for their dtype."""
    raise_all(what, adapter.problems(), AdapterError)
    return adapter


def copied(adapter: Adapter) -> Adapter:
    """The same adapter in memory of its own."""
    tensors = {name: tensor.detach().clone() for name, tensor in adapter.tensors.items()}
    return replace(copy.deepcopy(replace(adapter, tensors={})), tensors=tensors)


def named(module: str, pair: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's A and B by their full names, in their final dtype."""
    return {join(module, own): tensor.to("cpu", dtype) for own, tensor in zip(PARAMETERS, pair, strict=True)}


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest dtype that holds the values of all."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _common(values: Iterable[str | None]) -> str | None:
    """The one value that all have; None if they have several."""
    found = set(values)
    return found.pop() if len(found) == 1 else None
