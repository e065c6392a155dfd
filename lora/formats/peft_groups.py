"""Convolutions with groups in PEFT's format, whose A has all channels for its inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def over_all_channels(A: Tensor, groups: int) -> Tensor:
    """A of a convolution with groups as PEFT has it: with kernels, zero ones, for the channels of other groups, too."""
    if groups == 1:
        return A
    r, size, *kernel = A.shape
    wide = A.new_zeros(groups, r // groups, groups, size, *kernel)
    for group, rows in enumerate(A.view(groups, r // groups, size, *kernel)):
        wide[group, :, group] = rows
    return wide.view(r, groups * size, *kernel)


def within_groups(A: Tensor, groups: int) -> Tensor:
    """The inverse of `over_all_channels`; ValueError where a group reads the channels of another."""
    r, size, *kernel = A.shape
    if groups == 1:
        return A
    if size % groups:
        raise ValueError(f"`groups` (={groups}) must divide the {size} input channels of lora_A.")
    own = torch.stack([A.view(groups, r // groups, groups, -1)[group, :, group] for group in range(groups)])
    narrow = own.reshape(r, size // groups, *kernel)
    if torch.count_nonzero(narrow) != torch.count_nonzero(A):
        raise ValueError(f"its update mixes the {groups} groups of the convolution, which no weight of the layer can.")
    return narrow
