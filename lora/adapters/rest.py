"""What an adapter knows of its base model beside the weights that it adapts: a sample of every parameter and buffer.

An adapter that is loaded into a model with another head, with other rows in its embeddings or with other running
statistics computes something else. `fingerprint` samples the weights that are adapted; this samples all others.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lora.adapters.fingerprint import values_of
from lora.errors import is_count, is_number, join
from lora.functional.fused import is_storage
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.models.model import Names, Owned, owned_tensors, without_wrappers
from lora.models.training import originals

# How many values of a tensor are remembered, and the digits that tell apart all float32 numbers.
_VALUES, _DIGITS = 8, 9
_NOT_THERE = "there was no such tensor in the model that the adapter was trained in"
# The dtypes that models are cast to. A sample is compared to the precision of the narrowest that holds its values.
_NARROWEST_FIRST = (torch.bfloat16, torch.float16, torch.float32)


def own_tensors(names: Names) -> Iterator[Owned]:
    """Every parameter and persistent buffer that belongs to no adapter; a tied one once for each module that has it."""
    for known, module, own, tensor in owned_tensors(names):
        adapter = dict(module.lora_parameters()) if isinstance(module, LoRALayer) else {}
        if own not in {*adapter, *module._non_persistent_buffers_set} and not nn.parameter.is_lazy(tensor):
            yield Owned(tuple(map(without_wrappers, known)), module, own, tensor)


def describe(names: Names, held: Container[int], adapted: Container[str]) -> dict[str, dict[str, Any]]:
    """Shape and sample of every tensor that an adapter neither holds nor adapts, as it was before training.

    What is quantised has neither shape nor sample: only its name is known. Buffers that no state dict holds are
    computed, not pretrained, and left out.

    Args:
        names: of the model.
        held: tensors, by `id`, that the adapter holds.
        adapted: names of the weights that it adapts.
    """
    return {
        known[0]: describe_tensor(originals(module).get(own, tensor), module, own)
        for known, module, own, tensor in own_tensors(names)
        if id(tensor) not in held and not any(name in adapted for name in known)
    }


def describe_tensor(tensor: Tensor, module: nn.Module | None = None, own: str = "") -> dict[str, Any]:
    """Shape and sample of one tensor; of one that is sharded, or of which rows have moved, its module says more."""
    if weights.is_split_up(tensor):
        return {"shape": weights.whole_shape(tensor), "sample": None}
    part = weights.of(module, own, tensor).part()
    if not (type(part) in (Tensor, nn.Parameter) and part.layout is torch.strided) or part.is_nested:
        return {"shape": None, "sample": None}
    # What is only stored in its dtype, float8 say, no two tools round alike.
    known = not (part.is_complex() or part.is_quantized or is_storage(part.dtype))
    sample = values_of(module, own, tensor, _VALUES) if known and not part.is_meta else None
    values = [] if sample is None else torch.tensor(sample, dtype=torch.float32).tolist()
    finite = bool(values) and all(map(math.isfinite, values))  # a float64 may be none of float32's
    rounded = [float(f"{value:.{_DIGITS}g}") for value in values] if finite else None
    return {"shape": list(tensor.shape), "sample": rounded}


def differences(
    rest: Mapping[str, Mapping[str, Any]], names: Names, held: Container[int], adapted: Container[str]
) -> Iterator[str]:
    """A complaint for each module with tensors that are not those which an adapter was trained beside.

    Args:
        rest: what `describe` said of the model that the adapter was trained in.
        names: of the model that it is to be loaded into.
        held: tensors, by `id`, that the adapter holds.
        adapted: names of the weights that it adapts.
    """
    found: dict[str, dict[str, list[str]]] = {}
    seen: set[str] = set()
    for known, module, own, tensor in own_tensors(names):
        seen.update(known)
        name = next((name for name in known if name in rest), None)
        if any(name in adapted for name in known) or (name is None and id(tensor) in held):
            continue
        ours = describe_tensor(originals(module).get(own, tensor), module, own)
        what = _NOT_THERE if name is None else difference(rest[name], ours)
        if what:
            found.setdefault(known[0].rpartition(".")[0], {}).setdefault(what, []).append(own)
    for name in rest:
        if name not in seen:
            owner, _, own = name.rpartition(".")
            found.setdefault(owner, {}).setdefault("there is no such tensor in the model", []).append(own)
    for owner, parts in found.items():
        for what, owns in parts.items():
            yield f"{' and '.join(join(owner, own) for own in owns)}: {what}."


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """How a tensor differs from what is remembered; None if it does not, or if one of them is quantised."""
    if theirs["shape"] is None or ours["shape"] is None:
        return None
    if theirs["shape"] != ours["shape"]:
        return f"the shape is {tuple(ours['shape'])}, and was {tuple(theirs['shape'])} where the adapter was trained"
    if theirs["sample"] is None or ours["sample"] is None or same_sample(theirs["sample"], ours["sample"]):
        return None
    return "the values are not those that the adapter was trained with"


def same_sample(theirs: list[float], ours: list[float]) -> bool:
    """Whether two samples are one tensor's: equal, or one of them rounded to another dtype than the other.

    Which dtype a value was rounded to shows in the value, and outlives a cast back to float32.

    >>> same_sample([0.1, 0.7], [0.10009765625, 0.69921875])  # the second are bfloat16's
    True
    >>> same_sample([0.1, 0.7], [0.1001, 0.6992])
    False
    """
    if len(theirs) != len(ours):
        return False
    a, b = (torch.tensor(sample, dtype=torch.float32) for sample in (theirs, ours))
    of_a, of_b = _precision(a), _precision(b)
    # Rounding moves a value by half of its precision, and again if it went through another dtype.
    tolerance = 0.0 if of_a == of_b else 0.625 * (of_a + of_b)
    # Half of float16's smallest step, by which it moves what is below its normal numbers.
    smallest = 2**-25 if _holds(torch.float16, a) or _holds(torch.float16, b) else 0.0
    return bool(((a - b).abs() <= tolerance * torch.maximum(a.abs(), b.abs()) + smallest).all())


def _precision(sample: Tensor) -> float:
    """The precision of the narrowest dtype that holds these values as they are."""
    return torch.finfo(next((dtype for dtype in _NARROWEST_FIRST if _holds(dtype, sample)), torch.float32)).eps


def _holds(dtype: torch.dtype, sample: Tensor) -> bool:
    return torch.equal(sample.to(dtype).float(), sample)


def rest_problems(rest: Any) -> Iterator[str]:
    """What is wrong with what an adapter says of the rest of its base model, whatever the model."""
    for name, about in rest.items():
        if about.keys() != {"shape", "sample"}:
            yield f"{name}: `rest` must say its shape and sample, got {', '.join(map(repr, about))}."
            continue
        shape, sample = about["shape"], about["sample"]
        sizes = shape if isinstance(shape, list) else [shape] * (shape is not None)
        if not all(is_count(size) for size in sizes):
            yield f"{name}: `rest` must have a shape of integers, got {shape!r:.80}."
        numbers = sample if isinstance(sample, list) else [sample] * (sample is not None)
        if not all(map(is_number, numbers)) or len(numbers) > _VALUES:
            yield f"{name}: `rest` must have a sample of at most {_VALUES} finite numbers, got {sample!r:.80}."
