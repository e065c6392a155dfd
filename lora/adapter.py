"""An adapter without its model: tensors, and what it takes to use them; its file, and what makes it sound."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from lora.layer import join

VERSION = 1
PARAMETERS = ("lora_A", "lora_B")


class AdapterError(ValueError):
    """An adapter cannot be saved or loaded; the message lists every reason.

    >>> import lora
    >>> issubclass(lora.AdapterError, ValueError)
    True
    """


@dataclass(frozen=True)
class Adapter:
    """What LoRA trained in a model.

    Attributes:
        modules: for each adapted module, by name, the settings that define its adapter, its `scaling`, and a
            `sample` of its base weight.
        tensors: by their names in the model, the adapters' and those that trained in full.
        trained_in_full: names of the tensors that replace the base model's.
    """

    modules: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]
    trained_in_full: list[str] = field(default_factory=list)

    def problems(self) -> Iterator[str]:
        """Everything that is wrong with the adapter, whatever the model."""
        expected = {join(module, name) for module in self.modules for name in PARAMETERS}.union(self.trained_in_full)
        yield from (f"{name} is missing." for name in sorted(expected - self.tensors.keys()))
        yield from (f"{name} is unexpected." for name in sorted(self.tensors.keys() - expected))
        if not self.modules:
            yield "it adapts no module."
        for name, settings in self.modules.items():
            scaling = settings.get("scaling")
            if not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
                yield f"{name} has no scaling: it must be a finite number, got {scaling!r}."
        for name, tensor in self.tensors.items():
            if name not in self.trained_in_full and not tensor.is_floating_point():
                yield f"{name} must hold floating-point numbers, got {tensor.dtype}."
            if tensor.numel() == 0:
                yield f"{name} is empty: its shape is {tuple(tensor.shape)}."
            elif tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                yield f"{name} holds NaN or infinity."


def write(adapter: Adapter, path: Path) -> None:
    """Write an adapter to a safetensors file: the old file or the new one is there, whenever this is killed."""
    about = {"version": VERSION, "modules": adapter.modules, "trained_in_full": adapter.trained_in_full}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors.items()}
    content = safetensors.torch.save(tensors, {"format": "pt", "lora": json.dumps(about)})
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path) -> Adapter:
    """Read what `write` wrote; AdapterError if it is something else."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no adapter file {path}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path} is not a safetensors file: {error}.") from None
    if "lora" not in metadata:
        raise AdapterError(
            f"{path} has no scaling: its metadata has no entry 'lora', which `lora.save_adapter` writes."
        )
    try:
        about = json.loads(metadata["lora"])
        version, modules, trained_in_full = about["version"], about["modules"], about["trained_in_full"]
        sound = isinstance(trained_in_full, list) and all(isinstance(m, dict) for m in modules.values())
    except (ValueError, TypeError, KeyError, AttributeError):
        version, sound = VERSION, False
    if version != VERSION:
        raise AdapterError(f"{path} is an adapter of version {version!r}; this release reads version {VERSION}.")
    if not sound:
        raise AdapterError(f"{path} is not an adapter: what its metadata says under 'lora' is not what belongs there.")
    return Adapter(modules, tensors, trained_in_full)


def raise_all(what: str, problems: Iterator[str] | list[str]) -> None:
    """Raise one AdapterError that lists every problem, if there is any."""
    problems = list(problems)
    if problems:
        raise AdapterError(f"{what}, because\n" + "\n".join(f"  - {problem}" for problem in problems))
