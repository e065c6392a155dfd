"""Start the adapters of a model that is there: the initialisers that need pretrained weights, and all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn as nn

from lora.errors import raise_all
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.models import shapes, spectral, start
from lora.models.blocks import Pair
from lora.models.model import Memory, Names, lora_layers, names_of, owned_tensors, sharded_problems
from lora.models.shapes import Init


def initialize(model: nn.Module, init_lora_weights: Init) -> None:
    """Start the adapters of a model again, in the way of your choice.

    For layers that were constructed: load the pretrained weights first. `lora.inject` does the same by itself.

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

    Where W₀ is written, W₀ + s B A is what it was, to the rounding of W₀'s dtype; `lora.disabled` and `lora.eject` give
    the pretrained model, to the same; and `lora.save_adapter` writes what was learnt, at rank 2r, for a base that
    nobody has changed. State dicts of such a model hold what is left of W₀: load them into a model that started
    alike. Packed (quantised) weights are not written.

    Args:
        model: a model with LoRA layers.
        init_lora_weights: the way.

    Raises:
        ValueError: there is no LoRA layer, no such way, or one that cannot be for a layer: its base weight is tied to
            another module's, is not finite, or has a smaller rank. One error lists all, and the model is as it was.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(lora.Linear(8, 4, r=2))
    >>> before = model(torch.ones(8))
    >>> lora.initialize(model, "pissa")
    >>> torch.allclose(model(torch.ones(8)), before, atol=1e-6), bool(model[0].lora_B.any())
    (True, True)
    """
    layers = [layer for layer in lora_layers(model, "initialize") if layer.r > 0]
    problem = shapes.init_problem(init_lora_weights)
    raise_all("initialize: nothing was changed", [problem] if problem else [])
    raise_all("initialize: nothing was changed", problems_of_start(layers, names_of(model), init_lora_weights))
    begin(layers, init_lora_weights)


def problems_of_start(layers: Sequence[LoRALayer], names: Names, how: Init) -> Iterator[str]:
    """Why layers cannot start in this way, as far as can be told before it is tried."""
    if how in shapes.OF_ORIGINAL:
        yield f"{how!r} needs the weights as they were before they were quantised: `lora.loftq(model, weights)`."
    if not isinstance(how, str) or how in shapes.OF_DATA:  # what waits for data writes later
        return
    if shapes.needs_more(how):
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
    """Packed weights, of which taking a part and packing the rest again would lose more than the part is worth."""
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
        if layer.lora_B.shape[1] % 2:
            yield shapes.ODD.format(layer.lora_B.shape[1])
    if not _is_of_weight(how) or layer.weight.is_meta:
        return
    found = [*spectral.scaling_problems(layer)] if how != "olora" else []
    found += spectral.weight_problems(layer)
    yield from found
    if not found and how != "olora":
        yield from spectral.nothing_problems(layer.weight_blocks(layer.base_weight()))


def _is_of_weight(how: Init) -> bool:
    return isinstance(how, str) and (how in shapes.OF_WEIGHT or shapes.niter_of(how) is not None)


def begin(layers: Sequence[LoRALayer], how: Init) -> None:
    """Start layers from their pretrained weights, all or none."""
    with start.undo_start_on_error(layers):
        for layer in layers:
            start.give_back(layer)
            layer.init_lora_weights = how
            layer.start_adapter()
            if _is_of_weight(how):
                start.start_from(layer, _pairs(layer, str(how)), writes_base=True)


def _pairs(layer: LoRALayer, how: str) -> list[Pair]:
    return spectral.olora(layer) if how == "olora" else spectral.pissa(layer, shapes.niter_of(how))
