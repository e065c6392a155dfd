"""What no tensor can be multiplied by is no scaling, whichever way it comes."""

import json
import math

import pytest
import safetensors.torch
import torch
from torch import nn

import lora

LARGEST = torch.finfo(torch.float32).max
KINDS = {
    "linear": lambda **how: lora.Linear(4, 3, r=2, **how),
    "merged": lambda **how: lora.MergedLinear(4, 6, r=2, enable_lora=[True, False, True], **how),
    "embedding": lambda **how: lora.Embedding(4, 3, r=2, **how),
    "conv": lambda **how: lora.Conv2d(4, 3, 3, r=2, **how),
}
MESSAGE = r"`lora_alpha` must make a scaling of at most 3.4e\+38, got 1e\+308 at `r` = 2"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_constructor_takes_what_float32_holds(kind, use_rslora):
    with pytest.raises(ValueError, match=MESSAGE):
        KINDS[kind](lora_alpha=1e308, use_rslora=use_rslora)
    r = math.sqrt(2) if use_rslora else 2
    layer = KINDS[kind](lora_alpha=LARGEST * r * (1 - 1e-9), use_rslora=use_rslora)
    x = torch.zeros(1, 4, 5, 5) if kind == "conv" else torch.zeros(2, 4)
    assert torch.isfinite(layer(x.long()[0] if kind == "embedding" else x)).all()


@pytest.mark.parametrize("how", [{"lora_alpha": 1e308}, {"alpha_pattern": {"0": 1e308}}, {"lora_alpha": -1e308}])
def test_inject_names_it_and_changes_nothing(how):
    model = nn.Sequential(nn.Embedding(4, 4))
    with pytest.raises(ValueError, match="`lora_alpha` must make a scaling of at most"):
        lora.inject(model, target_modules=["0"], r=1, **how)
    assert type(model[0]) is nn.Embedding


@pytest.mark.parametrize("how", [{"lora_alpha": 1e308}, {"alpha_pattern": {"c": 1e308}}])
def test_a_folder_of_pefts_is_refused(how, tmp_path):
    tensors = {f"base_model.model.c.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **how}))
    with pytest.raises(
        lora.AdapterError, match=r"a scaling of at most|c: `scaling` must be a finite number of at most"
    ):
        lora.read_adapter(tmp_path)


def test_a_flat_file_is_refused(tmp_path):
    torch.save({"0.lora_A": torch.ones(2, 2), "0.lora_B": torch.ones(2, 2)}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"`scaling` must be a finite number of at most 3.4e\+38, got 5e\+307"):
        lora.read_adapter(tmp_path / "a.bin", lora_alpha=1e308)


def test_arithmetic_makes_none():
    adapter = lora.adapter_of(nn.Sequential(lora.Linear(2, 2, r=1, bias=False)))
    for make in (lambda: lora.scale(adapter, 1e300), lambda: lora.scale(lora.scale(adapter, 1e30), -1e30)):
        with pytest.raises(lora.AdapterError, match="0: `scaling` must be a finite number of at most"):
            make()
