"""Files of `torch.save`: state dicts of dense tensors, read by `torch.load(weights_only=True)`.

That runs nothing of a stranger. But it allocates what a pickle asks for (a `bytearray` of any size), hashes names that
may be tuples without end, believes the lengths of storages, compares no checksums, and has a zip reader of its own,
which need not see the entries that another one has checked. So the pickle's instructions are checked here first, every
entry is read with its checksum, and torch is given a file that is made of these.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.adapters.files import DTYPES, MOST_DIMENSIONS, class_or_value, name_problem, refuse
from lora.adapters.paths import read_steadily
from lora.errors import short

_LONGEST_PICKLE = 16 * 2**20
_LONGEST_DIRECTORY = 16 * 2**20
_MOST_INSTRUCTIONS = 4_000_000  # a tensor takes some 40
_WRAPPERS = ("model_state_dict", "state_dict", "model")  # the last is LitGPT's
_HARMLESS_FLAGS = 0x8 | 0x800  # sizes follow the data; names are UTF-8
_RESAVE = "load it where you trust it, and write it again with `torch.save(state_dict, path)`"

# A pickle's instructions as letters, and what it asks for: D a dict, V a tensor, P a parameter, c a storage, d a dtype.
_LETTERS = {
    **{"MARK": "(", "NONE": "N", "NEWTRUE": "b", "NEWFALSE": "b", "BINFLOAT": "N", "BINUNICODE": "u"},
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), "i"),
    **{"EMPTY_TUPLE": ")", "TUPLE1": "1", "TUPLE2": "2", "TUPLE3": "3", "TUPLE": "t", "EMPTY_DICT": "}"},
    **{"SETITEM": "s", "SETITEMS": "S", "REDUCE": "R", "BUILD": "B", "BINPERSID": "Q", "STOP": "."},
}
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
_STORAGE_DTYPES = {"torch.storage UntypedStorage": torch.uint8}
_STORAGE_DTYPES |= {f"torch {name}Storage": dtype for name, dtype in _STORAGES.items()}
_OWN_DTYPES = {str(dtype).replace(".", " "): dtype for dtype in DTYPES.values()}
_GLOBALS = {
    "collections OrderedDict": "D",
    "torch._utils _rebuild_tensor_v2": "V",
    "torch._utils _rebuild_tensor_v3": "V",
    "torch._utils _rebuild_parameter": "P",
    **dict.fromkeys(_STORAGE_DTYPES, "c"),
    **dict.fromkeys(_OWN_DTYPES, "d"),
}
# What an instruction has put on the stack, where it may be taken again: tuples in tuples in tuples would have no end.
_SHARED = {**{letter: letter for letter in "ucdDVPobiN"}, **dict.fromkeys("R}sSB", "o")}
_SIZES = r"(\)|i1|ii2|iii3|\(i*t)"
# The storage ("storage", its class, its key, a device, its length), an offset, a shape, strides, whether there is a
# gradient, no hooks, and sometimes a dtype. All tuples of a state dict are in here, so that none can be a name.
_TENSOR = re.compile(rf"V\(\(ucuuitQi{_SIZES}{_SIZES}b(?:N|D\)R)(d?)tR")
_PARAMETER = re.compile(r"PobD\)R3R")
# A dict and what it is filled with: tensors, numbers, …; an OrderedDict may have attributes, the versions of modules.
_FILLED = re.compile(r"\}(?:\([uibNo}]*S|[uibNo}]{2}s|\}B)+")
_DEEPEST = 8


def read_torch(path: Path) -> dict[str, Tensor]:
    """Read a state dict that `torch.save` wrote: tensors by their names, on the CPU, without running any pickle.

    The dict may be the only entry of another, under "model_state_dict", "state_dict" or "model". A tensor with several
    names is one tensor.

    Raises:
        OSError: there is no such file, or it cannot be read.
        AdapterError: the file is not of that kind, is damaged, or holds anything but dense tensors.
    """
    said = read_steadily(path, lambda file: _loaded(file, path))
    inner = next((said[wrapper] for wrapper in _WRAPPERS if wrapper in said), None)
    state = inner if isinstance(inner, dict) and len(said) == 1 else said
    refuse(path, "torch", (f"{problem}." for name, value in state.items() if (problem := _problem(name, value))))
    parts = {_place(tensor): tensor for tensor in state.values()}
    plain = {place: _plain(tensor) for place, tensor in parts.items()}
    return {name: plain[_place(tensor)] for name, tensor in state.items()}


def _loaded(file: io.BufferedReader, path: Path) -> Any:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(4) != b"PK\3\4":
        refuse(path, "torch", [f"it is no zip file; if torch before 1.6 wrote it, {_RESAVE}."])
    try:
        _check_directory(file, size)
        with zipfile.ZipFile(file) as zipped:
            return torch.load(_checked(zipped, size), map_location="cpu", weights_only=True)
    except _Refusal as error:
        refuse(path, "torch", [f"{error}."])
    except Exception as error:  # there is no list of what a wrong pickle makes torch raise
        refuse(path, "torch", [f"it is damaged: {type(error).__name__} {short(str(error))}."])
    raise AssertionError("a refusal is raised")


class _Refusal(ValueError):
    """What is wrong, in words for the user."""


def _problem(name: Any, value: Any) -> str | None:
    if not isinstance(name, str):
        return f"its names must be strings, got {class_or_value(name)}"
    if problem := name_problem(name):
        return f"the name {problem}"
    return None if isinstance(value, Tensor) else f"{short(name)} must be a tensor, got {class_or_value(value)}"


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors that are the same part of the same storage have in common."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _plain(tensor: Tensor) -> Tensor:
    """The values of a tensor, contiguous in a storage that holds nothing else."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)


# ---- the zip file ----------------------------------------------------------------------------------------------------


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


def _checked(zipped: zipfile.ZipFile, size: int) -> io.BytesIO:
    """The same file for torch, of entries whose checksums are right and a pickle that has been checked."""
    infos = zipped.infolist()
    for info in infos:
        packed = info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size
        if packed or info.flag_bits & ~_HARMLESS_FLAGS:
            raise _Refusal(f"its entry {short(info.filename)} is compressed or encrypted, as torch writes none")
    if len({info.filename.lower() for info in infos}) < len(infos):  # torch does not tell capitals from others
        raise _Refusal("its zip directory has an entry twice")
    sizes = {info.filename: info.file_size for info in infos}
    if sum(sizes.values()) > size:
        raise _Refusal("its entries are longer than the file")
    pickles = [name for name in sizes if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _Refusal(f"it must have one entry data.pkl, got {len(pickles)}")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in sizes and (sizes[f"{root}byteorder"] != 6 or zipped.read(f"{root}byteorder") != b"little"):
        raise _Refusal("its byte order must be little")
    if sizes[pickles[0]] > _LONGEST_PICKLE:
        raise _Refusal(f"its data.pkl may have {_LONGEST_PICKLE} bytes, and has {sizes[pickles[0]]}")
    content = zipped.read(pickles[0])
    data = f"{root}data/"  # an entry that is called as a storage elsewhere must not pass for it
    _check_pickle(content, {name.removeprefix(data): n for name, n in sizes.items() if name.startswith(data)}, size)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as written:
        for name, entry in (("data.pkl", content), ("version", b"3\n"), ("byteorder", b"little")):
            written.writestr(f"archive/{name}", entry)
        for name in sizes:
            entry = zipped.read(name)  # a BadZipFile if its checksum is another
            if name.startswith(data):
                written.writestr(f"archive/{name.removeprefix(root)}", entry)
    made.seek(0)
    return made


def _check_pickle(content: bytes, sizes: dict[str, int], left: int) -> None:
    """Refuse what is more than dicts of dense tensors, without making any of it.

    Args:
        content: the pickle.
        sizes: of storages in bytes, by their keys.
        left: how many bytes different tensors may take together: overlapping ones could take any number.
    """
    letters, values = _instructions(content)
    kinds: dict[str, str] = {}
    tensors: set[tuple[Any, ...]] = set()
    for found in _TENSOR.finditer(letters):
        kind, key, _, length, _, _, offset = values[found.start() + 4 : found.start() + 11]
        dtype = _STORAGE_DTYPES[kind]
        if length < 0 or sizes.get(key) != length * dtype.itemsize:
            raise _Refusal(f"a storage of {length} values of {dtype} has no entry of that size")
        if kinds.setdefault(key, kind) != kind:
            raise _Refusal(f"its storage {short(key)} is of two dtypes")
        dtype = _OWN_DTYPES[values[found.start(3)]] if found[3] else dtype
        shape, stride = (tuple(values[i] for i in range(*found.span(n)) if letters[i] == "i") for n in (1, 2))
        if not len(shape) == len(stride) <= MOST_DIMENSIONS or not all(
            0 <= n < 2**60 for n in (offset, *shape, *stride)
        ):
            raise _Refusal(f"it has a tensor whose shape or strides are not at most {MOST_DIMENSIONS} natural numbers")
        numel, length = math.prod(shape), sizes[key] // dtype.itemsize
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if numel > length or (numel and last >= length):
            raise _Refusal(f"it has a tensor of the shape {short(str(shape))} in a storage of {length} values")
        tensor = (key, dtype, offset, shape, stride)
        left -= 0 if tensor in tensors else numel * dtype.itemsize
        tensors.add(tensor)
        if left < 0:
            raise _Refusal("its tensors overlap so much that they are longer than the file")
    rest = re.sub(r"D\)R", "}", _PARAMETER.sub("o", _TENSOR.sub("o", letters)))
    for _ in range(_DEEPEST):
        rest = _FILLED.sub("}", rest)
    if rest != "}.":
        raise _Refusal("its data.pkl makes something else than dicts of dense tensors")
    names = [values[found.start()] for found in re.finditer("u(?=[VPo])", letters)]
    if len({*names}) < len(names):
        raise _Refusal("it has a name twice")  # of which torch would take the last


def _instructions(content: bytes) -> tuple[str, list[Any]]:
    """A pickle's instructions as letters, and what each says; what is taken from the memo is what was put there."""
    letters: list[str] = []
    values: list[Any] = []
    memo: dict[int, tuple[str, Any]] = {}
    instructions: Iterable[tuple[pickletools.OpcodeInfo, Any, Any]] = pickletools.genops(content)
    for count, (code, said, _) in enumerate(instructions):
        if count >= _MOST_INSTRUCTIONS:
            raise _Refusal(f"its data.pkl has more than {_MOST_INSTRUCTIONS} instructions")
        if code.name == "GLOBAL" and said not in _GLOBALS:
            raise _Refusal(f"its data.pkl asks for {short(said)}, which no state dict of tensors needs")
        if code.name in ("BINPUT", "LONG_BINPUT"):
            memo[said] = _SHARED.get(letters[-1], "?"), values[-1]
        elif code.name in ("BINGET", "LONG_BINGET", "GLOBAL") or code.name in _LETTERS:
            letter = _GLOBALS[said] if code.name == "GLOBAL" else _LETTERS.get(code.name)
            letter, said = memo[said] if letter is None else (letter, said)
            letters.append(letter)
            values.append(said)
        elif code.name != "PROTO" or said != 2:
            raise _Refusal(f"its data.pkl has the instruction {code.name}, which no state dict needs")
    return "".join(letters), values
