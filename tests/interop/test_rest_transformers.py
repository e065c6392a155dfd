"""transformers' models with rows, heads and ties of their own: what a file holds, and what it refuses, beside PEFT."""

import copy
import re

import bitsandbytes
import peft
import pytest
import torch
import torch.nn as nn
from peft_models import QUIET
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lora
from lora.models.model import resized_embeddings

pytestmark = QUIET
ROWS, ADDED = 32, 5
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(ROWS + ADDED).view(1, -1)


def checkpoint(folder, tie):
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, tie_word_embeddings=tie, **SIZES)).save_pretrained(folder)
    return folder


def resized(folder, seed, rows=ROWS + ADDED):
    """The checkpoint, with rows added whose values depend on the seed."""
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows)
    return model.eval()


def train(model, steps=3):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    return model.eval()


def logits(model):
    return logits_of(model, ROWS + ADDED)


def logits_of(model, rows):
    with torch.no_grad():
        return model.eval()(input_ids=IDS[:, :rows]).logits


# ---- rows that resize_token_embeddings added ------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["embed_tokens"]], ids="+".join)
@pytest.mark.parametrize("format", ["lora", "peft"])
def test_added_rows_come_back_in_the_next_run(tmp_path, tie, targets, format):
    folder = checkpoint(tmp_path / "base", tie)
    model = resized(folder, seed=1)
    lora.inject(model, target_modules=targets, r=2)
    train(model)
    lora.save_adapter(model, tmp_path / "adapter", format=format)
    other = resized(folder, seed=2)
    before = logits(other)
    lora.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits(other), logits(model))
    assert not any(p.requires_grad for name, p in other.named_parameters() if "lora_" not in name)
    lora.save_adapter(other, tmp_path / "again")
    third = resized(folder, seed=3)
    lora.load_adapter(third, tmp_path / "again")
    assert torch.equal(logits(third), logits(model))
    with lora.disabled(other):
        assert torch.equal(logits(other), before)
    lora.eject(other)
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize("format", ["lora", "peft", "theirs"])
def test_an_output_layers_bias_comes_back_and_does_not_train(tmp_path, format):
    """Of BERT's it has two names."""
    torch.manual_seed(3)
    BertForMaskedLM(BertConfig(vocab_size=ROWS, **SIZES)).save_pretrained(tmp_path / "base")

    def new(seed):
        model = BertForMaskedLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        model.resize_token_embeddings(ROWS + ADDED)
        with torch.no_grad():
            model.cls.predictions.decoder.bias[ROWS:].normal_()
        return model.eval()

    model = new(1)
    if format == "theirs":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"])).eval()
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    else:
        lora.inject(model, target_modules=["query"], r=2)
        lora.save_adapter(model, tmp_path / "adapter", format=format)
    other = new(2)
    assert (logits(other) - logits(model)).abs().max() > 0.1
    lora.load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for name, p in other.named_parameters() if "lora_" not in name)


def test_what_is_held_of_a_resized_model(tmp_path):
    folder = checkpoint(tmp_path / "base", tie=False)
    model = resized(folder, seed=1)
    lora.inject(model, target_modules=["q_proj"], r=2)
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    held = ["model.embed_tokens.weight", "lm_head.weight"]
    adapter = lora.read_adapter(tmp_path / "adapter.safetensors")
    assert adapter.kept == adapter.trained_in_full == held
    assert not {*held} & adapter.rest.keys()
    plain = LlamaForCausalLM.from_pretrained(folder)
    lora.inject(plain, target_modules=["q_proj"], r=2)
    assert lora.adapter_of(plain).kept == []  # nothing was resized: nothing to hold


def test_a_model_that_was_not_resized_says_how(tmp_path):
    folder = checkpoint(tmp_path / "base", tie=False)
    model = resized(folder, seed=1)
    lora.inject(model, target_modules=["q_proj"], r=2)
    lora.save_adapter(model, tmp_path / "adapter")
    plain = LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(lora.AdapterError) as error:
        lora.load_adapter(plain, tmp_path / "adapter")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert f"{name} has the shape (32, 16) in the model, and (37, 16) in the file" in str(error.value)
    assert "call `model.resize_token_embeddings(37)` first" in str(error.value)
    plain.resize_token_embeddings(37)
    lora.load_adapter(plain, tmp_path / "adapter")


def test_rows_in_common_keep_the_models_own_precision(tmp_path):
    folder = checkpoint(tmp_path / "base", tie=False)
    model = resized(folder, seed=1).bfloat16()
    lora.inject(model, target_modules=["q_proj"], r=2)
    lora.save_adapter(model, tmp_path / "adapter")
    other = resized(folder, seed=2)
    exact = other.lm_head.weight.detach().clone()
    lora.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other.lm_head.weight[:ROWS], exact[:ROWS])
    assert torch.equal(other.lm_head.weight[ROWS:], model.lm_head.weight[ROWS:].float())


def test_rows_of_another_base_model_are_refused(tmp_path):
    folder = checkpoint(tmp_path / "base", tie=False)
    model = resized(folder, seed=1)
    lora.inject(model, target_modules=["embed_tokens"], r=2)
    lora.save_adapter(model, tmp_path / "adapter")
    other = resized(folder, seed=2)
    nn.init.normal_(other.model.embed_tokens.weight)
    with pytest.raises(lora.AdapterError, match=r"embed_tokens\.weight: only 0 of its 37 rows are those of the file"):
        lora.load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("format", ["lora", "peft"])
def test_the_portable_form_has_no_place_for_added_rows(tmp_path, format):
    """Left out, they would be other rows in the next run: PEFT's form tells nothing of adapted weights."""
    model = resized(checkpoint(tmp_path / "base", tie=True), seed=1)
    lora.inject(model, target_modules=["embed_tokens"], r=2)
    lora.save_adapter(model, tmp_path / "adapter", format=format)
    adapter = lora.read_adapter(tmp_path / "adapter")
    message = r"model\.embed_tokens\.weight is a part of the base model, and has no place there\."
    with pytest.raises(lora.AdapterError, match=message):
        lora.write_adapter(adapter, tmp_path / "portable", format="portable")


def test_rows_are_compared_a_part_at_a_time(tmp_path, monkeypatch):
    """The same rows are known, whatever the part."""
    monkeypatch.setattr("lora.adapters.fitting._ROWS", 7)
    test_added_rows_come_back_in_the_next_run(tmp_path, False, ["q_proj", "embed_tokens"], "lora")


def test_an_embedding_of_another_width_is_not_taken_for_a_resized_one(tmp_path):
    model = resized(checkpoint(tmp_path / "base", tie=False), seed=1)
    lora.inject(model, target_modules=["q_proj"], r=2)
    adapter = lora.adapter_of(model)
    adapter.tensors["lm_head.weight"] = torch.randn(ROWS, 8)
    with pytest.raises(lora.AdapterError) as error:
        lora.load_adapter(resized(tmp_path / "base", seed=1), adapter)
    assert "lm_head.weight must have the shape (37, 16), got (32, 8)." in str(error.value)
    assert "resize_token_embeddings" not in str(error.value)


def test_rows_are_known_again_after_casts_and_however_many_came(tmp_path):
    folder = checkpoint(tmp_path / "base", tie=False)
    model = resized(folder, seed=1, rows=40 * ROWS).bfloat16().float()
    lora.inject(model, target_modules=["q_proj"], r=2)
    lora.save_adapter(model, tmp_path / "adapter")
    other = resized(folder, seed=2, rows=40 * ROWS)
    lora.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other.lm_head.weight[ROWS:], model.lm_head.weight[ROWS:])


def test_added_rows_of_a_quantised_head_are_refused(tmp_path):
    model = resized(checkpoint(tmp_path / "base", tie=False), seed=1)
    packed = bitsandbytes.nn.Linear4bit(16, ROWS + ADDED, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    packed.load_state_dict({"weight": model.lm_head.weight.detach()})
    model.lm_head = packed.to("cpu")
    lora.inject(model, target_modules=["q_proj"], r=2)
    with pytest.raises(lora.AdapterError, match=r"lm_head\.weight: rows were added to it, .* and it is quantised"):
        lora.save_adapter(model, tmp_path / "adapter.safetensors")
    assert not (tmp_path / "adapter.safetensors").exists()


def test_a_configuration_that_its_class_refuses_says_nothing(tmp_path):
    folder = checkpoint(tmp_path / "base", tie=True)
    model = resized(folder, seed=1)
    (folder / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 0, "vocab_size": [1]}')
    assert list(resized_embeddings(model)) == []


def test_a_started_embedding_is_saved_as_it_was_pretrained(tmp_path):
    """PiSSA takes a part out of the base weight; what the file holds is the whole."""
    folder = checkpoint(tmp_path / "base", tie=False)
    model = resized(folder, seed=1)
    pretrained = model.model.embed_tokens.weight.detach().clone()
    lora.inject(model, target_modules=["embed_tokens"], r=2, init_lora_weights="pissa")
    assert (model.model.embed_tokens.weight - pretrained).abs().max() > 0.01
    train(model)
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    held = load_file(tmp_path / "adapter.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(held, pretrained, rtol=1e-5, atol=1e-6)
    other = resized(folder, seed=2)
    lora.load_adapter(other, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)


def test_only_what_is_on_this_machine_is_asked(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, **SIZES))
    assert list(resized_embeddings(model)) == []  # from no checkpoint
    model.config._name_or_path = str(tmp_path / "gone")
    assert list(resized_embeddings(model)) == []
    folder = checkpoint(tmp_path / "base", tie=True)
    wrapped = nn.ModuleDict({"policy": resized(folder, seed=1)})
    assert next(resized_embeddings(wrapped)) is wrapped["policy"].model.embed_tokens
    assert list(resized_embeddings(nn.Linear(2, 2))) == []


class Texts:
    """A configuration with several texts, as MusicGen's, of which transformers names none."""

    _name_or_path = "somewhere"

    def get_text_config(self):
        raise ValueError("ambiguous")

    @classmethod
    def from_pretrained(cls, name, **options):
        return cls()


@pytest.mark.parametrize("config", [Texts(), type("Other", (), {"_name_or_path": "somewhere"})()])
def test_a_model_whose_vocabulary_nothing_tells_is_saved(tmp_path, config):
    model = nn.Sequential(nn.Linear(2, 2))
    model.config, model.get_input_embeddings = config, lambda: None
    lora.inject(model, target_modules=["0"], r=1)
    lora.save_adapter(model, tmp_path / "adapter.safetensors")


def test_what_trains_in_full_and_was_resized_since_is_named(tmp_path):
    model = LlamaForCausalLM.from_pretrained(checkpoint(tmp_path / "base", tie=False))
    lora.inject(model, target_modules=["q_proj"], r=2, modules_to_save=["embed_tokens"])
    before = logits_of(model, ROWS)
    model.resize_token_embeddings(ROWS + ADDED)
    named = r"model\.embed_tokens\.weight: has the shape \(37, 16\), and had \(32, 16\) when LoRA was put in"
    with pytest.raises(ValueError, match=named):
        lora.eject(model)
    with pytest.raises(ValueError, match=named), lora.disabled(model):
        pass
    model.resize_token_embeddings(ROWS)
    lora.eject(model)
    assert torch.equal(logits_of(model, ROWS), before)


# ---- PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]], ids="+".join)
def test_peft_reads_added_rows_from_our_folder_and_we_from_its(tmp_path, targets):
    folder = checkpoint(tmp_path / "base", tie=False)
    ours = resized(folder, seed=1)
    lora.inject(ours, target_modules=targets, r=2)
    train(ours)
    lora.save_adapter(ours, tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(resized(folder, seed=2), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(resized(folder, seed=4), config)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    loaded = resized(folder, seed=5)
    lora.load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded), logits(theirs.eval()), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if "lora_" not in name)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's, of what is tested here
@pytest.mark.parametrize("format", ["lora", "peft"])
def test_two_tensors_for_one_tied_weight_are_refused_and_the_advice_is_right(tmp_path, format):
    """PEFT unties where `modules_to_save` names both ends; so has the file two tensors that differ."""
    folder = checkpoint(tmp_path / "base", tie=True)
    ids, config = IDS[:, :ROWS], peft.LoraConfig(r=2, target_modules=["q_proj"])
    config.modules_to_save = ["embed_tokens", "lm_head"]
    theirs = peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder), config)
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    expected = theirs(input_ids=ids, labels=ids).loss
    source = lora.read_adapter(tmp_path / "theirs")
    if format == "lora":
        lora.write_adapter(source, tmp_path / "ours.safetensors")
        source = tmp_path / "ours.safetensors"
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(lora.AdapterError) as error:
        lora.load_adapter(model, source)
    named = "model.embed_tokens.weight, lm_head.weight: are one tied tensor in the model, and differ in the file."
    assert named in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for line in re.findall(r"`(model\.[^`]* = [^`]*)`", str(error.value)):  # the advice, word for word
        exec(line, {"model": model, "torch": torch})
    lora.load_adapter(model, source)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected, rtol=1e-5, atol=1e-6)


def test_two_tensors_that_are_equal_go_into_one_tied_weight(tmp_path):
    folder = checkpoint(tmp_path / "base", tie=True)
    model = LlamaForCausalLM.from_pretrained(folder)
    lora.inject(model, target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    nn.init.normal_(model.lm_head.weight)
    adapter = lora.adapter_of(model)
    (name,) = adapter.trained_in_full
    other = ({"model.embed_tokens.weight", "lm_head.weight"} - {name}).pop()
    adapter.tensors[other] = adapter.tensors[name].clone()
    adapter.trained_in_full.append(other)
    loaded = LlamaForCausalLM.from_pretrained(folder)
    lora.load_adapter(loaded, adapter)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_weight_that_trained_alone_is_not_written_into_a_tied_one(tmp_path):
    """The file's model has both ends apart: one trained, and the other stayed."""
    apart, tied = (checkpoint(tmp_path / str(tie), tie) for tie in (False, True))
    model = LlamaForCausalLM.from_pretrained(apart)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    base = copy.deepcopy(model)
    lora.inject(model, target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    nn.init.normal_(model.lm_head.weight)
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    lora.load_adapter(base, tmp_path / "adapter.safetensors")
    with pytest.raises(lora.AdapterError, match=r"lm_head\.weight, model\.embed_tokens\.weight: are one tied tensor"):
        lora.load_adapter(LlamaForCausalLM.from_pretrained(tied), tmp_path / "adapter.safetensors")


# ---- heads that are made at random ----------------------------------------------------------------------------------


def test_a_random_head_without_a_task_type_is_named(tmp_path):
    from transformers import BertModel

    config = BertConfig(vocab_size=ROWS, num_labels=3, **SIZES)
    BertModel(config).save_pretrained(tmp_path / "body")

    def new(seed):
        torch.manual_seed(seed)
        return BertForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=3)

    model = new(1)
    lora.inject(model, target_modules=["query", "value"], r=2)
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    with pytest.raises(lora.AdapterError) as error:
        lora.load_adapter(new(2), tmp_path / "adapter.safetensors")
    listed = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert listed[0] == "  - classifier.weight: the values are not those that the adapter was trained with."
    assert len(listed) == 2
    assert "`task_type`" in listed[1]
    same = new(2)
    same.classifier.load_state_dict(model.classifier.state_dict())
    lora.load_adapter(same, tmp_path / "adapter.safetensors")
