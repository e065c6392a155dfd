"""LoRA as functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def is_traced(x: Tensor) -> bool:
    """Whether an operation on `x` is being recorded by something that state kept in Python would escape."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or type(x) is not Tensor
    )
