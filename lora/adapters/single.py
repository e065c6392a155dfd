"""Adapters in the form that every library reads: one A and one B for each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora.adapters.adapter import Adapter, ModuleAdapter
from lora.errors import AdapterError, join, raise_all
from lora.functional.fused import exact_dtype
from lora.layers.conv import ConvLoRA
from lora.layers.layer import LoRALayer
from lora.layers.linear import MergedLinearLoRA

NO_ROOM = "`r` is {} in the file, and the model is prepared for at most {}."
Form = tuple[ModuleAdapter, Tensor, Tensor]
_MOST_VALUES = 2**31  # of a form that is larger than the one that it is made of: an adapter has some millions


def as_single(settings: ModuleAdapter, A: Tensor, B: Tensor) -> Form:
    """Settings, A and B of the same update as one linear layer's, embedding's or factored convolution's.

        merged linear, G splits      A as it is, (G·r, in);  B block-diagonal, (out, G·r), zero where nothing is enabled
        loralib's convolutions       A and B in blocks, rank r·k² in two dimensions, times groups²

    The scaling stays; lora_alpha grows with the rank, so that lora_alpha / r (rsLoRA: lora_alpha / √r) is the scaling.

    Raises:
        ValueError: the kind of layer is a user's own, or shapes do not fit the settings.
    """
    layer = settings.layer(A, B)
    if isinstance(layer, MergedLinearLoRA):
        B = _block_diagonal(B, layer)
    elif isinstance(layer, ConvLoRA) and not layer.factored:
        A, B = _factored(A, B, layer)
    single = replace(settings, splits=None, enable_lora=None, factored=isinstance(layer, ConvLoRA) or None)
    return single.at_rank(A.shape[0]), A, B


def singles(adapter: Adapter, what: str) -> dict[str, Form]:
    """Every module of the adapter as a single pair; AdapterError that lists all that cannot be."""
    forms: dict[str, Form] = {}
    problems = []
    for name, settings in adapter.modules.items():
        try:
            forms[name] = as_single(settings, *adapter.pair(name))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    raise_all(what, problems, AdapterError)
    return forms


def portable(adapter: Adapter) -> Adapter:
    """The same adapter with one rank for all modules, and a scaling of 1 that every reader agrees on.

    Each scaling is folded into B, and A and B are padded with zeros to the largest rank: r = lora_alpha = that rank.
    B is float32 at least, so that folding rounds no further than float32 does. The base weight that PEFT saves beside
    every adapted embedding is left out.

    Raises:
        AdapterError: something trains in full, or is a part of the base model that its files lack (rows that were
            added, buffers that moved), for which the form has no place; or a kind of layer is a user's own.
    """
    what = "the adapter has no portable form"
    dora = [name for name, settings in adapter.modules.items() if settings.use_dora]
    problems = [f"{name} has a magnitude (DoRA), which no scaling can say: merge it." for name in dora]
    # PEFT's own files hold the weight of every adapted embedding; those with samples of the rest, only of resized ones.
    beside = set() if adapter.rest else {join(name, "weight") for name in adapter.modules} & {*adapter.kept}
    full = [name for name in adapter.trained_in_full if name not in beside]
    base_part = "is a part of the base model, and has no place there"
    problems += [f"{name} {base_part if name in adapter.kept else 'trains in full'}." for name in full]
    raise_all(what, problems, AdapterError)
    forms = singles(adapter, what)
    groups = math.lcm(*(settings.base.groups for settings, _, _ in forms.values()))
    rank = -(-max(settings.r for settings, _, _ in forms.values()) // groups) * groups
    values = sum(rank * (A.numel() + B.numel()) // A.shape[0] for _, A, B in forms.values())
    raise_all(what, [f"it would have {values} values, at rank {rank}."] if values > _MOST_VALUES else [], AdapterError)
    modules: dict[str, ModuleAdapter] = {}
    tensors: dict[str, Tensor] = {}
    for name, (settings, A, B) in forms.items():
        A, B = _padded(A, B, rank, settings.base.groups)
        B = B.to(exact_dtype(B.dtype)) * float(settings.scaling)
        modules[name] = settings.with_scaling_one(rank)
        tensors |= {join(name, "lora_A"): A.to(B.dtype), join(name, "lora_B"): B}
    made = replace(adapter, modules=modules, tensors=tensors, trained_in_full=[], kept=[])
    raise_all(what, made.problems(), AdapterError)  # a scaling may have made an infinity
    return made


def as_in(layer: LoRALayer, settings: ModuleAdapter, A: Tensor, B: Tensor) -> Form:
    """A single pair in the form of a layer that exists, where that is exact; ValueError where it is not.

    Ranks that add nothing are left out. A merged linear layer gets A for every split, and its own rows of B; a pair
    that was made of such a layer becomes what it was.
    """
    if isinstance(layer, MergedLinearLoRA):
        A, B = _by_split(layer, *_trimmed(A, B, _ranks(layer, len(layer.lora_slices()))))
        settings = replace(settings.at_rank(B.shape[1]), splits=layer.splits, enable_lora=layer.enable_lora)
        return settings, A, B
    if isinstance(layer, ConvLoRA) and not layer.factored:
        raise ValueError("`factored` is True in the file and False in the model.")
    A, B = _trimmed(A, B, _ranks(layer), settings.base.groups)
    return settings.at_rank(A.shape[0]), A, B


def _ranks(layer: LoRALayer, splits: int = 1) -> Sequence[int]:
    """The ranks that a single pair may have, one A for all splits or each its own; any up to it, if there is room."""
    return range(layer.r * splits, 0, -1) if _has_room(layer) else (layer.r, layer.r * splits)


def _has_room(layer: LoRALayer) -> bool:
    return isinstance(layer.lora_ranks(), range)


def _block_diagonal(B: Tensor, layer: MergedLinearLoRA) -> Tensor:
    slices = layer.lora_slices()
    wide = B.new_zeros(sum(layer.splits), len(slices) * layer.r)  # (out_features, G·r)
    for g, ((start, stop), B_g) in enumerate(zip(slices, _split_rows(B, slices), strict=True)):
        wide[start:stop, g * layer.r : (g + 1) * layer.r] = B_g
    return wide


def _split_rows(B: Tensor, slices: Iterable[tuple[int, int]]) -> tuple[Tensor, ...]:
    return torch.split(B, [stop - start for start, stop in slices])


def _factored(A: Tensor, B: Tensor, layer: ConvLoRA) -> tuple[Tensor, Tensor]:
    """loralib's A (r m, in k^⌈n/2⌉) and B (out / groups m, r m), with m = k^⌊n/2⌋, as convolutions.

    In B A the m rows of an output channel stand side by side in the kernel; with groups, `groups` output channels stand
    side by side in what would be one.
    """
    groups, kernel = layer.groups, layer.kernel_size
    m = kernel[0] ** (len(kernel) // 2)
    values = groups**2 * m**2 * A.numel()
    if values > _MOST_VALUES:
        raise ValueError(f"as a factored convolution it would have {values} values.")
    blocks: Tensor = torch.block_diag(*[A] * m)  # type: ignore[no-untyped-call]  # (m·r m, in·k^n)
    q = blocks.shape[0]
    parts = blocks.view(q, groups, -1).transpose(0, 1).reshape(groups * q, -1)  # (groups·q, in / groups·k^n)
    up = B.reshape(-1, 1, 1, q) * torch.eye(groups, dtype=B.dtype).view(1, groups, groups, 1)
    up = up.reshape(-1, groups * q)  # (out, groups·q): channel o'·groups + γ reads the γ-th part
    A = parts.repeat(groups, 1).view(-1, layer.in_channels // groups, *kernel)
    return A, up.view(*up.shape, *[1] * len(kernel))


def _padded(A: Tensor, B: Tensor, rank: int, groups: int) -> tuple[Tensor, Tensor]:
    """A and B with zeros up to a rank; the rows of A belong to groups of B's rows."""
    rows = A.reshape(groups, A.shape[0] // groups, *A.shape[1:])
    wide_A = A.new_zeros(groups, rank // groups, *A.shape[1:])
    wide_A[:, : rows.shape[1]] = rows
    wide_B = B.new_zeros(B.shape[0], rank // groups, *B.shape[2:])
    wide_B[:, : B.shape[1]] = B
    return wide_A.flatten(0, 1), wide_B


def _trimmed(A: Tensor, B: Tensor, ranks: Sequence[int], groups: int = 1) -> tuple[Tensor, Tensor]:
    """A and B at the first of `ranks` that holds all which add something; as they are, if they have one of them."""
    rank = A.shape[0] // groups
    if A.shape[0] in ranks:
        return A, B
    rows = A.reshape(groups, rank, *A.shape[1:])
    in_A, in_B = (rows.flatten(2) != 0).any(2).any(0), (B.transpose(0, 1).flatten(1) != 0).any(1)  # (rank)
    for used in (in_A | in_B, in_A & in_B):  # padding goes first: an A whose B is still zero is to be kept
        last = int(used.nonzero().max()) + 1 if used.any() else 0
        reached = next((r // groups for r in ranks if last <= r // groups < rank), None)
        if reached is not None:
            return rows[:, :reached].flatten(0, 1), B[:, :reached]
    if isinstance(ranks, range):
        raise ValueError(NO_ROOM.format(A.shape[0], ranks[0]))
    raise ValueError(f"`r` is {A.shape[0]} in the file and {ranks[0]} in the model.")


def _by_split(layer: MergedLinearLoRA, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    slices, G = layer.lora_slices(), len(layer.lora_slices())
    if B.shape[0] != sum(layer.splits):
        raise ValueError(f"`splits` (={layer.splits}) must add up to the {B.shape[0]} outputs of the file's lora_B.")
    # A block of r for each split; or one A for all, perhaps padded.
    r, rest = divmod(A.shape[0], G) if _has_room(layer) else (layer.r, 0)
    forms = [(r, r)] if A.shape[0] > r and not rest else []
    for step, rank in [*forms, (0, min(layer.r, A.shape[0]))]:
        blocks = [B[i:j, g * step :][:, :rank] for g, (i, j) in enumerate(slices)]
        if sum(map(torch.count_nonzero, blocks)) == torch.count_nonzero(B):
            return A if step else A[:rank].repeat(G, 1), torch.cat(blocks)
    if _has_room(layer) and A.shape[0] > layer.r:
        raise ValueError(NO_ROOM.format(A.shape[0], layer.r))
    raise ValueError("has an update in the file that the model's splits cannot hold: it goes beyond their blocks.")
