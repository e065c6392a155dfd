"""What kind of tensor this is: whether code that looks past autograd may touch it."""

from __future__ import annotations

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
