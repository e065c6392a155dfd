"""DoRA: a magnitude m for each output, and the direction from W₀ + s · B A.

    W = g ⊙ (W₀ + s · B A)        g = m / ‖W₀ + s · B A‖

The norm counts as a constant for gradients (arXiv:2402.09353, section 4.3). It is taken without building the sum:

    ‖W₀ + s · B A‖² = ‖W₀‖² + 2 s · Σ (W₀ Aᵀ) ⊙ B + s² · Σ (B (A Aᵀ)) ⊙ B        each Σ over a row
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from lora.errors import with_article
from lora.functional.fused import exact_dtype, is_plain, without_autocast
from lora.functional.magnitude import magnify
from lora.layers import weights
from lora.layers.cache import remembered
from lora.layers.kind import LayerKind, Shape

_PART = 2**20  # values of a weight that are summed at a time


class Magnitudes(LayerKind):
    """The part of `lora.LoRALayer` that computes with magnitudes."""

    def lora_magnified(self, y: Tensor) -> Tensor:
        """g ⊙ (y − b) + b, for y = (W₀ + s · B A) x + b."""
        return self.lora_magnified_beside(self._parameters.get("bias"), y)

    def lora_magnified_beside(self, bias: Tensor | None, y: Tensor, outputs: slice | None = None) -> Tensor:
        """The same for a bias that need not be the layer's, and for some of the outputs."""
        gain = self.lora_expand_to_outputs(self.lora_gains(), 1.0).to(exact_dtype(y.dtype))
        gain = gain if outputs is None else gain[outputs]
        _, dim = self.lora_output_dims()
        return magnify(y, gain, None if bias is None else bias.to(y.dtype), dim)

    def lora_gains(self) -> Tensor:
        """g, exactly 1 at the start, for each output that has a magnitude."""
        norm = self._current_norms().to(self.lora_magnitude.device).detach()  # `no_grad` keeps forward-mode tangents
        # Outputs whose weights are all zero have no direction: g = 1, with which they can learn one.
        some = norm != 0
        return torch.where(some, self.lora_magnitude, 1) / torch.where(some, norm, 1)

    def _current_norms(self) -> Tensor:
        """The norms; remembered where no gradient is wanted, as when text is generated, token by token."""
        sources = self.weight, self.lora_A, self.lora_B
        if torch.is_grad_enabled() or not is_plain(*sources):
            return self.lora_norms()
        return remembered(self, "_norms", sources, self.lora_scaling, self.lora_norms)

    def lora_norms(self) -> Tensor:
        """‖W₀ + s · B A‖ for each output that has a magnitude, in float32, or float64 where the weight is."""
        return self.lora_squared_norms().clamp(min=0).sqrt()  # rounding may leave less than nothing

    def lora_squared_norms(self) -> Tensor:
        """‖W₀ + s · B A‖² for each output that has a magnitude."""
        with torch.no_grad():  # not as a decorator, which a compiler cannot follow on a layer that is made in its sight
            weight, rows, s = self.lora_base_weight(), self.lora_block_rows(), self.lora_read_scaling()
            dtype = exact_dtype(weight.dtype)
            with without_autocast(weight.device):
                flat_A, flat_B = self.lora_flat(self.lora_A.to(dtype), self.lora_B.to(dtype))
                Bs, As, added = torch.split(flat_B, rows), flat_A.chunk(len(rows)), []
                # (rows, columns), (q, columns), (rows, q)
                for W, A, B in zip(self.lora_weight_blocks(weight), As, Bs, strict=True):
                    cross = (W @ A.T.to(W.dtype)).to(dtype)  # (rows, q): no copy of W in another dtype
                    added.append(((2 * s * cross + s * s * (B @ (A @ A.T))) * B).sum(1))  # (rows)
                return self._base_squares(weight, dtype) + torch.cat(added)

    def _base_squares(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """‖W₀‖² for each output, remembered while the weight stays what it is."""
        if weight is not self.weight or not is_plain(weight):  # it was computed just now, or is being traced
            return _squares(self.lora_weight_blocks(weight), dtype)
        return remembered(self, "_squares", (weight,), 0.0, lambda: _squares(self.lora_weight_blocks(weight), dtype))

    def lora_read_scaling(self) -> float | Tensor:
        """s, as a forward is to read it."""
        return self.lora_scaling

    def lora_gain(self, dtype: torch.dtype) -> Tensor:
        """g, 1 where the layer has no magnitude, in the shape that multiplies the weight."""
        shape = [1] * len(self.lora_weight_shape())
        shape[self.lora_output_dims()[0]] = -1
        return self.lora_expand_to_outputs(self.lora_gains(), 1.0).to(dtype).view(shape)

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """m = ‖W₀ + s · B A‖, so that g = 1; nothing without DoRA."""
        if self.use_dora:
            norms = weights.ranks_of(self).with_whole(self, "weight", "lora_A", "lora_B").lora_norms()
            weights.of(self, "lora_magnitude").write(norms)

    @classmethod
    def lora_check_dora(cls, base: nn.Module, shape_B: Shape) -> None:
        """ValueError if a layer of this class cannot have magnitudes."""
        if not cls.lora_magnitudes(base, shape_B):
            raise ValueError(f"`use_dora` is not for the kind {cls.__name__}, which does not say what its outputs are.")
        if not cls.lora_dense and weights.packing_of(base) is None and weights.is_packed(base):
            raise ValueError(
                f"`use_dora` needs to know the weight that {with_article(cls.lora_base_class.__name__)} computes with, "
                "which has a forward of its own; `lora.register_weight` teaches how to read it."
            )


def _squares(blocks: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    squares = []
    for block in blocks:  # (rows, columns)
        # In parts, as torch copies what is in another dtype; whole where a compiler does better.
        size = max(1, _PART // max(1, block.shape[1])) if is_plain(block) else len(block)
        parts = torch.split(block, size)
        squares += [torch.linalg.vector_norm(part, dim=1, dtype=dtype).square() for part in parts]
    return torch.cat(squares)
