"""Files that adapters come in: which formats there are, and which one a file has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from lora.adapters import native
from lora.adapters.adapter import PARAMETERS, Adapter
from lora.adapters.files import as_path, kind, open_file, reading
from lora.adapters.safe import read_header, read_tensors
from lora.adapters.single import portable
from lora.errors import AdapterError, is_number, raise_all
from lora.formats import flat, from_peft, peft
from lora.formats.pickled import read_torch

_WRITERS: dict[str, Callable[[Adapter, Path, Iterable[str]], None]] = {
    "lora": lambda adapter, path, names: native.write(adapter, path),
    "peft": peft.write,
    "portable": lambda adapter, path, names: peft.write(portable(adapter), path, names),
}
_PEFTS = (peft.CONFIG, *from_peft.READERS)
FILES = (native.FILE, *_PEFTS)  # that an adapter's folder is read by


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
        raise ValueError(f"`lora_alpha` must be a finite number, got {lora_alpha!r}.")
    adapter = _read(as_path(path), lora_alpha)
    if lora_alpha is not None and adapter.format != "loralib":
        raise TypeError(
            f"`lora_alpha` is for loralib's files; {path} is in the format {adapter.format!r}, which says it."
        )
    if check:
        raise_all(f"{path} is not loaded", adapter.problems(), AdapterError)
    return adapter


def _read(path: Path, lora_alpha: float | None) -> Adapter:
    if kind(path) == "folder":
        if not kind(path / native.FILE):
            return from_peft.read(path)
        path = _only_ours(path)
    elif _is_pefts(path):
        return from_peft.read(path)
    with reading(path), open_file(path) as file:
        start = file.read(9)
    old_pickle = start[:1] == b"\x80" and start[8:] != b"{"  # by torch before 1.6; at this place headers begin
    if start[:4] == b"PK\x03\x04" or old_pickle:
        return flat.from_state_dict(path, read_torch(path), lora_alpha)
    header = read_header(path)
    if "lora" not in header.metadata and any(name.rpartition(".")[2] in PARAMETERS for name in header.tensors):
        return flat.from_state_dict(path, read_tensors(path)[0], lora_alpha)
    return native.read(path, header.metadata)


def _only_ours(folder: Path) -> Path:
    """The file of lora's in a folder that has one; AdapterError if there are files of PEFT's as well."""
    theirs = [name for name in _PEFTS if kind(folder / name)]
    if theirs:
        raise AdapterError(
            f"{folder} may hold two adapters, lora's in {native.FILE} and PEFT's in {', '.join(theirs)}: name the file "
            f"that is meant, {folder / native.FILE} or {folder / theirs[0]}."
        )
    return folder / native.FILE


def _is_pefts(path: Path) -> bool:
    """Whether a file is read as one of a folder of PEFT's."""
    return path.name in _PEFTS and kind(path.parent / peft.CONFIG) is not None


def place_of(path: str | os.PathLike[str], format: str) -> Path:
    """What `write_adapter` writes in a format: the folder, or the file; of a folder, for "lora", the one in it.

    Raises:
        TypeError, ValueError: `path` is no path, or is empty.
        FileExistsError: what would be written there could not be read again by this path.
    """
    place = as_path(path)
    there = kind(place, to_write=True)
    folder = format != "lora" or there == "folder" or os.fspath(path).endswith(("/", os.sep))
    others = _PEFTS if format == "lora" else (native.FILE,)
    beside = [name for name in others if kind(place / name)] if folder else []
    if beside:
        raise FileExistsError(
            f"{place} has {', '.join(beside)} of another adapter; with one beside it in the format {format!r}, nobody "
            "could tell which is meant: remove what is there, or choose another folder."
        )
    if not folder and (place.name == peft.CONFIG or _is_pefts(place)):
        raise FileExistsError(
            f"{place} is the name of a file of PEFT's format, as which it would be read: choose another."
        )
    return place / native.FILE if folder and format == "lora" else place


def write_adapter(
    adapter: Adapter, path: str | os.PathLike[str], format: str = "lora", *, module_names: Iterable[str] = ()
) -> None:
    """Write an adapter, in a format of your choice.

    Args:
        adapter: what to write.
        path: for "lora" a file, or a folder that exists, in which it is adapter.safetensors; for the others a folder.
            What is there is replaced.
        format: "lora"; "peft"; or "portable": PEFT's with one rank for all and scaling 1, which vLLM, llama.cpp's
            converter and others read alike. Default: "lora".
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
    if format not in _WRITERS:
        raise ValueError(f"`format` must be one of {', '.join(map(repr, _WRITERS))}, got {format!r}.")
    place = place_of(path, format)
    raise_all(f"{path} is not written", adapter.problems(), AdapterError)
    if adapter.format == "loralib":
        raise AdapterError(
            f"{path} is not written: what kind of layers a file of loralib's is for, only its model knows. Load it "
            "into the model with `lora.load_adapter(model, file, lora_alpha=…)`, and save that."
        )
    _WRITERS[format](adapter, place, module_names)
