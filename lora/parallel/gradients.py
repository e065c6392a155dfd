"""Gradients of models of which some layers are divided among ranks: parts of sums, and norms over all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


@torch.no_grad()
def sum_gradients(model: nn.Module) -> None:
    """Add up the gradients of which each rank has a part, in one reduction for each mesh.

    Without it torch adds up one after the other where they are used: in `clip_grad_norm_`, and again in the optimizer.

    Args:
        model: a model with tensor-parallel layers, after the last backward of a step; all ranks call.

    >>> import torch, lora, lora.parallel
    >>> lora.parallel.sum_gradients(torch.nn.Sequential(lora.Linear(4, 2, r=1)))  # nothing is divided: nothing to add
    """
    meshes: dict[tuple[DeviceMesh, int, torch.dtype], list[Any]] = {}
    for parameter in model.parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            for dim, placement in enumerate(gradient.placements):
                if placement.is_partial():
                    meshes.setdefault((gradient.device_mesh, dim, gradient.dtype), []).append(parameter)
    for (mesh, dim, _), parameters in meshes.items():
        parts = [parameter.grad.to_local() for parameter in parameters]
        summed = torch.cat([part.reshape(-1) for part in parts])
        torch.distributed.all_reduce(summed, group=mesh.get_group(dim))
        for parameter, part, piece in zip(
            parameters, parts, torch.split(summed, [part.numel() for part in parts]), strict=True
        ):
            placements = [Replicate() if n == dim else p for n, p in enumerate(parameter.grad.placements)]
            sizes = {"shape": parameter.shape, "stride": parameter.stride()}
            parameter.grad = DTensor.from_local(piece.view_as(part), mesh, placements, run_check=False, **sizes)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to a norm of at most `max_norm`, taken over all of the model.

    torch's own takes no model in which some gradients are divided among ranks and others are not. Adds up first what
    ranks have parts of (`sum_gradients`).

    Args:
        model: a model with tensor-parallel layers, and others; all ranks call.
        max_norm: the largest norm.

    Returns:
        The norm before, a tensor without dimensions, the same on all ranks.

    >>> import torch, lora, lora.parallel
    >>> model = torch.nn.Sequential(lora.Linear(4, 2, r=1))
    >>> model[0].lora_B.grad = torch.full((2, 1), 3.0)
    >>> lora.parallel.clip_grad_norm_(model, 1.0), model[0].lora_B.grad.norm().round(decimals=4)
    (tensor(4.2426), tensor(1.))
    """
    sum_gradients(model)
    by_mesh: dict[DeviceMesh | None, list[Any]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter.grad)
    norms = [nn.utils.get_total_norm(gradients) for gradients in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.tensor(0.0)
    shrink = (max_norm / (total + 1e-6)).clamp(max=1)
    for gradients in by_mesh.values():
        for gradient in gradients:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(shrink)
    return total
