"""An adapter at another rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lora.adapters.adapter import Adapter
from lora.arithmetic.addends import widest
from lora.arithmetic.algebra import check, copied, named, sound
from lora.errors import AdapterError, is_count, is_number, raise_all
from lora.layers.layer import LoRALayer
from lora.models.blocks import (
    Pair,
    block_rank,
    cut,
    layer_rank,
    padded,
    pairs_of,
    shares,
    smallest_rank,
    spectrum,
    tensors_of,
)


class Resized(NamedTuple):
    """What `lora.resize` made: `adapter`, and for each module the share of Σσ² that was `kept`."""

    adapter: Adapter
    kept: dict[str, float]


def resize(adapter: Adapter, r: int | None = None, *, energy: float | None = None) -> Resized:
    """The adapter at another rank: each module's update at its best approximation of that rank.

    By QR of B and A and an SVD of their core, in float64; ΔW is not made. A rank above the one that there is fills up
    with zeros and is exact, A and B to the bit. All splits of a merged linear layer, and all groups of a convolution,
    have one rank. The scaling stays, and so does what trained in full. What goes beyond the update's own rank is zero
    in A and in B, and does not train.

    Args:
        adapter: what to resize; it stays as it is.
        r: the rank of every module.
        energy: instead of `r`: for each module the smallest rank that keeps this share of Σσ², the squared singular
            values of its update; at most the rank that there is.

    Returns:
        A pair of the adapter and, by module, the share of Σσ² that was kept.

    Raises:
        ValueError: neither `r` nor `energy` is given, or both, or one is out of range.
        AdapterError: the adapter is not sound, a module is of a user's own kind, or `groups` of a factored convolution
            do not divide `r`. One error lists all.

    >>> import torch, lora
    >>> settings = {"r": 2, "lora_alpha": 2, "lora_dropout": 0.0, "use_rslora": False, "scaling": 1.0}
    >>> settings["base"] = {"kind": "linear", "shape": [2, 2]}
    >>> B = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> adapter, kept = lora.resize(lora.Adapter({"up": settings}, {"up.lora_A": torch.eye(2), "up.lora_B": B}), 1)
    >>> adapter.update("up").round(decimals=4) + 0, round(kept["up"], 4)
    (tensor([[3., 0.],
            [0., 0.]]), 0.9)
    """
    raise_all("resize cannot begin", rank_problems(r, energy))
    what = "the adapter is not resized"
    check([adapter], what)
    result, kept, problems = copied(adapter), {}, []
    for name, settings in adapter.modules.items():
        try:
            layer = adapter.layer(name)
            pairs, kept[name] = _resized(layer, r, energy)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        rank = layer_rank(layer, pairs[0][0].shape[1])
        result.modules[name] = settings.at_rank(rank)
        result.tensors.update(named(name, tensors_of(layer, pairs), widest(adapter.pair(name))))
    raise_all(what, problems, AdapterError)
    return Resized(sound(result, what), kept)


def rank_problems(r: Any, energy: Any) -> Iterator[str]:
    """What is wrong with a choice of rank, by number or by the energy to keep."""
    if (r is None) == (energy is None):
        yield f"either `r` or `energy` must be given, got {r!r} and {energy!r}."
    if r is not None and not is_count(r, 1):
        yield f"`r` must be an integer of at least 1, got {r!r}."
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        yield f"`energy` must be above 0 and at most 1, got {energy!r}."


def _resized(layer: LoRALayer, r: int | None, energy: float | None) -> tuple[list[Pair], float]:
    """The blocks at another rank, and the share of the energy that they keep."""
    now, pairs = layer.lora_B.shape[1], pairs_of(layer)
    q = 0 if r is None else block_rank(layer, r)
    if q >= now:
        return [padded(B, A, q) for B, A in pairs], 1.0
    spectra = [spectrum(B, A) for B, A in pairs]
    share = shares(spectra)
    if energy is not None:
        q = block_rank(layer, layer_rank(layer, smallest_rank(share, energy)))
    if q == now:
        return pairs, 1.0
    return [cut(part, q) for part in spectra], float(share[min(q, len(share)) - 1])
