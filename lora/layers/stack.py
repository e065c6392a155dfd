"""LoRA for stacks of matrices: the experts of a mixture, as one parameter of three dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lora.functional.fused import exact_dtype, without_autocast
from lora.layers.in_place_stack import LowRankStack
from lora.layers.kind import Shape
from lora.layers.layer import LoRALayer
from lora.layers.linear import split_settings
from lora.layers.parts import Stack
from lora.layers.registry import Kind, register


class StackLoRA(LoRALayer):
    """The kind for a weight (E, out, in), of which each matrix has an update of its own: A (E, r, in), B (E, out, r).

        W_e = g_e ⊙ (W₀_e + s · B_e A_e)

    Where `fan_in_fan_out` the weight is stored as (E, in, out), as by transformers' experts with `is_transposed`. With
    DoRA each output of each matrix has a magnitude: `lora_magnitude` (E · out).
    """

    lora_value = LowRankStack
    lora_rank_dims = 1, 2

    #: The weight is stored as (E, in, out).
    fan_in_fan_out: bool = False

    @classmethod
    def lora_configure(cls, base: nn.Module, **wanted: Any) -> tuple[Kind, dict[str, Any]]:
        settings: dict[str, Any] = {"fan_in_fan_out": bool(getattr(base, "is_transposed", False))}
        splits, enable_lora = wanted["splits"], wanted["enable_lora"]
        if splits is None and enable_lora is None:
            return cls, settings
        weight: Any = base.weight
        out = weight.shape[2 if settings["fan_in_fan_out"] else 1]
        settings |= split_settings(out, splits, True if enable_lora is None else enable_lora)
        if not any(settings["enable_lora"]):
            raise ValueError("`enable_lora` enables no split; leave the parameter out instead.")
        return SplitStackLoRA, settings | {"interleaved": not getattr(base, "is_concatenated", True)}

    @classmethod
    def lora_shapes(cls, base: Any, r: int, fan_in_fan_out: bool = False, **settings: Any) -> tuple[Shape, Shape]:
        count, rows, columns = base.weight.shape
        out, in_ = (columns, rows) if fan_in_fan_out else (rows, columns)
        return (count, r, in_), (count, out, r)

    def lora_down(self, x: Tensor, A: Tensor) -> Tensor:
        return torch.matmul(x, A.mT)  # (E, n, in) -> (E, n, r)

    def lora_up(self, h: Tensor, B: Tensor) -> Tensor:
        return torch.matmul(h, B.mT)  # (E, n, r) -> (E, n, out)

    def lora_delta(self, A: Tensor, B: Tensor) -> Tensor:
        return self.lora_stored(self.lora_wide(B) @ A)

    def lora_wide(self, B: Tensor) -> Tensor:
        """B for all outputs, (E, out, number of A's rows)."""
        return B

    def lora_stored(self, weight: Tensor) -> Tensor:
        """(E, out, in) as the base stores it, or back again."""
        return weight.mT if self.fan_in_fan_out else weight

    def lora_add_update(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        self.lora_stored(weight).baddbmm_(self.lora_wide(B), A, alpha=self.lora_scaling)
        return weight

    def lora_merge_into(self, out: Tensor) -> Tensor:
        """One matrix at a time: a second stack, in float32, might not have room."""
        exact = exact_dtype(out.dtype)
        gains = self.lora_output_gains().to(exact) if self.use_dora else None
        wide = self.lora_wide(self.lora_B)
        weight = self.lora_stored(self.lora_base_weight())
        with without_autocast(out.device):
            for e, (W, W0) in enumerate(zip(self.lora_stored(out), weight, strict=True)):
                A, B = self.lora_A[e].to(exact), wide[e].to(exact)
                sum_ = W0.to(exact, copy=True).addmm_(B, A, alpha=self.lora_scaling)
                W.copy_(sum_ if gains is None else sum_.mul_(gains[e, :, None]))
        return out

    def reset_lora_parameters(self) -> None:
        # Of one matrix below the other: of three dimensions torch takes all but the first for the inputs.
        nn.init.kaiming_uniform_(self.lora_A.flatten(0, 1), a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @classmethod
    def lora_magnitudes(cls, base: nn.Module, shape_B: Shape) -> int:
        return shape_B[0] * shape_B[1]

    def lora_output_dims(self) -> tuple[int, int]:
        return (2 if self.fan_in_fan_out else 1), -1

    def lora_gain(self, dtype: torch.dtype) -> Tensor:
        return self.lora_stored(self.lora_output_gains().to(dtype)[..., None])

    def lora_output_gains(self) -> Tensor:
        """g of all outputs, (E, out)."""
        return self.lora_gains().view(self.lora_B.shape[:2])

    def lora_flat(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return A.flatten(0, 1), B.flatten(0, 1)  # (E · r, in), (E · out, r)

    def lora_formed(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self.lora_A)
        return A.view(count, -1, A.shape[1]), B.view(count, -1, B.shape[1])

    def lora_block_rows(self) -> list[int]:
        count, out, _ = self.lora_B.shape
        return [out] * count

    def lora_weight_blocks(self, weight: Tensor) -> Sequence[Tensor]:
        return self.lora_stored(weight).unbind()

    def lora_remove(self, restore_layout: bool = True) -> None:
        for name in ("fan_in_fan_out", "interleaved"):
            self.__dict__.pop(name, None)
        super().lora_remove(restore_layout)


class SplitStackLoRA(StackLoRA):
    """The kind for stacks whose outputs are several in one, as gate and up: each of G enabled splits has its own A.

    A (E, G·r, in), B (E, sizes of the enabled splits, r). Where `interleaved` the outputs of equal splits alternate, as
    in GPT-OSS.
    """

    splits: tuple[int, ...] = ()
    enable_lora: tuple[bool, ...] = ()
    interleaved: bool = False

    lora_settings = (*LoRALayer.lora_settings, "splits", "enable_lora")

    @classmethod
    def lora_shapes(cls, base: Any, r: int, fan_in_fan_out: bool = False, **settings: Any) -> tuple[Shape, Shape]:
        (count, _, in_), (_, out, _) = super().lora_shapes(base, r, fan_in_fan_out)
        splits, enable_lora = settings["splits"], settings["enable_lora"]
        if sum(splits) != out or any(size <= 0 for size in splits):
            raise ValueError(f"`splits` (={splits}) must be positive and add up to {out}, the outputs of each matrix.")
        if len(enable_lora) != len(splits):
            raise ValueError(f"`enable_lora` (={enable_lora}) must have one entry for each of the splits {splits}.")
        if settings["interleaved"] and len({*splits}) > 1:
            raise ValueError(f"`splits` (={splits}) must be of one size, since the module has their outputs alternate.")
        return (count, r * sum(enable_lora), in_), (count, sum(compress(splits, enable_lora)), r)

    def lora_wide(self, B: Tensor) -> Tensor:
        G, r = sum(self.enable_lora), B.shape[2]
        blocks = enumerate(torch.split(B, [*compress(self.splits, self.enable_lora)], 1))
        return self._placed([F.pad(block, (g * r, (G - 1 - g) * r)) for g, block in blocks], 0.0)

    def lora_output_gains(self) -> Tensor:
        gains = self.lora_gains().view(*self.lora_B.shape[:2], 1)
        return self._placed([*torch.split(gains, [*compress(self.splits, self.enable_lora)], 1)], 1.0)[..., 0]

    def _placed(self, parts: Sequence[Tensor], other: float) -> Tensor:
        """Rows (E, size, n) of the enabled splits among those of all outputs, (E, out, n)."""
        left, (count, _, n) = iter(parts), parts[0].shape
        every = [
            next(left) if enabled else parts[0].new_full((count, size, n), other)
            for size, enabled in zip(self.splits, self.enable_lora, strict=True)
        ]
        return torch.stack(every, 2).flatten(1, 2) if self.interleaved else torch.cat(every, 1)

    def lora_single(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return A, self.lora_wide(B)

    def lora_block_rows(self) -> list[int]:
        return [*compress(self.splits, self.enable_lora)] * len(self.lora_B)

    def lora_weight_blocks(self, weight: Tensor) -> Sequence[Tensor]:
        return [rows for matrix in super().lora_weight_blocks(weight) for rows in self._rows_of(matrix)]

    def _rows_of(self, matrix: Tensor) -> Iterator[Tensor]:
        """The rows (size, in) of each enabled split of a matrix."""
        n = len(self.splits)
        parts = [matrix[g::n] for g in range(n)] if self.interleaved else torch.split(matrix, [*self.splits])
        return compress(parts, self.enable_lora)


register(Stack, StackLoRA)
