"""Whole or not at all: what changes a model is undone, bit for bit, if an error or Ctrl-C ends it before its end."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from lora.layers.layer import LoRALayer

# The dicts and sets that torch's modules, and ours, keep and change in place.
_CONTAINERS = (
    *(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))),
    *("lora_originals", "lora_kept", "lora_children", "lora_remembered"),
)
# What other threads may change meanwhile, which is theirs: the blocks of `lora.disabled` that are open.
_OF_OTHERS = "lora_disabled"


class _Module(NamedTuple):
    """A module's class, its attributes, and what is in those of them that are changed in place."""

    module: nn.Module
    cls: type
    attributes: dict[str, Any]
    contents: list[tuple[Any, Any]]

    @classmethod
    def of(cls, module: nn.Module) -> _Module:
        attributes = {name: value for name, value in dict(vars(module)).items() if name != _OF_OTHERS}
        place = attributes.get("lora_place")
        held = [attributes[name] for name in _CONTAINERS if name in attributes] + ([vars(place)] if place else [])
        return cls(module, type(module), attributes, [(one, one.copy() if one else ()) for one in held])

    def put_back(self) -> None:
        if type(self.module) is not self.cls:
            self.module.__class__ = self.cls
        own = vars(self.module)
        _refill(own, {**self.attributes, **({_OF_OTHERS: own[_OF_OTHERS]} if _OF_OTHERS in own else {})})
        for container, content in self.contents:
            _refill(container, content)


def _refill(container: Any, content: Any) -> None:
    """Give a dict or a set its content, in the same order; without emptying it where the names are the same."""
    if list(container) != list(content):
        container.clear()
    container.update(content)


class _Parameter(NamedTuple):
    """What a parameter is beside its values."""

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
        with torch.inference_mode(parameter.is_inference()):
            if parameter.is_leaf:
                parameter.grad = None  # it may have another shape
            parameter.data = self.data
            _refill(vars(parameter), self.attributes)
            if parameter.requires_grad != self.trains:
                parameter.requires_grad_(self.trains)
            if parameter.is_leaf:
                parameter.grad = self.grad


class undo_on_error:
    """Put modules and tensors back as they were, bit for bit, if the block raises, even for Ctrl-C.

        with undo_on_error(model.modules()) as undo, undo:
            undo.keep(layer.weight)  # before its values are written
            layer.weight.copy_(merged)

    It is entered twice, since Ctrl-C may be pressed twice: what the inner exit was kept from, the outer one does again
    from its start. The block's end, or its error, counts: nothing is undone of a block that came to its end.

    Args:
        modules: their classes, attributes (also the contents of torch's own dicts: parameters, buffers, hooks) and
            parameters are put back, and what the parameters' `data`, `requires_grad` and `grad` were. Values that the
            block wrote into tensors are not, but for those that were kept.
        written: tensors to keep from the start.
    """

    def __init__(self, modules: Iterable[nn.Module], written: Iterable[Tensor] = ()) -> None:
        self._modules = [_Module.of(module) for module in modules]
        own = {id(p): p for one in self._modules for p in one.attributes.get("_parameters", {}).values()}
        self._parameters = [_Parameter.of(p) for p in own.values() if p is not None]
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
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
                self._kept[id(tensor)] = tensor, value.clone() if stays else value.to("cpu")

    def __enter__(self) -> undo_on_error:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None and not self._is_over:
            self._put_back()
        self._is_over = True
        self._kept.clear()  # an error's traceback holds this object

    def _put_back(self) -> None:
        """Undo the block. It takes nothing from what the block has left, and can be begun again anywhere in it."""
        for state in self._modules:
            state.put_back()
        for parameter in self._parameters:
            parameter.put_back()
        for tensor, value in reversed(self._kept.values()):  # tensors may share memory: the first copy counts
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(value)
        for state in self._modules:
            if isinstance(state.module, LoRALayer):
                state.module.lora_refresh()
