"""A model seen whole: the names of its modules, which tensors they share, its LoRA layers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice, takewhile
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from lora.errors import instance, join, raise_all, some
from lora.layers.kind import Place
from lora.layers.layer import LoRALayer, is_computed
from lora.layers.parts import Part, own_name, parts_of, tensor_name, with_parts
from lora.layers.registry import kind_for
from lora.layers.state import PARAMETERS
from lora.layers.weights import is_sharded, reshard
from lora.models.exchange import exchanged

Names = dict[nn.Module, tuple[str, ...]]


# ---- names -----------------------------------------------------------------------------------------------------


def names_of(model: nn.Module) -> Names:
    """Every module, and every part of one, with all the names by which it is reached, in the model's order."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
        for parameter, part in parts_of(module).items():
            names.setdefault(part, []).append(join(name, parameter))
    return {module: tuple(known) for module, known in names.items()}


# What torch's wrappers put into names: activation checkpointing and torch.compile.
_WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod")


def without_wrappers(name: str) -> str:
    """A module's name as the model's author wrote it, without the parts that torch's wrappers add."""
    if not any(part in name for part in _WRAPPED):  # nearly always
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch's data-parallel wrappers, which put `module.` in front of every name, compiled or not."""
    while True:
        compiled = model._modules.get("_orig_mod")
        if compiled is not None:
            model = compiled
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


# ---- tensors, and who shares them --------------------------------------------------------------------------------


class Owned(NamedTuple):
    """A parameter or buffer: the module that owns it, what it is called there, and all its names in the model.

    What belongs to a part, the owner's parameter too, is the part's.
    """

    names: tuple[str, ...]
    module: nn.Module
    own: str
    tensor: Tensor

    @property
    def is_of_adapter(self) -> bool:
        """Whether it is A, B or the magnitude of a LoRA layer."""
        module = self.module
        return self.own in PARAMETERS and isinstance(module, LoRALayer) and self.own in module._parameters


def owned_tensors(names: Names) -> Iterator[Owned]:
    """Every parameter and buffer of a model; one that several modules own comes once for each of them."""
    for module, known in names.items():
        if isinstance(module, Part) and not module.is_entered():
            continue
        of_parts = {own_name(part, own) for part in parts_of(module).values() for own in part._parameters}
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and own not in of_parts:
                yield Owned(tuple(tensor_name(module, name, own) for name in known), module, own, tensor)


def is_persistent(one: Owned) -> bool:
    """Whether a state dict holds it."""
    return one.own not in one.module._non_persistent_buffers_set


def by_tensor(tensors: Iterable[Owned]) -> list[list[Owned]]:
    """The same in groups, one for each tensor: in a group of several the tensor is tied."""
    groups: dict[int, list[Owned]] = {}
    for one in tensors:
        groups.setdefault(id(one.tensor), []).append(one)
    return list(groups.values())


_Span = tuple[int, int, int, Owned]  # where it begins and ends in its storage, and its place in the model's order
_FEW = 8  # of which each is looked at


class Memory:
    """Which tensors share memory, so that writing one writes the other: two Parameters may share one storage."""

    def __init__(self, tensors: Iterable[Owned]) -> None:
        self._spans: dict[int, list[_Span]] = {}
        for number, one in enumerate(tensors):
            storage, start, stop = _span(one.tensor)
            self._spans.setdefault(storage, []).append((start, stop, number, one))
        self._sorted: dict[int, tuple[list[_Span], list[int]]] = {}  # of storages that hold many
        # What was found, by where it was looked for: many tensors may be one.
        self._found: dict[tuple[int, int, int], list[Owned]] = {}
        self._owners: dict[tuple[int, int, int], dict[nn.Module, str]] = {}

    def sharing(self, tensor: Tensor) -> Sequence[Owned]:
        """All that share memory with this tensor, itself included, in the model's order."""
        storage, start, stop = place = _span(tensor)
        if place not in self._found:
            spans = self._spans.get(storage, [])
            if len(spans) > _FEW:
                spans = self._near(storage, start, stop)
            self._found[place] = [one for i, j, _, one in spans if i < stop and start < j]
        return self._found[place]

    def _near(self, storage: int, start: int, stop: int) -> list[_Span]:
        """Those of a storage that may share memory with a part of it, in the model's order."""
        if storage not in self._sorted:
            spans = sorted(self._spans[storage], key=itemgetter(0))
            reach = [*accumulate((end for _, end, _, _ in spans), max)]  # how far each and those before it reach
            self._sorted[storage] = spans, reach
        spans, reach = self._sorted[storage]
        begun = islice(spans, bisect_right(reach, start), None)
        return sorted(takewhile(lambda span: span[0] < stop, begun), key=itemgetter(2))

    def tied_to(self, layer: LoRALayer) -> str:
        """The names of other modules whose tensors share memory with the layer's weight; empty if there are none."""
        place = _span(layer.weight)
        if place not in self._owners:
            owners = {one.module: one.names[0].rpartition(".")[0] for one in self.sharing(layer.weight)}
            self._owners[place] = owners
        owners = self._owners[place]
        others = (name for module, name in owners.items() if module is not layer)
        return some(others, len(owners) - (layer in owners))

    def left_alone(self, layers: Sequence[LoRALayer]) -> dict[LoRALayer, tuple[str, ...]]:
        """For each layer the names of tensors that share its weight's memory, and are the weight of none of these."""
        adapted = set(layers)
        found: dict[int, tuple[str, ...]] = {}  # by what `sharing` found, which is one list for all that are tied
        alone: dict[LoRALayer, tuple[str, ...]] = {}
        for layer in layers:
            sharing = self.sharing(layer.weight)
            if id(sharing) not in found:
                others = (one for one in sharing if not (one.own == "weight" and one.module in adapted))
                found[id(sharing)] = tuple(name for one in others for name in one.names)
            alone[layer] = found[id(sharing)]
        return alone


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """The storage, and begin and end in it; the tensor's identity where its memory cannot be looked at."""
    dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested
    if not (dense and tensor.is_floating_point() and tensor.numel()) or tensor.is_meta:
        return id(tensor), 0, 1
    last = tensor.numel() - 1
    if not tensor.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = int(tensor.storage_offset()), tensor.element_size()
    return tensor.untyped_storage().data_ptr(), start * size, (start + int(last) + 1) * size


def is_lazy(module: nn.Module) -> bool:
    """Whether a module waits for its first input to know its shape."""
    return any(nn.parameter.is_lazy(parameter) for parameter in module.parameters())


def initialized_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The model's parameters, without those of lazy modules, which have no values yet."""
    return [parameter for parameter in model.parameters() if not nn.parameter.is_lazy(parameter)]


# ---- LoRA layers -------------------------------------------------------------------------------------------------


def lora_layers(
    model: nn.Module,
    what: str,
    *,
    none: bool = False,
    inside_disabled: bool = False,
    replaced: bool = False,
    reads: bool = False,
    several: bool = False,
) -> list[LoRALayer]:
    """The model's LoRA layers, each once.

    Args:
        model: the model.
        what: the function that asks, for errors.
        none: allow that there are none.
        inside_disabled: allow that LoRA is disabled.
        replaced: allow that a plain layer stands where an adapted one was.
        reads: allow that LoRA is disabled, unless the base's tensors stand in the model: the function writes nothing.
        several: allow that the layers have several adapters, of a bank.

    Raises:
        ValueError: something is so that is not allowed, or a parametrization computes an adapted weight.
    """
    reshard(model)
    _adopt(model)
    if not replaced:
        check_none_replaced(model, what)
    layers = [module for module in with_parts(model.modules()) if isinstance(module, LoRALayer)]
    if not several:
        check_not_several(layers, what)
    if not layers and not none:
        raise ValueError(f"{what}: there is no LoRA layer in this {type(model).__name__}; `lora.inject` puts some in.")
    if not inside_disabled:
        check_not_disabled(model, what, reads)
    check_none_computed(model, what)
    return layers


def check_none_computed(model: nn.Module, what: str) -> None:
    """ValueError if a parametrization computes a tensor of an adapted layer, or of a module that reads weights."""
    computed = [module for module in with_parts(model.modules()) if is_computed(module)]
    if computed:
        names = names_of(model)
        which = ", ".join(names[module][0] or "the model" for module in computed)
        raise ValueError(f"{what}: a tensor of {which} is computed by a parametrization; remove the parametrization.")


def check_not_several(layers: Iterable[LoRALayer], what: str) -> None:
    """ValueError if layers have several adapters."""
    adapters = dict.fromkeys(name for layer in layers for name in layer.lora_seats)
    if adapters:
        raise ValueError(
            f"{what}: the model has a bank of adapters ({some(adapters, len(adapters))}), and this is for models with "
            "one. The bank's own methods are for one of several; `bank.keep(name)` leaves one adapter in the model."
        )


def check_not_disabled(model: nn.Module, what: str, reads: bool = False) -> None:
    """ValueError if the model is within a block of `lora.disabled`; or, for what `reads`, if tensors are exchanged."""
    modules = [*with_parts(model.modules())]
    if any(map(exchanged, modules)):
        raise ValueError(
            f"{what}: LoRA is disabled in this {type(model).__name__}, in which the base's values stand where others "
            "trained; leave `lora.disabled` first."
        )
    if not reads and any(isinstance(module, LoRALayer) and module.lora_disabled is not None for module in modules):
        raise ValueError(f"{what}: LoRA is disabled in this {type(model).__name__}; leave `lora.disabled` first.")


def has_own_forward(module: nn.Module) -> bool:
    """Whether calls go to a `forward` attribute of the instance, not to its class's; accelerate's hooks set one."""
    forward = vars(module).get("forward")
    theirs = (getattr(forward, "__func__", None), getattr(forward, "__self__", None))
    return forward is not None and theirs != (type(module).forward, module)


# Whose adapters a model may hold, by how the full names of their classes begin, so that no package need be installed;
# and how such an adapter is taken out, where there is a word for it.
_FOREIGN = {
    "peft.": ("PEFT", "`model.merge_and_unload()` or `model.unload()`"),
    "loralib.": ("loralib", ""),
    "torchtune.modules.peft.": ("torchtune", ""),
    "adapters.methods.": ("adapters", ""),
    "litgpt.lora.": ("LitGPT", ""),
    "litgpt.adapter": ("LitGPT", ""),
    "minlora.": ("minLoRA", "`minlora.merge_lora(model)` or `minlora.remove_lora(model)`"),
    "lycoris.": ("LyCORIS", ""),
    "swift.tuners.": ("SWIFT", ""),
    "diffusers.models.lora.LoRALinearLayer": ("diffusers", ""),
    "diffusers.models.lora.LoRAConv2dLayer": ("diffusers", ""),
}


def foreign_adapters(names: Names) -> Iterator[str]:
    """A complaint for each other library whose adapters are in a model: they would be frozen, or adapted themselves."""
    found: dict[tuple[str, str], list[str]] = {}
    libraries = {cls: _library_of(cls) for cls in {*map(type, names)}}
    for module, known in names.items():
        whose = libraries[type(module)]
        if whose is not None:
            found.setdefault(whose, []).append(known[0])
    for (library, way_out), modules in found.items():
        # Not the wrappers around what is named anyway.
        around = {name[:end] for name in modules for end, letter in enumerate(name) if letter == "."} | {""}
        inner = [name for name in modules if name not in around] or ["the model"]
        yield (
            f"{', '.join(inner)}: hold{'s' * (len(inner) == 1)} an adapter of {library}'s, which would be frozen, or "
            f"adapted itself; take it out first{f', by {way_out}' * bool(way_out)}, or begin with the plain base model."
        )


def _library_of(cls: type) -> tuple[str, str] | None:
    """The library that the class of an adapter's module comes from, by itself or by one that it derives from."""
    full_names = [f"{owner.__module__}.{owner.__qualname__}" for owner in cls.__mro__]
    return next((row for start, row in _FOREIGN.items() if any(name.startswith(start) for name in full_names)), None)


#: What is in the way of an adapter that is put in now, by the names of a model's modules: wings add functions.
OBSTACLES: list[Callable[[Names], Iterable[str]]] = [foreign_adapters]
#: The same of what keeps a model's parameters in a form that cannot be read, or written.
UNREADABLE: list[Callable[[Names], Iterable[str]]] = []


def obstacles(names: Names) -> Iterator[str]:
    """A complaint for each wrapper of a model, or in it, that would not know what is put in now."""
    for find in (*UNREADABLE, *OBSTACLES):
        yield from find(names)


def unreadable(names: Names) -> Iterator[str]:
    """A complaint for each wrapper that keeps parameters in a form of its own."""
    for find in UNREADABLE:
        yield from find(names)


def sharded_problems(layers: Iterable[LoRALayer], names: Names, instead: str) -> Iterator[str]:
    """A complaint for each layer of which this rank has only a part, and what to do instead."""
    for layer in layers:
        if any(map(is_sharded, layer._parameters.values())):
            yield f"{names[layer][0]}: is sharded; {instead}."


# ---- layers that were replaced -----------------------------------------------------------------------------------
#
# A layer with LoRA may be replaced by one without, as transformers' `resize_token_embeddings` replaces a head. No hook
# tells of it. So each parent keeps the names of its children that were adapted, each with a `Place` that it shares with
# the layer; the layer notes there when LoRA was taken out on purpose. Places survive deepcopy and pickle, and a part of
# a model knows of its own parts alone.

_CHILDREN = "lora_children"
# What a module remembers of the time before training is kept by its parent, too, for a module that is made anew from
# it, as `convert_sync_batchnorm` does.
_REMEMBERED, _ATTRIBUTES = "lora_remembered", ("lora_originals", "lora_in_full", "lora_kept")


def remember_layers(names: Names, layers: Iterable[LoRALayer]) -> None:
    """Note at the parents of these layers that they were adapted."""
    for layer in layers:
        layer.lora_place = Place()
    _tell_parents(names, _CHILDREN, {layer: layer.lora_place for layer in layers})


def remember_values(names: Names) -> None:
    """Note at the parents what their children remember of the time before training."""
    told = {module: {own: vars(module)[own] for own in _ATTRIBUTES if own in vars(module)} for module in names}
    _tell_parents(names, _REMEMBERED, {module: attributes for module, attributes in told.items() if attributes})


def _tell_parents(names: Names, attribute: str, told: Mapping[Any, object]) -> None:
    """Note something of each of these modules at its parents, by the name of the child."""
    modules = {name: module for module, known in names.items() for name in known}
    notes: dict[nn.Module, dict[str, object]] = {}
    for module, what in told.items():
        for name in filter(None, names[module]):
            parent, _, child = name.rpartition(".")
            notes.setdefault(modules[parent], {})[child] = what
    for parent_module, children in notes.items():  # a new dict, so that the old one can be put back
        vars(parent_module)[attribute] = vars(parent_module).get(attribute, {}) | children


def forget_children(module: nn.Module) -> None:
    """Let a parent know nothing of its children."""
    vars(module).pop(_CHILDREN, None)
    vars(module).pop(_REMEMBERED, None)


def check_none_replaced(model: nn.Module, what: str) -> None:
    """ValueError if a layer without LoRA, that could have it, stands where an adapted one was; other modules may."""
    raise_all(f"{what}: nothing was done", _replaced(model))


def _adopt(model: nn.Module) -> None:
    """Let modules that were made anew in the place of others remember what those did."""
    for parent in model.modules():
        for child, told in vars(parent).get(_REMEMBERED, {}).items():
            now = parent._modules.get(child)
            if now is not None and told.get("lora_originals", {}).keys() <= {*now._parameters, *now._buffers}:
                for attribute in told:
                    vars(now).setdefault(attribute, told[attribute])


def _replaced(model: nn.Module) -> Iterator[str]:
    for prefix, parent in model.named_modules():
        for child, place in vars(parent).get(_CHILDREN, {}).items():
            now = parent._modules.get(child)
            # Lists are cut and renumbered on purpose: a number in one names no layer for long.
            if isinstance(parent, (nn.Sequential, nn.ModuleList)) or not place.adapted or now is None:
                continue
            if kind_for(type(now)) is not None and not (isinstance(now, LoRALayer) and now.r > 0):
                yield (
                    f"{join(prefix, child)}: had LoRA, and {instance(now)} without it has taken its place, as "
                    "when transformers' `resize_token_embeddings` makes a new output head; call that first, and then "
                    "`lora.inject`. (`lora.eject`, or a bank's `keep(None)`, takes out what is left.)"
                )


# ---- a transformers model's checkpoint ---------------------------------------------------------------------------


def name_of(model: nn.Module) -> str | None:
    """What a transformers model says it was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def resized_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """Token embeddings and output layers with another number of rows than their checkpoint says.

    The rows that `resize_token_embeddings` added are random: nobody else has them. Models whose checkpoint is not on
    this machine are passed over; nothing is downloaded.
    """
    seen: set[nn.Module] = set()
    for module in model.modules():
        if module not in seen and callable(getattr(module, "get_input_embeddings", None)) and name_of(module):
            seen.update(module.modules())
            if _vocabulary_before(module) not in (None, _vocabulary(module.config)):
                ends = (module.get_input_embeddings(), module.get_output_embeddings())  # type: ignore[operator]
                yield from (end for end in ends if isinstance(end, nn.Module))


def _vocabulary_before(model: Any) -> int | None:
    """The size of the vocabulary in the checkpoint's own configuration, if that is on this machine."""
    try:
        return _vocabulary(type(model.config).from_pretrained(name_of(model), local_files_only=True))
    except Exception:  # no such folder, no configuration of transformers', or one that its own class refuses
        return None


def _vocabulary(config: Any) -> int | None:
    try:
        size = config.get_text_config().vocab_size
    except (ValueError, AttributeError):  # several texts, each with a vocabulary; none; no configuration of theirs
        return None
    return size if isinstance(size, int) else None
