"""How an adapter fits a model: what must be made first, and everything that does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn

from lora import fingerprint
from lora.adapter import MAGNITUDE, PARAMETERS, Adapter
from lora.formats.fitted import fitted, renamed
from lora.inject import Plan
from lora.layer import LoRALayer, join
from lora.matching import Names, names_of, why_not, without_wrappers
from lora.registry import adapted_class, kind_for
from lora.swap import check_rank, with_room
from lora.training import originals

# The settings that give tensors their meaning, beside r: they must agree between a file and a model.
_FORM = ("splits", "enable_lora", "factored")
_GENERAL = ("r", "lora_alpha", "lora_dropout", "use_rslora")
_SWITCH = "use_dora"


class Fit:
    """How an adapter fits a model: the layers that must be made first, and everything that does not fit."""

    def __init__(self, model: nn.Module, adapter: Adapter, check_base: bool) -> None:
        self.names = names_of(model)
        self.modules = {without_wrappers(name): module for module, known in self.names.items() for name in known}
        self.plans: list[Plan] = []
        adapter, clashes = renamed(adapter, self.modules)
        self.adapter, misfits = fitted(adapter, self.modules)
        self.problems = clashes + misfits
        adapter = self.adapter = with_room(self.adapter, self.modules)
        injected = [m for m in self.names if isinstance(m, LoRALayer) and m.r > 0]
        for name, settings in adapter.modules.items():
            try:
                module = self._module(name)
                if any(tensor.is_meta for tensor in module.parameters()):
                    raise ValueError("has no values yet, being on the meta device; give it some first.")
                fingerprint.check_kind(settings["base"], module)
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
        self.problems += tied(self.names, adapter.trained_in_full if adapter.format == "peft" else ())
        for name in adapter.modules_to_save:
            if name not in self.modules:
                self.problems.append(f"{name}: there is no such module in the model.")
        if injected:
            theirs = {name for name, *_ in trained_in_full(self.names, only_recorded=True)}
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
        check_rank(module, settings["r"])
        with_dora = bool(settings.get(_SWITCH))
        if with_dora != module.use_dora:
            raise ValueError(f"`{_SWITCH}` is {with_dora} in the file and {module.use_dora} in the model.")
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
        shapes = dict(zip(PARAMETERS, kind.lora_shapes(module, settings["r"], **own), strict=True))
        general = {key: settings[key] for key in _GENERAL}
        if settings.get(_SWITCH):
            cls = adapted_class(kind, module)
            cls.check_dora(module, shapes["lora_B"])
            shapes[MAGNITUDE] = (cls.magnitudes(module, shapes["lora_B"]),)
            general[_SWITCH] = True
        for parameter, shape in shapes.items():
            exact = torch.promote_types(dtype, torch.float32) if parameter == MAGNITUDE else dtype
            self._like(join(name, parameter), shape, exact)
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
        exact = name.endswith(MAGNITUDE) and torch.promote_types(tensor.dtype, dtype) == dtype
        if tensor.dtype != dtype and not exact:
            self.problems.append(f"{name} must be of dtype {dtype}, got {tensor.dtype}.")


def trained_in_full(names: Names, only_recorded: bool = False) -> Iterator[tuple[str, nn.Module, str]]:
    """What trains, or has trained, outside the adapters: its name, its module, and what it is called there.

    A tensor with several names comes under its first.
    """
    seen: set[int] = set()
    for module, known in names.items():
        adapter = dict(module.lora_parameters()) if isinstance(module, LoRALayer) else {}
        in_full = set(originals(module)) - module._non_persistent_buffers_set
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or name in adapter or id(tensor) in seen:
                continue
            if name in in_full or (tensor.requires_grad and not only_recorded):
                seen.add(id(tensor))
                yield join(without_wrappers(known[0]), name), module, name


def tied(names: Names, keys: Iterable[str]) -> Iterator[str]:
    """A complaint for each of these parameters that the model has elsewhere, too: PEFT would train a copy of it."""
    owners: dict[int, list[str]] = {}
    for module, known in names.items():
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append(join(without_wrappers(known[0]), own))
    wanted = set(keys)
    for group in owners.values():
        ours, others = [key for key in group if key in wanted], [key for key in group if key not in wanted]
        if ours and others:
            yield f"{', '.join(ours)}: is one tensor with {', '.join(others)} in the model, and a copy of it in PEFT."


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
