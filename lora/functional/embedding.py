"""LoRA for embeddings as a function of tensors: look up columns of A, and send gradients only to those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.functional.fused import Fused, FusedFunction, is_plain, refuse_storage, scaled_mm, spread, without_autocast


class Lookup(NamedTuple):
    """How `nn.Embedding` looks up, and how it gathers gradients."""

    padding_idx: int | None = None
    scale_grad_by_freq: bool = False
    sparse: bool = False


def lora_embedding(ids: Tensor, y: Tensor, A: Tensor, B: Tensor, scaling: float, how: Lookup | None = None) -> Tensor:
    """Add a low-rank update to embeddings that have been looked up.

        y += s · Aᵀ[ids] Bᵀ

    Where the fused function does not apply (`torch.compile`, function transforms, tensor subclasses) this is
    `plain_lora_embedding`, whose gradient for A is dense even where `how` says sparse.

    Args:
        ids: (...), integers.
        y: (..., embedding_dim), fresh and without gradient: the fused function adds into it.
        A: (r, num_embeddings).
        B: (embedding_dim, r).
        scaling: s.
        how: the lookup's options. Default: none of them.

    Returns:
        (..., embedding_dim), in y's dtype.

    >>> import torch, lora.functional
    >>> A, B, y = torch.eye(2, 3), torch.ones(4, 2), torch.zeros(1, 4)
    >>> lora.functional.lora_embedding(torch.tensor([1]), y, A, B, scaling=0.5)
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    how = how or Lookup()
    refuse_storage(y.dtype)
    if y.requires_grad or ids.is_meta or not is_plain(y, A, B):
        return plain_lora_embedding(ids, y, A, B, scaling, how)
    return _LoRAEmbedding.run(y, A, B, ids, scaling, how)


def plain_lora_embedding(ids: Tensor, y: Tensor, A: Tensor, B: Tensor, scaling: float, how: Lookup) -> Tensor:
    """The equation of `lora_embedding` in operations that autograd knows."""
    dtype = torch.promote_types(y.dtype, A.dtype)
    h = F.embedding(ids, A.T.to(dtype), how.padding_idx, scale_grad_by_freq=how.scale_grad_by_freq)  # (..., r)
    with without_autocast(y.device):
        B, left = spread(B, scaling, dtype)
        return y + (F.linear(h, B) * left).to(y.dtype)


class _LoRAEmbedding(FusedFunction):
    """`plain_lora_embedding`, fused: saves h = Aᵀ[ids], and ids and parameters, which are not copies."""

    inputs = 4

    @staticmethod
    def forward(ctx: Any, y: Tensor, A: Tensor, B: Tensor, ids: Tensor, scaling: float, how: Lookup) -> Tensor:
        h = A.index_select(1, ids.reshape(-1)).to(y.dtype)  # (r, N), whose rows are contiguous as A's are
        y.view(-1, y.shape[-1]).addmm_(h.T, B.to(y.dtype).T, alpha=scaling)
        ctx.mark_dirty(y)
        ctx.scaling, ctx.how, ctx.unsaved = scaling, how, ((y.shape, y.dtype),)
        ctx.save_for_backward(None, A, B, ids, h)
        return y

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
        _, A, B, ids, h = ctx.saved_tensors
        _, needs_A, needs_B, *_ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])  # (N, embedding_dim)
        fused = Fused(ctx.scaling, None, rows.dtype, ())
        dA = dB = None
        if needs_A:
            dh = scaled_mm(rows, fused.up(B), fused.alpha)  # (N, r)
            dA = _scatter(dh, ids.reshape(-1), A.shape[1], ctx.how)
        if needs_B:
            dB = fused.of_B_scaled(scaled_mm(h, rows, fused.alpha).T, B)
        return None, dA, dB, None

    @staticmethod
    def twin(ctx: Any, y: Tensor, A: Tensor, B: Tensor, ids: Tensor) -> Tensor:
        return plain_lora_embedding(ids, y, A, B, ctx.scaling, ctx.how)


def _scatter(dh: Tensor, ids: Tensor, vocabulary: int, how: Lookup) -> Tensor:
    """The gradient of A, (r, vocabulary), from that of h, (N, r), at ids (N)."""
    padding_idx = -1 if how.padding_idx is None else how.padding_idx
    options = vocabulary, padding_idx, how.scale_grad_by_freq
    if not how.sparse:
        return torch.ops.aten.embedding_dense_backward(dh, ids, *options).T  # type: ignore[no-any-return]
    by_id = torch.ops.aten.embedding_sparse_backward(dh, ids, *options)  # (vocabulary, r), n of them
    (columns,), values = by_id._indices(), by_id._values()  # (n), (n, r)
    n, r = values.shape
    rows = torch.arange(r, device=dh.device).repeat_interleave(n)
    indices = torch.stack([rows, columns.repeat(r)])  # (2, r·n)
    return torch.sparse_coo_tensor(indices, values.T.reshape(-1), (r, vocabulary), check_invariants=False)
