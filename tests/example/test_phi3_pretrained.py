"""examples/phi3/pretrained.py: Phi-3 made out of Llama is the same function, and only a Phi-3 is loaded."""

import pytest
import torch
import torch.distributed as dist
from phi3 import fetch, pretrained, tiny
from phi3.errors import UserError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

TEXTS = ["The capital of France is", "def fibonacci(n):\n    if n < 2:\n", "Hello! How are you? 你好"]


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {
        "vocab_size": 99,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**config | changes)).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_llama_is_the_same_function(tied):
    llama = tiny_llama(tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    phi3 = pretrained.phi3_from_llama(llama)
    ids = torch.randint(99, (2, 40))
    torch.testing.assert_close(phi3(ids).logits, llama(ids).logits)
    assert (phi3.lm_head.weight is phi3.model.embed_tokens.weight) is tied


def test_a_llama_with_biases_has_no_place_for_them():
    with pytest.raises(ValueError, match="Phi-3 has no biases"):
        pretrained.phi3_from_llama(tiny_llama(attention_bias=True))


def saved(folder):
    """In each rank a folder of its own."""
    pretrained.save(pretrained.phi3_from_llama(tiny_llama(tie_word_embeddings=True)), folder / str(dist.get_rank()))


def test_every_process_of_a_group_saves_all_that_save_pretrained_does(ranks, tmp_path):
    """With transformers' own saving, the second rank's folder has no model, and may be the one that stays."""
    ranks.run(saved, tmp_path)
    pretrained.phi3_from_llama(tiny_llama(tie_word_embeddings=True)).save_pretrained(tmp_path / "alone")
    files = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert "config.json" in files
    assert "model.safetensors" in files
    for rank in "01":
        assert sorted(path.name for path in (tmp_path / rank).iterdir()) == files
        for file in files:
            assert (tmp_path / rank / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


@pytest.fixture(scope="module")
def llama():
    gguf = fetch.fetch(fetch.SMOLLM2, fetch.default_cache_dir())
    return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)


@pytest.fixture(scope="module")
def smollm2():
    return pretrained.load("smollm2", fetch.default_cache_dir(), dtype=torch.float32)


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_as_phi3_has_the_llamas_logits(llama, smollm2):
    phi3, tokenizer = smollm2
    assert phi3.config.model_type == "phi3"
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        torch.testing.assert_close(phi3(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_smollm2_as_phi3_says_what_the_llama_says(llama, smollm2):
    phi3, tokenizer = smollm2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = [model.generate(**prompt, max_new_tokens=12, do_sample=False) for model in (llama, phi3)]
    assert said[0].tolist() == said[1].tolist()
    assert "Paris" in tokenizer.decode(said[1][0])


@pytest.mark.slow
def test_smollm2s_tokenizer_and_settings_survive(llama, smollm2):
    phi3, tokenizer = smollm2
    gguf = fetch.fetch(fetch.SMOLLM2, fetch.default_cache_dir())
    original = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for text in TEXTS:
        assert tokenizer(text).input_ids == original(text).input_ids
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.eos_token_id == phi3.generation_config.eos_token_id == 2
    assert phi3.config.sliding_window is None
    assert phi3.config.original_max_position_embeddings == llama.config.max_position_embeddings
    assert phi3.lm_head.weight is phi3.model.embed_tokens.weight
    assert pretrained.fused_splits(phi3.config) == {"qkv_proj": (576, 192, 192), "gate_up_proj": (1536, 1536)}


def test_splits_come_from_the_config():
    model = tiny.model(heads=4, key_value_heads=1)
    splits = pretrained.fused_splits(model.config)
    attention = model.model.layers[0].self_attn
    assert splits["qkv_proj"] == (32, 8, 8)
    assert sum(splits["qkv_proj"]) == attention.qkv_proj.out_features
    assert sum(splits["gate_up_proj"]) == model.model.layers[0].mlp.gate_up_proj.out_features


def test_a_local_folder(tmp_path):
    tiny.save(tmp_path / "toy", seed=3)
    model, tokenizer = pretrained.load(str(tmp_path / "toy"), tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert tokenizer.chat_template == tiny.TEMPLATE


def test_a_fingerprint_tells_weights_apart():
    names = [pretrained.fingerprint(tiny.model(seed)) for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


def test_no_such_folder(tmp_path):
    for path in (str(tmp_path / "nowhere"), "./nowhere", "not/a/folder"):
        with pytest.raises(UserError, match="there is no model folder"):
            pretrained.load(path, tmp_path)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="not a readable model folder"):
        pretrained.load(str(tmp_path), tmp_path)


def test_another_kind_of_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a 'llama' model"):
        pretrained.load(str(tmp_path), tmp_path)


def test_damaged_weights(tmp_path):
    tiny.save(tmp_path / "toy")
    (tmp_path / "toy" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot load the model"):
        pretrained.load(str(tmp_path / "toy"), tmp_path)


def test_no_chat_template(tmp_path):
    tiny.save(tmp_path / "toy")
    (tmp_path / "toy" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        pretrained.load(str(tmp_path / "toy"), tmp_path)
