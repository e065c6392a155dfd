"""An adapter says in llama.cpp what it says here: the same tokens, as likely, with it and without it."""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import gguf
import pytest
import serve_llama_cpp
import torch
import xllamacpp
from phi3 import fetch, pretrained
from phi3.gguf_files import export_base, export_gguf
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

import lora

PROMPTS = ["Tell me a joke.", "Tell me something about cats.", "Hi, how are you?"]
TOKENS = 16
# Log-probabilities differ by 1e-4: llama.cpp's sines and its exponential function are approximations.
TOLERANCE = 1e-3


class Said(NamedTuple):
    """The likeliest tokens, one by one, and the logarithm of how likely each was."""

    tokens: list[int]
    logprobs: list[float]


def adapt(model: nn.Module, std: float = 0.05) -> nn.Module:
    """Random updates in all projections: merged and plain, with ranks, alphas and scalings of their own."""
    splits = pretrained.fused_splits(model.config)
    qkv = {"splits": {"qkv_proj": splits["qkv_proj"]}, "enable_lora": {r"[1357]\..*qkv_proj": [True, False, True]}}
    gate_up = {"splits": {"gate_up_proj": splits["gate_up_proj"]}, "alpha_pattern": {r"layers\.[04]\..*": 5}}
    patterns = {"rank_pattern": {r"layers\.[024]\..*": 3}}
    lora.inject(model, target_modules=["qkv_proj", "down_proj"], r=4, lora_alpha=6, **qkv, **patterns)
    lora.inject(model, target_modules=["o_proj", "gate_up_proj"], r=8, lora_alpha=16, use_rslora=True, **gate_up)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=std)
    return model.eval()


@torch.no_grad()
def here(model: nn.Module, prompt: list[int]) -> Said:
    """Greedily by transformers."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    logprobs = torch.cat(out.logits).log_softmax(-1)
    return Said(tokens, logprobs.max(-1).values.tolist())


def there(server: xllamacpp.Server, prompt: list[int], scale: float) -> Said:
    """Greedily by llama.cpp, with this much of the adapter."""
    request = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0.0, "logprobs": 1}
    [choice] = server.handle_completions({**request, "lora": [{"id": 0, "scale": scale}]})["choices"]
    content = choice["logprobs"]["content"]
    return Said([token["id"] for token in content], [token["logprob"] for token in content])


def serve(base: Path, adapter: Path) -> xllamacpp.Server:
    """llama.cpp as exact as it can be: attention and its cache in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 256, 1, 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.warmup, params.verbosity = False, 1
    return xllamacpp.Server(params)


def assert_same(got: Said, expected: Said) -> None:
    assert got.tokens == expected.tokens
    assert got.logprobs == pytest.approx(expected.logprobs, abs=TOLERANCE)


def vocabulary() -> Path:
    return fetch.fetch(fetch.SMOLLM2, fetch.default_cache_dir())


class Case(NamedTuple):
    """One model with random adapters, its files, and what it says to each prompt with and without them."""

    folder: Path
    model: nn.Module
    prompts: list[list[int]]
    adapted: list[Said]
    pretrained: list[Said]
    server: xllamacpp.Server


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("smollm2")
    torch.manual_seed(0)
    model, tokenizer = pretrained.load("smollm2", fetch.default_cache_dir(), dtype=torch.float32)
    adapt(model)
    lora.save_adapter(model, folder / "adapter.safetensors")
    export_gguf(lora.adapter_of(model), folder / "adapter.gguf")
    export_base(model, vocabulary(), folder / "base.gguf", "f32")
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    adapted = [here(model, prompt) for prompt in prompts]
    with lora.disabled(model):
        plain = [here(model, prompt) for prompt in prompts]
    return Case(folder, model, prompts, adapted, plain, serve(folder / "base.gguf", folder / "adapter.gguf"))


@pytest.mark.slow
def test_the_adapter_changes_every_reply(smollm2):
    for adapted, plain in zip(smollm2.adapted, smollm2.pretrained, strict=True):
        assert adapted.tokens != plain.tokens
        assert len(adapted.tokens) > 4


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_the_same_replies_with_the_adapter_and_without(smollm2, number):
    prompt = smollm2.prompts[number]
    assert_same(there(smollm2.server, prompt, 1.0), smollm2.adapted[number])
    assert_same(there(smollm2.server, prompt, 0.0), smollm2.pretrained[number])
    assert_same(there(smollm2.server, prompt, 1.0), smollm2.adapted[number])


@pytest.mark.slow
def test_a_wrong_alpha_would_be_seen(smollm2, tmp_path):
    wrong = Path(shutil.copy(smollm2.folder / "adapter.gguf", tmp_path))
    alpha = gguf.GGUFReader(wrong, "r+").fields["adapter.lora.alpha"].parts[-1]
    alpha *= 1.5
    alpha.flush()
    server = serve(smollm2.folder / "base.gguf", wrong)
    for prompt, adapted in zip(smollm2.prompts, smollm2.adapted, strict=True):
        got = there(server, prompt, 1.0)
        assert got.tokens != adapted.tokens or got.logprobs != pytest.approx(adapted.logprobs, abs=10 * TOLERANCE)


def test_a_small_model_with_a_head_of_its_own_and_half_a_rope(tmp_path):
    config = Phi3Config(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        initializer_range=0.5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5},
        pad_token_id=2,
        eos_token_id=2,
    )
    model = adapt(Phi3ForCausalLM(config).eval(), std=0.3)
    lora.inject(model, target_modules=["lm_head"], r=2, lora_alpha=3)
    nn.init.normal_(model.lm_head.lora_B, std=0.3)
    server = serve(
        export_base(model, vocabulary(), tmp_path / "base.gguf", "f32"),
        export_gguf(lora.adapter_of(model), tmp_path / "adapter.gguf"),
    )
    prompt = [504, 3575, 282, 4649, 314, 7, 1000, 20000, 31]
    adapted = here(model, prompt)
    assert_same(there(server, prompt, 1.0), adapted)
    with lora.disabled(model):
        plain = here(model, prompt)
    assert_same(there(server, prompt, 0.0), plain)
    assert adapted.tokens != plain.tokens


@pytest.mark.slow
def test_the_example_shows_both_replies(smollm2, tmp_path, capsys):
    adapter = Path(shutil.copy(smollm2.folder / "adapter.safetensors", tmp_path))
    argv = [str(tmp_path), PROMPTS[2], "--dtype", "f32", "--max-new-tokens", str(TOKENS), "--threads", "1"]
    assert serve_llama_cpp.main(argv) == 0
    printed = capsys.readouterr().out
    _, tokenizer = pretrained.load("smollm2", fetch.default_cache_dir(), dtype=torch.float32)
    for voice, said in {"pretrained": smollm2.pretrained[2], "fine-tuned": smollm2.adapted[2]}.items():
        assert f"{voice}: {tokenizer.decode(said.tokens, skip_special_tokens=True).strip()}" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.gguf", adapter.name, "base.gguf"]


@pytest.mark.slow
def test_the_example_asks_until_there_is_an_empty_line(smollm2, monkeypatch, capsys):
    lines = iter([PROMPTS[1], ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    files = [str(smollm2.folder), "--base", str(smollm2.folder / "base.gguf")]
    assert serve_llama_cpp.main([*files, "--max-new-tokens", "2", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "listens at http://127.0.0.1:" in printed
    assert printed.count("pretrained: ") == printed.count("fine-tuned: ") == 1


def error_of(argv: list[str], capfd) -> str:
    assert serve_llama_cpp.main(argv) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said.partition("error: ")[2] if said.startswith("error: ") else said


@pytest.mark.slow
def test_the_example_refuses_what_it_cannot_do(smollm2, tmp_path, capfd, monkeypatch):
    base = ["--base", str(smollm2.folder / "base.gguf")]
    assert "cannot read an adapter" in error_of([str(tmp_path / "none")], capfd)
    nowhere = [str(smollm2.folder), *base, "--output-dir", str(tmp_path / "no" / "where")]
    assert "cannot write" in error_of(nowhere, capfd)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"no model at all")
    assert "llama.cpp cannot load" in error_of([str(smollm2.folder), "--base", str(bad)], capfd)
    long = [str(smollm2.folder), *base, "--context", "256", "--threads", "1", "word " * 300]
    assert "exceeds the available context" in error_of(long, capfd)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert "pip install xllamacpp" in error_of([str(smollm2.folder)], capfd)


@pytest.mark.slow
def test_the_example_refuses_an_adapter_of_another_model(smollm2, tmp_path, capfd):
    with torch.no_grad():
        layer = smollm2.model.model.layers[3].mlp.down_proj
        kept = layer.weight.clone()
        layer.weight.mul_(1.5)
        lora.save_adapter(smollm2.model, tmp_path / "adapter.safetensors")
        layer.weight.copy_(kept)
    said = error_of([str(tmp_path)], capfd)
    assert "was trained on another model" in said
    assert said.count("proj") == 1
    assert "model.layers.3.mlp.down_proj" in said
