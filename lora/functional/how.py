"""Whether and how a fused function computes: what the functions of all kinds of layer decide alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora.functional.noise import Noise
from lora.functional.tensors import is_plain, refuse_storage


class How(NamedTuple):
    """What a fused function is told beside tensors, whatever its kind."""

    scaling: float
    noise: Noise | None
    dtype: torch.dtype

    @property
    def c(self) -> float:
        """The scaling, times the rescaling of dropout."""
        return self.scaling if self.noise is None else self.scaling * self.noise.rescale


def choose(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, dropout: float
) -> How | None:
    """How to compute in one fused function; None where only autograd's own operations will do."""
    if weight.requires_grad or not is_plain(x, weight, bias, A, B):
        return None
    autocast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
    if weight.dtype != x.dtype and not autocast:
        refuse_storage(weight.dtype)
        return None  # the plain operations raise what torch's own layer raises
    noise = Noise.draw(dropout, x) if dropout else None
    if dropout and noise is None:
        return None
    return How(scaling, noise, torch.get_autocast_dtype(x.device.type) if autocast else x.dtype)
