"""torchao: subclasses of tensor that stand as the weight of nn.Linear."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lora.layers.weights import Packing


def _granularity(weight: Any) -> Any:
    """The blocks of values that share a scale, as torchao's functions take them."""
    return importlib.import_module("torchao.quantization.granularity").PerBlock(tuple(weight.block_size))


def _mapping(weight: Any) -> Any:
    """Whether the range of the values is taken to lie evenly around zero."""
    types = importlib.import_module("torchao.quantization").MappingType
    is_even = weight.zero_point is None or not weight.zero_point.any()
    return types.SYMMETRIC if is_even else types.ASYMMETRIC


def _int8(weight: Any, dense: Tensor) -> Any:
    inputs = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")
    return type(weight).from_hp(
        dense,
        _granularity(weight),
        _mapping(weight),
        reduce_range=weight.reduce_range,
        **{name: getattr(weight, name) for name in inputs},
    )


def _float8(weight: Any, dense: Tensor) -> Any:
    return type(weight).from_hp(
        dense,
        weight.qdata.dtype,
        _granularity(weight),
        mm_config=weight.mm_config,
        kernel_preference=weight.kernel_preference,
        act_quant_kwargs=weight.act_quant_kwargs,
    )


def _intx(weight: Any, dense: Tensor) -> Any:
    return type(weight).from_hp(
        dense,
        tuple(weight.block_size),
        weight.target_dtype,
        mapping_type=_mapping(weight),
        activation_quantization=weight.activation_quantization,
    )


def _read(module: Any) -> Tensor:
    dense: Tensor = module.weight.dequantize()
    return dense


def _write(quantize: Callable[[Any, Tensor], Any], module: Any, dense: Tensor) -> None:
    weight = module.weight
    fresh = quantize(weight, dense.to(weight.device, weight.dtype))
    fresh.scale = fresh.scale.to(weight.scale.dtype)
    weight.copy_(fresh)


def _why_not_train(module: Any) -> str | None:
    weight = module.weight
    if all(getattr(weight, name, None) is None for name in ("act_quant_kwargs", "activation_quantization")):
        return None
    return (
        f"its weight, a torchao {type(weight).__name__}, quantises the layer's input as well, and gives no gradient "
        "for it: layers before this one would train on what goes past W₀ only; quantise the weight alone."
    )


def _read_nf4(module: Any) -> Tensor:
    dense: Tensor = module.weight.get_original_weight()
    return dense


def _write_nf4(module: Any, dense: Tensor) -> None:
    module.weight.copy_(dense.to(module.weight.device, module.weight.dtype))  # quantises it


INT8, FLOAT8, INTX = (
    Packing(_read, functools.partial(_write, quantize), _why_not_train) for quantize in (_int8, _float8, _intx)
)
NF4 = Packing(_read_nf4, _write_nf4)
