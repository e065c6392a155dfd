"""Arithmetic on adapters, without a model: weighted sums, differences, other scalings."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora.adapters.adapter import PARAMETERS, Adapter, ModuleAdapter
from lora.adapters.base import difference
from lora.arithmetic.addends import Sum, base_problems, sum_of
from lora.arithmetic.sums import METHODS, OF_ANY_RANK, How
from lora.errors import AdapterError, is_count, is_number, join, raise_all
from lora.models.blocks import layer_rank, tensors_of


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
        AdapterError: an adapter is not sound, or holds tensors that trained in full, which are no updates; base
            weights are not the same, a module is of a user's own kind, or a rank does not fit. One error lists all.

    >>> import torch, lora
    >>> settings = {"r": 1, "lora_alpha": 2, "lora_dropout": 0.0, "use_rslora": False, "scaling": 2.0}
    >>> settings["base"] = {"kind": "linear", "shape": [1, 3]}
    >>> one = lora.Adapter({"up": settings}, {"up.lora_A": torch.ones(1, 3), "up.lora_B": torch.ones(1, 1)})
    >>> both = lora.combine([(one, 0.5), (one, 2)])
    >>> both.modules["up"]["r"], both.update("up")
    (2, tensor([[5., 5., 5.]]))
    """
    adapters = list(adapters)
    raise_all("combine cannot begin", _argument_problems(adapters, method, r, density, seed))
    what = "the adapters are not combined"
    check([adapter for adapter, _ in adapters], what, in_full=False)
    sums: dict[str, Sum] = {}
    problems: list[str] = []
    for name in dict.fromkeys(name for adapter, _ in adapters for name in adapter.modules):
        bases = {n: adapter.modules[name].base for n, (adapter, _) in enumerate(adapters) if name in adapter.modules}
        found = [f"{name}: {problem}" for problem in base_problems(bases, check_base)]
        try:
            sums[name] = sum_of(name, [pair for pair in adapters if name in pair[0].modules], method, r)
        except ValueError as error:
            found = found or [f"{name}: {error}"]  # other bases have other shapes
        problems += found
    kept: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for n, (adapter, _) in enumerate(adapters):
        problems += _rest_problems(n, adapter, kept, rest) if check_base else ()
        kept = {name: adapter.tensors[name] for name in adapter.kept} | kept
        rest = adapter.rest | rest
    raise_all(what, problems, AdapterError)
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, ModuleAdapter] = {}
    tensors: dict[str, Tensor] = {}
    for name, about in sums.items():
        pairs = METHODS[method](about.parts, How(about.q, density, generator))
        rank = layer_rank(about.like, pairs[0][0].shape[1])
        modules[name] = about.settings.with_scaling_one(rank)
        tensors |= named(name, tensors_of(about.like, pairs), about.dtype)
    base_model = _common(a.base_model for a, _ in adapters)
    tensors |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in kept.items()}
    rest = {name: about for name, about in rest.items() if name not in kept}
    result = Adapter(modules, tensors, [*kept], base_model=base_model, kept=[*kept], rest=rest)
    return sound(replace(result, format=_common(a.format for a, _ in adapters) or result.format), what)


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
    >>> lora.subtract(one, one).update("up")
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
        AdapterError: the adapter is not sound, or holds tensors that trained in full, which are no updates.

    >>> import torch, lora
    >>> settings = {"r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "use_rslora": False, "scaling": 1.0}
    >>> settings["base"] = {"kind": "linear", "shape": [1, 3]}
    >>> one = lora.Adapter({"up": settings}, {"up.lora_A": torch.ones(1, 3), "up.lora_B": torch.ones(1, 1)})
    >>> lora.scale(one, -2).update("up")
    tensor([[-2., -2., -2.]])
    """
    if not is_number(factor):
        raise ValueError(f"`factor` must be a finite number, got {factor!r}.")
    what = "the adapter is not scaled"
    check([adapter], what, in_full=False)
    result = copied(adapter)
    for name, settings in adapter.modules.items():
        scaling, lora_alpha = settings.scaling * factor, settings.lora_alpha * factor
        result.modules[name] = replace(settings, scaling=scaling, lora_alpha=lora_alpha)
    return sound(result, what)


# ---- what goes in, and what comes out ------------------------------------------------------------------------------


def _argument_problems(adapters: Sequence[Any], method: Any, r: Any, density: Any, seed: Any) -> Iterator[str]:
    if not adapters:
        yield "there must be at least one adapter."
    for n, pair in enumerate(adapters):
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Adapter) and is_number(pair[1])):
            yield f"`adapters` must hold pairs of a lora.Adapter and a finite number, got {pair!r:.80} at {n}."
    if method not in METHODS:
        yield f"`method` must be one of {', '.join(map(repr, METHODS))}, got {method!r}."
    elif r is not None and method not in OF_ANY_RANK:
        yield f"`r` is for the methods {', '.join(map(repr, OF_ANY_RANK))}; the adapters say it for {method!r}."
    if r is not None and not is_count(r, 1):
        yield f"`r` must be an integer of at least 1, got {r!r}."
    if not (is_number(density) and 0 < density <= 1):
        yield f"`density` must be above 0 and at most 1, got {density!r}."
    if not is_count(seed) or seed >= 2**63:
        yield f"`seed` must be an integer from 0 to 2**63 - 1, got {seed!r}."


def _rest_problems(
    n: int, adapter: Adapter, kept: Mapping[str, Tensor], rest: Mapping[str, dict[str, Any]]
) -> Iterator[str]:
    """Where the base model of an adapter differs from that of the ones before, beside the weights that are adapted."""
    for name in adapter.kept:
        if name in kept and not torch.equal(kept[name].cpu(), adapter.tensors[name].cpu()):
            yield (
                f"{name}: adapter {n} and one before it hold this part of the base model, and it differs in them; "
                "`check_base=False` takes the first."
            )
    for name, about in adapter.rest.items():
        if name in rest and difference(rest[name], about):
            yield (
                f"{name}: adapter {n} was trained in another base model than those before it; `check_base=False` "
                "combines them all the same."
            )


def _common(values: Iterable[str | None]) -> str | None:
    """The one value that all have; None if they have several."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def check(adapters: Sequence[Adapter], what: str, in_full: bool = True) -> None:
    """AdapterError that lists all that is wrong with adapters; what trained in full, too, where that has no place."""
    problems = []
    for n, adapter in enumerate(adapters):
        prefix = f"adapter {n}: " if len(adapters) > 1 else ""
        problems += [f"{prefix}{problem}" for problem in adapter.problems()]
        dora = [name for name, settings in adapter.modules.items() if settings.use_dora]
        problems += [f"{prefix}{name} has a magnitude (DoRA), and is no update that adds to a weight." for name in dora]
        if not in_full:
            trained = [name for name in adapter.trained_in_full if name not in adapter.kept]
            problems += [f"{prefix}{name} trained in full and is no update." for name in trained]
    raise_all(what, problems, AdapterError)


def sound(adapter: Adapter, what: str) -> Adapter:
    """The adapter itself; AdapterError if its numbers have grown too large for their dtype."""
    raise_all(what, adapter.problems(), AdapterError)
    return adapter


def copied(adapter: Adapter) -> Adapter:
    """The same adapter in memory of its own."""
    return replace(
        adapter,
        tensors={name: tensor.detach().clone() for name, tensor in adapter.tensors.items()},
        trained_in_full=list(adapter.trained_in_full),
        modules_to_save=list(adapter.modules_to_save),
        kept=list(adapter.kept),
        rest=copy.deepcopy(adapter.rest),
    )


def named(module: str, pair: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's A and B by their full names, in their final dtype."""
    return {join(module, own): tensor.to("cpu", dtype) for own, tensor in zip(PARAMETERS, pair, strict=True)}
