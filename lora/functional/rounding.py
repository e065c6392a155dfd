"""A matrix rounded to a dtype so that its products with given inputs change least, not its numbers."""

from __future__ import annotations

import torch
from torch import Tensor

# How many columns are rounded between two products with all others.
_BLOCK = 128
# How often each column is rounded again, all others being known. The first time brings most.
_SWEEPS = 3


def round_for_inputs(weight: Tensor, moments: Tensor, dtype: torch.dtype, damping: float = 0.01) -> Tensor:
    """W in `dtype`, rounded for inputs x with H = E[x xᵀ]: Q of a small E‖(W − Q) x‖² = tr((W − Q) H (W − Q)ᵀ).

    Column by column each is rounded to nearest after it has taken over the errors of those before,

        q_k = round(w_k + Σ_{i<k} (w_i − q_i) U_ik)        H = U D Uᵀ,  U upper triangular, its diagonal 1

    which is GPTQ's way, in QuIP's form without an inverse of H. Then a few times over, with all others as they are,

        q_k = round(w_k + Σ_{i≠k} (w_i − q_i) H_ik / H_kk)

    A row is rounded to nearest where all that makes its error no smaller; with uncorrelated inputs all are.

    Args:
        weight: W (rows, columns), in float32 or float64.
        moments: H (columns, columns), in W's dtype.
        dtype: the dtype to round to.
        damping: what is added to H's diagonal, as a share of its mean, so that few inputs do not decide too much.

    From "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323, section
    3; "QuIP: 2-Bit Quantization of Large Language Models With Guarantees", arXiv:2307.13304, section 3.
    """
    nearest = weight.to(dtype)
    mean = moments.diagonal().mean()
    if not mean > 0:  # there is no input, or nothing but zeros
        return nearest
    H = moments.clone()
    H.diagonal().add_(damping * mean)
    W = weight.T.contiguous()  # (columns, rows): a column in one piece
    rounded = torch.empty_like(W, dtype=dtype)
    error = torch.empty_like(W)  # W − Q
    _feed_back(W, H, rounded, error)
    for _ in range(_SWEEPS):
        _round_again(W, H, rounded, error)
    worse = lost_in_rows(error.T, moments) >= lost_in_rows(weight - nearest.to(weight.dtype), moments)
    return torch.where(worse[:, None], nearest, rounded.T)


def lost_in_rows(error: Tensor, moments: Tensor) -> Tensor:
    """E[(e x)²] of each row e of a matrix (rows, columns), for inputs x with E[x xᵀ] = `moments` (columns, columns)."""
    lost: Tensor = torch.linalg.vecdot(error @ moments, error)  # (rows)
    return lost


def _feed_back(W: Tensor, H: Tensor, rounded: Tensor, error: Tensor) -> None:
    """Round all columns, each with the errors of those before it."""
    M = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)  # H = M Mᵀ, M upper triangular
    U = M.div_(M.diagonal().clone())
    for start in range(0, len(W), _BLOCK):
        block = slice(start, start + _BLOCK)
        wanted = torch.addmm(W[block], U[:start, block].T, error[:start])  # (≤ block, rows)
        within = U[block, block]
        for k, want in enumerate(wanted):
            _round(start + k, want, W, rounded, error)
            wanted[k + 1 :].addr_(within[k, k + 1 :], error[start + k])


def _round_again(W: Tensor, H: Tensor, rounded: Tensor, error: Tensor) -> None:
    """Round all columns once more, each with the errors of all others."""
    for start in range(0, len(W), _BLOCK):
        block = slice(start, start + _BLOCK)
        slope = H[block] @ error  # (≤ block, rows): H (W − Q)ᵀ
        within = H[block, block]
        for k, its in enumerate(slope):
            before = error[start + k].clone()
            _round(start + k, torch.add(W[start + k], its / within[k, k] - before), W, rounded, error)
            slope[k + 1 :].addr_(within[k, k + 1 :], error[start + k] - before)


def _round(k: int, want: Tensor, W: Tensor, rounded: Tensor, error: Tensor) -> None:
    """Round what is wanted of column k, which may be more than the dtype holds, and note the error."""
    most = torch.finfo(rounded.dtype).max
    rounded[k] = want.clamp(-most, most)
    torch.sub(W[k], rounded[k], out=error[k])
