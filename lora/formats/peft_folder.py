"""The two files of a folder of PEFT's, a configuration and weights, written and read as one.

No system renames two files at once. Therefore the weights hold the configuration as well, in their metadata: for
readers here their rename is the whole save. They hold, too, the checksum of the configuration that was in the folder
before: if that one is found beside them, the save got no further. Any other that differs was edited, or is damaged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from lora.adapters.files import object_from, packed, read_bytes, read_header, read_tensors
from lora.adapters.formats import FILE, object_in
from lora.adapters.paths import check_place, kind, reading, writing
from lora.adapters.saving import alone_in, remove_left_over, replace_files
from lora.errors import AdapterError, raise_all, short, some
from lora.formats.torch_files import read_torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
Config = dict[str, Any]
Check = Callable[[Mapping[str, str]], None]


def _read_torch(path: Path, check: Check) -> tuple[dict[str, Tensor], dict[str, str]]:
    check({})
    return read_torch(path), {}


READERS: dict[str, Callable[[Path, Check], tuple[dict[str, Tensor], dict[str, str]]]] = {
    WEIGHTS: read_tensors,
    "adapter_model.bin": _read_torch,
}
# Entries of the metadata.
_SETTINGS = "config"
_REPLACED = "replaced_config"
# What decides the function; the rest may be edited.
_BOUND = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "fan_in_fan_out", "bias"),
    *("rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "modules_to_save"),
)
_TRIES = 20


# ---- writing --------------------------------------------------------------------------------------------------------


def check_folder(path: Path) -> None:
    """OSError if the folder cannot be written, before anything is."""
    check_place(path, "folder")
    for name in (WEIGHTS, CONFIG) if kind(path) else ():
        check_place(path / name)


def write_folder(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: Config, function: str
) -> None:
    """Write a folder, or replace the adapter in one: the old or the new one is read, whenever this is killed."""
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode("utf-8")
    settings = json.dumps(config, separators=(",", ":"), sort_keys=True)

    def content(before: bytes | None) -> bytes:
        replaced = {} if before is None or before == text else {_REPLACED: _digest(before)}
        return packed(path / WEIGHTS, tensors, {**metadata, _SETTINGS: settings, **replaced}, function)

    before = _before(path)
    weights = content(before)
    made = not kind(path)
    try:
        with writing(path):
            path.mkdir(exist_ok=True)
        with alone_in(path):
            if before != (now := _before(path)):  # another writer was here
                before, weights = now, content(now)
            remove_left_over(path / CONFIG)  # though it may not be written now
            replace_files({path / WEIGHTS: weights} | ({} if before == text else {path / CONFIG: text}))
            with writing(path / "adapter_model.bin"):
                (path / "adapter_model.bin").unlink(missing_ok=True)  # nobody reads it beside the other
    except BaseException:
        if made:
            with suppress(OSError):  # it may have an adapter in it
                path.rmdir()
        raise


def _before(folder: Path) -> bytes | None:
    try:
        return _config_in(folder)
    except (OSError, AdapterError):  # nobody could read it
        return None


# ---- reading --------------------------------------------------------------------------------------------------------


def claims(path: Path) -> bool:
    """Whether a file is read as one of a folder of PEFT's."""
    names = (CONFIG, *READERS)
    return path.name in names and (path.name == CONFIG or kind(path.parent / CONFIG) is not None)


def reads(path: Path) -> bool:
    """Whether a path is a folder, or a file of PEFT's; other formats have been asked about the folder before."""
    return kind(path) == "folder" or claims(path)


def adapter_in(path: Path) -> Path:
    """The one adapter in a folder that has a folder of its own, as PEFT saves all but "default"; else the path."""
    if kind(path) != "folder" or any(kind(path / name) for name in (CONFIG, *READERS)):
        return path
    with reading(path):
        inner = sorted(entry for entry in path.iterdir() if kind(entry / CONFIG) == "file")
    if len(inner) > 1:
        names = some((entry.name for entry in inner), len(inner))
        raise FileNotFoundError(
            f"there is no adapter in {path} itself, and one in each of its folders {names}: name the one that is "
            f"meant, as {inner[0]}."
        )
    return inner[0] if inner else path


def read_folder(path: Path, check: Callable[[Config], None]) -> tuple[Path, Config, dict[str, Tensor], dict[str, str]]:
    """The adapter in a folder, which others may write meanwhile.

    Args:
        path: the folder, or one of the files in it. Where the two differ, and the configuration is named, it counts.
        check: is given the configuration before any tensor is read, and raises if none should be.

    Returns:
        The weights' file, the configuration, the tensors and the metadata.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterError: a file is damaged, or the configuration is not the one that the weights were written with.
    """
    for left in reversed(range(_TRIES)):
        seen = _Seen(path)
        try:
            tensors, metadata = seen.read(check)
        except (AdapterError, FileNotFoundError):
            if not left or not seen.has_changed():
                raise
        else:
            if not (seen.edited and seen.has_changed()):
                return seen.file, seen.config, tensors, metadata
    raise AdapterError(f"{path} has changed while it was read.")


class _Seen:
    """What a reader has found in a folder: the configuration first, so that the weights are as new, or newer."""

    def __init__(self, path: Path) -> None:
        self.path, self.whole = path, kind(path) == "folder"
        self.folder = path if self.whole else path.parent
        self.text = _config_in(self.folder)
        self.file = self._chosen()
        self.metadata: Mapping[str, str] | None = None
        self.config: Config = {}
        self.edited = False  # since the weights were written; and what it says now counts

    def _chosen(self) -> Path:
        names = [self.path.name] if self.path.name in READERS and not self.whole else [*READERS]
        file = next((self.folder / name for name in names if kind(self.folder / name)), None)
        if file is None:
            names += [FILE] if self.whole else []  # which would have been read, and not as PEFT's
            raise FileNotFoundError(f"there is no adapter in {self.folder}: it has none of {', '.join(names)}.")
        return file

    def read(self, check: Callable[[Config], None]) -> tuple[dict[str, Tensor], dict[str, str]]:
        def settle(metadata: Mapping[str, str]) -> None:
            self.metadata = metadata
            self.config = self._settled(metadata)
            check(self.config)

        return READERS[self.file.name](self.file, settle)

    def _settled(self, metadata: Mapping[str, str]) -> Config:
        """The configuration that belongs to the weights with this metadata."""
        written = object_in(metadata, _SETTINGS)
        if written is not None and (self.text is None or _digest(self.text) == metadata.get(_REPLACED)):
            return written
        if self.text is None:
            raise FileNotFoundError(
                f"there is no {CONFIG} in {self.folder}, without which PEFT's tensors mean nothing."
            )
        config = object_from(self.folder / CONFIG, self.text)
        problems = [] if written is None else [*_differences(config, written)]
        self.edited = bool(problems) and self.path.name == CONFIG and not self.whole
        if problems and not self.edited:
            raise_all(f"read_adapter: {self.folder} is not loaded", [*problems, self._advice()], AdapterError)
        return config

    def _advice(self) -> str:
        return (
            f"{CONFIG} was edited, or is damaged. If what it says is meant, name it: {self.folder / CONFIG}. If not, "
            f"remove it: {WEIGHTS} holds what it said when both were written."
        )

    def has_changed(self) -> bool:
        """Whether something else is found now."""
        if _config_in(self.folder) != self.text or self._chosen() != self.file:
            return True
        if self.file.name != WEIGHTS or self.metadata is None:
            return False
        return read_header(self.file).metadata != self.metadata


def _config_in(folder: Path) -> bytes | None:
    try:
        return read_bytes(folder / CONFIG)
    except FileNotFoundError:
        return None


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _differences(config: Config, written: Config) -> Iterator[str]:
    """A complaint for each setting that is not the one with which the weights were written."""
    for name in _BOUND:
        now, then = config.get(name), written.get(name)
        if _meant(now) != _meant(then):
            said = f"is {short(now)}, and was {short(then)}" if _is_short(now, then) else "is not what it was"
            yield f"`{name}` {said} when {WEIGHTS} was written."


def _meant(value: Any) -> Any:
    """A setting in a form to compare: the order of names does not count, and what is empty is like None."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        value = sorted(value)
    return value if type(value) in (int, float) else value or None


def _is_short(*values: Any) -> bool:
    return all(isinstance(value, (str, int, float, type(None))) for value in values)
