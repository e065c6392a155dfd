"""`merge` on folders that transformers wrote: the merged folder loads, and computes what the adapted model does."""

import copy

import pytest
import torch
import transformers
from cli_model import run

import lora

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


def phi3():
    config = transformers.Phi3Config(**SMALL, intermediate_size=24, num_key_value_heads=2, tie_word_embeddings=False)
    splits = {"qkv_proj": (16, 8, 8), "gate_up_proj": (24, 24)}
    fields = {"target_modules": "all-linear", "splits": splits, "enable_lora": {"qkv_proj": [1, 0, 1]}}
    return transformers.Phi3ForCausalLM(config), fields


def llama():
    config = transformers.LlamaConfig(**SMALL, intermediate_size=24, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config), {"target_modules": ["q_proj", "down_proj"]}


def gpt2():
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=16)
    return transformers.GPT2LMHeadModel(config), {"target_modules": ["c_attn", "c_proj"]}


@pytest.mark.parametrize("make", [phi3, llama, gpt2])
@pytest.mark.parametrize("size", ["8KB", "1GB"])
@torch.no_grad()
def test_a_folder_of_transformers(tmp_path, capsys, make, size):
    model, fields = make()
    model.eval().save_pretrained(tmp_path / "base", max_shard_size=size)
    sharded = (tmp_path / "base" / "model.safetensors.index.json").exists()
    assert sharded == (size == "8KB")
    before = model(IDS).logits
    lora.inject(model, **fields, r=4, lora_alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape) / 4)
    lora.save_adapter(model, tmp_path / "adapter")
    code, _, error = run(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert (code, error) == (0, "")
    wanted = model(IDS).logits
    merged = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    assert (before - wanted).abs().max() > 0.01


@torch.no_grad()
def test_a_base_that_the_inner_model_saved(tmp_path, capsys):
    model, fields = llama()
    model.model.save_pretrained(tmp_path / "base")  # names without "model."
    base = copy.deepcopy(model)
    lora.inject(model, **fields, r=2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape) / 4)
    lora.save_adapter(model, tmp_path / "adapter")
    assert run(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")[0] == 0
    merged = transformers.LlamaModel.from_pretrained(tmp_path / "out").eval()
    wanted = model.eval().model(IDS).last_hidden_state
    torch.testing.assert_close(merged(IDS).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)
    assert (base.eval().model(IDS).last_hidden_state - wanted).abs().max() > 0.01


def test_a_tied_embedding(tmp_path, capsys):
    model, _ = llama()
    model.save_pretrained(tmp_path / "base")
    lora.inject(model, target_modules=["embed_tokens"], r=2)
    lora.save_adapter(model, tmp_path / "adapter")
    code, _, error = run(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert code == 2
    assert "model.embed_tokens: config.json ties" in error
