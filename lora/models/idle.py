"""Adapters that take no part: which layers' A and B got no gradient in a training step, or have not moved since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn as nn
from torch import Tensor

from lora.functional.fused import is_plain
from lora.layers.layer import LoRALayer
from lora.models.model import lora_layers, names_of, without_wrappers

_NO_GRADIENT = (
    "no gradient came to it: it was not called, or its weight was read where nobody could see it, or "
    "`checkpoint(…, use_reentrant=True)` ran over inputs that need no gradient (`use_reentrant=False` lets it come, "
    "and so does transformers' `model.enable_input_require_grads()`)"
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
    found = {layer: _gradient_problem(layer) if by_gradient else _value_problem(layer) for layer in layers}
    if not by_gradient and all(found.values()):
        raise ValueError(
            "check: nothing in this model has been trained yet; call it after `loss.backward()`, before the optimizer "
            "takes the gradients."
        )
    idle = {without_wrappers(names[layer][0]): reason for layer, reason in found.items() if reason}
    return CheckReport(len(layers), idle)


def _factors(layer: LoRALayer) -> list[nn.Parameter]:
    """What trains of a layer's adapter."""
    return [parameter for _, parameter in layer.lora_parameters() if parameter.requires_grad]


def _gradient_problem(layer: LoRALayer) -> str | None:
    gradients = [factor.grad for factor in _factors(layer) if factor.grad is not None]
    if not gradients:
        return _NO_GRADIENT
    # Of a sharded one this rank has a part, which says nothing of the others.
    return None if any(not is_plain(gradient) or _moves(gradient) for gradient in gradients) else _ZERO


def _moves(tensor: Tensor) -> bool:
    return bool(tensor.any())


def _value_problem(layer: LoRALayer) -> str | None:
    """Whether the factor that starts at zero still is; a start from the weight is known by its values."""
    if layer.lora_start is not None:
        A, B, _ = layer.lora_start
        same = bool((layer.lora_A.cpu() == A).all()) and bool((layer.lora_B.cpu() == B).all())
        return _NOT_MOVED if same else None
    zero = getattr(layer, layer.lora_starts_at_zero)
    return None if not is_plain(zero) or _moves(zero) else _NOT_MOVED
