"""What a forward that is not a plain layer's may do with the W of a linear layer, without W being built.

A product with it is computed beside W₀. Parts of its outputs (`W.chunk(3)`, `W.split(sizes)`) stay unbuilt, and torch's
attention, which projects with such parts, runs as it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.functional import lora_linear
from lora.functional.fused import Slices
from lora.layers.in_place import LowRankWeight
from lora.layers.vocabulary import WithVocabulary


def _check_padding(mask: Tensor, length: int, batch: int) -> None:
    if mask.shape != (batch, length):
        raise AssertionError(f"`key_padding_mask` must have the shape {(batch, length)}, got {(*mask.shape,)}.")


# torch's own function, but for two of those that it calls: its weights may be values that stand for them, which it is
# not to ask how it is computed, since `F.linear` will; and torch's check of the padding is one that no compiler traces.
_function: Any = F.multi_head_attention_forward
_others = {"has_torch_function": lambda _: False, "_check_key_padding_mask": _check_padding}
_attention: Any = FunctionType(_function.__code__, {**vars(F), **_others}, argdefs=_function.__defaults__)


class TaughtLinear(WithVocabulary):
    """The part of the kind for linear layers that computes with W unbuilt."""

    lora_taught: ClassVar[Mapping[Any, str]] = {
        F.linear: "lora_taught_linear",
        **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm), "lora_taught_matmul"),
        torch.addmm: "lora_taught_addmm",
        **dict.fromkeys((torch.chunk, Tensor.chunk), "lora_taught_chunk"),
        **dict.fromkeys((torch.split, Tensor.split), "lora_taught_split"),
        F.multi_head_attention_forward: "lora_taught_attention",
    }

    #: The weight is stored as (in_features, out_features).
    fan_in_fan_out: bool = False

    def lora_slices(self) -> list[tuple[int, int]]:
        """Begin and end of each of the G parts of the output that an update goes to."""
        raise NotImplementedError

    def lora_stored(self, weight: Tensor) -> Tensor:
        """(out_features, in_features) as the base layer stores it, or back again."""
        return weight.T if self.fan_in_fan_out else weight

    # ---- products ------------------------------------------------------------------------------------------------

    def lora_taught_linear(self, W: LowRankWeight, input: Any, weight: Any, bias: Tensor | None = None) -> Any:
        """x Wᵀ + b, for W (out_features, in_features)."""
        if weight is not W or W.transposed != self.fan_in_fan_out:
            return NotImplemented
        base, A, B, slices = self.lora_stored(W.base), W.A, W.B, self.lora_slices()
        if W.rows is not None:
            base, (A, B, slices) = base[W.rows], _within(W.rows, A, B, slices)
        if not slices:
            return F.linear(input, base, bias)
        y = lora_linear(input, base, bias, A, B, W.scaling, W.dropout, slices)
        return self.lora_magnified_beside(bias, y, W.rows) if W.gain else y

    def lora_taught_matmul(self, W: LowRankWeight, input: Any = None, weight: Any = None, **others: Any) -> Any:
        """x W, for W (in_features, out_features)."""
        if weight is not W or others or input.dim() == 1:
            return NotImplemented
        return self.lora_taught_linear(turned := W.t(), input, turned)

    def lora_taught_addmm(
        self, W: LowRankWeight, bias: Any = None, input: Any = None, weight: Any = None, **others: Any
    ) -> Any:
        """b + x W, for W (in_features, out_features)."""
        if weight is not W or others or bias.dim() != 1:
            return NotImplemented
        return self.lora_taught_linear(turned := W.t(), input, turned, bias)

    def lora_taught_attention(self, W: LowRankWeight, *args: Any, **kwargs: Any) -> Any:
        """Attention, whose projections are linear."""
        return _attention(*args, **kwargs)

    # ---- parts of the outputs ------------------------------------------------------------------------------------

    def lora_taught_chunk(self, W: LowRankWeight, weight: Any, chunks: int, dim: int = 0) -> Any:
        """W in as many parts, along its outputs."""
        return self._parts(W, dim, lambda base: base.chunk(chunks, dim))

    def lora_taught_split(self, W: LowRankWeight, weight: Any, sizes: int | Sequence[int], dim: int = 0) -> Any:
        """W in parts of these sizes, along its outputs."""
        return self._parts(W, dim, lambda base: base.split(sizes, dim))

    def _parts(self, W: LowRankWeight, dim: int, split: Any) -> Any:
        outputs = 0 if W.transposed == self.fan_in_fan_out else 1
        if dim % 2 != outputs:
            return NotImplemented
        parts, start = [], 0 if W.rows is None else W.rows.start
        for part in split(W.part()):
            stop = start + part.shape[outputs]
            parts.append(W.with_rows(slice(start, stop)))
            start = stop
        return tuple(parts)


def _within(rows: slice, A: Tensor, B: Tensor, slices: Slices) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """A, B and the slices of the outputs in a range: views of the groups that have outputs in there."""
    r, first, last, start_B = len(A) // len(slices), 0, 0, 0
    found: list[tuple[int, int]] = []
    of_A = []
    for group, (start, stop) in enumerate(slices):
        begin, end = max(start, rows.start), min(stop, rows.stop)
        if begin < end:
            first = start_B + begin - start if not found else first
            last = start_B + end - start
            of_A.append(group)
            found.append((begin - rows.start, end - rows.start))
        start_B += stop - start
    return A[of_A[0] * r : (of_A[-1] + 1) * r] if of_A else A[:0], B[first:last], found
