"""What tensors a decoder with adapters has, and how much of each a rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lora.planning.decoder import Decoder, Layer
from lora.planning.training import ADAPTER_DTYPES, BaseDtype, Training

# By style, the dimension of each tensor that tensor parallelism shards; what is not named is whole on every rank.
STYLES: dict[str, dict[str, int]] = {
    "colwise": {"weight": 0, "bias": 0, "lora_B": 0, "lora_magnitude": 0},
    "rowwise": {"weight": 1, "lora_A": 1},
    "embedding": {"weight": 0},
    "norm": {},
}


@dataclass(frozen=True)
class Layout:
    """How many ranks hold copies of everything, shards of each tensor (FSDP2), or parts of each layer (TP)."""

    replicas: int = 1
    shards: int = 1
    tp: int = 1

    @property
    def processes(self) -> int:
        """How many ranks there are."""
        return self.replicas * self.shards * self.tp


@dataclass(frozen=True)
class Stored:
    """A tensor of the model, as often as it is there.

    Attributes:
        shape: (rows, columns), or (values,).
        sharded: the dimension that tensor parallelism shards, or None.
        size: bytes of a value.
        packing: of a quantised weight.
        adapter, trains: whether it is an adapter's, and trains.
        times: how often it is in the model.
        outside: whether it is outside the blocks.
    """

    shape: tuple[int, ...]
    sharded: int | None
    size: int
    packing: BaseDtype | None = None
    adapter: bool = False
    trains: bool = False
    times: int = 1
    outside: bool = False

    def values(self, layout: Layout) -> int:
        """Values that the fullest rank holds: TP's part of a dimension; of FSDP2's shards of rows the largest."""
        shape = [size // layout.tp if dim == self.sharded else size for dim, size in enumerate(self.shape)]
        return -(-shape[0] // layout.shards) * math.prod(shape[1:])

    def bytes(self, layout: Layout) -> int:
        """Bytes of one of it on the fullest rank."""
        if self.packing is not None and self.packing.packed is not None:
            return self.packing.packed(*self.shape)
        return self.values(layout) * self.size


def tensors(decoder: Decoder, training: Training) -> list[Stored]:
    """Every parameter of the model with its adapters."""
    found = list(_of_layers(decoder.block, training, decoder.blocks, outside=False))
    found += _of_layers(decoder.outside, training, 1, outside=True)
    norm = (decoder.hidden,), None, training.base.size
    return [*found, Stored(*norm, times=2 * decoder.blocks), Stored(*norm, outside=True)]


def _of_layers(layers: tuple[Layer, ...], training: Training, times: int, outside: bool) -> Iterator[Stored]:
    base = training.base
    for layer in layers:
        dims = STYLES[layer.style]
        weight, place = (layer.rows, layer.columns), {"times": times, "outside": outside}
        if not layer.tied:
            packing = base if base.packed is not None and not outside else None
            yield Stored(weight, dims["weight"], base.size, packing, times=times, outside=outside)
        if layer.bias:
            yield Stored((layer.rows,), dims.get("bias"), base.size, times=times, outside=outside)
        if training.adapts(layer):
            for name, shape, size in _adapter(layer, training):
                trains = name != "lora_A" or training.trains_A(layer)
                yield Stored(shape, dims.get(name), size, adapter=True, trains=trains, **place)  # type: ignore[arg-type]


def _adapter(layer: Layer, training: Training) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Names, shapes and bytes of a value of the adapter's tensors."""
    r, size = training.r, ADAPTER_DTYPES[training.adapter_dtype]
    # An embedding is looked up: its inputs are its rows.
    inputs, outputs = (layer.rows, layer.columns) if layer.style == "embedding" else (layer.columns, layer.rows)
    yield "lora_A", (training.parts(layer) * r, inputs), size
    yield "lora_B", (outputs, r), size
    if training.use_dora:
        yield "lora_magnitude", (outputs,), 4
