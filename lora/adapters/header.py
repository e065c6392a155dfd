"""The header of a safetensors file, checked to the last byte; and what every file of a stranger is checked for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lora.adapters.files import open_file, reading
from lora.errors import AdapterError, raise_all

HEADER_LIMIT = 8 * 2**20  # to parse a header takes up to 25 times its length
_LONGEST_HEADER = 100_000_000  # the format's own limit
_LONGEST_NAME = 512
_LONGEST_JSON = 2**24  # bytes, of a configuration or an index
MOST_DIMENSIONS = 64
_MOST_PROBLEMS = 20
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
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, its values not read: they are the file's bytes `start` to `stop`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def name_problem(name: str) -> str | None:
    """Why a string may not name a tensor, if so. Names become parts of paths, and lines on a screen, elsewhere."""
    if not 0 < len(name) <= _LONGEST_NAME:
        return f"{short(name)} must have 1 to {_LONGEST_NAME} characters"
    if not name.isprintable() or ".." in name or "/" in name or "\\" in name:
        return f"{short(name)} must have no '..', '/', '\\' or control characters"
    return None


def short(said: object) -> str:
    """A stranger's value for an error: one line of bounded length."""
    if not isinstance(said, (str, int, float, type(None))):
        return type(said).__name__
    text = ascii(said[:80] if isinstance(said, str) else said)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; AdapterError if it is too long, or something else."""
    with reading(path), open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        if size > _LONGEST_JSON:
            raise AdapterError(f"{path} must have at most {_LONGEST_JSON} bytes, got {size}.")
        file.seek(0)
        text = file.read(size)
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {type(error).__name__}.") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{path} must hold an object, got a {type(content).__name__}.")
    return content


def refuse(path: Path, kind: str, problems: Iterable[str]) -> None:
    """Raise one AdapterError with all problems, or the first of very many."""
    problems = list(problems)
    more = [f"and {len(problems) - _MOST_PROBLEMS} more."] if len(problems) > _MOST_PROBLEMS else []
    raise_all(f"{path} is not a {kind} file", problems[:_MOST_PROBLEMS] + more, AdapterError)


def parse_header(file: BinaryIO, path: Path, limit: int) -> Header:
    """The header of an open file, every word of it checked; AdapterError that lists what is wrong."""
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
    try:
        said = _json(file.read(length))
        metadata = said.pop("__metadata__", {})
    except (ValueError, RecursionError) as error:  # those of json and of UTF-8 are ValueErrors
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise AdapterError(f"{path} is not a safetensors file: its header is wrong: {why[:200]}.") from None
    entries, problems = _entries(said, 8 + length)
    problems += _metadata_problems(metadata)
    refuse(path, "safetensors", problems or _layout_problems(entries, 8 + length, size))
    return Header(entries, metadata)


def _json(content: bytes) -> dict[str, Any]:
    """The header's JSON: an object, its keys all different, its numbers integers that fit."""
    hooks = {"parse_int": _int, "parse_float": _no_number, "parse_constant": _no_number}
    text = content.decode("utf-8")
    if not text.startswith("{"):
        raise ValueError("it must begin with '{'")
    said: dict[str, Any] = json.loads(text, object_pairs_hook=_object, **hooks)  # type: ignore[arg-type]
    return said


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has {short(twice)} twice")
    return made


def _int(digits: str) -> int:
    return int(digits) if len(digits) < 20 else _no_number(digits)


def _no_number(said: str) -> int:
    raise ValueError(f"a number must be an integer below 2**63, got {said[:20]}")


def _entries(said: dict[str, Any], data: int) -> tuple[dict[str, Entry], list[str]]:
    entries, problems = {}, []
    for name, about in said.items():
        problem = name_problem(name)
        if problem:
            problems.append(f"the name {problem}.")
            continue
        try:
            entries[name] = _entry(about, data)
        except ValueError as error:
            problems.append(f"{short(name)} {error}.")
    return entries, problems


def _entry(about: Any, data: int) -> Entry:
    if not isinstance(about, dict) or about.keys() != _FIELDS:
        raise ValueError("must have a dtype, a shape and data_offsets, and nothing else")
    word, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(word, str) or word not in DTYPES:
        raise ValueError(f"has the dtype {short(word)}, which is none of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MOST_DIMENSIONS or math.prod(n or 1 for n in shape) >= 2**60:
        raise ValueError(f"must have a shape of at most {MOST_DIMENSIONS} sizes and fewer than 2**60 values")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError("must have two data_offsets, integers of at least 0")
    (start, stop), needs = offsets, math.prod(shape) * DTYPES[word].itemsize
    if stop - start != needs:
        raise ValueError(f"needs {needs} bytes for its shape and dtype, and has {stop - start}")
    return Entry(DTYPES[word], tuple(shape), data + start, data + stop)


def _naturals(said: Any) -> bool:
    return isinstance(said, list) and all(type(n) is int and 0 <= n < 2**63 for n in said)  # True is an int, too


def _metadata_problems(metadata: Any) -> Iterator[str]:
    if not isinstance(metadata, dict):
        yield f"its metadata must be an object, got {short(metadata)}."
        return
    for key, value in metadata.items():
        if not isinstance(value, str):
            yield f"the metadata's {short(key)} must be a string, got {short(value)}."
        elif not (_is_text(key) and _is_text(value)):
            yield f"the metadata's {short(key)} is not text: it has half a surrogate pair."


def _is_text(said: str) -> bool:
    return said.isascii() or not any("\ud800" <= char <= "\udfff" for char in said)


def _layout_problems(entries: dict[str, Entry], position: int, size: int) -> list[str]:
    """The first hole or overlap: whatever comes after it would be wrong as well."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            return [f"{short(name)} must begin at byte {position}, with no hole and no overlap, got {entry.start}."]
        position = entry.stop
    return [] if position == size else [f"it must end with its tensors at byte {position}, and has {size} bytes."]
