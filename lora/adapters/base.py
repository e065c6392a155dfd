"""What an adapter knows of its base model: of each weight that it adapts, and a sample of every other tensor.

An adapter that is loaded into a model with another head, with other rows in its embeddings or with other running
statistics computes something else, as it does beside other weights.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, cached_property
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from lora.adapters.samples import same_sample, values_of
from lora.errors import is_count, is_number, join, short
from lora.functional.fused import is_plain, is_storage
from lora.layers import weights
from lora.layers.conv import ConvLoRA
from lora.layers.embedding import EmbeddingLoRA, renormed
from lora.layers.layer import LoRALayer
from lora.layers.linear import Conv1DLoRA, LinearLoRA, MergedConv1DLoRA, MergedLinearLoRA
from lora.layers.parts import Part
from lora.layers.registry import kind_for
from lora.layers.stack import SplitStackLoRA, StackLoRA
from lora.models.model import Names, Owned, by_tensor, is_persistent, owned_tensors, without_wrappers
from lora.models.start import is_given_back, pretrained_weight
from lora.models.training import has_moved, originals

SomeRecord = TypeVar("SomeRecord", bound="Record")

# What an adapter can be understood by without its model. Kinds that users register go by their class's name.
_KINDS: dict[type[LoRALayer], str] = {
    LinearLoRA: "linear",
    MergedLinearLoRA: "linear",
    Conv1DLoRA: "linear",
    MergedConv1DLoRA: "linear",
    EmbeddingLoRA: "embedding",
    ConvLoRA: "conv",
    StackLoRA: "stack",
    SplitStackLoRA: "stack",
}
# How many values of a base weight an adapter remembers, and by how much they may differ where a file does not say how
# exact they are, as files of before do not.
_SAMPLE, _TOLERANCE = 16, 0.01
# By how much samples may differ beyond what a cast explains: what float32 loses when a start is given back.
_SLACK = 64 * torch.finfo(torch.float32).eps
_BY_MERGING = 0.1  # a larger difference is rarely one that training has made
_LARGEST = 2**50  # values of a weight that is believed to be one
# How many values of a tensor are remembered, and the digits that tell apart all float32 numbers.
_VALUES, _DIGITS = 8, 9
_NOT_THERE = "there was no such tensor in the model that the adapter was trained in"


# ---- a weight that is adapted -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Record(Mapping[str, Any]):
    """A frozen dataclass that also reads as the mapping which stands for it in a file.

    `more` holds entries of a file that this release does not know: they are written again.
    """

    more: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    @classmethod
    def from_mapping(cls: type[SomeRecord], entries: Mapping[str, Any]) -> SomeRecord:
        """The record that a mapping stands for; it may be unsound, and what is missing without a default is None."""
        needed, own = _fields_of(cls)
        known: dict[str, Any] = dict.fromkeys(needed)
        known |= {name: entries[name] for name in own if name in entries}
        return cls(**known, more={key: value for key, value in entries.items() if key not in known})

    @cached_property
    def _entries(self) -> dict[str, Any]:
        raise NotImplementedError

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@cache
def _fields_of(cls: type[Record]) -> tuple[list[str], list[str]]:
    """The names of a record's fields: those without a default, and all."""
    own = [each for each in fields(cls) if each.name != "more"]
    return [each.name for each in own if each.default is MISSING], [each.name for each in own]


@dataclass(frozen=True, eq=False, kw_only=True)
class Base(Record):
    """What is known of a base weight: enough to recognise it, and to do without it.

    Attributes:
        kind: "linear", "embedding", "conv", "stack", or the name of a user's kind of layer.
        shape: of the weight; None where it is packed.
        dtype: of the weight, without "torch."; None if it is not known.
        fan_in_fan_out: whether a matrix, or each of a stack, is (in_features, out_features); None if it is not known.
        groups: of a convolution.
        beyond_peft: what a convolution's update does here and does not do in PEFT, in words.
        interleaved: whether the outputs of a stack's splits alternate.
        parameter: whether the layer stands for one parameter of a module, whose name is then the layer's.
        beyond_weight: what of the merged layer's function its weight alone cannot say, in words.
        sample: values from all over the weight; None where it has no plain, finite ones.
        margin: by how much a value of the sample may be off: 0 where the weight was never written; None if it is not
            known, as in files of before.
    """

    kind: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    fan_in_fan_out: bool | None = False
    groups: int = 1
    beyond_peft: str = ""
    beyond_weight: str | None = None
    parameter: bool = False
    interleaved: bool = False
    sample: tuple[float, ...] | None = None
    margin: float | None = None

    @classmethod
    def of(cls, layer: LoRALayer) -> Base:
        """What is to be remembered of a layer's base weight, as it was pretrained."""
        kind = next(c for c in type(layer).__mro__ if issubclass(c, LoRALayer) and c.lora_base_class is nn.Module)
        name = _KINDS.get(kind, kind.__name__)
        return cls(
            kind=name,
            shape=_shape_of(layer),
            dtype=str(layer.weight.dtype).removeprefix("torch."),
            fan_in_fan_out=bool(getattr(layer, "fan_in_fan_out", False)) if name in ("linear", "stack") else False,
            groups=getattr(layer, "groups", 1) if name == "conv" else 1,
            beyond_peft=beyond_peft(layer) if name == "conv" else "",
            beyond_weight=layer.lora_not_in_weight(),
            parameter=isinstance(layer, Part),
            interleaved=bool(getattr(layer, "interleaved", False)) if name == "stack" else False,
            **_sampled(layer),
        )

    @cached_property
    def _entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = {"kind": self.kind, "shape": self.shape}
        if self.dtype is not None:
            entries["dtype"] = self.dtype
        if self.kind in ("linear", "stack"):
            entries["fan_in_fan_out"] = self.fan_in_fan_out
        if self.kind == "conv":
            entries |= {"groups": self.groups, "beyond_peft": self.beyond_peft}
        if self.beyond_weight:
            entries["beyond_weight"] = self.beyond_weight
        if self.parameter:
            entries["parameter"] = True
        if self.interleaved:
            entries["interleaved"] = True
        if self.margin is not None:
            entries["margin"] = self.margin
        return {**entries, **self.more, "sample": self.sample}

    def weight_name(self, name: str) -> str:
        """The full name of the weight of a layer of this name."""
        return name if self.parameter else join(name, "weight")

    def problems(self) -> Iterator[str]:
        """What is wrong with the description, whatever the model."""
        if not isinstance(self.kind, str):
            yield f"`base` must describe the base weight, got {short(dict(self))}."
            return
        if self.kind != "conv" and self.groups != 1:
            yield f"`groups` are for convolutions, got {short(self.groups)} for {short(self.kind)}."
        if not isinstance(self.fan_in_fan_out, (bool, type(None))):
            yield f"`fan_in_fan_out` must be true, false or unknown, got {short(self.fan_in_fan_out)}."
        for fact in ("parameter", "interleaved"):
            if not isinstance(getattr(self, fact), bool):
                yield f"`{fact}` must be true or false, got {short(getattr(self, fact))}."
        shape, sample = self.shape, self.sample
        sizes = [self.groups, *(shape if isinstance(shape, tuple) else () if shape is None else [None])]
        if not all(is_count(size, 1) for size in sizes) or math.prod(sizes) > _LARGEST:
            said = f"{short(shape)} and {short(self.groups)}"
            yield f"`base` must have a shape and groups of positive integers, got {said}."
        if sample is not None and not (isinstance(sample, tuple) and all(map(is_number, sample))):
            yield f"`sample` must hold finite numbers, got {short(sample)}."
        if self.margin is not None and not (is_number(self.margin) and self.margin >= 0):
            yield f"`margin` must be a finite number of at least 0, got {short(self.margin)}."

    def check_kind(self, module: nn.Module) -> None:
        """ValueError if the module is of another kind than the one described, whose shapes may well be alike."""
        kind = type(module) if isinstance(module, LoRALayer) else kind_for(type(module))
        ours = next((_KINDS[cls] for cls in kind.__mro__ if cls in _KINDS), None) if kind else None
        if ours is not None and self.kind in _KINDS.values() and self.kind != ours:
            raise ValueError(
                f"has an adapter of the kind {short(self.kind)} in the file, and is of {ours!r} in the model."
            )

    def check(self, module: nn.Module) -> None:
        """ValueError if the module's weight is not the one described; the same in another dtype, or packed, is."""
        another = "the base weight is not the one that the adapter was trained on:"
        ours = _shape_of(module)
        if self.shape is not None and ours is not None and self.shape != ours:
            raise ValueError(f"{another} its shape is {ours}, and was {self.shape}.")
        now = replace(self, **_sampled(module))
        if self.sample is not None and now.sample is not None and len(self.sample) != len(now.sample):
            raise ValueError(f"`sample` must hold {len(now.sample)} numbers, got {len(self.sample)}.")
        difference = sample_difference(self, now)
        if difference is not None:
            merged = ", as they do where an adapter was merged into it" if difference <= _BY_MERGING else ""
            raise ValueError(
                f"{another} sampled values differ by {percent(difference)}{merged}; `check_base=False` loads it all "
                "the same."
            )


def beyond_peft(module: nn.Module) -> str:
    """What a convolution's update does here, and does not do in PEFT, which leaves it out without a word."""
    dilation, padding_mode = getattr(module, "dilation", (1,)), getattr(module, "padding_mode", "zeros")
    found = {f"dilation={dilation}": set(dilation) != {1}, f"padding_mode={padding_mode!r}": padding_mode != "zeros"}
    return " and ".join(words for words, is_so in found.items() if is_so)


def percent(share: float) -> str:
    """A share in words: whole per cent, and of less than one the first digit."""
    return f"{100 * share:.{'0f' if share >= 0.01 else '1g'}} %"


def sample_difference(theirs: Base, ours: Base) -> float | None:
    """By how much two samples differ, in parts of the larger; None if they are one weight's, or one is not known."""
    a, b = theirs.sample, ours.sample
    if a is None or b is None or a == b:
        return None
    if len(a) != len(b):
        return math.inf
    difference = math.dist(a, b) / max(math.hypot(*a), math.hypot(*b), 1e-30)
    if theirs.margin is None or ours.margin is None:
        return None if difference <= _TOLERANCE else difference  # also if it is beyond floats
    slack = theirs.margin + ours.margin + _SLACK * max(map(abs, (*a, *b)))
    return None if same_sample(a, b, slack) else difference


def _sampled(module: nn.Module) -> dict[str, Any]:
    """Values from all over the base weight as it was pretrained, and by how much they may be off.

    Of one that is packed, or only stored in its dtype, none: such are not compared.
    """
    weight: Any = module.weight
    if not _has_values(weight) or is_storage(weight.dtype):
        return {"sample": None, "margin": None}
    bounded = getattr(module, "max_norm", None) is not None  # torch writes such rows when it looks them up
    if isinstance(module, LoRALayer):
        weight = pretrained_weight(module)
    elif bounded:
        weight = renormed(module, weight.detach())
    sample = values_of(module, "weight", weight, _SAMPLE)
    if sample is None:
        return {"sample": None, "margin": None}
    # What is left when a start is taken out was rounded, and so is the sum that gives it back.
    started = isinstance(module, LoRALayer) and module.lora_start is not None
    rounded = started or bounded or is_given_back(module.weight)
    return {"sample": sample, "margin": rounded * 2 * torch.finfo(weight.dtype).eps * max(map(abs, sample))}


def _has_values(weight: Any) -> bool:
    """Whether a weight, or each rank's part of it, is a plain tensor."""
    return is_plain(weights.of(None, "weight", weight).part())


def _shape_of(layer: Any) -> tuple[int, ...] | None:
    known = weights.is_split_up(layer.weight) or _has_values(layer.weight) or layer.weight.is_meta
    return tuple(weights.whole_shape(layer.weight)) if known else None


def sample_of(weight: Tensor) -> tuple[float, ...] | None:
    """Values from all over a weight; None if it has no plain and finite ones."""
    return values_of(None, "weight", weight, _SAMPLE) if is_plain(weight) else None


# ---- all other tensors -----------------------------------------------------------------------------------------


def own_tensors(names: Names) -> Iterator[Owned]:
    """Every parameter and persistent buffer that belongs to no adapter; a tied one once for each module that has it."""
    for one in owned_tensors(names):
        if not one.is_of_adapter and is_persistent(one) and not nn.parameter.is_lazy(one.tensor):
            yield one._replace(names=tuple(map(without_wrappers, one.names)))


def trained_in_full(names: Names, only_recorded: bool = False) -> Iterator[tuple[str, nn.Module, str]]:
    """What trains, or has trained, outside the adapters: its name, its module, and what it is called there.

    A tensor with several names comes under its first.
    """
    seen: set[int] = set()
    for one in owned_tensors(names):
        known, module, own, tensor = one
        if id(tensor) in seen or one.is_of_adapter:
            continue
        in_full = own in originals(module) and own not in module._non_persistent_buffers_set
        if (in_full and has_moved(module, own)) or (tensor.requires_grad and not only_recorded):
            seen.add(id(tensor))
            yield without_wrappers(known[0]), module, own


def tied(names: Names, keys: Iterable[str]) -> Iterator[str]:
    """A complaint for each of these parameters that the model has elsewhere, too: PEFT would train a copy of it."""
    wanted = set(keys)
    for owners in by_tensor(owned_tensors(names)):
        group = [without_wrappers(one.names[0]) for one in owners]
        ours, others = [key for key in group if key in wanted], [key for key in group if key not in wanted]
        if ours and others:
            yield f"{', '.join(ours)}: tied to {', '.join(others)} in the model; PEFT would train an untied copy."


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
            owner, _, own = known[0].rpartition(".")
            found.setdefault(owner, {}).setdefault(what, []).append(own)
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


def rest_problems(rest: Any) -> Iterator[str]:
    """What is wrong with what an adapter says of the rest of its base model, whatever the model."""
    for name, about in rest.items():
        if about.keys() != {"shape", "sample"}:
            yield f"{name}: `rest` must say its shape and sample, got {', '.join(map(short, about))}."
            continue
        shape, sample = about["shape"], about["sample"]
        sizes = shape if isinstance(shape, list) else [] if shape is None else [None]
        if not all(is_count(size) for size in sizes):
            yield f"{name}: `rest` must have a shape of integers, got {short(shape)}."
        numbers = sample if isinstance(sample, list) else [] if sample is None else [None]
        if not all(map(is_number, numbers)) or len(numbers) > _VALUES:
            yield f"{name}: `rest` must have a sample of at most {_VALUES} finite numbers, got {short(sample)}."
