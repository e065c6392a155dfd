"""nn.MultiheadAttention to PEFT and back: its keys, its one rank and scaling, the same logits."""

import copy
import json

import peft
import pytest
import torch
import torch.nn as nn
from owners import adapters, moved
from safetensors.torch import load_file

import lora

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """As in open_clip's towers."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **options)
        self.ln_1, self.ln_2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y[..., : self.attn.kdim], y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.resblocks = nn.Sequential(Block(**options), Block(**options))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.resblocks(x.transpose(0, 1)).transpose(0, 1))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Tower().eval().requires_grad_(False)


def in_peft(base, folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"rank_pattern": {"resblocks.0.attn": 2}}], ids=str)
def test_what_peft_has_trained_is_loaded(base, tmp_path, more):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["attn", "mlp.0"], init_lora_weights=False, **more)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    lora.load_adapter(model, tmp_path)
    assert "resblocks.1.attn.in_proj_weight" in adapters(model)
    assert "resblocks.1.attn.out_proj.weight" in adapters(model)
    y = theirs(X)
    close(model(X), y)
    assert not torch.allclose(base(X), y)
    close(merged(model)(X), y)
    lora.save_adapter(model, tmp_path / "again", format="peft")  # and back
    close(in_peft(base, tmp_path / "again")(X), y)
    once, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert once.keys() == again.keys()
    assert all(torch.equal(once[key], again[key]) for key in once)


def test_a_version_that_is_not_known_is_said(base, tmp_path):
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["attn"]))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.22.0"}))
    with pytest.warns(UserWarning, match=r"PEFT '0.22.0' has written LoRA of nn.MultiheadAttention.*add it once"):
        adapter = lora.read_adapter(tmp_path)
    scalings = {name: about.scaling for name, about in adapter.modules.items() if ".0." in name}
    assert scalings == {"resblocks.0.attn.in_proj_weight": 4, "resblocks.0.attn.out_proj": 4}


def merged(model):
    model = copy.deepcopy(model)
    lora.merge(model)
    return model


CONFIGS = {
    "whole": {"target_modules": ["attn", "head"]},
    "in alone": {"target_parameters": ["attn.in_proj_weight"]},
    "out alone": {"target_modules": ["out_proj", "mlp.2"]},
    "other ranks": {
        "target_modules": ["attn"],
        "rank_pattern": {"0.attn.out_proj": 5},
        "alpha_pattern": {"out_proj": 3},
    },
    "splits": {
        "target_modules": ["attn"],
        "splits": {"in_proj_weight": (8, 8, 8)},
        "enable_lora": {"in_proj_weight": (True, False, True)},
    },
    "rslora": {"target_modules": ["attn"], "use_rslora": True, "rank_pattern": {"out_proj": 3}},
    "biases": {"target_modules": ["attn"], "bias": "lora_only"},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("format", ["peft", "portable"])
def test_what_is_trained_here_is_loaded_by_peft(base, tmp_path, name, format):
    if name == "biases" and format == "portable":
        return  # which has no place for them
    model = copy.deepcopy(base)
    lora.inject(model, r=2, lora_alpha=4, **CONFIGS[name])
    moved(model)
    if name == "biases":
        with torch.no_grad():
            for block in model.resblocks:
                block.attn.in_proj_bias.add_(1.0)
                block.attn.out_proj.bias.add_(1.0)
    y = model(X)
    lora.save_adapter(model, tmp_path / "peft", format=format)
    close(in_peft(base, tmp_path / "peft")(X), y)
    other = copy.deepcopy(base)
    lora.load_adapter(other, tmp_path / "peft")
    close(other(X), y)
    assert not torch.allclose(base(X), y)


def test_the_file_is_as_peft_writes_it(base, tmp_path):
    model = copy.deepcopy(base)
    lora.inject(model, r=2, lora_alpha=4, target_modules=["attn"], rank_pattern={"1.attn": 3})
    lora.save_adapter(model, tmp_path / "peft", format="peft")
    shapes = {key: tuple(v.shape) for key, v in load_file(tmp_path / "peft" / "adapter_model.safetensors").items()}
    start = "base_model.model.resblocks.{}.attn"
    expected = {}
    for n, r in ((0, 2), (1, 3)):
        for place, rows in (("", 24), (".base_layer.out_proj", 8)):
            expected[f"{start.format(n)}{place}.lora_A.weight"] = (r, 8)
            expected[f"{start.format(n)}{place}.lora_B.weight"] = (rows, r)
    assert shapes == expected
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["resblocks.0.attn", "resblocks.1.attn"]
    assert [*config["rank_pattern"].values()] == [3]


def test_what_peft_cannot_is_said_by_name(tmp_path):
    model = Tower(kdim=4)
    lora.inject(model, r=2, target_modules=["attn"])
    with pytest.raises(lora.AdapterError, match=r"0.attn.out_proj: PEFT adapts no attention whose keys or values have"):
        lora.save_adapter(model, tmp_path / "peft", format="peft")
    model = Tower()
    lora.inject(model, r=2, target_modules=["attn"], use_dora=True)
    with pytest.raises(lora.AdapterError, match=r"resblocks.0.attn.in_proj_weight: PEFT has no DoRA for attention\."):
        lora.save_adapter(model, tmp_path / "peft", format="peft")
    model = nn.MultiheadAttention(8, 2)
    lora.inject(model, r=2, target_parameters=["in_proj_weight"])
    with pytest.raises(lora.AdapterError, match="the model is itself the attention that is adapted"):
        lora.save_adapter(model, tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
