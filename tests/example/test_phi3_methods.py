"""The methods as flags of examples/phi3_chat.py: each trains, resumes, and saves what a plain base can load."""

import random
import shutil

import phi3_chat
import pytest
import torch
from phi3 import chat_data, chats, loop, packing, settings, tiny
from safetensors.torch import load_file
from test_phi3_cli import argv, metrics, toy  # noqa: F401
from test_phi3_loop import CONFIG, data
from test_phi3_resume import losses

import lora

METHODS = {
    "rsLoRA": "--use-rslora",
    "DoRA": "--use-dora",
    "LoRA+": "--lr-ratio 8 --weight-decay 0.1 --bias lora_only --modules-to-save lm_head",
    "LoRA-FA": "--freeze-A",
    "gaussian": "--init-lora-weights gaussian",
    "orthogonal": "--init-lora-weights orthogonal",
    "PiSSA": "--init-lora-weights pissa",
    "PiSSA, randomised": "--init-lora-weights pissa_niter_4",
    "OLoRA": "--init-lora-weights olora --learning-rate 1e-4",
    "EVA": "--init-lora-weights eva",
    "LoRA-GA": "--init-lora-weights lora_ga --r 2 --learning-rate 1e-4",
    "CorDA": "--init-lora-weights corda --learning-rate 1e-4",
    "all": "--use-rslora --use-dora --lr-ratio 4 --init-lora-weights pissa --freeze-A --learning-rate 1e-4",
}


@pytest.fixture
def flags(argv) -> list[str]:  # noqa: F811
    return [*argv, "--save-steps", "2", "--lora-dropout", "0.1"]


def held_out_loss(flags, adapter) -> float:
    """That of the model of these flags, which nobody has trained, with an adapter that was saved."""
    training, _, run = (settings.chosen(phi3_chat.parse(flags), part) for part in phi3_chat.DICTIONARIES.values())
    random.seed(training["seed"])
    conversations = chat_data.read(run["data"], run["data_split"], phi3_chat.cache_of(run))
    model, tokenizer = phi3_chat.load_model(run, training)
    held_out = chats.prepare(conversations, tokenizer, run, training, model.device).held_out
    lora.load_adapter(model, adapter)
    return loop.held_out_loss(model, held_out)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_learns_what_a_plain_base_can_load(flags, tmp_path, method):
    flags = [*flags, *method.split()]
    assert phi3_chat.main(flags) == 0
    first, *_, last = (record["eval_loss"] for record in metrics(tmp_path / "out") if "eval_loss" in record)
    assert last < first
    path = tmp_path / "out" / "adapter.safetensors"
    assert held_out_loss(flags, path) == pytest.approx(last, rel=1e-5)
    modules = lora.read_adapter(path).modules.values()
    assert {m["use_rslora"] for m in modules} == {"--use-rslora" in flags}
    assert {m["use_dora"] for m in modules} == {"--use-dora" in flags}
    # What was learnt from a part of the base weight is a difference, of twice the rank.
    r = settings.chosen(phi3_chat.parse(flags), phi3_chat.peft_config)["r"]
    written = {"pissa", "pissa_niter_4", "olora", "lora_ga", "corda"} & {*flags}
    assert {m["r"] for m in modules} == {2 * r if written else r}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_two_steps_and_two_resumed_are_four(flags, tmp_path, method):
    flags, out, straight = [*flags, *method.split()], tmp_path / "out", tmp_path / "straight"
    assert phi3_chat.main([*flags, "--output-dir", str(straight)]) == 0
    assert phi3_chat.main(flags) == 0
    shutil.rmtree(out / "checkpoint-4")
    (out / "adapter.safetensors").unlink()
    assert phi3_chat.main([*flags, "--resume"]) == 0
    assert losses(out) == losses(straight)
    final = [load_file(folder / "adapter.safetensors") for folder in (out, straight)]
    torch.testing.assert_close(final[0], final[1], rtol=0, atol=0)


@pytest.mark.parametrize("way", [True, "gaussian", "orthogonal", "pissa_niter_4"])
def test_layers_start_as_they_are_told_to(way):
    model = tiny.model()
    phi3_chat.inject(model, phi3_chat.peft_config | {"init_lora_weights": way, "r": 4})
    assert {m.init_lora_weights for m in model.modules() if isinstance(m, lora.LoRALayer)} == {way}


def test_how_the_adapter_starts_from_data_is_said(flags, capsys):
    assert phi3_chat.main([*flags, "--init-lora-weights", "eva"]) == 0
    assert "explained" in capsys.readouterr().out


def test_a_ratio_reaches_the_optimizer(flags, tmp_path):
    assert phi3_chat.main([*flags, "--lr-ratio", "8", "--lr-scheduler-type", "constant", "--warmup-ratio", "0"]) == 0
    state = torch.load(tmp_path / "out" / "checkpoint-4" / "trainer_state.pt", weights_only=True)
    rates = {group["name"]: group["lr"] for group in state["optimizer"]["param_groups"]}
    assert rates == {"lora_A": 1e-3, "lora_B": 8e-3}


def test_the_schedule_scales_every_groups_own_rate():
    model = tiny.model()
    lora.inject(model.train(), target_modules=["o_proj"], r=2, bias="all", modules_to_save=["norm"])
    optimizer = loop.make_optimizer(model, CONFIG | {"lr_ratio": 16.0, "weight_decay": 0.1})
    for lr in (0.25, 0.5):
        step = loop.train_step(model, optimizer, list(packing.batches(data(), 4, pad_id=2)), lr, 1.0)
        assert step.learning_rate == lr
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == {"lora_A": lr, "lora_B": 16 * lr, "norms": lr}
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups}["norms"] == 0


def test_without_a_ratio_all_step_at_one_rate():
    model = tiny.model()
    lora.inject(model.train(), target_modules=["o_proj"], r=2)
    for config in (CONFIG, CONFIG | {"lr_ratio": None}):
        optimizer = loop.make_optimizer(model, config)
        loop.train_step(model, optimizer, list(packing.batches(data(), 4, pad_id=2)), 0.25, 1.0)
        assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_with_a_frozen_A_only_B_moves(flags, tmp_path):
    assert phi3_chat.main([*flags, "--freeze-A"]) == 0
    out = tmp_path / "out"
    early, late = (load_file(out / f"checkpoint-{step}" / "adapter.safetensors") for step in (2, 4))
    assert any("lora_B" in name for name in early)
    for name, tensor in early.items():
        assert torch.equal(tensor, late[name]) == ("lora_A" in name)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("pissa", "pissa")])
def test_how_the_adapter_starts_is_a_bool_or_a_name(text, value):
    flags = phi3_chat.parse(["--init-lora-weights", text, "--lr-ratio", "16"])
    training, peft, _ = (settings.chosen(flags, defaults) for defaults in phi3_chat.DICTIONARIES.values())
    assert peft["init_lora_weights"] is value or peft["init_lora_weights"] == value
    assert training["lr_ratio"] == 16.0


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("--init-lora-weights pisa", "did you mean 'pissa'?"),
        ("--init-lora-weights orthogonal --r 3", "`r` must be even"),
        ("--lr-ratio 0", "--lr-ratio (lr_ratio) is 0.0; it must be a number above 0"),
        ("--use-dora --fused-mlp", "--fused-mlp knows no magnitudes"),
    ],
)
def test_mistakes(flags, tmp_path, capsys, method, message):
    assert phi3_chat.main([*flags, *method.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
