"""How layers of a model get the adapters of a bank, and lose them again."""

from __future__ import annotations

from typing import Any

from lora.banking.choice import Adapters
from lora.banking.layer import Banked
from lora.banking.stacks import Stacks
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.layers.parts import PARTS, Borrowed, Part, enter_part, leave_part, parts_of
from lora.layers.registry import class_for, kind_for
from lora.layers.state import PARAMETERS

_SHARED = "_buffers", "_non_persistent_buffers_set", "_modules"


def renewed(layer: Any) -> Any:
    """A layer of the bank, whose seats may be changed now, and put back as they were."""
    vars(layer)["lora_seats"] = {**layer.lora_seats}
    return layer


def banked(module: Any, parameter: str | None, adapters: Adapters) -> tuple[Any, bool]:
    """A module of the model, or its part for a parameter, as a layer of the bank; and whether it is one from now on."""
    layer = module
    if parameter is not None:
        layer = parts_of(module).get(parameter)
    if isinstance(layer, Banked):
        return layer, False
    if layer is None:
        assert parameter is not None, "it is a part"
        layer = PARTS[len(weights.whole_shape(module._parameters[parameter]))](module, parameter)
    if isinstance(layer, LoRALayer):  # with r = 0: a base layer by another name
        layer.lora_remove()
    vars(layer).pop("forward", None)  # the class's own, or the adapter would not have been made
    kind = kind_for(type(layer))
    assert kind is not None, "it was adapted"
    layer.__class__ = class_for(Banked, class_for(kind, type(layer)))
    vars(layer).update(lora_seats={}, lora_bank=adapters, lora_injected=True)
    layer.lora_called("")
    vars(layer).update(lora_base_tensors=tuple(layer._parameters), lora_stacks=Stacks())
    adapters.traced_layers[layer] = None
    if isinstance(layer, Part):
        enter_part(layer)
    return layer, True


def seat(layer: Any, name: str, adapted: Any) -> None:
    """Give a layer of the bank an adapter: that of a layer of a view, which becomes its seat."""
    own = dict(adapted.lora_parameters())
    names = {one: _called(layer, one) for one in layer.lora_base_tensors}
    names |= {one: _called(layer, f"{one}_{name}") for one in PARAMETERS}
    holder = layer
    if isinstance(layer, Part):
        holder = layer.lora_owner
        vars(layer)["lora_names"] = layer.lora_names | {f"{one}_{name}": names[one] for one in PARAMETERS}
        vars(layer)["_parameters"] = Borrowed(holder, layer.lora_names)
        vars(adapted).update(lora_owner=holder, lora_names=names)
    else:
        vars(adapted).update({kind: vars(layer)[kind] for kind in _SHARED})
    vars(adapted)["_parameters"] = Borrowed(holder, names)
    vars(adapted).pop("lora_place", None)
    for one, parameter in own.items():
        holder._parameters[names[one]] = parameter
    layer.lora_seats[name] = adapted
    vars(layer).update(r=max(layer.r, adapted.r), _in_place=layer._in_place or adapted._in_place)


def unseat(layer: Any, name: str) -> None:
    """Take an adapter from a layer of the bank; without room the layer is plain again when it has none."""
    gone = layer.lora_seats.get(name)
    if gone is None:
        return
    for one, _ in [*gone.lora_parameters()]:
        del gone._parameters[one]
    del layer.lora_seats[name]
    layer.lora_stacks.drop()
    if layer.lora_seats or layer.lora_bank.room is not None:  # a compiled model is to find the same layers
        vars(layer)["r"] = max((seat.r for seat in layer.lora_seats.values()), default=layer.r)
        return
    layer.lora_remove()
    if isinstance(layer, Part):
        leave_part(layer)


def keep_alone(layer: Any, name: str | None) -> LoRALayer | None:
    """Leave a layer of the bank with one adapter, as its own and only one; or plain, if it has none of it."""
    kept = None if name is None else layer.lora_seats.get(name)
    own = {} if kept is None else dict(kept.lora_parameters())
    layer.lora_remove()
    if kept is None:
        if isinstance(layer, Part):
            leave_part(layer)
        return None
    if isinstance(layer, Part):
        Part.__init__(layer, layer.lora_owner, layer.lora_parameter)
    layer.__class__ = type(kept)
    for attribute, value in vars(kept).items():
        vars(layer).setdefault(attribute, value)
    for one, parameter in own.items():
        layer._parameters[one] = parameter
    assert isinstance(layer, LoRALayer), "a seat is one"
    return layer


def _called(layer: Any, own: str) -> str:
    """What one of a layer's tensors is called by its holder: the layer, or a part's owner."""
    if isinstance(layer, Part):
        return layer.lora_names.get(own, f"{layer.lora_parameter}_{own}")
    return own
