"""W in the place of the weight, where something else than a plain forward computes with it.

    W = g ⊙ (W₀ + s · B A)

The forward of a layer's class may scale what it looks up, pad what it convolves, or return a tuple; and that of its
parent may read its weight and never call it. So these run as they are, and find W where they read the weight: a value
that stands for W and is not built where that can be avoided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from types import MethodType
from typing import Any
from weakref import ref

import torch
import torch.nn as nn
from torch import Tensor

from lora.errors import instance
from lora.functional.fused import exact_dtype, without_autocast
from lora.layers.kind import LayerKind


def with_weight(layer: LayerKind, weight: object, *args: Any, **kwargs: Any) -> Any:
    """What the layer's base class computes with another value in the place of its weight."""
    base = layer.lora_base_class
    others = layer.lora_needs.others(layer, {"weight": weight})
    return with_others(layer, base, base.forward, others, *args, **kwargs)


def with_others(
    module: nn.Module, cls: type[nn.Module], method: Any, others: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """What a method of a class computes for a module that has other attributes.

    The method is called of a twin of the module that shares everything else with it. So the module itself is never
    without its own, and other threads may compute with it meanwhile.
    """
    own = own_of(module)
    twin = twin_of(module, cls, others)
    output = method(twin, *args, **kwargs)
    keep(module, own, twin, others)
    return output


def own_of(module: nn.Module) -> dict[str, Any]:
    """What a module has, before a method of its runs on a twin."""
    return {**vars(module), "_parameters": {**module._parameters}}


def twin_of(module: nn.Module, cls: type[nn.Module], others: dict[str, Any]) -> Any:
    """An instance of a class that shares everything but some attributes with a module.

    A method of the module that the module keeps, as a table of activations does, is the twin's there; and so is what a
    parametrization computes.
    """
    twin = object.__new__(cls)
    for name in computed_names(module):
        if not hasattr(cls, name):
            others.setdefault(name, getattr(module, name))
    vars(twin).update(vars(module), **others)  # they go before parameters of the same name
    for name, value in [*vars(twin).items()]:
        held = exchanged_in(value, [(module, twin)]) if _holds_methods(value) else value
        if held is not value:
            others[name] = vars(twin)[name] = held
    return twin


def computed_names(module: nn.Module) -> list[str]:
    """Which tensors are computed by parametrizations that the module got after its class.

    Torch puts a class in front of the module's for them, which goes when the module gets another class.
    """
    parametrized = module._modules.get("parametrizations")
    names = () if parametrized is None else (name for name, _ in parametrized.named_children())
    return [name for name in names if name in vars(type(module))]


def _holds_methods(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(_holds_methods(each) for each in (value.values() if isinstance(value, dict) else value))
    return type(value) is MethodType


def keep(module: nn.Module, own: dict[str, Any], twin: nn.Module, others: dict[str, Any]) -> None:
    """Give a module what a method kept on its twin, which had begun with the module's `own` and `others`.

    It is not given what holds the others, as when recurrent layers note which weights they have seen.
    """
    for name, value in vars(twin).items():
        changed = name not in others and name != "_parameters" and (name not in own or own[name] is not value)
        if changed and not _holds(value, [*others.values()]):
            vars(module)[name] = value
    for name in others:
        before = own["_parameters"].get(name)
        if before is not None and module._parameters.get(name) is not before:
            module._parameters[name] = before
            raise RuntimeError(f"`{name}` of {instance(module)}{_NOT_WRITTEN.format('an assignment')}")


def _holds(value: Any, others: list[Any]) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(_holds(each, others) for each in (value.values() if isinstance(value, dict) else value))
    value = value() if isinstance(value, ref) else value
    return isinstance(value, LowRankWeight) or any(value is other for other in others)


def exchanged_in(value: Any, others: list[tuple[Any, Any]]) -> Any:
    """A list, tuple or dict with others in the places of what it holds; anything else, and if it holds none, itself.

    Args:
        value: what may hold some, itself or further within.
        others: what may be held, each with the other that is to stand in its place.
    """
    if isinstance(value, (list, tuple)):
        new = [exchanged_in(each, others) for each in value]
        if all(a is b for a, b in zip(value, new, strict=True)):
            return value
        make = getattr(value, "_make", type(value))  # of a namedtuple, whose class takes them one by one
        return make(new)
    if isinstance(value, dict):
        held = {key: exchanged_in(each, others) for key, each in value.items()}
        if all(value[key] is each for key, each in held.items()):
            return value
        changed = copy(value)
        changed.update(held)
        return changed
    if type(value) is MethodType:
        return next((MethodType(value.__func__, new) for old, new in others if value.__self__ is old), value)
    return next((new for old, new in others if value is old), value)


class LowRankWeight:
    """W = g ⊙ (W₀ + s · B A) of a layer, in the place of the weight that its base class reads.

    Operations that the layer's kind is taught (`lora_taught`) are computed beside W₀, as in a plain layer. All others
    get W as a tensor that passes gradients on to A, B and the magnitudes.

    Args:
        layer: whose weight it is.
        A, B, scaling: the factors and s.
        gain: whether the layer's magnitudes count.
        dropout: of the inputs of B A; only taught operations can have it.
        transposed: stand for the transposed matrix.
        base: W₀, if it is not the layer's weight as it is, but in another dtype, say.
        rows: which of the layer's outputs it has, if not all.
    """

    def __init__(
        self,
        layer: LayerKind,
        A: Tensor,
        B: Tensor,
        scaling: float,
        *,
        gain: bool = False,
        dropout: float = 0.0,
        transposed: bool = False,
        base: Tensor | None = None,
        rows: slice | None = None,
    ) -> None:
        self.layer, self.A, self.B, self.scaling = layer, A, B, scaling
        self.base: Tensor = layer.weight if base is None else base
        self.gain, self.dropout, self.transposed, self.rows = gain, dropout, transposed, rows

    def dense(self, why: str = "an operation that is not known") -> Tensor:
        """W as a tensor, in the base weight's dtype, rounded once."""
        layer: Any = self.layer
        exact = exact_dtype(self.base.dtype)
        self._no_dropout(why)
        with without_autocast(self.base.device):
            update = layer.lora_delta(self.A.to(exact), self.B.to(exact)) * self.scaling
            W = self.base.to(exact) + update
            W = W * layer.lora_gain(exact) if self.gain else W
        return self._part_of(W.to(self.base.dtype))

    def part(self) -> Tensor:
        """What of W₀ it stands for."""
        return self._part_of(self.base)

    def _part_of(self, weight: Tensor) -> Tensor:
        if self.rows is not None:
            weight = weight.narrow(self.layer.lora_output_dims()[0], self.rows.start, self.rows.stop - self.rows.start)
        return weight.transpose(0, 1) if self.transposed else weight

    def _no_dropout(self, why: str) -> None:
        if self.dropout:
            raise RuntimeError(
                f"`lora_dropout` (={self.dropout}) must be 0 for {_said(self.layer)}: the forward computes with the "
                f"weight by {why}, whose inputs cannot be dropped."
            )

    def taught(self, function: Any) -> Callable[..., Any] | None:
        """What computes a function of W beside W₀; it takes the function's arguments, and may not know some."""
        how = type(self.layer).lora_taught.get(function)
        return None if how is None else partial(getattr(self.layer, how), self)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        for value in (*args, *kwargs.values()):
            how = value.taught(function) if isinstance(value, LowRankWeight) else None
            result = NotImplemented if how is None else how(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for value in _written(name, args, kwargs):
            if isinstance(value, LowRankWeight):
                value.refuse_to_write(name)
        return function(*(_dense(v, name) for v in args), **{key: _dense(v, name) for key, v in kwargs.items()})

    # ---- what is known of a tensor without its values ------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """The weight's shape."""
        return self.part().shape

    def size(self, dim: int | None = None) -> Any:
        """The weight's shape, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def T(self) -> Any:
        """W transposed."""
        return self.t() if self.base.dim() == 2 else self.dense("T").T

    mT = T

    def t(self) -> LowRankWeight:
        """W transposed."""
        return self._with(self.base, not self.transposed)

    def with_base(self, base: Tensor) -> LowRankWeight:
        """The same update of another tensor, such as W₀ in another dtype."""
        return self._with(base, self.transposed)

    def with_rows(self, rows: slice) -> LowRankWeight:
        """W's part for some of the layer's outputs."""
        return self._with(self.base, self.transposed, rows)

    def _with(self, base: Tensor, transposed: bool, rows: slice | None = None) -> LowRankWeight:
        settings: dict[str, Any] = {"gain": self.gain, "dropout": self.dropout, "transposed": transposed, "base": base}
        return LowRankWeight(self.layer, self.A, self.B, self.scaling, **settings, rows=rows or self.rows)

    def to(self, *args: Any, **kwargs: Any) -> LowRankWeight:
        """W in another dtype, or on another device."""
        return self.with_base(self.base.to(*args, **kwargs))

    def type_as(self, other: Tensor) -> LowRankWeight:
        """W in the dtype of another tensor."""
        return self.to(other.dtype)

    def type(self, dtype: Any = None) -> Any:
        """W in another dtype, or the name of its own."""
        return self.base.type() if dtype is None else self.with_base(self.base.type(dtype))

    def float(self) -> LowRankWeight:
        """W in float32."""
        return self.to(torch.float32)

    def transpose(self, dim0: int, dim1: int) -> Any:
        """W with two dimensions exchanged."""
        whole = self.base.dim() == 2 and {dim0 % 2, dim1 % 2} == {0, 1}
        return self.t() if whole else self.dense("transpose").transpose(dim0, dim1)

    def __getattr__(self, name: str) -> Any:
        if name in _KNOWN:
            return getattr(self.part(), name)
        if name.startswith("__"):  # what copy, pickle and others look for
            raise AttributeError(name)
        if _writes(name):
            self.refuse_to_write(f".{name}")
        method: Any = getattr(Tensor, name, None)
        if method in type(self.layer).lora_taught:
            return lambda *args, **kwargs: LowRankWeight.__torch_function__(method, (), (self, *args), kwargs)
        return getattr(self.dense(name), name)

    def refuse_to_write(self, name: str) -> None:
        """RuntimeError: what is written to W, which is made anew in each forward, would be lost."""
        raise RuntimeError(f"{_said(self.layer)}{_NOT_WRITTEN.format(f'`{name}`')}")

    @property
    def data(self) -> Tensor:
        """W without gradients, which cannot be written to either."""
        values = self.dense("data").detach()
        if torch.compiler.is_compiling():
            return values
        values = values.as_subclass(_Unwritten)
        values.of = self
        return values

    @data.setter
    def data(self, value: Any) -> None:
        self.refuse_to_write(".data =")

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense("indexing")[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.refuse_to_write("[…] =")

    __hash__ = object.__hash__  # `==` is of the values

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return iter(self.dense("iteration"))


class _Unwritten(Tensor):
    """The values of W, of which a write would be lost."""

    of: LowRankWeight

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        written = [value for value in _written(name, args, kwargs) if isinstance(value, _Unwritten)]
        with torch._C.DisableTorchFunctionSubclass():
            before = [value.clone() for value in written]
            result = function(*args, **kwargs)
            # A bound that all values keep (Gemma 3n's `.data.clamp_`) writes nothing that could be lost.
            lost = [value for value, old in zip(written, before, strict=True) if not torch.equal(value, old)]
        for value in lost:
            value.of.refuse_to_write(f".data.{name}")
        if isinstance(result, Tensor) and args and isinstance(args[0], _Unwritten):
            values = result.as_subclass(Tensor)
            if not _shares(values, args[0]):
                return values
            result = values.as_subclass(_Unwritten)
            result.of = args[0].of
        return result


def _shares(one: Tensor, other: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _writes(name: str) -> bool:
    """Whether a function of this name writes to its first argument."""
    return name == "__setitem__" or (name.endswith("_") and not name.startswith("_")) or name in _IN_PLACE


def _written(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a call writes to; a compiler does not trace the names of functions."""
    if torch.compiler.is_compiling():
        return ()
    return (*(args[:1] if _writes(name) else ()), kwargs.get("out"))


_NOT_WRITTEN = (
    " must not be written to in a forward, as {} does: the weight there is W₀ + s · B A, which is made anew in each "
    "forward. Leave the layer out of `target_modules`, or switch that off in the model "
    "(RWKV: `model.config.rescale_every = 0`)."
)
# What a weight has in common with W.
_KNOWN = {"dtype", "device", "ndim", "dim", "numel", "layout", "is_cuda", "is_cpu", "is_meta", "element_size"}


def _said(layer: Any) -> str:
    """A layer's weight in words; of a part, what the owner calls it."""
    owner = vars(layer).get("lora_owner")
    if owner is not None:
        return f"`{layer.lora_parameter}` of {instance(owner)}"
    return f"the weight of {instance(layer)}"


def _dense(value: Any, why: str) -> Any:
    if isinstance(value, LowRankWeight):
        return value.dense(why)
    return type(value)(_dense(each, why) for each in value) if type(value) in (list, tuple) else value


def _in_place(name: str) -> Callable[..., Any]:
    def compute(self: LowRankWeight, other: Any) -> Any:
        if self.base is self.layer.weight:  # else it is a copy, or a part, which the forward has for itself
            self.refuse_to_write(name)
        return getattr(Tensor, name.replace("__i", "__"))(self.dense(name), _dense(other, name))

    return compute


def _operator(name: str) -> Callable[..., Any]:
    def compute(self: LowRankWeight, *others: Any) -> Any:
        function = getattr(Tensor, name)
        return LowRankWeight.__torch_function__(function, (), (self, *others))

    return compute


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_COMPARISONS, "neg", "abs"):
    setattr(LowRankWeight, f"__{_name}__", _operator(f"__{_name}__"))
_IN_PLACE = {f"__i{name}__" for name in _BINARY if name != "matmul"}
for _name in _IN_PLACE:
    setattr(LowRankWeight, _name, _in_place(_name))
