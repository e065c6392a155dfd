"""Starts from the base weight itself, PiSSA and OLoRA; and the decompositions that other starts use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora.errors import Problems, instance, is_count
from lora.functional.fused import exact_dtype, without_autocast
from lora.layers.layer import LoRALayer
from lora.models.blocks import Pair, Spectrum, cut, dense_spectrum


@torch.no_grad()
def pissa(layer: LoRALayer, niter: int | None = None) -> list[Pair]:
    """PiSSA: A and B hold the principal singular values and vectors of W₀, for which the residual leaves room.

        W₀ = U S Vᵀ,  B = U_r √(S_r / s),  A = √(S_r / s) V_rᵀ        s · B A is the best approximation of rank r

    Each split of a merged linear layer, and each group of a factored convolution, is a matrix of its own.

    Args:
        layer: a LoRA layer; it stays as it is.
        niter: None for the exact SVD; a number for that many power iterations of a randomised one, nearly as good for
            the leading values and many times faster: 4096 × 4096 at r = 16 in float32 takes one core 22 s and 340 MiB
            beside the weight, with `niter=4` 0.3 s and a few MiB. Default: None.

    Returns:
        B (rows, q) and A (q, columns) of each block, in float32, or float64 where the weight is.

    Raises:
        ValueError: the scaling is not above 0, the rank is above that of a block, a block is zero or not finite, or
            the weight has no blocks (a user's own kind, an embedding with `max_norm`). One error lists all.

    From "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    arXiv:2404.02948, section 3. The randomised SVD is that of arXiv:0909.4061, algorithms 4.4 and 5.1; it draws from a
    generator of its own, and always the same numbers.

    >>> import torch, lora
    >>> from lora.models.spectral import pissa
    >>> layer = lora.Linear(6, 4, r=3, lora_alpha=6)
    >>> [(B, A)] = pissa(layer)
    >>> residual = layer.weight - layer.lora_scaling * B @ A
    >>> torch.allclose(torch.linalg.svdvals(residual)[0], torch.linalg.svdvals(layer.weight)[3], atol=1e-6)
    True
    """
    with Problems(f"pissa: {instance(layer)} cannot start so") as problems:
        if niter is not None and not is_count(niter):
            problems.add(f"`niter` must be an integer of at least 0, got {niter!r}.")
        problems.add(*start_problems(layer, scales=True))
    blocks = weight_blocks(layer, layer.lora_base_weight())
    return split(layer, [decomposed(block, layer.lora_block_rank(), niter) for block in blocks])


@torch.no_grad()
def olora(layer: LoRALayer) -> list[Pair]:
    """OLoRA: B has orthonormal columns, of the QR decomposition of W₀.

        W₀ = Q R,  B = Q_r,  A = R_r        Q_r: the first r columns, R_r: the first r rows

    As in PEFT, the scaling is left out of A and B: what is taken out of W₀ is s · Q_r R_r. Arguments, what is returned
    and what is raised are `pissa`'s, but for `niter`, the scaling, and blocks that are zero.

    From "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv:2406.01775, section 3.

    >>> import torch, lora
    >>> from lora.models.spectral import olora
    >>> [(B, A)] = olora(lora.Linear(6, 4, r=2))
    >>> torch.allclose(B.T @ B, torch.eye(2), atol=1e-6)
    True
    """
    with Problems(f"olora: {instance(layer)} cannot start so") as problems:
        problems.add(*start_problems(layer, scales=False))
    pairs, q = [], layer.lora_block_rank()
    for block in weight_blocks(layer, layer.lora_base_weight()):
        with without_autocast(block.device):
            Q, R = torch.linalg.qr(block)
        pairs.append((Q[:, :q], R[:q]))
    return pairs


# ---- the blocks of a weight, and whether they can be taken apart -------------------------------------------------


def weight_blocks(layer: LoRALayer, weight: Tensor) -> list[Tensor]:
    """The layer's blocks of a weight, in float32, or float64 where the weight is."""
    return list(layer.lora_weight_blocks(weight.detach().to(exact_dtype(weight.dtype))))


@torch.no_grad()
def start_problems(layer: LoRALayer, scales: bool) -> Iterator[str]:
    """Why no part of the layer's rank can be taken out of its weight; does the way share √s between A and B?"""
    found = [*(scaling_problems(layer) if scales else ()), *form_problems(layer)]
    if layer.weight.is_meta:
        found.append("its weight has no values yet, being on the meta device.")
    elif not [*form_problems(layer)]:
        columns = layer.lora_flat(layer.lora_A, layer.lora_B)[0].shape[1]
        found += rank_problems(layer, [(rows, columns) for rows in layer.lora_block_rows()])
        found += value_problems(layer)
    yield from found
    if scales and not found:
        yield from nothing_problems(layer.lora_weight_blocks(layer.lora_base_weight()))


def block_problems(layer: LoRALayer) -> Iterator[str]:
    """A complaint if the layer's kind does not say what its blocks are."""
    try:
        layer.lora_block_rows()
    except ValueError as error:
        yield str(error)


def form_problems(layer: LoRALayer) -> Iterator[str]:
    """Why the layer's weight cannot be taken apart, whatever its values."""
    yield from block_problems(layer)
    beyond = layer.lora_not_in_weight()
    if beyond:
        yield f"{beyond}: the layer would not start from the base layer's function."


def rank_problems(layer: LoRALayer, shapes: Sequence[tuple[int, ...]], times: int = 1) -> Iterator[str]:
    """A complaint if the rank is above that of a block; the blocks have these shapes."""
    q, least = layer.lora_block_rank(), min(shapes, key=min)
    if q * times > min(least):
        what = f"{times} · r" if times > 1 else "r"
        got = f"the rank of a block is {q}" if q != layer.r else f"`r` is {q}"
        yield f"{what} must be at most {min(least)}, the rank of a matrix of {least[0]} × {least[1]}; {got}."


def scaling_problems(layer: LoRALayer) -> Iterator[str]:
    """A complaint if the scaling has no square root that A and B could share."""
    if not layer.lora_scaling > 0:
        yield f"`scaling` must be above 0, got {layer.lora_scaling}."


def nothing_problems(blocks: Sequence[Tensor]) -> Iterator[str]:
    """A complaint if a block gives A and B nothing."""
    if not all(bool(block.any()) for block in blocks):
        yield "a block of its weight is all zeros: A and B would both start at zero and never receive a gradient."


def value_problems(layer: LoRALayer) -> Iterator[str]:
    """A complaint if the weight cannot be read, or is not finite."""
    try:
        if not bool(layer.lora_base_weight().isfinite().all()):
            yield "its weight holds NaN or infinity."
    except ValueError as error:
        yield str(error)


# ---- decompositions --------------------------------------------------------------------------------------------


def split(layer: LoRALayer, spectra: Sequence[Spectrum]) -> list[Pair]:
    """B and A of each block with s · B A = U_q S_q V_qᵀ, each with the square root of S_q / s."""
    return [cut(part._replace(S=part.S / layer.lora_scaling), layer.lora_block_rank()) for part in spectra]


def decomposed(matrix: Tensor, q: int, niter: int | None = None) -> Spectrum:
    """The SVD of a block: all of it; or with `niter` its leading `q` values, and some more, by a random sketch."""
    with without_autocast(matrix.device):
        return dense_spectrum(matrix) if niter is None else _sketched(matrix, q, niter)


def _sketched(matrix: Tensor, q: int, niter: int) -> Spectrum:
    size = min(2 * q + 8, *matrix.shape)  # exact for a matrix that has no more
    # On the CPU: the same numbers on all devices. Of its own: the global generator stays where it is.
    noise = torch.randn(matrix.shape[1], size, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    Q = torch.linalg.qr(matrix @ noise.to(matrix.device))[0]  # (rows, size)
    for _ in range(niter):
        Q = torch.linalg.qr(matrix.T @ Q)[0]  # (columns, size)
        Q = torch.linalg.qr(matrix @ Q)[0]
    U, S, Vt = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Spectrum(Q @ U, S, Vt)
