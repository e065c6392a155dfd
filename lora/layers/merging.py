"""The merged weight, W = g ⊙ (W₀ + s · B A): when it serves, how it is made, and where it is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from lora.functional.fused import is_plain, without_autocast
from lora.layers import dora
from lora.layers.derived import Derived
from lora.layers.kind import LayerKind


class Merging(LayerKind):
    """The part of `lora.LoRALayer` that merges: into a cache beside the base weight, or into the base weight."""

    def _serves_merged(self) -> bool:
        if self.training or not self.merge_weights or not self.dense or self._subclassed:
            return False
        tensors = self._sources()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return False
        return is_plain(*tensors)

    def _sources(self) -> tuple[Tensor, ...]:
        """The tensors that the merged weight is computed from."""
        adapter = (self.weight, self.lora_A, self.lora_B)
        return (*adapter, self.lora_magnitude) if self.use_dora else adapter

    def merged_weight(self) -> Tensor:
        """W in the base weight's dtype, remembered until something that it depends on changes."""
        sources = self._sources()
        if self._merged is None or not self._merged.is_current(sources, self.scaling):
            self._merged = Derived(sources, self.scaling, self.compute_merged())
        return self._merged.tensor

    @torch.inference_mode(False)
    @torch.no_grad()
    def compute_merged(self) -> Tensor:
        """W in the weight's dtype: computed in float32, or float64 where the weight is, and rounded once."""
        return self.merge_into(torch.empty_like(self.base_weight()))

    def merge(self) -> None:
        """Make the merged weight the base weight; the base layer computes with it what `forward_with` does."""
        self.merge_into(self.weight)

    def merge_into(self, out: Tensor) -> Tensor:
        """Write W to `out`, which is like the weight: the weight itself, or another."""
        dtype = torch.promote_types(out.dtype, torch.float32)
        with without_autocast(out.device):
            A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
            g = self.magnitude_gain(dtype) if self.use_dora else None
            merged = self.add_update(self.base_weight().to(dtype, copy=True), A, B)
            return out.copy_(merged if g is None else merged.mul_(g))

    @torch.no_grad()
    def magnitude_gain(self, dtype: torch.dtype) -> Tensor:
        """DoRA's g, in the shape that multiplies the weight."""
        shape = [1] * len(self.weight_shape())
        shape[self.output_dims()[0]] = -1
        return dora.gain(self).to(dtype).view(shape)  # type: ignore[arg-type]
