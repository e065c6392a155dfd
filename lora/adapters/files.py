"""What strangers put into files: JSON of bounded length, names, and safetensors files.

A safetensors file is 8 bytes with the header's length, the header (JSON), and the tensors' bytes, without holes.
`safetensors` checks the header; here stands what it lets through, and what it costs to find out.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lora.adapters.paths import is_at, read_steadily
from lora.errors import AdapterError, instance, raise_all, short

_LONGEST_NAME = 512
LONGEST_JSON = 2**24  # bytes, of a configuration
_VALUES = 2**17  # that a text of any length may have
_LETTERS_OF_A_VALUE = 16  # on average, in configurations and indices: they name things
_MOST_PROBLEMS = 20


def class_or_value(said: object) -> str:
    """What a stranger has said where something else belongs: its class, if it has parts."""
    return short(said) if isinstance(said, (str, int, float, type(None))) else type(said).__name__


def name_problem(name: str) -> str | None:
    """Why a string may not name a tensor, if so. Names become parts of paths, and lines on a screen, elsewhere."""
    if not 0 < len(name) <= _LONGEST_NAME:
        return f"{short(name)} must have 1 to {_LONGEST_NAME} characters"
    if not name.isprintable() or ".." in name or "/" in name or "\\" in name:
        return f"{short(name)} must have no '..', '/', '\\' or control characters"
    return None


def refuse(path: Path, kind: str, problems: Iterable[str]) -> None:
    """Raise one AdapterError with all problems, or the first of very many; none is raised if there is none."""
    raise_all(f"{path} is not a {kind} file", problems, AdapterError, _MOST_PROBLEMS)


class TooManyValues(ValueError):
    """JSON has more values than its length lets expect: it would be read to many times its size."""


def parsed(text: str, letters: int, samples: bool = False) -> Any:
    """What JSON says; ValueError if it is none, or if it has many values of fewer letters than these on average.

    A value takes up to 120 bytes of memory, and two letters of text. Of `samples`, 0.0 and 1.0 do not count: weights
    may be full of them, and they take 32 bytes, and five letters.
    """
    values, most = sum(map(text.count, "[{,:")) - samples * text.count(".0, "), _VALUES + len(text) // letters
    if values > most:
        raise TooManyValues(f"must have at most {most} values, as long as it is, and may have {values}.")
    return json.loads(text)


def read_object(path: Path, longest: int = LONGEST_JSON) -> dict[str, Any]:
    """The object in a JSON file; AdapterError if it is too long, or something else."""
    return object_from(path, read_bytes(path, longest))


def read_bytes(path: Path, longest: int = LONGEST_JSON) -> bytes:
    """A JSON file as it is; AdapterError if it is too long."""

    def read(file: io.BufferedReader) -> bytes:
        size = file.seek(0, os.SEEK_END)
        if size > longest:
            raise AdapterError(f"{path} must have at most {longest} bytes, got {size}.")
        file.seek(0)
        return file.read(size)

    return read_steadily(path, read)


def object_from(path: Path, text: bytes) -> dict[str, Any]:
    """The object in what was read from a JSON file; AdapterError if it is something else."""
    try:
        content = parsed(text.decode("utf-8"), _LETTERS_OF_A_VALUE)
    except TooManyValues as error:
        raise AdapterError(f"{path} {error}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {type(error).__name__}.") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{path} must hold an object, got {instance(content)}.")
    return content


# ---- safetensors -----------------------------------------------------------------------------------------------------

HEADER_LIMIT = 8 * 2**20  # to parse a header takes up to 10 times its length
_LONGEST_ENTRY = 2**13  # letters: 64 sizes of 20 digits, and white space
_MOST_STRINGS = 2**16  # of metadata
_METADATA = "__metadata__"
_BETWEEN = re.compile(r"[ \t\n\r:,]*")
_LONGEST_HEADER = 100_000_000  # the format's own limit
MOST_DIMENSIONS = 64
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a file, its values not read: they are the file's bytes `start` to `stop`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a safetensors file says of itself."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path, limit: int = HEADER_LIMIT) -> Header:
    """Read and check the header of a safetensors file, and no tensor.

    Args:
        path: the file.
        limit: how many bytes the header may have. Longer ones are read only if the tensors are 4 times as long, so that
            a small file never costs much. Default: 8 MiB.

    Raises:
        OSError: there is no such file, or it cannot be read.
        AdapterError: the file is not a safetensors file; says what is wrong.
    """
    return read_steadily(path, lambda file: _header(file, path, limit))


def read_tensors(
    path: Path, check: Callable[[Mapping[str, str]], None] = lambda metadata: None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors, which own their memory, and its metadata.

    Args:
        path: the file.
        check: is given the metadata before any tensor is read, and raises if none should be. Default: nothing.

    Raises:
        OSError: there is no such file, or it cannot be read.
        AdapterError: the file is not a safetensors file, or it has a checksum and was changed after that was written.
    """

    def read(file: io.BufferedReader) -> tuple[dict[str, Tensor], dict[str, str]]:
        header = _header(file, path, HEADER_LIMIT)
        check(header.metadata)
        try:
            tensors = {name: _tensor(file, entry) for name, entry in header.tensors.items()}
        except (RuntimeError, MemoryError):  # torch's allocator raises the first
            raise AdapterError(f"{path} does not fit into memory.") from None
        except EOFError:
            raise AdapterError(f"{path} has changed while it was read.") from None
        if header.metadata.get("sha256") not in (None, checksum(tensors, header.metadata)):
            raise AdapterError(f"{path} is damaged: its content has changed since it was written (`sha256` says so).")
        return tensors, header.metadata

    return read_steadily(path, read)


def packed(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], function: str = "write_adapter"
) -> bytes:
    """The content of a safetensors file with a checksum; AdapterError if `read_tensors` could not read it."""
    unknown = (f"{name} has the dtype {t.dtype}." for name, t in tensors.items() if t.dtype not in _WORDS)
    raise_all(f"{function}: {path} is not written", unknown, AdapterError)
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        ready[name] = plain.clone() if storage in storages else plain  # safetensors refuses shared storage
        storages.add(storage)
    said = {**metadata, "format": "pt"}
    said["sha256"] = checksum(ready, said)
    try:
        content: bytes = safetensors.torch.save(ready, said)
    except KeyError as error:  # a dtype that safetensors learnt later
        writer = f"safetensors {safetensors.__version__}"
        raise AdapterError(
            f"{function}: {path} is not written: {writer} writes no {error.args[0]}; a newer one does."
        ) from None
    _parsed(path, _header_text(io.BytesIO(content), path, HEADER_LIMIT))
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


def _header(file: io.BufferedReader, path: Path, limit: int) -> Header:
    text = _header_text(file, path, limit)
    try:
        with safetensors.safe_open(path, "np"):  # parses the header, and asks whether it fits the file
            pass
    except safetensors.SafetensorError as error:
        refuse(path, "safetensors", [f"its header is wrong: {short(str(error), 200)}."])
    if not is_at(path, file):  # the two were not opened at once
        raise AdapterError(f"{path} has changed while it was read.")
    return _parsed(path, text)


def _header_text(file: io.BufferedReader | io.BytesIO, path: Path, limit: int) -> bytes:
    """The header of an open file, if it is not too long for what follows it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    first = file.read(8)
    length = int.from_bytes(first, "little")
    data = size - 8 - length
    if len(first) < 8 or data < 0:
        refuse(path, "safetensors", [f"its {size} bytes are too few: it is cut short, or something else."])
    allowed = min(max(limit, data // 4), _LONGEST_HEADER)
    if length > allowed:
        refuse(path, "safetensors", [f"its header may have {allowed} bytes, and has {length}."])
    return file.read(length)


def _parsed(path: Path, text: bytes) -> Header:
    """The header that `safetensors` has taken; AdapterError that lists what it should not have taken."""
    problems = [] if text.startswith(b"{") else ["its header must begin with '{'."]
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    try:
        for name, about in _members(text.decode("utf-8")) if not problems else ():
            if name == _METADATA:
                metadata = about
            elif problem := name_problem(name):
                problems.append(f"the name {problem}.")
            elif problem := _entry_problem(about):
                problems.append(f"{short(name)} {problem}.")
            else:
                start, stop = (8 + len(text) + offset for offset in about["data_offsets"])
                entries[name] = Entry(DTYPES[about["dtype"]], tuple(about["shape"]), start, stop)
    except (ValueError, RecursionError) as error:
        problems = [f"its header is wrong: {short(str(error), 200)}."]
    refuse(path, "safetensors", problems)
    return Header(entries, metadata)


def _members(text: str) -> Iterator[tuple[str, Any]]:
    """A header's members, one at a time, so that none costs much; one that is too long comes as None, and is the last.

    `safetensors` has found the text to be JSON: an object of entries, and strings as metadata.
    """
    decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode
    names: set[str] = set()
    at = 1
    while text[(at := _past(text, at)) : at + 1] != "}":
        name, at = decode(text, at)
        at = _past(text, at)
        if name in names:
            raise ValueError(f"it has {short(name)} twice")
        names.add(name)
        if name == _METADATA:
            strings, at = _strings(text, at)
            yield name, strings
            continue
        try:
            about, length = decode(text[at : at + _LONGEST_ENTRY])
        except json.JSONDecodeError:
            yield name, None
            return
        yield name, about
        at += length


def _strings(text: str, at: int) -> tuple[dict[str, str], int]:
    """The metadata that stand at a place, and the place after them."""
    decode, found = json.JSONDecoder().raw_decode, dict[str, str]()
    if text[at : at + 1] != "{":  # null, which some releases of `safetensors` take
        return found, decode(text, at)[1]
    at += 1
    while text[(at := _past(text, at)) : at + 1] != "}":
        key, at = decode(text, at)
        if key in found:
            raise ValueError(f"it has {short(key)} twice")
        if len(found) == _MOST_STRINGS:
            raise ValueError(f"it has more than {_MOST_STRINGS} entries of metadata")
        found[key], at = decode(text, _past(text, at))
    return found, at + 1


def _past(text: str, at: int) -> int:
    """The place of what follows white space, a colon or a comma."""
    found = _BETWEEN.match(text, at)
    assert found is not None, "nothing is there as well"
    return found.end()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"it has {short(twice)} twice")
    return made


def _entry_problem(about: Any) -> str | None:
    if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
        return "must have a dtype, a shape and data_offsets, and nothing else"
    word, shape = about["dtype"], about["shape"]
    if not isinstance(word, str) or word not in DTYPES:
        return f"has the dtype {class_or_value(word)}, which is none of {', '.join(DTYPES)}"
    if len(shape) > MOST_DIMENSIONS or math.prod(n or 1 for n in shape) >= 2**60:
        return f"must have a shape of at most {MOST_DIMENSIONS} sizes and fewer than 2**60 values"
    return None


def _tensor(file: io.BufferedReader, entry: Entry) -> Tensor:
    data = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    file.seek(entry.start)
    if file.readinto(data.numpy().data) < len(data):
        raise EOFError
    return data.view(entry.dtype).view(entry.shape)
