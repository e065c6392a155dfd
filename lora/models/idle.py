"""Adapters that take no part: which layers' A and B got no gradient in a training step, or have not moved since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from lora.errors import some
from lora.functional.fused import is_plain
from lora.layers.layer import LoRALayer
from lora.layers.parts import with_parts
from lora.models.model import Names, lora_layers, names_of, without_wrappers

_NO_GRADIENT = (
    "no gradient came to it: it was not called, or its weight was read where nobody could see it, or "
    "`checkpoint(…, use_reentrant=True)` ran over inputs that need no gradient "
    "(transformers' `model.enable_input_require_grads()` gives them one)"
)
_REENTRANT = (
    "no gradient came to it, nor to what is around it: `checkpoint(…, use_reentrant=True)` runs there, over inputs "
    "that need no gradient, as a frozen embedding's; call `model.enable_input_require_grads()`, or pass "
    "`use_reentrant=False`"
)
_ZERO = "its gradient is zero: what it adds changed nothing in the loss, as an expert's that saw no token"
_NOT_MOVED = "it is as it started, and others have moved; a training step before this says more"


@dataclass(frozen=True)
class CheckReport:
    """What `lora.check` found.

    Attributes:
        idle: the names of the layers that take no part, each with the reason.
        trained: how many layers' adapters train.
    """

    trained: int
    idle: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {reason}." for name, reason in self.idle.items()]
        return "\n".join([*lines, f"{self.trained - len(self.idle)} of {self.trained} adapters learn"])


def check(model: nn.Module) -> CheckReport:
    """Say which adapters take no part in training.

    Call it once between ``loss.backward()`` and ``optimizer.step()``: an adapter without a gradient learns nothing,
    whatever the loss does. Without any gradients in the model it goes by values: which adapters still are as they
    started, while others have moved.

    Args:
        model: a model with LoRA layers.

    Returns:
        A report with the names of these layers and the likely reasons. Frozen adapters are left out.

    Raises:
        ValueError: there is no LoRA layer, none trains, or nothing has been trained: there are no gradients, and every
            adapter is as it started.

    >>> import torch, lora
    >>> model = torch.nn.ModuleDict({"used": torch.nn.Linear(8, 2), "unused": torch.nn.Linear(8, 2)})
    >>> _ = lora.inject(model, target_modules="all-linear", r=2)
    >>> model["used"](torch.ones(8)).sum().backward()
    >>> list(lora.check(model).idle)
    ['unused']
    """
    layers = [layer for layer in lora_layers(model, "check") if _factors(layer)]
    if not layers:
        raise ValueError("check: no adapter in this model trains; see `lora.mark_only_lora_as_trainable`.")
    names = names_of(model)
    by_gradient = any(p.requires_grad and p.grad is not None for p in model.parameters())
    if by_gradient:
        found = {layer: _gradient_problem(layer) for layer in layers}
        found |= dict.fromkeys(_without_inputs(model, [layer for layer in layers if not _gradients(layer)]), _REENTRANT)
    else:
        found = {layer: _NOT_MOVED if same else None for layer, same in zip(layers, _as_started(layers), strict=True)}
    if not by_gradient and all(found.values()):
        raise ValueError(
            "check: nothing in this model has been trained yet; call it after `loss.backward()`, before the optimizer "
            "takes the gradients."
        )
    idle = {without_wrappers(names[layer][0]): reason for layer, reason in found.items() if reason}
    return CheckReport(len(layers), idle)


def idle_problem(model: nn.Module, names: Names) -> str | None:
    """Which adapters took no part in a training that others have had; None where there are none, or nobody can tell.

    Not told of: adapters that were loaded, or copied from a file's, and those that had a gradient, if a zero one.
    """
    layers = [layer for layer in lora_layers(model, "save_adapter", reads=True) if _is_known(layer)]
    started = _as_started(layers)
    if all(started):
        return None
    idle = [layer for layer, same in zip(layers, started, strict=True) if same and not _gradients(layer)]
    if any(_was_written(layer) for layer in layers):  # torch's fused optimizers do not count what they write
        idle = [layer for layer in idle if not _was_written(layer)]
    if not idle:
        return None
    which = some((without_wrappers(names[layer][0]) for layer in idle), len(idle))
    return (
        f"{len(idle)} of {len(layers)} adapters are as they started, and others have learnt: {which}. No gradient came "
        "to them: they were never called, as those of an unused head, or their weights are read where nobody could see "
        "it, or they are in no optimizer. `lora.check(model)` after `loss.backward()` says more."
    )


def _is_known(layer: LoRALayer) -> bool:
    """Whether it can be known of an adapter, that trains, whether it has."""
    tensors = (layer.lora_A, layer.lora_B) if layer.r > 0 and layer.lora_fresh is not None else ()
    plain = bool(tensors) and all(is_plain(tensor) and not tensor.is_meta for tensor in tensors)
    return plain and bool(_factors(layer))


def _was_written(layer: LoRALayer) -> bool:
    """Whether an optimizer wrote to A or B, of those that count it."""
    return layer.lora_A._version + layer.lora_B._version != layer.lora_fresh


def _factors(layer: LoRALayer) -> list[nn.Parameter]:
    """What trains of a layer's adapter."""
    return [parameter for _, parameter in layer.lora_parameters() if parameter.requires_grad]


def _without_inputs(model: nn.Module, idle: Sequence[LoRALayer]) -> Iterator[LoRALayer]:
    """Those of these layers in modules in which transformers checkpoints reentrantly, and none has a gradient."""
    without = {*idle}
    for module in model.modules():
        function = getattr(module, "gradient_checkpointing", False) and vars(module).get("_gradient_checkpointing_func")
        if isinstance(function, partial) and function.keywords.get("use_reentrant"):
            inside = {one for one in with_parts(module.modules()) if isinstance(one, LoRALayer) and _factors(one)}
            yield from inside if inside <= without else ()


def _gradients(layer: LoRALayer) -> list[Tensor]:
    return [factor.grad for factor in _factors(layer) if factor.grad is not None]


def _gradient_problem(layer: LoRALayer) -> str | None:
    gradients = _gradients(layer)
    if not gradients:
        return _NO_GRADIENT
    # Of a sharded one this rank has a part, which says nothing of the others.
    return None if any(not is_plain(gradient) or bool(gradient.any()) for gradient in gradients) else _ZERO


def _as_started(layers: Sequence[LoRALayer]) -> list[bool]:
    """Whether the factor that starts at zero still is zero, of each; a start from the weight is known by its values.

    Of sharded ones this rank cannot tell.
    """
    found = [False] * len(layers)
    by_device: dict[torch.device, list[int]] = {}
    for number, layer in enumerate(layers):
        if is_plain(layer.lora_A) and is_plain(layer.lora_B):
            by_device.setdefault(layer.lora_A.device, []).append(number)
    for numbers in by_device.values():  # one wait for each device
        same = torch.stack([~_has_moved(layers[number]) for number in numbers]).tolist()
        for number, started in zip(numbers, same, strict=True):
            found[number] = started
    return found


@torch.no_grad()
def _has_moved(layer: LoRALayer) -> Tensor:
    if layer.lora_start is None:
        zero: Tensor = getattr(layer, layer.lora_starts_at_zero)
        return zero.any()
    A, B, _ = layer.lora_start
    return (layer.lora_A != A.to(layer.lora_A.device)).any() | (layer.lora_B != B.to(layer.lora_B.device)).any()
