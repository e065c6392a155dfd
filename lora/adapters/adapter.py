"""An adapter without its model: tensors, what it takes to use them, and what makes it sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lora.adapters.base import Base, Record, rest_problems
from lora.errors import join, short
from lora.layers.layer import LoRALayer
from lora.layers.parts import Stack
from lora.layers.registry import kind_for
from lora.layers.settings import alpha_of, scaling_problem, settings_problems
from lora.models.injection import Adaptation, adapt

PARAMETERS = ("lora_A", "lora_B")
MAGNITUDE = "lora_magnitude"
#: The settings that say how A and B are cut into blocks: they must agree between a file and a model.
FORM = ("splits", "enable_lora", "factored")
_GENERAL = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ---- one module ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class ModuleAdapter(Record):
    """One module's adapter but for its tensors: what gives A and B their meaning.

        ΔW = scaling · B A        scaling = lora_alpha / r  (rsLoRA: lora_alpha / √r), unless it was set otherwise

    Reads as a mapping, too: `adapter.modules[name]["r"]`. To change one, `dataclasses.replace` makes another.

    Attributes:
        r, lora_alpha, lora_dropout, use_rslora, use_dora: as in `lora.Linear`.
        splits, enable_lora: as in `lora.MergedLinear`; None for other kinds.
        factored: as in `lora.Conv2d`; None for other kinds.
        scaling: s, which B A is multiplied by.
        base: what is known of the base weight.

    >>> import lora
    >>> base = {"kind": "linear", "shape": [2, 3]}
    >>> said = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "scaling": 2.0, "base": base}
    >>> module = ModuleAdapter.from_mapping(said)
    >>> module.r, module["base"]["shape"], module.at_rank(6).lora_alpha
    (4, (2, 3), 12.0)
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool = False
    splits: tuple[int, ...] | None = None
    enable_lora: tuple[bool, ...] | None = None
    factored: bool | None = None
    scaling: float
    base: Base

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_dora is None:  # as files may say
            object.__setattr__(self, "use_dora", False)
        base: Any = self.base
        if isinstance(base, Mapping) and not isinstance(base, Base):
            object.__setattr__(self, "base", Base.from_mapping(base))

    @classmethod
    def of(cls, layer: LoRALayer) -> ModuleAdapter:
        """That of a layer, without its tensors."""
        settings = {name: getattr(layer, name) for name in layer.lora_settings if name != "merge_weights"}
        return cls.from_mapping({**settings, "scaling": layer.lora_scaling, "base": Base.of(layer)})

    @cached_property
    def _entries(self) -> dict[str, Any]:
        form = {option: value for option, value in self.form.items() if value is not None}
        return {**self.general, **form, **self.more, "scaling": self.scaling, "base": self.base}

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the module's own tensors in an adapter."""
        return (*PARAMETERS, MAGNITUDE) if self.use_dora else PARAMETERS

    @property
    def general(self) -> dict[str, Any]:
        """The settings that every kind of layer has."""
        return {option: getattr(self, option) for option in _GENERAL}

    @property
    def form(self) -> dict[str, Any]:
        """How A and B are cut into blocks: `splits`, `enable_lora`, `factored`; None where one does not apply."""
        return {option: getattr(self, option) for option in FORM}

    def at_rank(self, r: int) -> ModuleAdapter:
        """The same at another rank: the scaling is kept, and `lora_alpha` is what gives it."""
        return replace(self, r=r, lora_alpha=alpha_of(self.scaling, r, self.use_rslora))

    def with_scaling_one(self, r: int) -> ModuleAdapter:
        """The same at another rank and with a scaling of 1, by `lora_alpha` = r."""
        return replace(self, r=r, lora_alpha=r, use_rslora=False, scaling=1.0)

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings, whatever the model."""
        yield from settings_problems(self.r, self.lora_alpha, self.lora_dropout)
        if self.r == 0:
            yield "`r` must be at least 1, got 0."
        if not isinstance(self.use_rslora, bool):
            yield f"`use_rslora` must be true or false, got {short(self.use_rslora)}."
        if problem := scaling_problem(self.scaling):
            yield problem
        for option in ("splits", "enable_lora"):
            value = getattr(self, option)
            if value is not None and not (isinstance(value, tuple) and all(isinstance(each, int) for each in value)):
                yield f"`{option}` must be a list of numbers, got {short(value)}."
        for option in ("factored", "use_dora"):
            if not isinstance(getattr(self, option), (bool, type(None))):
                yield f"`{option}` must be true or false, got {short(getattr(self, option))}."
        if isinstance(self.base, Base):
            yield from self.base.problems()
        else:
            yield f"`base` must describe the base weight, got {short(self.base)}."

    def layer(self, A: Tensor, B: Tensor, magnitude: Tensor | None = None) -> LoRALayer:
        """A LoRA layer with these tensors, whose base weight has a shape and no values.

        Its `lora_delta(A, B)` is B A in the shape of the base weight; given a `weight`, `lora_merge_into` adds to it.

        Args:
            A, B: the adapter's tensors; they are shared.
            magnitude: that of DoRA, shared as well. Default: None, the layer without it.

        Raises:
            ValueError: the kind of layer is a user's own, or settings and shapes do not fit each other.
        """
        make = _MAKE.get(self.base.kind)
        if make is None:
            raise ValueError(f"is of the kind {self.base.kind}, which only its model knows.")
        shape = self._shape_by(A, B) if self.base.shape is None else self.base.shape
        sizes, said = (3, "three") if self.base.kind == "stack" else (2, "two")
        if self.base.kind != "conv" and len(shape) != sizes:
            raise ValueError(f"`base` must have a shape of {said} sizes for {self.base.kind!r}, got {short(shape)}.")
        module = make(shape, self.base)
        kind = kind_for(type(module))
        assert kind is not None, "these are torch's own"
        kind, own = kind.lora_configure(module, **self.form)
        for name, tensor, expected in zip(PARAMETERS, (A, B), kind.lora_shapes(module, self.r, **own), strict=True):
            _check_shape(name, tensor, tuple(expected))
        adapt([Adaptation(module, kind, {**self.general, **own, "use_dora": magnitude is not None})])
        assert isinstance(module, LoRALayer), "it was adapted"
        module.lora_scaling = float(self.scaling)
        module.lora_A, module.lora_B = nn.Parameter(A, False), nn.Parameter(B, False)
        if magnitude is not None:
            _check_shape(MAGNITUDE, magnitude, tuple(module.lora_magnitude.shape))
            module.lora_magnitude = nn.Parameter(magnitude, False)
        if self.base.fan_in_fan_out and self.base.kind == "linear":
            module.fan_in_fan_out = True
            module.weight = nn.Parameter(module.weight.T, False)
        return module

    def single(self, A: Tensor, B: Tensor) -> Form:
        """Settings, A and B of the same update as one linear layer's, embedding's or factored convolution's.

            merged linear, G splits      A as it is, (G·r, in);  B block-diagonal, (out, G·r), zero where not enabled
            loralib's convolutions       A and B in blocks, rank r·k² in two dimensions, times groups²
            stacks of matrices           so for each matrix

        The scaling stays; `lora_alpha` grows with the rank.

        Raises:
            ValueError: as `layer`.
        """
        A, B = self.layer(A, B).lora_single(A, B)
        factored = True if self.base.kind == "conv" else None
        r = A.shape[1 if self.base.kind == "stack" else 0]
        return replace(self, splits=None, enable_lora=None, factored=factored).at_rank(r), A, B

    def _shape_by(self, A: Tensor, B: Tensor) -> tuple[int, ...]:
        """The shape of a packed base weight, which its description leaves open."""
        if self.base.kind == "conv":
            raise ValueError("`base` must have a shape for a convolution.")
        if self.base.kind == "stack":
            sizes = (B.shape[1], A.shape[-1])
            return (B.shape[0], *(sizes[::-1] if self.base.fan_in_fan_out else sizes))
        outputs, inputs = sum(self.splits or (B.shape[0],)), A.shape[1]
        transposed = self.base.kind == "embedding" or self.base.fan_in_fan_out
        return (inputs, outputs) if transposed else (outputs, inputs)


Form = tuple[ModuleAdapter, Tensor, Tensor]  # with its A and B


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have the shape {expected}, got {tuple(tensor.shape)}.")


def _linear(shape: tuple[int, ...], base: Base) -> nn.Module:
    out_features, in_features = reversed(shape) if base.fan_in_fan_out else shape
    return nn.Linear(in_features, out_features, bias=False, device="meta")


def _embedding(shape: tuple[int, ...], base: Base) -> nn.Module:
    num_embeddings, embedding_dim = shape
    return nn.Embedding(num_embeddings, embedding_dim, device="meta")


def _conv(shape: tuple[int, ...], base: Base) -> nn.Module:
    out_channels, in_channels, *kernel = shape
    classes: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    if len(kernel) not in classes or out_channels % base.groups:
        raise ValueError(f"no convolution has a weight of shape {shape} and {base.groups} groups.")
    sizes = in_channels * base.groups, out_channels, tuple(kernel)
    return classes[len(kernel)](*sizes, groups=base.groups, bias=False, device="meta")


def _stack(shape: tuple[int, ...], base: Base) -> nn.Module:
    owner = nn.Module()
    owner.is_transposed = bool(base.fan_in_fan_out)  # type: ignore[assignment]
    owner.is_concatenated = not base.interleaved  # type: ignore[assignment]
    owner.experts = nn.Parameter(torch.empty(shape, device="meta"), False)
    return Stack(owner, "experts")


_MAKE: dict[str, Callable[[tuple[int, ...], Base], nn.Module]] = {
    "linear": _linear,
    "embedding": _embedding,
    "conv": _conv,
    "stack": _stack,
}


# ---- all modules -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """What LoRA trained in a model: tensors, and what it takes to use them, without the model.

    `lora.read_adapter` and `lora.write_adapter` read and write one, in any format; `lora.load_adapter` puts it into
    a model.

    Attributes:
        modules: for each adapted module, by name, the settings that define its adapter, its `scaling`, and `base`,
            what is known of its base weight. Mappings that are given are made ModuleAdapters.
        tensors: by their names in the model, the adapters' and those that trained in full.
        trained_in_full: names of the tensors that replace the base model's.
        modules_to_save: names of the modules that train in full.
        kept: names of those in `trained_in_full` that did not train, and that the base model's own files lack:
            embeddings that were resized, and buffers that training moved.
        rest: what is known of the base model's other parameters and buffers, by name: `shape` and `sample`.
        base_model: what the base model is called, if that is known.
        format: the format of the file that it was read from: "lora", "peft", "loralib", "diffusers", ….

    >>> import torch, lora
    >>> settings = {"r": 1, "lora_alpha": 2, "lora_dropout": 0.0, "use_rslora": False, "scaling": 2.0}
    >>> settings["base"] = {"kind": "linear", "shape": [2, 3]}
    >>> tensors = {"up.lora_A": torch.ones(1, 3), "up.lora_B": torch.ones(2, 1)}
    >>> lora.Adapter({"up": settings}, tensors).delta("up")
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    """

    modules: dict[str, ModuleAdapter]
    tensors: dict[str, Tensor]
    trained_in_full: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    base_model: str | None = None
    format: str = "lora"
    kept: list[str] = field(default_factory=list)
    rest: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [name for name, module in self.modules.items() if not isinstance(module, Mapping)]
        if wrong:
            raise TypeError(f"`modules` must map names to mappings of settings, not so for {', '.join(wrong)}.")
        made = {
            name: module if isinstance(module, ModuleAdapter) else ModuleAdapter.from_mapping(module)
            for name, module in self.modules.items()
        }
        object.__setattr__(self, "modules", made)

    def __repr__(self) -> str:
        parameters = sum(tensor.numel() for tensor in self.tensors.values())
        return f"Adapter(modules={len(self.modules)}, parameters={parameters}, format={self.format!r})"

    def layer(self, name: str) -> LoRALayer:
        """A module's adapter as a LoRA layer by itself, whose base weight has no values; ValueError if it cannot be."""
        return self.modules[name].layer(*self.pair(name), self.magnitude(name))

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of one module."""
        return self.tensors[join(name, "lora_A")], self.tensors[join(name, "lora_B")]

    def magnitude(self, name: str) -> Tensor | None:
        """The magnitudes of one module, if it has some (DoRA)."""
        return self.tensors.get(join(name, MAGNITUDE))

    def delta(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """s · B A of one module, in the shape of its base weight and in this dtype; with DoRA it is not all."""
        layer = self.layer(name)
        return layer.lora_delta(layer.lora_A.to(dtype), layer.lora_B.to(dtype)) * layer.lora_scaling

    def problems(self) -> Iterator[str]:
        """Everything that is wrong with the adapter, whatever the model."""
        others = [name for name, module in self.modules.items() if not isinstance(module, ModuleAdapter)]
        if others:  # put there later
            yield f"`modules` must hold ModuleAdapters, as `lora.Adapter(…)` makes of mappings; not so {short(others)}."
            return
        full = {*self.trained_in_full}
        expected = {*full}
        for name, module in self.modules.items():
            expected |= {join(name, own) for own in module.parameters}
        yield from (f"{name} is missing." for name in sorted(expected - self.tensors.keys()))
        yield from (f"{name} is unexpected." for name in sorted(self.tensors.keys() - expected))
        for name in sorted({*self.kept} - full):
            yield f"{name} is in `kept`, and must be in `trained_in_full`, too."
        yield from rest_problems(self.rest)
        if not self.modules:
            yield "it adapts no module."
        for name, module in self.modules.items():
            yield from (f"{name}: {problem}" for problem in module.problems())
        for name, tensor in self.tensors.items():
            if name not in full:
                yield from dtype_problems(name, tensor)
            yield from _value_problems(name, tensor, mask_like=name in full)


def _value_problems(name: str, tensor: Tensor, mask_like: bool) -> Iterator[str]:
    """`mask_like` tensors are those of whole modules, whose buffers may be empty, or hold -inf to mask with."""
    if tensor.is_meta:
        yield f"{name} has no values, being on the meta device."
    elif tensor.numel() == 0:
        if not mask_like:
            yield f"{name} is empty: its shape is {tuple(tensor.shape)}."
    elif tensor.dtype in _DTYPES:
        wrong = tensor.isnan() | tensor.isposinf() if mask_like else ~tensor.isfinite()
        if bool(wrong.any()):
            yield f"{name} holds NaN or infinity."


def dtype_problems(name: str, tensor: Tensor) -> Iterator[str]:
    """Why A, B or a magnitude cannot be computed with, if so."""
    if not tensor.is_floating_point():
        yield f"{name} must hold floating-point numbers, got {tensor.dtype}."
    elif tensor.dtype not in _DTYPES:
        yield f"{name} must be of dtype {', '.join(map(str, _DTYPES))}, got {tensor.dtype}."
