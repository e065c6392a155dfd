"""examples/phi3_chat.py --export: what others read computes what the trained model does."""

import json

import gguf
import numpy as np
import peft
import phi3_chat
import pytest
import torch
from phi3 import exporting, tiny
from phi3.errors import UserError
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def test_what_cannot_be_exported_is_said_with_the_name_of_the_export(folder, tmp_path):
    model, tokenizer = adapted(folder, modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"--export portable: .*\n.*lm_head.weight trains in full"):
        exporting.export(model, tokenizer, tmp_path, ["portable"])


def test_the_flag_takes_several_names_and_no_others(tmp_path, capsys):
    assert phi3_chat.main(["--export", "peft", "onnx", "--output-dir", str(tmp_path)]) == 2
    assert "--export (export) is ['peft', 'onnx']; it must be any of peft, portable, gguf, merged" in (
        capsys.readouterr().err
    )


def test_a_run_exports_what_it_is_asked_for(folder, tmp_path):
    data = tmp_path / "chats.jsonl"
    chats = [[{"role": "user", "content": f"Is it {n}?"}, {"role": "assistant", "content": "Yes"}] for n in range(12)]
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    flags = {"model": folder, "data": data, "output-dir": tmp_path / "out", "max-steps": 1, "max-seq-length": 64}
    flags |= {"eval-conversations": 2, "sample-replies": 0, "device": "cpu"}
    argv = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    assert phi3_chat.main([*argv, "--export", "peft", "merged"]) == 0
    assert (tmp_path / "out" / "peft" / "adapter_config.json").is_file()
    assert (tmp_path / "out" / "merged" / "config.json").is_file()
    adapter = lora.read_adapter(tmp_path / "out" / "peft")
    assert adapter.format == "peft"
    assert set(adapter.modules) == set(lora.read_adapter(tmp_path / "out" / "adapter.safetensors").modules)
