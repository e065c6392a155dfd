"""Modules that read the weight of a layer within them, and do not call it: they find W there.

A forward such as ``F.linear(x, self.qkv.weight, bias)`` would compute with W₀, and LoRA in `qkv` would do nothing. What
a forward reads stands in its code, so such modules are found before anything runs. They get a class in front of their
own, whose forward is theirs, of a twin in which the layers that it reads have W in the place of their weights.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any, ClassVar

import torch.nn as nn

from lora.layers import weights
from lora.layers.in_place import with_others
from lora.layers.layer import LoRALayer
from lora.models.model import Names, has_own_forward, without_wrappers

# The children that are read, by name: None for a layer, or what is read within them.
Reads = dict[str, Any]


class WeightReader(nn.Module):
    """In front of a module's class: what it reads of the weights within it is W.

    Attributes:
        lora_reads: the layers whose weights it reads, by their names.
    """

    lora_reads: Reads
    lora_reader_base: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (self.lora_reader_base,), *super().__reduce_ex__(protocol)[2:]


@functools.cache
def _class_for(base: Any) -> type[WeightReader]:
    @functools.wraps(base.forward)  # with its signature, which trainers look at
    def forward(self: WeightReader, *args: Any, **kwargs: Any) -> Any:
        return with_others(self, base, {"_modules": _with_weights(self, self.lora_reads)}, *args, **kwargs)

    namespace = {"__module__": base.__module__, "forward": forward, "lora_reader_base": base}
    return type(base.__name__, (WeightReader, base), namespace)


def _new(base: Any) -> WeightReader:
    return object.__new__(_class_for(base))


def _with_weights(module: nn.Module, reads: Reads) -> dict[str, nn.Module | None]:
    """A module's children, with twins of those that are read."""
    children = dict(module._modules)
    for name, within in reads.items():
        child = children.get(name)
        if within is not None and child is not None:
            children[name] = twin = object.__new__(type(child))
            vars(twin).update(vars(child), _modules=_with_weights(child, within))
        elif isinstance(child, LoRALayer):  # its own class, which computes with the weight that it finds
            children[name] = twin = object.__new__(child.lora_base_class)
            vars(twin).update(vars(child), weight=child.lora_weight_now())
    return children


# ---- who reads what -----------------------------------------------------------------------------------------------


def readers_of(names: Names) -> dict[nn.Module, Reads]:
    """The modules of a model that read weights of LoRA layers in them, and what they read, by what is in their code."""
    modules = {name: module for module, known in names.items() for name in known}
    found: dict[nn.Module, Reads] = {}
    for layer, known in names.items():
        for name in known if isinstance(layer, LoRALayer) and layer.r > 0 else ():
            for module, path in _around(modules, name):
                if _reads(type(module), tuple(without_wrappers(".".join(path)).split("."))):
                    _enter(found.setdefault(module, {}), path)
    return found


def reader_problems(readers: dict[nn.Module, Reads], names: Names) -> Iterator[str]:
    """A complaint for each of these modules that cannot have W where it reads a weight."""
    for module, reads in readers.items():
        if has_own_forward(module):
            yield (
                f"{names[module][0] or 'the model'}: reads the weights of layers in it, and its instance has a "
                "`forward` of its own, which would go on doing so; remove that first."
            )
        for name, layer in _read_in(module, reads):
            if weights.is_packed(layer):
                yield (
                    f"{names[layer][0]}: its weight is packed, and a {type(module).__name__} around it reads "
                    f"`{name}.weight` as it is; leave it out with `exclude_modules`."
                )


def let_read(readers: dict[nn.Module, Reads]) -> None:
    """Let modules find W where they read weights."""
    reader: Any
    for reader, reads in readers.items():
        if not isinstance(reader, WeightReader):
            reader.__class__ = _class_for(type(reader))  # type: ignore[arg-type]  # classes can be hashed
        reader.lora_reads = reads


def let_read_no_more(module: nn.Module) -> None:
    """Give a module its own class back."""
    if isinstance(module, WeightReader):
        vars(module).pop("lora_reads")
        reader: Any = module
        reader.__class__ = reader.lora_reader_base


def _around(modules: dict[str, nn.Module], name: str) -> Iterator[tuple[nn.Module, list[str]]]:
    """The modules around one, and its name in each of them."""
    parts = name.split(".")
    for n in range(len(parts) if name else 0):
        yield modules[".".join(parts[:n])], parts[n:]


def _enter(reads: Reads, path: list[str]) -> None:
    *above, last = path
    for name in above:
        reads = reads.setdefault(name, {})
    reads[last] = None


def _read_in(module: nn.Module, reads: Reads) -> Iterator[tuple[str, LoRALayer]]:
    for name, within in reads.items():
        child = module._modules.get(name)
        if child is not None and within is not None:
            yield from ((f"{name}.{rest}", layer) for rest, layer in _read_in(child, within))
        elif isinstance(child, LoRALayer):
            yield name, child


def _reads(cls: Any, path: tuple[str, ...]) -> bool:
    """Whether the forward of a class, or what it calls of its class, names a layer within it, and a weight beside."""
    if LoRALayer in cls.__mro__:
        return False
    *above, last = path
    read, named = _words(cls)
    return last in read and all(part.isdigit() or part in named for part in above)


@functools.cache
def _words(cls: Any) -> tuple[frozenset[str], frozenset[str]]:
    """The names that stand beside `weight` in a class's forward, and all that stand in it."""
    read, named, waiting = set[str](), set[str](), ["forward"]
    seen = set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for code in _codes(inspect.getattr_static(cls, name, None)):
            words = {*code.co_names, *(const for const in code.co_consts if isinstance(const, str))}
            named |= words
            if "weight" in words:
                read |= words
            waiting += [word for word in words if word not in _OF_TORCH]
    return frozenset(read), frozenset(named)


_OF_TORCH = {*dir(nn.Module)} - {"forward"}


def _codes(method: object) -> Iterator[CodeType]:
    """The code of a method, or of a property, as it was written, with that of the functions in it."""
    if isinstance(method, property):
        method = method.fget
    function: Any = getattr(method, "__func__", method)  # of a static or a class method
    waiting = [getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)]
    while waiting:
        code = waiting.pop()
        if isinstance(code, CodeType):
            yield code
            waiting += [const for const in code.co_consts if isinstance(const, CodeType)]
