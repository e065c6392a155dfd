"""An adapter in a file: our own format, and the table of all formats, by which adapters are read and written.

Ours is one safetensors file, with everything that its tensors mean in the metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch.nn as nn

from lora.adapters.adapter import Adapter
from lora.adapters.files import parsed, read_tensors
from lora.adapters.paths import as_path, kind, open_file
from lora.adapters.saving import write_tensors
from lora.errors import AdapterError, Problems, is_number, raise_all, short

VERSION = 2
FILE = "adapter.safetensors"  # in a folder
_LETTERS_OF_A_VALUE = 6  # on average, in what we write: most are numbers
_ABOUT = ("modules", "trained_in_full", "modules_to_save", "base_model")
# An entry of its own, which readers of version 2 that do not know it pass over: what of the base model is in the file
# though it did not train, and what is known of the rest.
REST = "rest"


class Format(NamedTuple):
    """How adapters of one format are recognised, read and written.

    Attributes:
        owner: whose format it is, for errors.
        write: writes an adapter to a path, given the names of all modules of the model, if they are known, and the
            name of the function that was called, for errors. None where the format is only read.
        read: reads what is at a path; the second argument is the `lora_alpha` that a user gave, or None.
        reads: whether what is at a path is of this format.
        claims: whether a file would be read in this format for its name, whatever is in it.
        losses: warnings of what its own library would lose of an adapter to a model, though all is written.
        files: the names of the files by which a folder is of this format.
        asks: whether its files may leave `lora_alpha` to the user; `read` then raises a TypeError where one says it.
        meant: gives an adapter the names and shapes of a model's modules, where its files have others.
        only_model: what of an adapter only its model knows, so that it is written in no other format; "" if nothing.
    """

    owner: str
    write: Callable[[Adapter, Path, Iterable[str], str], None] | None = None
    read: Callable[[Path, float | None], Adapter] | None = None
    reads: Callable[[Path], bool] = lambda path: False
    claims: Callable[[Path], bool] = lambda path: False
    losses: Callable[[nn.Module, Adapter], Iterable[str]] = lambda model, adapter: ()
    files: tuple[str, ...] = ()
    asks: bool = False
    meant: Callable[[Adapter, Mapping[str, nn.Module], Problems], Adapter] = lambda adapter, modules, problems: adapter
    only_model: str = ""


def unasked(path: Path, owner: str) -> str:
    """What is wrong with a `lora_alpha` that is given for a file which says it."""
    return f"`lora_alpha` is for files that do not say it, as loralib's; {path} is {owner}, and says it."


# ---- our format ------------------------------------------------------------------------------------------------------


def _write(adapter: Adapter, path: Path, names: Iterable[str], function: str) -> None:
    about = {"version": VERSION, **{part: getattr(adapter, part) for part in _ABOUT}}
    write_tensors(
        path, adapter.tensors, {"lora": json.dumps(about, default=dict), **rest_as_metadata(adapter)}, function
    )


def _read(path: Path, lora_alpha: float | None) -> Adapter:
    """Read what `_write` wrote; AdapterError if it is something else."""
    tensors, metadata = read_tensors(path, lambda said: _check_version(path, said))
    about = object_in(metadata, "lora") or {}
    if not _is_sound(about):
        raise AdapterError(f"{path} is not an adapter: what its metadata says under 'lora' is not what belongs there.")
    if "sha256" not in metadata:
        raise AdapterError(f"{path} has no checksum: its metadata has no entry 'sha256'.")
    kept, rest = rest_of(metadata, path)
    return Adapter(tensors=tensors, kept=kept, rest=rest, **{part: about[part] for part in _ABOUT})


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    """AdapterError if a file is none of ours, or of another version: that may have other parts, or another checksum."""
    if "lora" not in metadata:
        raise AdapterError(
            f"{path} has no scaling: its metadata has no entry 'lora', as `lora.save_adapter` writes it."
        )
    version = (object_in(metadata, "lora") or {}).get("version", VERSION)
    if version != VERSION:
        raise AdapterError(f"{path} is an adapter of version {short(version)}; this release reads version {VERSION}.")


def rest_as_metadata(adapter: Adapter) -> dict[str, str]:
    """What an adapter knows of the rest of its base model, as an entry of a file's metadata."""
    if not (adapter.kept or adapter.rest):
        return {}
    return {REST: json.dumps({"kept": adapter.kept, "tensors": adapter.rest}, separators=(",", ":"))}


def rest_of(metadata: Mapping[str, str], path: Path) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """What `rest_as_metadata` wrote: `kept` and `rest` of an adapter; AdapterError if it is something else."""
    if REST not in metadata:
        return [], {}
    about = object_in(metadata, REST) or {}
    kept, rest = about.get("kept"), about.get("tensors")
    if about.keys() != {"kept", "tensors"} or not _are_names(kept) or not _are_objects(rest):
        raise AdapterError(
            f"{path} is not an adapter: what its metadata says under {REST!r} is not what belongs there."
        )
    return kept, rest


def object_in(metadata: Mapping[str, str], key: str) -> dict[str, Any] | None:
    """The JSON object that an entry of a file's metadata holds; None if there is none."""
    try:
        said = parsed(metadata.get(key, "null"), _LETTERS_OF_A_VALUE, samples=True)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


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


# ---- all formats -----------------------------------------------------------------------------------------------------

# By name. Wings enter theirs; what none of them recognises is read as ours.
FORMATS: dict[str, Format] = {"lora": Format("lora", _write, _read, files=(FILE,))}


def read_adapter(path: str | os.PathLike[str], *, lora_alpha: float | None = None, check: bool = True) -> Adapter:
    """Read an adapter without its model, in whatever format it is.

    Args:
        path: a file of `lora.save_adapter`'s, or a folder with its adapter.safetensors; a folder of PEFT's, or one of
            its files; or a state dict of loralib's, saved by torch or as safetensors.
        lora_alpha: the numerator of the scaling, for loralib's files, which do not say it. Default: None.
        check: raise if the adapter is not sound. Default: True.

    Raises:
        OSError: there is no such file or folder (FileNotFoundError), it cannot be read (PermissionError, …), or it is
            a FIFO or a device.
        TypeError: `path` is no path, or `lora_alpha` is given for a format that says it.
        ValueError: `path` is empty, or `lora_alpha` is no finite number.
        AdapterError: the file is no adapter, or not sound; the folder holds two; one error lists everything.

    >>> import os, tempfile, torch, lora
    >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
    >>> lora.save_adapter(torch.nn.Sequential(lora.Linear(8, 4, r=2, bias=False)), path)
    >>> list(lora.read_adapter(path).tensors)
    ['0.lora_A', '0.lora_B']
    """
    if lora_alpha is not None and not is_number(lora_alpha):
        raise ValueError(f"`lora_alpha` must be a finite number, got {short(lora_alpha)}.")
    format, place = _found(as_path(path))
    assert format.read is not None, "it has recognised the file"
    adapter = format.read(place, lora_alpha)
    if lora_alpha is not None and not format.asks:
        raise TypeError(unasked(as_path(path), f"{format.owner}'s"))
    if check:
        raise_all(f"read_adapter: {path} is not loaded", adapter.problems(), AdapterError)
    return adapter


def _found(path: Path) -> tuple[Format, Path]:
    """The format of what is at a path, and what is to be read: of a folder with a file of ours, that file."""
    if kind(path) == "folder" and kind(path / FILE):
        theirs = _beside(path, "lora")
        if theirs:
            owner = next(format.owner for format in FORMATS.values() if theirs[0] in format.files)
            raise AdapterError(
                f"{path} may hold two adapters, lora's in {FILE} and {owner}'s in {', '.join(theirs)}: name the file "
                f"that is meant, {path / FILE} or {path / theirs[0]}."
            )
        path = path / FILE
        with open_file(path):  # an OSError, if it is no file
            pass
    elif kind(path) == "folder":
        held = {
            format.owner: file
            for format in FORMATS.values()
            for file in format.files
            if not file.endswith(".json") and kind(path / file)
        }
        if len(held) > 1:
            listed = " and ".join(f"{owner}'s in {file}" for owner, file in held.items())
            raise AdapterError(f"{path} may hold several adapters, {listed}: name the file that is meant.")
    return next((format for format in FORMATS.values() if format.reads(path)), FORMATS["lora"]), path


def _beside(folder: Path, format: str) -> list[str]:
    """The files in a folder by which it would be of another format than this."""
    others = dict.fromkeys(name for other in FORMATS.values() for name in other.files)
    return [name for name in others if name not in FORMATS[format].files and kind(folder / name)]


def place_of(path: str | os.PathLike[str], format: str) -> Path:
    """What `write_adapter` writes in a format: the folder, or the file; of a folder, for "lora", the one in it.

    Raises:
        TypeError, ValueError: `path` is no path, or is empty.
        FileExistsError: what would be written there could not be read again by this path.
    """
    place = as_path(path)
    there = kind(place, to_write=True)
    folder = format != "lora" or there == "folder" or os.fspath(path).endswith(("/", os.sep))
    beside = _beside(place, format) if folder else []
    if beside:
        raise FileExistsError(
            f"{place} has {', '.join(beside)} of another adapter; with one beside it in the format {format!r}, nobody "
            "could tell which is meant: remove what is there, or choose another folder."
        )
    taken = next((other for other in FORMATS.values() if not folder and other.claims(place)), None)
    if taken is not None:
        raise FileExistsError(
            f"{place} is the name of a file of {taken.owner}'s format, as which it would be read: choose another."
        )
    return place / FILE if folder and format == "lora" else place


def write_adapter(
    adapter: Adapter, path: str | os.PathLike[str], format: str = "lora", *, module_names: Iterable[str] = ()
) -> None:
    """Write an adapter, in a format of your choice.

    Args:
        adapter: what to write.
        path: for "lora" a file, or a folder that exists, in which it is adapter.safetensors; for the others a folder.
            What is there is replaced.
        format: "lora"; "peft"; "portable": PEFT's with one rank for all and scaling 1, which vLLM, llama.cpp's
            converter and others read alike; or "diffusers", for `load_lora_weights`. Default: "lora".
        module_names: of the whole model, where they are known, for PEFT's target_modules to be unmistakable.

    Raises:
        ValueError: there is no such format, or `path` is empty.
        TypeError: `path` is no path.
        OSError: there is no folder to write to (FileNotFoundError); a file where a folder belongs, or another adapter
            which could be taken for this one (FileExistsError); or it cannot be written (PermissionError, …).
        AdapterError: the adapter is not sound, or the format has no place for something in it; one error lists all.

    >>> import os, tempfile, torch, lora
    >>> folder = tempfile.mkdtemp()
    >>> lora.save_adapter(torch.nn.Sequential(lora.Linear(8, 4, r=2)), os.path.join(folder, "mine"))
    >>> adapter = lora.read_adapter(os.path.join(folder, "mine"))
    >>> lora.write_adapter(adapter, os.path.join(folder, "theirs"), format="peft")
    >>> sorted(os.listdir(os.path.join(folder, "theirs")))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    write_as(adapter, path, format, module_names, "write_adapter")


def write_as(
    adapter: Adapter, path: str | os.PathLike[str], format: str, module_names: Iterable[str], function: str
) -> None:
    """Write an adapter, in errors under the name of the function that was called."""
    writers = {name: entry.write for name, entry in FORMATS.items() if entry.write is not None}
    if format not in writers:
        raise ValueError(f"`format` must be one of {', '.join(map(repr, writers))}, got {format!r}.")
    place = place_of(path, format)
    raise_all(f"{function}: {path} is not written", adapter.problems(), AdapterError)
    if format != adapter.format and (unknown := FORMATS.get(adapter.format, FORMATS["lora"]).only_model):
        raise AdapterError(
            f"{function}: {path} is not written: only its model knows {unknown}. Load it into the model with "
            "`lora.load_adapter(model, file, …)`, and save it from there."
        )
    writers[format](adapter, place, module_names, function)
