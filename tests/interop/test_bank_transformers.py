"""A bank in transformers' models: in a mixed batch each row is as the model with its adapter alone."""

from typing import Any

import pytest
import torch
import torch.nn as nn
import transformers as hf
from banks import Net, alone, assert_close, assert_each_as_alone, banked
from expert_models import make
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import lora

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 40, "max_position_embeddings": 32}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LLAMA = {**SIZES, **TEXT, **TOKENS, "num_key_value_heads": 2}
FUSED = {"splits": {"qkv_proj": (16, 8, 8)}, "enable_lora": {"qkv_proj": (True, False, True)}}
GPT2 = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, **TOKENS}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
BLOOM = {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2, "slow_but_exact": True, **TOKENS}
MAMBA = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **TOKENS}
MOE = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}


def text(*shape: int) -> Tensor:
    return torch.randint(3, 40, shape, generator=torch.Generator().manual_seed(1))


# For each: the model, the targets, further settings of the second adapter, and what goes in, all with rows first.
MODELS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Tensor]]] = {
    "Llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
        ["q_proj", "v_proj", "down_proj", "embed_tokens"],
        {"use_dora": True, "target_modules": ["v_proj", "gate_proj"]},
        {"input_ids": text(4, 5)},
    ),
    "Phi-3": (
        lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**LLAMA)),
        ["qkv_proj", "o_proj"],
        FUSED,
        {"input_ids": text(4, 5)},
    ),
    "GPT-2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
        ["c_attn", "c_proj"],
        {"splits": {"c_attn": (16, 16, 16)}, "enable_lora": {"c_attn": (True, False, True)}},
        {"input_ids": text(4, 5)},
    ),
    "Gemma": (
        lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**LLAMA, head_dim=4)),
        ["embed_tokens", "q_proj"],
        {},
        {"input_ids": text(4, 5)},
    ),
    "Mixtral": (lambda: make("Mixtral"), [], MOE, {"input_ids": text(4, 5)}),
    "Qwen3-MoE": (lambda: make("Qwen3-MoE"), [], MOE, {"input_ids": text(4, 5)}),
    "GPT-OSS": (lambda: make("GPT-OSS"), [], MOE, {"input_ids": text(4, 5)}),
    "BLOOM": (  # its attention reads the weight of its output
        lambda: hf.BloomForCausalLM(hf.BloomConfig(**BLOOM)),
        ["query_key_value", "dense"],
        {},
        {"input_ids": text(4, 5)},
    ),
    "Mamba": (  # so does its mixer, for its kernels
        lambda: hf.MambaForCausalLM(hf.MambaConfig(**MAMBA)),
        ["x_proj", "in_proj", "out_proj"],
        {},
        {"input_ids": text(4, 5)},
    ),
    "BERT": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES, **TEXT, num_labels=3)),
        ["query", "value", "word_embeddings"],
        {},
        {"input_ids": text(4, 5), "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1] * 5, [1] * 4 + [0]])},
    ),
    "T5": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0, eos_token_id=None)),
        ["q", "v", "wo", "lm_head"],
        {"use_dora": True},
        {"input_ids": text(4, 5), "decoder_input_ids": text(4, 3)},
    ),
    "ViT": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3)),
        ["q_proj", "fc1", "projection"],
        {"factored": True},
        {"pixel_values": torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))},
    ),
}
NAMES: list[str | None] = ["b", "a", None, "b"]


def moved(model: str, **others: Any) -> tuple[nn.Module, nn.Module, lora.AdapterBank, dict[str, Tensor]]:
    torch.manual_seed(0)
    made, targets, settings, inputs = MODELS[model]
    base = made().double().eval().requires_grad_(False)
    configs: dict[str, dict[str, Any]] = {"a": {"r": 3}, "b": settings, "c": {}}
    if settings is MOE:
        configs = {name: {**MOE, **config} for name, config in configs.items()}
    configs = {name: {**config, **others} for name, config in configs.items()}
    return base, *banked(base, configs, targets), inputs


def some(inputs: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in inputs.items()}


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("model", MODELS)
def test_a_mixed_batch_is_each_alone_and_so_are_its_gradients(model: str, training: bool) -> None:
    base, mixed, bank, inputs = moved(model)
    for one in (base, mixed):
        without_dropout(one.train(training))
    with bank.rows(NAMES, flattened=True):
        logits = mixed(**inputs).logits
        upstream = torch.randn(logits.shape, dtype=logits.dtype)
        (logits * upstream).sum().backward()
    for name in dict.fromkeys(NAMES):
        rows = [row for row, its in enumerate(NAMES) if its == name]
        its = alone(base, bank, name)
        expected = its(**some(inputs, rows)).logits
        assert_close(logits[rows], expected, 1e-9)
        if name is not None:
            (expected * upstream[rows]).sum().backward()
            for key, parameter in its.named_parameters():
                if "lora_" in key:
                    assert_close(mixed.get_parameter(f"{key}_{name}").grad, parameter.grad, 1e-8)
    assert all(parameter.grad is None for parameter in bank.parameters("c"))


GENERATING = [name for name in MODELS if name not in ("BERT", "ViT")]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model", GENERATING)
def test_text_is_generated_as_by_each_alone(model: str) -> None:
    base, mixed, bank, inputs = moved(model)
    for one in (base, mixed):
        one.generation_config.eos_token_id = None
    prompt = inputs["input_ids"]
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    with bank.rows(NAMES, flattened=True):
        written = mixed.generate(prompt, **how)
    assert len({*map(tuple, written.tolist())}) > 1
    for row, name in enumerate(NAMES):
        its = {key: value[row : row + 1] if isinstance(value, Tensor) else value for key, value in how.items()}
        assert torch.equal(written[row : row + 1], alone(base, bank, name).generate(prompt[row : row + 1], **its))


@torch.no_grad()
def test_divided_modules_write_their_rows_of_a_cache_and_leave_what_they_do_not_write() -> None:
    base, mixed, bank, inputs = moved("BLOOM")
    prompt, cache, found = inputs["input_ids"], hf.DynamicCache(config=base.config), []
    mixed.transformer.h[1].register_forward_pre_hook(lambda *_: found.append(cache.layers[1].keys))
    with bank.rows(NAMES):
        mixed(prompt, cache=cache)
        before = cache.layers[1].keys
        logits = mixed(prompt[:, :1], cache=cache).logits
    assert found[1] is before  # the first layer's call has not copied what the second holds
    for row, name in enumerate(NAMES):
        its, other = hf.DynamicCache(config=base.config), alone(base, bank, name)
        other(prompt[row : row + 1], cache=its)
        expected = other(prompt[row : row + 1, :1], cache=its).logits
        assert_close(logits[row : row + 1], expected, 1e-9)
        for layer, own in zip(cache.layers, its.layers, strict=True):
            assert_close(layer.keys[row : row + 1], own.keys, 1e-9)
            assert_close(layer.values[row : row + 1], own.values, 1e-9)


@torch.no_grad()
def test_a_static_cache_counts_each_step_once() -> None:
    base, mixed, bank, inputs = moved("BLOOM")
    prompt, cache = inputs["input_ids"], hf.StaticCache(config=base.config, max_cache_len=8)
    with bank.rows(NAMES):
        mixed(prompt, cache=cache)
        logits = mixed(prompt[:, :1], cache=cache).logits
    assert cache.get_seq_length() == 6
    for row, name in enumerate(NAMES):
        both = torch.cat([prompt[row : row + 1], prompt[row : row + 1, :1]], 1)
        # BLOOM's softmax is in float32, and sums the room of a static cache in another order than a prompt.
        assert_close(logits[row, -1], alone(base, bank, name)(both).logits[0, -1], 1e-6)


@pytest.mark.slow
def test_beams_stay_with_their_rows() -> None:
    base, mixed, bank, inputs = moved("Llama")
    prompt = inputs["input_ids"]
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    with bank.rows(NAMES, flattened=True):
        written = mixed.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
    for row, name in enumerate(NAMES):
        its = prompt[row : row + 1]
        expected = alone(base, bank, name).generate(its, attention_mask=torch.ones_like(its), **how)
        assert torch.equal(written[row : row + 1], expected)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_by_every_implementation(implementation: str) -> None:
    base, mixed, bank, inputs = moved("Mixtral")
    for one in (base, mixed):
        one.float().set_experts_implementation(implementation)  # torch's grouped products know no float64
    with torch.no_grad(), bank.rows(NAMES, flattened=True):
        logits = mixed(**inputs).logits
    for row, name in enumerate(NAMES):
        with torch.no_grad():
            assert_close(logits[row : row + 1], alone(base, bank, name)(**some(inputs, [row])).logits, 1e-4)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model", ["Llama", "GPT-2", "Mixtral", "T5"])
def test_checkpointed_models_have_the_gradients_of_those_that_are_not(model: str, reentrant: bool) -> None:
    _, mixed, bank, inputs = moved(model, lora_dropout=0.3)
    mixed.train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            mixed.activation_checkpointing_enable({"use_reentrant": reentrant})
            mixed.enable_input_require_grads()
        mixed.zero_grad()
        torch.manual_seed(7)
        for name in bank:
            bank.seed(name, 3)
        with bank.rows(NAMES, flattened=True):
            mixed(**inputs, use_cache=False).logits.square().mean().backward()
        found.append([parameter.grad for name in ("a", "b") for parameter in bank.parameters(name)])
    for one, other in zip(*found, strict=True):
        assert_close(other, one, 1e-10)


def test_transformers_conv1d() -> None:
    torch.manual_seed(0)
    base = Net(Conv1D(9, 5).double()).requires_grad_(False)
    fused = {"splits": {"x": (3, 3, 3)}, "enable_lora": {"x": (True, False, True)}}
    model, bank = banked(base, {"a": {}, "b": fused, "c": {"use_dora": True}})
    assert_each_as_alone(base, model, bank, torch.randn(8, 4, 5, dtype=torch.float64))
