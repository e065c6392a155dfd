"""Safetensors files, of strangers too: all is checked before a tensor is read, and written whole or not at all.

A file is 8 bytes with the header's length, the header (JSON), and the tensors' bytes, without holes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from lora.adapters.files import open_file, reading, replace_file
from lora.adapters.header import DTYPES, HEADER_LIMIT, Entry, Header, parse_header
from lora.errors import AdapterError, raise_all

_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def read_header(path: Path, limit: int = HEADER_LIMIT) -> Header:
    """Read and check the header of a safetensors file, and no tensor.

    Args:
        path: the file.
        limit: how many bytes the header may have. Longer ones are read only if the tensors are 4 times as long, so that
            a small file never costs much. Default: 8 MiB.

    Raises:
        OSError: there is no such file, or it cannot be read.
        AdapterError: the file is not a safetensors file; lists what is wrong.
    """
    with reading(path), open_file(path) as file:
        return parse_header(file, path, limit)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors, which own their memory, and its metadata.

    Raises:
        OSError: there is no such file, or it cannot be read.
        AdapterError: the file is not a safetensors file, or it has a checksum and was changed after that was written.
    """
    with reading(path), open_file(path) as file:
        header = parse_header(file, path, HEADER_LIMIT)
        try:
            tensors = {name: _tensor(file, entry) for name, entry in header.tensors.items()}
        except (RuntimeError, MemoryError):  # torch's allocator raises the first
            raise AdapterError(f"{path} does not fit into memory.") from None
        except EOFError:
            raise AdapterError(f"{path} has changed while it was read.") from None
    if header.metadata.get("sha256") not in (None, checksum(tensors, header.metadata)):
        raise AdapterError(f"{path} is damaged: its content has changed since it was written (`sha256` says so).")
    return tensors, header.metadata


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a checksum: the old file or the new one is there, whenever this is killed.

    Raises:
        OSError: there is no folder to write it to, or it cannot be written.
        AdapterError: `read_tensors` could not read such a file; nothing is written.
    """
    replace_file(path, packed(path, tensors, metadata))


def packed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file with a checksum; AdapterError if `read_tensors` could not read it."""
    unknown = (f"{name} has the dtype {t.dtype}." for name, t in tensors.items() if t.dtype not in _WORDS)
    raise_all(f"{path} is not written", unknown, AdapterError)
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        ready[name] = plain.clone() if storage in storages else plain  # safetensors refuses shared storage
        storages.add(storage)
    said = {**metadata, "format": "pt"}
    content: bytes = safetensors.torch.save(ready, {**said, "sha256": checksum(ready, said)})
    parse_header(io.BytesIO(content), path, HEADER_LIMIT)
    return content


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of all names, dtypes, shapes and bytes of tensors, and of all metadata but `sha256` itself.

    >>> import torch
    >>> a, b = (checksum({"A": torch.ones(shape)}, {"format": "pt"}) for shape in [(2, 3), (3, 2)])
    >>> len(a), a == b
    (64, False)
    """
    rest = {key: value for key, value in metadata.items() if key != "sha256"}
    about = {name: [_WORDS[tensor.dtype], *tensor.shape] for name, tensor in tensors.items()}
    digest = hashlib.sha256(json.dumps([rest, about], sort_keys=True).encode("ascii"))
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensor(file: io.BufferedReader, entry: Entry) -> Tensor:
    data = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    file.seek(entry.start)
    if file.readinto(data.numpy().data) < len(data):
        raise EOFError
    return data.view(entry.dtype).view(entry.shape)
