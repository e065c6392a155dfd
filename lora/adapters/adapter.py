"""An adapter without its model: tensors, what it takes to use them, and what makes it sound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora.adapters import fingerprint
from lora.adapters.bare import bare_layer
from lora.adapters.rest import rest_problems
from lora.errors import is_number, join
from lora.layers.layer import LoRALayer, settings_problems

PARAMETERS = ("lora_A", "lora_B")
MAGNITUDE = "lora_magnitude"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """What LoRA trained in a model: tensors, and what it takes to use them, without the model.

    `lora.read_adapter` and `lora.write_adapter` read and write one, in any format; `lora.load_adapter` puts it into
    a model.

    Attributes:
        modules: for each adapted module, by name, the settings that define its adapter, its `scaling`, and `base`,
            what is known of its base weight.
        tensors: by their names in the model, the adapters' and those that trained in full.
        trained_in_full: names of the tensors that replace the base model's.
        modules_to_save: names of the modules that train in full.
        kept: names of those in `trained_in_full` that did not train, and that the base model's own files lack:
            embeddings that were resized, and buffers that training moved.
        rest: what is known of the base model's other parameters and buffers, by name: `shape` and `sample`.
        base_model: what the base model is called, if that is known.
        format: the format of the file that it was read from: "lora", "peft" or "loralib".

    >>> import torch, lora
    >>> settings = {"r": 1, "lora_alpha": 2, "lora_dropout": 0.0, "use_rslora": False, "scaling": 2.0}
    >>> settings["base"] = {"kind": "linear", "shape": [2, 3]}
    >>> tensors = {"up.lora_A": torch.ones(1, 3), "up.lora_B": torch.ones(2, 1)}
    >>> lora.Adapter({"up": settings}, tensors).update("up")
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    """

    modules: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]
    trained_in_full: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    base_model: str | None = None
    format: str = "lora"
    kept: list[str] = field(default_factory=list)
    rest: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __repr__(self) -> str:
        parameters = sum(tensor.numel() for tensor in self.tensors.values())
        return f"Adapter(modules={len(self.modules)}, parameters={parameters}, format={self.format!r})"

    def layer(self, name: str) -> LoRALayer:
        """A module's adapter as a LoRA layer by itself, whose base weight has no values; ValueError if it cannot be."""
        return bare_layer(self.modules[name], *self.pair(name), self.magnitude(name))

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of one module."""
        return self.tensors[join(name, "lora_A")], self.tensors[join(name, "lora_B")]

    def magnitude(self, name: str) -> Tensor | None:
        """The magnitudes of one module, if it has some (DoRA)."""
        return self.tensors.get(join(name, MAGNITUDE))

    def update(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """s · B A of one module, in the shape of its base weight and in this dtype; with DoRA it is not all."""
        layer = self.layer(name)
        return layer.delta(layer.lora_A.to(dtype), layer.lora_B.to(dtype)) * layer.scaling

    def problems(self) -> Iterator[str]:
        """Everything that is wrong with the adapter, whatever the model."""
        expected = {*self.trained_in_full}
        for module, settings in self.modules.items():
            expected |= {join(module, name) for name in parameters_of(settings)}
        yield from (f"{name} is missing." for name in sorted(expected - self.tensors.keys()))
        yield from (f"{name} is unexpected." for name in sorted(self.tensors.keys() - expected))
        for name in sorted({*self.kept} - {*self.trained_in_full}):
            yield f"{name} is in `kept`, and must be in `trained_in_full`, too."
        yield from rest_problems(self.rest)
        if not self.modules:
            yield "it adapts no module."
        for name, settings in self.modules.items():
            yield from _setting_problems(name, settings)
        for name, tensor in self.tensors.items():
            if name not in self.trained_in_full:
                yield from _dtype_problems(name, tensor)
            yield from _value_problems(name, tensor, mask_like=name in self.trained_in_full)


def parameters_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a module's own tensors in an adapter."""
    return (*PARAMETERS, MAGNITUDE) if settings.get("use_dora") else PARAMETERS


def _setting_problems(name: str, settings: dict[str, Any]) -> Iterator[str]:
    r, use_rslora = settings.get("r"), settings.get("use_rslora")
    for problem in settings_problems(r, settings.get("lora_alpha"), settings.get("lora_dropout")):
        yield f"{name}: {problem}"
    if r == 0:
        yield f"{name}: `r` must be at least 1, got 0."
    if not isinstance(use_rslora, bool):
        yield f"{name}: `use_rslora` must be true or false, got {use_rslora!r}."
    if not is_number(settings.get("scaling")):
        yield f"{name} has no scaling: it must be a finite number, got {settings.get('scaling')!r}."
    for option in ("factored", "use_dora"):
        if not isinstance(settings.get(option), (bool, type(None))):
            yield f"{name}: `{option}` must be true or false, got {settings[option]!r}."
    yield from (f"{name}: {problem}" for problem in fingerprint.problems(settings.get("base")))


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


def _dtype_problems(name: str, tensor: Tensor) -> Iterator[str]:
    if not tensor.is_floating_point():
        yield f"{name} must hold floating-point numbers, got {tensor.dtype}."
    elif tensor.dtype not in _DTYPES:
        yield f"{name} must be of dtype {', '.join(map(str, _DTYPES))}, got {tensor.dtype}."
