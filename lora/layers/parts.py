"""Layers that stand for one parameter of a module: a matrix or a stack of matrices that it keeps for itself.

A mixture's experts, attention and recurrent layers keep several weights and are no linear layers. Such a module is the
*owner* of its *parts*: a part is a layer whose `weight` is one of the owner's parameters. Its A and B are the owner's
too, by the names `<parameter>_lora_A` and `<parameter>_lora_B`. So a part can be whatever a layer can be, and adds no
module and no key to the model. The owner's forward finds W in the place of the parameter (`lora.models.readers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, ClassVar

import torch.nn as nn
from torch.nn.utils.parametrize import is_parametrized

from lora.errors import join
from lora.layers.in_place import LowRankWeight, exchanged_in
from lora.layers.state import PARAMETERS

# What a part has of its owner.
_TENSORS = "weight", *PARAMETERS
_PARTS = "lora_parts"
_OF_TORCH = frozenset(vars(nn.Module()))


def _beside(parameter: str, own: str) -> str:
    return parameter if own == "weight" else f"{parameter}_{own}"


class Borrowed(MutableMapping[str, Any]):
    """A layer's parameters, of which another module is the holder.

    What a parametrization of the holder computes is found by its name, and is in no list: it is no parameter.

    Args:
        holder: the module that has them.
        names: what they are called there, by the names that they have in the layer.
    """

    def __init__(self, holder: nn.Module, names: dict[str, str]) -> None:
        self.holder, self.names = holder, names

    def __getitem__(self, own: str) -> Any:
        name = self.names[own]
        if name not in self.holder._parameters and is_parametrized(self.holder, name):
            return getattr(self.holder, name)
        return self.holder._parameters[name]

    def __setitem__(self, own: str, tensor: Any) -> None:
        self.holder._parameters[self.names[own]] = tensor

    def __delitem__(self, own: str) -> None:
        del self.holder._parameters[self.names[own]]

    def __iter__(self) -> Iterator[str]:
        return (own for own, name in self.names.items() if name in self.holder._parameters)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, own: object) -> bool:  # the inherited one goes by errors, and forwards ask
        name = self.names.get(own, "") if isinstance(own, str) else ""
        return name in self.holder._parameters or is_parametrized(self.holder, name)

    def get(self, own: str, default: Any = None) -> Any:  # for the same reason
        tensor = self.holder._parameters.get(self.names.get(own, ""))
        if tensor is None and own in self:  # it is computed; or there is none, as of a layer without a bias
            tensor = self[own]
        return default if tensor is None else tensor

    def trained(self, owns: Iterable[str]) -> Iterator[nn.Parameter]:
        """The Parameters of these names, and those that others of them are computed from."""
        for own in owns:
            if own in [*self]:
                yield self[own]
            elif own in self:
                yield from self.holder.parametrizations[self.names[own]].parameters()  # type: ignore[union-attr,index]

    def copy(self) -> dict[str, Any]:
        """What a dict's `copy` is."""
        return dict(self)


def _of_owner(own: str) -> Any:
    def get(part: Part) -> Any:
        return getattr(part.lora_owner, part.lora_names[own])

    return property(get)


class Part(nn.Module):
    """A layer that stands for one parameter of another module.

    Attributes:
        lora_owner: the module.
        lora_parameter: what the parameter is called there.
        lora_names: what the owner calls the parameter, A, B and magnitudes, by the names that they have in a layer.
    """

    lora_owner: nn.Module
    lora_parameter: str
    lora_names: dict[str, str]

    weight, lora_A, lora_B, lora_magnitude = (_of_owner(own) for own in _TENSORS)
    bias: ClassVar[None] = None

    def __init__(self, owner: nn.Module, parameter: str) -> None:
        names = {own: _beside(parameter, own) for own in _TENSORS}
        # Past `nn.Module`, which would make the owner a child.
        vars(self).update(vars(nn.Module()), lora_owner=owner, lora_parameter=parameter, lora_names=names)
        del vars(self)["training"]
        vars(self)["_parameters"] = Borrowed(owner, names)

    @property
    def training(self) -> bool:  # type: ignore[override]
        """Whether the owner trains."""
        return self.lora_owner.training

    def is_entered(self) -> bool:
        """Whether the owner knows of it, as it does of one that is adapted."""
        known = parts_of(self.lora_owner).get(self.lora_parameter)
        return known is not None and self in (known, *known.lora_seats.values())

    def extra_repr(self) -> str:
        """The weight's shape."""
        return " × ".join(map(str, self.weight.shape))


class Matrix(Part):
    """A matrix (out_features, in_features) that a module keeps for itself."""

    @property
    def in_features(self) -> int:
        """The size of what the matrix is multiplied with."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """The size of the product."""
        return int(self.weight.shape[0])


class Stack(Part):
    """A stack of matrices that a module keeps for itself: a mixture's experts."""

    @property
    def is_transposed(self) -> bool:
        """Whether it is (n, in_features, out_features), and not (n, out_features, in_features): transformers' word."""
        return bool(getattr(self.lora_owner, "is_transposed", False))

    @property
    def is_concatenated(self) -> bool:
        """Whether outputs that are several in one lie one after the other, and do not alternate: transformers' word."""
        return bool(getattr(self.lora_owner, "is_concatenated", True))


#: The kinds of part, by the number of a parameter's dimensions.
PARTS: dict[int, type[Part]] = {2: Matrix, 3: Stack}


def parts_of(module: nn.Module) -> dict[str, Any]:
    """The adapted parameters of a module, as LoRA layers, by name."""
    parts: dict[str, Any] = vars(module).get(_PARTS, {})
    return parts


def with_parts(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """These modules, each with its parts after it."""
    for module in modules:
        yield module
        yield from parts_of(module).values()


def enter_part(part: Part) -> None:
    """Let the owner know of a part that was adapted."""
    vars(part.lora_owner)[_PARTS] = {**parts_of(part.lora_owner), part.lora_parameter: part}


def leave_part(part: Part) -> None:
    """Let the owner know no more of a part."""
    rest = {name: other for name, other in parts_of(part.lora_owner).items() if name != part.lora_parameter}
    vars(part.lora_owner)[_PARTS] = rest


def replicate_parts(owner: nn.Module, replica: nn.Module) -> None:
    """Give a replica of an owner, which shares its attributes, parts of its own."""
    for name, part in parts_of(owner).items():
        twin: Any = part._replicate_for_data_parallel()
        vars(twin)["lora_owner"] = replica
        vars(twin)["_parameters"] = Borrowed(replica, twin.lora_names)
        vars(replica)[_PARTS] = {**parts_of(replica), name: twin}


def forget_parts(module: nn.Module) -> None:
    """Let an owner have no parts."""
    vars(module).pop(_PARTS, None)


def own_name(layer: nn.Module, own: str) -> str:
    """What one of a layer's tensors is called in the module that has it."""
    return layer.lora_names.get(own, own) if isinstance(layer, Part) else own


def tensor_name(layer: nn.Module, name: str, own: str) -> str:
    """The full name, as state dicts have it, of a tensor of the layer of this name."""
    if isinstance(layer, Part):
        return join(name.rpartition(".")[0], _beside(layer.lora_parameter, own))
    return join(name, own)


def own_weights(owner: nn.Module, why_dense: str | None = None) -> dict[str, Any]:
    """What an owner's forward is to find in the places of its adapted parameters, and of what holds them.

    Args:
        owner: the module.
        why_dense: why it can compute with nothing but tensors, if so.
    """
    parts = parts_of(owner)
    others: dict[str, Any] = {name: part.lora_weight_now() for name, part in parts.items()}
    if why_dense is not None:
        others = {name: W.dense(why_dense) if isinstance(W, LowRankWeight) else W for name, W in others.items()}
    pairs = [(part.weight, others[name]) for name, part in parts.items()]
    for name, value in vars(owner).items() if parts else ():
        if isinstance(value, (list, tuple, dict, nn.Parameter)) and name not in _OF_TORCH and name != _PARTS:
            held = exchanged_in(value, pairs)
            others |= {} if held is value else {name: held}
    return others
