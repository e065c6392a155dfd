"""What trains beside the frozen base: the adapters, and whatever was asked to train in full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard

import torch
import torch.nn as nn
from torch import Tensor

from lora.errors import join, raise_all
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.layers.weights import is_writable
from lora.models.model import check_none_replaced

BIAS_CHOICES = ("none", "all", "lora_only")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none", *, freeze_A: bool = False) -> None:
    """Let the adapters train, and biases where asked, and freeze everything else.

    Goes by module: a parameter trains if it is a LoRA layer's `lora_A`, `lora_B` or `lora_magnitude`, whatever the
    modules around it are called. Modules that `lora.inject` was told to train in full (`modules_to_save`) train, too.

    Args:
        model: any module with LoRA layers in it.
        bias: which biases train too: "none", "all" (every module's) or "lora_only" (the LoRA layers').
            Default: "none".
        freeze_A: freeze lora_A as well, as it started: LoRA-FA (arXiv:2308.03303). Linear layers keep no input for
            backward then. Embeddings, whose A starts at zero and whose inputs are ids, train both factors. A is saved
            and loaded all the same; a model that gets its LoRA layers from a file trains both until this is called
            again. Default: False.

    Raises:
        ValueError: `bias` is none of the three; nothing has changed then.

    From loralib. What this makes trainable, and a frozen A, is what `lora.lora_state_dict` with the same `bias` holds.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(lora.Linear(8, 8, r=2), torch.nn.Linear(8, 2))
    >>> lora.mark_only_lora_as_trainable(model)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.lora_A', '0.lora_B']
    >>> lora.mark_only_lora_as_trainable(model, freeze_A=True)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.lora_B']
    """
    weights.reshard(model)
    trained = {id(parameter) for _, parameter in trained_parameters(model, bias)}
    if freeze_A:
        trained -= {id(layer.lora_A) for layer in model.modules() if _can_freeze_A(layer)}
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in trained  # works for lazy ones, too
    for module in model.modules():  # those without an adapter, too: gradients have to come through them
        weights.prepare_training(module, True)
    if any(isinstance(module, LoRALayer) and module.injected for module in model.modules()):
        remember_trained(model)


@weights.outside_inference_mode
def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The part of `model.state_dict()` that LoRA trains.

    Args:
        model: any module with LoRA layers in it.
        bias: which biases to include, as in `lora.mark_only_lora_as_trainable`. Default: "none".

    Returns:
        The adapters' tensors by their names in the model, the biases asked for, and the parameters and buffers of
        modules that train in full. Load it with ``model.load_state_dict(state, strict=False)``, or use
        `lora.save_adapter` and `lora.load_adapter`, which keep the scaling and check everything. (Adapters that started
        as a part of the base weight, PiSSA's say, belong to what is left of it: a plain base can load only what
        `lora.save_adapter` writes.) Of a sharded model they are DTensors, for torch.distributed.checkpoint; what that
        loads into them goes to the model by `load_state_dict`: fused layers that are divided among ranks give copies.

    Raises:
        ValueError: `bias` is none of the three, or DeepSpeed's ZeRO-3 keeps a tensor in parts; all are listed.

    From loralib.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(lora.Linear(8, 8, r=2), torch.nn.Linear(8, 2))
    >>> list(lora.lora_state_dict(model, bias="lora_only"))
    ['0.bias', '0.lora_A', '0.lora_B']
    """
    weights.reshard(model)
    check_none_replaced(model, "lora_state_dict")
    trained = {id(parameter) for _, parameter in trained_parameters(model, bias)}
    for module in model.modules():
        if trains_in_full(module):
            trained.update(id(buffer) for buffer in module._buffers.values())
    # By object, not by name: wrappers rename keys, and tied parameters have several.
    state = model.state_dict(keep_vars=True)
    state = {name: tensor for name, tensor in state.items() if id(tensor) in trained}
    raise_all("lora_state_dict is not whole", weights.split_up_problems(state.items()))
    owners = {id(p): (module, own) for module in model.modules() for own, p in module._parameters.items()}
    values = {name: tensor.detach() for name, tensor in state.items()}
    for name, tensor in state.items():
        if id(tensor) in owners:  # not a buffer
            values[name] = weights.of(*owners[id(tensor)], values[name]).in_model_order()
    return values


def trained_parameters(model: nn.Module, bias: str = "none") -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that LoRA trains, by full name; a shared one under each of its names."""
    if bias not in BIAS_CHOICES:
        raise ValueError(f"`bias` must be one of {', '.join(map(repr, BIAS_CHOICES))}, got {bias!r}.")
    for prefix, module in model.named_modules(remove_duplicate=False):
        adapter = dict(module.lora_parameters()) if isinstance(module, LoRALayer) else {}
        with_bias = bias == "all" or (bias == "lora_only" and bool(adapter))
        for name, parameter in module._parameters.items():
            trained = name in adapter or trains_in_full(module) or (with_bias and is_bias(name))
            if parameter is not None and trained:
                yield join(prefix, name), parameter


def _can_freeze_A(module: nn.Module) -> TypeGuard[LoRALayer]:
    """Whether the layer learns with its A as it started: not where that is zero."""
    return isinstance(module, LoRALayer) and module.r > 0 and module.starts_at_zero == "lora_B"


def is_bias(name: str) -> bool:
    """Whether a parameter's own name is a bias's, as torch's modules name theirs (`bias_ih_l0`, `in_proj_bias`)."""
    return name == "bias" or name.startswith("bias_") or name.endswith("_bias")


# ---- parameters outside the adapters: what they were before training --------------------------------------------
#
# `modules_to_save`, trained biases and running statistics change the base model itself. Their values from before are
# kept on the module that owns them, so that `disabled` and `eject` can give the base model back.


def train_in_full(module: nn.Module) -> None:
    """Let every parameter in `module` train, and remember what it was."""
    for part in module.modules():
        part.__dict__["lora_in_full"] = True
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                remember(part, name)


def trains_in_full(module: nn.Module) -> bool:
    """Whether `train_in_full` was asked for this module."""
    return "lora_in_full" in module.__dict__


@torch.inference_mode(False)
def remember(module: nn.Module, name: str) -> None:
    """Keep a copy of one of the module's own parameters or buffers, unless there is one already."""
    known = module.__dict__.setdefault("lora_originals", {})
    if name not in known:
        known[name] = getattr(module, name).detach().clone()


def originals(module: nn.Module) -> dict[str, Tensor]:
    """What the module's own trained parameters and buffers were before, by name."""
    kept: dict[str, Tensor] = module.__dict__.get("lora_originals", {})
    return kept


def forget_originals(module: nn.Module) -> None:
    """Treat the module's parameters, as they are now, as the base's."""
    for attribute in ("lora_in_full", "lora_originals", "lora_kept"):
        module.__dict__.pop(attribute, None)


def keep(module: nn.Module, name: str) -> None:
    """Have an adapter hold one of the module's own tensors as it is, though it does not train; remember what it was."""
    remember(module, name)
    module.__dict__.setdefault("lora_kept", set()).add(name)


def is_kept(module: nn.Module, name: str) -> bool:
    """Whether an adapter is to hold this tensor of a module, and yet it is nothing that trains."""
    return not trains_in_full(module) and (name in module._buffers or name in module.__dict__.get("lora_kept", ()))


def has_moved(module: nn.Module, name: str) -> bool:
    """Whether one of the module's own tensors is not what it was; only buffers are looked at, which move by themselves.

    Parameters that train count as moved.
    """
    now: Tensor = getattr(module, name)
    if name not in module._buffers or trains_in_full(module):
        return True
    before = originals(module)[name]
    if now.is_meta:
        return False
    if before.shape != now.shape or before.layout != now.layout:
        return True
    before = before.to(now.device, now.dtype)
    return not bool(((before == now) | (before.isnan() & now.isnan())).all())


def resized_problems(model: nn.Module) -> Iterator[str]:
    """A complaint for each tensor whose value from before training would not fit into its place any more.

    A buffer may have grown: it is exchanged whole.
    """
    for prefix, module in model.named_modules():
        for name, before in originals(module).items():
            now = {**module._parameters, **module._buffers}.get(name)
            if now is None:
                yield f"{join(prefix, name)}: is not there any more; give it a value again first."
            elif name in module._parameters and now.shape != before.shape:
                yield (
                    f"{join(prefix, name)}: has the shape {tuple(now.shape)}, and had {tuple(before.shape)} when LoRA "
                    "was put in; resize it back first."
                )


def _may_move(buffer: Tensor) -> bool:
    """Whether training may write to a buffer; those that no copy can be written back to are left alone.

    Integers of several elements are codes and positions, which do not move, and may be a model's whole weight (GPTQ's);
    one alone counts batches.
    """
    if type(buffer) is not Tensor or buffer.is_meta or buffer.layout is not torch.strided or not is_writable(buffer):
        return False
    return buffer.is_floating_point() or buffer.numel() == 1


def remember_trained(model: nn.Module) -> None:
    """Keep a copy of what trains outside the adapters; a tensor with several owners once. And of buffers."""
    seen: set[int] = set()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and _may_move(buffer):
                remember(module, name)
        adapter = dict(module.lora_parameters()) if isinstance(module, LoRALayer) else {}
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and name not in adapter and id(parameter) not in seen:
                seen.add(id(parameter))
                remember(module, name)
