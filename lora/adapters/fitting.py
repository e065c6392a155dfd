"""How an adapter fits a model: what must be made first, and everything that does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor

from lora.adapters.adapter import MAGNITUDE, PARAMETERS, Adapter, ModuleAdapter
from lora.adapters.base import differences, own_tensors
from lora.adapters.fitted import fitted, renamed
from lora.adapters.single import NO_ROOM
from lora.errors import join
from lora.functional.fused import exact_dtype
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.layers.registry import adapted_class, kind_for
from lora.layers.weights import is_writable
from lora.models.injection import Plan, refusal
from lora.models.model import Memory, Names, by_tensor, names_of, owned_tensors, without_wrappers
from lora.models.start import pretrained_weight
from lora.models.training import has_moved, is_kept, originals

_GENERAL = ("r", "lora_alpha", "lora_dropout", "use_rslora")
# The share of rows that a resized embedding has in common with the one of the same base model, at least.
_COMMON_ROWS, _NEAR = 0.01, 0.01  # and how near a row is that was rounded
_ROWS = 4096  # that are compared at once
_CAST = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # dtypes of models that heads follow
_TIED = "are one tied tensor in the model"
_UNTIE = (
    "Untie them first: give each module a Parameter of its own, as in `model.lm_head.weight = "
    "torch.nn.Parameter(model.lm_head.weight.detach().clone())`, and set `model.config.tie_word_embeddings = False`."
)


# A module, the name of one of its own tensors, and a value for it.
Target = tuple[nn.Module, str, Tensor]


def _with_room(adapter: Adapter, modules: Mapping[str, nn.Module]) -> Adapter:
    """The adapter with A and B at the ranks of a model's layers, where these have room for it; r stays."""
    tensors = dict(adapter.tensors)
    for name, settings in adapter.modules.items():
        layer = modules.get(name)
        if isinstance(layer, LoRALayer):
            pair = layer.lora_padded(settings.r, *adapter.pair(name))
            tensors |= {join(name, own): factor for own, factor in zip(PARAMETERS, pair, strict=True)}
    return replace(adapter, tensors=tensors)


class Fit:
    """How an adapter fits a model: the layers that must be made first, and everything that does not fit.

    Attributes:
        plans: the layers that must be made first.
        as_before: what the model holds from an adapter before, and this one does not: the values that it had.
        unchanged: what the file holds of the base model, and the model has as well.
        problems: everything that does not fit.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, check_base: bool) -> None:
        self.names = names_of(model)
        self.modules = {without_wrappers(name): module for module, known in self.names.items() for name in known}
        self.plans: list[Plan] = []
        self.as_before: list[Target] = []
        self.unchanged: list[str] = []
        adapter, clashes = renamed(adapter, self.modules)
        self.adapter, misfits = fitted(adapter, self.modules)
        self.problems = clashes + misfits
        adapter = self.adapter = _with_room(self.adapter, self.modules)
        injected = [m for m in self.names if isinstance(m, LoRALayer) and m.r > 0]
        for name, settings in adapter.modules.items():
            try:
                module = self._module(name)
                if any(tensor.is_meta for tensor in module.parameters()):
                    raise ValueError("has no values yet, being on the meta device; give it some first.")
                settings.base.check_kind(module)
                if injected:
                    self._compare(name, module, settings)
                else:
                    self._plan(model, name, module, settings)
                if check_base and join(name, "weight") not in adapter.trained_in_full:
                    settings.base.check(module)
            except (ValueError, TypeError) as error:
                self.problems.append(f"{name}: {error}")
        for module in injected:
            if not any(without_wrappers(name) in adapter.modules for name in self.names[module]):
                self.problems.append(f"{self.names[module][0]}: has LoRA in the model, and no adapter in the file.")
        self._find_twins()
        for name in adapter.trained_in_full:
            self._find_full(name, check_base)
        self._find_ties()
        if check_base and adapter.rest:
            self._compare_rest()
        for name in adapter.modules_to_save:
            if name not in self.modules:
                self.problems.append(f"{name}: there is no such module in the model.")
        # What the model has anyway is neither written nor remembered.
        self.adapter = adapter = replace(
            adapter,
            tensors={name: tensor for name, tensor in adapter.tensors.items() if name not in self.unchanged},
            trained_in_full=[name for name in adapter.trained_in_full if name not in self.unchanged],
            kept=[name for name in adapter.kept if name not in self.unchanged],
        )
        for name, module, own in trained_in_full(self.names, only_recorded=True):
            if name not in adapter.trained_in_full:
                if is_kept(module, own):
                    self.as_before.append((module, own, originals(module)[own]))
                else:
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

    def _compare(self, name: str, module: nn.Module, settings: ModuleAdapter) -> None:
        if not isinstance(module, LoRALayer) or module.r == 0:
            raise ValueError("has an adapter in the file, and no LoRA in the model.")
        r, ranks = settings.r, module.lora_ranks()
        if r > ranks[0] and isinstance(ranks, range):
            raise ValueError(NO_ROOM.format(r, ranks[0]))
        with_dora = bool(settings.use_dora)
        if with_dora != module.use_dora:
            raise ValueError(f"`use_dora` is {with_dora} in the file and {module.use_dora} in the model.")
        for own, parameter in module.lora_parameters():
            self._like(join(name, own), parameter.shape, parameter.dtype)
        if r not in ranks:
            raise ValueError(f"`r` is {r} in the file and {module.r} in the model.")
        for option, theirs in settings.form.items():
            ours = getattr(module, option, None)
            if theirs != ours:
                raise ValueError(f"`{option}` is {theirs} in the file and {ours} in the model.")

    def _plan(self, model: nn.Module, name: str, module: nn.Module, settings: ModuleAdapter) -> None:
        reason = refusal(model, self.names[module], module)
        kind = kind_for(type(module))
        if reason or kind is None:
            raise ValueError(reason)
        kind, own = kind.lora_configure(module, **settings.form)
        dtype = self.adapter.tensors[join(name, "lora_A")].dtype
        shapes = dict(zip(PARAMETERS, kind.lora_shapes(module, settings.r, **own), strict=True))
        general = {key: getattr(settings, key) for key in _GENERAL}
        if settings.use_dora:
            cls = adapted_class(kind, module)
            cls.lora_check_dora(module, shapes["lora_B"])
            shapes[MAGNITUDE] = (cls.lora_magnitudes(module, shapes["lora_B"]),)
            general["use_dora"] = True
        for parameter, shape in shapes.items():
            exact = exact_dtype(dtype) if parameter == MAGNITUDE else dtype
            self._like(join(name, parameter), shape, exact)
        self.plans.append(Plan(module, kind, {**general, "adapter_dtype": dtype, **own}))

    def _target(self, name: str) -> tuple[nn.Module, str, Tensor | None]:
        """The module, the own name, and the tensor of the model that a full name stands for."""
        owner, _, own = name.rpartition(".")
        module = self.modules.get(owner, nn.Module())
        return module, own, {**module._parameters, **module._buffers}.get(own)

    def _find_full(self, name: str, check_base: bool) -> None:
        module, own, tensor = self._target(name)
        if tensor is None:
            self.problems.append(f"{name}: there is no such parameter or buffer in the model.")
            return
        if not is_writable(tensor):
            self.problems.append(
                f"{name}: the model's tensor cannot be written to, being expanded from a smaller one or made in "
                "torch.inference_mode; make the model otherwise."
            )
        elif name in self.adapter.kept:
            self._find_kept(name, module, own, tensor, check_base)
        else:
            value = self.adapter.tensors[name]
            if self.plans and {tensor.dtype, value.dtype} <= _CAST:
                # A plain model says by its dtype in which one everything is to be, a head that trained as well.
                self.adapter.tensors[name] = value.to(tensor.dtype)
            self._like(name, tensor.shape, tensor.dtype)

    def _find_kept(self, name: str, module: nn.Module, own: str, tensor: Tensor, check_base: bool) -> None:
        """Fit a part of the base model that did not train: it may be in another dtype, as the base model may."""
        value = self.adapter.tensors[name]
        embeds = own == "weight" and tensor.dim() == value.dim() == 2 and tensor.shape[1] == value.shape[1]
        if embeds and tensor.shape != value.shape:
            self.problems.append(
                f"{name} has the shape {tuple(tensor.shape)} in the model, and {tuple(value.shape)} in the file: the "
                "embeddings were resized where the adapter was trained; call "
                f"`model.resize_token_embeddings({value.shape[0]})` first."
            )
        elif tensor.is_floating_point() != value.is_floating_point() or tensor.shape != value.shape:
            self._like(name, tensor.shape, tensor.dtype)
        elif embeds and not tensor.is_meta:
            self._fit_rows(name, module, tensor, check_base)
        else:
            self.adapter.tensors[name] = value.to(tensor.dtype)

    def _fit_rows(self, name: str, module: nn.Module, tensor: Tensor, check_base: bool) -> None:
        """Take from the file only the rows that the model does not have: resizing has added them."""
        start = module.lora_start if isinstance(module, LoRALayer) else None
        ours = tensor if start is None else pretrained_weight(cast(LoRALayer, module))
        ours = weights.of(module, "weight", ours).whole().detach()
        theirs = self.adapter.tensors[name].to(ours.device)
        same, near = _common_rows(ours, theirs)
        self.adapter.tensors[name] = torch.where(same[:, None], ours, theirs.to(ours.dtype))
        if check_base and near < _COMMON_ROWS * len(same):
            self.problems.append(
                f"{name}: only {near} of its {len(same)} rows are those of the file, which is for another base model; "
                "`check_base=False` loads it all the same."
            )
        elif bool(same.all()) and "weight" not in originals(module):
            self.unchanged.append(name)
        elif start is not None:
            self.problems.append(
                f"{name}: the file has other rows, and the adapter in the model started from a part of the model's "
                "own; load the file into the plain base model."
            )

    def _find_ties(self) -> None:
        """Complain of tied tensors in the model for which the file has several values, or one of several."""
        adapter, memory = self.adapter, Memory(own_tensors(self.names))
        targets = {name: self._target(name)[2] for name in adapter.trained_in_full}
        wanted = {name: tensor for name, tensor in targets.items() if tensor is not None}
        seen: set[str] = set()
        for name, tensor in wanted.items():
            if name in seen:
                continue
            whole = [one for one in memory.sharing(tensor) if one.tensor.shape == tensor.shape]  # no part of another
            group = [n for one in whole for n in one.names]
            ours, apart = [n for n in group if n in wanted], [n for n in group if n in adapter.rest]
            seen.update(ours)
            values = [adapter.tensors[n] for n in ours]
            if not all(torch.equal(values[0], value) for value in values):
                self.problems.append(f"{', '.join(ours)}: {_TIED}, and differ in the file. {_UNTIE}")
            elif apart:
                self.problems.append(
                    f"{', '.join(ours + apart)}: {_TIED}, and the file would change only {', '.join(ours)}. {_UNTIE}"
                )
            elif adapter.format == "peft":
                self.problems += tied(self.names, {*ours} - {*adapter.kept})

    def _compare_rest(self) -> None:
        adapter = self.adapter
        held = {id(self._target(name)[2]) for name in adapter.trained_in_full}
        adapted = {join(name, "weight") for name in adapter.modules}
        found = list(differences(adapter.rest, self.names, held, adapted))
        self.problems += found
        if found:
            self.problems.append(
                "The base model differs there from the one that the adapter was trained in. What was made at random, "
                "as a new head is, belongs in the adapter's file: train it with `modules_to_save` or `task_type`. "
                "`check_base=False` loads the adapter all the same."
            )

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
            recorded = name in in_full and has_moved(module, name)
            if recorded or (tensor.requires_grad and not only_recorded):
                seen.add(id(tensor))
                yield join(without_wrappers(known[0]), name), module, name


def tied(names: Names, keys: Iterable[str]) -> Iterator[str]:
    """A complaint for each of these parameters that the model has elsewhere, too: PEFT would train a copy of it."""
    wanted = set(keys)
    for owners in by_tensor(owned_tensors(names)):
        group = [without_wrappers(one.names[0]) for one in owners]
        ours, others = [key for key in group if key in wanted], [key for key in group if key not in wanted]
        if ours and others:
            yield f"{', '.join(ours)}: is one tensor with {', '.join(others)} in the model, and a copy of it in PEFT."


def _common_rows(ours: Tensor, theirs: Tensor) -> tuple[Tensor, int]:
    """Which rows are the model's own, and how many are near it, whatever they were rounded to in between."""
    same, near = [], 0
    for start in range(0, len(ours), _ROWS):  # float64 copies of a part alone
        a, b = ours[start : start + _ROWS], theirs[start : start + _ROWS]
        # A row is the model's own if a cast is all that differs, or what float32 loses when a start is given back.
        size, distance = b.double().norm(dim=1), (a.double() - b.double()).norm(dim=1)
        cast_alone = ((a.to(b.dtype) == b) | (b.to(a.dtype) == a)).all(1)
        same.append(cast_alone | (distance <= 16 * torch.finfo(torch.float32).eps * size))
        near += int((distance <= _NEAR * size).sum())
    return torch.cat(same), near
