"""Tensor files: right ones are read to the bit, wrong ones are refused before they cost anything."""

import hashlib
import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn
from toy_model import AdapterFile, Model, content, snapshot

import lora
from lora.formats import safe

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]
TENSORS = {str(dtype).replace("torch.", ""): (torch.arange(6).view(2, 3) / 2).to(dtype) for dtype in DTYPES}
TENSORS |= {
    "a scalar": torch.tensor(3.0),
    "empty": torch.ones(0, 3),
    "x.Ä名": torch.randn(5),
    "five": torch.randn(1, 2, 1, 3, 1),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def same(got, expected):
    assert list(got) == list(expected)
    assert {name: content(t) for name, t in got.items()} == {name: content(t) for name, t in expected.items()}
    assert all(type(t) is torch.Tensor and t.is_contiguous() and not t.requires_grad for t in got.values())


def own_their_memory(tensors):
    sizes = [t.untyped_storage().nbytes() == t.numel() * t.itemsize for t in tensors.values()]
    starts = {t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()}
    return all(sizes) and len(starts) == sum(t.numel() > 0 for t in tensors.values())


def refused(read, path, *messages):
    with pytest.raises(lora.AdapterError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 10_000
    for message in messages:
        assert message in str(caught.value)
    return str(caught.value)


def raw(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


# ---- safetensors -----------------------------------------------------------------------------------------------


def test_what_safetensors_writes_is_read_to_the_bit(path):
    safetensors.torch.save_file(TENSORS, path, {"of": "another tool"})
    tensors, metadata = safe.read_tensors(path)
    same({name: tensors[name] for name in TENSORS}, TENSORS)
    assert len(tensors) == len(TENSORS)
    assert metadata == {"of": "another tool"}


def test_what_is_written_is_read_by_safetensors_to_the_bit(path):
    safe.write_tensors(path, TENSORS, {"x": "y\n\x00Ä", "format": "tf"})
    theirs = safetensors.torch.load_file(path)
    same({name: theirs[name] for name in TENSORS}, TENSORS)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.pop("sha256")
    assert metadata == {"x": "y\n\x00Ä", "format": "pt"}
    mine = safe.read_tensors(path)[0]
    same({name: mine[name] for name in TENSORS}, TENSORS)


def test_views_parameters_and_tied_tensors_are_written_by_their_values(path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"transposed": base.T, "part": base[1:, ::2], "tied": base, "parameter": nn.Parameter(base)}
    safe.write_tensors(path, tensors, {})
    got = safe.read_tensors(path)[0]
    assert {name: t.tolist() for name, t in got.items()} == {name: t.tolist() for name, t in tensors.items()}


def test_tensors_own_their_memory_and_leave_the_file_alone(path):
    safe.write_tensors(path, TENSORS, {})
    before = path.read_bytes()
    tensors = safe.read_tensors(path)[0]
    assert own_their_memory(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert path.read_bytes() == before


def test_the_header_is_read_without_tensors(path):
    safetensors.torch.save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path, {"k": "v"})
    header = safe.read_header(path)
    data = path.stat().st_size - 32
    assert header.tensors == {
        "a": safe.Entry(torch.float32, (2, 3), data, data + 24),
        "b": safe.Entry(torch.bfloat16, (4,), data + 24, data + 32),
    }
    assert header.metadata == {"k": "v"}


A = {"a": entry()}
HEADERS = {
    "no object": (b"[]", "it must begin with '{'"),
    "white space first": (b" {}", "it must begin with '{'"),
    "no JSON": (b"{'a': 1}", "its header is wrong"),
    "more after it": (b"{}{}", "its header is wrong"),
    "latin-1": (b'{"\xe4": 1}', "its header is wrong"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "its header is wrong"),
    "a name twice": (b'{"a": 1, "b": 2, "a": 1}', "it has 'a' twice"),
    "a dtype twice": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "it has 'dtype' twice"),
    "metadata twice": (b'{"__metadata__": {"x": "y", "x": "y"}}', "it has 'x' twice"),
    "nested deeply": (b'{"a":' * 10**5, "nested too deeply"),
    "lists nested deeply": (b'{"a":' + b"[" * 10**5, "nested too deeply"),
    "a huge integer": (b'{"a": %s}' % (b"9" * 10**5), "a number must be an integer below 2**63, got 99999"),
    "2**64": ({"a": entry(shape=[2**64])}, "a number must be an integer"),
    "2**63": ({"a": entry(shape=[2**63])}, "'a' must have a shape of at most 64 sizes"),
    "a fraction": ({"a": entry(shape=[2.0])}, "a number must be an integer below 2**63, got 2.0"),
    "NaN": (b'{"a": NaN}', "must be an integer below 2**63, got NaN"),
    "-Infinity": (b'{"a": -Infinity}', "must be an integer below 2**63, got -Infinity"),
    "metadata in a list": ({"__metadata__": ["x"]}, "its metadata must be an object, got list."),
    "metadata of nothing": ({"__metadata__": None}, "its metadata must be an object, got None."),
    "metadata of numbers": ({"__metadata__": {"x": 1}}, "the metadata's 'x' must be a string, got 1."),
    "half a pair": (b'{"__metadata__": {"x": "\\ud800"}}', "the metadata's 'x' is not text"),
    "half a pair as a key": (b'{"__metadata__": {"\\udfff": "x"}}', "is not text"),
    "an entry of nothing": ({"a": None}, "'a' must have a dtype, a shape and data_offsets, and nothing else."),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "'a' must have a dtype, a shape and data_offsets"),
    "more than that": ({"a": entry(more=1)}, "'a' must have a dtype, a shape and data_offsets, and nothing else."),
    "an unknown dtype": ({"a": entry("F31")}, "'a' has the dtype 'F31', which is none of F64, F32, "),
    "a dtype in a list": ({"a": entry(["F32"])}, "'a' has the dtype list"),
    "a negative size": ({"a": entry(shape=[-2])}, "'a' must have a shape"),
    "two negative sizes": ({"a": entry(shape=[-2, -1])}, "'a' must have a shape"),
    "true as a size": ({"a": entry(shape=[2, True])}, "'a' must have a shape"),
    "a shape in words": ({"a": {**entry(), "shape": "2"}}, "'a' must have a shape"),
    "65 sizes": ({"a": entry(shape=[2, *[1] * 64])}, "'a' must have a shape of at most 64 sizes"),
    "sizes beyond 2**60": ({"a": entry(shape=[2**30, 2**30])}, "fewer than 2**60 values"),
    "sizes beyond 2**60 and zero": ({"a": entry(shape=[2**30, 2**30, 0], offsets=[0, 0])}, "fewer than 2**60 values"),
    "many huge sizes": ({"a": entry(shape=[2**62] * 20_000)}, "at most 64 sizes"),
    "one offset": ({"a": entry(offsets=[8])}, "'a' must have two data_offsets"),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, "'a' must have two data_offsets"),
    "a negative offset": ({"a": entry(offsets=[-8, 0])}, "'a' must have two data_offsets"),
    "offsets swapped": ({"a": entry(offsets=[8, 0])}, "'a' needs 8 bytes for its shape and dtype, and has -8."),
    "offsets too near": ({"a": entry(offsets=[0, 4])}, "'a' needs 8 bytes for its shape and dtype, and has 4."),
    "offsets too far": ({"a": entry(offsets=[0, 80])}, "'a' needs 8 bytes for its shape and dtype, and has 80."),
    "a hole before": ({"a": entry(offsets=[4, 12])}, "'a' must begin at byte"),
    "a hole between": ({"a": entry("U8", [3], [0, 3]), "b": entry("U8", [4], [4, 8])}, "'b' must begin at byte"),
    "an overlap": ({"a": entry("U8", [5], [0, 5]), "b": entry("U8", [4], [4, 8])}, "'b' must begin at byte"),
    "twice the same": ({"a": entry(), "b": entry()}, "'b' must begin at byte"),
    "more data": ({"a": entry("U8", [7], [0, 7])}, "it must end with its tensors at byte"),
    "less data": ({"a": entry("U8", [9], [0, 9])}, "it must end with its tensors at byte"),
    "no tensors, but data": ({}, "it must end with its tensors at byte 10, and has 18 bytes."),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_wrong_is_refused(path, header, message):
    path.write_bytes(raw(header, b"\0" * 8))
    for read in safe.read_header, safe.read_tensors:
        refused(read, path, f"{path} is not a safetensors file", message)


NAMES = ["", "a/b", "/etc/passwd", "a\\b", "..", "a..b", "a\nb", "a\0b", "a\x1b[2J", "a\u202eb", "\ud800", "a" * 513]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_is_none_is_refused_wherever_it_stands(path, name):
    path.write_bytes(raw({name: entry()}, b"\0" * 8))
    message = refused(safe.read_tensors, path, "is not a safetensors file", "the name ")
    assert message.isascii()
    assert message.count("\n") == 1
    torch.save({name.replace("\ud800", "\udfff"): torch.ones(2)}, path)
    refused(safe.read_torch, path, "is not a torch file", "the name ")
    path.write_bytes(b"old")
    with pytest.raises((lora.AdapterError, UnicodeEncodeError)):
        safe.write_tensors(path, {name: torch.ones(2)}, {})
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", ["a", "a" * 512, "a b", "Ä名", "layers.0.q_proj.lora_A.weight", ".a"])
def test_other_names_are_fine(path, name):
    safe.write_tensors(path, {name: torch.ones(2)}, {})
    assert list(safe.read_tensors(path)[0]) == [name]
    torch.save({name: torch.ones(2)}, path)
    assert list(safe.read_torch(path)) == [name]


def test_one_error_lists_all_that_is_wrong_or_the_first_of_very_many(path):
    path.write_bytes(raw({"a": None, "b/": entry(), "c": entry("F31"), "__metadata__": {"x": 1}}))
    assert refused(safe.read_tensors, path).count("\n") == 4
    path.write_bytes(raw({f"x{i}": None for i in range(5000)}))
    assert refused(safe.read_tensors, path, "x19", "and 4980 more.").count("\n") == 21


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, -100, -1])
def test_a_file_cut_short_is_refused(path, size):
    safe.write_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:size])
    refused(safe.read_tensors, path, "is not a safetensors file")


@pytest.mark.parametrize("claim", [2**63, 2**64 - 1, 10**8, 17])
def test_a_header_longer_than_the_file_is_refused_at_once(path, claim):
    path.write_bytes(struct.pack("<Q", claim) + b"{" * 16)
    refused(safe.read_header, path, "its 24 bytes are too few")


@pytest.mark.parametrize("size", [100_000_000, 83_000_000, 9 * 2**20])
def test_a_long_header_of_little_is_refused_before_it_is_read(path, size):
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", size - 8))
        file.truncate(size)
    tracemalloc.start()
    started = time.process_time()
    refused(safe.read_tensors, path, "its header may have 8388608 bytes")
    took, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 0.5
    assert peak < 2**20


def test_the_longest_header_that_is_read_costs_little(path):
    path.write_bytes(raw(b'{"a":[' + b"[]," * (8 * 2**20 // 3 - 10) + b"1]}"))
    tracemalloc.start()
    refused(safe.read_tensors, path, "'a' must have a dtype")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * 2**20


def test_a_longer_header_is_read_if_the_tensors_are_longer_still(path):
    header = json.dumps({"a": entry("U8", [400], [0, 400])})
    for length, fine in [(100, True), (101, False)]:
        path.write_bytes(raw(header.ljust(length).encode(), b"\1" * 400))
        if fine:
            assert safe.read_header(path, limit=50).tensors["a"].shape == (400,)
        else:
            refused(lambda path: safe.read_header(path, limit=50), path, "may have 100 bytes, and has 101")
            assert safe.read_header(path, limit=101).tensors["a"].shape == (400,)


def test_an_adapter_with_more_tensors_than_headers_hold_is_not_written(path):
    metadata = {"lora": "x" * 8 * 2**20}
    with pytest.raises(lora.AdapterError, match="its header may have 8388608 bytes"):
        safe.write_tensors(path, {"a": torch.ones(2)}, metadata)
    assert not path.exists()


def test_dtypes_that_have_no_place_are_refused_together(path):
    tensors = {"a": torch.ones(2, dtype=torch.complex128), "b": torch.ones(2), "c": torch.ones(2).to(torch.complex128)}
    with pytest.raises(lora.AdapterError) as caught:
        safe.write_tensors(path, tensors, {})
    assert "a has the dtype torch.complex128" in str(caught.value)
    assert "c has the dtype torch.complex128" in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize("read", [safe.read_header, safe.read_tensors, safe.read_torch])
def test_a_file_that_is_not_there_is_named(tmp_path, read):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            read(path)
        assert str(caught.value) == f"there is no adapter file {path}."


def test_a_file_that_shrinks_while_it_is_read_is_refused(path, monkeypatch):
    def then_shrink(*args):
        header = parse(*args)
        os.truncate(path, 10_000)
        return header

    parse = safe.parse_header
    safe.write_tensors(path, {"a": torch.ones(100_000)}, {})
    monkeypatch.setattr(safe, "parse_header", then_shrink)
    refused(safe.read_tensors, path, "has changed while it was read")


def test_a_file_that_fits_no_memory_is_refused(path, monkeypatch):
    def allocate(*_):
        torch.empty(2**60, dtype=torch.uint8)

    safe.write_tensors(path, TENSORS, {})
    monkeypatch.setattr(safe, "_tensor", allocate)
    refused(safe.read_tensors, path, "does not fit into memory")


# ---- checksums -------------------------------------------------------------------------------------------------


def test_the_checksum_is_what_the_format_says():
    about = b'[{"format": "pt", "lora": "\\u00c4"}, {"a": ["I16", 2, 1], "b": ["F32"]}]'
    data = np.array([1, 2], "<i2").tobytes() + np.array(0.5, "<f4").tobytes()
    tensors = {"b": torch.tensor(0.5), "a": torch.tensor([[1], [2]], dtype=torch.int16)}
    metadata = {"lora": "Ä", "sha256": "old", "format": "pt"}
    assert safe.checksum(tensors, metadata) == hashlib.sha256(about + data).hexdigest()


T = torch.arange(1.0, 7.0)
CHANGES = {
    "a value": {"a": torch.tensor([1, 2, 3, 4, 5, 7.0])},
    "a shape": {"a": T.view(2, 3)},
    "a dtype": {"a": T.view(torch.int32)},
    "a dtype of half": {"a": T.view(torch.int64)},
    "names swapped": {"a": -T, "b": T},
    "a tensor more": {"c": T},
    "an empty tensor more": {"c": T[:0]},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_change_after_the_checksum_is_found(path, changes):
    tensors = {"a": T, "b": -T}
    safe.write_tensors(path, tensors, {"x": "y"})
    metadata = safe.read_tensors(path)[1]
    safetensors.torch.save_file({name: t.clone() for name, t in (tensors | changes).items()}, path, metadata)
    refused(safe.read_tensors, path, "its content has changed since it was written")


@pytest.mark.parametrize("changes", [{"x": "z"}, {"z": "y"}, {"sha256": "0" * 64}, {"sha256": ""}], ids=str)
def test_a_change_of_metadata_is_found(path, changes):
    safe.write_tensors(path, {"a": T}, {"x": "y"})
    metadata = safe.read_tensors(path)[1]
    safetensors.torch.save_file({"a": T}, path, metadata | changes)
    refused(safe.read_tensors, path, "its content has changed since it was written")
    safetensors.torch.save_file({"a": T}, path, {key: value for key, value in metadata.items() if key != "x"})
    refused(safe.read_tensors, path, "its content has changed since it was written")


def test_another_order_or_padding_is_no_change(path):
    safe.write_tensors(path, {"a": T, "b": -T}, {"x": "y"})
    metadata = safe.read_tensors(path)[1]
    header = {"b": entry(shape=[6], offsets=[0, 24]), "a": entry(shape=[6], offsets=[24, 48])}
    header["__metadata__"] = dict(reversed(metadata.items()))
    path.write_bytes(raw(json.dumps(header, indent=4).encode(), (-T).numpy().tobytes() + T.numpy().tobytes()))
    same(safe.read_tensors(path)[0], {"b": -T, "a": T})


# ---- lora's own files ------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    return AdapterFile(tmp_path / "adapter.safetensors", target_modules=["q_proj"], r=2)


def rewrite(file, about=None, **metadata):
    said = {"lora": json.dumps(file.about | (about or {})), **metadata}
    safetensors.torch.save_file(file.tensors, file.path, said)
    model = file.model(True)
    before = snapshot(model)
    message = refused(lambda path: lora.load_adapter(model, path), file.path)
    assert snapshot(model) == before
    return message


def test_a_file_of_loras_without_a_checksum_is_refused(file):
    assert "has no checksum: its metadata has no entry 'sha256'" in rewrite(file)


def test_a_file_of_loras_with_another_checksum_is_refused(file):
    assert "its content has changed since it was written" in rewrite(file, sha256="0" * 64)


@pytest.mark.parametrize("version", [1, 3, "2", None, [2]])
def test_the_version_is_asked_for_before_the_checksum_or_anything_else(file, version):
    said = f"is an adapter of version {version!r}; this release reads version 2."
    assert said in rewrite(file, {"version": version})
    assert said in rewrite(file, {"version": version, "modules": 0}, sha256="0")


# ---- torch -----------------------------------------------------------------------------------------------------


def torch_file(path, said, entries=(), compression=zipfile.ZIP_STORED):
    """A zip file as torch lays it out, of any pickle and entries."""
    said = said if isinstance(said, bytes) else pickle.dumps(said, 2)
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in [("file/data.pkl", said), *entries]:
            file.writestr(name, data)


def test_what_torch_saves_is_read_to_the_bit(path):
    torch.save(TENSORS, path)
    tensors = safe.read_torch(path)
    same(tensors, TENSORS)
    assert own_their_memory(tensors)
    torch.save({"z": torch.ones(2, dtype=torch.complex128)}, path)
    same(safe.read_torch(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize("wrapper", [None, "model_state_dict", "state_dict"])
def test_state_dicts_of_models_are_read_in_their_usual_wrappers(path, wrapper):
    model = nn.Sequential(Model(), nn.BatchNorm1d(3)).bfloat16()
    state = model.state_dict()
    torch.save({wrapper: state} if wrapper else state, path)
    same(safe.read_torch(path), dict(state))


def test_parameters_and_views_become_plain_tensors_that_own_their_memory(path):
    base = torch.arange(24.0).view(4, 6)
    said = {
        "parameter": nn.Parameter(torch.ones(2)),
        "part": base[1:3],
        "transposed": torch.randn(3, 2).T,
        "strided": base[::2, 1::3],
        "a reversal of sizes": base.view(2, 2, 6).permute(2, 0, 1),
        "stretched": torch.ones(6)[:1].expand(3),
    }
    torch.save(said, path)
    tensors = safe.read_torch(path)
    same(tensors, {name: t.detach().contiguous() for name, t in said.items()})
    assert own_their_memory(tensors)


def test_tied_tensors_are_one(path):
    tied = nn.Parameter(torch.ones(1000))
    torch.save({str(i): tied for i in range(100)}, path)
    tensors = safe.read_torch(path)
    assert len(tensors) == 100
    assert len({t.data_ptr() for t in tensors.values()}) == 1


class Called:
    """Unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


class Subclass(torch.Tensor):
    pass


def without_end():
    """A tuple that takes a moment to make, and longer than anyone waits to hash or to print."""
    value = (1,)
    for _ in range(60):
        value = (value, value)
    return value


def overlapping(number=1000):
    base = torch.ones(100_000)
    return {str(i): base[i:] for i in range(number)}


def sparse():
    return torch.eye(3).to_sparse()


REFUSED = {
    "a function": (lambda: {"a": Called(len, ())}, "asks for '__builtin__ len'"),
    "a bytearray": (lambda: {"a": Called(bytearray, 10**11)}, "asks for '__builtin__ bytearray'"),
    "a class": (lambda: nn.Linear(2, 2), "data.pkl"),
    "a tensor alone": (lambda: torch.ones(2), "it must hold a state dict, got Tensor."),
    "a number": (lambda: {"a": torch.ones(1), "step": 3}, "'step' must be a tensor, got 3."),
    "a list": (lambda: [torch.ones(1)], "instruction EMPTY_LIST"),
    "a nested dict": (lambda: {"a": {"b": torch.ones(1)}}, "'a' must be a tensor, got dict."),
    "two wrappers": (lambda: {"state_dict": {"b": torch.ones(1)}, "step": 3}, "'state_dict' must be a tensor"),
    "names of numbers": (lambda: {1: torch.ones(1)}, "its names being strings"),
    "sparse": (lambda: {"a": sparse()}, "asks for 'torch._utils _rebuild_sparse_tensor'"),
    "on meta": (lambda: {"a": torch.ones(2, device="meta")}, "_rebuild_meta_tensor_no_storage'"),
    "a subclass": (lambda: {"a": torch.ones(2).as_subclass(Subclass)}, "asks for "),
    "conjugate": (lambda: {"a": torch.ones(2, dtype=torch.complex64).conj()}, "more than values of a storage"),
    "expanded": (lambda: {"a": torch.ones(1).expand(10**12)}, "the shape '(1000000000000,)' in a storage of 1 values"),
    "expanded twice": (lambda: {"a": torch.ones(3, 1).expand(3, 4)}, "in a storage of 3 values"),
    "overlapping": (overlapping, "its tensors overlap so much"),
    "expanded to nothing": (lambda: {"a": torch.ones(1).expand(2**61)}, "natural numbers"),
}


@pytest.mark.parametrize(("made", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_state_dict_is_refused(path, made, message):
    torch.save(made(), path)
    tracemalloc.start()
    refused(safe.read_torch, path, "is not a torch file", message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_nothing_of_a_stranger_runs(path, tmp_path):
    torch.save({"a": Called(os.mkdir, str(tmp_path / "ran"))}, path)
    refused(safe.read_torch, path, "asks for")
    assert not (tmp_path / "ran").exists()


def test_files_of_old_torch_are_refused_with_what_to_do(path):
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    refused(safe.read_torch, path, "it is no zip file", "write it again with `torch.save(state_dict, path)`")


def described(length=2, dtype="FloatStorage", key="0", offset=0, shape=(2,), stride=(1,)):
    """The pickle of {"a": a tensor}, with whatever is said of it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", getattr(torch, dtype), key, "cpu", length) if value is Ellipsis else None

    out = io.BytesIO()
    Pickler(out, 2).dump({"a": Called(torch._utils._rebuild_tensor_v2, ..., offset, shape, stride, False, None)})
    return out.getvalue()


DESCRIBED = {
    "a storage longer than its entry": ({"length": 3}, "a storage of 3 values of torch.float32 has no entry"),
    "a storage shorter than its entry": ({"length": 1}, "a storage of 1 values of torch.float32 has no entry"),
    "a storage that is not there": ({"key": "1"}, "has no entry of that size"),
    "a storage of another dtype": ({"dtype": "DoubleStorage"}, "has no entry of that size"),
    "a storage elsewhere": ({"key": "../data.pkl"}, "has no entry of that size"),
    "a key without end": ({"key": without_end}, "describes a storage wrongly"),
    "a negative length": ({"length": -2}, "describes a storage wrongly"),
    "an offset too far": ({"offset": 1}, "in a storage of 2 values"),
    "a negative offset": ({"offset": -1}, "natural numbers"),
    "a stride too far": ({"stride": (2,)}, "in a storage of 2 values"),
    "a negative stride": ({"stride": (-1,), "offset": 1}, "natural numbers"),
    "a huge stride": ({"stride": (2**70,)}, "natural numbers"),
    "strides of fewer": ({"stride": ()}, "natural numbers"),
    "a shape of too many": ({"shape": (1,) * 65, "stride": (1,) * 65}, "at most 64 natural numbers"),
    "a shape of truths": ({"shape": (True,)}, "natural numbers"),
    "a shape without end": ({"shape": without_end}, "natural numbers"),
}


@pytest.mark.parametrize(("said", "message"), DESCRIBED.values(), ids=DESCRIBED)
def test_a_tensor_that_is_described_wrongly_is_refused(path, said, message):
    entry = ("file/data/0", struct.pack("<2f", 1, 2))
    torch_file(path, described(), [entry])
    same(safe.read_torch(path), {"a": torch.tensor([1.0, 2.0])})
    torch_file(path, described(**{key: value() if callable(value) else value for key, value in said.items()}), [entry])
    refused(safe.read_torch, path, "is not a torch file", message)


PICKLES = {
    "nothing": (b"", "is damaged"),
    "no end": (b"}", "is damaged"),
    "an end alone": (b".", "is damaged"),
    "two values": (b"}}" + b".", "is damaged"),
    "bytes that are no instruction": (b"\xff" + b".", "is damaged"),
    "a memo of nothing": (b"h\x05" + b".", "is damaged"),
    "a pop of nothing": (b"\x85" + b".", "takes more than there is"),
    "a pop beyond a mark": (b"}(\x85" + b".", "takes more than there is"),
    "no mark": (b"}t" + b".", "is damaged"),
    "names and no values": (b"}(X\x01\0\0\0au" + b".", "is damaged"),
    "a name twice": (b"}(X\x01\0\0\0aNX\x01\0\0\0aNu" + b".", "it has a name twice"),
    "a name twice, one by one": (b"}X\x01\0\0\0aNsX\x01\0\0\0aNs" + b".", "it has a name twice"),
    "a call of text": (b"X\x05\0\0\0print)R" + b".", "is damaged"),
    "a call of a dict": (b"})R" + b".", "calls what cannot be called"),
    "a storage alone": (b"ctorch\nFloatStorage\n" + b".", "it must hold a state dict, got dtype."),
    "a dict of a dict": (b"ccollections\nOrderedDict\n}\x85R" + b".", "is damaged"),
    "a name without end": (b"}N" + b"q\0h\0\x86" * 60 + b"Ns.", "its names being strings"),
    "a memo that is huge": (b"}r\xff\xff\xff\xff" + b".", None),
    "a protocol of today": (pickle.dumps({"a": 1}, 4), "which no state dict needs"),
    "an instruction to import": (b"\x8c\x02os\x8c\x06system\x93" + b".", "which no state dict needs"),
    "an instance": (b"(ios\nsystem\n" + b".", "which no state dict needs"),
    "an extension": (b"\x82\x01" + b".", "which no state dict needs"),
    "too many instructions": (b"N" * 4_000_001 + b".", "more than 4000000 instructions"),
    "too many bytes": (b"}" + b"X\0\0\0\x01" + b"a" * 2**24, "its data.pkl may have 16777216 bytes"),
}


@pytest.mark.parametrize(("said", "message"), PICKLES.values(), ids=PICKLES)
def test_a_pickle_that_is_wrong_is_refused(path, said, message):
    torch_file(path, said)
    if message:
        refused(safe.read_torch, path, "is not a torch file", message)
    else:
        assert safe.read_torch(path) == {}


def zip_of(path, **options):
    torch_file(path, described(), [("file/data/0", struct.pack("<2f", 1, 2)), *options.pop("entries", [])], **options)
    return path.read_bytes()


def test_compressed_entries_are_refused(path):
    zip_of(path, compression=zipfile.ZIP_DEFLATED)
    refused(safe.read_torch, path, "is compressed or encrypted")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("file/data.pkl", described())
        file.writestr("file/data/0", b"\0" * 10**6, compress_type=zipfile.ZIP_BZIP2)
    refused(safe.read_torch, path, "'file/data/0' is compressed or encrypted")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_that_are_there_twice_are_refused(path):
    zip_of(path, entries=[("file/data/0", b"\0" * 8)])
    refused(safe.read_torch, path, "an entry twice")
    zip_of(path, entries=[("other/data.pkl", described())])
    refused(safe.read_torch, path, "it must have one entry data.pkl, got 2")


def test_byte_orders(path):
    zip_of(path, entries=[("file/byteorder", b"little")])
    same(safe.read_torch(path), {"a": torch.tensor([1.0, 2.0])})
    for order in (b"big", b"middle", b"little" * 10**6):
        zip_of(path, entries=[("file/byteorder", order)])
        refused(safe.read_torch, path, "its byte order must be little")


def test_entries_that_overlap_are_refused(path):
    content = bytearray(zip_of(path, entries=[("file/data/1", b"\0" * 1000), ("file/data/2", b"\0" * 1000)]))
    for name in (b"file/data/1", b"file/data/2"):  # in the directory
        at = content.rindex(name) - 46
        content[at + 20 : at + 28] = struct.pack("<II", 2000, 2000)
    path.write_bytes(content)
    refused(safe.read_torch, path, "its entries are longer than the file")


@pytest.mark.parametrize(("change", "message"), [("-1", "cut short"), ("-60", "cut short"), ("+", "something follows")])
def test_a_zip_that_ends_elsewhere_is_refused(path, change, message):
    content = zip_of(path)
    path.write_bytes(content + b"\0" if change == "+" else content[: int(change)])
    refused(safe.read_torch, path, message)


def test_a_directory_that_is_long_for_its_own_sake_is_refused(path):
    content = zip_of(path)
    path.write_bytes(content[:-10] + struct.pack("<I", 2**25) + content[-6:])
    refused(safe.read_torch, path, "its zip directory may have 16777216 bytes, and has 33554432")
    torch.save({"a": torch.ones(1)}, path)
    content = path.read_bytes()
    path.write_bytes(content[:-58] + struct.pack("<Q", 2**40) + content[-50:])
    refused(safe.read_torch, path, f"and has {2**40}")


def test_a_flipped_bit_of_a_torch_file_is_found(path):
    values = torch.randn(300)
    torch.save({"a": values}, path)
    content = bytearray(path.read_bytes())
    content[content.index(values.numpy().tobytes()) + 700] ^= 16
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["a"], values)
    refused(safe.read_torch, path, "is damaged", "CRC")


def test_large_storages_are_read_in_parts(path):
    values = torch.randn(3 * 2**18 + 5)
    torch.save({"a": values}, path)
    same(safe.read_torch(path), {"a": values})
