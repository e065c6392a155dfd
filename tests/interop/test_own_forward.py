"""transformers' layers with a forward of their own: words that are scaled, positions, routers, Falcon's linear."""

import copy

import peft
import pytest
import torch
import transformers

import lora
from tests.helpers.peft_models import QUIET

pytestmark = QUIET

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
MLP = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "scale_embedding": True,
}
SPEECH = SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20, "pad_token_id": 0}
IDS = {"input_ids": torch.arange(4, 11)[None]}
SOUND = {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": torch.arange(5)[None]}

# The model's class, its config's class and settings, what is adapted, its class, and what goes in.
MODELS = {
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", MLP | {"head_dim": 8}, "embed_tokens", IDS),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", MLP | {"head_dim": 8}, "embed_tokens", IDS),
    "OPT": ("OPTForCausalLM", "OPTConfig", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}, "embed_positions", IDS),
    "BART": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ, "embed_positions", IDS),
    "BART's words": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ, "encoder.embed_tokens", IDS),
    "mBART": ("MBartForConditionalGeneration", "MBartConfig", SEQ2SEQ, "embed_positions", IDS),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", SPEECH, "decoder.embed_positions", SOUND),
    "Falcon": ("FalconForCausalLM", "FalconConfig", SMALL, "query_key_value", IDS),
    "Phi-3.5-MoE": ("PhimoeForCausalLM", "PhimoeConfig", MLP | {"num_local_experts": 4}, "router", IDS),
    "Llama 4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        MLP | {"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 4, "attn_implementation": "eager"},
        "router",
        IDS,
    ),
}
# Those whose update PEFT computes as well: it knows the scale of words, and adds beside anything else.
IN_PEFT = ["Gemma 3", "Gemma 2", "Falcon"]


def model_of(name):
    cls, config, settings, *_ = MODELS[name]
    torch.manual_seed(0)
    settings = settings | {"tie_word_embeddings": False}
    return getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()


def adapted(name, **settings):
    model, target = model_of(name), MODELS[name][3]
    lora.inject(model, target_modules=[target], r=4, lora_alpha=8, **settings)
    layers = [module for module in model.modules() if isinstance(module, lora.LoRALayer)]
    assert layers
    for layer in layers:
        for _, parameter in layer.lora_parameters():
            parameter.data += torch.randn_like(parameter) * 0.2
    return model, layers


@pytest.mark.parametrize("use_dora", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_the_models_output_is_that_of_w(name, use_dora, tmp_path):
    model, layers = adapted(name, use_dora=use_dora)
    inputs, base = MODELS[name][4], model_of(name)
    assert all(layer.lora_is_in_place() for layer in layers)
    logits, before = model(**inputs).logits, base(**inputs).logits
    right = copy.deepcopy(base)
    right.load_state_dict(lora.merged_state_dict(model))
    torch.testing.assert_close(logits, right(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert (logits - before).abs().max() > 1e-3
    logits.square().sum().backward()
    right(**inputs).logits.square().sum().backward()  # Phi-3.5-MoE's router has no gradient here, whatever is adapted
    names = {layer: name for name, layer in model.named_modules()}
    for layer in layers:
        learns = bool(right.get_submodule(names[layer]).weight.grad.any())
        assert all(bool(parameter.grad.any()) == learns for _, parameter in layer.lora_parameters())
    with lora.disabled(model):
        assert torch.equal(model(**inputs).logits, before)
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    lora.load_adapter(base, tmp_path / "adapter.safetensors")
    assert torch.equal(base(**inputs).logits, logits)
    lora.merge(model)
    torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", IN_PEFT)
def test_adapters_go_to_peft_and_back(name, tmp_path):
    model, _ = adapted(name)
    inputs = MODELS[name][4]
    lora.save_adapter(model, tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(model_of(name), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    config = peft.LoraConfig(r=4, target_modules=[MODELS[name][3]], init_lora_weights=False)
    theirs = peft.get_peft_model(model_of(name), config).eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    other = model_of(name)
    lora.load_adapter(other, tmp_path / "theirs")
    torch.testing.assert_close(other(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-5)
