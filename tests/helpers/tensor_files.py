"""Tensors of every dtype, headers made by hand, and what is asked of every reader of files."""

import json
import struct

import pytest
import safetensors.torch
import torch
from toy_model import content

import lora


def is_written(dtype):
    """Whether the safetensors that is installed writes a dtype; from 0.8 on it writes all that lora reads."""
    if tuple(map(int, safetensors.__version__.split(".")[:2])) >= (0, 8):
        return True
    try:
        return bool(safetensors.torch.save({"x": torch.zeros(1).to(dtype)}))
    except KeyError:
        return False


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]
DTYPES = [dtype for dtype in DTYPES if is_written(dtype)]
TENSORS = {str(dtype).replace("torch.", ""): (torch.arange(6).view(2, 3) / 2).to(dtype) for dtype in DTYPES}
TENSORS |= {
    "a scalar": torch.tensor(3.0),
    "empty": torch.ones(0, 3),
    "x.Ä名": torch.randn(5),
    "five": torch.randn(1, 2, 1, 3, 1),
}


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
