"""extract on a transformers model: Conv1D layers, whose weights are transposed, and tied embeddings."""

import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import lora
from lora.arithmetic import extract


def test_a_fine_tuned_gpt2_at_full_rank(tmp_path):
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    base = GPT2LMHeadModel(config).double().eval()
    finetuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in finetuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapter, kept = extract(base, finetuned, 8)
    assert {"transformer.h.0.attn.c_attn", "transformer.wte", "lm_head"} <= set(kept)
    assert adapter.modules["transformer.h.0.attn.c_attn"]["base"]["fan_in_fan_out"]
    lora.write_adapter(adapter, tmp_path / "adapter.safetensors")
    lora.load_adapter(base, tmp_path / "adapter.safetensors")
    ids = torch.tensor([[1, 2, 3, 10]])
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, finetuned(ids).logits, rtol=1e-10, atol=1e-10)
