"""examples/phi3_chat.py --resume: the same losses as without the stop, and nothing lost by a mistake."""

import shutil
from pathlib import Path

import phi3_chat
import pytest
import torch
from phi3 import checkpoints, tiny
from safetensors.torch import load_file
from test_phi3_cli import argv, files, metrics, toy  # noqa: F401


@pytest.fixture
def flags(argv) -> list[str]:  # noqa: F811
    """Six steps over more than one epoch, with dropout, and an odd number of batches to a step."""
    longer = "--max-steps 6 --save-steps 3 --eval-steps 3 --lora-dropout 0.3 --gradient-accumulation-steps 3"
    return [*argv, *longer.split()]


def losses(folder: Path) -> list[tuple]:
    """Everything in the metrics but the time it took."""
    return [tuple(v for key, v in record.items() if key != "tokens_per_second") for record in metrics(folder)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("more", [[], ["--modules-to-save", "lm_head", "--gradient-checkpointing"], ["--bf16"]])
def test_three_steps_and_three_resumed_are_six(flags, tmp_path, more):
    flags = [*flags, *more]
    out, straight = tmp_path / "out", tmp_path / "straight"
    assert phi3_chat.main([*flags, "--output-dir", str(straight)]) == 0
    assert phi3_chat.main(flags) == 0
    shutil.rmtree(out / "checkpoint-6")  # as if the run had been killed after step 3 …
    (out / "adapter.safetensors").unlink()
    torch.manual_seed(99)  # … and another one begun
    assert phi3_chat.main([*flags, "--resume"]) == 0
    assert losses(out) == losses(straight)
    assert len(losses(out)) == 6 + 3
    final = [load_file(folder / "adapter.safetensors") for folder in (out, straight)]
    torch.testing.assert_close(final[0], final[1], rtol=0, atol=0)


def test_a_stop_in_the_middle_goes_on_from_the_last_checkpoint(flags, tmp_path, monkeypatch, capsys):
    straight = tmp_path / "straight"
    assert phi3_chat.main([*flags, "--output-dir", str(straight)]) == 0
    honest = phi3_chat.loop.train_step
    with monkeypatch.context() as patch:
        steps = iter(range(5))
        patch.setattr(phi3_chat.loop, "train_step", lambda *a: honest(*a) if next(steps) < 4 else interrupt())
        assert phi3_chat.main(flags) == 130
    assert "--resume" in capsys.readouterr().err
    assert phi3_chat.main([*flags, "--resume", "latest"]) == 0
    assert losses(tmp_path / "out") == losses(straight)


def interrupt():
    raise KeyboardInterrupt


def test_a_finished_run_can_be_made_longer(flags, tmp_path):
    assert phi3_chat.main(flags) == 0
    assert phi3_chat.main([*flags, "--resume", "--max-steps", "8"]) == 0
    assert [record["step"] for record in metrics(tmp_path / "out") if "loss" in record] == list(range(1, 9))
    assert phi3_chat.main([*flags, "--resume", "--max-steps", "8"]) == 0  # nothing left to do


@pytest.mark.slow
def test_into_another_directory(flags, tmp_path):
    assert phi3_chat.main(flags) == 0
    before = files(tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    start = str(tmp_path / "out" / "checkpoint-3")
    assert phi3_chat.main([*flags, "--resume", start, "--output-dir", str(elsewhere)]) == 0
    assert losses(elsewhere) == losses(tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_later_checkpoints_are_not_dropped_unasked(flags, tmp_path, capsys):
    assert phi3_chat.main(flags) == 0
    before, start = files(tmp_path / "out"), str(tmp_path / "out" / "checkpoint-3")
    assert phi3_chat.main([*flags, "--resume", start]) == 2
    assert "also holds checkpoint-6, later than checkpoint-3" in capsys.readouterr().err
    assert files(tmp_path / "out") == before
    expected = losses(tmp_path / "out")
    assert phi3_chat.main([*flags, "--resume", start, "--overwrite"]) == 0
    assert losses(tmp_path / "out") == expected


@pytest.fixture
def finished(flags, tmp_path) -> Path:
    assert phi3_chat.main(flags) == 0
    return tmp_path / "out"


def refused(flags, finished, capsys) -> str:
    """The message of a resume that is refused; nothing may have changed."""
    before = files(finished)
    assert phi3_chat.main([*flags, "--resume"]) == 2
    assert files(finished) == before
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_another_models_adapter(flags, finished, tmp_path, capsys):
    other = tiny.save(tmp_path / "other", seed=1)
    assert "model weights: " in refused([*flags, "--model", str(other)], finished, capsys)


@pytest.mark.slow
def test_an_adapter_that_was_swapped(flags, finished, tmp_path, capsys):
    """The state fits the model, the adapter beside it does not: lora's strict loading notices."""
    other, elsewhere = tiny.save(tmp_path / "other", seed=1), tmp_path / "elsewhere"
    assert phi3_chat.main([*flags, "--model", str(other), "--output-dir", str(elsewhere)]) == 0
    shutil.copy(elsewhere / "checkpoint-6" / "adapter.safetensors", finished / "checkpoint-6")
    assert "the adapter does not fit this model" in refused(flags, finished, capsys)


def test_other_data_and_settings(flags, finished, capsys):
    error = refused([*flags, "--r", "2", "--seed", "1", "--train-conversations", "10"], finished, capsys)
    assert "r: 4 there, 2 now" in error
    assert "seed: 0 there, 1 now" in error
    assert "training data: " in error


@pytest.mark.parametrize("name", ["trainer_state.pt", "adapter.safetensors"])
def test_a_damaged_checkpoint(flags, finished, capsys, name):
    path = finished / "checkpoint-6" / name
    path.write_bytes(path.read_bytes()[:100])
    assert "--resume: " in refused(flags, finished, capsys)


def test_the_oldest_checkpoints_go(flags, tmp_path):
    assert phi3_chat.main([*flags, "--save-steps", "1", "--save-total-limit", "2"]) == 0
    assert list(checkpoints.steps_in(tmp_path / "out")) == [5, 6]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_kill_while_saving_leaves_the_older_checkpoint(flags, tmp_path, monkeypatch):
    assert phi3_chat.main([*flags, "--max-steps", "3"]) == 0
    monkeypatch.setattr(torch, "save", lambda *_: interrupt())
    assert phi3_chat.main([*flags, "--resume"]) == 130
    monkeypatch.undo()
    assert list(checkpoints.steps_in(tmp_path / "out")) == [3]
    assert phi3_chat.main([*flags, "--resume"]) == 0
    assert list(checkpoints.steps_in(tmp_path / "out")) == [3, 6]
