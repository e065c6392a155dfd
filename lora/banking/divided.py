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
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lora.banking.choice import Choice
from lora.errors import instance, with_article
from lora.functional.rows import Rows
from lora.layers.layer import LoRALayer
from lora.layers.parts import Stack, parts_of
from lora.layers.replay import seeded
from lora.models.readers import Reads, WeightReader, let_read_no_more

# ---- where rows are ------------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """Where a tensor has rows: in which dimension, and how many entries of it each row has."""

    dim: int
    each: int = 1


# Where a tensor of a module's has rows; None if it has none.
_Where = Callable[[Any, Tensor], Axis | None]


class Layout(NamedTuple):
    """Where the arguments and outputs of a class have rows: by the arguments' names, and the outputs' order."""

    inputs: Mapping[str, _Where]
    outputs: Sequence[_Where]


def _in_batch(module: Any, tensor: Tensor) -> Axis | None:
    """(batch, length, features) or, as torch has it by default, (length, batch, features)."""
    attention = next((m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), module)
    return None if tensor.dim() < 3 else Axis(0 if attention.batch_first else 1)


def _in_first(module: Any, tensor: Tensor) -> Axis | None:
    """(batch, …), of which a tensor without a batch has but one dimension."""
    return None if tensor.dim() < 2 else Axis(0)


def _in_second(module: Any, tensor: Tensor) -> Axis | None:
    """(layers, batch, features)."""
    return None if tensor.dim() < 3 else Axis(1)


def _in_heads(module: Any, mask: Tensor) -> Axis | None:
    """(batch · heads, length, length), or a mask (length, length) for all."""
    heads = next(m.num_heads for m in module.modules() if isinstance(m, nn.MultiheadAttention))
    return None if mask.dim() < 3 else Axis(0, heads)


_QUERIES = dict.fromkeys(("query", "key", "value"), _in_batch)
_SOURCE = {"src": _in_batch, "mask": _in_heads, "src_mask": _in_heads, "src_key_padding_mask": _in_first}
_TARGET = {
    **dict.fromkeys(("tgt", "memory"), _in_batch),
    **dict.fromkeys(("tgt_mask", "memory_mask"), _in_heads),
    **dict.fromkeys(("tgt_key_padding_mask", "memory_key_padding_mask"), _in_first),
}
_ENCODER, _DECODER = Layout(_SOURCE, (_in_batch,)), Layout(_TARGET, (_in_batch,))
_ATTENTION = Layout({**_QUERIES, "key_padding_mask": _in_first, "attn_mask": _in_heads}, (_in_batch, _in_first))
_RECURRENT = Layout({"input": _in_batch, "hx": _in_second}, (_in_batch, _in_second))
_CELL = Layout({"input": _in_first, "hx": _in_first}, (_in_first, _in_first))
# By the function that is called, which classes that derive from these may have of their own.
_LAYOUTS: dict[Any, Layout] = {
    nn.MultiheadAttention.forward: _ATTENTION,
    **dict.fromkeys((cls.forward for cls in (nn.RNN, nn.LSTM, nn.GRU)), _RECURRENT),
    **dict.fromkeys((cls.forward for cls in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)), _CELL),
    **dict.fromkeys((cls.forward for cls in (nn.TransformerEncoderLayer, nn.TransformerEncoder)), _ENCODER),
    **dict.fromkeys((cls.forward for cls in (nn.TransformerDecoderLayer, nn.TransformerDecoder)), _DECODER),
    nn.Transformer.forward: Layout({**_SOURCE, **_TARGET}, (_in_batch,)),
}


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
        self.layout = _LAYOUTS.get(inspect.unwrap(getattr(method, "func", method)))
        self.by_tokens = any(isinstance(part, Stack) for part in parts_of(module).values())
        its = inspect.signature(method).parameters.values()
        known = [one.name for one in its if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        names = [known[n] if n < len(known) else f"argument {n}" for n in range(len(args))]
        self.args, self.kwargs = [*zip(names, args, strict=True)], kwargs
        given = {name: value for name, value in (*self.args, *kwargs.items()) if isinstance(value, _INPUTS)}
        name = next((one for one in (self.layout.inputs if self.layout else given) if one in given), None)
        if name is None or isinstance(given[name], PackedSequence):
            what = "no tensor" if name is None else "a packed sequence, whose rows are not in order"
            raise self._error(f"it is given {what}")
        self.x: Tensor = given[name]
        axis = self._axis(name, self.x)
        if axis is None:
            raise self._error(f"its input of shape {tuple(self.x.shape)} has no batch")
        self.rows = choice.rows_of((self.x.shape[axis.dim],), where)
        self.groups = _groups(choice, self.rows)

    def run(self) -> Any:
        """What the method computes, of each group of rows with their own adapter."""
        outputs, alone = [], len(self.groups) == 1
        for name, index in self.groups:
            args = [value if alone else self._taken(one, value, index) for one, value in self.args]
            kwargs = {one: value if alone else self._taken(one, value, index) for one, value in self.kwargs.items()}
            with Choice(self.choice.adapters, name), self._drawing(name):
                outputs.append(self.method(*args, **kwargs))
        return outputs[0] if alone else self._joined(outputs, self._outputs_axis)

    def _drawing(self, name: str | None) -> AbstractContextManager[None]:
        """A context in which what is random depends on the adapter of the rows alone."""
        if name is None or not self.module.training:
            return nullcontext()
        return seeded(self.choice.adapters.known[name].next(), self.x.device)

    # ---- arguments -------------------------------------------------------------------------------------------

    def _axis(self, name: str, tensor: Tensor) -> Axis | None:
        """Where an argument has rows."""
        if self.layout is not None:
            where = self.layout.inputs.get(name)
            return None if where is None else where(self.module, tensor)
        if tensor is self.x:
            return Axis(0) if tensor.dim() else None
        if tensor.dim() == 0 or tensor.shape[0] != self.x.shape[0] or isinstance(tensor, nn.Parameter):
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

    def _taken(self, name: str, value: Any, index: Tensor) -> Any:
        """The rows of a group in an argument."""
        if isinstance(value, PackedSequence):
            raise self._error(f"`{name}` is a packed sequence, whose rows are not in order")
        if isinstance(value, Tensor):
            axis = self._axis(name, value)
            return value if axis is None else _taken(value, axis, index)
        if isinstance(value, (list, tuple)):
            return _like(value, [self._taken(name, each, index) for each in value])
        if isinstance(value, dict):
            return _with_items(
                value, {key: self._taken(f"{name}[{key!r}]", each, index) for key, each in value.items()}
            )
        if value is not None and not isinstance(value, _WITHOUT_ROWS) and not callable(value):
            raise self._error(f"`{name}` is {with_article(type(value).__name__)}, of which nobody knows the rows")
        return value

    # ---- outputs -----------------------------------------------------------------------------------------------

    def _outputs_axis(self, place: int, tensors: Sequence[Tensor]) -> Axis:
        """Where an output has rows, which the groups have."""
        counts = [len(index) for _, index in self.groups]
        axis: Axis | None = Axis(0)
        if self.layout is not None:
            axis = self.layout.outputs[place](self.module, tensors[0])
        sizes = [] if axis is None else [t.shape[axis.dim] if t.dim() > axis.dim else -1 for t in tensors]
        if axis is None or sizes != counts:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise self._error(f"of {', '.join(map(str, counts))} rows, its outputs have the shapes {shapes}")
        return axis

    def _joined(self, values: Sequence[Any], axis_of: Callable[[int, Sequence[Tensor]], Axis], place: int = 0) -> Any:
        """What the groups gave, as one, in the rows' order."""
        first, *rest = values
        if all(value is first for value in rest):
            return first
        if any(type(value) is not type(first) for value in rest):
            raise self._error(f"it gives {' and '.join(sorted({with_article(type(v).__name__) for v in values}))}")
        if isinstance(first, Tensor):
            return self._together(values, axis_of(place, values))
        if isinstance(first, (list, tuple)) and all(len(value) == len(first) for value in rest):
            by_place = enumerate(zip(*values, strict=True))
            return _like(first, [self._joined(each, axis_of, place or n) for n, each in by_place])
        if isinstance(first, dict) and all([*value] == [*first] for value in rest):
            return _with_items(first, {key: self._joined([v[key] for v in values], axis_of, place) for key in first})
        if isinstance(first, _WITHOUT_ROWS) and all(value == first for value in rest):
            return first
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
# What has no rows: what says how to compute.
_WITHOUT_ROWS = (int, float, complex, str, bytes, Enum, slice, torch.dtype, torch.device, torch.Size, torch.Generator)


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
    return _Division(module, method, choice, where, args, kwargs).run()


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
