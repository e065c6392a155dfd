"""An adapter with a model's names, where wrappers have put prefixes into those of its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch.nn as nn

from lora.adapters.adapter import Adapter
from lora.errors import Problems, join
from lora.models.model import without_wrappers

# What wrappers put in front of every name.
_PREFIXES = ("base_model.model.", "module.", "_orig_mod.")


def renamed(adapter: Adapter, modules: Mapping[str, nn.Module], problems: Problems) -> Adapter:
    """The adapter with the model's names, where only prefixes of wrappers differ; as it is, where names clash."""
    names = {name: _known(name, modules) for name in (*adapter.modules, *adapter.modules_to_save)}
    for key in (*adapter.tensors, *adapter.rest):
        owner, _, own = key.rpartition(".")
        names[key] = join(_known(owner, modules), own)
    clashes = []
    for group in (adapter.modules, [*adapter.tensors, *adapter.rest]):
        meant: dict[str, list[str]] = {}
        for old in group:
            meant.setdefault(names[old], []).append(old)
        clashes += [f"{', '.join(olds)}: several names for {new}." for new, olds in meant.items() if olds[1:]]
    if clashes:
        problems.add(*sorted(clashes))
        return adapter
    known = adapter.rest
    if adapter.modules and all(names[name] != name for name in adapter.modules):
        known = {key: about for key, about in known.items() if names[key] != key}  # the rest is the wrapper's own
    return replace(
        adapter,
        modules={names[name]: settings for name, settings in adapter.modules.items()},
        tensors={names[key]: tensor for key, tensor in adapter.tensors.items()},
        trained_in_full=[names[key] for key in adapter.trained_in_full],
        modules_to_save=[names[name] for name in adapter.modules_to_save],
        kept=[names[key] for key in adapter.kept],
        rest={names[key]: about for key, about in known.items()},
    )


def of_layers(adapter: Adapter, modules: Mapping[str, nn.Module]) -> Adapter:
    """The adapter in which a parameter that is a layer's weight in the model is that layer: PEFT may name either."""
    settings, tensors = dict(adapter.modules), dict(adapter.tensors)
    for name in [name for name, about in settings.items() if about.base.parameter and name not in modules]:
        layer = name.removesuffix(".weight")
        if layer == name or layer not in modules or layer in settings:
            continue
        about = settings.pop(name)
        settings[layer] = replace(about, base=replace(about.base, parameter=False))
        for own in about.parameters:
            tensors[join(layer, own)] = tensors.pop(join(name, own))
    return replace(adapter, modules=settings, tensors=tensors)


def _known(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The model's name for what a file calls `name`; `name` itself if the model has none."""
    if name in modules:
        return name
    bare = f"{without_wrappers(name)}."  # the root's own parameters have a prefix for their module's name
    while bare[:-1] not in modules and bare.startswith(_PREFIXES):
        bare = bare.removeprefix(next(prefix for prefix in _PREFIXES if bare.startswith(prefix)))
    return bare[:-1] if bare[:-1] in modules else name
