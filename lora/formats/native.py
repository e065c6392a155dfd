"""lora's own format: one safetensors file, with everything that its tensors mean in the metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from lora.adapter import Adapter, AdapterError

VERSION = 2
_ABOUT = ("modules", "trained_in_full", "modules_to_save", "base_model")


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
        version, (modules, *names, base_model) = about["version"], (about[part] for part in _ABOUT)
        sound = isinstance(modules, dict) and all(isinstance(settings, dict) for settings in modules.values())
        sound = sound and isinstance(base_model, (str, type(None)))
        sound = sound and all(isinstance(part, list) and all(isinstance(n, str) for n in part) for part in names)
    except (ValueError, TypeError, KeyError, RecursionError):
        version, sound = VERSION, False
    if version != VERSION:
        raise AdapterError(f"{path} is an adapter of version {version!r}; this release reads version {VERSION}.")
    if not sound:
        raise AdapterError(f"{path} is not an adapter: what its metadata says under 'lora' is not what belongs there.")
    trained_in_full, modules_to_save = names
    return Adapter(modules, tensors, trained_in_full, modules_to_save, base_model)
