"""How the adapters of a model start, and how a start that is taken out of the base weight is undone.

An adapter that starts as a part of W₀ changes W₀, and leaves W₀ + s · B A as it was. The layer remembers the A and B
that it started from, so that the pretrained weight is not lost: it is W₀ + s₀ · B₀ A₀.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from lora.errors import Problems
from lora.functional.fused import exact_dtype, without_autocast
from lora.layers import starts, weights
from lora.layers.layer import LoRALayer
from lora.layers.parts import Part
from lora.layers.starts import Init
from lora.layers.undo import undo_on_error
from lora.models import spectral
from lora.models.blocks import Pair, factor_blocks, tensors_of
from lora.models.model import Memory, Names, lora_layers, names_of, owned_tensors, sharded_problems

_GIVEN_BACK = "lora_given_back"


def initialize(model: nn.Module, init_lora_weights: Init) -> None:
    """Start the adapters of a model again, in a way of your choice.

    This is for layers that were constructed: load the pretrained weights first. `lora.inject` does it by itself.

    ==================  ==========================================================================================
    True, "kaiming"     A ~ kaiming uniform, B = 0; embeddings A = 0, B ~ N(0, 1)
    "gaussian"          A ~ N(0, 1/r²), B = 0; embeddings as by default
    "orthogonal"        A and B random with B A = 0
    "pissa"             s B A = the r largest singular values of W₀ with their vectors. **Writes W₀**: W₀ − s B A.
                        "pissa_niter_[n]": by randomised SVD with n iterations, in a fraction of the time.
                        arXiv:2404.02948
    "olora"             B A = the first r columns and rows of W₀ = Q R. **Writes W₀**. arXiv:2406.01775
    "eva", "lora_ga",   wait for `lora.calibrate(model, batches)`; "lora_ga" and "corda" write W₀
    "corda"
    False               A and B random, so that the model does not start as its base; for tests
    a function          called with each layer, to write its `lora_A` and `lora_B`
    ==================  ==========================================================================================

    Where W₀ is written, W₀ + s B A stays what it was, to the rounding of W₀'s dtype. `lora.disabled` and `lora.eject`
    give the pretrained model, to the same rounding, and `lora.save_adapter` writes what was learnt, at rank 2r, for an
    unchanged base. State dicts of such a model hold what is left of W₀, by the name of the weight, and with a first
    dimension of 1: load them into a model that started alike. Any other refuses them, a plain model for the shape.
    Packed (quantised) weights are not written.

    Args:
        model: a model with LoRA layers.
        init_lora_weights: the way.

    Raises:
        ValueError: there is no LoRA layer, no such way, or one that a layer cannot start in: its base weight is tied
            to another module's, is not finite, or has a smaller rank. One error lists all, and the model is as it was.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(lora.Linear(8, 4, r=2))
    >>> before = model(torch.ones(8))
    >>> lora.initialize(model, "pissa")
    >>> torch.allclose(model(torch.ones(8)), before, atol=1e-6), bool(model[0].lora_B.any())
    (True, True)
    """
    layers = [layer for layer in lora_layers(model, "initialize") if layer.r > 0]
    with Problems("initialize: nothing was changed") as problems:
        problems.add(*filter(None, [starts.init_problem(init_lora_weights)]))
        problems.raise_any()
        problems.add(*problems_of_start(layers, names_of(model), init_lora_weights))
    with undo_on_error(layers) as undo, undo:
        begin(layers, init_lora_weights, undo)


def begin(layers: Sequence[LoRALayer], how: Init, undo: undo_on_error) -> None:
    """Start layers from their pretrained weights."""
    for layer in layers:
        keep_start(undo, layer, writes_base=how == "olora" or _is_pissa(how))
        give_back(layer)
        layer.init_lora_weights = how
        layer.lora_start_adapter()
        if how == "olora":
            start_from(layer, spectral.olora(layer), writes_base=True)
        elif _is_pissa(how):
            start_from(layer, spectral.pissa(layer, starts.niter_of(str(how))), writes_base=True)
        note_fresh(layer, whether=how is True or (isinstance(how, str) and how != "orthogonal"))


def note_fresh(layer: LoRALayer, whether: bool = True) -> None:
    """Note that A and B start now; or forget it, where they start at values by which nobody could tell what moves."""
    tensors = (layer.lora_A, layer.lora_B)
    counted = whether and not any(tensor.is_inference() for tensor in tensors)
    layer.lora_fresh = sum(tensor._version for tensor in tensors) if counted else None


def _is_pissa(how: Init) -> bool:
    return isinstance(how, str) and (how == "pissa" or starts.niter_of(how) is not None)


# ---- what can be wrong -----------------------------------------------------------------------------------------


def problems_of_start(layers: Sequence[LoRALayer], names: Names, how: Init) -> Iterator[str]:
    """Why layers cannot start in this way, as far as can be told before it is tried."""
    if how in starts.OF_ORIGINAL:
        yield f"{how!r} needs the weights as they were before they were quantised: `lora.loftq(model, weights)`."
    if isinstance(how, str) and how in starts.OF_DATA:  # what waits for data writes later
        yield from (
            f"{names[layer][0]}: is a parameter, whose inputs cannot be observed; {how!r} is for layers."
            for layer in layers
            if isinstance(layer, Part)
        )
    if not isinstance(how, str) or how in starts.OF_DATA:
        return
    if starts.needs_more(how):
        yield from unwritable(layers, names)
        yield from unroundable(layers, names)
    for layer in layers:
        yield from (f"{names[layer][0]}: {problem}" for problem in _problems(layer, how))


def unwritable(layers: Sequence[LoRALayer], names: Names) -> Iterator[str]:
    """Why the base weights of layers cannot be written, or should not."""
    yield from sharded_problems(layers, names, "start it so before the model is sharded")
    memory = Memory(owned_tensors(names))
    for layer in layers:
        others = memory.tied_to(layer)
        if others:
            yield f"{names[layer][0]}: its weight is tied to that of {others}, which would change too."
        if layer.weight.is_meta:
            yield f"{names[layer][0]}: has no values yet, being on the meta device."


def unroundable(layers: Sequence[LoRALayer], names: Names) -> Iterator[str]:
    """A complaint for each packed weight: packing what is left of it again would lose more than the part is worth."""
    for layer in layers:
        if weights.is_packed(layer):
            yield (
                f"{names[layer][0]}: its base weight is packed, and packing what is left of it again would change the "
                "model; start before quantising, or use `lora.loftq`."
            )


def _problems(layer: LoRALayer, how: str) -> Iterator[str]:
    """Why one layer cannot start in this way."""
    if how == "orthogonal":
        yield from spectral.block_problems(layer)
        yield from filter(None, [starts.odd_problem(layer)])
    if (how == "olora" or _is_pissa(how)) and not layer.weight.is_meta:
        yield from spectral.start_problems(layer, scales=how != "olora")


# ---- starts that are a part of the base weight -------------------------------------------------------------------


@torch.no_grad()
def start_from(layer: LoRALayer, pairs: Sequence[Pair], *, writes_base: bool) -> None:
    """Give A and B these blocks.

    Args:
        pairs: B (rows, q) and A (q, columns) of each block of the layer.
        writes_base: take s · B A out of W₀, so that the sum is unchanged to rounding.
    """
    A, B = tensors_of(layer, pairs)
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)
    if writes_base:
        remember_start(layer, base_written=False)  # nothing is to be given back, if what follows has no memory
        layer.lora_write_base(pretrained_weight(layer, -1))
        layer.lora_base_written = True
    layer.lora_needs_data = None
    layer.reset_magnitude()
    note_fresh(layer)


def remember_start(layer: LoRALayer, base_written: bool = True) -> None:
    """Note that A and B, as they are, are a part of the pretrained weight, and whether the base weight lacks it."""
    # On the CPU, whatever device the layer is moved to: it is asked for when a run begins or ends.
    A, B = (factor.detach().to("cpu", copy=True) for factor in (layer.lora_A, layer.lora_B))
    layer.lora_start, layer.lora_base_written = (A, B, layer.lora_scaling), base_written


@torch.no_grad()
def pretrained_weight(layer: LoRALayer, sign: int = 1) -> Tensor:
    """W₀ + s₀ · B₀ A₀, the base weight as it was before an initialiser changed it, to rounding; or their difference."""
    weight = layer.lora_base_weight()
    if layer.lora_start is None:
        return weight
    A, B, scaling = layer.lora_start
    dtype, device = exact_dtype(weight.dtype), layer.lora_A.device
    with without_autocast(device):
        started = layer.lora_delta(A.to(device, dtype), B.to(device, dtype)) * scaling
    started = weights.of(layer, "weight").sharded_like(started)
    return torch.add(weight.to(dtype), started, alpha=sign).to(weight.dtype)


def is_kept_apart(layer: LoRALayer) -> bool:
    """Whether the base weight lacks what the layer's adapter started as."""
    return layer.lora_start is not None and layer.lora_base_written


@torch.no_grad()
def give_back(layer: LoRALayer) -> None:
    """Write the pretrained weight into the base again."""
    if is_kept_apart(layer):
        layer.lora_write_base(pretrained_weight(layer))
        setattr(layer.weight, _GIVEN_BACK, True)  # outlives the adapter, of which the layer keeps nothing
    layer.lora_start = None


def is_given_back(weight: object) -> bool:
    """Whether this weight is a pretrained one only to rounding, since an adapter once started from a part of it."""
    return hasattr(weight, _GIVEN_BACK)


def keep_start(undo: undo_on_error, layer: LoRALayer, writes_base: bool) -> None:
    """Keep what a start of the layer writes: A, B, magnitude, and the base weight, if it is written or given back."""
    undo.keep(*(parameter for _, parameter in layer.lora_parameters()))
    if writes_base or is_kept_apart(layer):
        undo.keep(*weights.written_with(layer))


# ---- what was learnt since ------------------------------------------------------------------------------------------
#
# s · B A − s₀ · B₀ A₀, of twice the rank, is what a base that nobody has changed can load.


@torch.no_grad()
def since_start(layer: LoRALayer, s: float) -> Pair:
    """A and B, at twice the layer's rank and for the scaling `s`, of what it has learnt: s · (B A − (s₀ / s) B₀ A₀)."""
    assert layer.lora_start is not None, "asked of layers that have one"
    A, B, scaling = layer.lora_start
    trained: Tensor = layer.lora_B
    if not layer.lora_scaling:  # nothing of A and B counts, and their start does
        trained = torch.zeros_like(layer.lora_B)
    ratio = scaling / s
    blocks = zip(_pairs(layer, layer.lora_A, trained), _pairs(layer, A, B * -ratio), strict=True)
    pairs = [(torch.cat([B, B0], 1), torch.cat([A, A0])) for (B, A), (B0, A0) in blocks]
    return tensors_of(layer, pairs)


def to_start(layer: LoRALayer, r: int, s: float, A: Tensor, B: Tensor) -> Pair:
    """A and B of a layer, from what `since_start` made of one that started alike, of rank `r` and for the scaling `s`.

    Raises:
        ValueError: it is of a layer that started from something else.
    """
    assert layer.lora_start is not None, "asked of layers that have one"
    A0, B0, scaling = layer.lora_start
    if r != 2 * layer.r or A.numel() != 2 * A0.numel():
        raise ValueError(
            f"its adapter in the model started from a part of the base weight, so that the file's has twice its rank: "
            f"`r` must be {2 * layer.r}, got {r}."
        )
    if not s:
        raise ValueError("a scaling of 0 in the file loses what the adapter started from.")
    q, pairs = layer.lora_block_rank(), factor_blocks(layer, A, B)
    started = [(-B[:, q:], A[q:]) for B, A in pairs]
    ours = _pairs(layer, A0, B0 * (scaling / s))
    if not all(
        weights.same_values(x, y)
        for pair, own in zip(started, ours, strict=True)
        for x, y in zip(pair, own, strict=True)
    ):
        raise ValueError(
            "its adapter in the file started from another part of the base weight than the one in the model: load it "
            "into the plain base model, or initialise as it was."
        )
    return tensors_of(layer, [(B[:, :q], A[:q]) for B, A in pairs])


def _pairs(layer: LoRALayer, A: Tensor, B: Tensor) -> list[Pair]:
    return factor_blocks(layer, A.detach().cpu(), B.detach().cpu())
