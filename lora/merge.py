"""Fold adapters into their base weights, for good or in a state dict."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from lora.config import raise_all
from lora.inject import lora_layers
from lora.layer import LoRALayer
from lora.matching import Names, names_of
from lora.report import MergedModule, MergeReport
from lora.tensors import is_plain
from lora.training import forget_originals


def merge(model: nn.Module) -> MergeReport:
    """Write W = W₀ + s · B A into the base weights, in place, and leave plain torch layers.

    The sum is taken in float32 (float64 where the weight is) and rounded once, to the weight's dtype. In bfloat16
    rounding takes a good part of a small update; the report says how much of it.

    Returns:
        A report that prints as a table: module, dtype, and the share of the update that rounding lost.

    Raises:
        ValueError: there is no LoRA layer, a weight is tied to another module's (which the update would change too),
            a weight is not dense, or a merged weight would not be finite. One error lists everything, and the model
            is as it was.

    >>> import torch, lora
    >>> layer = lora.Linear(8, 4, r=2)
    >>> model = torch.nn.Sequential(layer)
    >>> _ = torch.nn.init.ones_(layer.lora_B)
    >>> before = model(torch.ones(8))
    >>> lora.merge(model).lost < 1e-5
    True
    >>> type(model[0]), bool((model(torch.ones(8)) - before).abs().max() < 1e-5)
    (<class 'torch.nn.modules.linear.Linear'>, True)
    """
    layers = [layer for layer in lora_layers(model, "merge") if layer.r > 0]
    names = names_of(model)
    owners = _owners(names)
    problems = _problems(layers, names)
    for layer in layers:
        tied = owners[_storage(layer.weight)] - {layer}
        if tied:
            others = ", ".join(names[other][0] for other in names if other in tied)
            problems.append(
                f"{names[layer][0]}: its weight is tied to that of {others}, which would change too; "
                "use `lora.merged_state_dict`, which unties them, or give one a copy of the weight."
            )
    raise_all("merge", problems)
    rows = [_merge(layer, names[layer][0]) for layer in layers]
    for layer in lora_layers(model, "merge"):
        layer.detach()
    for module in model.modules():
        forget_originals(module)
    return MergeReport(tuple(rows))


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model with all adapters merged; the model stays as it is.

    Keys and layouts are the pretrained model's. Weights that are tied in the model are entries of their own.

    Returns:
        What `model.state_dict()` would be after `lora.merge`; tensors that LoRA does not touch are not copied.

    Raises:
        ValueError: there is no LoRA layer, or one cannot be merged; one error lists all.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(lora.Linear(8, 4, r=2))
    >>> sorted(lora.merged_state_dict(model))
    ['0.bias', '0.weight']
    """
    layers = [layer for layer in lora_layers(model, "merged_state_dict") if layer.r > 0]
    names = names_of(model)
    problems = _problems(layers, names)
    for layer in layers:
        beyond = layer.beyond_weight()
        if beyond:
            problems.append(f"{names[layer][0]}: a state dict cannot say that {beyond}; use `lora.merge`.")
    raise_all("merged_state_dict", problems)
    state: dict[str, Tensor] = dict(model.state_dict())
    for layer in layers:
        merged = layer.compute_merged().to(layer.weight.dtype)
        for prefix in (f"{name}." if name else "" for name in names[layer]):
            state[f"{prefix}weight"] = merged
            for name, _ in layer.lora_parameters():
                del state[f"{prefix}{name}"]
    return state


@torch.no_grad()
def _merge(layer: LoRALayer, name: str) -> MergedModule:
    before = layer.base_weight().clone()
    exact = layer.compute_merged()
    layer.write_weight(exact)
    update = layer.scaling * layer.delta(layer.lora_A.to(exact.dtype), layer.lora_B.to(exact.dtype))
    error = (layer.weight.to(exact.dtype) - before.to(exact.dtype)).sub_(update).norm()
    size = update.norm()
    return MergedModule(name, str(layer.weight.dtype).removeprefix("torch."), float(error / size) if size else 0.0)


@torch.no_grad()
def _problems(layers: list[LoRALayer], names: Names) -> list[str]:
    problems = []
    for layer in layers:
        if not layer.dense or not is_plain(layer.weight, layer.lora_A, layer.lora_B):
            problems.append(
                f"{names[layer][0]}: a {type(layer.weight).__name__} in a {type(layer).__name__} is not dense."
            )
        elif not bool(layer.compute_merged().to(layer.weight.dtype).isfinite().all()):
            problems.append(f"{names[layer][0]}: the merged weight would not be finite in {layer.weight.dtype}.")
    return problems


def _owners(names: Names) -> dict[int, set[nn.Module]]:
    owners: dict[int, set[nn.Module]] = {}
    for module in names:
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(_storage(parameter), set()).add(module)
    return owners


def _storage(tensor: Tensor) -> int:
    """What tells whether writing one tensor writes another: two Parameters may share one storage."""
    return tensor.untyped_storage().data_ptr() if is_plain(tensor) and tensor.numel() else id(tensor)
