"""Which parameters of a model's modules are to be adapted: PEFT's `target_parameters`, and those that a file names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.nn as nn

from lora.errors import Problems, did_you_mean, instance, join, last_parts
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.layers.parts import PARTS, Part, parts_of
from lora.layers.registry import kind_for
from lora.models.model import Memory, Names, Owned, owned_tensors
from lora.models.patterns import ends_of

_MOST_HINTS = 10
# They keep their projections and the matrices of their gates, and may have a layer beside them (`out_proj`).
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_OWNERS = (nn.MultiheadAttention, *_RECURRENT)


def find_parameters(names: Names, wanted: Iterable[str], problems: Problems) -> list[nn.Module]:
    """The parts that stand for these parameters, which `names` knows from now on; of a layer's weight, the layer.

    A parameter that cannot be adapted, and a name that matches none, are problems.

    Args:
        names: of the model's modules.
        wanted: full names of parameters, or their ends: "experts.down_proj".
    """
    targets = dict.fromkeys(wanted)
    if not targets:
        return []
    own = [one for one in owned_tensors(names) if one.own in one.module._parameters]
    ends = [{end for name in one.names for end in ends_of(name)} for one in own]
    there = set[str]().union(*ends)
    found = [one for one, its in zip(own, ends, strict=True) if not its.isdisjoint(targets)]
    known = last_parts(name for one in own for name in one.names)
    for number, target in enumerate(target for target in targets if target not in there):
        hint = did_you_mean(target, known) if number < _MOST_HINTS else ""
        problems.add(f"`target_parameters` {target!r} matches no parameter{hint}.")
    return _as_modules(found, Memory(own), names, problems)


def within(modules: Iterable[nn.Module], names: Names, problems: Problems) -> list[nn.Module]:
    """The same modules, but in the place of each that keeps matrices for itself and is known to, its parts and layers.

    Args:
        modules: that are named to be adapted.
        names: of the model's modules; it knows of the parts from now on.
    """
    named = [*modules]
    if not any(map(keeps_matrices, named)):
        return named
    kept: dict[nn.Module, dict[str, Owned]] = {}
    for one in owned_tensors(names):
        if one.own in one.module._parameters:
            kept.setdefault(one.module, {})[one.own] = one
    memory, found = Memory(one for its in kept.values() for one in its.values()), list[nn.Module]()
    for module in named:
        if not keeps_matrices(module):
            found.append(module)
            continue
        parts, its, child = parts_of(module), kept.get(module, {}), module._modules.get("out_proj")
        for own in _matrices_of(module):
            if own in parts:
                found.append(parts[own])
            elif own in its:
                found += _as_modules([its[own]], memory, names, problems)
            else:
                name = join(names[module][0], own)
                problems.add(f"{name}: is computed (by a parametrization, or pruning); make that permanent first.")
        found += [] if child is None or kind_for(type(child)) is None else [child]
    return found


def _matrices_of(module: Any) -> Sequence[str]:
    """What the matrices are called that such a module keeps, be they its parameters now or computed."""
    if isinstance(module, nn.RNNBase):
        return [own for own in module._flat_weights_names if own.startswith("weight_")]
    if isinstance(module, nn.RNNCellBase):
        return "weight_ih", "weight_hh"
    return ("in_proj_weight",) if module._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def known_by(targets: Iterable[nn.Module], names: Names) -> Names:
    """The names by which patterns may mean these: their own, and for what such a module has, that module's."""
    modules = {name: module for module, known in names.items() for name in known}
    by: Names = {}
    for module in targets:
        around = [name.rpartition(".")[0] for name in names[module]]
        by[module] = (*names[module], *(name for name in around if keeps_matrices(modules.get(name))))
    return by


def check_dropout(module: nn.Module, lora_dropout: float) -> None:
    """ValueError if the inputs of what this stands for cannot be dropped."""
    owner = module.lora_owner if isinstance(module, Part) else None
    if lora_dropout and isinstance(owner, _RECURRENT):
        raise ValueError(
            f"`lora_dropout` (={lora_dropout}) must be 0 for a weight of {instance(owner)}: torch "
            "computes all its steps in one call, and cannot drop inputs of B A alone."
        )


def once(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The same without repetitions; two parts that stand for one parameter are one."""
    return [*{(m.lora_owner, m.lora_parameter) if isinstance(m, Part) else m: m for m in modules}.values()]


def keeps_matrices(module: nn.Module | None) -> bool:
    """Whether a module is one of those that are adapted by adapting what they keep for themselves."""
    return isinstance(module, _OWNERS) and kind_for(type(module)) is None


def _as_modules(found: Iterable[Owned], memory: Memory, names: Names, problems: Problems) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for one in found:
        if one.own == "weight" and kind_for(type(one.module)) is not None:
            modules.append(one.module)
        elif reason := _unfit(one, memory):
            problems.add(f"{one.names[0]}: {reason}")
        else:
            modules.append(part_for(one.module, one.own, names))
    return modules


def part_for(owner: nn.Module, parameter: str, names: Names) -> Part:
    """A part that stands for a parameter of a module, which `names` knows from now on."""
    part = PARTS[len(weights.whole_shape(owner._parameters[parameter]))](owner, parameter)
    names[part] = tuple(join(name, parameter) for name in names[owner])
    return part


def all_parts(names: Names) -> Iterator[tuple[nn.Module, str]]:
    """Each parameter that a part could stand for: its module, and what it is called there."""
    for one in owned_tensors(names):
        is_known = kind_for(type(one.module)) is not None
        if one.own in one.module._parameters and not is_known and len(weights.whole_shape(one.tensor)) in PARTS:
            yield one.module, one.own


def _unfit(one: Owned, memory: Memory) -> str | None:
    """The reason why a part cannot stand for a parameter."""
    shape = weights.whole_shape(one.tensor)
    if isinstance(one.module, LoRALayer):
        return "is of a LoRA layer, which has its adapter already."
    if len(shape) not in PARTS:
        return f"has the shape {tuple(shape)}; LoRA adapts matrices, and stacks of them."
    others = [name for other in memory.sharing(one.tensor) if other.module is not one.module for name in other.names]
    if others:
        return f"is tied to {', '.join(others)}, which the update would leave out, or change too."
    twins = [other.own for other in memory.sharing(one.tensor) if other.own != one.own]
    if twins:
        return f"shares its memory with {', '.join(twins)} of the same module."
    taken = [name for name in (f"{one.own}_lora_A", f"{one.own}_lora_B") if hasattr(one.module, name)]
    if taken:
        return f"its module has {' and '.join(taken)} already, which LoRA needs for itself."
    if weights.is_packed(PARTS[len(shape)](one.module, one.own)):
        return f"its numbers are packed in {one.tensor.dtype}, and its module reads them as they are."
    return None
