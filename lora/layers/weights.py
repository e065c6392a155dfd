"""Tensors that are not plain: tables, by the names of their classes, of how to read and write them.

    packed     numbers in another form: bitsandbytes, torchao, what `register_weight` taught
    sharded    each rank has a part: DTensor, as FSDP2 and tensor parallelism make them
    split up   empty until it is gathered: DeepSpeed's ZeRO-3

A row of a table may be a string, "module:NAME". It is imported when a tensor of that class is first met, so that models
of plain tensors import none of it, and pay for none of it.
"""

from __future__ import annotations

import functools
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora.errors import instance
from lora.functional.codes import Coded
from lora.functional.fused import is_plain, is_storage
from lora.layers.registry import keys_of

F = TypeVar("F", bound=Callable[..., Any])
L = TypeVar("L", bound=nn.Module)
T = TypeVar("T")


class Packing(NamedTuple):
    """What is known of one kind of packed weight; each function takes the module that owns the weight."""

    read_weight: Callable[[Any], Tensor]
    write_weight: Callable[[Any, Tensor], None]
    why_not_train: Callable[[Any], str | None] = lambda module: None
    #: Called when the module gets an adapter (True) and when it loses it (False).
    prepare_training: Callable[[Any, bool], None] = lambda module, adapted: None
    #: The weight as codes and scales that can be chosen; None where it is no such thing, or nobody knows.
    read_codes: Callable[[Any], Coded | None] = lambda module: None
    #: Gives the module a weight of other codes and scales, to the bit.
    write_codes: Callable[[Any, Coded], None] = lambda module, coded: None
    #: Whether what it reads is in the dtype that the module computes in; if not, nothing says which that is.
    says_dtype: Callable[[Any], bool] = lambda module: True


@dataclass(frozen=True)
class Plain:
    """One of a module's own tensors, or a value for it; this process has all of it. A sharded one is a subclass."""

    module: nn.Module | None
    own: str
    tensor: Tensor

    def part(self) -> Tensor:
        """What this rank has of it."""
        return self.tensor

    def whole(self) -> Tensor:
        """All of it, its rows in the model's order."""
        return self.tensor

    def without_first(self) -> Tensor:
        """It without its first dimension, which is 1, sharded by the others."""
        return self.tensor.squeeze(0)

    def in_model_order(self) -> Tensor:
        """It with its rows in the model's order, sharded as it is."""
        return self.tensor

    def sharded_like(self, value: Tensor) -> Tensor:
        """A whole value, its rows in the model's order, sharded as this is."""
        return value

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        """Copy a whole value, its rows in the model's order, into it."""
        self.tensor.copy_(value)

    def values_at(self, places: Tensor) -> Tensor:
        """The values at these places, counted as if it were flat; nothing large is gathered or copied."""
        tensor = self.tensor.detach()
        if not tensor.dim():
            return tensor[None]  # once, whatever the places: adapters' files have it so
        return tensor.view(-1)[places] if tensor.is_contiguous() else tensor[torch.unravel_index(places, tensor.shape)]

    @classmethod
    def ranks(cls, tensors: Sequence[Tensor]) -> Alone:
        """The ranks that such tensors of a model are spread over."""
        return Alone()


class Alone:
    """The ranks of a model that one process has whole. Those of a sharded one are a subclass, and call it together."""

    alone = True
    is_first = True

    def on_first(self, make: Callable[[], T]) -> T:
        """What `make()` returns on the first rank, where alone it is called, on all of them; or raises, on all."""
        return make()

    def from_all(self, items: Sequence[str]) -> list[str]:
        """What any rank has to say, once each: what they all have to agree on."""
        return [*items]

    def with_whole(self, layer: L, *names: str) -> L:
        """A twin of a layer with copies of these of its parameters, whole; the layer itself, if they are plain."""
        return layer

    def written_whole(self, layer: L, *names: str, read: Sequence[str] = ()) -> AbstractContextManager[L]:
        """Within it, the layer's parameters of these names can be written as if it were not sharded; and others `read`.

        What the first rank writes counts: each may have a random state of its own.
        """
        return nullcontext(layer)


# By layer and by weight: embeddings have the same weights, and FSDP puts plain ones in the layers.
_PACKINGS: dict[type | str, Packing | str] = {
    "bitsandbytes.nn.modules.Linear4bit": "lora.quantized.bnb:FOUR_BIT",
    "bitsandbytes.nn.modules.Params4bit": "lora.quantized.bnb:FOUR_BIT",
    "bitsandbytes.nn.modules.Linear8bitLt": "lora.quantized.bnb:INT8",
    "bitsandbytes.nn.modules.Int8Params": "lora.quantized.bnb:INT8",
    "torchao.quantization.Int8Tensor": "lora.quantized.torchao:INT8",
    "torchao.quantization.Float8Tensor": "lora.quantized.torchao:FLOAT8",
    "torchao.quantization.IntxUnpackedToInt8Tensor": "lora.quantized.torchao:INTX",
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor.NF4Tensor": "lora.quantized.torchao:NF4",
    "torchao.dtypes.nf4tensor.NF4Tensor": "lora.quantized.torchao:NF4",  # where it was before
}
_SHARDINGS: dict[type | str, type[Plain] | str] = {
    "torch.distributed.tensor.DTensor": "lora.parallel.dtensor:Sharded",
}


def _row(table: dict[type | str, T | str], *classes: type) -> T | None:
    """What a table says of the first of these classes that it knows: by itself, or by a class that it derives from."""
    for cls in classes:
        for _, key in keys_of(cls):
            if key in table:
                row = table[key]
                if isinstance(row, str):
                    name, row = row, pkgutil.resolve_name(row)
                    if table[key] == name:  # nobody has taught another one meanwhile
                        table[key] = row
                return cast(T, row)
    return None


# ---- packed --------------------------------------------------------------------------------------------------------


def register_weight(
    kind: type | str,
    read_weight: Callable[[Any], Tensor],
    write_weight: Callable[[Any, Tensor], None],
    *,
    why_not_train: Callable[[Any], str | None] | None = None,
) -> None:
    """Teach lora a kind of packed base weight, so that whatever needs W₀ can have it.

    `lora.inject` adapts a layer with a packed weight in any case, by the layer's own forward. Merging, DoRA, and the
    initialisers that start from W₀ need its values; those that change W₀ write it, too.

    Args:
        kind: a class of layer whose weight is packed, or a class of tensor that stands as a layer's weight, or the
            full name of one (``"package.module.Class"``) where importing the package would be a burden. Subclasses
            count as well; a layer's class goes before its weight's.
        read_weight: module → its weight as a dense tensor, in the layout of the unpacked layer's weight and in the
            dtype that the layer computes in.
        write_weight: (module, dense weight) → None; packs the weight as the old one was, and puts it in
            `module.weight`, a frozen parameter of the same class.
        why_not_train: module → the reason why gradients through it would be wrong, or None; `lora.inject` refuses a
            module that has one. Default: none has.

    Raises:
        TypeError: `kind` is not a class of module or of tensor, nor a name, or a function cannot be called.

    >>> import torch, lora
    >>> class Int8Linear(torch.nn.Linear):
    ...     def pack(self, weight):
    ...         self.scale = weight.abs().max() / 127
    ...         self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
    ...     def unpack(self):
    ...         return self.weight * self.scale
    ...     def forward(self, x):
    ...         return torch.nn.functional.linear(x, self.unpack(), self.bias)
    >>> lora.register_weight(Int8Linear, Int8Linear.unpack, Int8Linear.pack)
    >>> layer = Int8Linear(8, 4)
    >>> layer.pack(layer.weight.detach())
    >>> lora.inject(torch.nn.Sequential(layer), target_modules=["0"], r=2).trainable
    24
    >>> layer.weight.dtype, layer.lora_base_weight().dtype
    (torch.int8, torch.float32)
    """
    is_kind = isinstance(kind, type) and issubclass(kind, (nn.Module, Tensor))
    if not is_kind and not (isinstance(kind, str) and "." in kind):
        raise TypeError(f"`kind` must be a class of nn.Module or torch.Tensor, or the full name of one, got {kind!r}.")
    packing = Packing(read_weight, write_weight, why_not_train or Packing._field_defaults["why_not_train"])
    for name, function in packing._asdict().items():
        if not callable(function):
            raise TypeError(f"`{name}` must be a function of a module, got {function!r}.")
    _PACKINGS[kind] = packing


def packing_of(module: nn.Module) -> Packing | None:
    """What is known of how the module's weight is packed; None if nothing is: mostly an ordinary dense tensor."""
    return _row(_PACKINGS, type(module), type(getattr(module, "weight", None)))


def is_packed(module: nn.Module) -> bool:
    """Whether the module's weight is anything but numbers in their places, be it of a known kind or not."""
    return packing_of(module) is not None or not _is_dense(module.weight)


def read_weight(module: nn.Module) -> Tensor:
    """The module's weight as a dense tensor: itself, detached, where it is one; ValueError where nobody can say."""
    weight: Any = module.weight
    if not is_packed(module):  # without a region of no gradient: torch.export does not load a program with an empty one
        dense: Tensor = weight.detach()
        return dense
    with torch.no_grad():
        return _known(module).read_weight(module).detach()


@torch.no_grad()
def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Give the module this weight: copied into a dense one, packed as the old one was into a packed one."""
    own: Any = module.weight
    if not is_packed(module):
        own.copy_(weight)
    # What was packed is not packed again: some packings of a dequantised weight are not the packing that it came from.
    elif not _same(read_weight(module), weight):
        _known(module).write_weight(module, weight)


def read_codes(module: nn.Module) -> Coded | None:
    """The module's packed weight as codes and scales; None where it is no such thing, or nobody knows."""
    packing = packing_of(module)
    return None if packing is None else packing.read_codes(module)


@torch.no_grad()
def write_codes(module: nn.Module, coded: Coded) -> None:
    """Give the module, of which `read_codes` knows them, other codes and scales."""
    _known(module).write_codes(module, coded)


def written_with(module: nn.Module) -> list[Tensor]:
    """The tensors whose values may change when the module's weight is written, its other parameters included."""
    if not is_packed(module):
        return [tensor for tensor in module._parameters.values() if tensor is not None]
    # Scales and codes may be anywhere: in the module, in its weight, or in a state that it keeps.
    owners = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    held = (one for owner in owners for one in (owner, *getattr(owner, "__dict__", {}).values()))
    return [one for one in held if isinstance(one, Tensor)]


def why_not_train(module: nn.Module) -> str | None:
    """The reason why gradients through the module's packed weight would be wrong; None if they are right."""
    packing = packing_of(module)
    return packing.why_not_train(module) if packing else None


def says_dtype(module: nn.Module) -> bool:
    """Whether the weight that is read is in the dtype that the module computes in."""
    packing = packing_of(module)
    return packing is None or packing.says_dtype(module)


def prepare_training(module: nn.Module, adapted: bool) -> None:
    """To be called of every module, adapted or not, when a model gets adapters, and when it loses them.

    Some packed layers must be told that there will be training, or they stop passing gradients on.
    """
    packing = packing_of(module)
    if packing:
        packing.prepare_training(module, adapted)


def _same(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)


def _is_dense(weight: Any) -> bool:
    # Torch's own subclasses (a sharded weight, say) hold numbers like any tensor; what others hold, nobody knows.
    foreign = is_traceable_wrapper_subclass(weight) and not type(weight).__module__.startswith("torch.")
    return not foreign and weight.dtype.is_floating_point and weight.dtype.itemsize > 1


def _known(module: nn.Module) -> Packing:
    packing = packing_of(module)
    if packing is None:
        weight: Any = module.weight
        cls = type(weight)
        raise ValueError(
            f"{instance(module)} with a {cls.__module__}.{cls.__qualname__} of {weight.dtype} for its weight is "
            "packed in a way that is not known; `lora.register_weight` teaches it."
        )
    return packing


# ---- sharded -------------------------------------------------------------------------------------------------------


def of(module: nn.Module | None, own: str, tensor: Tensor | None = None) -> Plain:
    """One of a module's own tensors, to be read and written whatever its class.

    Args:
        own: its name in the module, by which it is known in what order it keeps its rows.
        tensor: a value for it, or another one in its place. Default: None, the module's own.
    """
    tensor = getattr(module, own) if tensor is None else tensor
    return _sharding(tensor)(module, own, tensor)


def is_sharded(tensor: object) -> bool:
    """Whether this process has only a part of the tensor; be it all of it."""
    return _sharding(tensor) is not Plain


def _sharding(tensor: object) -> type[Plain]:
    cls = type(tensor)
    return Plain if cls in (Tensor, nn.Parameter) else _row(_SHARDINGS, cls) or Plain


def ranks_of(model: nn.Module) -> Alone:
    """The ranks that a model, or a layer, is sharded over."""
    sharded = [tensor for tensor in (*model.parameters(), *model.buffers()) if is_sharded(tensor)]
    return _sharding(next(iter(sharded), None)).ranks(sharded)


def outside_inference_mode(function: F) -> F:
    """The function outside `torch.inference_mode`, in which no DTensor can be gathered, if its model is sharded."""

    @functools.wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled() or ranks_of(model).alone:
            return function(model, *args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(model, *args, **kwargs)

    return cast(F, call)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether torch's `fully_shard` (FSDP2) was called of this module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def reshard(model: nn.Module) -> None:
    """Have FSDP2's parameters in their places: after a forward pass whole ones, not to be written, may stand there."""
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


# ---- split up ------------------------------------------------------------------------------------------------------


def is_split_up(tensor: Any) -> bool:
    """Whether this is what ZeRO-3 leaves in the place of a tensor, and not the tensor."""
    whole = getattr(tensor, "ds_shape", None)
    return whole is not None and tensor.numel() != math.prod(whole)


def whole_shape(tensor: Any) -> list[int]:
    """The tensor's shape, or that of the one which it is in the place of."""
    return [*tensor.ds_shape] if is_split_up(tensor) else [*tensor.shape]


def split_up_problems(tensors: Iterable[tuple[str, Tensor | None]]) -> Iterator[str]:
    """A complaint for each of these that ZeRO-3 keeps in parts, and what to do."""
    for name, tensor in tensors:
        if is_split_up(tensor):
            yield (
                f"{name} is empty: DeepSpeed's ZeRO-3 keeps its {tuple(whole_shape(tensor))} in parts; do this within "
                "`deepspeed.zero.GatheredParameters(parameters)`."
            )


# ---- plain ---------------------------------------------------------------------------------------------------------


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one to the rounding of the less precise of their dtypes."""
    if a.shape != b.shape or not (is_plain(a) and is_plain(b)):
        return True  # nothing can be said
    eps = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    a, b = a.detach().double(), b.detach().to(a.device).double()
    return bool((a - b).norm() <= 16 * eps * b.norm())


def sample_slice(matrix: Tensor, values: int = 2**17) -> slice:
    """Every so many rows or columns of a matrix: enough for this many values, all of a small one."""
    return slice(None, None, max(1, matrix.numel() // values))


def sparing(fn: Callable[[Tensor], Tensor], spared: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, for `nn.Module._apply`, but `spared` tensors are not cast to dtypes that weights are only stored in.

    Where `fn` would do that, they go to its device alone, and keep their values and their dtype.
    """
    kept = {id(tensor): tensor for tensor in spared if not is_storage(tensor.dtype)}

    def spare(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return tensor.to(new.device) if id(tensor) in kept and is_storage(new.dtype) else new

    return spare


def is_writable(tensor: Tensor) -> bool:
    """Whether values can be copied into a tensor here: not of `torch.inference_mode` outside it, nor expanded."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return True  # others have ways of their own
    expanded = any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return not expanded and (torch.is_inference_mode_enabled() or not tensor.is_inference())
