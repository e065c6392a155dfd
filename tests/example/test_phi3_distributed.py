"""examples/phi3_distributed.py: what two processes do together is what phi3_chat.py does alone."""

import contextlib
import io
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import phi3_chat
import phi3_distributed
import pytest
import torch
import torch.distributed as dist
from phi3 import packing
from phi3.chat_data import IGNORED
from ranks import Ranks
from safetensors.torch import load_file
from test_phi3_cli import argv, files, metrics, toy  # noqa: F401
from test_phi3_packing import stretch

import lora

SCRIPT = Path(phi3_distributed.__file__)


@pytest.fixture
def flags(argv) -> list[str]:  # noqa: F811
    """Four steps of three rows: two for the first process, one for the second, which gets an empty one with it."""
    return [*argv, *["--per-device-train-batch-size", "3", "--lora-dropout", "0", "--sample-replies", "0"]]


@pytest.fixture(scope="module")
def alone():
    """Runs phi3_chat.py with flags, each once; the folder of the run."""
    done = {}

    def run_alone(flags: list[str], more: str, folder: Path) -> Path:
        if more not in done:
            assert phi3_chat.main([*flags, *more.split(), "--output-dir", str(folder)]) == 0
            done[more] = folder
        return done[more]

    return run_alone


# ---- in every rank ---------------------------------------------------------------------------------------------


def run(flags: list[str], seed: int = 0) -> tuple[int, str, str]:
    """The exit code, and what is printed."""
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        code = phi3_distributed.run(flags)
    return code, out.getvalue(), error.getvalue()


def run_where_one_lacks_the_data(flags: list[str]) -> tuple[int, str, str]:
    return run([*flags, "--data", "./nowhere.jsonl"] if dist.get_rank() else flags)


def run_where_one_diverges(flags: list[str]) -> tuple[int, str, str]:
    honest, calls = phi3_chat.loop.loss_sum, []

    def not_a_number_at_step_4(model, batch):
        calls.append(model.training)
        return honest(model, batch) * (math.nan if sum(calls) == 4 and dist.get_rank() else 1.0)

    phi3_chat.loop.loss_sum = not_a_number_at_step_4
    try:
        return run(flags)
    finally:
        phi3_chat.loop.loss_sum = honest


def run_well(ranks, flags: list[str], seed: int = 0) -> None:
    (code, out, error), *others = ranks.run(run, flags, seed)
    assert code == 0, error
    assert "held-out" in out
    assert others == [(0, "", "")] * (ranks.count - 1)  # only the first one speaks


# ---- the same numbers ------------------------------------------------------------------------------------------


def numbers(folder: Path) -> list[dict]:
    """Everything in the metrics but the time it took."""
    return [{key: value for key, value in record.items() if key != "tokens_per_second"} for record in metrics(folder)]


def assert_same_course(folder: Path, other: Path, rounding: float = 1e-6) -> None:
    """Losses, gradients' norms and perplexities, to the rounding of sums in another order."""
    ours, theirs = numbers(folder), numbers(other)
    assert len(ours) == len(theirs) > 1
    for mine, its in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(its, rel=100 * rounding if "grad_norm" in its else 10 * rounding)


# Without further flags, each way is compared below: a checkpoint is for any number of processes.
WAYS = [
    ("", "--bf16 --gradient-checkpointing"),
    ("--tp 2", "--gradient-checkpointing --use-dora"),
    ("", "--modules-to-save lm_head --fused-mlp --sample-replies 1"),
    ("", "--init-lora-weights pissa"),
    ("", "--gradient-accumulation-steps 2 --target-modules qkv_proj down_proj --lr-ratio 4"),
    ("--ddp", "--quantize nf4"),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("way", "more"), WAYS)
def test_two_processes_are_one(ranks, flags, alone, tmp_path, way, more):
    expected = alone(flags, more, tmp_path / "alone")
    run_well(ranks, [*flags, *more.split(), *way.split()])
    # A product in bfloat16 is rounded by up to 0.4 %, and rows are padded otherwise when they are shared out.
    assert_same_course(tmp_path / "out", expected, 1e-4 if "bf16" in more else 1e-6)
    assert files(tmp_path / "out").keys() == files(expected).keys()
    ours, theirs = (load_file(folder / "adapter.safetensors") for folder in (tmp_path / "out", expected))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("way", ["--lora-dropout 0.3", "--lora-dropout 0.3 --ddp", "--tp 2"])
def test_a_run_goes_on_as_if_it_had_not_stopped(ranks, flags, tmp_path, way):
    flags, out, straight = [*flags, *way.split()], tmp_path / "out", tmp_path / "straight"
    run_well(ranks, flags)
    shutil.copytree(out, straight)
    shutil.rmtree(out / "checkpoint-4")  # as if it had been killed after step 2
    run_well(ranks, [*flags, "--resume"], seed=99)
    assert numbers(out) == numbers(straight)
    final = [load_file(folder / "adapter.safetensors") for folder in (out, straight)]
    torch.testing.assert_close(final[0], final[1], rtol=0, atol=0)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("way", ["", "--tp 2", "--ddp"])
def test_a_checkpoint_is_for_any_number_of_processes(ranks, flags, alone, tmp_path, way):
    there_and_back(ranks, flags, way, alone(flags, "", tmp_path / "alone"), tmp_path)


@pytest.mark.slow
def test_four_processes_by_fsdp2_and_tensor_parallelism(flags, alone, tmp_path):
    four = Ranks(4)
    try:
        there_and_back(four, flags, "--tp 2", alone(flags, "", tmp_path / "alone"), tmp_path)
    finally:
        four.stop()


def there_and_back(ranks, flags: list[str], way: str, expected: Path, folder: Path) -> None:
    """Step 3 by all ranks, from one process's checkpoint, and step 4 by one process, from theirs."""
    there, back = folder / "there", folder / "back"
    go_on = [*flags, "--resume", str(expected / "checkpoint-2"), "--output-dir", str(there)]
    run_well(ranks, [*go_on, "--save-steps", "1", *way.split()])
    assert_same_course(there, expected)
    assert phi3_chat.main([*flags, "--resume", str(there / "checkpoint-3"), "--output-dir", str(back)]) == 0
    assert_same_course(back, expected)


@pytest.mark.slow
def test_processes_have_dropout_of_their_own(ranks, flags, tmp_path):
    """With the same in both, rows that are the same would give the same gradient, as of one of them."""
    [first, second] = ranks.run(states_after, [*flags, "--lora-dropout", "0.5"])
    assert not torch.equal(first, second)
    [first, second] = ranks.run(states_after, [*flags, "--lora-dropout", "0.5", "--tp", "2", "--overwrite"])
    assert torch.equal(first, second)


def states_after(flags: list[str]) -> torch.Tensor:
    assert run(flags)[0] == 0
    return torch.get_rng_state()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shares_are_all_rows_once_and_as_many_for_each(ranks):
    for rows in range(1, 8):
        made = [[stretch(5 + row, row)] for row in range(rows)]
        shares = [packing.share(made, rank, ranks) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        labelled = [row for share in shares for row in share if any(label != IGNORED for label in row[0].labels)]
        assert sorted(map(repr, labelled)) == sorted(map(repr, made))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("way", ["", "--tp 2"])
def test_exports_of_a_sharded_model(ranks, flags, tmp_path, way):
    run_well(ranks, [*flags, *way.split(), "--export", "peft", "merged"])
    ours, theirs = (lora.read_adapter(tmp_path / "out" / name) for name in ("adapter.safetensors", "peft"))
    for name in ours.modules:
        torch.testing.assert_close(theirs.delta(name), ours.delta(name))
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


# ---- what goes wrong -------------------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--tp 3", "--tp 3 must divide the number of processes, 2"),
        ("--tp 2 --ddp", "--ddp keeps whole models, --tp divides them"),
        ("--tp 2 --fused-mlp", "--fused-mlp computes with whole layers: leave out either it or --tp"),
        ("--quantize nf4", "--quantize makes weights that cannot be sharded: give --ddp, too"),
        ("--device cuda:1", "--device is 'cuda:1'; it must be auto, cpu or cuda"),
        ("--tp 2 --init-lora-weights pissa", "it starts from its base weight"),
        ("--tp 2 --modules-to-save norm", "--tp divides none of these, which are to be trained: model.norm.weight"),
        ("--r 0", "--r (r) is 0; it must be at least 1"),
        ("--r many", "invalid int value: 'many'"),
        ("--resume", "there is no checkpoint in"),
        ("--target-modules qvk_proj", "qvk_proj"),
    ],
)
def test_mistakes_get_one_message_and_end_both(ranks, flags, tmp_path, more, message):
    (code, _, error), other = ranks.run(run, [*flags, *more.split()])
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert other == (2, "", "")
    assert not (tmp_path / "out").exists()


def test_what_one_process_lacks_ends_both(ranks, flags, tmp_path):
    (code, _, error), other = ranks.run(run_where_one_lacks_the_data, flags)
    assert (code, other) == (2, (2, "", ""))
    assert "cannot read --data 'nowhere.jsonl'" in error
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_ends_both(ranks, flags, alone, tmp_path):
    checkpoint = shutil.copytree(alone(flags, "", tmp_path / "alone") / "checkpoint-2", tmp_path / "checkpoint-2")
    path = checkpoint / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    (code, _, error), other = ranks.run(run, [*flags, "--resume", str(checkpoint)])
    assert (code, other) == (2, (2, "", ""))
    assert "--resume: cannot read the adapter" in error


def test_a_loss_that_is_not_a_number_in_one_process_stops_both(ranks, flags, tmp_path):
    (code, _, error), other = ranks.run(run_where_one_diverges, [*flags, "--max-steps", "6"])
    assert (code, other) == (1, (1, "", ""))
    assert "training diverged at step 4: the loss is nan" in error
    assert f"the last good checkpoint is {tmp_path / 'out' / 'checkpoint-2'}" in error


# ---- torchrun --------------------------------------------------------------------------------------------------


def torchrun(options: list[str], script: Path, flags: list[str]) -> subprocess.CompletedProcess:
    """Two processes on this machine, which talk by the loopback alone."""
    # Without the second, processes that are started again may be told where those listened that have died (torch 2.13).
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    for name in {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}:
        env["GLOO_SOCKET_IFNAME"] = name
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*launcher, "--nproc-per-node", "2", *options, "--", str(script), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def test_outside_torchrun_it_says_how_to_start_it(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert phi3_distributed.main() == 2
    assert "start this with torchrun" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_the_real_model_in_two_processes(toy, tmp_path):  # noqa: F811
    small = "--max-steps 2 --eval-steps 2 --eval-conversations 2 --max-seq-length 128 --per-device-train-batch-size 2"
    flags = [*small.split(), "--lora-dropout", "0", "--sample-replies", "0", "--data", str(toy / "chats.jsonl")]
    done = torchrun([], SCRIPT, [*flags, "--output-dir", str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Held-out perplexity") == 1
    assert phi3_chat.main([*flags, "--output-dir", str(tmp_path / "alone")]) == 0
    assert_same_course(tmp_path / "out", tmp_path / "alone")


DIES = """
import os, signal, sys
import phi3_distributed
from phi3 import loop

honest, calls = loop.train_step, []

def train_step(*args):
    calls.append(args)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*args)

loop.train_step = train_step
sys.exit(phi3_distributed.main())
"""


@pytest.mark.exhaustive
def test_a_killed_process_is_started_again_and_goes_on(ranks, flags, tmp_path):
    """Killed in step 4: step 3, which was done after the last checkpoint, is done again, to the same loss."""
    flags, out, straight = [*flags, "--lora-dropout", "0.3"], tmp_path / "out", tmp_path / "straight"
    run_well(ranks, [*flags, "--output-dir", str(straight)])
    script = tmp_path / "dies.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n{DIES}")
    done = torchrun(["--max-restarts", "1"], script, flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Resuming after step 2") == 1
    assert numbers(out) == numbers(straight)
    final = [load_file(folder / "adapter.safetensors") for folder in (out, straight)]
    torch.testing.assert_close(final[0], final[1], rtol=0, atol=0)
