"""A vocabulary that is resized under an adapter: the factor that counts its ids follows.

transformers' `resize_token_embeddings` keeps an embedding, and a head that is tied to it: it gives them a weight with
more rows or fewer, says so in `num_embeddings` or `out_features`, and sets `requires_grad` of all their parameters to
what it was of the weight. An id that is new has no update; that of one that is gone goes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lora.layers.layer import LoRALayer
from lora.layers.undo import undo_on_error
from lora.layers.weights import is_sharded


class WithVocabulary(LoRALayer):
    """The part of a kind whose layers may have an input or an output for each id of a vocabulary."""

    #: The attribute that says how many ids there are, and the factor that has them in one of its dimensions.
    lora_counted: ClassVar[tuple[str, str, int]]
    #: Whether the next `requires_grad_` is transformers', after it has resized the vocabulary.
    lora_resizing: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name != self.lora_counted[0] or self.r == 0:
            return super().__setattr__(name, value)
        with undo_on_error([self], [self.lora_magnitude] if self.use_dora else []) as undo, undo:
            self.lora_resize(value)
            self.lora_resizing = True
            super().__setattr__(name, value)

    def lora_rows(self) -> Tensor:
        """The weight, by ids."""
        return self.weight

    @torch.inference_mode(False)
    @torch.no_grad()
    def lora_resize(self, size: int) -> None:
        """Give A or B as many ids as the weight now has rows; the Parameter objects stay.

        Nothing is done where the weight does not have as many.
        """
        _, factor, dim = self.lora_counted
        parameter, rows = getattr(self, factor), self.lora_rows()
        before = parameter.shape[dim]
        if len(rows) != size or size == before:
            return
        if size < before and self.use_dora and dim == 1:
            raise ValueError(
                f"DoRA's magnitudes go with norms over all {before} ids, of which {size} are left: they cannot follow. "
                "The weight is cut already: load the model again, call `resize_token_embeddings` first, and then "
                "`lora.inject`."
            )
        if is_sharded(parameter):
            raise ValueError(
                "the adapter is sharded and cannot follow; call `resize_token_embeddings` first, then inject."
            )
        _write(parameter, resized(parameter, dim, size))
        if self.lora_start is not None:
            A, B, scaling = self.lora_start
            self.lora_start = (resized(A, 1, size), B, scaling) if dim == 1 else (A, resized(B, 0, size), scaling)
        self._merged = self._squares = self._norms = None  # written past us, and addresses may come back
        if self.use_dora:
            _keep_gain(self, dim, rows.detach()[before:], size)

    def requires_grad_(self, requires_grad: bool = True) -> WithVocabulary:
        """Set what trains of the layer; but not when a vocabulary was resized: then only the weight's is meant."""
        if vars(self).pop("lora_resizing", False) and requires_grad == self.weight.requires_grad:
            return self
        super().requires_grad_(requires_grad)
        return self

    def train(self, mode: bool = True) -> WithVocabulary:
        vars(self).pop("lora_resizing", None)
        super().train(mode)
        return self

    def lora_remove(self, restore_layout: bool = True) -> None:
        vars(self).pop("lora_resizing", None)
        super().lora_remove(restore_layout)


def resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with the first `size` entries of a dimension: zeros where it has none."""
    kept = tensor.detach().narrow(dim, 0, min(size, tensor.shape[dim]))
    shape = list(tensor.shape)
    shape[dim] = size - kept.shape[dim]
    return torch.cat([kept, kept.new_zeros(shape)], dim)


def _keep_gain(layer: LoRALayer, dim: int, new: Tensor, size: int) -> None:
    """Magnitudes with which g is what it was, and 1 for new outputs."""
    m = layer.lora_magnitude
    if dim == 0:  # an id is an output, with a norm of its own
        _write(m, torch.cat([m.detach()[:size], torch.linalg.vector_norm(new, dim=1, dtype=m.dtype)]))
    else:  # the norms are over all ids, with those that are new
        norms, new = layer.lora_norms(), layer.lora_base_weight()[-len(new) :]
        old = (norms.square() - new.to(norms.dtype).square().sum(0)).clamp(min=0).sqrt()
        m.mul_(torch.where(old > 0, norms / old, 1))


def _write(parameter: torch.nn.Parameter, value: Tensor) -> None:
    parameter.grad = None  # of the old shape
    parameter.data = value
