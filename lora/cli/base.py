"""A base model's folder: which files hold its weights, under which names, and what else is in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora.adapters.files import Entry, kind, read_header, read_object, reading
from lora.errors import raise_all

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What models put in front of all names, or leave away, depending on the class that saved them.
_PREFIXES = ("model.", "base_model.model.", "transformer.")
# Files that hold weights, which would be the old ones; an adapter's configuration would be applied once more.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data")
_LEFT_OUT = (*_WEIGHTS, ".npz", ".tflite", ".index.json", "adapter_config.json")


@dataclass(frozen=True)
class Base:
    """A base model in safetensors files.

    Attributes:
        folder: where it is.
        shards: for each file its tensors.
        files: for each tensor its file.
        config: what config.json says, {} without one.
    """

    folder: Path
    shards: dict[str, dict[str, Entry]]
    files: dict[str, str]
    config: dict[str, Any]

    def entry(self, key: str) -> Entry:
        return self.shards[self.files[key]][key]


def open_base(folder: Path) -> Base:
    """Look at a model's folder; no tensor is read.

    Raises:
        OSError: there is no such folder, or no safetensors file in it.
        ValueError: an index, or a file that it names, is not what it should be; one error lists all.
    """
    if kind(folder) != "folder":
        raise NotADirectoryError(f"{folder} must be the folder of a model.")
    config = read_object(folder / "config.json") if kind(folder / "config.json") else {}
    if kind(folder / SINGLE):  # the one that transformers takes, where there is an index as well
        shards = {SINGLE: read_header(folder / SINGLE).tensors}
        return Base(folder, shards, dict.fromkeys(shards[SINGLE], SINGLE), config)
    if not kind(folder / INDEX):
        raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}: other formats are not read.")
    files = read_object(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{folder / INDEX} must have a `weight_map`: a file for each tensor.")
    names = list(dict.fromkeys(files.values()))
    odd = [f"{name!r} must be the name of a safetensors file in the folder." for name in names if not _is_plain(name)]
    odd += [f"{name} is missing." for name in names if _is_plain(name) and not kind(folder / name)]
    raise_all(f"{folder / INDEX} is of no use", odd)
    shards = {name: read_header(folder / name).tensors for name in names}
    absent = (f"{key} is not in {file}." for key, file in files.items() if key not in shards[file])
    raise_all(f"{folder / INDEX} does not fit the files", absent)
    return Base(folder, shards, files, config)


def other_files(base: Base) -> tuple[list[Path], list[Path]]:
    """What else is in the folder: files that belong to the model whatever its weights are, and weights in other forms.

    Hidden folders (.git, .cache) count as neither.
    """
    copied: list[Path] = []
    left_out: list[Path] = []
    for parent, folders, files in os.walk(base.folder, onerror=_unlisted):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for file in sorted(files):
            path = Path(parent, file).relative_to(base.folder)
            if str(path) in base.shards:
                continue
            is_index = str(path) == INDEX and SINGLE not in base.shards
            (left_out if file.endswith(_LEFT_OUT) and not is_index else copied).append(path)
    return copied, left_out


def _unlisted(error: OSError) -> None:
    with reading(Path(error.filename)):
        raise error


def keys_for(names: Iterable[str], base: Base, optional: Iterable[str] = ()) -> tuple[dict[str, str], list[str]]:
    """The base's key for each name of an adapter's, all with the same prefix more or less; and what is wrong.

    The names as they are, where they fit; else the one change of prefix with which all do. `optional` names are changed
    alike, and left out where the base has no such key.
    """
    names = list(names)
    ways = [({name: rename(name) for name in names}, rename) for rename in _renamings()]
    as_they_are, *changed = [keys for keys, _ in ways]
    changed = [keys for keys in changed if len(set(keys.values())) == len(names)]  # each name has a key of its own
    fitting: list[dict[str, str]] = []
    for keys in (as_they_are, *changed):
        if keys not in fitting and all(key in base.files for key in keys.values()):
            fitting.append(keys)
    if len(fitting) == 1 or as_they_are in fitting:
        keys = fitting[0]
        rename = next(rename for found, rename in ways if found == keys)
        more = {name: rename(name) for name in optional}
        return keys | {name: key for name, key in more.items() if key in base.files}, []
    if fitting:
        either = " or ".join(next(iter(keys.values())) for keys in fitting)
        return {}, [f"{names[0]} may be {either} in {base.folder}: several prefixes fit."]
    closest = max([as_they_are, *changed], key=lambda keys: sum(key in base.files for key in keys.values()))
    problems = [_missing(name, key, base) for name, key in closest.items() if key not in base.files]
    return {name: key for name, key in closest.items() if key in base.files}, problems


def _renamings() -> Iterator[Callable[[str], str]]:
    yield str
    for prefix in _PREFIXES:
        yield partial(_without, prefix)
        yield f"{prefix}{{}}".format


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def _missing(name: str, key: str, base: Base) -> str:
    owner = key.rpartition(".")[0]
    beside = sorted(known for known in base.files if known.rpartition(".")[0] == owner and owner)
    there = f"; there is {', '.join(beside)}" if beside else ""
    return f"{name}: there is no such tensor in {base.folder}{there}."


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and not {"/", "\\", ":"}.intersection(name)
