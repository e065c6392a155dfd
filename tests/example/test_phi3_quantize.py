"""examples/phi3_chat.py --quantize: what trains over a quantised model is an adapter of the plain one, too."""

import importlib
import shutil

import bitsandbytes as bnb
import phi3_chat
import pytest
import torch
from phi3 import quantizing, tiny
from phi3.errors import UserError
from test_phi3_cli import argv, metrics, toy  # noqa: F401
from test_phi3_methods import held_out_loss
from test_phi3_resume import losses
from torch import nn
from transformers import AutoModelForCausalLM

import lora

WAYS = {"nf4": bnb.nn.Linear4bit, "fp4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}
IDS = torch.arange(3, 23).view(2, 10)


@pytest.fixture
def flags(argv, tmp_path):  # noqa: F811
    """Flags for a toy whose layers all have 64 inputs."""
    tiny.save(tmp_path / "model")
    tiny.model(heads=8).save_pretrained(tmp_path / "model")
    return [*argv, "--model", str(tmp_path / "model")]


def loaded(flags):
    """The model of these flags as it is before it is adapted."""
    training, _, run = (
        phi3_chat.settings.chosen(phi3_chat.parse(flags), part) for part in phi3_chat.DICTIONARIES.values()
    )
    return phi3_chat.load_model(run, training)[0]


def peft(**changed):
    return phi3_chat.peft_config | changed


@pytest.mark.sampled(2)
@pytest.mark.parametrize("precision", [[], ["--bf16"]])
@pytest.mark.parametrize("way", WAYS)
def test_the_adapter_of_a_quantised_run_loads_onto_the_plain_model(flags, tmp_path, capsys, way, precision):
    assert phi3_chat.main([*flags, *precision, "--quantize", way]) == 0
    assert f"8 linear layers in {way}: " in capsys.readouterr().out
    first, *_, last = (record["eval_loss"] for record in metrics(tmp_path / "out") if "eval_loss" in record)
    assert last < first
    plain = held_out_loss([*flags, *precision], tmp_path / "out" / "adapter.safetensors")
    assert plain == pytest.approx(last, rel=0.03)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_quantises_all_linear_layers_but_the_output(flags, way, dtype, capsys):
    model = loaded(flags)
    model.to(dtype)
    weights = {name: module.weight for name, module in model.named_modules() if type(module) is nn.Linear}
    quantizing.quantize(model, way, peft(modules_to_save=["layers.1.mlp", "lm_head"]))
    kept = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert kept == {"lm_head", "model.layers.1.mlp.gate_up_proj", "model.layers.1.mlp.down_proj"}
    bits, bound = {"nf4": (4, 0.16), "fp4": (4, 0.18), "int8": (8, 0.02)}[way]
    for name in weights.keys() - kept:
        layer = model.get_submodule(name)
        assert type(layer) is WAYS[way]
        assert not layer.training
        assert layer.weight.dtype == (torch.int8 if way == "int8" else torch.uint8)
        assert layer.weight.nbytes == weights[name].numel() * bits // 8
        difference = lora.layers.weights.read_weight(layer).float() - weights[name].float()
        assert 0 < difference.abs().max() < bound * weights[name].abs().max()
    before = sum(weights[name].nbytes for name in weights.keys() - kept)
    assert f"6 linear layers in {way}: {before / 1e6:.1f} MB of weights before" in capsys.readouterr().out


def test_leaves_out_what_bitsandbytes_gets_wrong(capsys):
    model = tiny.model()  # its attention has 48 inputs
    quantizing.quantize(model, "nf4", peft())
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
    assert (kinds["qkv_proj"], kinds["gate_up_proj"], kinds["down_proj"]) == (nn.Linear, nn.Linear, WAYS["nf4"])
    assert (
        "not quantized, since their inputs are no multiple of 64: model.layers.0.self_attn" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="no linear layer's number of inputs is a multiple of 64"):
        quantizing.quantize(tiny.model(), "fp4", peft(modules_to_save=["down_proj"]))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("way", WAYS)
def test_the_merged_folder_is_dense_and_says_the_same(flags, tmp_path, way):
    for targets in (["qkv_proj"], phi3_chat.peft_config["target_modules"]):  # quantised layers without an adapter, too
        assert (
            phi3_chat.main(
                [*flags, "--quantize", way, "--export", "merged", "--lora-dropout", "0", "--target-modules", *targets]
            )
            == 0
        )
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
        model = loaded(flags)
        quantizing.quantize(model, way, peft())
        lora.load_adapter(model, tmp_path / "out" / "adapter.safetensors")
        for layer in model.modules():
            layer.lora_dropout = 0.0
        with torch.no_grad():  # in training mode, since int8 layers quantise their inputs in eval()
            torch.testing.assert_close(merged(IDS).logits, model.train()(IDS).logits, rtol=1e-4, atol=1e-4)
        shutil.rmtree(tmp_path / "out")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("way", WAYS)
def test_resumes_to_the_same_losses_and_not_with_other_weights(flags, tmp_path, capsys, way):
    ours = [*flags, "--save-steps", "2", "--quantize", way]
    assert phi3_chat.main([*ours, "--output-dir", str(tmp_path / "straight")]) == 0
    assert phi3_chat.main(ours) == 0
    for path in (tmp_path / "out").glob("checkpoint-[!2]"):
        shutil.rmtree(path)
    assert phi3_chat.main([*flags, "--save-steps", "2", "--resume"]) == 2
    assert f"quantize: '{way}' there, None now" in capsys.readouterr().err
    assert phi3_chat.main([*ours, "--resume"]) == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "straight")


def test_without_bitsandbytes(flags, monkeypatch):
    model = loaded(flags)
    honest = importlib.import_module

    def missing(name):
        if name == "bitsandbytes":
            raise ImportError("there is none")
        return honest(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"nf4 needs bitsandbytes \(pip install bitsandbytes\): there is none"):
        quantizing.quantize(model, "nf4", peft())


def test_what_does_not_go_together(flags, capsys):
    assert phi3_chat.main([*flags, "--quantize", "nf4", "--fused-mlp"]) == 2
    assert "leave out either it or --quantize" in capsys.readouterr().err
    assert phi3_chat.main([*flags, "--quantize", "int3"]) == 2
    assert "--quantize (quantize) is 'int3'; it must be one of nf4, fp4, int8" in capsys.readouterr().err


@pytest.mark.slow
def test_loftq_starts_nearer_to_the_plain_model(flags, tmp_path, capsys):
    starts = {}
    for way in ("true", "loftq"):
        assert phi3_chat.main([*flags, "--quantize", "nf4", "--init-lora-weights", way, "--overwrite"]) == 0
        starts[way], *_ = (record["eval_loss"] for record in metrics(tmp_path / "out") if "eval_loss" in record)
    assert phi3_chat.main([*flags, "--overwrite"]) == 0
    plain, *_ = (record["eval_loss"] for record in metrics(tmp_path / "out") if "eval_loss" in record)
    assert abs(starts["loftq"] - plain) < abs(starts["true"] - plain)
    assert phi3_chat.main([*flags, "--init-lora-weights", "loftq", "--overwrite"]) == 2
    assert "--init-lora-weights loftq makes up for what --quantize loses" in capsys.readouterr().err
