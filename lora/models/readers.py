"""Modules that read the weight of a layer within them, and do not call it: they find W there.

A forward such as ``F.linear(x, self.qkv.weight, bias)`` would compute with W₀, and LoRA in `qkv` would do nothing. What
a forward reads stands in its code, so such modules are found before anything runs. They get a class in front of their
own, whose forward is theirs, of a twin in which the layers that it reads have W in the place of their weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from inspect import getattr_static
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from lora.errors import instance, some
from lora.layers import weights
from lora.layers.code import LISTS, Needs, fusing, methods_of, needs, reads_what_it_is_given, words
from lora.layers.in_place import LowRankWeight, keep, own_of, twin_of, with_others
from lora.layers.layer import LoRALayer
from lora.layers.parts import Part, forget_parts, own_name, own_weights, parts_of, replicate_parts
from lora.layers.state import PARAMETERS
from lora.models.model import Names, has_own_forward, without_wrappers

# The children that are read, by name: None for a layer, or what is read within them.
Reads = dict[str, Any]


@dataclass
class Reading:
    """What a module reads: the layers, and the methods of its class, called by others, that read them.

    Attributes:
        fusing: the methods that would make another layer of what these weigh, without LoRA, and the layers.
    """

    layers: Reads = field(default_factory=dict)
    methods: set[str] = field(default_factory=set)
    fusing: dict[str, list[str]] = field(default_factory=dict)


class WeightReader(nn.Module):
    """In front of a module's class: what its methods read of the weights within it is W.

    Attributes:
        lora_reads: the layers whose weights it reads, by their names; its own parts it reads in any case.
        lora_fuses: the layers of which methods would make others, by the names of the methods.
        lora_reader: its class, the methods that read, and those that make layers.
    """

    lora_reads: Reads
    lora_fuses: dict[str, list[str]]
    lora_reader: ClassVar[tuple[type[nn.Module], tuple[str, ...], tuple[str, ...]]]
    #: What these need of W.
    lora_needs: ClassVar[Needs]

    def extra_repr(self) -> str:
        """The module's own words, then those of its parts."""
        parts = (f"{name}: {part.lora_repr()}" for name, part in parts_of(self).items())
        return "\n".join(filter(None, [super().extra_repr(), *parts]))

    def train(self, mode: bool = True) -> WeightReader:
        """Set training mode; leaving `eval()` drops the merged weights."""
        super().train(mode)
        for part in parts_of(self).values() if mode else ():
            part._merged = None
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for part in parts_of(self).values():
            fn = part.lora_applied(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for part in parts_of(self).values():
            part.lora_refresh()
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, part in () if keep_vars else parts_of(self).items():
            part.lora_mark_rest(destination, f"{prefix}{name}")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        with ExitStack() as stack:
            for part in parts_of(self).values():
                keys = {own: f"{prefix}{own_name(part, own)}" for own in ("weight", *PARAMETERS)}
                stack.enter_context(part.lora_loading(keys, state_dict, args[-1]))
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replicate_parts(self, replica)
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, self.lora_reader, *super().__reduce_ex__(protocol)[2:]


def _class_for(base: Any, methods: tuple[str, ...], fuses: tuple[str, ...]) -> type[WeightReader]:
    return _made_class(base, methods, fuses, tuple(getattr(base, name) for name in methods))


@functools.cache
def _made_class(base: Any, methods: tuple[str, ...], fuses: tuple[str, ...], written: Any) -> type[WeightReader]:
    """A class for these methods as they are written now: where one was replaced, it is another class."""

    def finding_weights(name: str) -> Any:
        method = getattr(base, name)

        @functools.wraps(method)  # with its signature, which trainers look at
        def call(self: WeightReader, *args: Any, **kwargs: Any) -> Any:
            twins: list[_Twin] = []
            needed = self.lora_needs
            others = needed.others(self, {**own_weights(self, needed.why_tensor(self))})
            if self.lora_reads:
                others["_modules"] = _with_weights(self, self.lora_reads, needed, twins)
            output = with_others(self, base, method, others, *args, **kwargs)
            for twin in twins:
                keep(*twin)
            return output

        return call

    def refusing(name: str) -> Any:
        @functools.wraps(getattr(base, name))
        def call(self: WeightReader, *args: Any, **kwargs: Any) -> Any:
            layers = self.lora_fuses[name]
            raise RuntimeError(
                f"`{name}` makes a layer of the weights of {some(layers, len(layers))}, in which their adapters would "
                "do nothing. Merge them first (`lora.merge`), or call it before `lora.inject` and adapt the new layer, "
                "with `splits`."
            )

        return call

    namespace = {name: finding_weights(name) for name in methods} | {name: refusing(name) for name in fuses}
    own = {"__module__": base.__module__, "lora_reader": (base, methods, fuses), "lora_needs": needs(base, methods)}
    return type(base.__name__, (WeightReader, base), namespace | own)


def _new(base: Any, methods: tuple[str, ...], fuses: tuple[str, ...] = ()) -> WeightReader:
    return object.__new__(_class_for(base, methods, fuses))


# A module, what it had, its twin, and what that had in the place of it.
_Twin = tuple[nn.Module, dict[str, Any], nn.Module, dict[str, Any]]


def _with_weights(module: nn.Module, reads: Reads, needed: Needs, twins: list[_Twin]) -> dict[str, nn.Module | None]:
    """A module's children, with twins of those that are read, which are added to others."""
    children = dict(module._modules)
    for name, within in reads.items():
        child = children.get(name)
        others: dict[str, Any] = {}
        cls: Any = type(child)
        if within is not None and child is not None:
            others = needed.others(child, {**own_weights(child, needed.why_tensor(module))})
            others["_modules"] = _with_weights(child, within, needed, twins)
        elif isinstance(child, LoRALayer):  # its own class, which computes with the weight that it finds
            weight, why = child.lora_weight_now(), needed.why_tensor(module)
            weight = weight.dense(why) if why and isinstance(weight, LowRankWeight) else weight
            others, cls = needed.others(child, {"weight": weight}), child.lora_base_class
        if child is not None and others:
            children[name] = twin = twin_of(child, cls, others)
            twins.append((child, own_of(child), twin, others))
    return children


# ---- who reads what -----------------------------------------------------------------------------------------------


def let_read(names: Names) -> list[str]:
    """Let modules find W where they read weights of LoRA layers in them.

    Returns:
        A complaint for each that cannot. If there is one, nothing was changed.
    """
    layers: Names = {layer: known for layer, known in names.items() if isinstance(layer, LoRALayer) and layer.r > 0}
    readers = _readers_of(layers, names)
    problems = [*_problems(readers, names)]
    reader: Any
    for reader, reading in readers.items() if not problems else ():
        methods, fuses = (tuple(sorted(names)) for names in (reading.methods, reading.fusing))
        reader.__class__ = _class_for(_written_class(reader), methods, fuses)
        reader.lora_reads, reader.lora_fuses = reading.layers, reading.fusing
    return problems


def read_as_tensors(names: Names, layers: Iterable[nn.Module]) -> set[nn.Module]:
    """Those of some layers whose weights a module around them may give to what takes tensors alone."""
    readers = _readers_of({layer: names[layer] for layer in layers}, names)
    reading = (
        (module, found) for module, found in readers.items() if needs(_written_class(module), found.methods).apply
    )
    return {layer for module, found in reading for _, layer in _read_in(module, found.layers)}


def read_by_others(model: nn.Module) -> set[nn.Module]:
    """The layers whose weights modules around them read, which need not call them."""
    readers = (module for module in model.modules() if isinstance(module, WeightReader))
    return {layer for module in readers for _, layer in _read_in(module, module.lora_reads)}


def let_read_no_more(module: nn.Module) -> None:
    """Give a module its own class back."""
    if isinstance(module, WeightReader):
        vars(module).pop("lora_reads")
        vars(module).pop("lora_fuses", None)
        forget_parts(module)
        reader: Any = module
        reader.__class__ = _written_class(module)


def _readers_of(layers: Names, names: Names) -> dict[nn.Module, Reading]:
    """The modules of a model that read weights of layers in them, and what they read, by what is in their code."""
    modules = {name: module for module, known in names.items() for name in known}
    found: dict[nn.Module, Reading] = {}
    for layer, known in layers.items():
        for name in known:
            called = {"forward"}
            for module, path in _around(modules, name):
                cls, said = _written_class(module), without_wrappers(".".join(path)).split(".")
                owner, tensor = (layer.lora_owner, said.pop()) if isinstance(layer, Part) else (None, "weight")
                methods = {
                    method for method in called & methods_of(cls) if _reads(module, cls, method, said, tensor, owner)
                }
                if not said:  # the owner itself, by whatever way it gets at its parameter
                    methods |= {"forward"} if cls.__call__ is nn.Module.__call__ else {"forward", "__call__"}
                if methods:
                    reading = found.setdefault(module, Reading())
                    reading.methods.update(methods)
                    _enter(reading.layers, path, layer)
                called |= {word.removesuffix("()") for word in words(cls, "forward")}
                for method in fusing(cls) - called:
                    if _reads(module, cls, method, said, tensor, owner):
                        found.setdefault(module, Reading()).fusing.setdefault(method, []).append(".".join(path))
    return found


def _problems(readers: dict[nn.Module, Reading], names: Names) -> Iterator[str]:
    for module, reading in readers.items():
        if reading.methods and has_own_forward(module):
            yield (
                f"{names[module][0] or 'the model'}: reads the weights of layers in it, and its instance has a "
                "`forward` of its own, which would go on doing so; remove that first."
            )
        for name, layer in _read_in(module, reading.layers):
            if weights.is_packed(layer):
                yield (
                    f"{names[layer][0]}: its weight is packed, and {instance(module)} around it reads "
                    f"`{name}.weight` as it is; leave it out with `exclude_modules`."
                )


def _written_class(module: nn.Module) -> Any:
    return module.lora_reader[0] if isinstance(module, WeightReader) else type(module)


def _around(modules: dict[str, nn.Module], name: str) -> Iterator[tuple[nn.Module, list[str]]]:
    """The modules around one, and its name in each of them."""
    parts = name.split(".")
    for n in range(len(parts) if name else 0):
        yield modules[".".join(parts[:n])], parts[n:]


def _enter(reads: Reads, path: list[str], layer: nn.Module) -> None:
    """Note that a layer is read, or an owner by its part, which is the path's end."""
    *above, last = path
    for name in above:
        reads = reads.setdefault(name, {})
    if not isinstance(layer, Part):
        reads[last] = None


def _read_in(module: nn.Module, reads: Reads) -> Iterator[tuple[str, nn.Module]]:
    for name, within in reads.items():
        child = module._modules.get(name)
        if child is not None and within is not None:
            yield from ((f"{name}.{rest}", layer) for rest, layer in _read_in(child, within))
        elif child is not None:
            yield name, child


def _reads(module: nn.Module, cls: Any, method: str, path: list[str], tensor: str, owner: nn.Module | None) -> bool:
    """Whether a method of a module's class, with what it calls of it, names a layer within it, and its weight.

    Or it names the layer, and calls a child that reads the weight of what it is given. A layer whose name is called
    wherever it stands, as in `self.proj(x)`, is not read.
    """
    found = words(cls, method)
    *above, last = [name for name in path if not name.isdigit()] or [tensor]
    if LoRALayer in cls.__mro__:
        return False
    if not found.isdisjoint(_WALKS) and tensor in found:
        return True
    if last not in found or not all(_named(name, found) for name in above):
        return False
    if path and not found.isdisjoint({f"{last}.{way}" for way in LISTS}):
        return True
    return (
        tensor in found
        or isinstance(owner, _HOLDERS)
        or _by_property(owner, found, tensor)
        or any(
            _named(name, found) and _reads_given(_written_class(child))
            for name, child in module._modules.items()
            if child is not None
        )
    )


# They give what they hold under any name, or one after the other.
_HOLDERS = nn.ParameterList, nn.ParameterDict
# Ways to a child that is not named.
_WALKS = {"children()", "named_children()", "modules()", "named_modules()", "_modules"}


def _by_property(owner: nn.Module | None, found: frozenset[str], tensor: str) -> bool:
    """Whether some of these names is a property of the owner's that reads its tensor."""
    cls = None if owner is None else _written_class(owner)
    return any(isinstance(getattr_static(cls, name, None), property) and tensor in words(cls, name) for name in found)


def _named(name: str, found: frozenset[str]) -> bool:
    return name in found or f"{name}()" in found


def _reads_given(cls: Any) -> bool:
    return LoRALayer not in cls.__mro__ and reads_what_it_is_given(cls)
