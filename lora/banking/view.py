"""A model with one adapter of a bank, or none, for everything that knows models with one adapter.

A view is a tree of twins of the model's modules. They share its tensors, and have attributes, children and classes of
their own: what is done to a view's modules is not done to the model. In the place of a layer of the bank it has the
adapter's seat, or a plain twin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn as nn

from lora.banking.layer import Banked
from lora.layers import weights
from lora.layers.in_place import twin_of
from lora.layers.layer import LoRALayer
from lora.layers.parts import forget_parts, parts_of
from lora.models.model import forget_children
from lora.models.readers import let_read_no_more
from lora.models.training import forget_originals

_PARTS = "lora_parts"


class View(NamedTuple):
    """A model with one adapter.

    Attributes:
        model: the root of the twins.
        of: the model's module that each twin, by the module itself, stands for.
    """

    model: nn.Module
    of: dict[nn.Module, nn.Module]


def view_of(model: nn.Module, name: str | None = None) -> View:
    """A model with the adapter of this name in the place of its bank; with None the model without any."""
    weights.reshard(model)  # FSDP2 may have left whole parameters in its own's places
    twins = {module: _twin(module, name) for module in model.modules()}
    for module, twin in twins.items():
        if twin is not seat_of(module, name):
            children = {child: None if one is None else twins[one] for child, one in module._modules.items()}
            vars(twin)["_modules"] = children
    return View(twins[model], {twin: module for module, twin in twins.items()})


def seat_of(module: nn.Module, name: str | None) -> Any:
    """A layer with the adapter of this name alone; None if it has none of it."""
    return module.lora_seats.get(name) if isinstance(module, Banked) and name is not None else None


def _twin(module: nn.Module, name: str | None) -> Any:
    seat = seat_of(module, name)
    if seat is not None:
        return seat
    twin = twin_of(module, type(module), {})
    own = vars(twin)
    for kind in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        own[kind] = own[kind].copy()
    parts = parts_of(module)
    for part in parts.values():
        for adapter, _ in part.lora_parameters():
            own["_parameters"].pop(part.lora_names[adapter], None)
    forget_children(twin)
    let_read_no_more(twin)
    forget_parts(twin)
    if weights.is_fully_sharded(module):
        own["reshard"] = module.reshard  # by its state, which FSDP2 knows of the module itself alone
    if isinstance(twin, Banked):
        own["lora_place"] = None
        twin.lora_remove()
    seats = {parameter: seat for parameter, part in parts.items() if (seat := seat_of(part, name)) is not None}
    if seats:
        own[_PARTS] = seats
    return twin


def adapted_in(view: View) -> list[tuple[LoRALayer, nn.Module, str | None]]:
    """The layers of a view that got an adapter in it, each with the model's module, and the parameter that it is of."""
    found: list[tuple[LoRALayer, nn.Module, str | None]] = []
    for twin, module in view.of.items():
        if isinstance(twin, LoRALayer) and twin.r > 0:
            found.append((twin, module, None))
        found += [(part, module, name) for name, part in parts_of(twin).items()]
    return found


def as_it_is(view: View) -> View:
    """A view of a model that takes the values of all that its adapters share for the base's.

    Else loading an adapter would give back running statistics, with which other adapters compute.
    """
    for twin in view.of:
        forget_originals(twin)
    return view
