"""Which modules cannot be adapted, and why: what must be done first, what never can be, and what is left alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch.nn as nn

from lora.errors import instance
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.layers.parts import Part
from lora.layers.registry import adapted_class, kind_for
from lora.layers.weights import is_fully_sharded, is_sharded
from lora.models.model import Names, by_tensor, has_own_forward, is_lazy, owned_tensors


def refusal(model: nn.Module, names: Sequence[str], module: nn.Module) -> str | None:
    """The reason why the module of these names cannot be adapted, whatever the settings; None if it can."""
    return why_not_yet(model, names, module) or unfit(module)


def why_not_yet(model: nn.Module, names: Sequence[str], module: nn.Module) -> str | None:
    """What the user must do before a module can be adapted; None if nothing."""
    if isinstance(module, LoRALayer) and module.r > 0:
        return "has LoRA already; eject or merge it first."
    if kind_for(type(module)) is None:
        return f"no kind of LoRA layer adapts {instance(module)}; `lora.register` teaches one."
    if is_lazy(module):
        return "is lazy and has no shape yet; run one forward pass first."
    if isinstance(module, Part):
        names, module = [name.rpartition(".")[0] for name in names], module.lora_owner
    parts = names[0].split(".")
    around = (model.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1))
    if is_sharded(module._parameters.get("weight")) or any(map(is_fully_sharded, around)):
        return "is sharded; an adapter added now would not be, and each rank would train its own. Inject, then shard."
    if has_own_forward(module):
        return (
            "the instance has its own `forward` attribute, which would bypass LoRA. accelerate's hooks set one "
            "(`device_map`, `dispatch_model`): inject first, and dispatch then; or take them out with "
            "`accelerate.hooks.remove_hook_from_module(model, recurse=True)`, inject, and dispatch again."
        )
    return None


def own_forward_problems(layers: Iterable[LoRALayer], names: Names) -> Iterator[str]:
    """A complaint for each layer whose instance would go on calling LoRA's forward as a plain layer."""
    for layer in layers:
        if has_own_forward(layer):
            yield (
                f"{names[layer][0] or 'the model'}: the instance has its own `forward` attribute, which would go on "
                "calling LoRA's; remove it first, as `accelerate.hooks.remove_hook_from_module` and "
                "`Accelerator.unwrap_model(model, keep_fp32_wrapper=False)` do."
            )


def unfit(module: Any) -> str | None:
    """Why no adapter fits a module, whatever is done first; None if one does, or if `why_not_yet` has the reason."""
    kind = kind_for(type(module))
    if kind is None or is_lazy(module) or (isinstance(module, LoRALayer) and module.r > 0):
        return None
    if "weight" not in {**module._parameters, **module._buffers}:
        return "its `weight` is computed (by a parametrization, or pruning); make that permanent first."
    shape = weights.whole_shape(module.weight)
    if 0 in shape:
        return f"has a weight of the shape {tuple(shape)}, in which there is nothing to adapt."
    if getattr(module, "max_norm", None) is not None and not adapted_class(kind, module).lora_dense:
        return "has a forward of its own, and nobody knows what its `max_norm` bounds there; set that to None first."
    clash = clashing_names(module)
    if clash:
        return f"uses names that LoRA needs for itself: {', '.join(clash)}."
    return None


def why_alone(module: nn.Module) -> str | None:
    """Why "all-linear" leaves a linear layer alone that it could adapt; None if it does not."""
    if type(module).__name__.endswith("Router"):
        return "is a router, which decides where tokens go; name it in `target_modules` to adapt it."
    return None


def unreached(names: Names) -> dict[str, int]:
    """Matrices, and stacks of them, of modules that no kind of LoRA layer adapts, by name, with their sizes."""
    return {
        one.names[0]: one.tensor.numel()
        for one, *_ in by_tensor(owned_tensors(names))
        if one.own in one.module._parameters
        and not one.tensor.requires_grad
        and not nn.parameter.is_lazy(one.tensor)
        and sum(size > 1 for size in one.tensor.shape) > 1
        and kind_for(type(one.module)) is None
    }


def clashing_names(module: nn.Module) -> list[str]:
    """Names that the module uses and that its kind of LoRA layer needs for the adapter."""
    kind = kind_for(type(module))
    if kind is None or isinstance(module, LoRALayer):
        return []
    cls: Any = type(module)
    needed, found = _needed(kind.__mro__), _in_class(kind.__mro__, cls)
    for own in (vars(module), module._parameters, module._buffers, module._modules):
        found = found | needed.intersection(own)
    return sorted(found)


@cache
def _needed(classes: tuple[type, ...]) -> frozenset[str]:
    """The names that a kind of LoRA layer, made of these classes, has beyond every module's."""
    names = {name for cls in classes for name in vars(cls)}
    return frozenset(names - {*dir(nn.Module), "reset_parameters", "scaling", "__annotations__"})


@cache
def _in_class(classes: tuple[type, ...], cls: Any) -> frozenset[str]:
    """Those of them that a class has for itself."""
    return frozenset(name for name in _needed(classes) if hasattr(cls, name))
