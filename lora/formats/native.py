"""lora's own format: one safetensors file, with everything that its tensors mean in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora.adapter import Adapter, AdapterError
from lora.formats import safe

VERSION = 2
FILE = "adapter.safetensors"  # in a folder
_ABOUT = ("modules", "trained_in_full", "modules_to_save", "base_model")


def write(adapter: Adapter, path: Path) -> None:
    """Write an adapter to a safetensors file: the old file or the new one is there, whenever this is killed."""
    about = {"version": VERSION, **{part: getattr(adapter, part) for part in _ABOUT}}
    safe.write_tensors(path, adapter.tensors, {"lora": json.dumps(about)})


def read(path: Path, said: Mapping[str, str]) -> Adapter:
    """Read what `write` wrote, of which `said` is the metadata; AdapterError if it is something else."""
    if "lora" not in said:
        raise AdapterError(
            f"{path} has no scaling: its metadata has no entry 'lora', as `lora.save_adapter` writes it."
        )
    about = _about(said["lora"])
    version = about.get("version", VERSION)
    if version != VERSION:  # asked first: another version may have other parts, or another checksum
        raise AdapterError(f"{path} is an adapter of version {version!r}; this release reads version {VERSION}.")
    tensors, metadata = safe.read_tensors(path)
    if metadata != said:
        raise AdapterError(f"{path} has changed while it was read.")
    if not _is_sound(about):
        raise AdapterError(f"{path} is not an adapter: what its metadata says under 'lora' is not what belongs there.")
    if "sha256" not in metadata:
        raise AdapterError(f"{path} has no checksum: its metadata has no entry 'sha256'.")
    return Adapter(tensors=tensors, **{part: about[part] for part in _ABOUT})


def _about(text: str) -> dict[str, Any]:
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _is_sound(about: dict[str, Any]) -> bool:
    if about.keys() != {"version", *_ABOUT}:
        return False
    modules, *names, base_model = (about[part] for part in _ABOUT)
    return (
        isinstance(modules, dict)
        and all(isinstance(settings, dict) for settings in modules.values())
        and all(isinstance(part, list) and all(isinstance(name, str) for name in part) for part in names)
        and isinstance(base_model, (str, type(None)))
    )
