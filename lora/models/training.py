"""What trains beside the frozen base: the adapters, and what was asked to train in full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lora.errors import Problems, is_number, join
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.layers.parts import parts_of, with_parts
from lora.layers.undo import undo_on_error
from lora.layers.weights import is_writable
from lora.models.exchange import trained_in
from lora.models.model import (
    by_tensor,
    check_none_replaced,
    check_not_disabled,
    is_persistent,
    lora_layers,
    names_of,
    owned_tensors,
)

BIAS_CHOICES = ("none", "all", "lora_only")


# ---- what trains ---------------------------------------------------------------------------------------------------


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none", *, freeze_A: bool = False) -> None:
    """Let the adapters train, and biases where asked, and freeze everything else.

    A parameter trains if it is a LoRA layer's `lora_A`, `lora_B` or `lora_magnitude`; names of modules do not count.
    Modules that `lora.inject` was told to train in full (`modules_to_save`) train, too.

    Args:
        model: any module with LoRA layers in it.
        bias: which biases train too: "none", "all" (every module's) or "lora_only" (the LoRA layers').
            Default: "none".
        freeze_A: freeze lora_A as well, as it started: LoRA-FA (arXiv:2308.03303). Linear layers then keep no input for
            backward. Embeddings, whose A starts at zero and whose inputs are ids, train both factors. A is still saved
            and loaded; a model that gets its LoRA layers from a file trains both until this is called again.
            Default: False.

    Raises:
        ValueError: `bias` is none of the three, or `lora.disabled` has tensors exchanged; nothing has changed then.

    From loralib. `lora.lora_state_dict` with the same `bias` holds what this makes trainable, and a frozen A.

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
    check_not_disabled(model, "mark_only_lora_as_trainable", reads=True)
    _trained(model, bias)  # raises, where there is no such `bias`
    with undo_on_error(model.modules()) as undo, undo:
        let_train(model, bias, freeze_A)


def let_train(model: nn.Module, bias: str = "none", freeze_A: bool = False) -> None:
    """Let the adapters and biases train, and freeze everything else; who calls this undoes it on an error."""
    trained = _trained(model, bias)
    if freeze_A:  # a layer learns with its A as it started if that is not zero
        layers = (layer for layer in with_parts(model.modules()) if isinstance(layer, LoRALayer) and layer.r > 0)
        each = (one for layer in layers for one in layer.lora_seats.values() or (layer,))
        trained -= {id(one.lora_A) for one in each if one.lora_starts_at_zero == "lora_B"}
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in trained  # works for lazy ones, too
    for module in model.modules():  # those without an adapter, too: gradients have to come through them
        weights.prepare_training(module, True)
    if any(isinstance(module, LoRALayer) and module.lora_injected for module in with_parts(model.modules())):
        _remember_trained(model)


@weights.outside_inference_mode
def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The part of `model.state_dict()` that LoRA trains.

    Args:
        model: any module with LoRA layers in it.
        bias: which biases to include, as in `lora.mark_only_lora_as_trainable`. Default: "none".

    Returns:
        The adapters' tensors by their names in the model, the biases asked for, and the parameters and buffers of
        modules that train in full. Load it with ``model.load_state_dict(state, strict=False)``, or use
        `lora.save_adapter` and `lora.load_adapter`, which keep the scaling and check everything. Adapters that started
        as a part of the base weight (PiSSA's, for example) fit only what is left of that weight; for a plain base, use
        `lora.save_adapter`. The tensors of a sharded model are DTensors, for torch.distributed.checkpoint. For
        tensor-parallel fused layers they are copies: after loading into them, call `model.load_state_dict`.

    Raises:
        ValueError: `bias` is none of the three, or DeepSpeed's ZeRO-3 keeps tensors in parts; all are listed.

    From loralib.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(lora.Linear(8, 8, r=2), torch.nn.Linear(8, 2))
    >>> list(lora.lora_state_dict(model, bias="lora_only"))
    ['0.bias', '0.lora_A', '0.lora_B']
    """
    weights.reshard(model)
    check_none_replaced(model, "lora_state_dict")
    trained = _trained(model, bias)
    for module in model.modules():
        if trains_in_full(module):
            buffers = ((own, buffer) for own, buffer in module._buffers.items() if buffer is not None)
            trained.update(id(trained_in(module, own, buffer)) for own, buffer in buffers)
    # By object, not by name: wrappers rename keys, and tied parameters have several.
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in trained}
    with Problems("lora_state_dict: a tensor is in parts") as problems:
        problems.add(*weights.split_up_problems(state.items()))
    owners = {id(trained_in(one.module, one.own, one.tensor)): one for one in owned_tensors(names_of(model))}
    values = {}
    for name, tensor in state.items():
        one = owners[id(tensor)]
        values[name] = weights.of(one.module, one.own, tensor.detach()).in_model_order()
    return values


def _trained(model: nn.Module, bias: str) -> set[int]:
    """The parameters that LoRA trains, by `id`."""
    if bias not in BIAS_CHOICES:
        raise ValueError(f"`bias` must be one of {', '.join(map(repr, BIAS_CHOICES))}, got {bias!r}.")
    trained = set()
    for module in with_parts(model.modules()):
        adapter = dict(module.lora_parameters()) if isinstance(module, LoRALayer) else {}
        with_bias = bias == "all" or (bias == "lora_only" and bool(adapter or parts_of(module)))
        for name, parameter in module._parameters.items():
            wanted = name in adapter or trains_in_full(module) or (with_bias and is_bias(name))
            if wanted and parameter is not None:
                trained.add(id(trained_in(module, name, parameter)))
    return trained


def is_bias(name: str) -> bool:
    """Whether a parameter's own name is a bias's, as torch's modules name theirs (`bias_ih_l0`, `in_proj_bias`)."""
    return name == "bias" or name.startswith("bias_") or name.endswith("_bias")


# ---- groups for an optimizer ---------------------------------------------------------------------------------------

# The names of the groups, each with whether its parameters decay.
_DECAYS = {
    "lora_A": True,
    "lora_B": True,
    "embedding_A": True,
    "embedding_B": True,
    "lora_magnitude": False,
    "biases": False,
    "weights": True,
    "norms": False,
}
_START_AT_ZERO = ("lora_B", "embedding_A")
# Norms whose weights need not be vectors.
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def param_groups(
    model: nn.Module,
    lr: float,
    lr_ratio: float = 16.0,
    weight_decay: float = 0.0,
    *,
    lr_embedding: float | None = None,
) -> list[dict[str, Any]]:
    """What trains in a model, in groups for a torch optimizer: LoRA+.

        lr of lora_B = lr_ratio · lr of lora_A

    B starts at zero and sums r features; A sums all features of the layer. At one learning rate for both, the wider the
    layer, the slower B learns. Take a somewhat smaller `lr` than for plain LoRA.

    Args:
        model: a model with LoRA layers.
        lr: learning rate of A, and of everything that is not named here.
        lr_ratio: by how much the rate of the factor that starts at zero (B; in embeddings, A) is higher. Default: 16.
        weight_decay: of A, B and weights that train in full. Magnitudes (DoRA), biases, norms and other vectors do not
            decay. Default: 0.
        lr_embedding: learning rate of both factors in embeddings. Default: None, as in other layers.

    Returns:
        Dicts with "params", "lr", "weight_decay" and "name": "lora_A", "lora_B", "embedding_A", "embedding_B",
        "lora_magnitude", "biases", "weights" or "norms" (the last three from `bias` and `modules_to_save`). Each
        parameter with `requires_grad`, tied or not, is in exactly one group; empty groups are left out. Torch's
        learning-rate schedulers scale each group's own rate.

    Raises:
        ValueError: a number is out of range, nothing trains, or there is no LoRA layer. One error lists everything.

    From "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354. PEFT's `create_loraplus_optimizer`
    gives embeddings 1e-6 (its `loraplus_lr_embedding`), and raises the rate of magnitudes, biases and norms as well.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> _ = lora.inject(model, target_modules=["0"], modules_to_save=["1"], r=2)
    >>> groups = lora.param_groups(model, lr=1e-4, lr_ratio=10, weight_decay=0.01)
    >>> for group in groups:
    ...     print(group["name"], group["lr"], group["weight_decay"], len(group["params"]))
    lora_A 0.0001 0.01 1
    lora_B 0.001 0.01 1
    biases 0.0001 0.0 1
    weights 0.0001 0.01 1
    >>> optimizer = torch.optim.AdamW(groups)
    """
    lora_layers(model, "param_groups", reads=True)
    members: dict[str, list[nn.Parameter]] = {role: [] for role in _DECAYS}
    for owners in by_tensor(owned_tensors(names_of(model))):  # a tied one counts as what it is first
        parameter = owners[0].tensor
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
            members[_role(owners[0].module, owners[0].own, parameter)].append(parameter)
    with Problems("param_groups: no groups were made") as problems:
        numbers = {"lr": lr, "lr_ratio": lr_ratio, **({} if lr_embedding is None else {"lr_embedding": lr_embedding})}
        for name, value in numbers.items():
            if not is_number(value) or value <= 0:
                problems.add(f"`{name}` must be a finite number above 0, got {value!r}.")
        if not is_number(weight_decay) or weight_decay < 0:
            problems.add(f"`weight_decay` must be a finite number of at least 0, got {weight_decay!r}.")
        if not any(members.values()):
            problems.add(f"nothing in this {type(model).__name__} trains; see `lora.mark_only_lora_as_trainable`.")

    def rate(role: str) -> float:
        if lr_embedding is not None and role.startswith("embedding"):
            return lr_embedding
        return lr * lr_ratio if role in _START_AT_ZERO else lr

    return [
        {
            "params": parameters,
            "lr": float(rate(role)),
            "weight_decay": float(weight_decay) if _DECAYS[role] else 0.0,
            "name": role,
        }
        for role, parameters in members.items()
        if parameters
    ]


def _role(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if isinstance(module, LoRALayer) and name in ("lora_A", "lora_B", "lora_magnitude"):
        embeds = module.lora_starts_at_zero == "lora_A" and name != "lora_magnitude"
        return name.replace("lora", "embedding") if embeds else name
    if is_bias(name):
        return "biases"
    return "norms" if parameter.dim() < 2 or isinstance(module, _NORMS) else "weights"


# ---- parameters outside the adapters: what they were before training --------------------------------------------
#
# `modules_to_save`, trained biases and running statistics change the base model itself. The module that owns them keeps
# their values from before, so that `disabled` and `eject` can give the base model back.


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
    """Let an adapter hold one of the module's own tensors, though it does not train; remember what it was."""
    remember(module, name)
    module.__dict__.setdefault("lora_kept", set()).add(name)


def is_kept(module: nn.Module, name: str) -> bool:
    """Whether an adapter is to hold this tensor of a module, though it does not train."""
    return not trains_in_full(module) and (name in module._buffers or name in module.__dict__.get("lora_kept", ()))


def has_moved(module: nn.Module, name: str) -> bool:
    """Whether one of the module's own tensors is not what it was. Parameters that train always count as moved."""
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
    """A complaint for each tensor that its value from before training no longer fits.

    A buffer may have grown: it is exchanged whole.
    """
    for prefix, module in model.named_modules():
        for name, before in originals(module).items():
            now = {**module._parameters, **module._buffers}.get(name)
            if now is None:
                yield f"{join(prefix, name)}: no longer exists; give it a value again first."
            elif name in module._parameters and now.shape != before.shape:
                yield (
                    f"{join(prefix, name)}: has the shape {tuple(now.shape)}, and had {tuple(before.shape)} when LoRA "
                    "was put in; resize it back first."
                )


def may_move(buffer: Tensor) -> bool:
    """Whether training may write to a buffer, and its value from before could be written back.

    Several integers are codes or positions, which do not move, and may be a model's whole weight (GPTQ's). A single one
    counts batches.
    """
    if type(buffer) is not Tensor or buffer.is_meta or buffer.layout is not torch.strided or not is_writable(buffer):
        return False
    return buffer.is_floating_point() or buffer.numel() == 1


def _remember_trained(model: nn.Module) -> None:
    """Keep a copy of buffers, and of what trains outside the adapters; one copy if a parameter has several owners."""
    seen: set[int] = set()
    for one in owned_tensors(names_of(model)):
        _, module, own, tensor = one
        if own in module._buffers:
            if is_persistent(one) and may_move(tensor):
                remember(module, own)
        elif tensor.requires_grad and not one.is_of_adapter and id(tensor) not in seen:
            seen.add(id(tensor))
            remember(module, own)
