"""Modules that compute with the weight of one adapter at a time: in a mixed batch they run once for each, on its rows.

A class with a forward of its own, and a module that reads the weights of layers in it, find one W there. So their
arguments are divided by the rows' adapters, and what comes out is put together in the rows' order. Each row is computed
once, by the base as well.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from enum import Enum
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lora.banking.choice import Block, Choice
from lora.banking.layouts import LAYOUTS, Axis
from lora.errors import instance, with_article
from lora.functional.rows import Rows
from lora.layers.layer import LoRALayer
from lora.layers.parts import Stack, parts_of
from lora.layers.replay import seeded
from lora.models.readers import Reads, WeightReader, let_read_no_more


class _Division:
    """One call of a module's method, to be divided by the rows of its first tensor.

    Args:
        module: the module, or the layer.
        method: its method, bound.
        choice: which adapters the rows have.
        where: the module in words, for errors.
        args, kwargs: what the method is called with.
    """

    def __init__(
        self,
        module: Any,
        method: Callable[..., Any],
        choice: Choice,
        where: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.module, self.method, self.choice, self.where = module, method, choice, where
        # Of each group the twins of caches, by the ids of these; the caches, by their own and the twins'; and what of
        # their tensors was handed out, by its id: with the whole, and its version then.
        self.twins: list[dict[int, Any]] = []
        self.caches: dict[int, Any] = {}
        self.handed: dict[int, tuple[Tensor, Tensor, int]] = {}
        self.layout = LAYOUTS.get(inspect.unwrap(getattr(method, "func", method)))
        self.by_tokens = any(isinstance(part, Stack) for part in parts_of(module).values())
        heads = getattr(module, "num_heads", 1)
        self.heads = heads if isinstance(heads, int) else 1
        its = inspect.signature(method).parameters.values()
        known = [one.name for one in its if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        names = [known[n] if n < len(known) else f"argument {n}" for n in range(len(args))]
        self.args, self.kwargs = [*zip(names, args, strict=True)], kwargs
        given = {name: value for name, value in (*self.args, *kwargs.items()) if isinstance(value, _INPUTS)}
        name = next((one for one in (self.layout.inputs if self.layout else given) if one in given), "")
        x = given.get(name)
        if not isinstance(x, Tensor):
            raise self._error(f"it is given {'no tensor' if x is None else _PACKED}")
        self.x = x
        axis = self._axis(name, x)
        if axis is None:
            raise self._error(f"its input of shape {tuple(x.shape)} has no batch")
        if axis.dim == 0 and x.dim() > 2:
            choice.rows_of(x.shape[:2], where)  # which looks where else rows may be
        rows = choice.rows_of((x.shape[axis.dim],), where)
        if self.by_tokens and rows.count != choice.count and len(given) == 1 and choice.flattened:
            raise self._error(f"`{name}` may have its tokens once for each expert, and nothing says whose they are")
        self.groups = _groups(choice, rows)
        self.counts = [len(index) for _, index in self.groups]

    def run(self) -> Any:
        """What the method computes, of each group of rows with their own adapter."""
        outputs = []
        for name, index in self.groups:
            self.twins.append({})
            args = [self._taken(one, value, index) for one, value in self.args]
            kwargs = {one: self._taken(one, value, index) for one, value in self.kwargs.items()}
            outputs.append(with_one(self.module, self.method, self.choice, name, args, kwargs))
        output = self._joined(outputs, self._output)
        for held in [*self.caches.values()]:
            vars(held).update(self._joined([vars(twins[id(held)]) for twins in self.twins], self._kept))
        return output

    # ---- arguments -------------------------------------------------------------------------------------------

    def _axis(self, name: str, tensor: Tensor) -> Axis | None:
        """Where an argument has rows."""
        if self.layout is not None:
            where = self.layout.inputs.get(name)
            return None if where is None else where(self.module, tensor)
        if tensor is self.x:
            return Axis(0) if tensor.dim() else None
        rows = self.x.shape[0]
        if tensor.dim() > 2 and self.heads > 1 and tensor.shape[0] == rows * self.heads:
            return Axis(0, self.heads)  # as ALiBi's slopes are given
        if tensor.dim() == 0 or tensor.shape[0] != rows or isinstance(tensor, nn.Parameter):
            return None
        if not self._is_like(tensor, self.x):
            raise self._error(
                f"`{name}` of shape {tuple(tensor.shape)} may have a row of the batch in each entry of its first "
                f"dimension, or not: {tensor.shape[0]} is another size of its input {tuple(self.x.shape)}, too"
            )
        return Axis(0)

    def _is_like(self, tensor: Tensor, x: Tensor) -> bool:
        """Whether a tensor whose first dimension has the size of x's has rows there for certain."""
        if tensor.shape[0] not in x.shape[1:]:
            return True
        return tensor.shape[:-1] == x.shape[:-1] and (self.by_tokens or x.dim() > 2 or tensor.shape == x.shape)

    def _taken(self, name: str, value: Any, index: Tensor, held: bool = False) -> Any:
        """The rows of a group in an argument, or in what a cache holds."""
        if isinstance(value, PackedSequence):
            raise self._error(f"`{name}` is {_PACKED}")
        if isinstance(value, Tensor) and held:
            return self._handed(value, index)
        if isinstance(value, Tensor):
            axis = self._axis(name, value)
            return value if axis is None else _taken(value, axis, index)
        if isinstance(value, (list, tuple)):
            return _like(value, [self._taken(name, each, index, held) for each in value])
        if isinstance(value, dict):
            items = value.items()
            return _with_items(value, {key: self._taken(f"{name}[{key!r}]", each, index, held) for key, each in items})
        if _is_cache(value):
            return self._twin(name, value, index)
        if value is not None and not isinstance(value, _WITHOUT_ROWS) and not callable(value):
            raise self._error(f"`{name}` is {with_article(type(value).__name__)}, of which nobody knows the rows")
        return value

    def _twin(self, name: str, cache: Any, index: Tensor) -> Any:
        """A cache that holds the rows of a group, for the module to write to."""
        twins = self.twins[-1]
        if id(cache) not in twins:
            twin = twins[id(cache)] = object.__new__(type(cache))
            self.caches[id(twin)] = self.caches[id(cache)] = cache
            its = vars(cache).items()
            vars(twin).update({own: self._taken(f"{name}.{own}", value, index, held=True) for own, value in its})
        return twins[id(cache)]

    def _handed(self, tensor: Tensor, index: Tensor) -> Tensor:
        """The rows of a group in a tensor of a cache, which have the first dimension there; of others a copy."""
        if tensor.dim() < 2 or tensor.shape[0] != sum(self.counts):
            return tensor.clone()
        rows = _taken(tensor, Axis(0), index)
        if not rows.is_inference():
            self.handed[id(rows)] = rows, tensor, rows._version
        return rows

    # ---- outputs -----------------------------------------------------------------------------------------------

    def _output(self, place: int, tensors: Sequence[Tensor]) -> Tensor:
        """An output of all groups."""
        axis: Axis | None = Axis(0)
        if self.layout is not None:
            axis = self.layout.outputs[place](self.module, tensors[0])
        sizes = [] if axis is None else [t.shape[axis.dim] if t.dim() > axis.dim else -1 for t in tensors]
        if axis is not None and sizes == self.counts:
            return self._together(tensors, axis)
        for each in (prod(self.x.shape[1:-1]), self.heads):  # tokens that it flattens; (rows · heads, …)
            if self.layout is None and sizes == [each * count for count in self.counts]:
                return self._together(tensors, Axis(0, each))
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise self._error(f"of {', '.join(map(str, self.counts))} rows, its outputs have the shapes {shapes}")

    def _kept(self, place: int, tensors: Sequence[Tensor]) -> Tensor:
        """What the caches of all groups hold in one place."""
        handed = [self.handed.get(id(tensor)) for tensor in tensors]
        if all(one is not None and one[0]._version == one[2] for one in handed) and handed[0] is not None:
            return handed[0][1]  # nobody wrote to it
        if all(tensor.dim() > 1 for tensor in tensors) and [len(tensor) for tensor in tensors] == self.counts:
            return self._together(tensors, Axis(0))
        if all(torch.equal(tensor, tensors[0]) for tensor in tensors):
            return tensors[0]
        raise self._error("a cache holds what has no rows, and differs with the adapters")

    def _joined(self, values: Sequence[Any], join: Callable[[int, Sequence[Tensor]], Tensor], place: int = -1) -> Any:
        """What the groups gave, as one, in the rows' order."""
        first, *rest = values
        if all(value is first for value in rest):
            return first
        if any(type(value) is not type(first) for value in rest):
            raise self._error(f"it gives {' and '.join(sorted({with_article(type(v).__name__) for v in values}))}")
        if isinstance(first, Tensor):
            return join(max(place, 0), values)
        if isinstance(first, (list, tuple)) and all(len(value) == len(first) for value in rest):
            each = enumerate(zip(*values, strict=True))
            return _like(first, [self._joined(of, join, n if place < 0 else place) for n, of in each])
        if isinstance(first, dict) and all([*value] == [*first] for value in rest):
            return _with_items(first, {key: self._joined([v[key] for v in values], join, place) for key in first})
        if _is_cache(first):
            held = self.caches.get(id(first))
            if held is None:  # it was made within
                held = object.__new__(type(first))
                vars(held).update(self._joined([*map(vars, values)], self._kept))
            return held
        if isinstance(first, _WITHOUT_ROWS) and all(value == first for value in rest):
            return first
        if join == self._kept and [*values] == self.counts:
            return sum(self.counts)
        raise self._error(f"it gives {with_article(type(first).__name__)}, of which nobody knows the rows")

    def _together(self, tensors: Sequence[Tensor], axis: Axis) -> Tensor:
        order = torch.cat([index for _, index in self.groups])
        joined = torch.cat([*tensors], axis.dim)
        if torch.equal(order, torch.arange(len(order))):
            return joined
        return _taken(joined, axis, order.argsort())

    def _error(self, why: str) -> RuntimeError:
        return RuntimeError(
            f"{self.where}: computes with one adapter at a time, and its arguments cannot be divided by the rows' "
            f"adapters: {why}. Use `bank.use(name)` here, with a batch for each adapter."
        )


_INPUTS = (Tensor, PackedSequence)
_PACKED = "a packed sequence, whose rows are not in order"
# What has no rows: what says how to compute.
_WITHOUT_ROWS = (int, float, complex, str, bytes, Enum, slice, torch.dtype, torch.device, torch.Size, torch.Generator)


def _is_cache(value: Any) -> bool:
    """Whether it is of transformers' caches, which hold what attention has seen of each row."""
    return any(owner.__module__ == "transformers.cache_utils" for owner in type(value).__mro__)


def _groups(choice: Choice, rows: Rows) -> list[tuple[str | None, Tensor]]:
    """Each adapter that has rows, and None for the base, with the places of its rows, in order."""
    scattered = rows.scattered(torch.device("cpu"))
    owner = torch.full((rows.count,), -1)
    for part in rows.parts:
        at = part.rows
        owner[scattered[at] if part.gathered and scattered is not None else at] = part.adapter
    numbers = [*(part.adapter for part in rows.parts), -1]
    found = [(choice.order[n] if n >= 0 else None, (owner == n).nonzero().flatten()) for n in numbers]
    return [(name, index) for name, index in found if len(index)]


def _taken(tensor: Tensor, axis: Axis, index: Tensor) -> Tensor:
    """Some rows of a tensor: where they stand side by side, without a copy."""
    start, n = int(index[0]), len(index)
    if torch.equal(index, torch.arange(start, start + n)):
        return tensor.narrow(axis.dim, start * axis.each, n * axis.each)
    if axis.each != 1:
        index = (index[:, None] * axis.each + torch.arange(axis.each)).flatten()
    return tensor.index_select(axis.dim, index.to(tensor.device))


def _like(value: Any, items: list[Any]) -> Any:
    """A list or tuple with other items; a namedtuple's class takes them one by one."""
    return getattr(value, "_make", type(value))(items)


def _with_items(value: Any, items: dict[Any, Any]) -> Any:
    """A dict with other values; transformers' outputs are dicts that know no `update`."""
    changed = copy(value)
    for key, item in items.items():
        changed[key] = item
    return changed


def divide(module: Any, method: Callable[..., Any], choice: Choice, where: str, *args: Any, **kwargs: Any) -> Any:
    """What a method of a module computes in a mixed batch, when it can compute with one adapter at a time.

    Args:
        module: the module, which says where its class has rows.
        method: its method, bound, which looks for the adapter that is chosen.
        choice: which adapter each row has.
        where: the module in words, for errors.
        args, kwargs: the method's arguments.

    Raises:
        RuntimeError: nobody knows which of the arguments, or outputs, have rows.
    """
    if not choice.is_of_one:
        return _Division(module, method, choice, where, args, kwargs).run()
    return with_one(module, method, choice, choice.order[0], args, kwargs)


def with_one(
    module: Any,
    method: Callable[..., Any],
    choice: Choice,
    name: str | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """What a method computes with one adapter in all rows; what is random depends on that adapter alone."""
    drawing: AbstractContextManager[None] = nullcontext()
    if name is not None and module.training:
        drawing = seeded(choice.adapters.known[name].next(), next(module.parameters()).device)
    with Block(Choice(choice.adapters, name, everyone=choice.everyone), is_seen=False), drawing:
        return method(*args, **kwargs)


# ---- modules that read weights ---------------------------------------------------------------------------------------


class Divided(nn.Module):
    """In front of the class of a module that reads weights of a bank's layers: in mixed batches its calls are divided.

    Attributes:
        lora_undivided: the class behind it.
    """

    lora_undivided: ClassVar[type[WeightReader]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, parts, *rest = reduced
        return _new, (make, *parts), *rest


def _in_front(reader: Any) -> type[Divided]:
    """The class that divides calls of a reader's methods."""
    return _made_class(reader)


@functools.cache
def _made_class(reader: Any) -> type[Divided]:
    def dividing(name: str) -> Any:
        method = getattr(reader, name)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            layers = [layer for layer in _banked(self) if not layer.lora_is_off()]
            choice = layers[0].lora_bank.chosen(layers[0].weight.device) if layers else None
            if choice is None or not any(layer.lora_present(choice) for layer in layers):
                return method(self, *args, **kwargs)
            where = f"{instance(self)} around {layers[0].lora_name}"
            return divide(self, functools.partial(method, self), choice, where, *args, **kwargs)

        return call

    namespace = {name: dividing(name) for name in reader.lora_reader[1]}
    own = {"__module__": reader.__module__, "lora_undivided": reader}
    return type(reader.__name__, (Divided, reader), namespace | own)


def _new(make: Callable[..., Any], *parts: Any) -> Any:
    module = make(*parts)
    module.__class__ = _in_front(type(module))
    return module


def let_divide(modules: Iterable[nn.Module]) -> None:
    """Let the modules that read weights divide mixed batches where they read those of a bank, and nowhere else.

    Those that read the weights of no adapted layer any more get their own class back.
    """
    for module in modules:
        if isinstance(module, WeightReader):
            reader: Any = module
            behind = type(module).lora_undivided if isinstance(module, Divided) else type(module)
            reader.__class__ = _in_front(behind) if any(_banked(module)) else behind
            if not any(isinstance(layer, LoRALayer) and layer.r > 0 for layer in _read(module, module.lora_reads)):
                let_read_no_more(module)


def _banked(module: Any) -> list[Any]:
    """The layers of a bank whose weights a module reads."""
    return [layer for layer in _read(module, module.lora_reads) if isinstance(layer, LoRALayer) and layer.lora_seats]


def _read(module: nn.Module, reads: Reads) -> Iterator[nn.Module]:
    yield from parts_of(module).values()
    for name, within in reads.items():
        child = module._modules.get(name)
        if child is not None:
            yield from [child] if within is None else _read(child, within)
