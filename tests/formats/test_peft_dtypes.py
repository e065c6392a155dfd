"""A and B of a dtype that nothing can be computed with are named, in every form of layer."""

import json

import pytest
import safetensors.torch
import torch
from tensor_files import DTYPES

import lora

SHAPES = {
    "linear": [(2, 4), (6, 2)],
    "conv": [(2, 4, 3, 3), (6, 2, 1, 1)],
    "conv of groups": [(2, 4, 3, 3), (6, 1, 1, 1)],
    "embedding": [(2, 4), (6, 2)],
}
FINE = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


@pytest.mark.parametrize("dtype", sorted(map(str, {*DTYPES} - FINE)))
@pytest.mark.parametrize("kind", SHAPES)
def test_it_is_refused(kind, dtype, tmp_path):
    ends = ["lora_embedding_A", "lora_embedding_B"] if kind == "embedding" else ["lora_A.weight", "lora_B.weight"]
    ones = [torch.ones(shape).to(getattr(torch, dtype[6:])) for shape in SHAPES[kind]]
    tensors = {f"base_model.model.c.{end}": one for end, one in zip(ends, ones, strict=True)}
    tensors |= {"base_model.model.c.base_layer.weight": ones[0].clone()} if kind == "embedding" else {}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    for read in (lora.read_adapter, lambda path: lora.read_adapter(path, check=False)):
        with pytest.raises(lora.AdapterError) as caught:
            read(tmp_path)
        for part in "AB":
            assert f"c.lora_{part} must" in str(caught.value)
            assert f"got {dtype}" in str(caught.value)
