"""An adapter of another library's, under the names and in the form that a model has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lora.adapters.adapter import PARAMETERS, Adapter, ModuleAdapter
from lora.adapters.base import beyond_peft
from lora.adapters.single import Form, as_in
from lora.errors import join
from lora.layers.conv import ConvLoRA
from lora.layers.layer import LoRALayer, scaling_of
from lora.layers.linear import MergedLinearLoRA
from lora.layers.registry import kind_for
from lora.models.learnt import to_start
from lora.models.model import without_wrappers

# What wrappers put in front of every name.
_PREFIXES = ("base_model.model.", "module.", "_orig_mod.")


def renamed(adapter: Adapter, modules: Mapping[str, nn.Module]) -> tuple[Adapter, list[str]]:
    """The adapter with the model's names, where only prefixes of wrappers differ; and a complaint for each clash."""
    names = {name: _known(name, modules) for name in (*adapter.modules, *adapter.modules_to_save)}
    names |= {key: join(_known(_owner(key), modules), _own(key)) for key in (*adapter.tensors, *adapter.rest)}
    problems = [
        f"{', '.join(old for old in group if names[old] == new)}: several names for {new}."
        for group in (adapter.modules, [*adapter.tensors, *adapter.rest])
        for new, count in Counter(names[old] for old in group).items()
        if count > 1
    ]
    if problems:
        return adapter, sorted(problems)
    known = adapter.rest
    if adapter.modules and all(names[name] != name for name in adapter.modules):
        known = {key: about for key, about in known.items() if names[key] != key}  # the rest is the wrapper's own
    changed = replace(
        adapter,
        modules={names[name]: settings for name, settings in adapter.modules.items()},
        tensors={names[key]: tensor for key, tensor in adapter.tensors.items()},
        trained_in_full=[names[key] for key in adapter.trained_in_full],
        modules_to_save=[names[name] for name in adapter.modules_to_save],
        kept=[names[key] for key in adapter.kept],
        rest={names[key]: about for key, about in known.items()},
    )
    return changed, []


def _known(name: str, modules: Mapping[str, nn.Module]) -> str:
    if name in modules:
        return name
    bare = f"{without_wrappers(name)}."  # the root's own parameters have a prefix for their module's name
    while bare[:-1] not in modules and bare.startswith(_PREFIXES):
        bare = bare.removeprefix(next(prefix for prefix in _PREFIXES if bare.startswith(prefix)))
    return bare[:-1] if bare[:-1] in modules else name


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def _own(key: str) -> str:
    return key.rpartition(".")[2]


def fitted(adapter: Adapter, modules: Mapping[str, nn.Module]) -> tuple[Adapter, list[str]]:
    """The adapter in the forms and dtypes of the model's layers, where that is exact; and what cannot be."""
    settings, tensors, problems = dict(adapter.modules), dict(adapter.tensors), []
    for name, module in modules.items():
        if name not in settings:
            continue
        started = isinstance(module, LoRALayer) and module.lora_start is not None
        # Of lora's own only what is a single pair there and a merged layer here (`lora.combine` makes such).
        single = isinstance(module, MergedLinearLoRA) and module.r > 0 and not settings[name].splits
        if adapter.format == "lora" and not (started or single):
            continue
        convert = _since_start if started else _as_in
        try:
            settings[name], *pair = convert(module, adapter.format, settings[name], *adapter.pair(name))
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        tensors |= {join(name, part): tensor for part, tensor in zip(PARAMETERS, pair, strict=True)}
    for key, tensor in () if adapter.format == "lora" else tensors.items():
        theirs = modules.get(_owner(key))
        target = None if theirs is None else {**theirs._parameters, **theirs._buffers}.get(_own(key))
        if target is not None and key not in adapter.kept:
            tensors[key] = _exactly(tensor, target.dtype)
    return replace(adapter, modules=settings, tensors=tensors), problems


def _since_start(module: nn.Module, format: str, settings: ModuleAdapter, A: Tensor, B: Tensor) -> Form:
    assert isinstance(module, LoRALayer), "it has a start"
    if format != "lora":
        raise ValueError(
            f"its adapter in the model started from a part of the base weight, which a file of format {format!r} "
            "does not know; load it into the plain base model."
        )
    return settings.at_rank(module.r), *to_start(module, settings.r, settings.scaling, A, B)


def _as_in(module: nn.Module, format: str, settings: ModuleAdapter, A: Tensor, B: Tensor) -> Form:
    if format == "loralib":
        return _loralib_in(module, settings, A, B)
    beyond = beyond_peft(module) if settings.base.kind == "conv" else ""
    if beyond:
        raise ValueError(f"in PEFT the update of this convolution is computed without its {beyond}, and not here.")
    if isinstance(module, LoRALayer) and module.r > 0:
        return as_in(module, settings, A, B)
    return settings, A, B


def _loralib_in(module: nn.Module, settings: ModuleAdapter, A: Tensor, B: Tensor) -> Form:
    """What a flat file leaves open, from the module: of convolutions r, of fused layers the splits."""
    kind = type(module) if isinstance(module, LoRALayer) else kind_for(type(module))
    r, known = B.shape[1], dict[str, Any]()
    if kind is not None and issubclass(kind, ConvLoRA):
        kernel: Any = module.kernel_size
        r //= kernel[0] ** (len(kernel) // 2)
        known["factored"] = False
    elif isinstance(module, MergedLinearLoRA) and module.r > 0:
        known |= {"splits": module.splits, "enable_lora": module.enable_lora}
    elif A.shape[0] != r:
        raise ValueError(
            f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are those of a fused layer, whose splits loralib's "
            "files do not say: adapt the model first, with `enable_lora` and `splits` as in training."
        )
    if r == 0:
        raise ValueError(f"lora_B {tuple(B.shape)} does not fit a kernel of {module.kernel_size}.")
    return replace(settings, **known, r=r, scaling=scaling_of(settings.lora_alpha, r, False)), A, B


def _exactly(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype, if no value changes."""
    if tensor.dtype == dtype or not (tensor.is_floating_point() and dtype.is_floating_point):
        return tensor
    cast = tensor.to(dtype)
    return cast if torch.equal(cast.to(tensor.dtype), tensor) else tensor
