"""An update in blocks: products of matrices, one for each part of a weight that has its own rank; and their SVD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.layers.layer import LoRALayer

Pair = tuple[Tensor, Tensor]  # B (rows, q) and A (q, columns), whose product is a block of the update


class Spectrum(NamedTuple):
    """A block's singular value decomposition: U (rows, p), S (p), Vt (p, columns)."""

    U: Tensor
    S: Tensor
    Vt: Tensor


# ---- between a layer's tensors and its blocks ------------------------------------------------------------------


def pairs_of(layer: LoRALayer) -> list[Pair]:
    """The blocks of B A without the scaling, in float64, and on the CPU: some devices have no float64.

    linear, embedding       one: B (out, r), A (r, in)
    merged linear           one for each enabled split: B (size, r), A (r, in)
    factored convolution    one for each group: B (out / groups, r / groups), A (r / groups, in / groups · k)
    loralib's convolution   one: its B and A
    stack                   one for each matrix: its B (out, r), A (r, in)
    """
    return factor_blocks(layer, layer.lora_A.detach().cpu().double(), layer.lora_B.detach().cpu().double())


def factor_blocks(layer: LoRALayer, A: Tensor, B: Tensor) -> list[Pair]:
    """The blocks of an A and a B in the layer's form: views, in their dtype, on their device."""
    rows, (flat_A, flat_B) = layer.lora_block_rows(), layer.lora_flat(A, B)
    return list(zip(torch.split(flat_B, rows), flat_A.chunk(len(rows)), strict=True))


def tensors_of(like: LoRALayer, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """A and B with these blocks, of any rank, in the form of the layer; new memory."""
    A = torch.cat([A for _, A in pairs])  # (blocks·q, columns)
    B = torch.cat([B for B, _ in pairs])  # (all rows, q)
    return like.lora_formed(A, B)


# ---- ranks: q, the rank of a block, is r, and for convolutions in proportion to it -------------------------------


def block_rank(layer: LoRALayer, r: int) -> int:
    """q of a layer of this kind and form with rank `r`; ValueError if there is none."""
    q, rest = divmod(r * layer.lora_block_rank(), layer.r)
    if rest:
        groups = getattr(layer, "groups", 1)
        raise ValueError(f"`r` (={r}) must be divisible by `groups` (={groups}) when `factored=True`.")
    return q


def layer_rank(layer: LoRALayer, q: int) -> int:
    """The smallest rank at which the layer's blocks have a rank of `q` at least."""
    return -(-q * layer.r // layer.lora_block_rank())


@torch.inference_mode(False)
@torch.no_grad()
def at_block_rank(layer: LoRALayer, A: Tensor, B: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """A and B whose blocks have the rank `q`: filled up with zeros, or cut; new memory."""
    pairs = [(B[:, :q], A[:q]) for B, A in factor_blocks(layer, A, B)]
    return tensors_of(layer, [padded(B, A, q) for B, A in pairs])


# ---- approximation ---------------------------------------------------------------------------------------------


def spectrum(B: Tensor, A: Tensor) -> Spectrum:
    """The SVD of B A, from thin QR of each and the SVD of a core of their rank; B A itself is never built."""
    Q_B, R_B = torch.linalg.qr(B)  # (rows, p), (p, q) with p = min(rows, q)
    Q_A, R_A = torch.linalg.qr(A.T)  # (columns, p'), (p', q)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Spectrum(Q_B @ U, S, Vt @ Q_A.T)


def dense_spectrum(matrix: Tensor) -> Spectrum:
    """The SVD of a block that has no factors."""
    return Spectrum(*torch.linalg.svd(matrix, full_matrices=False))


def shares(spectra: Sequence[Spectrum]) -> Tensor:
    """The share of all blocks' energy Σσ² that q = 1, 2, … keeps; all ones for an update of zeros."""
    longest = max(part.S.numel() for part in spectra)
    energy = torch.stack([F.pad(part.S.cpu().double().square(), (0, longest - part.S.numel())) for part in spectra])
    kept = energy.sum(0).cumsum(0)
    return kept / kept[-1] if kept[-1] > 0 else torch.ones_like(kept)


def smallest_rank(share: Tensor, energy: float) -> int:
    """The smallest q that keeps at least this share."""
    return int((share < energy).sum()) + 1


def cut(part: Spectrum, q: int) -> Pair:
    """The best approximation of a block at rank `q`, its singular values half in B and half in A."""
    root = part.S[:q].sqrt()
    return padded(part.U[:, :q] * root, root[:, None] * part.Vt[:q], q)


def padded(B: Tensor, A: Tensor, q: int) -> Pair:
    """The same block at rank `q`, filled up with zeros."""
    return F.pad(B, (0, q - B.shape[1])), F.pad(A, (0, 0, 0, q - A.shape[0]))
