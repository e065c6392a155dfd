"""Modules that read the weight of a layer within them, and do not call it: they find W there.

A forward such as ``F.linear(x, self.qkv.weight, bias)`` would compute with W₀, and LoRA in `qkv` would do nothing. What
a forward reads stands in its code, so such modules are found before anything runs. They get a class in front of their
own, whose forward is theirs, of a twin in which the layers that it reads have W in the place of their weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from dis import Instruction, get_instructions
from inspect import getattr_static, isfunction, unwrap
from types import CodeType
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from lora.layers import weights
from lora.layers.in_place import LowRankWeight, keep, twin_of, with_others
from lora.layers.layer import PARAMETERS, LoRALayer
from lora.layers.parts import Part, forget_parts, own_name, own_weights, parts_of, replicate_parts
from lora.models.model import Names, has_own_forward, without_wrappers

# The children that are read, by name: None for a layer, or what is read within them.
Reads = dict[str, Any]


@dataclass
class Reading:
    """What a module reads: the layers, and the methods of its class, called by others, that read them."""

    layers: Reads = field(default_factory=dict)
    methods: set[str] = field(default_factory=set)


class WeightReader(nn.Module):
    """In front of a module's class: what its methods read of the weights within it is W.

    Attributes:
        lora_reads: the layers whose weights it reads, by their names; its own parts it reads in any case.
        lora_reader: its class, and the methods that read.
    """

    lora_reads: Reads
    lora_reader: ClassVar[tuple[type[nn.Module], tuple[str, ...]]]
    #: Whether these apply a function of autograd's, which takes tensors alone.
    lora_applies: ClassVar[bool]

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


@functools.cache
def _class_for(base: Any, methods: tuple[str, ...]) -> type[WeightReader]:
    def finding_weights(name: str) -> Any:
        method = getattr(base, name)

        @functools.wraps(method)  # with its signature, which trainers look at
        def call(self: WeightReader, *args: Any, **kwargs: Any) -> Any:
            twins: list[_Twin] = []
            others: dict[str, Any] = {**own_weights(self, "`apply`" if self.lora_applies else None)}
            if self.lora_reads:
                others["_modules"] = _with_weights(self, self.lora_reads, self.lora_applies, twins)
            output = with_others(self, base, method, others, *args, **kwargs)
            for twin in twins:
                keep(*twin)
            return output

        return call

    namespace = {name: finding_weights(name) for name in methods}
    applies = any("apply()" in _words(base, name) for name in methods)
    own = {"__module__": base.__module__, "lora_reader": (base, methods), "lora_applies": applies}
    return type(base.__name__, (WeightReader, base), namespace | own)


def _new(base: Any, methods: tuple[str, ...]) -> WeightReader:
    return object.__new__(_class_for(base, methods))


# A module, what it had, its twin, and what that had in the place of it.
_Twin = tuple[nn.Module, dict[str, Any], nn.Module, dict[str, Any]]


def _with_weights(module: nn.Module, reads: Reads, applies: bool, twins: list[_Twin]) -> dict[str, nn.Module | None]:
    """A module's children, with twins of those that are read, which are added to others."""
    children = dict(module._modules)
    for name, within in reads.items():
        child = children.get(name)
        others: dict[str, Any] = {}
        cls: Any = type(child)
        if within is not None and child is not None:
            others = {**own_weights(child, "`apply`" if applies else None)}
            others["_modules"] = _with_weights(child, within, applies, twins)
        elif isinstance(child, LoRALayer):  # its own class, which computes with the weight that it finds
            weight = child.lora_weight_now()
            weight = weight.dense("`apply`") if applies and isinstance(weight, LowRankWeight) else weight
            others, cls = {"weight": weight}, child.lora_base_class
        if child is not None and others:
            children[name] = twin = twin_of(child, cls, others)
            twins.append((child, dict(vars(child)), twin, others))
    return children


# ---- who reads what -----------------------------------------------------------------------------------------------


def let_read(names: Names) -> list[str]:
    """Let modules find W where they read weights of LoRA layers in them.

    Returns:
        A complaint for each that cannot. If there is one, nothing was changed.
    """
    readers = _readers_of(names)
    problems = [*_problems(readers, names)]
    reader: Any
    for reader, reading in readers.items() if not problems else ():
        reader.__class__ = _class_for(_written_class(reader), tuple(sorted(reading.methods)))
        reader.lora_reads = reading.layers
    return problems


def let_read_no_more(module: nn.Module) -> None:
    """Give a module its own class back."""
    if isinstance(module, WeightReader):
        vars(module).pop("lora_reads")
        forget_parts(module)
        reader: Any = module
        reader.__class__ = _written_class(module)


def _readers_of(names: Names) -> dict[nn.Module, Reading]:
    """The modules of a model that read weights of LoRA layers in them, and what they read, by what is in their code."""
    modules = {name: module for module, known in names.items() for name in known}
    found: dict[nn.Module, Reading] = {}
    for layer, known in names.items():
        for name in known if isinstance(layer, LoRALayer) and layer.r > 0 else ():
            called = {"forward"}
            for module, path in _around(modules, name):
                cls, said = _written_class(module), without_wrappers(".".join(path)).split(".")
                tensor = said.pop() if isinstance(layer, Part) else "weight"
                methods = {method for method in called & _methods(cls) if _reads(module, cls, method, said, tensor)}
                if not said:  # the owner itself, by whatever way it gets at its parameter
                    methods.add("forward")
                if methods:
                    reading = found.setdefault(module, Reading())
                    reading.methods.update(methods)
                    _enter(reading.layers, path, layer)
                called |= {word.removesuffix("()") for word in _words(cls, "forward")}
    return found


def _problems(readers: dict[nn.Module, Reading], names: Names) -> Iterator[str]:
    for module, reading in readers.items():
        if has_own_forward(module):
            yield (
                f"{names[module][0] or 'the model'}: reads the weights of layers in it, and its instance has a "
                "`forward` of its own, which would go on doing so; remove that first."
            )
        for name, layer in _read_in(module, reading.layers):
            if weights.is_packed(layer):
                yield (
                    f"{names[layer][0]}: its weight is packed, and a {type(module).__name__} around it reads "
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


def _read_in(module: nn.Module, reads: Reads) -> Iterator[tuple[str, LoRALayer]]:
    for name, within in reads.items():
        child = module._modules.get(name)
        if child is not None and within is not None:
            yield from ((f"{name}.{rest}", layer) for rest, layer in _read_in(child, within))
        elif isinstance(child, LoRALayer):
            yield name, child


def _reads(module: nn.Module, cls: Any, method: str, path: list[str], tensor: str) -> bool:
    """Whether a method of a module's class, with what it calls of it, names a layer within it, and its weight.

    Or it names the layer, and calls a child that reads the weight of what it is given. A layer whose name is called
    wherever it stands, as in `self.proj(x)`, is not read.
    """
    words = _words(cls, method)
    *above, last = [name for name in path if not name.isdigit()] or [tensor]
    if LoRALayer in cls.__mro__ or last not in words or not all(_named(name, words) for name in above):
        return False
    return tensor in words or any(
        f"{name}()" in words and _reads_what_it_is_given(_written_class(child))
        for name, child in module._modules.items()
        if child is not None
    )


def _named(name: str, words: frozenset[str]) -> bool:
    return name in words or f"{name}()" in words


@functools.cache
def _reads_what_it_is_given(cls: Any) -> bool:
    """Whether the forward of a class reads the weight of an argument, as Perceiver's decoder does."""
    for code in _codes(_function(getattr_static(cls, "forward"))):
        arguments, loaded = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount], None
        for one in get_instructions(code):
            if loaded in arguments and one.argval == "weight":
                return LoRALayer not in cls.__mro__
            loaded = one.argval[-1] if isinstance(one.argval, tuple) and one.argval else one.argval
    return False


@functools.cache
def _methods(cls: Any) -> frozenset[str]:
    """The methods of a class that others may call in a forward."""
    own = {name for owner in cls.__mro__ if owner.__module__ != "torch.nn.modules.module" for name in vars(owner)}
    return frozenset(name for name in own if isfunction(getattr_static(cls, name)) and name not in _OF_TORCH)


@functools.cache
def _words(cls: Any, method: str) -> frozenset[str]:
    """The names and strings in a method's code, and in what it calls of its class and file; `name()` where called."""
    words, seen = set[str](), set[object]()
    waiting: list[Any] = [method]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            function = _function(getattr_static(cls, one, None) if isinstance(one, str) else one)
            for code in _codes(function):
                found = {*_words_of(code)}
                words |= found
                named = {word.removesuffix("()") for word in found}
                waiting += named - _OF_TORCH
                waiting += _helpers(function, named)
                waiting += _of_bases(cls, named)
    return frozenset(words)


def _helpers(function: Any, names: set[str]) -> Iterator[Any]:
    """The functions of these names that stand beside one in its file."""
    known = getattr(function, "__globals__", {})
    for helper in filter(isfunction, map(known.get, names)):
        if helper.__module__ == function.__module__:
            yield helper


def _of_bases(cls: Any, names: set[str]) -> Iterator[Any]:
    """The methods of these names of the classes that a class derives from, where its own calls them."""
    bases = [base for base in cls.__mro__[1:] if base not in (nn.Module, object)]
    if names & {"super", *(base.__name__ for base in bases)}:
        for base in bases:
            its = (vars(base).get(name) for name in names - _OF_TORCH)
            yield from (method for method in its if isfunction(method) or isinstance(method, (property, staticmethod)))


def _words_of(code: CodeType) -> Iterator[str]:
    """The names and strings in a code, but for a `weight` of which only the class, the dtype or the like are asked."""
    words = [f"{one.argval}{_call(one)}" for one in get_instructions(code) if isinstance(one.argval, str)]
    for n, word in enumerate(words):
        asked = {*words[n + 1 : n + 2]} & _ASKED or "isinstance" in words[max(0, n - 3) : n]
        if word != "weight" or not asked:
            yield word


def _call(one: Instruction) -> str:
    """Brackets for an attribute that is loaded to be called."""
    return "()" if one.opname == "LOAD_METHOD" or (one.opname == "LOAD_ATTR" and "NULL|self" in one.argrepr) else ""


_ASKED = {"device", "dtype", "shape", "ndim", "requires_grad", "is_cuda"}


_OF_TORCH = {*dir(nn.Module)} - {"forward"}


def _function(method: object) -> Any:
    """The function of a method or a property, as it was written."""
    if isinstance(method, property):
        method = method.fget
    function: Any = getattr(method, "__func__", method)  # of a static or a class method
    return unwrap(function) if callable(function) else None


def _codes(function: Any) -> Iterator[CodeType]:
    """The code of a function, with that of the functions in it."""
    waiting = [getattr(function, "__code__", None)]
    while waiting:
        code = waiting.pop()
        if isinstance(code, CodeType):
            yield code
            waiting += [const for const in code.co_consts if isinstance(const, CodeType)]
