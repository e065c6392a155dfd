"""DTensors (FSDP2, tensor parallelism): whole values out of them and back, rows in rank order, ranks that agree.

All ranks of a sharded model call each function together. `lora.layers.weights` imports this when it meets a DTensor.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lora.layers.weights import Alone, Plain, of
from lora.parallel.forward import TensorParallel

L = TypeVar("L", bound=nn.Module)
T = TypeVar("T")


# ---- the order of rows ---------------------------------------------------------------------------------------------
#
# A fused projection, each of whose splits is divided among ranks, keeps its rows so that every rank has a part of each
# split, one below the other, and computes as on a smaller fused projection:
#
#     model order   q q q q k k v v        rank order, for two ranks   q q k v | q q k v

# A fused projection's own tensors that have a row for each output.
_WITH_ROWS = ("weight", "bias", "lora_B", "lora_magnitude")


def in_rank_order(module: nn.Module | None, own: str, tensor: Tensor) -> Tensor:
    """A module's own tensor, as the model has it, in the order in which the module keeps it; sharded as it was."""
    order = _order_of(module, own)
    return tensor if order is None else _select(module, own, tensor, order)


def in_model_order(module: nn.Module | None, own: str, tensor: Tensor) -> Tensor:
    """A module's own tensor, in the order in which the module keeps it, as the model has it; sharded as it was."""
    order = _order_of(module, own)
    return tensor if order is None else _select(module, own, tensor, order.argsort())


def dim_of_rows(module: nn.Module | None, own: str) -> int:
    """Which dimension of a linear layer's own tensor counts its outputs."""
    return 1 if own == "weight" and getattr(module, "fan_in_fan_out", False) else 0


def _order_of(module: nn.Module | None, own: str) -> Tensor | None:
    """Which row of the model stands where in a module's own tensor; None if each stands where it does in the model."""
    divided: Any = getattr(module, "divided_splits", None)
    if own not in _WITH_ROWS or divided is None:
        return None
    splits, ranks = divided
    if own.startswith("lora_"):  # those of a merged layer have rows for the enabled splits alone
        splits = tuple(compress(splits, getattr(module, "enable_lora", splits)))
    by_split = [rows.view(ranks, -1) for rows in torch.split(torch.arange(sum(splits)), list(splits))]
    return torch.cat(by_split, 1).flatten()  # each (ranks, size / ranks) -> (rows)


@torch.no_grad()
def _select(module: nn.Module | None, own: str, tensor: Tensor, order: Tensor) -> Tensor:
    # The rows go from rank to rank: whole for a moment, one tensor at a time.
    whole = _full(tensor)
    rows = whole.index_select(dim_of_rows(module, own), order.to(whole.device))
    if not isinstance(tensor, DTensor):
        return rows
    return distribute_tensor(rows, tensor.device_mesh, tensor.placements, src_data_rank=None)


# ---- values --------------------------------------------------------------------------------------------------------


class Sharded(Plain):
    """One of a module's own tensors that is a DTensor, of which a rank has a part; be it all of it."""

    tensor: DTensor

    def part(self) -> Tensor:
        part: Tensor = self.tensor.to_local()
        return part

    @torch.no_grad()
    def whole(self) -> Tensor:
        return in_model_order(self.module, self.own, _full(self.tensor))

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        value = in_rank_order(self.module, self.own, value)
        assert value.shape == self.tensor.shape, "a part of another shape would be a part of something else"
        # `distribute_tensor` would move and copy all of the value.
        for dim, (start, size) in enumerate(self._place()):
            value = value.narrow(dim, min(start, value.shape[dim] - size), size)  # an empty part begins anywhere
        self.part().copy_(value)

    @torch.no_grad()
    def sharded_like(self, value: Tensor) -> Tensor:
        made = torch.empty_like(self.tensor, dtype=value.dtype)
        of(self.module, self.own, made).write(value)
        return made

    @torch.no_grad()
    def without_first(self) -> Tensor:
        # Of a whole state dict torch shards it as it does the parameter, and one rank has all of it.
        placements = [Shard(1) if placement == Shard(0) else placement for placement in self.tensor.placements]
        moved: Tensor = self.tensor.redistribute(placements=placements)
        return moved.squeeze(0)

    def in_model_order(self) -> Tensor:
        return in_model_order(self.module, self.own, self.tensor)

    @torch.no_grad()
    def values_at(self, places: Tensor) -> Tensor:
        # Each rank gives those that it has.
        index = list(torch.unravel_index(places.cpu(), self.tensor.shape))
        order = _order_of(self.module, self.own)
        if order is not None:
            rows = dim_of_rows(self.module, self.own)
            index[rows] = order.argsort()[index[rows]]
        ours = torch.ones(len(places), dtype=torch.bool)
        for dim, (start, size) in enumerate(self._place()):
            ours &= (index[dim] >= start) & (index[dim] < start + size)
            index[dim] = index[dim] - start
        part, mesh = self.part(), self.tensor.device_mesh
        values = torch.zeros(len(places), dtype=torch.float64)
        values[ours] = part[tuple(i[ours].to(part.device) for i in index)].double().cpu()
        sums = [Replicate() if placement.is_replicate() else Partial() for placement in self.tensor.placements]
        return DTensor.from_local(values.to(mesh.device_type), mesh, sums, run_check=False).full_tensor()

    def _place(self) -> list[tuple[int, int]]:
        """Begin and size of this rank's part in each dimension, as torch's own checkpoints see it."""
        (chunk,) = self.tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        return list(zip(chunk.offsets, chunk.sizes, strict=True))

    @classmethod
    def ranks(cls, tensors: Sequence[Any]) -> Ranks:
        # With tensor parallelism and FSDP2 together some parameters know only a part of the mesh.
        return Ranks(max((tensor.device_mesh for tensor in tensors), key=lambda mesh: mesh.size()))


@torch.no_grad()
def _full(tensor: Tensor) -> Tensor:
    """All of a tensor, as it is kept; itself, if it is plain."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    on_mesh: Any = tensor.detach().to(tensor.device_mesh.device_type)  # it may have been offloaded to the CPU
    return cast(Tensor, on_mesh.full_tensor())


# ---- ranks ---------------------------------------------------------------------------------------------------------


class Ranks(Alone):
    """The ranks of a mesh, each of which has a part of a model."""

    alone = False

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.is_first = not any(mesh.get_coordinate() or ())

    def on_first(self, make: Callable[[], T]) -> T:
        made: T | None = None
        error: Exception | None = None
        if self.is_first:
            try:
                made = make()
            except Exception as caught:  # whatever it is, the others must not wait for ever
                error = caught
        box: list[Any] = [(made, error if error is None else _sendable(error))]
        for source, group in self._towards():
            dist.broadcast_object_list(box, src=source, group=group)
        made, told = box[0]
        if error is not None or told is not None:
            raise error or told
        return cast(T, made)

    def from_all(self, items: Sequence[str]) -> list[str]:
        found = [*items]
        for dim in range(self.mesh.ndim):
            told: list[Any] = [None] * self.mesh.size(dim)
            dist.all_gather_object(told, found, group=self.mesh.get_group(dim))
            found = list(dict.fromkeys(item for items in told for item in items))
        return found

    def with_whole(self, layer: L, *names: str) -> L:
        found = {name: parameter for name in names if (parameter := layer._parameters.get(name)) is not None}
        if not any(isinstance(parameter, DTensor) for parameter in found.values()):
            return layer
        whole: dict[str, nn.Parameter | None] = dict(layer._parameters)
        for name, parameter in found.items():
            value = in_model_order(layer, name, _full(parameter)).clone()
            whole[name] = nn.Parameter(value, parameter.requires_grad)
        # In front of the layer's class there may be that of FSDP2, and ours for tensor parallelism.
        fsdp = sys.modules.get("torch.distributed.fsdp")
        fronts = (TensorParallel,) if fsdp is None else (TensorParallel, fsdp.FSDPModule)
        behind: Any = next(cls for cls in type(layer).__mro__ if not issubclass(cls, fronts))
        twin: L = object.__new__(behind)
        unsharded = dict.fromkeys(("_merged", "_squares", "_norms", "divided_splits"))
        vars(twin).update({**vars(layer), **unsharded, "_parameters": whole})
        return twin

    @contextmanager
    def written_whole(self, layer: L, *names: str, read: Sequence[str] = ()) -> Iterator[L]:
        twin = self.with_whole(layer, *names, *read)
        yield twin
        if twin is layer:
            return
        for name in names:
            parameter: Any = layer._parameters.get(name)
            if parameter is not None and not parameter.is_meta:
                value = getattr(twin, name).detach().to(parameter.dtype).contiguous()
                for source, group in self._towards():
                    dist.broadcast(value, source, group=group)
                of(layer, name, parameter).write(value)

    def _towards(self) -> Iterator[tuple[int, Any]]:
        """For each dimension of the mesh: the rank that has what the first had, and the group that is to have it."""
        here = self.mesh.get_coordinate()
        assert here is not None, "only ranks of the mesh have the model"
        for dim in range(self.mesh.ndim):
            place = tuple(0 if d == dim else c for d, c in enumerate(here))
            yield int(self.mesh.mesh[place]), self.mesh.get_group(dim)


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same, if it does not survive pickle."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
