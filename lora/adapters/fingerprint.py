"""What an adapter remembers of a base weight: enough to know it again, and to do without it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lora.errors import is_count, is_number
from lora.functional.fused import is_plain
from lora.layers import weights
from lora.layers.conv import ConvLoRA
from lora.layers.embedding import EmbeddingLoRA
from lora.layers.layer import LoRALayer
from lora.layers.linear import Conv1DLoRA, LinearLoRA, MergedConv1DLoRA, MergedLinearLoRA
from lora.layers.registry import kind_for
from lora.models.start import pretrained_weight

# How many values of a base weight an adapter remembers, and by how much they may differ (half precision: 0.2 %).
_SAMPLE, _TOLERANCE = 16, 0.01
_LARGEST = 2**50  # values of a weight that is believed to be one
# What an adapter can be understood by without its model. Kinds that users register go by their class's name.
_FORMS: dict[type[LoRALayer], str] = {
    LinearLoRA: "linear",
    MergedLinearLoRA: "linear",
    Conv1DLoRA: "linear",
    MergedConv1DLoRA: "linear",
    EmbeddingLoRA: "embedding",
    ConvLoRA: "conv",
}


def describe(layer: LoRALayer) -> dict[str, Any]:
    """The layer's base weight in words and a few numbers, as a file's metadata can hold them.

    `kind` is "linear", "embedding", "conv", or the name of a user's kind; `shape` that of the weight, None where it
    is packed; `dtype` and `sample`, values from all over it, None where it has no plain ones.
    """
    kind = kind_of(layer)
    form = _FORMS.get(kind, kind.__name__)
    about: dict[str, Any] = {"kind": form, "shape": _shape(layer), "dtype": str(layer.weight.dtype)[6:]}
    if form == "linear":
        about["fan_in_fan_out"] = bool(getattr(layer, "fan_in_fan_out", False))
    if form == "conv":
        about["groups"] = getattr(layer, "groups", 1)
        about["beyond_peft"] = beyond_peft(layer)
    beyond = layer.beyond_weight()
    if beyond:
        about["beyond_weight"] = beyond
    return about | {"sample": _sample(layer)}


def beyond_peft(module: nn.Module) -> str:
    """What a convolution's update does here, and does not do in PEFT, which leaves it out without a word."""
    dilation, padding_mode = getattr(module, "dilation", (1,)), getattr(module, "padding_mode", "zeros")
    found = {f"dilation={dilation}": set(dilation) != {1}, f"padding_mode={padding_mode!r}": padding_mode != "zeros"}
    return " and ".join(words for words, is_so in found.items() if is_so)


def kind_of(layer: LoRALayer) -> type[LoRALayer]:
    """The kind of layer that a LoRA layer is, whatever its base class."""
    return next(cls for cls in type(layer).__mro__ if issubclass(cls, LoRALayer) and cls.base_class is nn.Module)


def check_kind(about: dict[str, Any], module: nn.Module) -> None:
    """ValueError if the module is of another kind than the one described, whose shapes may well be alike."""
    kind = type(module) if isinstance(module, LoRALayer) else kind_for(type(module))
    ours = next((_FORMS[cls] for cls in kind.__mro__ if cls in _FORMS), None) if kind else None
    if ours is not None and about["kind"] in _FORMS.values() and about["kind"] != ours:
        raise ValueError(f"has an adapter of the kind {about['kind']!r} in the file, and is of {ours!r} in the model.")


def problems(about: Any) -> Iterator[str]:
    """What is wrong with a description, whatever the model."""
    if not isinstance(about, dict) or not isinstance(about.get("kind"), str):
        yield f"`base` must describe the base weight, got {about!r}."
        return
    shape, sample, groups = about.get("shape"), about.get("sample"), about.get("groups", 1)
    if about["kind"] != "conv" and groups != 1:
        yield f"`groups` are for convolutions, got {groups!r} for {about['kind']!r}."
    if not isinstance(about.get("fan_in_fan_out"), (bool, type(None))):
        yield f"`fan_in_fan_out` must be true, false or unknown, got {about['fan_in_fan_out']!r}."
    sizes = [groups, *shape] if isinstance(shape, list) else [groups, 1 if shape is None else shape]
    whole = all(is_count(size, 1) for size in sizes)
    if not whole or math.prod(sizes) > _LARGEST:
        yield f"`base` must have a shape and groups of positive integers, got {shape!r} and {groups!r}."
    if sample is not None and not (isinstance(sample, list) and all(map(is_number, sample))):
        yield f"`sample` must hold finite numbers, got {sample!r}."


def check(about: dict[str, Any], module: nn.Module) -> None:
    """ValueError if the module's weight is not the one described; the same in another dtype, or packed, is."""
    shape, own = about.get("shape"), _shape(module)
    if shape is not None and own is not None and shape != own:
        raise ValueError(
            f"the base weight is not the one that the adapter was trained on: its shape is {tuple(own)}, "
            f"and was {tuple(shape)}."
        )
    theirs, ours = about.get("sample"), _sample(module)
    if theirs is not None and ours is not None and len(theirs) != len(ours):
        raise ValueError(f"`sample` must hold {len(ours)} numbers, got {len(theirs)}.")
    difference = sample_difference(theirs, ours)
    if difference is not None:
        raise ValueError(
            "the base weight is not the one that the adapter was trained on: sampled values differ by "
            f"{100 * difference:.0f} %; `check_base=False` loads it all the same."
        )


def _sample(module: nn.Module) -> list[float] | None:
    """Values from all over the base weight as it was pretrained; None if it is packed: such are not compared."""
    weight: Any = module.weight
    if not _has_values(weight):
        return None
    weight = pretrained_weight(module) if isinstance(module, LoRALayer) else weight
    return values_of(module, "weight", weight, _SAMPLE)


def _has_values(weight: Any) -> bool:
    """Whether a weight, or each rank's part of it, is a plain tensor."""
    return is_plain(weights.of(None, "weight", weight).part())


def sample_difference(theirs: list[float] | None, ours: list[float] | None) -> float | None:
    """By how much two samples differ, in parts of the larger; None if they are one weight's, or one is not known."""
    if theirs is None or ours is None:
        return None
    if len(theirs) != len(ours):
        return math.inf
    difference = math.dist(theirs, ours) / max(math.hypot(*theirs), math.hypot(*ours), 1e-30)
    return None if difference <= _TOLERANCE else difference  # also if it is beyond floats


def _shape(layer: Any) -> list[int] | None:
    known = weights.is_split_up(layer.weight) or _has_values(layer.weight) or layer.weight.is_meta
    return weights.whole_shape(layer.weight) if known else None


def sample_of(weight: Tensor) -> list[float] | None:
    """Values from all over a weight; None if it has no plain and finite ones."""
    return values_of(None, "weight", weight, _SAMPLE) if is_plain(weight) else None


def values_of(module: nn.Module | None, own: str, tensor: Tensor, count: int) -> list[float] | None:
    """Values of a module's own tensor, the first, the last and others between; None if there are none, or not finite.

    `module` may be None for a tensor that is not sharded.
    """
    last = tensor.numel() - 1
    if last < 0:
        return None
    places = torch.tensor([k * last // (count - 1) for k in range(count)], device=tensor.device)
    sample: list[float] = weights.of(module, own, tensor).values_at(places).double().tolist()
    return sample if all(map(math.isfinite, sample)) else None
