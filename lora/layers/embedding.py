"""LoRA for embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lora.functional import Lookup, lora_embedding
from lora.layers.in_place import LowRankWeight
from lora.layers.kind import Shape
from lora.layers.registry import register
from lora.layers.starts import Init
from lora.layers.vocabulary import WithVocabulary
from lora.layers.weights import sample_slice


class EmbeddingLoRA(WithVocabulary):
    """The kind for embeddings: A (r, num_embeddings), B (embedding_dim, r)."""

    lora_starts_at_zero = "lora_A"
    lora_counted = "num_embeddings", "lora_A", 1
    lora_taught: ClassVar[Mapping[Any, str]] = {F.embedding: "lora_taught_embedding"}

    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool
    num_embeddings: int
    embedding_dim: int

    def lora_add(self, r: int, lora_alpha: float = 1, lora_dropout: float = 0.0, *args: Any, **settings: Any) -> None:
        super().lora_add(r, lora_alpha, 0.0, *args, **settings)  # ids have no features to drop

    @classmethod
    def lora_shapes(cls, base: Any, r: int, **settings: Any) -> tuple[Shape, Shape]:
        return (r, base.num_embeddings), (base.embedding_dim, r)

    def reset_lora_parameters(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def lora_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.lora_dense:
            return super().lora_forward(input, *args, **kwargs)
        how = Lookup(self.padding_idx, self.scale_grad_by_freq, self.sparse)
        return lora_embedding(input, self.lora_base_forward(input), self.lora_A, self.lora_B, self.lora_scaling, how)

    def lora_taught_embedding(
        self,
        W: LowRankWeight,
        input: Tensor,
        weight: Any,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        """W[ids], in the base class's own forward."""
        if weight is not W or W.transposed or max_norm is not None:
            return NotImplemented
        y = F.embedding(input, W.base, padding_idx, None, norm_type, scale_grad_by_freq, sparse)  # (..., embedding_dim)
        if padding_idx is not None and padding_idx < 0:
            padding_idx += self.num_embeddings
        y = lora_embedding(input, y, W.A, W.B, W.scaling, Lookup(padding_idx, scale_grad_by_freq, sparse))
        return self.lora_magnified_beside(None, y) if W.gain else y

    def lora_down(self, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)  # (...) -> (..., r)

    def lora_up(self, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)  # (..., r) -> (..., embedding_dim)

    def lora_delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).T

    def lora_base_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.r == 0 or self.max_norm is None:
            return super().lora_base_forward(input, *args, **kwargs)
        # torch's max_norm writes the rows that it looks up; a frozen base is renormalised on the way out.
        return renormed(self, self.lora_forward_with(input, self.weight))

    def lora_forward_with(self, input: Tensor, weight: Tensor) -> Tensor:
        options = self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        return F.embedding(input, weight, *options)

    def lora_base_weight(self) -> Tensor:
        weight = super().lora_base_weight()
        return weight if self.max_norm is None else renormed(self, weight)

    @classmethod
    def lora_magnitudes(cls, base: Any, shape_B: Shape) -> int:
        return shape_B[0]

    def lora_output_dims(self) -> tuple[int, int]:
        return 1, -1

    def lora_block_rows(self) -> list[int]:
        return [self.embedding_dim]

    def lora_weight_blocks(self, weight: Tensor) -> Sequence[Tensor]:
        return [weight.T]

    def lora_merge(self) -> None:
        super().lora_merge()
        self.max_norm = None  # the base rows are within it now, and it does not bound the update

    def lora_sampled(self, weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        rows = sample_slice(weight)
        return weight[rows], A[:, rows]

    def lora_not_in_weight(self) -> str | None:
        return None if self.max_norm is None else "`max_norm` does not bound the update"


def renormed(embedding: Any, rows: Tensor) -> Tensor:
    """Rows within an embedding's `max_norm`, as torch would write them back when they are looked up."""
    norms = rows.norm(p=embedding.norm_type, dim=-1, keepdim=True)
    scale: Tensor = (embedding.max_norm / (norms + 1e-7)).clamp(max=1)  # torch's own guard against 0 / 0
    return rows * scale


class Embedding(EmbeddingLoRA, nn.Embedding):
    """An embedding with a frozen weight and a trainable low-rank update.

        y = g ⊙ (W₀[ids] + s · Aᵀ[ids] Bᵀ)        s = lora_alpha / r  (rsLoRA: lora_alpha / √r)

    and g = 1, or m / ‖W₀ + s · (B A)ᵀ‖ for each of the embedding's dimensions with DoRA.

    A starts at zero and B at N(0, 1), the other way round than in `lora.Linear`: a step moves only the columns
    of A whose ids were in the batch, so that with A at zero an id that was never seen keeps its pretrained
    embedding exactly. (With B at zero and A random, the first step of B would move every id.)

    Args:
        num_embeddings: size of the vocabulary.
        embedding_dim: size of each embedding.
        r: rank of the update; with 0 the layer is a plain, trainable `nn.Embedding`. Default: 0.
        lora_alpha: numerator of the scaling. Default: 1.
        merge_weights: as in `lora.Linear`. Default: True.
        use_rslora: scale by lora_alpha / √r (arXiv:2312.03732). Default: False.
        use_dora: train a magnitude m for each dimension, as in `lora.Linear`. Default: False.
        init_lora_weights: how A and B start, as in `lora.Linear`. Default: True.
        device, dtype, **kwargs: `device`, `dtype`, `padding_idx`, `max_norm`, `norm_type`, `scale_grad_by_freq`,
            `sparse`, `_weight` and `_freeze` of `nn.Embedding`. `max_norm` bounds the pretrained rows, without writing
            them; `padding_idx` receives no update; `sparse` holds for the gradient of A.

    Parameters: `weight` (num_embeddings, embedding_dim), `lora_A` (r, num_embeddings), `lora_B`
    (embedding_dim, r), with DoRA `lora_magnitude` (embedding_dim).

    Input: ids (...); returns (..., embedding_dim).

    Raises:
        ValueError: `r` or `lora_alpha` out of range.

    From "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, and loralib, which applies it to
    embeddings.

    >>> import torch, lora
    >>> layer = lora.Embedding(100, 16, r=4)
    >>> layer(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 16])
    """

    lora_dense = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: Init = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, device=device, dtype=dtype, **kwargs)
        self.lora_add(r, lora_alpha, 0.0, merge_weights, use_rslora, use_dora, init_lora_weights)
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        elif r > 0:
            self.lora_start_adapter()


register(nn.Embedding, EmbeddingLoRA)
