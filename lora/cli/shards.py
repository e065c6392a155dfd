"""Safetensors files written anew with some of their tensors changed, one tensor in memory at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from lora.adapters.files import Entry, open_file, reading
from lora.cli.progress import progress

_CHUNK = 2**20


def rewrite(
    source: Path,
    target: Path,
    entries: Mapping[str, Entry],
    change: Callable[[str, Tensor], None],
    names: Collection[str],
) -> None:
    """Write `source` to `target`: the same header, and each tensor in turn.

    Args:
        source: a safetensors file; `entries` are its header's.
        target: the file to write, which must not exist.
        change: gets the name and the values of a tensor, and changes them in place.
        names: the tensors to change.
    """
    # One buffer for all: allocated one by one, tensors of many sizes would leave holes in memory.
    buffer = memoryview(
        bytearray(max((entry.stop - entry.start for entry in map(entries.__getitem__, names)), default=0))
    )
    with open_file(source) as old, open(target, "xb") as new:
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


def mapped(path: Path, entry: Entry) -> Tensor:
    """A tensor of a file whose values are read as they are looked at; changes do not reach the file."""
    with reading(path):
        content = np.memmap(path, np.uint8, "c", offset=entry.start, shape=(entry.stop - entry.start,))
    return torch.from_numpy(content).view(entry.dtype).view(entry.shape)


def _copy(old: io.BufferedReader, new: BinaryIO, size: int) -> None:
    buffer = memoryview(bytearray(min(size, _CHUNK)))
    for start in range(0, size, _CHUNK):
        new.write(_filled(buffer[: size - start], old))


def _filled(buffer: memoryview, old: io.BufferedReader) -> memoryview:
    with reading(Path(old.name)):
        if old.readinto(buffer) < len(buffer):
            raise OSError(f"{old.name} has changed while it was read.")
    return buffer
