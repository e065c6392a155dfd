"""Whole or not at all: what changes a model is undone, bit for bit, if an error or Ctrl-C ends it before its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parameter import is_lazy

from lora.layers.kind import Place
from lora.layers.layer import LoRALayer
from lora.layers.parts import with_parts

# The dicts and sets that torch's modules, and ours, keep and change in place.
_CONTAINERS = (
    *(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))),
    *("lora_originals", "lora_kept", "lora_children", "lora_remembered"),
)
# What other threads may change meanwhile, and is not put back: the open blocks of `lora.disabled`.
_OF_OTHERS = "lora_disabled"


class _Module(NamedTuple):
    """A module's class, its attributes, and the contents of those that are changed in place."""

    module: nn.Module
    cls: type
    attributes: dict[str, Any]
    contents: dict[str, Any]
    adapted: bool

    @classmethod
    def of(cls, module: nn.Module) -> _Module:
        attributes = {name: value for name, value in vars(module).copy().items() if name != _OF_OTHERS}
        place: Place | None = attributes.get("lora_place")
        contents = {name: held.copy() for name in _CONTAINERS if (held := attributes.get(name))}
        return cls(module, type(module), attributes, contents, place is not None and place.adapted)

    def put_back(self) -> None:
        if type(self.module) is not self.cls:
            self.module.__class__ = self.cls
        own = vars(self.module)
        names = [name for name in own if name != _OF_OTHERS]
        if names != list(self.attributes):
            for name in names:
                del own[name]
        own.update(self.attributes)
        for name in _CONTAINERS:
            if name in self.attributes:
                _refill(self.attributes[name], self.contents.get(name, ()))
        place: Place | None = self.attributes.get("lora_place")
        if place is not None:
            place.adapted = self.adapted

    def refresh(self) -> None:
        """Have a layer compute anew what it derives from its attributes, once all is back."""
        if isinstance(self.module, LoRALayer):
            self.module.lora_refresh()


def _refill(container: Any, content: Any) -> None:
    """Give a dict or a set its content, in the same order; without emptying it where the names are the same."""
    if list(container) != list(content):
        container.clear()
    container.update(content)


class _Parameter(NamedTuple):
    """All of a parameter but its values."""

    parameter: Any
    data: Tensor
    trains: bool
    grad: Tensor | None
    attributes: dict[str, Any]

    @classmethod
    def of(cls, parameter: Any) -> _Parameter:
        grad = parameter.grad if parameter.is_leaf else None
        return cls(parameter, parameter.data, parameter.requires_grad, grad, dict(vars(parameter)))

    def put_back(self) -> None:
        parameter = self.parameter
        with torch.inference_mode(not is_lazy(parameter) and parameter.is_inference()):
            if parameter.is_leaf:
                parameter.grad = None  # it may have another shape
            parameter.data = self.data
            _refill(vars(parameter), self.attributes)
            if parameter.requires_grad != self.trains:
                parameter.requires_grad = self.trains
            if parameter.is_leaf:
                parameter.grad = self.grad


class _Value(NamedTuple):
    """A tensor, and a copy of its values."""

    tensor: Tensor
    copy: Tensor

    def put_back(self) -> None:
        with torch.inference_mode(self.tensor.is_inference()), torch.no_grad():
            self.tensor.copy_(self.copy)


class undo_on_error:
    """Put modules and tensors back as they were, bit for bit, if the block raises, even for Ctrl-C.

        with undo_on_error(model.modules()) as undo, undo:
            undo.keep(layer.weight)  # before its values are written
            layer.weight.copy_(merged)

    Ctrl-C in the undo waits until all is back. The context is entered twice, since Ctrl-C may come just as the inner
    exit begins: then the outer one undoes the block. A block that came to its end is not undone.

    Args:
        modules: their classes, attributes (also the contents of torch's own dicts: parameters, buffers, hooks) and
            parameters are put back, and what the parameters' `data`, `requires_grad` and `grad` were. Values that the
            block wrote into tensors are not, but for those that were kept. The modules' parts are put back, too.
        written: tensors to keep from the start.
        others: objects that are no modules, whose attributes are put back.
    """

    def __init__(
        self, modules: Iterable[nn.Module], written: Iterable[Tensor] = (), others: Iterable[Any] = ()
    ) -> None:
        self._modules = [_Module.of(module) for module in (*with_parts(modules), *others)]
        own = {id(p): p for one in self._modules for p in one.attributes.get("_parameters", {}).values()}
        self._parameters = [_Parameter.of(p) for p in own.values() if p is not None]
        self._kept: dict[int, _Value] = {}
        self._undone = 0
        self._is_over = False
        self.keep(*written)

    @torch.no_grad()
    def keep(self, *tensors: Tensor) -> None:
        """Copy the values of tensors that are about to be written; to the CPU, where they are on another device."""
        for tensor in tensors:
            if id(tensor) not in self._kept:
                # A model that fills a GPU has no room there for copies. What others' classes hold, they move their way.
                stays = type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type in ("cpu", "meta")
                value = tensor.detach()
                self._kept[id(tensor)] = _Value(tensor, value.clone() if stays else value.to("cpu"))

    def __enter__(self) -> undo_on_error:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None and not self._is_over:
            self._put_back()
        self._is_over = True
        self._kept.clear()  # an error's traceback holds this object

    def _put_back(self) -> None:
        """Undo the block. An interrupted step is done again, one that fails is passed over; both raise at last."""
        steps: list[Callable[[], None]] = [state.put_back for state in self._modules]
        steps += [parameter.put_back for parameter in self._parameters]
        steps += [value.put_back for value in reversed(self._kept.values())]  # the first copy of shared memory counts
        steps += [state.refresh for state in self._modules]
        raised: BaseException | None = None
        while self._undone < len(steps):
            try:
                steps[self._undone]()
                self._undone += 1
            except Exception as error:
                raised, self._undone = error, self._undone + 1
            except BaseException as error:
                raised = error
        if raised is not None:
            raise raised
