"""examples/phi3_chat.py from its flags to its files, on a toy model and a JSONL file of a person's own."""

import json
import math
import subprocess
import sys
from pathlib import Path

import phi3_chat
import pytest
import torch
from phi3 import settings, tiny

import lora


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A model folder `model` and a data file `chats.jsonl`."""
    folder = tmp_path_factory.mktemp("toy")
    tiny.save(folder / "model")
    with open(folder / "chats.jsonl", "w") as file:
        for n in range(24):
            turns = [("user", f"What is {n} plus 1?"), ("assistant", f"It is {n + 1}."), ("user", "Thanks")]
            messages = [{"role": role, "content": text} for role, text in [*turns, ("assistant", "Any time!")]]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder


@pytest.fixture
def argv(toy, tmp_path) -> list[str]:
    paths = {"model": toy / "model", "data": toy / "chats.jsonl", "output-dir": tmp_path / "out", "cache-dir": tmp_path}
    numbers = {"max-steps": 4, "eval-steps": 2, "save-steps": 2, "max-seq-length": 128, "eval-conversations": 4}
    small = {"r": 4, "sample-replies": 1, "max-new-tokens": 4, "per-device-train-batch-size": 2, "device": "cpu"}
    return [part for key, value in {**paths, **numbers, **small}.items() for part in (f"--{key}", str(value))]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_short_run_leaves_all_its_files(argv, tmp_path, toy, capsys):
    assert phi3_chat.main(argv) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter.safetensors", "checkpoint-2", "checkpoint-4", "loss.png", "metrics.jsonl", "replies.jsonl",
    ]  # fmt: skip
    assert sorted(path.name for path in (out / "checkpoint-4").iterdir()) == ["adapter.safetensors", "trainer_state.pt"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = metrics(out)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    evaluations = [r for r in records if "eval_loss" in r]
    assert [r["step"] for r in evaluations] == [0, 2, 4]
    assert all(r["eval_perplexity"] == pytest.approx(math.exp(r["eval_loss"])) for r in evaluations)
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    [reply] = [json.loads(line) for line in (out / "replies.jsonl").read_text().splitlines()]
    assert reply.keys() == {"messages", "reference", "before", "after"}
    printed = capsys.readouterr().out
    assert "MergedLinear" in printed
    assert f"perplexity {evaluations[0]['eval_perplexity']:.2f} before" in printed

    # The adapter alone turns the pretrained model into the trained one.
    model, trained = tiny.model(), tiny.model()
    lora.load_adapter(trained, out / "adapter.safetensors")
    layer = trained.model.layers[0].self_attn.qkv_proj
    assert isinstance(layer, lora.MergedLinear)
    assert layer.lora_B.abs().max() > 0
    ids = torch.arange(7, 30)[None]
    assert not torch.equal(model(ids).logits, trained(ids).logits)


@pytest.mark.slow
def test_in_a_process_of_its_own(argv, tmp_path):
    script = Path(phi3_chat.__file__)
    done = subprocess.run(
        [sys.executable, str(script), *argv, "--bf16", "--gradient-checkpointing"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Held-out perplexity" in done.stdout
    assert "tokens/s" in done.stderr  # the progress bar


def test_every_key_is_a_flag_with_an_explanation(capsys):
    keys = [key for defaults in phi3_chat.DICTIONARIES.values() for key in defaults]
    with pytest.raises(SystemExit):
        phi3_chat.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for key in keys:
        assert f"--{key.replace('_', '-')}" in text
        assert settings.SETTINGS[key].help in text
    assert "(default: 0.001)" in text


def test_flags_change_the_dictionaries_values():
    changed = "--learning-rate 3e-4 --bf16 --max-steps -1 --target-modules all-linear --modules-to-save lm_head --r 8"
    flags = phi3_chat.parse(changed.split())
    training, peft, _ = (settings.chosen(flags, defaults) for defaults in phi3_chat.DICTIONARIES.values())
    assert training == phi3_chat.training_config | {"learning_rate": 3e-4, "bf16": True, "max_steps": -1}
    assert peft == phi3_chat.peft_config | {"r": 8, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--r 0", "--r (r) is 0; it must be at least 1"),
        ("--learning-rate -1", "--learning-rate (learning_rate) is -1.0; it must be a number above 0"),
        ("--learning-rate nan", "it must be a number above 0"),
        ("--warmup-ratio 2", "it must be from 0 to 1"),
        ("--max-steps 0", "it must be -1 or above 0"),
        ("--lr-scheduler-type step", "it must be one of cosine, linear, constant"),
        ("--lora-dropout 1", "it must be from 0 up to, not including, 1"),
        ("--bias some", "it must be one of none, all, lora_only"),
        ("--target-modules qvk_proj", "qvk_proj"),
        ("--model ./nowhere", "there is no model folder './nowhere'"),
        ("--data ./nowhere.jsonl", "cannot read --data 'nowhere.jsonl'"),
        ("--eval-conversations 24", "leaves none to train on"),
        ("--max-seq-length 8", "no reply fits into --max-seq-length"),
        ("--device warp", "--device 'warp'"),
        ("--attn-implementation guess", "cannot load the model"),
        ("--resume", "there is no checkpoint in"),
        ("--resume ./nowhere", "is not a checkpoint: it has no adapter.safetensors"),
    ],
)
def test_mistakes_get_one_message_and_no_traceback(argv, tmp_path, capsys, flags, message):
    assert phi3_chat.main([*argv, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_the_dictionaries_can_be_edited(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(phi3_chat.peft_config, "rank_pattern", {"o_proj": 2})
    monkeypatch.setitem(phi3_chat.peft_config, "use_rslora", False)
    assert phi3_chat.main([*argv, "--use-rslora"]) == 0
    model = tiny.model()
    lora.load_adapter(model, tmp_path / "out" / "adapter.safetensors")
    attention = model.model.layers[1].self_attn
    assert (attention.o_proj.r, attention.qkv_proj.r) == (2, 4)
    assert attention.qkv_proj.scaling == pytest.approx(32 / 2)  # lora_alpha / sqrt(4)


def test_a_misspelt_key_is_not_ignored(argv, capsys, monkeypatch):
    monkeypatch.setitem(phi3_chat.training_config, "weight_decy", 0.1)
    assert phi3_chat.main(argv) == 2
    assert "there is no setting 'weight_decy'; 'weight_decay'?" in capsys.readouterr().err


def test_several_bad_values_are_listed_together(argv, capsys):
    assert phi3_chat.main([*argv, "--seed", "-3", "--save-steps", "0"]) == 2
    error = capsys.readouterr().err
    assert "--seed" in error
    assert "--save-steps" in error


def test_values_of_the_wrong_kind_and_unknown_flags(argv, capsys):
    for flags in (["--r", "many"], ["--lerning-rate", "1"]):
        with pytest.raises(SystemExit) as stopped:
            phi3_chat.main([*argv, *flags])
        assert stopped.value.code == 2
    assert "invalid int value: 'many'" in capsys.readouterr().err


def test_an_earlier_run_is_not_destroyed(argv, tmp_path, capsys):
    out = tmp_path / "out"
    assert phi3_chat.main([*argv, "--max-steps", "2"]) == 0
    (out / "notes.txt").write_text("mine")
    before = files(out)
    assert phi3_chat.main(argv) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert files(out) == before
    # Not even with --overwrite, if the new run cannot start.
    assert phi3_chat.main([*argv, "--overwrite", "--data", "./nowhere.jsonl"]) == 2
    assert files(out) == before
    assert phi3_chat.main([*argv, "--overwrite", "--save-steps", "3"]) == 0
    assert [path.name for path in sorted(out.glob("checkpoint-*"))] == ["checkpoint-3", "checkpoint-4"]
    assert (out / "notes.txt").read_text() == "mine"


def test_a_loss_that_is_not_a_number_stops_the_run(argv, tmp_path, capsys, monkeypatch):
    calls = []

    def breaks_at_step_4(model, batch, honest=phi3_chat.loop.loss_sum):
        calls.append(model.training)
        return honest(model, batch) * (math.nan if sum(calls) == 4 else 1.0)

    monkeypatch.setattr(phi3_chat.loop, "loss_sum", breaks_at_step_4)
    assert phi3_chat.main([*argv, "--max-steps", "6"]) == 1
    error = capsys.readouterr().err
    assert "training diverged at step 4: the loss is nan" in error
    assert f"the last good checkpoint is {tmp_path / 'out' / 'checkpoint-2'}" in error
    kept = tmp_path / "out" / "checkpoint-2" / "adapter.safetensors"
    lora.load_adapter(tiny.model(), kept)  # which refuses NaN
    assert [record["step"] for record in metrics(tmp_path / "out") if "loss" in record] == [1, 2, 3]
    assert (tmp_path / "out" / "loss.png").exists()
