"""Save a model's adapter to a file, and load it again, strictly both ways."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lora import fingerprint
from lora.adapter import PARAMETERS, Adapter, AdapterError
from lora.formats import native as files
from lora.inject import Plan, adapt, all_or_nothing, lora_layers
from lora.layer import LoRALayer, join
from lora.matching import Names, names_of, why_not, without_wrappers
from lora.registry import kind_for
from lora.settings import raise_all
from lora.training import mark_only_lora_as_trainable, originals, remember, train_in_full, trains_in_full

# The settings that give tensors their meaning, beside r: they must agree between a file and a model.
_FORM = ("splits", "enable_lora", "factored")
_GENERAL = ("r", "lora_alpha", "lora_dropout", "use_rslora")


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save what LoRA trained in a model: one safetensors file, with ranks, scaling and splits inside.

    Holds each adapter, and every other parameter that trains (biases, `modules_to_save`). Written beside `path` and
    then renamed: killed at any moment, the old file or the new one is there, never half of one.

    Args:
        model: a model with LoRA layers.
        path: the file, `.safetensors` by custom.

    Raises:
        ValueError: there is no LoRA layer in the model.
        AdapterError: a tensor is empty, or holds NaN or infinity; all are listed, and nothing is written.

    >>> import os, tempfile, torch, lora
    >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
    >>> model = torch.nn.Sequential(lora.Linear(8, 4, r=2))
    >>> lora.save_adapter(model, path)
    >>> lora.load_adapter(model, path)
    """
    adapter = collect(model)
    raise_all(f"{path} is not written", adapter.problems(), AdapterError)
    files.write(adapter, Path(path))


def load_adapter(model: nn.Module, path: str | os.PathLike[str], *, check_base: bool = True) -> None:
    """Load an adapter that `save_adapter` wrote, into a plain model or into one with LoRA layers.

    A plain model gets LoRA layers first, as the file describes them, and is frozen but for what the file holds. The
    scaling is the file's. Strict both ways: every tensor of the file is used and every adapter parameter of the
    model is written.

    Args:
        model: the base model, or a model with the same modules adapted.
        path: the file.
        check_base: raise if the base weights are not those that the adapter was trained on (the same weights in
            another dtype are). Default: True.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterError: the file is not an adapter; a tensor is missing, unexpected, empty, of the wrong shape or dtype,
            or holds NaN or infinity; there is no scaling; the base is another. One error lists everything, and the
            model is as it was.

    >>> import os, tempfile, torch, lora
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> _ = lora.inject(base, target_modules=["0"], r=2)
    >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
    >>> lora.save_adapter(base, path)
    >>> lora.eject(base)
    >>> lora.load_adapter(base, path)
    >>> base[0].r
    2
    """
    lora_layers(model, "load_adapter", none=True)
    adapter = files.read(Path(path))
    raise_all(f"{path} is not loaded", adapter.problems(), AdapterError)
    fit = _Fit(model, adapter, check_base)
    raise_all(f"{path} is not loaded", fit.problems, AdapterError)
    with all_or_nothing(model):
        adapt(fit.plans)
        if fit.plans:
            for name in adapter.modules_to_save:
                train_in_full(fit.modules[name])
            mark_only_lora_as_trainable(model)
        _take_over(adapter, fit.modules)


def collect(model: nn.Module) -> Adapter:
    """The adapter of a model, sharing its tensors."""
    layers = lora_layers(model, "save_adapter")
    names = names_of(model)
    adapted = {without_wrappers(names[layer][0]): layer for layer in layers if layer.r > 0}
    full = dict(_trained_in_full(names))
    tensors = {join(name, own): p for name, layer in adapted.items() for own, p in layer.lora_parameters()}
    about = {name: _about(layer) for name, layer in adapted.items()}
    modules_to_save = [without_wrappers(known[0]) for module, known in names.items() if trains_in_full(module)]
    return Adapter(about, {**tensors, **full}, list(full), modules_to_save, _name_of(model))


class _Fit:
    """How an adapter fits a model: the layers that must be made first, and everything that does not fit."""

    def __init__(self, model: nn.Module, adapter: Adapter, check_base: bool) -> None:
        self.adapter = adapter
        self.names = names_of(model)
        self.modules = {without_wrappers(name): module for module, known in self.names.items() for name in known}
        self.plans: list[Plan] = []
        self.problems: list[str] = []
        injected = [m for m in self.names if isinstance(m, LoRALayer) and m.r > 0]
        for name, settings in adapter.modules.items():
            try:
                module = self._module(name)
                if any(tensor.is_meta for tensor in module.parameters()):
                    raise ValueError("has no values yet, being on the meta device; give it some first.")
                if injected:
                    self._compare(name, module, settings)
                else:
                    self._plan(model, name, module, settings)
                if check_base:
                    fingerprint.check(settings["base"], module)
            except (ValueError, TypeError) as error:
                self.problems.append(f"{name}: {error}")
        for module in injected:
            if not any(without_wrappers(name) in adapter.modules for name in self.names[module]):
                self.problems.append(f"{self.names[module][0]}: has LoRA in the model, and no adapter in the file.")
        self._find_twins()
        for name in adapter.trained_in_full:
            self._find_full(name)
        for name in adapter.modules_to_save:
            if name not in self.modules:
                self.problems.append(f"{name}: there is no such module in the model.")
        if injected:
            theirs = {name for name, _ in _trained_in_full(self.names, only_recorded=True)}
            for name in sorted(theirs - set(adapter.trained_in_full)):
                self.problems.append(f"{name}: trains in the model, and is not in the file.")

    def _find_twins(self) -> None:
        for known in self.names.values():
            twins = [name for name in map(without_wrappers, known) if name in self.adapter.modules]
            if len(twins) > 1:
                self.problems.append(f"{', '.join(twins)}: one module in the model, and {len(twins)} in the file.")

    def _module(self, name: str) -> nn.Module:
        if name not in self.modules:
            raise ValueError("there is no such module in the model.")
        return self.modules[name]

    def _compare(self, name: str, module: nn.Module, settings: dict[str, Any]) -> None:
        if not isinstance(module, LoRALayer) or module.r == 0:
            raise ValueError("has an adapter in the file, and no LoRA in the model.")
        for own, parameter in module.lora_parameters():
            self._like(join(name, own), parameter.shape, parameter.dtype)
        for option in ("r", *_FORM):
            theirs, ours = settings.get(option), getattr(module, option, None)
            if _plain(theirs) != _plain(ours):
                raise ValueError(f"`{option}` is {theirs} in the file and {ours} in the model.")

    def _plan(self, model: nn.Module, name: str, module: nn.Module, settings: dict[str, Any]) -> None:
        reason = why_not(model, self.names[module], module)
        kind = kind_for(type(module))
        if reason or kind is None:
            raise ValueError(reason)
        wanted = {option: settings.get(option) for option in _FORM}
        kind, own = kind.configure(module, **wanted)
        dtype = self.adapter.tensors[join(name, "lora_A")].dtype
        for parameter, shape in zip(PARAMETERS, kind.lora_shapes(module, settings["r"], **own), strict=True):
            self._like(join(name, parameter), shape, dtype)
        general = {key: settings[key] for key in _GENERAL}
        self.plans.append(Plan(module, kind, {**general, "adapter_dtype": dtype, **own}))

    def _find_full(self, name: str) -> None:
        owner, _, own = name.rpartition(".")
        module = self.modules.get(owner)
        tensor = None if module is None else {**module._parameters, **module._buffers}.get(own)
        if tensor is None:
            self.problems.append(f"{name}: there is no such parameter or buffer in the model.")
        else:
            self._like(name, tensor.shape, tensor.dtype)

    def _like(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        tensor = self.adapter.tensors[name]
        if tensor.shape != shape:
            self.problems.append(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}.")
        if tensor.dtype != dtype:
            self.problems.append(f"{name} must be of dtype {dtype}, got {tensor.dtype}.")


def _take_over(adapter: Adapter, modules: dict[str, nn.Module]) -> None:
    """Give the modules an adapter that fits them; the Parameter objects stay."""
    targets: list[tuple[Tensor, Tensor]] = []
    for name, settings in adapter.modules.items():
        layer = modules[name]
        assert isinstance(layer, LoRALayer), "it fits"
        layer.lora_alpha, layer.use_rslora = settings["lora_alpha"], settings["use_rslora"]
        layer.scaling = settings["scaling"]
        targets += [(parameter, adapter.tensors[join(name, own)]) for own, parameter in layer.lora_parameters()]
    for name in adapter.trained_in_full:
        owner, _, own = name.rpartition(".")
        remember(modules[owner], own)
        tensor: Tensor = getattr(modules[owner], own)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(True)
        targets.append((tensor, adapter.tensors[name]))
    _write_all(targets)


@torch.no_grad()
def _write_all(targets: list[tuple[Tensor, Tensor]]) -> None:
    """Copy values, all or none."""
    before = [target.clone() for target, _ in targets]
    try:
        for target, value in targets:
            target.copy_(value)
    except BaseException:
        for (target, _), value in zip(targets, before, strict=True):
            target.copy_(value)
        raise


def _trained_in_full(names: Names, only_recorded: bool = False) -> Iterator[tuple[str, Tensor]]:
    """What trains, or has trained, outside the adapters; a tensor with several names under its first."""
    seen: set[int] = set()
    for module, known in names.items():
        adapter = dict(module.lora_parameters()) if isinstance(module, LoRALayer) else {}
        in_full = set(originals(module)) - module._non_persistent_buffers_set
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or name in adapter or id(tensor) in seen:
                continue
            if name in in_full or (tensor.requires_grad and not only_recorded):
                seen.add(id(tensor))
                yield join(without_wrappers(known[0]), name), tensor


def _about(layer: LoRALayer) -> dict[str, Any]:
    settings = {name: getattr(layer, name) for name in layer.settings if name != "merge_weights"}
    return {**settings, "scaling": layer.scaling, "base": fingerprint.describe(layer)}


def _name_of(model: nn.Module) -> str | None:
    """What a transformers model says that it was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
