"""PEFT's configurations as ours: which layers they mean, what trains, and all of their words."""

import copy
import dataclasses
from contextlib import nullcontext

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft_models import QUIET, train
from torch import nn

import lora
from lora.errors import Problems
from lora.models.peft_words import in_layers

pytestmark = QUIET

PARTS = st.sampled_from(["q", "h", "layers", "model", "0", "1", "2", "13", "x-1", "experts"])
KEYS = st.lists(PARTS, min_size=1, max_size=7).map(".".join)
NUMBERS = st.one_of(st.integers(0, 3), st.lists(st.integers(0, 14), max_size=3))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(KEYS, min_size=1, max_size=8, unique=True),
    st.lists(KEYS, min_size=1, max_size=3),
    NUMBERS,
    st.sampled_from([None, [], "", "h", ["h"], ["layers", "h"], ["model.layers", "experts"], "l.*s", "(h|model)"]),
)
def test_the_layers_are_those_that_peft_means(keys, targets, numbers, pattern):
    words = {"target_modules": targets, "layers_to_transform": numbers, "layers_pattern": pattern}
    theirs = peft.LoraConfig(**words)
    named = {nn.Module(): (key,) for key in keys if any(f".{key}".endswith(f".{target}") for target in targets)}
    ours = in_layers(lora.LoraConfig(**words), [*named], named, Problems("nothing"))
    assert [named[module][0] for module in ours] == [
        key for (key,) in named.values() if check_target_module_exists(theirs, key)
    ]


def tiny():
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.tensor([[5, 7, 9, 11, 13]])


@pytest.mark.parametrize(
    "words",
    [
        {"layers_to_transform": [1, 3]},
        {"layers_to_transform": 2, "layers_pattern": "layers"},
        {"layers_to_transform": [0], "modules_to_save": ["lm_head"], "bias": "lora_only"},
    ],
    ids=str,
)
def test_a_configuration_of_peft_is_one_of_ours_and_folders_go_both_ways(words, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **words)
    base = tiny()
    theirs = train(peft.get_peft_model(copy.deepcopy(base), config), 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    report = lora.inject(ours, **config.to_dict())
    assert {module.names[0] for module in report.modules} == {
        name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")
    }
    assert report.trainable == theirs.get_nb_trainable_parameters()[0]
    lora.load_adapter(ours, tmp_path / "theirs")
    expected = theirs(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    lora.save_adapter(ours, tmp_path / "ours", format="peft")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(back(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_in_inference_mode_nothing_trains_as_in_peft():
    words = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "inference_mode": True}
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(**words))
    ours = tiny()
    lora.inject(ours, **words)
    assert [any(p.requires_grad for p in model.parameters()) for model in (theirs, ours)] == [False, False]


def test_gpt2_is_adapted_whatever_is_said_of_its_layout():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=40))
    for said in (True, False):
        model = copy.deepcopy(gpt2)
        assert lora.inject(model, target_modules=["c_attn"], r=2, fan_in_fan_out=said).modules


NOTES = [*("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "megatron_core", "qalora_group_size")]
WORDS = [field.name for field in dataclasses.fields(peft.LoraConfig)]


@pytest.mark.parametrize("word", WORDS)
def test_every_word_of_peft_is_known(word):
    """As it is where a user says nothing; set, it has a meaning or an error says what to do instead."""
    default = getattr(peft.LoraConfig(target_modules=["q"]), word)
    if word != "runtime_config":  # an object, which PEFT leaves out of `to_dict`
        lora.LoraConfig(**{"target_modules": ["q"], word: default if word != "target_modules" else ["q"]})
    with nullcontext() if word in NOTES else pytest.raises(ValueError, match=f"`{word}`"):
        lora.LoraConfig(**{"target_modules": ["q"], word: object()})
