"""What names and one flag for all layers cannot say: tied weights, shared modules, transposed weights, half a save."""

import copy
import json
import os

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lora

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks transformers
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]


def llama(tied):
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))


@pytest.mark.parametrize(("saved", "other"), [("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")])
def test_a_tied_weight_of_which_peft_trained_a_copy_is_refused(saved, other, tmp_path):
    base = llama(tied=True)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[saved])
    )
    theirs.save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(lora.AdapterError, match=rf"{saved}.weight: tied to {other}.weight in the model"):
        lora.load_adapter(base, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    lora.load_adapter(llama(tied=False), tmp_path)


def test_a_tied_weight_that_trains_is_not_written_for_peft(tmp_path):
    model = llama(tied=True)
    lora.inject(model, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(lora.AdapterError, match=r"tied to lm_head\.weight in the model; PEFT would train"):
        lora.save_adapter(model, tmp_path / "theirs", format="peft")
    assert not (tmp_path / "theirs").exists()
    lora.save_adapter(model, tmp_path / "ours")


@pytest.mark.parametrize("format", ["peft", "portable"])
def test_one_module_under_two_names_is_not_written_for_peft(format, tmp_path):
    layer = nn.Linear(4, 4, bias=False)
    model = nn.ModuleDict({"a": layer, "b": layer})
    lora.inject(model, target_modules=["a"], r=2)
    with pytest.raises(lora.AdapterError, match="a, b: are names of one module, of which PEFT would"):
        lora.save_adapter(model, tmp_path / "theirs", format=format)


def gpt2():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, num_labels=2, pad_token_id=0)
    return GPT2ForSequenceClassification(config)


@pytest.mark.parametrize("format", ["peft", "portable"])
def test_our_own_folders_say_which_weights_are_transposed(format, tmp_path):
    model = gpt2()
    lora.inject(model, target_modules=["attn.c_proj", "score"], r=2)
    for layer in model.modules():
        if isinstance(layer, lora.LoRALayer):
            nn.init.normal_(layer.lora_B)
    lora.save_adapter(model, tmp_path, format=format)
    adapter = lora.read_adapter(tmp_path)
    for name in ("transformer.h.0.attn.c_proj", "score"):
        layer = model.get_submodule(name)
        update = layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
        expected = update.T if name.endswith("c_proj") else update
        torch.testing.assert_close(adapter.delta(name, torch.float64), expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("targets", "flag"), [(["c_proj"], True), (["c_proj", "score"], None), (["q_proj"], False)])
def test_of_pefts_folders_only_what_is_sure_is_known(targets, flag, tmp_path):
    base = llama(tied=False) if targets == ["q_proj"] else gpt2()
    peft.get_peft_model(base, peft.LoraConfig(target_modules=targets)).save_pretrained(tmp_path)
    said = {n: s["base"]["fan_in_fan_out"] for n, s in lora.read_adapter(tmp_path).modules.items()}
    assert all(value is (False if flag is False else None) for name, value in said.items() if "proj" in name)


def test_what_is_not_known_of_a_layout_is_not_made_up_by_writing_it_again(tmp_path):
    peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["attn.c_proj", "score"])).save_pretrained(tmp_path)
    for n, format in enumerate(("peft", "portable", "lora")):
        adapter = lora.read_adapter(tmp_path)
        lora.write_adapter(adapter, tmp_path / str(n), format)
        again = lora.read_adapter(tmp_path / str(n)).modules
        assert again["transformer.h.0.attn.c_proj"]["base"]["fan_in_fan_out"] is None
        assert again["score"]["base"]["fan_in_fan_out"] is False


def adapter(lora_alpha):
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    lora.inject(model, target_modules=["0"], r=2, lora_alpha=lora_alpha)
    nn.init.normal_(model[0].lora_B)
    return lora.adapter_of(model)


def test_a_save_that_fails_half_way_leaves_the_old_adapter(tmp_path, monkeypatch):
    lora.write_adapter(adapter(3), tmp_path, "peft")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = os.replace

    def failing(source, target):
        if os.path.basename(target) == "adapter_config.json":
            raise OSError("no space left")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no space left"):
        lora.write_adapter(adapter(100), tmp_path, "peft")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_was_in_the_folder_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"old")
    lora.write_adapter(adapter(3), tmp_path, "peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"] == 3


def test_a_name_that_no_file_may_have_leaves_no_folder(tmp_path):
    model = nn.ModuleDict({"a/b": nn.Linear(4, 4, bias=False)})
    lora.inject(model, target_modules=["a/b"], r=2)
    with pytest.raises(lora.AdapterError, match="must have no"):
        lora.save_adapter(model, tmp_path / "theirs", format="peft")
    assert not (tmp_path / "theirs").exists()
