"""bitsandbytes: NF4, FP4 and int8 layers, which quantise their weights on `.to(device)`."""

from __future__ import annotations

import copy
import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from lora.functional.codes import Coded
from lora.layers.weights import Packing


def _bitsandbytes() -> Any:
    return sys.modules["bitsandbytes"]  # whose layer it is; torch.compile does not trace an import


def _state_of_4bit(module: Any) -> Any:
    # FSDP puts a plain parameter in the weight's place, which has no state; the layer keeps it.
    return getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)


def _is_repacked(module: Any) -> bool:
    return bool(getattr(_state_of_4bit(module), "packing_format_for_cpu", False))


def _unpacked(module: Any) -> Any:
    """A copy of a repacked layer, its weight in the one form that can be read."""
    module = copy.deepcopy(module)
    module.state_dict()  # unpacks it, and leaves constants that are not quantised twice as they were, by columns
    state = _state_of_4bit(module)
    if state.absmax.dim() > 1:
        state.absmax = state.absmax.T.reshape(-1).float()
    return module


def _read_4bit(module: Any) -> Tensor:
    module = _unpacked(module) if _is_repacked(module) else module
    state = _state_of_4bit(module)
    weight: Tensor = module.weight.data
    if state is None:  # not quantised yet: that happens on `.to(device)`
        return weight.clone()
    return _bitsandbytes().functional.dequantize_4bit(weight, state)  # type: ignore[no-any-return]


def _write_4bit(module: Any, dense: Tensor) -> None:
    old, weight = _state_of_4bit(module), module.weight
    if old is None:
        weight.data.copy_(dense)
        return
    weight.data, state = _bitsandbytes().functional.quantize_4bit(
        dense.to(weight.device, torch.float32).contiguous(),
        blocksize=old.blocksize,
        compress_statistics=old.nested or getattr(old, "original_nested", False),
        quant_type=old.quant_type,
        quant_storage=getattr(old, "original_storage_type", weight.dtype),
    )
    state.dtype = getattr(old, "original_dtype", old.dtype)  # of what is read
    for owner in (weight, module):
        if hasattr(owner, "quant_state"):
            owner.quant_state = state


def _why_not_train_4bit(module: Any) -> str | None:
    if _is_repacked(module):
        return (
            "bitsandbytes has repacked its weight for inference on this CPU, as a forward in eval() does, in a form "
            "that gives no gradients for the layer's input; load the model again, and adapt it before that."
        )
    return None


def _prepare_4bit(module: Any, adapted: bool) -> None:
    # On some CPUs a forward in eval() repacks the weight for good: its constants are rounded, it computes in bfloat16,
    # and in training after that no gradient comes through it, without a word.
    if hasattr(module, "support_avx512bf16_for_cpu"):
        has = importlib.import_module("bitsandbytes.functional").has_avx512bf16
        module.support_avx512bf16_for_cpu = False if adapted else has()


def _read_codes_4bit(module: Any) -> Coded | None:
    state, weight = _state_of_4bit(module), module.weight.data
    if state is None or _is_repacked(module) or len(state.shape) != 2 or state.shape[1] % state.blocksize:
        return None
    two = weight.contiguous().view(torch.uint8).view(-1)  # the first of two codes is the high half of a byte
    values, order = state.code.float().sort()
    codes = torch.stack((two >> 4, two & 15), 1).view(tuple(state.shape)).long()
    scales, storable = state.absmax, None
    if state.nested:
        nested = _Nested(state)
        scales, storable = nested.scales(), nested.nearest
    scales = scales.float().view(state.shape[0], -1)
    return Coded(order.argsort()[codes], values, scales, state.dtype, storable, source=state)


def _write_codes_4bit(module: Any, coded: Coded) -> None:
    old, weight = coded.source, module.weight
    codes = old.code.float().argsort()[coded.codes].to(torch.uint8).view(-1, 2)
    state = copy.copy(old)
    state.absmax = _Nested(old).codes_of(coded.scales) if old.nested else coded.scales.reshape(-1)
    weight.data = (codes[:, 0] << 4 | codes[:, 1]).view(weight.dtype).view(weight.shape)
    for owner in (weight, module):
        if hasattr(owner, "quant_state"):
            owner.quant_state = state


class _Nested:
    """Constants that are quantised themselves: those that can be stored beside the old ones' own constants."""

    def __init__(self, state: Any) -> None:
        self.state, inner = state, state.state2
        self.blocks = state.shape[1] // state.blocksize  # of a row
        self.values, self.order = inner.code.float().sort()
        # Of each constant, what its code is multiplied by.
        count = state.absmax.numel()
        self.steps = inner.absmax.float().repeat_interleave(inner.blocksize)[:count].view(-1, self.blocks)

    def scales(self) -> Tensor:
        """Those that there are, by the package itself."""
        inner = _bitsandbytes().functional.dequantize_blockwise(self.state.absmax, self.state.state2)
        return inner + self.state.offset  # type: ignore[no-any-return]

    def nearest(self, scales: Tensor, block: int) -> Tensor:
        """The nearest to these of all rows' blocks of this number."""
        steps = self.steps[:, block]
        return self.values[self._places(scales, steps)] * steps + self.state.offset  # type: ignore[no-any-return]

    def codes_of(self, scales: Tensor) -> Tensor:
        """The codes of scales (rows, blocks) that can be stored."""
        codes: Tensor = self.order[self._places(scales, self.steps)]
        return codes.to(torch.uint8).view(-1)

    def _places(self, scales: Tensor, steps: Tensor) -> Tensor:
        """Where among the values each one's nearest is; of a scale that can be stored, its own."""
        near = torch.bucketize((scales - self.state.offset) / steps, self.values)
        near = near.clamp(max=len(self.values) - 1)  # also where a scale is too large for numbers, and nothing is near
        found, least = near, torch.full_like(scales, torch.inf)
        for place in (near - 1, near, near + 1):  # beside it, where a difference in the last bit may have it
            place = place.clamp(0, len(self.values) - 1)
            off = (self.values[place] * steps + self.state.offset - scales).abs()
            found, least = torch.where(off < least, place, found), torch.minimum(off, least)
        return found


def _values_of_int8(module: Any) -> tuple[Tensor, Tensor] | None:
    """The int8 values and their rows' maxima; None where the weight is not quantised, or not yet."""
    # Before the first forward the weight has them, then the layer's state has.
    owners: tuple[Any, ...] = (module.weight, getattr(module, "state", None))
    found = ((owner.CB, owner.SCB) for owner in owners if getattr(owner, "CB", None) is not None)
    return next(found, None) if module.weight.dtype == torch.int8 else None


def _read_int8(module: Any) -> Tensor:
    values, weight, bias = _values_of_int8(module), module.weight.data, getattr(module, "bias", None)
    dense: Tensor = _bitsandbytes().functional.int8_vectorwise_dequant(*values) if values else weight.clone()
    # The layer computes in the dtype of its input, which it casts its bias to; without one it does not say which.
    return dense if bias is None else dense.to(bias.dtype)


def _write_int8(module: Any, dense: Tensor) -> None:
    values = _values_of_int8(module)
    if values is None:
        module.weight.data.copy_(dense)
        return
    fresh = _bitsandbytes().functional.int8_vectorwise_quant(dense.to(values[0].device, torch.float16).contiguous())
    for old, new in zip(values, fresh, strict=False):  # into the tensors that weight and state share
        old.copy_(new)


FOUR_BIT = Packing(_read_4bit, _write_4bit, _why_not_train_4bit, _prepare_4bit, _read_codes_4bit, _write_codes_4bit)
INT8 = Packing(_read_int8, _write_int8, says_dtype=lambda module: getattr(module, "bias", None) is not None)
