"""A model's folder: which files hold its weights, under which names, what it ties; and how it is written anew."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lora.adapters.files import Entry, read_header, read_object
from lora.adapters.paths import kind, open_file, reading, writing
from lora.adapters.saving import alone_in, clear_left_folders, hidden
from lora.cli import progress
from lora.errors import raise_all, short

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What models put in front of all names, or leave away, depending on the class that saved them.
_PREFIXES = ("model.", "base_model.model.", "transformer.")
# Files that hold weights, which would be the old ones; an adapter's configuration would be applied once more.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data")
_LEFT_OUT = (*_WEIGHTS, ".npz", ".tflite", ".index.json", "adapter_config.json")
# How models call their input embedding and their output layer.
_INPUTS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tok_embedding", "shared"}
_OUTPUTS = {"lm_head", "embed_out", "output_embeddings"}
_CHUNK = 2**20  # bytes that are copied at a time
_LONGEST_INDEX = 2**26  # bytes: some models have 200,000 tensors
_SHOWN = 5  # names of files in an error


@dataclass(frozen=True)
class ModelFolder:
    """A model in safetensors files.

    Attributes:
        path: where it is.
        shards: for each file its tensors.
        files: for each tensor its file.
        config: what config.json says, {} without one.
    """

    path: Path
    shards: dict[str, dict[str, Entry]]
    files: dict[str, str]
    config: dict[str, Any]

    def entry(self, key: str) -> Entry:
        """Where a tensor is in its file, and of which shape and dtype."""
        return self.shards[self.files[key]][key]

    def tensor(self, key: str) -> Tensor:
        """A tensor whose values are read as they are looked at; changes do not reach the file."""
        path, entry = self.path / self.files[key], self.entry(key)
        with reading(path):
            content = np.memmap(path, np.uint8, "c", offset=entry.start, shape=(entry.stop - entry.start,))
        return torch.from_numpy(content).view(entry.dtype).view(entry.shape)


def open_folder(path: Path) -> ModelFolder:
    """Look at a model's folder; no tensor is read.

    Raises:
        OSError: there is no such folder, or no safetensors file in it.
        ValueError: an index, or a file that it names, is not what it should be; one error lists all.
    """
    if kind(path) != "folder":
        raise NotADirectoryError(f"{path} must be the folder of a model.")
    config = read_object(path / "config.json") if kind(path / "config.json") else {}
    if kind(path / _SINGLE):  # the one that transformers takes, where there is an index as well
        shards = {_SINGLE: read_header(path / _SINGLE).tensors}
        return ModelFolder(path, shards, dict.fromkeys(shards[_SINGLE], _SINGLE), config)
    index = path / _INDEX
    if not kind(index):
        raise FileNotFoundError(f"{path} has neither {_SINGLE} nor {_INDEX}: other formats are not read.")
    files = read_object(index, _LONGEST_INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index} must have a `weight_map`: a file for each tensor.")
    names = list(dict.fromkeys(files.values()))
    odd = [
        f"{short(name)} must be the name of a safetensors file in the folder." for name in names if not _is_plain(name)
    ]
    odd += [f"{name} is missing." for name in names if _is_plain(name) and not kind(path / name)]
    raise_all(f"merge: {index} is not used", odd)
    shards = {name: read_header(path / name).tensors for name in names}
    absent = (f"{key} is not in {file}." for key, file in files.items() if key not in shards[file])
    raise_all(f"merge: {index} does not fit the files", absent)
    return ModelFolder(path, shards, files, config)


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and not {"/", "\\", ":"}.intersection(name)


def other_files(model: ModelFolder) -> tuple[list[Path], list[Path]]:
    """What else is in the folder: files that belong to the model whatever its weights are, and weights in other forms.

    Hidden folders (.git, .cache) count as neither.
    """
    copied: list[Path] = []
    left_out: list[Path] = []
    for parent, folders, files in os.walk(model.path, onerror=_unlisted):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for file in sorted(files):
            path = Path(parent, file).relative_to(model.path)
            if str(path) in model.shards:
                continue
            is_index = str(path) == _INDEX and _SINGLE not in model.shards
            (left_out if file.endswith(_LEFT_OUT) and not is_index else copied).append(path)
    return copied, left_out


def _unlisted(error: OSError) -> None:
    with reading(Path(error.filename)):
        raise error


# ---- names: an adapter's, and those in the files -------------------------------------------------------------------


def keys_for(
    names: Iterable[str], model: ModelFolder, optional: Iterable[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """The model's key for each name of an adapter's, all with the same prefix more or less; and what is wrong.

    The names as they are, where they fit; else the one change of prefix with which all do. `optional` names are changed
    alike, and left out where the model has no such key.
    """
    names = list(names)
    ways: dict[tuple[str, ...], Callable[[str], str]] = {}
    for rename in _renamings():
        keys = tuple(map(rename, names))
        if rename is str or len(set(keys)) == len(names):  # each name has a key of its own
            ways.setdefault(keys, rename)
    fitting = [keys for keys in ways if all(key in model.files for key in keys)]
    if len(fitting) > 1 and fitting[0] != tuple(names):
        either = " or ".join(keys[0] for keys in fitting)
        return {}, [f"{names[0]} may be {either} in {model.path}: several prefixes fit."]
    keys = fitting[0] if fitting else max(ways, key=lambda keys: sum(key in model.files for key in keys))
    found = dict(zip(names, keys, strict=True))
    problems = [*_missing({name: key for name, key in found.items() if key not in model.files}, model)]
    found |= {name: ways[keys](name) for name in optional}
    return {name: key for name, key in found.items() if key in model.files}, problems


def _renamings() -> Iterator[Callable[[str], str]]:
    yield str
    for prefix in _PREFIXES:
        yield partial(_without, prefix)
        yield f"{prefix}{{}}".format


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def _missing(keys: Mapping[str, str], model: ModelFolder) -> Iterator[str]:
    """A complaint for each of these names, whose keys the model does not have."""
    beside: dict[str, list[str]] = {}
    for known in sorted(model.files) if keys else ():
        beside.setdefault(known.rpartition(".")[0], []).append(known)
    for name, key in keys.items():
        owner = key.rpartition(".")[0]
        there = f"; there is {', '.join(beside[owner])}" if owner in beside and owner else ""
        yield f"{name}: there is no such tensor in {model.path}{there}."


# ---- an input embedding and an output layer that are one weight ----------------------------------------------------


def tied_problems(model: ModelFolder, adapted: Iterable[str], in_full: Iterable[str]) -> Iterator[str]:
    """Why modules cannot be merged, or weights be replaced, because the model ties them.

    Args:
        model: the base model.
        adapted: the modules with adapters, by their names in the model.
        in_full: keys of the tensors that trained in full: one for both is what training a tied weight leaves.
    """
    if not _ties(model):
        return
    for name in adapted:
        if _last(name) in _INPUTS | _OUTPUTS:
            yield (
                f"{name}: config.json ties the input embedding to the output layer (tie_word_embeddings): "
                "its update would change the other one, too, or be lost."
            )
    owners = {_last(owner) for owner, _, own in (key.rpartition(".") for key in in_full) if own == "weight"}
    if not owners & _INPUTS:
        for owner in sorted(owners & _OUTPUTS):
            yield (
                f"{owner}: trained in full, and config.json ties it to the input embedding (tie_word_embeddings), "
                "which would replace it when the model is loaded."
            )


def _ties(model: ModelFolder) -> bool:
    """Whether the model has one weight for both; where its configuration does not say, whether one is missing."""
    text = model.config.get("text_config")
    for config in (model.config, text if isinstance(text, dict) else {}):
        if "tie_word_embeddings" in config:
            return bool(config["tie_word_embeddings"])
    # Up to transformers 4 a configuration leaves out defaults, and by default the two are tied.
    return bool(model.config) and not any(_last(key.rpartition(".")[0]) in _OUTPUTS for key in model.files)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


# ---- writing -------------------------------------------------------------------------------------------------------


def check_replaced(out: Path) -> None:
    """FileExistsError if the folder at `out` is neither a model's nor empty."""
    with writing(out):
        found = sorted(path.name for path in out.iterdir()) if kind(out) else []
    if found and "config.json" not in found and not any(name.endswith(".safetensors") for name in found):
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise FileExistsError(
            f"{out} is not replaced: it is no model's folder, having neither config.json nor a safetensors file. "
            f"It holds {', '.join(found[:_SHOWN])}{more}."
        )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to fill, which takes its place, and that of what is there, if nothing is raised."""
    real = Path(os.path.realpath(out))
    beside, old = hidden(real), hidden(real, "old")
    with writing(out), ExitStack() as held:  # whose they are, others know by the locks
        clear_left_folders(real)
        try:
            beside.mkdir()
            held.enter_context(alone_in(beside))
            yield beside
            if not real.exists():
                os.replace(beside, real)
                return
            held.enter_context(alone_in(real))
            try:
                os.replace(real, old)
                os.replace(beside, real)
            except BaseException:
                if not real.exists():
                    os.replace(old, real)
                raise
            try:
                shutil.rmtree(old)
            except OSError as error:
                raise OSError(f"{out} is written; what it held is in {old}, not removed: {error.strerror}.") from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def rewrite(
    model: ModelFolder, file: str, target: Path, change: Callable[[str, Tensor], None], names: Collection[str]
) -> None:
    """Write one of the model's files anew: the same header, and each tensor in turn, one in memory at a time.

    Args:
        model: the model.
        file: the name of its file.
        target: the file to write, which must not exist.
        change: gets the name and the values of a tensor, and changes them in place.
        names: the tensors to change.
    """
    entries = model.shards[file]
    # One buffer for all: allocated one by one, tensors of many sizes would leave holes in memory.
    buffer = memoryview(bytearray(max((entries[name].stop - entries[name].start for name in names), default=0)))
    with open_file(model.path / file) as old, open(target, "xb") as new:
        size = os.fstat(old.fileno()).st_size
        _copy(old, new, min((entry.start for entry in entries.values()), default=size))
        in_turn = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
        for name, entry in progress(in_turn, f"writing {target.name}"):
            if name in names and entry.stop > entry.start:
                content = _filled(buffer[: entry.stop - entry.start], old)
                change(name, torch.frombuffer(content, dtype=entry.dtype).view(entry.shape))
                new.write(content)
            else:
                _copy(old, new, entry.stop - entry.start)
        new.flush()
        os.fsync(new.fileno())


def _copy(old: io.BufferedReader, new: BinaryIO, size: int) -> None:
    buffer = memoryview(bytearray(min(size, _CHUNK)))
    for start in range(0, size, _CHUNK):
        new.write(_filled(buffer[: size - start], old))


def _filled(buffer: memoryview, old: io.BufferedReader) -> memoryview:
    with reading(Path(old.name)):
        if old.readinto(buffer) < len(buffer):
            raise OSError(f"{old.name} has changed while it was read.")
    return buffer
