"""Safetensors files: right ones are read to the bit, wrong ones are refused before they cost anything."""

import json
import os
import re
import struct
import time
import tracemalloc

import pytest
import safetensors
import safetensors.torch
import torch
from tensor_files import TENSORS, entry, is_written, own_their_memory, raw, refused, same
from torch import nn

import lora
from lora.adapters import files, saving
from lora.formats.torch_files import read_torch


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def test_what_safetensors_writes_is_read_to_the_bit(path):
    safetensors.torch.save_file(TENSORS, path, {"of": "another tool"})
    tensors, metadata = files.read_tensors(path)
    same({name: tensors[name] for name in TENSORS}, TENSORS)
    assert len(tensors) == len(TENSORS)
    assert metadata == {"of": "another tool"}


def test_what_is_written_is_read_by_safetensors_to_the_bit(path):
    saving.write_tensors(path, TENSORS, {"x": "y\n\x00Ä", "format": "tf"})
    theirs = safetensors.torch.load_file(path)
    same({name: theirs[name] for name in TENSORS}, TENSORS)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.pop("sha256")
    assert metadata == {"x": "y\n\x00Ä", "format": "pt"}
    mine = files.read_tensors(path)[0]
    same({name: mine[name] for name in TENSORS}, TENSORS)


def test_views_parameters_and_tied_tensors_are_written_by_their_values(path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"transposed": base.T, "part": base[1:, ::2], "tied": base, "parameter": nn.Parameter(base)}
    saving.write_tensors(path, tensors, {})
    got = files.read_tensors(path)[0]
    assert {name: t.tolist() for name, t in got.items()} == {name: t.tolist() for name, t in tensors.items()}


def test_tensors_own_their_memory_and_leave_the_file_alone(path):
    saving.write_tensors(path, TENSORS, {})
    before = path.read_bytes()
    tensors = files.read_tensors(path)[0]
    assert own_their_memory(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert path.read_bytes() == before


def test_the_header_is_read_without_tensors(path):
    safetensors.torch.save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path, {"k": "v"})
    header = files.read_header(path)
    data = path.stat().st_size - 32
    assert header.tensors == {
        "a": files.Entry(torch.float32, (2, 3), data, data + 24),
        "b": files.Entry(torch.bfloat16, (4,), data + 24, data + 32),
    }
    assert header.metadata == {"k": "v"}


A = json.dumps(entry()).encode()
knows_all = pytest.mark.skipif(not is_written(torch.complex64), reason="an older safetensors refuses dtypes by itself")
# What `safetensors` lets through, or some versions of it do.
HEADERS = {
    "white space first": (b' {"a": %s}' % A, "its header must begin with '{'"),
    "a name twice": (b'{"a": %s, "a": %s}' % (A, A), "it has 'a' twice"),
    "metadata twice": (b'{"__metadata__": {"x": "y", "x": "y"}, "a": %s}' % A, "it has 'x' twice"),
    "more than that": ({"a": entry(more=1)}, "'a' must have a dtype, a shape and data_offsets, and nothing else."),
    "much more than that": (b'{"a": %s9%s}' % (A[:-1] + b', "more": ', b"9" * 5000 + b"}"), "its header is wrong"),
    "a list for an entry": ({"a": ["F32", [2], [0, 8]]}, "'a' must have a dtype, a shape and data_offsets"),
    "an object for a dtype": ({"a": entry({"F32": None})}, "'a' has the dtype dict"),
    "65 sizes": ({"a": entry(shape=[2, *[1] * 64])}, "'a' must have a shape of at most 64 sizes"),
    "sizes beyond 2**60 and zero": (
        {"a": entry(shape=[2**30, 2**30, 0], offsets=[0, 0]), "b": entry()},
        "'a' must have a shape of at most 64 sizes and fewer than 2**60 values",
    ),
    "a dtype that torch has not": pytest.param(
        {"a": entry("F4", shape=[16])}, "'a' has the dtype 'F4', which is none of F64, ", marks=knows_all
    ),
}
# What `safetensors` itself refuses.
REFUSED = {
    "no object": b"[]",
    "no JSON": b"{'a': 1}",
    "more after it": b"{}{}",
    "latin-1": b'{"\xe4": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a dtype twice": b'{"a": {"dtype": "F32", "dtype": "F32"}}',
    "nested deeply": b'{"a":' * 10**5,
    "lists nested deeply": b'{"a":' + b"[" * 10**5,
    "a huge integer": b'{"a": %s}' % (b"9" * 10**5),
    "2**64": {"a": entry(shape=[2**64])},
    "2**63": {"a": entry(shape=[2**63])},
    "a fraction": {"a": entry(shape=[2.0])},
    "NaN": b'{"a": NaN}',
    "-Infinity": b'{"a": -Infinity}',
    "metadata in a list": {"__metadata__": ["x"]},
    "metadata of nothing": {"__metadata__": None},
    "metadata of numbers": {"__metadata__": {"x": 1}},
    "half a pair": b'{"__metadata__": {"x": "\\ud800"}}',
    "half a pair as a key": b'{"__metadata__": {"\\udfff": "x"}}',
    "an entry of nothing": {"a": None},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "an unknown dtype": {"a": entry("F31")},
    "a dtype in a list": {"a": entry(["F32"])},
    "a negative size": {"a": entry(shape=[-2])},
    "two negative sizes": {"a": entry(shape=[-2, -1])},
    "true as a size": {"a": entry(shape=[2, True])},
    "a shape in words": {"a": {**entry(), "shape": "2"}},
    "sizes beyond 2**60": {"a": entry(shape=[2**30, 2**30])},
    "many huge sizes": {"a": entry(shape=[2**62] * 20_000)},
    "one offset": {"a": entry(offsets=[8])},
    "three offsets": {"a": entry(offsets=[0, 8, 8])},
    "a negative offset": {"a": entry(offsets=[-8, 0])},
    "offsets swapped": {"a": entry(offsets=[8, 0])},
    "offsets too near": {"a": entry(offsets=[0, 4])},
    "offsets too far": {"a": entry(offsets=[0, 80])},
    "a hole before": {"a": entry(offsets=[4, 12])},
    "a hole between": {"a": entry("U8", [3], [0, 3]), "b": entry("U8", [4], [4, 8])},
    "an overlap": {"a": entry("U8", [5], [0, 5]), "b": entry("U8", [4], [4, 8])},
    "twice the same": {"a": entry(), "b": entry()},
    "more data": {"a": entry("U8", [7], [0, 7])},
    "less data": {"a": entry("U8", [9], [0, 9])},
    "no tensors, but data": {},
}
HEADERS |= {name: (header, "its header is wrong: '") for name, header in REFUSED.items()}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_wrong_is_refused(path, header, message):
    path.write_bytes(raw(header, b"\0" * 8))
    for read in files.read_header, files.read_tensors:
        refused(read, path, f"{path} is not a safetensors file", message)


NAMES = ["", "a/b", "/etc/passwd", "a\\b", "..", "a..b", "a\nb", "a\0b", "a\x1b[2J", "a\u202eb", "\ud800", "a" * 513]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_is_none_is_refused_wherever_it_stands(path, name):
    path.write_bytes(raw({name: entry()}, b"\0" * 8))
    wrong = "its header is wrong" if name == "\ud800" else "the name "
    message = refused(files.read_tensors, path, "is not a safetensors file", wrong)
    assert message.isascii()
    assert message.count("\n") == 1
    torch.save({name.replace("\ud800", "\udfff"): torch.ones(2)}, path)
    refused(read_torch, path, "is not a torch file", "the name ")
    path.write_bytes(b"old")
    with pytest.raises((lora.AdapterError, UnicodeEncodeError)):
        saving.write_tensors(path, {name: torch.ones(2)}, {})
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", ["a", "a" * 512, "a b", "Ä名", "layers.0.q_proj.lora_A.weight", ".a"])
def test_other_names_are_fine(path, name):
    saving.write_tensors(path, {name: torch.ones(2)}, {})
    assert list(files.read_tensors(path)[0]) == [name]
    torch.save({name: torch.ones(2)}, path)
    assert list(read_torch(path)) == [name]


@knows_all
def test_one_error_lists_all_that_is_wrong_or_the_first_of_very_many(path):
    empty = entry(shape=[0], offsets=[0, 0])
    path.write_bytes(raw({"a": {**empty, "more": 1}, "b/": empty, "c": entry("F4", [0], [0, 0]), "d": empty}))
    assert refused(files.read_tensors, path).count("\n") == 3
    path.write_bytes(raw({f"x{i}": {**empty, "more": 1} for i in range(5000)}))
    assert refused(files.read_tensors, path, "x19", "and 4980 more.").count("\n") == 21


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, -100, -1])
def test_a_file_cut_short_is_refused(path, size):
    saving.write_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:size])
    refused(files.read_tensors, path, "is not a safetensors file")


@pytest.mark.parametrize("claim", [2**63, 2**64 - 1, 10**8, 17])
def test_a_header_longer_than_the_file_is_refused_at_once(path, claim):
    path.write_bytes(struct.pack("<Q", claim) + b"{" * 16)
    refused(files.read_header, path, "its 24 bytes are too few")


@pytest.mark.parametrize("size", [100_000_000, 83_000_000, 9 * 2**20])
def test_a_long_header_of_little_is_refused_before_it_is_read(path, size):
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", size - 8))
        file.truncate(size)
    tracemalloc.start()
    started = time.process_time()
    refused(files.read_tensors, path, "its header may have 8388608 bytes")
    took, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 0.5
    assert peak < 2**20


def test_the_longest_header_that_is_read_costs_little(path):
    known = json.dumps(entry(shape=[0], offsets=[0, 0])).encode()[:-1]
    path.write_bytes(raw(b'{"a": %s, "more": [%s1]}}' % (known, b"[]," * (8 * 2**20 // 3 - 50))))
    tracemalloc.start()
    refused(files.read_tensors, path, "'a' must have a dtype")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * 2**20


def test_a_longer_header_is_read_if_the_tensors_are_longer_still(path):
    header = json.dumps({"a": entry("U8", [400], [0, 400])})
    for length, fine in [(100, True), (101, False)]:
        path.write_bytes(raw(header.ljust(length).encode(), b"\1" * 400))
        if fine:
            assert files.read_header(path, limit=50).tensors["a"].shape == (400,)
        else:
            refused(lambda path: files.read_header(path, limit=50), path, "may have 100 bytes, and has 101")
            assert files.read_header(path, limit=101).tensors["a"].shape == (400,)


def test_an_adapter_with_more_tensors_than_headers_hold_is_not_written(path):
    metadata = {"lora": "x" * 8 * 2**20}
    with pytest.raises(lora.AdapterError, match="its header may have 8388608 bytes"):
        saving.write_tensors(path, {"a": torch.ones(2)}, metadata)
    assert not path.exists()


def test_dtypes_that_have_no_place_are_refused_together(path):
    tensors = {"a": torch.ones(2, dtype=torch.complex128), "b": torch.ones(2), "c": torch.ones(2).to(torch.complex128)}
    with pytest.raises(lora.AdapterError) as caught:
        saving.write_tensors(path, tensors, {})
    assert "a has the dtype torch.complex128" in str(caught.value)
    assert "c has the dtype torch.complex128" in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize("read", [files.read_header, files.read_tensors, read_torch])
def test_a_file_that_is_not_there_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError) as caught:
        read(tmp_path / "nothing")
    assert str(caught.value) == f"there is no file {tmp_path / 'nothing'}."
    with pytest.raises(IsADirectoryError) as caught:
        read(tmp_path)
    assert str(caught.value) == f"{tmp_path} is not read: it is a folder, and must be a file."


def test_a_file_that_shrinks_while_it_is_read_is_refused(path, monkeypatch):
    def then_shrink(*args):
        header = parse(*args)
        os.truncate(path, 10_000)
        return header

    parse = files._header
    saving.write_tensors(path, {"a": torch.ones(100_000)}, {})
    monkeypatch.setattr(files, "_header", then_shrink)
    refused(files.read_tensors, path, "has changed while it was read")


def test_a_file_that_fits_no_memory_is_refused(path, monkeypatch):
    def allocate(*_):
        torch.empty(2**60, dtype=torch.uint8)

    saving.write_tensors(path, TENSORS, {})
    monkeypatch.setattr(files, "_tensor", allocate)
    refused(files.read_tensors, path, "does not fit into memory")


def test_a_dtype_that_this_safetensors_does_not_write_is_refused_in_words(path, monkeypatch):
    """Releases before 0.7 know no complex numbers, and those before 0.8 not all dtypes of eight bits."""

    def save(tensors, metadata):
        raise KeyError(torch.complex64)

    monkeypatch.setattr(safetensors.torch, "save", save)
    said = f"write_adapter: {path} is not written: safetensors {safetensors.__version__} writes no torch.complex64; "
    with pytest.raises(lora.AdapterError, match=f"^{re.escape(said)}a newer one does\\.$"):
        files.packed(path, {"a": torch.ones(2).cfloat()}, {})
