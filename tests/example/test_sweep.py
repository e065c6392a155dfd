"""examples/sweep.py: each setting becomes what a run of its own makes of it; the best is saved; its errors."""

import json
import math
import re

import pytest
import sweep
import torch
from phi3 import chat_data, chats, loop, pretrained, settings, tiny
from test_phi3_cli import toy  # noqa: F401

import lora

STEPS = 5


@pytest.fixture
def argv(toy, tmp_path) -> list[str]:  # noqa: F811
    paths = {"model": toy / "model", "data": toy / "chats.jsonl", "output-dir": tmp_path / "out", "cache-dir": tmp_path}
    numbers = {"max-steps": STEPS, "max-seq-length": 64, "eval-conversations": 3, "per-device-train-batch-size": 2}
    flags = {**paths, **numbers, "device": "cpu"}
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))]


def words(flags: str) -> list[str]:
    return flags.split()


def records(folder) -> dict[tuple[int, float], dict]:
    lines = (folder / sweep.RECORDS).read_text().splitlines()
    return {(record["rank"], record["rate"]): record for record in map(json.loads, lines)}


def alone(argv, rank, rate):
    """What one setting becomes by phi3_chat's loop, in a model with one adapter."""
    flags = sweep.parse(argv)
    training, peft, run = (settings.chosen(flags, defaults) for defaults in sweep.DICTIONARIES.values())
    more = training | {"learning_rate": rate, "gradient_accumulation_steps": 1}
    model, tokenizer = tiny.model(), tiny.tokenizer()
    conversations = chat_data.read(run["data"], "train", None)
    data = chats.prepare(conversations, tokenizer, run | {"sample_replies": 0}, more, model.device)
    torch.manual_seed(training["seed"])
    lora.inject(model, r=rank, lora_alpha=2.0 * rank, splits=pretrained.fused_splits(model.config), **peft)
    torch.manual_seed(training["seed"])
    optimizer = loop.make_optimizer(model.train(), more)
    steps = []
    for step in range(STEPS):
        lr = loop.learning_rate_at(step, STEPS, more)
        steps.append(loop.train_step(model, optimizer, data.order.step(step), lr, training["max_grad_norm"]))
    return steps, loop.held_out_loss(model, data.held_out), lora.adapter_of(model), data.held_out


def test_each_setting_becomes_what_it_becomes_alone_and_the_best_is_saved(argv, tmp_path, capsys):
    argv = [*argv, *words("--rates 1e-3 0.02 --ranks 1 4 --lora-dropout 0.1 --max-grad-norm 0.2")]
    assert sweep.main(argv) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["adapter.safetensors", "sweep.jsonl", "sweep.png"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    found = records(out)
    assert [*found] == [(1, 1e-3), (1, 0.02), (4, 1e-3), (4, 0.02)]
    by_held_out = {}
    for (rank, rate), record in found.items():
        steps, held_out, adapter, rows = alone(argv, rank, rate)
        assert record["losses"] == pytest.approx([step.loss for step in steps], rel=1e-5)
        assert record["grad_norms"] == pytest.approx([step.grad_norm for step in steps], rel=1e-4)
        assert record["held_out"] == pytest.approx(held_out, rel=1e-5)
        by_held_out[held_out] = adapter
    best = by_held_out[min(by_held_out)]
    saved = lora.read_adapter(out / "adapter.safetensors")
    assert saved.tensors.keys() == best.tensors.keys()
    model = tiny.model()
    lora.load_adapter(model, saved)
    assert loop.held_out_loss(model, rows) == pytest.approx(min(by_held_out), rel=1e-5)
    assert capsys.readouterr().out.count("best\n") == 1


def test_a_setting_that_overflows_leaves_the_others_alone(argv, tmp_path):
    assert sweep.main([*argv, *words("--rates 1e-3 1e30 --ranks 4")]) == 0
    both = records(tmp_path / "out")
    assert both[4, 1e30]["held_out"] is None
    assert None in both[4, 1e30]["losses"]
    assert sweep.main([*argv, *words("--rates 1e-3 --ranks 4 --overwrite")]) == 0
    assert both[4, 1e-3]["losses"] == pytest.approx(records(tmp_path / "out")[4, 1e-3]["losses"], rel=1e-5)


def test_when_all_overflow_it_says_so(argv, tmp_path, capsys):
    assert sweep.main([*argv, *words("--rates 1e30 --ranks 4")]) == 1
    assert "no setting's loss is finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter.safetensors").exists()


def test_one_by_one_is_measured_and_computes_the_same(argv, tmp_path, capsys):
    assert sweep.main([*argv, *words("--ranks 1 2 --rates 1e-2 --one-by-one 2 --lora-dropout 0.2 --max-steps 2")]) == 0
    *_, head, at_once, one_by_one, differ = capsys.readouterr().out.splitlines()
    assert head.split() == ["all", "settings", "seconds", "a", "step", "ratio"]
    seconds, ratio = map(float, at_once.removeprefix("at once").split())
    assert ratio == 1
    assert math.isfinite(float(one_by_one.split()[-1]))
    assert seconds > 0
    steps, difference = re.fullmatch(r"Losses of the first (\d+) steps differ by (\S+) of .*", differ).groups()
    assert (steps, float(difference) < 1e-5) == ("2", True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--target-modules qvk_proj", "qvk_proj"),
        ("--max-grad-norm -1", "--max-grad-norm (max_grad_norm) is -1.0"),
        ("--model ./nowhere", "there is no model folder './nowhere'"),
        ("--eval-conversations 24", "leaves none to train on"),
    ],
)
def test_mistakes_get_one_message_and_no_traceback(argv, tmp_path, capsys, flags, message):
    assert sweep.main([*argv, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error
    assert not (tmp_path / "out").exists()


def test_numbers_that_make_no_sense_and_an_earlier_sweep(argv, tmp_path, capsys):
    for flags in (["--rates", "-1"], ["--ranks", "0"], ["--one-by-one", "0"]):
        with pytest.raises(SystemExit):
            sweep.main([*argv, *flags])
    assert "argument --rates: invalid float above 0 value: '-1'" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / sweep.RECORDS).write_text("mine")
    assert sweep.main(argv) == 2
    assert "holds a sweep already" in capsys.readouterr().err
    assert (tmp_path / "out" / sweep.RECORDS).read_text() == "mine"
