"""lora's own format: one safetensors file, with everything that its tensors mean in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from lora.adapters import safe
from lora.adapters.adapter import Adapter
from lora.errors import AdapterError

VERSION = 2
FILE = "adapter.safetensors"  # in a folder
_ABOUT = ("modules", "trained_in_full", "modules_to_save", "base_model")
# An entry of its own, which readers of version 2 that do not know it pass over: what of the base model is in the file
# though it did not train, and what is known of the rest.
REST = "rest"


def write(adapter: Adapter, path: Path) -> None:
    """Write an adapter to a safetensors file: the old file or the new one is there, whenever this is killed."""
    about = {"version": VERSION, **{part: getattr(adapter, part) for part in _ABOUT}}
    safe.write_tensors(path, adapter.tensors, {"lora": json.dumps(about, default=dict), **rest_as_metadata(adapter)})


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
    kept, rest = rest_of(metadata, path)
    return Adapter(tensors=tensors, kept=kept, rest=rest, **{part: about[part] for part in _ABOUT})


def rest_as_metadata(adapter: Adapter) -> dict[str, str]:
    """What an adapter knows of the rest of its base model, as an entry of a file's metadata."""
    if not (adapter.kept or adapter.rest):
        return {}
    return {REST: json.dumps({"kept": adapter.kept, "tensors": adapter.rest}, separators=(",", ":"))}


def rest_of(metadata: Mapping[str, str], path: Path) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """What `rest_as_metadata` wrote: `kept` and `rest` of an adapter; AdapterError if it is something else."""
    if REST not in metadata:
        return [], {}
    about = _about(metadata[REST])
    kept, rest = about.get("kept"), about.get("tensors")
    if about.keys() != {"kept", "tensors"} or not _are_names(kept) or not _are_objects(rest):
        raise AdapterError(
            f"{path} is not an adapter: what its metadata says under {REST!r} is not what belongs there."
        )
    return kept, rest


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
        _are_objects(modules) and all(_are_names(part) for part in names) and isinstance(base_model, (str, type(None)))
    )


def _are_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_objects(value: Any) -> TypeGuard[dict[str, dict[str, Any]]]:
    return isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values())
