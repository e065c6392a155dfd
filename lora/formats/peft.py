"""PEFT's format: a folder with adapter_config.json and adapter_model.safetensors (or .bin); writing it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.adapters.adapter import Adapter
from lora.adapters.files import check_place, kind, packed, replace_file, writing
from lora.adapters.formats import rest_as_metadata
from lora.adapters.single import Form, singles
from lora.errors import AdapterError, raise_all
from lora.layers.layer import alpha_of
from lora.models.training import is_bias

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Metadata of ours: for each linear layer whether its weight is stored transposed. PEFT says one thing for all.
LAYOUTS = "fan_in_fan_out"
# And what is known of the weights that are adapted, of which PEFT's folder says nothing.
BASES = "base"
PREFIX = "base_model.model."


def write(adapter: Adapter, path: Path, names: Iterable[str] = ()) -> None:
    """Write the folder that PEFT's `from_pretrained` reads.

    Args:
        names: of all modules of the model, where it is there: a target that is also the end of another module's name
            is then written as part of a regular expression, which PEFT matches as a whole.
    """
    what = f"write_adapter: {path} is not written"
    forms = singles(adapter, what)
    raise_all(what, _homeless(adapter), AdapterError)
    check_place(path, "folder")
    for name in (WEIGHTS, CONFIG) if kind(path) else ():  # before anything is removed
        check_place(path / name)
    tensors = {f"{PREFIX}{_full_key(name, forms)}": adapter.tensors[name] for name in adapter.trained_in_full}
    for name, (settings, A, B) in forms.items():
        embedding = settings.base.kind == "embedding"
        A = over_all_channels(A, settings.base.groups)
        for part, tensor in (("A", A), ("B", B)):
            tensors[f"{PREFIX}{name}." + (f"lora_embedding_{part}" if embedding else f"lora_{part}.weight")] = tensor
        magnitude = adapter.magnitude(name)
        if magnitude is not None:
            shape = (1, -1, *[1] * (A.dim() - 2)) if A.dim() > 2 else (-1,)
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude.view(shape)
    layouts = {name: settings.base.fan_in_fan_out for name, (settings, _, _) in forms.items()}
    known = {name: {"shape": s.base.shape, "sample": s.base.sample} for name, (s, _, _) in forms.items()}
    metadata = {LAYOUTS: json.dumps(layouts), BASES: json.dumps(known), **rest_as_metadata(adapter)}
    content = packed(path / WEIGHTS, tensors, metadata)
    config = json.dumps(_config(adapter, forms, names), indent=2, sort_keys=True) + "\n"
    with writing(path):
        path.mkdir(exist_ok=True)
    for old in (CONFIG, "adapter_model.bin"):  # nothing reads a folder without its config: no mixture of two adapters
        with writing(path / old):
            (path / old).unlink(missing_ok=True)
    replace_file(path / WEIGHTS, content)
    replace_file(path / CONFIG, config.encode("utf-8"))


def over_all_channels(A: Tensor, groups: int) -> Tensor:
    """A of a convolution with groups as PEFT has it: with kernels, zero ones, for the channels of other groups, too."""
    if groups == 1:
        return A
    r, size, *kernel = A.shape
    wide = A.new_zeros(groups, r // groups, groups, size, *kernel)
    for group, rows in enumerate(A.view(groups, r // groups, size, *kernel)):
        wide[group, :, group] = rows
    return wide.view(r, groups * size, *kernel)


def within_groups(A: Tensor, groups: int) -> Tensor:
    """The inverse of `over_all_channels`; ValueError where a group reads the channels of another."""
    r, size, *kernel = A.shape
    if groups == 1:
        return A
    if size % groups:
        raise ValueError(f"`groups` (={groups}) must divide the {size} input channels of lora_A.")
    own = torch.stack([A.view(groups, r // groups, groups, -1)[group, :, group] for group in range(groups)])
    narrow = own.reshape(r, size // groups, *kernel)
    if torch.count_nonzero(narrow) != torch.count_nonzero(A):
        raise ValueError(f"its update mixes the {groups} groups of the convolution, which no weight of the layer can.")
    return narrow


def _homeless(adapter: Adapter) -> Iterator[str]:
    """What PEFT has no name for, and what trained in full, but is no bias nor in a module that does as a whole."""
    for name, settings in adapter.modules.items():
        beyond = settings.base.beyond_peft
        if beyond:
            yield f"{name}: PEFT would compute the update of a convolution without its {beyond}."
    if "" in adapter.modules:
        yield "the model is itself the layer that is adapted: PEFT adapts layers within a model."
    yield from _homeless_magnitudes(adapter)
    for saved in _saved(adapter):  # PEFT goes by how names end, and by whole parts within them
        taken = [name for name in adapter.modules if name.endswith(saved) or f".{saved}." in f".{name}."]
        if taken:
            yield f"{saved} trains in full, and PEFT would take {', '.join(taken)} for it as well."
    for name in adapter.trained_in_full:
        owner, _, own = name.rpartition(".")
        if owner not in adapter.modules_to_save and not is_bias(own) and name not in adapter.kept:
            yield f"{name} trains in full, alone: PEFT has a place for biases and for whole modules (modules_to_save)."


def _homeless_magnitudes(adapter: Adapter) -> Iterator[str]:
    with_dora = [name for name, settings in adapter.modules.items() if settings.use_dora]
    if with_dora and len(with_dora) < len(adapter.modules):
        yield f"PEFT has `use_dora` for all modules or for none; here it is for {', '.join(with_dora)}."
    for name in with_dora:
        settings = adapter.modules[name]
        if not all(settings.enable_lora or (True,)):
            yield f"{name}: PEFT would have a magnitude for every output, and here splits without LoRA have none."
        if settings.base.groups > 1:
            yield f"{name}: PEFT has no DoRA for convolutions with groups."


def _saved(adapter: Adapter) -> list[str]:
    """Modules that train in full, without those within one another."""
    whole = adapter.modules_to_save
    return [name for name in whole if not any(name.startswith(f"{other}.") for other in whole)]


def _full_key(name: str, forms: Mapping[str, Form]) -> str:
    owner, _, own = name.rpartition(".")
    return f"{owner}.base_layer.{own}" if owner in forms else name


def _config(adapter: Adapter, forms: Mapping[str, Form], names: Iterable[str]) -> dict[str, Any]:
    about = {name: settings for name, (settings, _, _) in forms.items()}
    rslora = all(settings.use_rslora for settings in about.values())
    ranks = {name: settings.r for name, settings in about.items()}
    alphas = {name: alpha_of(s.scaling, s.r, rslora) for name, s in about.items()}
    r, lora_alpha = _most_common(ranks), _most_common(alphas)
    linear = [settings.base for settings in about.values() if settings.base.kind == "linear"]
    alone = {*adapter.trained_in_full} - {*adapter.kept}
    biases = {name.rpartition(".")[0] for name in alone} - set(adapter.modules_to_save)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _short(lora_alpha),
        "lora_dropout": max(settings.lora_dropout for settings in about.values()),
        "use_rslora": rslora,
        "use_dora": any(settings.use_dora for settings in about.values()),
        "fan_in_fan_out": bool(linear) and all(base.fan_in_fan_out for base in linear),
        "target_modules": _targets(list(about), names),
        "rank_pattern": {_exactly(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {_exactly(name): _short(alpha) for name, alpha in alphas.items() if alpha != lora_alpha},
        "modules_to_save": _saved(adapter) or None,
        "bias": "none" if not biases else "lora_only" if biases <= about.keys() else "all",
        "init_lora_weights": True,
    }


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _short(number: float) -> float:
    return int(number) if number == int(number) else number


def _exactly(name: str) -> str:
    """A pattern for one name: PEFT would match the ends of names, too."""
    return f"^{re.escape(name)}"


def _targets(targets: list[str], names: Iterable[str]) -> list[str] | str:
    others = [name for name in names if name not in targets]
    if not any(name.endswith(f".{target}") for name in others for target in targets):
        return targets
    return "|".join(map(re.escape, targets))
