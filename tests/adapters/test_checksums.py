"""Checksums: what is changed after a file was written is found; in lora's own files they must be there."""

import hashlib
import json

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from tensor_files import entry, raw, refused, same
from toy_model import AdapterFile, snapshot

import lora
from lora.adapters import files, saving


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def test_the_checksum_is_what_the_format_says():
    about = b'[{"format": "pt", "lora": "\\u00c4"}, {"a": ["I16", 2, 1], "b": ["F32"]}]'
    data = np.array([1, 2], "<i2").tobytes() + np.array(0.5, "<f4").tobytes()
    tensors = {"b": torch.tensor(0.5), "a": torch.tensor([[1], [2]], dtype=torch.int16)}
    metadata = {"lora": "Ä", "sha256": "old", "format": "pt"}
    assert files.checksum(tensors, metadata) == hashlib.sha256(about + data).hexdigest()


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
    saving.write_tensors(path, tensors, {"x": "y"})
    metadata = files.read_tensors(path)[1]
    safetensors.torch.save_file({name: t.clone() for name, t in (tensors | changes).items()}, path, metadata)
    refused(files.read_tensors, path, "its content has changed since it was written")


@pytest.mark.parametrize("changes", [{"x": "z"}, {"z": "y"}, {"sha256": "0" * 64}, {"sha256": ""}], ids=str)
def test_a_change_of_metadata_is_found(path, changes):
    saving.write_tensors(path, {"a": T}, {"x": "y"})
    metadata = files.read_tensors(path)[1]
    safetensors.torch.save_file({"a": T}, path, metadata | changes)
    refused(files.read_tensors, path, "its content has changed since it was written")
    safetensors.torch.save_file({"a": T}, path, {key: value for key, value in metadata.items() if key != "x"})
    refused(files.read_tensors, path, "its content has changed since it was written")


def test_another_order_or_padding_is_no_change(path):
    saving.write_tensors(path, {"a": T, "b": -T}, {"x": "y"})
    metadata = files.read_tensors(path)[1]
    header = {"b": entry(shape=[6], offsets=[0, 24]), "a": entry(shape=[6], offsets=[24, 48])}
    header["__metadata__"] = dict(reversed(metadata.items()))
    path.write_bytes(raw(json.dumps(header, indent=4).encode(), (-T).numpy().tobytes() + T.numpy().tobytes()))
    same(files.read_tensors(path)[0], {"b": -T, "a": T})


# ---- lora's own files ----------------------------------------------------------------------------------------------


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
