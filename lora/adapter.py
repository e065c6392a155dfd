"""An adapter without its model: tensors, and what it takes to use them; its file, and what makes it sound."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lora.layer import join
from lora.settings import is_number, settings_problems

VERSION = 1
PARAMETERS = ("lora_A", "lora_B")
_ABOUT = ("modules", "trained_in_full", "modules_to_save")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        modules_to_save: names of the modules that train in full.
    """

    modules: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]
    trained_in_full: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)

    def problems(self) -> Iterator[str]:
        """Everything that is wrong with the adapter, whatever the model."""
        expected = {join(module, name) for module in self.modules for name in PARAMETERS}.union(self.trained_in_full)
        yield from (f"{name} is missing." for name in sorted(expected - self.tensors.keys()))
        yield from (f"{name} is unexpected." for name in sorted(self.tensors.keys() - expected))
        if not self.modules:
            yield "it adapts no module."
        for name, settings in self.modules.items():
            yield from _setting_problems(name, settings)
        for name, tensor in self.tensors.items():
            if name not in self.trained_in_full:
                yield from _dtype_problems(name, tensor)
            yield from _value_problems(name, tensor, mask_like=name in self.trained_in_full)


def _setting_problems(name: str, settings: dict[str, Any]) -> Iterator[str]:
    r, use_rslora, sample = settings.get("r"), settings.get("use_rslora"), settings.get("sample")
    for problem in settings_problems(r, settings.get("lora_alpha"), settings.get("lora_dropout")):
        yield f"{name}: {problem}"
    if r == 0:
        yield f"{name}: `r` must be at least 1, got 0."
    if not isinstance(use_rslora, bool):
        yield f"{name}: `use_rslora` must be true or false, got {use_rslora!r}."
    if not is_number(settings.get("scaling")):
        yield f"{name} has no scaling: it must be a finite number, got {settings.get('scaling')!r}."
    if sample is not None and not (isinstance(sample, list) and all(map(is_number, sample))):
        yield f"{name}: `sample` must hold finite numbers, got {sample!r}."


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


def write(adapter: Adapter, path: Path) -> None:
    """Write an adapter to a safetensors file: the old file or the new one is there, whenever this is killed."""
    about = {"version": VERSION, **{part: getattr(adapter, part) for part in _ABOUT}}
    path = Path(os.path.realpath(path))  # a link stays one
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to.")
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in adapter.tensors.items():
        ready = tensor.detach().cpu().contiguous()
        storage = ready.untyped_storage().data_ptr()
        tensors[name] = ready.clone() if storage in storages else ready  # safetensors refuses shared storage
        storages.add(storage)
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
            f"{path} has no scaling: its metadata has no entry 'lora', as `lora.save_adapter` writes it."
        )
    try:
        about = json.loads(metadata["lora"])
        version, (modules, *names) = about["version"], (about[part] for part in _ABOUT)
        sound = isinstance(modules, dict) and all(isinstance(settings, dict) for settings in modules.values())
        sound = sound and all(isinstance(part, list) and all(isinstance(n, str) for n in part) for part in names)
    except (ValueError, TypeError, KeyError, RecursionError):
        version, sound = VERSION, False
    if version != VERSION:
        raise AdapterError(f"{path} is an adapter of version {version!r}; this release reads version {VERSION}.")
    if not sound:
        raise AdapterError(f"{path} is not an adapter: what its metadata says under 'lora' is not what belongs there.")
    return Adapter(modules, tensors, *names)
