"""loralib's format: a flat state dict, with lora_A and lora_B of every layer, and whatever else was saved with them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lora.adapters.adapter import PARAMETERS, Adapter, ModuleAdapter
from lora.adapters.base import Base
from lora.errors import AdapterError, join, raise_all, some
from lora.layers.settings import scaling_of

#: The kind of layer is in the model only: A and B of a linear layer and of a convolution may look the same.
KIND = "loralib"
#: What A and B of a bank's adapters are called in a state dict, and the adapter's name there.
OF_A_BANK = re.compile(r"(?:^|[._])lora_[AB]_([^.]+)$")


def from_state_dict(path: Path, tensors: Mapping[str, Tensor], lora_alpha: float | None) -> Adapter:
    """The adapter in a state dict; what is neither lora_A nor lora_B trained in full.

    `r` is what a linear layer's would be; `load_adapter` makes it a convolution's, where the model has one.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    full = dict(tensors)
    for key in tensors:
        owner, _, part = key.rpartition(".")
        if part in PARAMETERS:
            pairs.setdefault(owner, {})[part] = full.pop(key)
    banked = dict.fromkeys(found[1] for found in map(OF_A_BANK.search, tensors) if found)
    problems = [_of_a_bank(banked)] if banked else list(_problems(pairs, lora_alpha))
    for key in [key for key in full if _of_layer(key, pairs) != key]:
        if _of_layer(key, pairs) in full:
            problems.append(f"{key} and {_of_layer(key, pairs)} are one parameter in loralib; the file has both.")
        full[_of_layer(key, pairs)] = full.pop(key)
    raise_all(f"read_adapter: {path} is not loaded", problems, AdapterError)
    assert lora_alpha is not None, "it was looked at"
    modules = {name: _settings(pair["lora_B"].shape[1], lora_alpha) for name, pair in pairs.items()}
    adapters = {join(name, part): tensor for name, pair in pairs.items() for part, tensor in pair.items()}
    return Adapter(modules, {**adapters, **full}, list(full), format="loralib")


def _of_a_bank(names: Collection[str]) -> str:
    return (
        f"it is the state dict of a model with a bank of adapters ({some(names, len(names))}), without scaling; load "
        "it into such a model (`load_state_dict`), and write one as a file (`bank.save(name, path)`)."
    )


def _of_layer(key: str, pairs: Mapping[str, object]) -> str:
    """The name of a convolution's own parameter, whose base loralib keeps in a child called conv."""
    owner, _, own = key.rpartition(".")
    layer, _, child = owner.rpartition(".")
    return join(layer, own) if child == "conv" and layer in pairs else key


def _problems(pairs: Mapping[str, Mapping[str, Tensor]], lora_alpha: float | None) -> Iterator[str]:
    if not pairs:
        yield "it has neither lora's metadata nor any lora_A and lora_B."
    elif lora_alpha is None:
        yield "it has no scaling: loralib's files say nothing of lora_alpha; give `lora_alpha`, as it was in training."
    for name, pair in pairs.items():
        yield from (f"{join(name, part)} is missing." for part in PARAMETERS if part not in pair)
        shapes = [tuple(tensor.shape) for tensor in pair.values()]
        if any(len(shape) != 2 or 0 in shape for shape in shapes):
            yield f"{name}: lora_A and lora_B must be matrices, got {' and '.join(map(str, shapes))}."
        elif len(pair) == 2 and pair["lora_A"].shape[0] % pair["lora_B"].shape[1]:
            yield f"{name}: the shapes {shapes[0]} and {shapes[1]} of lora_A and lora_B do not fit each other."


def _settings(r: int, lora_alpha: float) -> ModuleAdapter:
    return ModuleAdapter(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=0.0,
        use_rslora=False,
        scaling=scaling_of(lora_alpha, r, False),
        base=Base(kind=KIND),
    )
