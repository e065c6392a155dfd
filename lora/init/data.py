"""The methods that start A and B from data, as functions of what a pass over the data has seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.functional.fused import without_autocast
from lora.init.observe import Gradients
from lora.layers.linear import LinearLoRA
from lora.models.batches import Inputs
from lora.models.blocks import Pair, Spectrum
from lora.models.spectral import (
    decomposed,
    nothing_problems,
    rank_problems,
    scaling_problems,
    split,
    value_problems,
    weight_blocks,
)

_NITER = 4  # power iterations of the randomised SVD: PEFT's number
_DAMPING = 0.01  # of CorDA's second moment, in parts of its mean diagonal: its authors' number


class Options(NamedTuple):
    """What the methods are told beside the data."""

    rho: float
    corda_method: str
    stable_gamma: float


class Start(NamedTuple):
    """How a layer is to start, and the share that its rank holds."""

    pairs: list[Pair]
    share: float

    @property
    def r(self) -> int:
        """The rank of each block, which is the layer's: only linear layers start from data."""
        return self.pairs[0][1].shape[0]


@torch.no_grad()
def _eva(seen: dict[LinearLoRA, Inputs], options: Options) -> dict[LinearLoRA, Start]:
    directions: dict[LinearLoRA, Tensor] = {}
    shares: dict[LinearLoRA, Tensor] = {}
    for layer in list(seen):
        scatter = seen.pop(layer).scatter
        most = min(round(layer.r * options.rho), *scatter.shape)
        part = decomposed(scatter, most, _NITER)  # of eigenvalues: the squared singular values of the inputs
        directions[layer] = part.Vt[:most]
        shares[layer] = (part.S[:most] / scatter.trace()).cpu()
    ranks = _distributed(shares)
    starts = {}
    for layer, Vt in directions.items():
        A = Vt[: ranks[layer]]  # (r, in_features): all splits have the same inputs
        pairs = [(A.new_zeros(rows, len(A)), A) for rows in layer.lora_block_rows()]
        starts[layer] = Start(pairs, float(shares[layer][: len(A)].sum()))
    return starts


def _distributed(shares: dict[LinearLoRA, Tensor]) -> dict[LinearLoRA, int]:
    """Ranks by what they explain: the leading components of all layers, as many as their ranks, and one of each."""
    more = [(share, layer) for layer, values in shares.items() for share in values[1:].tolist()]
    more.sort(key=lambda component: component[0], reverse=True)
    ranks = Counter(shares.keys())
    ranks.update(layer for _, layer in more[: sum(layer.r - 1 for layer in shares)])
    return dict(ranks)


@torch.no_grad()
def _lora_ga(seen: dict[LinearLoRA, Gradients], options: Options) -> dict[LinearLoRA, Start]:
    starts = {}
    for layer in list(seen):
        blocks, r = seen.pop(layer).blocks, layer.r
        parts = [decomposed(block, 2 * r, _NITER) for block in blocks]
        pairs = []
        for part in parts:
            c = len(part.U) ** 0.25 / options.stable_gamma**0.5
            pairs.append((part.U[:, r : 2 * r] * c, part.Vt[:r] * c))
        starts[layer] = Start(pairs, _kept(parts, slice(2 * r), blocks))
    return starts


@torch.no_grad()
def _corda(seen: dict[LinearLoRA, Inputs], options: Options) -> dict[LinearLoRA, Start]:
    starts = {}
    for layer in list(seen):
        C = seen.pop(layer).second_moment()
        C /= C.diagonal().mean()
        C.diagonal().add_(_DAMPING)
        with without_autocast(C.device):
            parts_of_W = weight_blocks(layer, layer.lora_base_weight())  # (rows, in_features), each
            blocks = [block.to(C) @ C for block in parts_of_W]
        which = CORDA[options.corda_method](layer.r)
        # The least directions take the whole decomposition.
        niter = _NITER if options.corda_method == "ipm" else None
        parts = [decomposed(block, layer.r, niter) for block in blocks]
        chosen = [Spectrum(part.U[:, which], part.S[which], part.Vt[which]) for part in parts]
        factor = torch.linalg.cholesky(C)
        unmixed = [part._replace(Vt=torch.cholesky_solve(part.Vt.T, factor).T) for part in chosen]  # S Vᵀ C⁻¹
        starts[layer] = Start(split(layer, unmixed), _kept(parts, which, blocks))
    return starts


CORDA: dict[str, Callable[[int], slice]] = {"ipm": lambda r: slice(r), "kpm": lambda r: slice(-r, None)}


def _kept(parts: list[Spectrum], which: slice, blocks: list[Tensor]) -> float:
    """Of Σσ² of all blocks, the share of some of their values."""
    energy = sum(float(block.square().sum()) for block in blocks)
    return sum(float(part.S[which].square().sum()) for part in parts) / energy


# ---- what the methods ask for ------------------------------------------------------------------------------------


def _eva_problems(layer: LinearLoRA) -> Iterable[str]:
    columns = layer.lora_A.shape[1]
    return rank_problems(layer, [(columns, columns)])


def _lora_ga_problems(layer: LinearLoRA) -> Iterable[str]:
    return *rank_problems(layer, _shapes(layer), 2), *value_problems(layer)


def _corda_problems(layer: LinearLoRA) -> Iterable[str]:
    unreadable = list(value_problems(layer)) or nothing_problems(weight_blocks(layer, layer.lora_base_weight()))
    return *rank_problems(layer, _shapes(layer)), *scaling_problems(layer), *unreadable


def _shapes(layer: LinearLoRA) -> list[tuple[int, int]]:
    """Rows and columns of the layer's blocks."""
    return [(rows, layer.lora_A.shape[1]) for rows in layer.lora_block_rows()]


def _eva_lacks(layer: LinearLoRA, seen: Inputs) -> str | None:
    if seen.count <= layer.r:
        return f"EVA needs more than r (={layer.r}) inputs, and it had {seen.count}."
    return None if bool(seen.scatter.diagonal().any()) else "its inputs are all the same."


def _lora_ga_lacks(layer: LinearLoRA, seen: Gradients) -> str | None:
    return None if any(bool(block.any()) for block in seen.blocks) else "its gradient is zero."


def _corda_lacks(layer: LinearLoRA, seen: Inputs) -> str | None:
    return None if bool(seen.second_moment().diagonal().any()) else "its inputs are zero."


class Method(NamedTuple):
    """A way to start from data."""

    #: What it needs to see of a layer.
    statistic: Callable[[LinearLoRA], Any]
    #: What is wrong with a layer.
    problems: Callable[[LinearLoRA], Iterable[str]]
    #: What is wrong with finite data that were seen of it.
    lacks: Callable[[LinearLoRA, Any], str | None]
    #: The starts of all its layers; takes what was seen out of the dict, to let go of it.
    start: Callable[[dict[LinearLoRA, Any], Options], dict[LinearLoRA, Start]]
    writes_base: bool


METHODS = {
    "eva": Method(Inputs, _eva_problems, _eva_lacks, _eva, writes_base=False),
    "lora_ga": Method(Gradients, _lora_ga_problems, _lora_ga_lacks, _lora_ga, writes_base=True),
    "corda": Method(Inputs, _corda_problems, _corda_lacks, _corda, writes_base=True),
}
