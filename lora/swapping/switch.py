"""A layer's scaling, and whether it is enabled, as a tensor: what a compiler reads in the place of numbers.

    y = W₀ x + b + where(on, s · B A drop(x), 0)        with DoRA also g − 1 = where(on, g − 1, 0)

To `torch.compile` a number is a constant, and what it makes holds for one scaling, and for layers that are enabled. A
tensor is an input. Only layers that are prepared for swaps (`lora.prepare_for_swap`) have it: `lora_scale`, (s, 1), and
beside it `lora_scale_off`, (0, 0). While the layer is disabled the two stand in each other's place: both stay where
they are in memory, as CUDA graphs need it, and a backward that waits for the one does not see the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lora.layers.layer import LoRALayer

NO_ROOM = "`r` is {} in the file, and the model is prepared for at most {}."

NAMES = _SCALE, _OFF = "lora_scale", "lora_scale_off"


def is_read(layer: LoRALayer) -> bool:
    """Whether a compiler is tracing a layer that is prepared, and in no state that only the plain forward knows."""
    return (
        layer.has_room
        and torch.compiler.is_compiling()
        and layer.lora_start is None
        and layer.awaits is None
        and layer.lora_parallel is None
    )


def scaling(layer: LoRALayer) -> float | Tensor:
    """s; while a prepared layer is traced a tensor, 0 where it is disabled."""
    return layer.lora_scale[0] if is_read(layer) else layer.scaling


def gated(layer: LoRALayer, values: Tensor) -> Tensor:
    """What LoRA adds; while a prepared layer is traced zeros where it is disabled, whatever the adapter holds."""
    return torch.where(layer.lora_scale[1] != 0, values, 0) if is_read(layer) else values


def add(layer: LoRALayer) -> None:
    """Give a layer that is enabled the two tensors, outside its state dict."""
    for name in (_SCALE, _OFF):
        if name not in layer._buffers:
            layer.register_buffer(name, None, persistent=False)
    layer.has_room = True  # a flag: a compiler guards the values of tuples that are compared with None
    refresh(layer)


def remove(layer: LoRALayer) -> None:
    """Take them away."""
    for name in (_SCALE, _OFF):
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)


@torch.inference_mode(False)
@torch.no_grad()
def refresh(layer: LoRALayer) -> None:
    """Bring the tensors of a prepared layer up to date with it: in place, where device and dtype are still right."""
    if not layer.has_room:
        return
    device, dtype = _wanted(layer)
    values = {_SCALE: (layer.scaling, 1.0), _OFF: (0.0, 0.0)}
    names = (_OFF, _SCALE) if layer.lora_disabled else (_SCALE, _OFF)
    for name, (s, on) in zip(names, values.values(), strict=True):
        tensor = layer._buffers[name]
        if tensor is None or (tensor.device, tensor.dtype) != (device, dtype) or tensor.is_inference():
            tensor = layer._buffers[name] = torch.empty(2, dtype=dtype, device=device)
        tensor[0].fill_(s)
        tensor[1].fill_(on)


def fits(layer: LoRALayer) -> bool:
    """Whether the tensors of a layer, if it has them, are where its parameters are."""
    scale = layer._buffers.get(_SCALE)
    return scale is None or (scale.device, scale.dtype) == _wanted(layer)


def _wanted(layer: LoRALayer) -> tuple[torch.device, torch.dtype]:
    # Whatever `.to()` makes of the parameters: a scaling has many digits.
    return layer.lora_A.device, torch.promote_types(layer.lora_A.dtype, torch.float32)


def turn(layer: LoRALayer) -> None:
    """Exchange the tensors of a prepared layer: to be called when the layer is disabled, and when it is enabled."""
    if layer.has_room:
        buffers = layer._buffers
        buffers[_SCALE], buffers[_OFF] = buffers[_OFF], buffers[_SCALE]
