"""Base weights that are packed: how to read one as a dense tensor, and how to pack one again.

A table, like that of the kinds of layer: quantising packages are known by the full names of their classes, and are
never imported before a layer of theirs is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora.functional.fused import is_plain, is_storage
from lora.layers.packing import Packing, Read, WhyNot, Write
from lora.quantized import bnb, torchao

# A name stands for a class of a package that need not be installed.
_packings: dict[type | str, Packing] = {**bnb.PACKINGS, **torchao.PACKINGS}


def register_weight(
    kind: type | str, read_weight: Read, write_weight: Write, *, why_not_train: WhyNot | None = None
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
    >>> layer.weight.dtype, layer.base_weight().dtype
    (torch.int8, torch.float32)
    """
    is_kind = isinstance(kind, type) and issubclass(kind, (nn.Module, Tensor))
    if not is_kind and not (isinstance(kind, str) and "." in kind):
        raise TypeError(f"`kind` must be a class of nn.Module or torch.Tensor, or the full name of one, got {kind!r}.")
    packing = Packing(read_weight, write_weight, why_not_train or Packing._field_defaults["why_not_train"])
    for name, function in packing._asdict().items():
        if not callable(function):
            raise TypeError(f"`{name}` must be a function of a module, got {function!r}.")
    _packings[kind] = packing


def packing_of(module: nn.Module) -> Packing | None:
    """What is known of how the module's weight is packed; None if nothing is: mostly an ordinary dense tensor."""
    for cls in (type(module), type(getattr(module, "weight", None))):
        for owner in cls.__mro__:
            for key in (owner, f"{owner.__module__}.{owner.__qualname__}"):
                if key in _packings:
                    return _packings[key]
    return None


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


def why_not_train(module: nn.Module) -> str | None:
    """The reason why gradients through the module's packed weight would be wrong; None if they are right."""
    packing = packing_of(module)
    return packing.why_not_train(module) if packing else None


def set_up(module: nn.Module, adapted: bool) -> None:
    """To be called of every module, adapted or not, when a model gets adapters, and when it loses them.

    Some packed layers must be told that there will be training, or they stop passing gradients on.
    """
    packing = packing_of(module)
    if packing:
        packing.set_up(module, adapted)


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
            f"a {type(module).__name__} with a {cls.__module__}.{cls.__qualname__} of {weight.dtype} for its weight is "
            "packed in a way that is not known; `lora.register_weight` teaches it."
        )
    return packing


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
