"""Which kind of LoRA layer adapts which class: one table, and the classes made from it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch.nn as nn

from lora.layers.code import needs

Base = type[nn.Module]
Kind = type[Any]  # of a LoRALayer, whose file imports this one

# A name stands for a class of a package that need not be installed.
_kinds: dict[Base | str, Kind] = {}
# The written and the generated classes, by the kind and the base class that they are made of.
_classes: dict[tuple[Kind, Base], Kind] = {}


def register(base: Base | str, kind: Kind) -> None:
    """Teach `lora.inject` a class of layer: instances of `base` and of its subclasses become `kind`.

    A kind derives from `lora.LoRALayer` and says four things: `lora_shapes`, `lora_down` (x → A x), `lora_up`
    (h → B h) and `lora_delta` (B A in the shape of the weight), and, for serving merged weights, `lora_forward_with`
    (the base's function with another weight). Or it derives from a kind that exists, such as
    `lora.layers.linear.LinearLoRA`, and changes what differs. What else `LoRALayer` defines (`lora_configure`,
    `lora_base_weight`, `lora_merge`, `lora_not_in_weight`) has defaults that suit most.

    Args:
        base: the layer's class, or its full name (``"package.module.Class"``) where importing the package
            would be a burden.
        kind: the mixin that adapts it.

    Raises:
        TypeError: `kind` is not a mixin that derives from `lora.LoRALayer`, or `base` is not a class of layer.

    >>> import torch, lora
    >>> class Heads(torch.nn.Module):  # (..., heads, in) -> (..., heads, out), a matrix for each head
    ...     def __init__(self, heads, inputs, outputs):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.randn(heads, inputs, outputs))
    ...     def forward(self, x):
    ...         return torch.einsum("...hi,hio->...ho", x, self.weight)
    >>> class HeadsLoRA(lora.LoRALayer):
    ...     @classmethod
    ...     def lora_shapes(cls, base, r, **settings):
    ...         heads, inputs, outputs = base.weight.shape
    ...         return (r, heads, inputs), (heads, r, outputs)
    ...     def lora_down(self, x, A):
    ...         return torch.einsum("...hi,rhi->...hr", x, A)
    ...     def lora_up(self, h, B):
    ...         return torch.einsum("...hr,hro->...ho", h, B)
    ...     def lora_delta(self, A, B):
    ...         return torch.einsum("rhi,hro->hio", A, B)
    ...     def lora_forward_with(self, input, weight):
    ...         return torch.einsum("...hi,hio->...ho", input, weight)
    >>> lora.register(Heads, HeadsLoRA)
    >>> model = torch.nn.Sequential(Heads(2, 4, 3))
    >>> lora.inject(model, target_modules=["0"], r=2).trainable
    28
    >>> _ = torch.nn.init.normal_(model[0].lora_B)
    >>> before = model(torch.ones(2, 4))
    >>> _ = lora.merge(model)
    >>> torch.allclose(model(torch.ones(2, 4)), before, atol=1e-5)
    True
    """
    if not (isinstance(kind, type) and getattr(kind, "lora_base_class", None) is nn.Module):
        raise TypeError(f"`kind` must be a mixin class that derives from lora.LoRALayer, got {kind!r}.")
    if not isinstance(base, str) and not (isinstance(base, type) and issubclass(base, nn.Module)):
        raise TypeError(f"`base` must be a subclass of nn.Module or the full name of one, got {base!r}.")
    _kinds[base] = kind
    for key, made in [*_classes.items()]:  # classes that were made before may be of another kind now, or dense
        if made.__dict__.get("generated", False):
            _classes.pop(key, None)


def kind_for(base: Base) -> Kind | None:
    """The kind that adapts instances of `base`; None where there is none."""
    return next((kind for _, kind in _registered(base)), None)


def class_for(kind: Kind, base: Base) -> Kind:
    """The class that is `kind` in front of `base`: a written one such as `lora.Linear`, or one made now.

    `kind` may also be a class for the front of LoRA layers, such as `lora.swapping.Swappable`; then `base` is theirs.
    """
    if (kind, base) not in _classes:
        namespace: dict[str, Any] = {"__module__": base.__module__, "generated": True}
        if kind.lora_base_class is nn.Module:
            # A subclass with a forward of its own (scaled words, say) computes more than W₀ x + b.
            if hasattr(base, "scaling"):  # the base's own goes before loralib's word for ours
                namespace["scaling"] = inspect.getattr_static(base, "scaling")
            namespace["lora_needs"] = needs(base, ["forward"])
            namespace["lora_dense"] = any(base.forward is owner.forward for owner, _ in _registered(base))
        made = type(base.__name__, (kind, base), namespace)
        _classes.setdefault((kind, base), made)  # another thread may have made one, of which there may be layers
    return _classes[kind, base]


def adapted_class(kind: Kind, module: nn.Module) -> Kind:
    """The class that a module gets when it is adapted, be it a base layer or a LoRA layer of rank 0."""
    return class_for(kind, getattr(type(module), "lora_base_class", type(module)))


def plain_base(base: Base) -> Base:
    """The class of layer that `base` is a special one of, and whose kind adapts it."""
    return next(owner for owner, _ in _registered(base))


def enter(cls: Kind) -> None:
    """Enter a class in the table if it is nothing but a kind in front of a base, and the first that is."""
    kind, *rest = cls.__bases__
    if rest == [cls.lora_base_class]:
        _classes.setdefault((kind, cls.lora_base_class), cls)


def parts_of(cls: type) -> tuple[type, ...]:
    """The classes that can be imported by name, of which `cls` is made: kinds, and at last a base."""
    if not cls.__dict__.get("generated", False):
        return (cls,)
    kind, base = cls.__bases__
    return kind, *parts_of(base)


def new(*parts: Kind) -> nn.Module:
    """An empty instance of a generated class, which cannot be imported by name, for pickle to fill."""
    *kinds, cls = parts
    for kind in reversed(kinds):
        cls = class_for(kind, cls)
    made: nn.Module = object.__new__(cls)
    return made


def keys_of(cls: type) -> Iterator[tuple[type, type | str]]:
    """A class and all that it derives from, each twice: with itself and with its full name, as tables have them."""
    for owner in cls.__mro__:
        yield owner, owner
        yield owner, f"{owner.__module__}.{owner.__qualname__}"


def _registered(base: Base) -> Iterator[tuple[Base, Kind]]:
    return ((owner, _kinds[key]) for owner, key in keys_of(base) if key in _kinds)
