"""LoRA for several linear layers fused into one: query, key and value, say."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, compress
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lora.layers.kind import Shape
from lora.layers.layer import LoRALayer
from lora.layers.linear import Conv1DLoRA, LinearLoRA
from lora.layers.settings import split_settings
from lora.models.shapes import Init


class MergedLinearLoRA(LinearLoRA):
    """The kind for fused linear layers: A (G·r, in_features), B (out_features of the G enabled splits, r)."""

    splits: tuple[int, ...] = ()
    enable_lora: tuple[bool, ...] = ()

    settings = (*LoRALayer.settings, "splits", "enable_lora")

    @classmethod
    def lora_shapes(cls, base: nn.Module, r: int, **settings: Any) -> tuple[Shape, Shape]:
        splits, enable_lora = settings["splits"], settings["enable_lora"]
        in_features, out_features = cls.features(base)
        if sum(splits) != out_features or any(size <= 0 for size in splits):
            raise ValueError(f"`splits` (={splits}) must be positive and add up to `out_features` (={out_features}).")
        if len(enable_lora) != len(splits):
            raise ValueError(f"`enable_lora` (={enable_lora}) must have one entry for each of the splits {splits}.")
        return (r * sum(enable_lora), in_features), (sum(compress(splits, enable_lora)), r)

    def resize_outputs(self, size: int) -> None:
        if size != sum(self.splits):
            raise ValueError(
                f"`out_features` (={size}) must be the sum of `splits` (={self.splits}), which cannot follow; load the "
                "model again, and resize it before `lora.inject`."
            )

    def slices(self) -> list[tuple[int, int]]:
        stops = accumulate(self.splits)
        return [(stop - size, stop) for size, stop in compress(zip(self.splits, stops, strict=True), self.enable_lora)]

    def over_outputs(self, adapted: Tensor) -> Tensor:
        if all(self.enable_lora):
            return adapted
        parts = iter(torch.split(adapted, self.block_rows()))
        every = zip(self.splits, self.enable_lora, strict=True)
        return torch.cat([next(parts) if enabled else adapted.new_zeros(size) for size, enabled in every])


LinearLoRA.merged_kind = MergedLinearLoRA


class MergedConv1DLoRA(Conv1DLoRA, MergedLinearLoRA):
    """The kind for a fused Conv1D, such as GPT-2's c_attn."""


Conv1DLoRA.merged_kind = MergedConv1DLoRA


class MergedLinear(MergedLinearLoRA, nn.Linear):
    """Several linear layers fused into one, each with a low-rank update of its own, or none.

        y_g = x W₀_gᵀ + b_g + s · drop(x) A_gᵀ B_gᵀ    for each enabled split g of the output

    (With DoRA each output of an enabled split is scaled as in `lora.Linear`.)

    One product with the stacked A serves all splits; splits that are not enabled cost nothing.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample, all splits together.
        r: rank of each split's update. Default: 0.
        lora_alpha: numerator of the scaling lora_alpha / r. Default: 1.
        lora_dropout: probability of dropping an input feature on the LoRA path in training. Default: 0.
        enable_lora: which splits to adapt, as bools or 0/1; one bool speaks for all `splits`. With nothing
            enabled the layer is a plain, trainable `nn.Linear`. Default: [False].
        fan_in_fan_out: store the weight as (in_features, out_features). Default: False.
        merge_weights: as in `lora.Linear`. Default: True.
        splits: sizes of the splits, in order, uneven ones too (grouped-query attention). Default: equal
            parts, one for each entry of `enable_lora`.
        use_rslora: scale by lora_alpha / √r (arXiv:2312.03732). Default: False.
        use_dora: train a magnitude m for each adapted output, starting at the norm of its weights
            (arXiv:2402.09353). Dropout is for the low-rank update alone. Default: False.
        init_lora_weights: how A and B start: True, "gaussian", "orthogonal", False (both random), or a function of the
            layer. Ways that need the pretrained weight or data: `lora.initialize`, `lora.calibrate`. Default: True.
        device, dtype, **kwargs: `device`, `dtype` and `bias` of `nn.Linear`.

    Parameters, for G enabled splits: `weight` (out_features, in_features), `bias` (out_features), `lora_A`
    (G·r, in_features), `lora_B` (sum of the enabled splits' sizes, r), with DoRA `lora_magnitude` (the same sum).

    Input (..., in_features); returns (..., out_features).

    Raises:
        ValueError: `splits` do not add up to `out_features`, `enable_lora` does not fit them or divide it, or
            `r`, `lora_alpha` or `lora_dropout` is out of range.

    From "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.2.

    >>> import torch, lora
    >>> qkv = lora.MergedLinear(64, 64 + 16 + 16, r=4, enable_lora=[True, False, True], splits=(64, 16, 16))
    >>> qkv.lora_A.shape, qkv.lora_B.shape
    (torch.Size([8, 64]), torch.Size([80, 4]))
    >>> qkv(torch.ones(2, 5, 64)).shape
    torch.Size([2, 5, 96])
    """

    dense = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: bool | Sequence[bool | int] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        splits: Sequence[int] | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: Init = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, device=device, dtype=dtype, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self._transpose_weight()
        fused = split_settings(out_features, splits, enable_lora)
        self.attach(r, lora_alpha, lora_dropout, merge_weights, use_rslora, use_dora, init_lora_weights, **fused)
        self.reset_parameters()
