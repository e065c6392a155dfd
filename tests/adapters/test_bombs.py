"""What a stranger's file costs in memory: a small multiple of its size, whatever is in it."""

import json
import struct
import tracemalloc

import pytest
import safetensors.torch
import torch
from tensor_files import entry, raw, refused

import lora
from lora.adapters import files
from lora.adapters.formats import object_in

LENGTH = 2**20
TENSORS = {f"base_model.model.c.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}


def peak_of(call):
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def repeated(text, length=LENGTH):
    return ",".join([text] * (length // (len(text) + 1)))


# Values that take much memory for their length.
VALUES = {
    "lists in lists": "[" * 400 + "]" * 400,
    "empty lists": "[]",
    "empty objects": "{}",
    "objects": '{"":{"":0}}',
    "numbers": "1e9",
    "integers": "999",
    "zeros": "0.0, 0.0, 0.0",
    "strings": '"xy"',
}
BOMBS = {name: f"[{repeated(value)}]" for name, value in VALUES.items()}
BOMBS["names"] = "{" + ",".join(f'"{i:x}":{{}}' for i in range(LENGTH // 9)) + "}"


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_configuration_that_would_grow_is_refused(bomb, tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": 2, "x": {bomb}}}')
    peak = peak_of(lambda: refused(lora.read_adapter, tmp_path, "/adapter_config.json must have at most"))
    assert peak < 4 * len(bomb)


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_metadata_are_read_if_they_do_not_grow_too_much(bomb):
    assert peak_of(lambda: object_in({"lora": f'{{"x": {bomb}}}'}, "lora")) < 16 * len(bomb)


def test_metadata_of_many_weights_that_are_zero_or_one_are_read():
    """No number that we write is shorter."""
    base = {str(i): {"shape": [4, 4], "sample": [0.0, 1.0] * 8} for i in range(50_000)}
    assert object_in({"base": json.dumps(base)}, "base") == base


def test_a_configuration_with_a_pattern_for_each_of_many_modules_is_read(tmp_path):
    names = [f"model.layers.{i}.mlp.experts.{j}.gate_proj" for i in range(144) for j in range(128)]
    said = {"target_modules": names, "rank_pattern": dict.fromkeys((f"^{n}" for n in names), 16)}
    (tmp_path / "config").write_text(json.dumps(said))
    peak = peak_of(lambda: files.read_object(tmp_path / "config") == said or pytest.fail("it is another"))
    assert peak < 8 * (tmp_path / "config").stat().st_size


EMPTY = json.dumps(entry(shape=[0], offsets=[0, 0]))[:-1]
HEADERS = {f"more: {name}": f'{{"a": {EMPTY}, "more": {bomb}}}}}' for name, bomb in BOMBS.items()}
HEADERS["many metadata"] = '{"__metadata__": {' + ",".join(f'"{i:x}":""' for i in range(70_000)) + "}}"
HEADERS["many small entries with more"] = (
    "{" + ",".join(f'"{i:x}": {EMPTY}, "more": {{"":0}}}}' for i in range(LENGTH // 320)) + "}"
)


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_would_grow_is_refused(header, tmp_path):
    (tmp_path / "a").write_bytes(raw(header.encode()))
    words = "must have a dtype, a shape and data_offsets"
    words = "its header is wrong" if "__metadata__" in header or "[[[" in header else words
    assert peak_of(lambda: refused(files.read_header, tmp_path / "a", words)) < 12 * len(header)


def test_a_header_of_many_tensors_costs_a_small_multiple(tmp_path):
    header = (
        "{" + ",".join(f'"{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(LENGTH // 64)) + "}"
    )
    (tmp_path / "a").write_bytes(raw(header.encode()))
    found = []
    assert peak_of(lambda: found.append(files.read_header(tmp_path / "a"))) < 12 * len(header)
    assert len(found[0].tensors) == LENGTH // 64


@pytest.mark.slow
def test_a_long_header_of_a_sparse_file_costs_a_small_multiple_of_itself(tmp_path):
    header = (f'{{"a": {EMPTY}, "more": [' + repeated("[]", 30 * 2**20) + "]}}").encode()
    with open(tmp_path / "a", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + 5 * len(header))
    assert peak_of(lambda: refused(files.read_header, tmp_path / "a", "its header is wrong")) < 4 * len(header)


def test_white_space_and_escapes_are_read_as_json_reads_them(tmp_path):
    said = {
        'Ä"b': entry("U8", [4], [0, 4]),
        "__metadata__": {'k"': '{}[],:"\\\n名', "": ""},
        "c": entry("U8", [4], [4, 8]),
    }
    for text in (
        json.dumps(said),
        json.dumps(said, indent=9),
        json.dumps(said, ensure_ascii=False, separators=(",", ":")),
    ):
        (tmp_path / "a").write_bytes(raw(text.encode(), b"\1" * 8))
        header = files.read_header(tmp_path / "a")
        assert header.metadata == said["__metadata__"]
        assert {n: list(e.shape) for n, e in header.tensors.items()} == {'Ä"b': [4], "c": [4]}
        assert [e.stop - 8 - len(text.encode()) for e in header.tensors.values()] == [4, 8]
