"""PEFT's adapters that change parts of tensors, `trainable_token_indices` and `lora_bias`: what they compute there."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora

TOKENS = torch.tensor([[3, 1, 5, 2, 0], [6, 5, 5, 1, 7]])
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, attention_bias=True)).eval()


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor")  # PEFT takes a bias for a shard
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def saved(folder, tied=False, **options):
    """A folder of PEFT's with random values, and what its model computes."""
    model = peft.get_peft_model(llama(tied), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "tokens_delta" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return logits(model.eval())


CASES = {
    "rows": {"trainable_token_indices": [1, 5]},
    "rows of tied embeddings": {"trainable_token_indices": {"embed_tokens": [5, 1]}, "tied": True},
    "rows of both ends": {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}},
    "a bias of B": {"lora_bias": True},
    "a bias of B beside one that trained": {"lora_bias": True, "bias": "lora_only"},
    "all": {"lora_bias": True, "trainable_token_indices": [7], "tied": True},
}


@pytest.mark.filterwarnings(
    "ignore:Adapter 'default'. 1 LoRA tensor", "ignore:.*is_gradient_checkpointing:FutureWarning"
)
@pytest.mark.parametrize("case", CASES)
def test_it_computes_here_what_it_computes_there(tmp_path, case):
    options = dict(CASES[case])
    tied = options.pop("tied", False)
    expected, model, plain = saved(tmp_path, tied, **options), llama(tied), logits(llama(tied))
    assert not torch.allclose(plain, expected, atol=1e-3)
    lora.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), expected)
    assert (model.model.embed_tokens.weight is model.lm_head.weight) == tied
    with lora.disabled(model):
        torch.testing.assert_close(logits(model), plain)
    lora.load_adapter(model, tmp_path)  # over itself: parts are of the base's tensors, not of what was trained
    torch.testing.assert_close(logits(model), expected)
    lora.save_adapter(model, tmp_path / "ours.safetensors")
    again = llama(tied)
    lora.load_adapter(again, tmp_path / "ours.safetensors")
    torch.testing.assert_close(logits(again), expected)
    lora.eject(model)
    torch.testing.assert_close(logits(model), plain)
