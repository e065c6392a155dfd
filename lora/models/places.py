"""Where `lora.inject` put an adapter: a layer that another has replaced since is named, and not lost in silence.

No hook tells of a child that is replaced, as transformers' `resize_token_embeddings` replaces a head. So a parent keeps
the names of its children that were adapted, each with a `Place` that it shares with the layer, and that knows whether
the layer was given back on purpose. Both survive deepcopy and pickle; a part of a model knows of its own parts alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch.nn as nn

from lora.errors import join, raise_all
from lora.layers.kind import Place
from lora.layers.layer import LoRALayer
from lora.layers.registry import kind_for

_CHILDREN = "lora_children"
# What a module remembers goes to one that is made anew from it, as `convert_sync_batchnorm` does.
_REMEMBERED, _ATTRIBUTES = "lora_remembered", ("lora_originals", "lora_in_full", "lora_kept")


def remember(names: Mapping[nn.Module, Sequence[str]], layers: Iterable[LoRALayer]) -> None:
    """Note at the parents of these layers that they were adapted."""
    modules = {name: module for module, known in names.items() for name in known}
    for layer in layers:
        layer.lora_place = Place()
        for name in filter(None, names[layer]):
            parent, _, child = name.rpartition(".")
            # Lists are cut and renumbered on purpose: what a number stands for says nothing.
            if not isinstance(modules[parent], (nn.Sequential, nn.ModuleList)):
                known = vars(modules[parent]).get(_CHILDREN, {})
                vars(modules[parent])[_CHILDREN] = {**known, child: layer.lora_place}


def remember_values(names: Mapping[nn.Module, Sequence[str]]) -> None:
    """Note at the parents what their children remember of the time before training."""
    modules = {name: module for module, known in names.items() for name in known}
    for module, known in names.items():
        told = {attribute: vars(module)[attribute] for attribute in _ATTRIBUTES if attribute in vars(module)}
        for name in filter(None, known if told else ()):
            parent, _, child = name.rpartition(".")
            vars(modules[parent])[_REMEMBERED] = {**vars(modules[parent]).get(_REMEMBERED, {}), child: told}


def adopt(model: nn.Module) -> None:
    """Have modules that were made anew in the place of others remember what those did."""
    for parent in model.modules():
        for child, told in vars(parent).get(_REMEMBERED, {}).items():
            now = parent._modules.get(child)
            if now is not None and told.get("lora_originals", {}).keys() <= {*now._parameters, *now._buffers}:
                for attribute in told:
                    vars(now).setdefault(attribute, told[attribute])


def forget(module: nn.Module) -> None:
    """Have a parent know nothing of its children."""
    vars(module).pop(_CHILDREN, None)
    vars(module).pop(_REMEMBERED, None)


def check(model: nn.Module, what: str) -> None:
    """ValueError if a layer that can be adapted stands where one was; nothing, or something else, may stand there."""
    raise_all(f"{what}: nothing was done", _replaced(model))


def _replaced(model: nn.Module) -> Iterator[str]:
    for prefix, parent in model.named_modules():
        for child, place in vars(parent).get(_CHILDREN, {}).items():
            now = parent._modules.get(child)
            bare = (
                now is not None and kind_for(type(now)) is not None and not (isinstance(now, LoRALayer) and now.r > 0)
            )
            if place.adapted and bare:
                yield (
                    f"{join(prefix, child)}: had LoRA, and a {type(now).__name__} without it has taken its place, as "
                    "when transformers' `resize_token_embeddings` makes a new output head; call that first, and then "
                    "`lora.inject`. (`lora.eject` takes out what is left.)"
                )
