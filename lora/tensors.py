"""What kind of tensor this is: whether code that looks past autograd may touch it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary dense floating-point tensors with values, and nothing traces operations on them.

    Not plain are sharded, quantised, nested, sparse and meta tensors and subclasses; and any tensor under
    `torch.compile`, a function transform or forward-mode differentiation.
    """
    return not _is_tracing() and all(_is_dense(tensor) for tensor in tensors if tensor is not None)


def _is_dense(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_floating_point()
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_meta)
    )


def _is_tracing() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors where writing one writes the other: two Parameters may share one storage."""
    return tensor.untyped_storage().data_ptr() if _is_dense(tensor) and tensor.numel() else id(tensor)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which operations compute in the dtype of what they are given."""
    # Entering torch's own costs as much as a small product: only where it changes something.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
