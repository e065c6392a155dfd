"""examples/phi3_chat.py --export: what others read computes what the trained model does."""

import json
import re
import tempfile

import gguf
import numpy as np
import peft
import phi3_chat
import pytest
import torch
from phi3 import exporting, tiny
from phi3.errors import UserError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers

IDS = torch.arange(3, 23).view(2, 10)


@pytest.fixture
def folder(tmp_path):
    tiny.save(tmp_path / "model")
    return tmp_path / "model"


def adapted(folder, **options):
    """The tiny model with a random adapter on all its projections, and its tokenizer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    phi3_chat.inject(model, phi3_chat.peft_config | options)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval(), tokenizer


@pytest.mark.parametrize("format", ["peft", "portable"])
def test_peft_says_what_the_model_says(folder, format, tmp_path):
    model, tokenizer = adapted(folder)
    exporting.export(model, tokenizer, tmp_path, [format])
    base = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected, before = model(IDS).logits, base(IDS).logits
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / format).eval()(IDS).logits
    assert (before - expected).abs().max() > 1e-2
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5)


def test_the_merged_folder_is_a_plain_model(folder, tmp_path):
    model, tokenizer = adapted(folder)
    exporting.export(model, tokenizer, tmp_path, ["merged"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in merged.state_dict())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


def test_the_gguf_file_holds_the_updates(folder, tmp_path):
    model, tokenizer = adapted(folder)
    exporting.export(model, tokenizer, tmp_path, ["gguf"])
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    layer = model.model.layers[0].self_attn.o_proj
    update = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    A, B = (tensors[f"blk.0.attn_output.weight.lora_{part}"].astype(np.float64) for part in "ab")
    alpha = max(tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_a"))
    np.testing.assert_allclose(B @ A * alpha / len(A), update.detach().numpy(), rtol=0, atol=1e-7)


def test_all_that_cannot_be_exported_is_said_with_its_name(folder):
    model, _ = adapted(folder, modules_to_save=["lm_head"])
    with pytest.raises(UserError) as caught:
        exporting.check(model, ["portable", "merged", "gguf", "peft"])
    said = re.findall(r"--export (\w+): .*\n.*lm_head.weight trains in full", str(caught.value))
    assert said == ["portable", "gguf"]
    assert str(caught.value).count("--export") == 2


def test_a_check_that_finds_nothing_leaves_nothing(folder, tmp_path, monkeypatch):
    model, _ = adapted(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    exporting.check(model, list(exporting.EXPORTS))
    assert not list((tmp_path / "temporary").iterdir())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_embeddings_cannot_be_merged_apart(folder, tmp_path, target):
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model, tokenizer = adapted(folder, target_modules=[target])
    for attempt in (
        lambda: exporting.check(model, ["merged"]),
        lambda: exporting.export(model, tokenizer, tmp_path, ["merged"]),
    ):
        with pytest.raises(UserError, match=rf"--export merged: .*{target} is adapted, .*tie_word_embeddings is True"):
            attempt()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("options", [{"target_modules": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_embeddings_that_are_not_tied_can_be_merged(folder, tmp_path, options):
    model, tokenizer = adapted(folder, **options)
    exporting.check(model, ["merged"])
    exporting.export(model, tokenizer, tmp_path, ["merged"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


def test_an_export_that_fails_keeps_no_other_from_being_written(folder, tmp_path, capsys):
    model, tokenizer = adapted(folder)
    for file in ("peft", "merged"):
        (tmp_path / file).write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match=r"(?s)^--export peft: .*\n--export merged: ") as caught:
        exporting.export(model, tokenizer, tmp_path, ["peft", "portable", "merged", "gguf"])
    assert str(caught.value).count("--export") == 2
    assert (tmp_path / "portable" / "adapter_config.json").is_file()
    assert (tmp_path / "adapter.gguf").is_file()
    assert capsys.readouterr().out.count("Exported for others") == 2


def test_the_flag_takes_several_names_and_no_others(tmp_path, capsys):
    assert phi3_chat.main(["--export", "peft", "onnx", "--output-dir", str(tmp_path)]) == 2
    assert "--export (export) is ['peft', 'onnx']; it must be any of peft, portable, gguf, merged" in (
        capsys.readouterr().err
    )


@pytest.fixture
def argv(folder, tmp_path):
    """The flags of a run of one step into tmp_path / "out"."""
    data = tmp_path / "chats.jsonl"
    chats = [[{"role": "user", "content": f"Is it {n}?"}, {"role": "assistant", "content": "Yes"}] for n in range(12)]
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    flags = {"model": folder, "data": data, "output-dir": tmp_path / "out", "max-steps": 1, "max-seq-length": 64}
    flags |= {"eval-conversations": 2, "sample-replies": 0, "device": "cpu"}
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))]


def test_a_run_exports_what_it_is_asked_for(argv, tmp_path):
    assert phi3_chat.main([*argv, "--export", "peft", "merged"]) == 0
    assert (tmp_path / "out" / "peft" / "adapter_config.json").is_file()
    assert (tmp_path / "out" / "merged" / "config.json").is_file()
    adapter = lora.read_adapter(tmp_path / "out" / "peft")
    assert adapter.format == "peft"
    assert set(adapter.modules) == set(lora.read_adapter(tmp_path / "out" / "adapter.safetensors").modules)


def test_a_run_that_cannot_be_exported_does_not_begin(argv, tmp_path, capsys):
    assert phi3_chat.main([*argv, "--modules-to-save", "lm_head", "--export", "peft", "portable", "gguf"]) == 2
    said = capsys.readouterr().err
    assert [name in said for name in ("--export portable: ", "--export gguf: ", "--export peft")] == [True, True, False]
    assert not (tmp_path / "out").exists()


def test_a_run_is_all_there_when_an_export_fails(argv, tmp_path, capsys, monkeypatch):
    def full(model, tokenizer, path):
        raise OSError("no space left")

    monkeypatch.setitem(exporting.EXPORTS, "peft", ("peft", full))
    assert phi3_chat.main([*argv, "--export", "peft", "portable"]) == 2
    said = capsys.readouterr()
    assert "error: --export peft: no space left\n" in said.err
    assert "Held-out perplexity" in said.out
    for file in ("adapter.safetensors", "replies.jsonl", "loss.png", "portable/adapter_config.json"):
        assert (tmp_path / "out" / file).is_file()
