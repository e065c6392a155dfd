"""What transformers' `save_pretrained` makes of a model with LoRA in it, and what to do instead."""

import pytest
import torch
import transformers

import lora

IDS = torch.arange(6)[None]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=40)).eval()
    lora.inject(made, target_modules=["q_proj"], r=2)
    torch.nn.init.normal_(made.model.layers[0].self_attn.q_proj.lora_B)
    return made


@torch.no_grad()
def test_it_loads_as_the_plain_base_and_the_report_names_what_was_left_out(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    with lora.disabled(model):
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert {name.rpartition(".")[2] for name in report["unexpected_keys"]} == {"lora_A", "lora_B"}


@torch.no_grad()
def test_an_adapter_of_its_own_or_a_merged_model_keeps_what_was_learnt(model, tmp_path):
    expected = model(IDS).logits
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    lora.eject(model)
    model.save_pretrained(tmp_path / "base")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    lora.load_adapter(loaded, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(loaded(IDS).logits, expected)
    lora.merge(loaded), loaded.save_pretrained(tmp_path / "merged")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, expected)
    with pytest.raises(lora.AdapterError, match="the base weight is not the one"):
        lora.load_adapter(merged, tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("how", ["pissa", "olora"])
@torch.no_grad()
def test_what_a_start_has_left_of_the_base_is_not_loaded_as_the_base(how, tmp_path):
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=40)).eval()
    before = made(IDS).logits
    lora.inject(made, target_modules="all-linear", r=4, init_lora_weights=how)
    made.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    lora.eject(made)
    made.save_pretrained(tmp_path)
    torch.testing.assert_close(transformers.LlamaForCausalLM.from_pretrained(tmp_path)(IDS).logits, before)
