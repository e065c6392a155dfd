"""Files of `torch.save`: state dicts are read without unpickling, by the few instructions that write tensors down.

`torch.load(weights_only=True)` runs nothing of a stranger either. But it allocates what it is told to (a `bytearray` of
any size), compares no checksums, and has a zip reader of its own, which need not see the entries that were checked.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.adapters.files import DTYPES, MOST_DIMENSIONS, name_problem, open_file, reading, refuse, short

_LONGEST_PICKLE = 16 * 2**20
_LONGEST_DIRECTORY = 16 * 2**20
_MOST_INSTRUCTIONS = 4_000_000  # a tensor takes some 40
_CHUNK = 2**20
_WRAPPERS = ("model_state_dict", "state_dict")
_HARMLESS_FLAGS = 0x8 | 0x800  # sizes follow the data; names are UTF-8
_RESAVE = "load it where you trust it, and write it again with `torch.save(state_dict, path)`"
_Sizes = tuple[int, ...]
_WRONG = (
    *(ValueError, TypeError, LookupError, RuntimeError, OverflowError, MemoryError, EOFError, OSError),
    *(struct.error, zipfile.BadZipFile),
)


def read_torch(path: Path) -> dict[str, Tensor]:
    """Read a state dict that `torch.save` wrote: tensors by their names, on the CPU, without running any pickle.

    The dict may be the only entry of another, under "model_state_dict" or "state_dict". A tensor with several names
    is one tensor.

    Raises:
        OSError: there is no such file, or it cannot be read.
        AdapterError: the file is not of that kind, is damaged, or holds anything but dense tensors.
    """
    with reading(path), open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if file.read(4) != b"PK\3\4":
            refuse(path, "torch", [f"it is no zip file; if torch before 1.6 wrote it, {_RESAVE}."])
        try:
            _check_directory(file, size)
            with zipfile.ZipFile(file) as zipped:
                said = _Machine(_Archive(zipped, size)).run()
        except _Refusal as error:
            refuse(path, "torch", [f"{error}."])
        except _WRONG as error:
            refuse(path, "torch", [f"it is damaged: {type(error).__name__} {short(str(error))}."])
    if not isinstance(said, dict):
        refuse(path, "torch", [f"it must hold a state dict, got {short(said)}."])
    inner = next((said[wrapper] for wrapper in _WRAPPERS if wrapper in said), None)
    state: dict[str, Tensor] = inner if isinstance(inner, dict) and len(said) == 1 else said
    refuse(path, "torch", [f"{problem}." for name, value in state.items() if (problem := _problem(name, value))])
    return state


class _Refusal(ValueError):
    """What is wrong, in words for the user."""


def _problem(name: str, value: Any) -> str | None:
    if problem := name_problem(name):
        return f"the name {problem}"
    return None if isinstance(value, Tensor) else f"{short(name)} must be a tensor, got {short(value)}"


def _check_directory(file: io.BufferedReader, size: int) -> None:
    """Refuse a directory of entries that is long for its own sake, before `zipfile` makes objects of it."""
    file.seek(max(size - 98, 0))
    end = file.read(98).rjust(98, b"\0")  # as torch ends files: 56 bytes of zip64, 20 that say where, 22 of zip
    if end[76:80] != b"PK\5\6":
        raise _Refusal("its zip directory is not at its end: it is cut short, or something follows")
    length = int.from_bytes(end[88:92], "little")
    if end[56:60] == b"PK\6\7":
        length = max(length, int.from_bytes(end[40:48], "little"))
    if length > _LONGEST_DIRECTORY:
        raise _Refusal(f"its zip directory may have {_LONGEST_DIRECTORY} bytes, and has {length}")


@dataclass(frozen=True)
class _Storage:
    """An entry of the archive, and the dtype that its values are of."""

    entry: str
    dtype: torch.dtype


class _Archive:
    """The entries of a torch file, and tensors of their bytes."""

    def __init__(self, zipped: zipfile.ZipFile, size: int) -> None:
        self.zipped = zipped
        self.sizes = {info.filename: info.file_size for info in zipped.infolist()}
        if len(self.sizes) < len(zipped.infolist()):
            raise _Refusal("its zip directory has an entry twice")
        for info in zipped.infolist():
            packed = info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size
            if packed or info.flag_bits & ~_HARMLESS_FLAGS:
                raise _Refusal(f"its entry {short(info.filename)} is compressed or encrypted, as torch writes none")
        if sum(self.sizes.values()) > size:
            raise _Refusal("its entries are longer than the file")
        self.left = size  # bytes that different tensors may still take: overlapping ones could take any number
        self.read: dict[str, Tensor] = {}
        self.made: dict[tuple[Any, ...], Tensor] = {}
        pickles = [name for name in self.sizes if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refusal(f"it must have one entry data.pkl, got {len(pickles)}")
        self.root = pickles[0].removesuffix("data.pkl")
        order = f"{self.root}byteorder"
        if order in self.sizes and (self.sizes[order] != 6 or zipped.read(order) != b"little"):
            raise _Refusal("its byte order must be little")

    def pickle(self) -> bytes:
        name = f"{self.root}data.pkl"
        if self.sizes[name] > _LONGEST_PICKLE:
            raise _Refusal(f"its data.pkl may have {_LONGEST_PICKLE} bytes, and has {self.sizes[name]}")
        return self.zipped.read(name)

    def storage(self, said: Any) -> _Storage:
        kind, dtype, key, _, length = said  # the fourth is the device that it was on
        if not (kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str) and _natural(length)):
            raise _Refusal("its data.pkl describes a storage wrongly")
        name = f"{self.root}data/{key}"
        if self.sizes.get(name) != length * dtype.itemsize:
            raise _Refusal(f"a storage of {length} values of {dtype} has no entry of that size")
        return _Storage(name, dtype)

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Tensor:
        """The tensor that torch's `_rebuild_tensor_v2` and `_v3` make of the same arguments.

        The rest is: whether it has a gradient, its hooks, in v3 its dtype, and whether it is conjugate or negated.
        """
        _, hooks, *special = rest
        own_dtype = special.pop(0) if special and isinstance(special[0], torch.dtype) else None
        if not isinstance(storage, _Storage) or hooks or any(special):
            raise _Refusal("it has a tensor that is more than values of a storage")
        if not (_naturals(shape) and _naturals(stride) and len(shape) == len(stride) and _natural(offset)):
            raise _Refusal(f"it has a tensor whose shape or strides are not at most {MOST_DIMENSIONS} natural numbers")
        key = (storage.entry, own_dtype or storage.dtype, offset, shape, stride)
        if key not in self.made:
            self.made[key] = self._new(*key)
        return self.made[key]

    def _new(self, entry: str, dtype: torch.dtype, offset: int, shape: _Sizes, stride: _Sizes) -> Tensor:
        numel, length = math.prod(shape), self.sizes[entry] // dtype.itemsize
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if numel > length or (numel and last >= length):
            raise _Refusal(f"it has a tensor of the shape {short(str(shape))} in a storage of {length} values")
        self.left -= numel * dtype.itemsize
        if self.left < 0:
            raise _Refusal("its tensors overlap so much that they are longer than the file")
        if numel == 0:
            return torch.empty(shape, dtype=dtype)
        view = self._bytes(entry).view(dtype).as_strided(shape, stride, offset)
        return view if numel == length and view.is_contiguous() else view.clone(memory_format=torch.contiguous_format)

    def _bytes(self, entry: str) -> Tensor:
        """All of an entry; `zipfile` compares its checksum at the end."""
        if entry not in self.read:
            data = torch.empty(self.sizes[entry], dtype=torch.uint8)
            view = data.numpy().data
            with self.zipped.open(entry) as file:
                for start in range(0, len(view), _CHUNK):
                    part = view[start : start + _CHUNK]
                    part[:] = file.read(len(part))  # a ValueError if there is less
            self.read[entry] = data
        return self.read[entry]


class _Machine:
    """Carries out pickled instructions that make containers and tensors; any other is refused."""

    def __init__(self, archive: _Archive) -> None:
        self.archive = archive
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for count, (code, said, _) in enumerate(pickletools.genops(self.archive.pickle())):
            if count >= _MOST_INSTRUCTIONS:
                raise _Refusal(f"its data.pkl has more than {_MOST_INSTRUCTIONS} instructions")
            if code.name not in _INSTRUCTIONS:
                raise _Refusal(f"its data.pkl has the instruction {code.name}, which no state dict needs")
            _INSTRUCTIONS[code.name](self, said)
        (result,) = self.stack
        return result

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, number: int) -> list[Any]:
        """The last values of the stack, which must have that many after the last mark."""
        start = len(self.stack) - number
        if start < (self.marks[-1] if self.marks else 0):
            raise _Refusal("its data.pkl takes more than there is")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        return self.pop(len(self.stack) - start)

    def find(self, said: str) -> None:
        """A global's name stands for itself, and for nothing that could be called."""
        if said not in _CALLS and said not in _GLOBAL_DTYPES:
            raise _Refusal(f"its data.pkl asks for {short(said)}, which no state dict of tensors needs")
        self.push(_GLOBAL_DTYPES.get(said, said))

    def call(self, _: Any) -> None:
        name, arguments = self.pop(2)
        if not isinstance(name, str) or not isinstance(arguments, tuple):
            raise _Refusal("its data.pkl calls what cannot be called")
        self.push(_CALLS[name](self.archive, *arguments))

    def set(self, values: list[Any]) -> None:
        target = self.stack[-1]
        keys = values[::2]
        if not isinstance(target, dict) or not all(isinstance(key, str) for key in keys):  # to hash others may not end
            raise _Refusal("it must hold a state dict, its names being strings")
        new = dict(zip(keys, values[1::2], strict=True))
        if len(new) < len(keys) or target.keys() & new.keys():
            raise _Refusal("it has a name twice")
        target.update(new)


def _natural(said: Any) -> bool:
    return type(said) is int and 0 <= said < 2**60


def _naturals(said: Any) -> bool:
    return isinstance(said, tuple) and len(said) <= MOST_DIMENSIONS and all(map(_natural, said))


_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_GLOBAL_DTYPES = {f"torch {name}Storage": dtype for name, dtype in _STORAGES.items()}
_GLOBAL_DTYPES |= {"torch.storage UntypedStorage": torch.uint8}
_GLOBAL_DTYPES |= {str(dtype).replace(".", " "): dtype for dtype in DTYPES.values()}
_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": lambda archive: {},  # its entries are set one by one
    "torch._utils _rebuild_parameter": lambda archive, data, requires_grad, hooks: data,
    "torch._utils _rebuild_tensor_v2": _Archive.tensor,
    "torch._utils _rebuild_tensor_v3": _Archive.tensor,
}
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": lambda machine, said: None,
    "STOP": lambda machine, said: None,
    "MARK": lambda machine, said: machine.marks.append(len(machine.stack)),
    "NONE": lambda machine, said: machine.push(None),
    "NEWTRUE": lambda machine, said: machine.push(True),
    "NEWFALSE": lambda machine, said: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _Machine.push),
    "GLOBAL": _Machine.find,
    "BINPERSID": lambda machine, said: machine.push(machine.archive.storage(*machine.pop(1))),
    "REDUCE": _Machine.call,
    "BUILD": lambda machine, said: machine.pop(1),  # attributes of an OrderedDict: versions of modules
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, said: machine.memo.update({said: machine.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, said: machine.push(machine.memo[said])),
    "EMPTY_TUPLE": lambda machine, said: machine.push(()),
    "TUPLE1": lambda machine, said: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, said: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, said: machine.push(tuple(machine.pop(3))),
    "TUPLE": lambda machine, said: machine.push(tuple(machine.pop_to_mark())),
    "EMPTY_DICT": lambda machine, said: machine.push({}),
    "SETITEM": lambda machine, said: machine.set(machine.pop(2)),
    "SETITEMS": lambda machine, said: machine.set(machine.pop_to_mark()),
}
