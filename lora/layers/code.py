"""What a class's methods do with a weight, by what stands in their code: names, calls, and where tensors are needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dis import Instruction, get_instructions
from inspect import getattr_static, isfunction, ismodule, unwrap
from types import BuiltinMethodType, CellType, CodeType, MethodType
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn

T = TypeVar("T")


def kept_for_class(function: Callable[..., T]) -> Callable[..., T]:
    """Call a function of a class, and of one of its methods, once for each, as long as the class is there.

    A method that is replaced, as packages of faster kernels replace `forward`, is another one.
    """
    kept: WeakKeyDictionary[Any, dict[Any, T]] = WeakKeyDictionary()

    @functools.wraps(function)
    def call(cls: Any, *method: str) -> T:
        known = kept.setdefault(cls, {})
        # Its code and not the function, which may hold the class (by `super()`), and would keep it.
        written = getattr(cls, method[0] if method else "forward", None)
        key = (method, getattr(unwrap(written) if callable(written) else written, "__code__", None))
        if key not in known:
            known[key] = function(cls, *method)
        return known[key]

    return call


class Needs(NamedTuple):
    """What code needs of the W that it finds in the place of a weight.

    Attributes:
        apply: it applies a function of autograd's, or may: that takes tensors alone.
        matmul: it multiplies by `@`, whose operands a compiler takes in the other order if the left one is no tensor.
        lists: it finds parameters in their dict, and not by name.
        asks: it asks whether the weight is a parameter or a tensor.
        maps: it gives what it has to one of torch's transforms, which take tensors alone.
    """

    apply: bool = False
    matmul: bool = False
    lists: bool = False
    asks: bool = False
    maps: bool = False

    def why_tensor(self, module: nn.Module) -> str | None:
        """Why W must be a tensor for the code of this module; None if it need not be one."""
        for needed, why in (
            (self.apply, "`apply`"),
            (self.asks, "`isinstance`"),
            (self.maps, "one of torch's transforms"),
        ):
            if needed:
                return why
        return "`@`" if self.matmul and torch.compiler.is_compiling() and not _runs_another(module) else None

    def others(self, module: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
        """What a twin of a module needs to have for code to find these in the places of its weights."""
        if self.asks:
            for weight in weights.values():
                if isinstance(weight, torch.Tensor):
                    weight._is_param = True  # of which `isinstance(…, nn.Parameter)` asks
        if not self.lists or not weights:
            return weights
        own = {f"{name}_{its}" for name in weights for its in _ADAPTERS} | (
            {*_ADAPTERS} if "weight" in weights else set()
        )
        kept = {name: parameter for name, parameter in module._parameters.items() if name not in own}
        return {**weights, "_parameters": {**kept, **weights}}


def _runs_another(module: nn.Module) -> bool:
    """Whether transformers runs another forward of experts than that of their class: there, nothing is done by `@`."""
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return chosen not in (None, "eager")


def needs(cls: Any, methods: Iterable[str]) -> Needs:
    """What methods of a class need."""
    found = frozenset[str]().union(*(words(cls, method) for method in methods))
    some = [not found.isdisjoint(words) for words in (LISTS, _ASKS, _MAPS)]
    return Needs("apply()" in found, "@" in found, *some)


# ---- words --------------------------------------------------------------------------------------------------------


@kept_for_class
def words(cls: Any, method: str) -> frozenset[str]:
    """The names and strings in a method's code, and in what it calls of its class and file; `name()` where called.

    `@` is the operator, and `apply()` is also where it calls what may apply a function of autograd's.
    """
    known, seen = set[str](), set[object]()
    waiting: list[Any] = [method]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            function = _function(getattr_static(cls, one, None) if isinstance(one, str) else one)
            for code in _codes(function):
                found = {*_words_of(code)}
                known |= found
                known |= {part for word in found if "." in word for part in word.split(".")}  # as `get_submodule` has
                named = {word.removesuffix("()") for word in found}
                waiting += (*(named - _OF_TORCH), *_of_bases(cls, named), *_enclosed(function))
                if _applies_by_name(cls, function, named):
                    known.add("apply()")
                for helper in _called(function, named):
                    if _may_apply(helper, function):
                        known.add("apply()")
                    elif helper.__module__ == function.__module__:
                        waiting.append(helper)
    return frozenset(known)


@kept_for_class
def methods_of(cls: Any) -> frozenset[str]:
    """The methods of a class that others may call in a forward."""
    own = {name for owner in cls.__mro__ if owner.__module__ != "torch.nn.modules.module" for name in vars(owner)}
    return frozenset(name for name in own if isfunction(getattr_static(cls, name)) and name not in _OF_TORCH)


@kept_for_class
def reads_what_it_is_given(cls: Any) -> bool:
    """Whether the forward of a class reads the weight of an argument, as Perceiver's decoder does."""
    for code in _codes(_function(getattr_static(cls, "forward"))):
        arguments = {*code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]}
        loaded: tuple[str, ...] = ()
        for one in get_instructions(code):
            if one.argval == "weight" and arguments.intersection(loaded):
                return True
            loaded = _variables(one)[-1:]
    return False


@kept_for_class
def fusing(cls: Any) -> frozenset[str]:
    """The methods of a class that make one layer of the weights of several, as `fuse_projections` of diffusers'."""
    called = {name: _codes(_function(getattr_static(cls, name))) for name in methods_of(cls)}
    found = {name: {word for code in codes for word in code.co_names} for name, codes in called.items()}
    return frozenset(name for name, its in found.items() if "weight" in its and its & _JOINS and its & _LAYERS)


def _of_bases(cls: Any, names: set[str]) -> Iterator[Any]:
    """The methods of these names of the classes that a class derives from, where its own calls them."""
    bases = [base for base in cls.__mro__[1:] if base not in (nn.Module, object)]
    if names & {"super", *(base.__name__ for base in bases)}:
        for base in bases:
            its = (vars(base).get(name) for name in names - _OF_TORCH)
            yield from (method for method in its if isfunction(method) or isinstance(method, (property, staticmethod)))


def _called(function: Any, names: set[str]) -> Iterator[Any]:
    """The functions of these names that code of a function knows: in its file, imported, or in modules that are."""
    known = getattr(function, "__globals__", {})
    for one in map(known.get, names):  # whatever these are: tensors, say, which are neither true nor false
        within = map(vars(one).get, names) if ismodule(one) else [one]
        yield from (each for each in within if isfunction(each) and not each.__module__.startswith("torch."))


def _enclosed(function: Any) -> Iterator[Any]:
    """The functions that one is around, as a decorator's is that does not say so."""
    for cell in getattr(function, "__closure__", None) or ():
        inner = cell.cell_contents if cell != CellType() else None
        if isfunction(inner) and not inner.__module__.startswith("torch."):
            yield inner


def _applies_by_name(cls: Any, function: Any, names: set[str]) -> bool:
    """Whether some of these names is a function of autograd's, or its `apply`, which code may call by another name."""
    known = getattr(function, "__globals__", {})
    for name in names:
        for one in (known.get(name), getattr_static(cls, name, None)):
            one = getattr(one, "__func__", one) if isinstance(one, staticmethod) else one
            its = getattr(one, "__self__", None) if isinstance(one, (MethodType, BuiltinMethodType)) else one
            applied = (its is one and "apply" in names) or getattr(one, "__name__", "") == "apply"
            if isinstance(its, type) and issubclass(its, torch.autograd.Function) and applied:
                return True
    return False


def _may_apply(helper: Any, caller: Any) -> bool:
    """Whether a function may apply a function of autograd's: that of another file does, or something is around it.

    What a decorator puts around a function may call another one instead, a kernel such as those for Mamba.
    """
    if hasattr(helper, "__wrapped__"):
        return True
    return helper.__module__ != caller.__module__ and any("apply()" in _words_of(code) for code in _codes(helper))


def _words_of(code: CodeType) -> Iterator[str]:
    """The names and strings in a code, but for a `weight` of which only the class, the dtype or the like are asked."""
    found = [word for one in get_instructions(code) for word in _said(one) if word]
    for n, word in enumerate(found):
        if word in LISTS and n:
            yield f"{found[n - 1]}.{word}"
        if word == "isinstance" and found[n + 1 : n + 2] == ["self"] and {*found[n + 2 : n + 7]} & _TENSORS:
            yield "isinstance(self)"
        asked = {*found[n + 1 : n + 2]} & _ASKED or "isinstance" in found[max(0, n - 3) : n]
        if word != "weight" or not asked:
            yield word


def _said(one: Instruction) -> tuple[str, ...]:
    """Names, with brackets if each is an attribute that is loaded to be called; a string; or `@`.

    A method that is called with `*`, or in Python 3.10 with keywords, is loaded as any attribute is. So the methods
    that all modules have count as called wherever they are loaded.
    """
    loads = one.opname in ("LOAD_ATTR", "LOAD_METHOD")
    if isinstance(one.argval, str):
        called = loads and (one.opname == "LOAD_METHOD" or "NULL|self" in one.argrepr or one.argval in _OF_TORCH)
        return (f"{one.argval}()" if called else one.argval,)
    return ("@",) if one.argrepr in ("@", "@=") or one.opname.endswith("MATRIX_MULTIPLY") else _variables(one)


def _variables(one: Instruction) -> tuple[str, ...]:
    """The function's variables that an instruction is about: one, or since Python 3.13 two at once."""
    if "_FAST" not in one.opname:
        return ()
    return one.argval if isinstance(one.argval, tuple) else (one.argval,)


_ASKED = {"device", "dtype", "shape", "ndim", "requires_grad", "is_cuda"}
#: Ways to a module's parameters that do not name them.
LISTS = {"_parameters", "parameters()", "named_parameters()", "state_dict()", "__getattr__()"}
_ASKS = {"isinstance(self)", "get_parameter()"}
_MAPS = {"vmap()", "vmap", "functional_call()", "functional_call", "jacrev", "jacfwd", "grad_and_value"}
_TENSORS = {"Tensor", "Parameter"}
_ADAPTERS = "lora_A", "lora_B", "lora_magnitude"
# What the functions and classes are called by which methods put weights together, and make layers of them.
_JOINS = {"cat", "concat", "concatenate", "vstack", "hstack", "stack"}
_LAYERS = {"Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"}
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
