"""Replicas of a model that train in step: parameters that DistributedDataParallel does not synchronise are found.

It hooks the gradients of what trains when it wraps a model, once. What is put in, unfrozen or cast later trains by
itself in every rank, without a word.

Beside that, two refusals for other ways to use several devices: parameters that torch's first FullyShardedDataParallel
keeps in one flat piece, and dropout that would differ between ranks under torch's own tensor-parallel styles.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.compiler import is_compiling
from torch.nn.parallel import DistributedDataParallel

from lora.errors import instance
from lora.functional.fused import is_plain
from lora.layers.layer import LoRALayer
from lora.layers.parts import with_parts
from lora.layers.weights import is_sharded
from lora.models.model import OBSTACLES, UNREADABLE


def enter() -> None:
    """Enter what is refused here in the rings' lists: checks before a forward, and obstacles to injection."""
    LoRALayer.lora_checks += (check_in_step, check_dropout)
    OBSTACLES.append(wrapped)
    UNREADABLE.append(flattened)


class InStep:
    """That a layer's parameters were found to be synchronised by a wrapper, as they were then."""

    def __init__(self, wrapper: DistributedDataParallel, layer: nn.Module) -> None:
        self.wrapper = weakref.ref(wrapper)
        self.state = _state(layer)

    def still(self, wrapper: DistributedDataParallel, layer: nn.Module) -> bool:
        """Whether nothing has changed since."""
        return self.wrapper() is wrapper and self.state == _state(layer)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a pickled or copied layer finds out for itself


def check_in_step(layer: LoRALayer, input: Tensor) -> None:
    """RuntimeError if DistributedDataParallel runs this forward, and leaves out parameters that train."""
    # Asked in this order, a compiler sees a constant, and guards nothing.
    if is_compiling() or (wrapper := DistributedDataParallel._active_ddp_module) is None:
        return
    _check(layer, wrapper)


def check_dropout(layer: LoRALayer, input: Tensor) -> None:
    """RuntimeError where ranks would drop other features of an input that is to be the same on all of them."""
    if not (layer.training and layer.lora_dropout):
        return
    # On other devices DTensor keeps the ranks' random states together by itself.
    if input.device.type == "cpu" and is_sharded(input) and is_sharded(layer.weight):
        raise RuntimeError(
            f"dropout of {instance(layer)} under torch's own tensor-parallel styles would differ between ranks; "
            "use those of `lora.parallel`, or `lora_dropout=0`."
        )


def _check(layer: Any, wrapper: DistributedDataParallel) -> None:
    known = layer._checked  # asked once: another thread may cast the model
    if known is not None and known.still(wrapper, layer):
        return
    # In training also without gradients: reentrant checkpointing runs the forward so, and the wrapper sees no other.
    if not (layer.training or torch.is_grad_enabled()) or torch.is_inference_mode_enabled() or not is_plain():
        return
    problems = [*_unsynchronised(wrapper, layer)]
    if problems:
        raise RuntimeError(
            "DistributedDataParallel does not synchronise these parameters; each rank would train its own:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nPut LoRA in, unfreeze and cast first, then wrap the model; or wrap its `.module` again now."
        )
    modules: list[nn.Module] = [layer, *wrapper.module.modules()]
    for module in with_parts(modules):
        for one in (module, *module.lora_seats.values()) if isinstance(module, LoRALayer) else ():
            vars(one)["_checked"] = InStep(wrapper, one)


def wrapped(names: Mapping[nn.Module, Sequence[str]]) -> Iterator[str]:
    """A complaint for each wrapper of a model, or in it, that would not synchronise what is put in now."""
    for module, known in names.items():
        if isinstance(module, DistributedDataParallel):
            yield (
                f"{known[0] or 'the model'} is wrapped in DistributedDataParallel, which does not synchronise "
                "parameters that are put in later; give its `.module` LoRA first, then wrap it."
            )


def flattened(names: Mapping[nn.Module, Sequence[str]]) -> Iterator[str]:
    """A complaint for each of torch's first FullyShardedDataParallel, which keeps parameters in one flat piece."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module, known in names.items():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            yield (
                f"{known[0] or 'the model'} is wrapped in FullyShardedDataParallel, which keeps parameters in one flat "
                "piece; use torch's `fully_shard` (FSDP2), after `lora.inject`."
            )


def _state(layer: nn.Module) -> list[tuple[int, bool]]:
    # By identity: the wrapper keeps all that it knew alive. Casts and moves forget the finding (`LoRALayer._apply`).
    return [(id(p), p.requires_grad) for p in layer._parameters.values() if p is not None]


def _unsynchronised(wrapper: DistributedDataParallel, layer: nn.Module) -> Iterator[str]:
    """What trains in the wrapped model, or in the layer if it is not in there, and is not synchronised, and why."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in wrapper.module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    known = {id(parameter) for parameter in wrapper._module_parameters}
    for parameter, own in names.items():
        if not _trains(parameter) or not wrapper.parameters_to_ignore.isdisjoint(own):
            continue
        if id(parameter) not in known:
            yield f"{own[0]}: was put in after the model was wrapped."
        elif not _is_hooked(parameter):
            yield f"{own[0]}: was frozen when the model was wrapped, or has been cast or moved since."
    for name, parameter in layer._parameters.items():
        if parameter is not None and parameter not in names and _trains(parameter) and not _is_hooked(parameter):
            yield f"{name} of {instance(layer)} that the wrapped model calls, and does not hold as a module."


def _trains(parameter: nn.Parameter) -> bool:
    # `torch.func.functional_call` puts other tensors in the places of parameters for a while.
    return isinstance(parameter, nn.Parameter) and parameter.requires_grad and is_plain(parameter)


@torch.enable_grad()
def _is_hooked(parameter: nn.Parameter) -> bool:
    """Whether someone waits for the parameter's gradient.

    A parameter holds the node that accumulates its gradient only weakly, so that each use in a graph makes one anew
    unless another holds it, as the wrapper does with those that it has hooked. A mark tells the old from a new one.
    """
    node: Any = get_gradient_edge(parameter).node
    node.metadata["lora"] = True
    del node
    node = get_gradient_edge(parameter).node
    return bool(node.metadata.pop("lora", False))
