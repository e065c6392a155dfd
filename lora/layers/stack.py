"""LoRA for stacks of matrices: the experts of a mixture, as one parameter of three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lora.functional.fused import exact_dtype, without_autocast
from lora.layers.in_place_stack import LowRankStack
from lora.layers.kind import Shape
from lora.layers.layer import LoRALayer
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
        kind, settings = super().lora_configure(base, **wanted)
        return kind, settings | {"fan_in_fan_out": bool(getattr(base, "is_transposed", False))}

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
        return self.lora_stored(B @ A)

    def lora_stored(self, weight: Tensor) -> Tensor:
        """(E, out, in) as the base stores it, or back again."""
        return weight.mT if self.fan_in_fan_out else weight

    def lora_add_update(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        self.lora_stored(weight).baddbmm_(B, A, alpha=self.lora_scaling)
        return weight

    def lora_merge_into(self, out: Tensor) -> Tensor:
        """One matrix at a time: a second stack, in float32, might not have room."""
        exact = exact_dtype(out.dtype)
        gains = self.lora_gains().view(self.lora_B.shape[:2]).to(exact) if self.use_dora else None  # (E, out)
        weight = self.lora_stored(self.lora_base_weight())
        with without_autocast(out.device):
            for e, (W, W0) in enumerate(zip(self.lora_stored(out), weight, strict=True)):
                A, B = self.lora_A[e].to(exact), self.lora_B[e].to(exact)
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
        return self.lora_stored(self.lora_gains().to(dtype).view(*self.lora_B.shape[:2], 1))

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
        self.__dict__.pop("fan_in_fan_out", None)
        super().lora_remove(restore_layout)


register(Stack, StackLoRA)
