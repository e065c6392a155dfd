"""Switch LoRA off for a while: within `lora.disabled` a model computes what the base model does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn as nn
from torch import Tensor

from lora.errors import join, raise_all
from lora.layers.layer import LoRALayer
from lora.layers.weights import is_sharded
from lora.models.model import lora_layers
from lora.models.training import has_moved, originals, resized_problems


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within ``with lora.disabled(model):`` the model computes what the base model does.

    Modules and biases that train in full, and buffers that moved in training (running statistics), count with the
    values that they had when LoRA was put in, too.

    Args:
        model: a model with LoRA layers, or a part of one.

    Raises:
        ValueError: there is no LoRA layer in the model, or what trains in full is sharded, or was resized since.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 2))
    >>> before = model(torch.ones(8))
    >>> _ = lora.inject(model, target_modules=["0"], r=2)
    >>> _ = torch.nn.init.ones_(model[0].lora_B)
    >>> with lora.disabled(model):
    ...     bool((model(torch.ones(8)) == before).all())
    True
    """
    lora_layers(model, "disabled", inside_disabled=True)
    modules = [module for module in model.modules() if isinstance(module, LoRALayer) or originals(module)]
    raise_all("disabled: nothing was changed", [*_unswappable(model), *resized_problems(model)])
    _enter(model, modules)
    try:
        yield
    finally:
        _leave(model, modules)


def _enter(model: nn.Module, modules: list[nn.Module]) -> None:
    # A counter, not a flag, and kept on the module: contexts of several generators may end in any order.
    first = [module for module in modules if not vars(module).get("lora_disabled", 0)]
    bases: dict[int, Tensor] = {}  # of a tensor that several modules share, one
    for module in first:
        swapped = [(trained, base) for trained, base in _originals(module) if id(trained) not in bases]
        bases |= {id(trained): base for trained, base in swapped}
        vars(module)["lora_swapped"] = swapped
    _swap(model, bases)
    for module in modules:
        vars(module)["lora_disabled"] = vars(module).get("lora_disabled", 0) + 1
    for module in first:
        if isinstance(module, LoRALayer):
            module.lora_refresh()


def _leave(model: nn.Module, modules: list[nn.Module]) -> None:
    for module in modules:
        vars(module)["lora_disabled"] -= 1
    last = [module for module in modules if not vars(module)["lora_disabled"]]
    _swap(model, {id(base): trained for module in last for trained, base in vars(module).pop("lora_swapped")})
    for module in last:
        del vars(module)["lora_disabled"]
        if isinstance(module, LoRALayer):
            module.lora_refresh()


def _originals(module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a tensor that trained outside the adapters and its value from before."""
    for name, value in originals(module).items():
        if not has_moved(module, name):
            continue
        trained: Tensor = getattr(module, name)
        base = value.to(trained.device, trained.dtype)
        yield trained, nn.Parameter(base, False) if name in module._parameters else base.clone()


def _unswappable(model: nn.Module) -> Iterator[str]:
    """What trains in full, and has its place in the model taken by FSDP2 before every forward."""
    for name, module in model.named_modules():
        wrong = [own for own in originals(module) if is_sharded(getattr(module, own)) and has_moved(module, own)]
        if wrong:
            yield f"{join(name, wrong[0])}: trains in full and is sharded; compute with a base model of its own."


def _swap(model: nn.Module, replacements: dict[int, Tensor]) -> None:
    """Put other tensors in the places of these, wherever in the model they stand; values are not written."""
    if not replacements:
        return
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items():
                if id(tensor) in replacements:
                    owned[name] = replacements[id(tensor)]  # type: ignore[assignment]
