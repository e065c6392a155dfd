"""Sharded models (FSDP2, tensor parallel): whole values out of DTensors and back, and ranks that agree.

Of models of plain tensors nothing here changes anything, and no rank waits for another. With sharded ones all ranks
call each function together.
"""

from __future__ import annotations

import functools
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from lora.parallel.rows import dim_of_rows, in_model_order, in_rank_order, is_reordered

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from lora.layers.layer import LoRALayer

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
Order = Callable[[nn.Module, str, Tensor], Tensor]


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether this is a DTensor, of which a rank has a part; be it all of it."""
    # Importing DTensor takes a second. Before somebody else has, there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def settle(model: nn.Module) -> None:
    """Have FSDP2's parameters in their places: after a forward pass whole ones, not to be written, may stand there."""
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def in_normal_mode(function: F) -> F:
    """The function outside `torch.inference_mode`, in which no DTensor can be gathered, if its model is sharded."""

    @functools.wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled() or mesh_of(model) is None:
            return function(model, *args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(model, *args, **kwargs)

    return cast(F, call)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called of this module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


# ---- ranks -----------------------------------------------------------------------------------------------------


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The ranks that a model is sharded over; None if it is not."""
    tensors = [*model.parameters(), *model.buffers()]
    # With tensor parallelism and FSDP2 together some parameters know only a part of the mesh.
    return max((t.device_mesh for t in tensors if is_sharded(t)), key=lambda mesh: mesh.size(), default=None)


def is_first(mesh: DeviceMesh | None) -> bool:
    """Whether this rank is the mesh's first; every rank is, where there is no mesh."""
    return mesh is None or not any(mesh.get_coordinate() or ())


def from_first(mesh: DeviceMesh | None, make: Callable[[], T]) -> T:
    """What `make()` returns on the mesh's first rank, where alone it is called, on all of them; or raises, on all."""
    if mesh is None:
        return make()
    made: T | None = None
    error: Exception | None = None
    if is_first(mesh):
        try:
            made = make()
        except Exception as caught:  # whatever it is, the others must not wait for ever
            error = caught
    box: list[Any] = [(made, error if error is None else _sendable(error))]
    for source, group in _towards(mesh):
        dist.broadcast_object_list(box, src=source, group=group)
    made, told = box[0]
    if error is not None or told is not None:
        raise error or told
    return made


def from_all(mesh: DeviceMesh | None, items: Sequence[str]) -> list[str]:
    """What any rank of the mesh has to say, once each: what they all have to agree on."""
    found = [*items]
    for dim in range(0 if mesh is None else mesh.ndim):
        assert mesh is not None, "it has dimensions"
        told: list[Any] = [None] * mesh.size(dim)
        dist.all_gather_object(told, found, group=mesh.get_group(dim))
        found = list(dict.fromkeys(item for items in told for item in items))
    return found


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same, if it does not survive pickle."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _towards(mesh: DeviceMesh) -> Iterator[tuple[int, Any]]:
    """For each dimension of a mesh: the rank that has what the first had, and the group that is to have it."""
    here = mesh.get_coordinate()
    assert here is not None, "only ranks of the mesh have the model"
    for dim in range(mesh.ndim):
        place = tuple(0 if d == dim else c for d, c in enumerate(here))
        yield int(mesh.mesh[place]), mesh.get_group(dim)


# ---- values ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def full(tensor: Tensor) -> Tensor:
    """All of a tensor, as it is kept; itself, if it is plain."""
    if not is_sharded(tensor):
        return tensor
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    on_mesh: Any = tensor.detach().to(tensor.device_mesh.device_type)  # it may have been offloaded to the CPU
    whole: Tensor = on_mesh.full_tensor()
    return whole


def gathered(module: nn.Module, own: str, tensor: Tensor) -> Tensor:
    """One of a module's own tensors, whole and in the model's order; itself, if it is plain."""
    return in_model_order(module, own, full(tensor))


@torch.no_grad()
def write(module: nn.Module, own: str, tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value, in the model's order, into one of a module's own tensors, or its part of it."""
    value = in_rank_order(module, own, value)
    if not is_sharded(tensor):
        tensor.copy_(value)
        return
    assert value.shape == tensor.shape, "a part of another shape would be a part of something else"
    local = tensor.to_local()
    for dim, (start, size) in enumerate(_part(tensor)):
        value = value.narrow(dim, min(start, value.shape[dim] - size), size)  # an empty part begins anywhere
    local.copy_(value)


@torch.no_grad()
def like(module: nn.Module, own: str, tensor: Tensor, value: Tensor) -> Tensor:
    """A whole value, in the model's order, sharded as one of a module's own tensors is; itself, if that is plain."""
    if not is_sharded(tensor):
        return value
    made = torch.empty_like(tensor, dtype=value.dtype)
    write(module, own, made, value)
    return made


@torch.no_grad()
def reordered(module: nn.Module, own: str, tensor: Tensor, order: Order) -> Tensor:
    """One of a module's own tensors, or a value for it, in another order of rows; sharded as it was."""
    if not is_reordered(module, own):
        return tensor
    if not is_sharded(tensor):
        return order(module, own, tensor)
    from torch.distributed.tensor import distribute_tensor

    # The rows go from rank to rank: whole for a moment, one tensor at a time.
    whole = order(module, own, tensor.full_tensor())
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)


@torch.no_grad()
def values_at(module: nn.Module, own: str, tensor: DTensor, places: Tensor) -> Tensor:
    """Values of a sharded tensor that is one of a module's own, by their places in it, flat and in the model's order.

    Each rank gives those that it has. (float64)
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    local = tensor.to_local()
    index = list(torch.unravel_index(places.cpu(), tensor.shape))
    rows = dim_of_rows(module, own)
    across = [-1 if dim == rows else 1 for dim in range(tensor.dim())]
    order = in_model_order(module, own, torch.arange(tensor.shape[rows]).view(across)).flatten()
    index[rows] = order[index[rows]]
    ours = torch.ones(len(places), dtype=torch.bool)
    for dim, (start, size) in enumerate(_part(tensor)):
        ours &= (index[dim] >= start) & (index[dim] < start + size)
        index[dim] = index[dim] - start
    values = torch.zeros(len(places), dtype=torch.float64)
    values[ours] = local[tuple(i[ours].to(local.device) for i in index)].double().cpu()
    mesh = tensor.device_mesh
    sums = [Replicate() if placement.is_replicate() else Partial() for placement in tensor.placements]
    whole: Tensor = DTensor.from_local(values.to(mesh.device_type), mesh, sums, run_check=False).full_tensor()
    return whole


def _part(tensor: DTensor) -> list[tuple[int, int]]:
    """Begin and size of this rank's part of a tensor, in each dimension, as torch's own checkpoints see it."""
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return list(zip(chunk.offsets, chunk.sizes, strict=True))


# ---- layers ----------------------------------------------------------------------------------------------------


def with_whole(layer: LoRALayer, *names: str) -> LoRALayer:
    """A twin of a layer with copies of these of its parameters, whole; the layer itself, if they are plain."""
    found = {name: parameter for name in names if (parameter := layer._parameters.get(name)) is not None}
    if not any(map(is_sharded, found.values())):
        return layer
    whole: dict[str, nn.Parameter | None] = dict(layer._parameters)
    for name, parameter in found.items():
        whole[name] = nn.Parameter(gathered(layer, name, parameter).clone(), parameter.requires_grad)
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what it wraps has a class of its own, in front of the layer's
    cls = next(cls for cls in type(layer).__mro__ if fsdp is None or not issubclass(cls, fsdp.FSDPModule))
    twin: LoRALayer = object.__new__(cls)
    unsharded = dict.fromkeys(("_merged", "_squares", "_norms", "divided_splits"))
    vars(twin).update({**vars(layer), **unsharded, "_parameters": whole})
    return twin


@contextmanager
def written_whole(layer: LoRALayer, *names: str, read: Sequence[str] = ()) -> Iterator[LoRALayer]:
    """Within it, the layer's parameters of these names can be written as if it were not sharded; and others `read`.

    What the first rank writes counts: each may have a random state of its own.
    """
    twin = with_whole(layer, *names, *read)
    yield twin
    if twin is layer:
        return
    mesh = mesh_of(layer)
    assert mesh is not None, "the twin is of a sharded layer"
    for name in names:
        parameter = layer._parameters.get(name)
        if parameter is not None and not parameter.is_meta:
            value = getattr(twin, name).detach().to(parameter.dtype).contiguous()
            for source, group in _towards(mesh):
                dist.broadcast(value, source, group=group)
            write(layer, name, parameter, value)
