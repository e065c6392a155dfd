"""The command line itself: help, exit codes, errors, interrupts, output that is never replaced unasked."""

import io
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from cli_model import base_folder, run, trained

import lora
from lora.__main__ import main
from lora.cli import inspect, progress

COMMANDS = ("inspect", "convert", "merge", "diff", "combine", "resize")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "an adapter.safetensors"
    trained(path)
    return path


def python(*arguments, **options):
    command = [sys.executable, "-m", "lora", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, **options)


def test_as_a_process(path, tmp_path):
    done = python("inspect", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "layers.1.attn.q_proj" in done.stdout
    done = python("inspect", tmp_path / "missing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "missing" in done.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"lora {lora.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    example = said.split("example:\n  python -m lora ")[1].strip()
    assert example.startswith(command)
    assert main(example.split()) == 2  # no such file: the arguments were understood
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["inspct"], ["resize", "a", "b"], ["resize", "a", "b", "--r", "1", "--energy", "0.5"]]
)
def test_mistakes_of_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_command_that_is_not_known_is_told_which_are(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "config.json"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "invalid choice: 'plan'" in said
    assert set(re.findall(r"\w+", said.split("choose from")[1])) == set(COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "{in}", "{out}", "--format", "lora"],
        ["combine", "{out}", "{in}", "{in}=0.5"],
        ["resize", "{in}", "{out}", "--r", "1"],
        ["inspect", "{in}", "--plot", "{out}"],
    ],
)
def test_output_is_not_replaced_unasked(path, tmp_path, capsys, arguments):
    out = tmp_path / "out.png"
    out.write_bytes(b"mine")
    filled = [text.format(**{"in": path, "out": out}) for text in arguments]
    code, said, error = run(capsys, *filled)
    assert (code, said) == (2, "")
    assert "--overwrite" in error
    assert out.read_bytes() == b"mine"


def test_output_is_replaced_when_asked(path, tmp_path, capsys):
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    assert run(capsys, "resize", path, out, "--r", 1, "--overwrite")[0] == 0
    assert {about["r"] for about in lora.read_adapter(out).modules.values()} == {1}


def test_the_input_is_never_the_output(path, capsys):
    before = path.read_bytes()
    for command in (
        ["resize", path, path, "--r", 1],
        ["combine", path, path],
        ["merge", path.parent, path, path.parent],
    ):
        code, _, error = run(capsys, *command, "--overwrite")
        assert code == 2
        assert "input" in error or "model.safetensors" in error
    assert path.read_bytes() == before


def test_there_must_be_a_folder_to_write_to(path, tmp_path, capsys):
    code, _, error = run(capsys, "convert", path, tmp_path / "none" / "out", "--format", "lora")
    assert code == 2
    assert "there is no folder" in error


def test_lora_alpha_where_it_does_not_belong(path, capsys):
    code, _, error = run(capsys, "inspect", path, "--lora-alpha", 3)
    assert code == 2
    assert error.startswith("error: `lora_alpha` is for files that do not say it")


@pytest.fixture
def flat(tmp_path):
    """A file of loralib's."""
    torch.save({"it.lora_A": torch.ones(2, 4), "it.lora_B": torch.ones(3, 2)}, tmp_path / "flat.pt")
    return tmp_path / "flat.pt"


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "{in}", "{out}", "--format", "peft"],
        ["combine", "{out}", "{in}", "{in}=0.5"],
        ["resize", "{in}", "{out}", "--r", "1"],
        ["merge", "{base}", "{in}", "{out}"],
        ["diff", "{in}", "{in}"],
    ],
)
def test_files_of_loralib_are_to_be_loaded_in_python(flat, tmp_path, capsys, command):
    base = base_folder(tmp_path / "base", {"it.weight": torch.ones(3, 4)})
    filled = [text.format(**{"in": flat, "out": tmp_path / "out", "base": base}) for text in command]
    code, said, error = run(capsys, *filled)
    assert (code, said) == (2, "")
    assert "flat.pt is a file of loralib's" in error
    assert "lora.load_adapter(model, path, lora_alpha=X)" in error
    assert "lora.save_adapter" in error
    assert "--lora-alpha" not in error
    assert not (tmp_path / "out").exists()
    if command[0] == "convert":  # which has the option for files of which only the scaling is unknown
        assert run(capsys, *filled, "--lora-alpha", 2)[0] == 2
        return
    with pytest.raises(SystemExit) as ended:  # where it cannot help, there is no such option
        main([*filled, "--lora-alpha", "2"])
    assert ended.value.code == 2


def test_a_damaged_file_of_loralib(flat, tmp_path, capsys):
    torch.save({"it.lora_A": torch.ones(2, 4)}, flat)
    code, _, error = run(capsys, "resize", flat, tmp_path / "out", "--r", 1)
    assert code == 2
    assert "it.lora_B is missing" in error
    assert "lora_alpha" not in error


def test_inspect_a_file_of_loralib(flat, capsys):
    code, _, error = run(capsys, "inspect", flat)
    assert code == 2
    assert "give `--lora-alpha`, as it was in training" in error
    code, said, error = run(capsys, "inspect", flat, "--lora-alpha", 3)
    assert (code, error) == (0, "")
    row = next(line for line in said.splitlines() if line.startswith("it "))
    assert row.split() == ["it", "loralib", "?", "2", "1.5", "?", "?", "?", "14", "float32"]


@pytest.mark.slow
def test_a_name_that_stdout_cannot_print(tmp_path):
    lora.save_adapter(torch.nn.ModuleDict({"größe": lora.Linear(4, 3, r=2)}), tmp_path / "adapter")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = python("inspect", tmp_path / "adapter", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "gr\\xf6\\xdfe" in done.stdout
    done = python("inspect", tmp_path / "größe", env=environment)
    assert done.returncode == 2
    assert "gr\\xf6\\xdfe" in done.stderr
    assert (
        "größe"
        in json.loads(python("inspect", tmp_path / "adapter", "--json", env=environment).stdout)["modules"][0]["name"]
    )


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OverflowError("int too large to convert to float"), "OverflowError: int too large to convert to float"),
        (
            RuntimeError("[enforce fail] not enough memory:\n you tried to allocate 8 bytes"),
            "RuntimeError: [enforce fail] not enough memory: you tried to allocate 8 bytes",
        ),
        (RuntimeError("x" * 10_000), "RuntimeError: " + "x" * 300),
        (MemoryError(), "MemoryError"),
    ],
)
def test_errors_that_are_not_loras_own(path, capsys, monkeypatch, raised, said):
    def fail(*_):
        raise raised

    monkeypatch.setattr(inspect, "examine", fail)
    assert run(capsys, "inspect", path) == (2, "", f"error: {said}\n")


def test_interrupted(path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "examine", interrupt)
    assert run(capsys, "inspect", path) == (130, "", "error: interrupted\n")


@pytest.mark.slow
def test_a_reader_that_leaves_early(path):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        command = [sys.executable, "-m", "lora", "inspect", str(path)]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b""
    assert done.returncode == 141


def shell(arguments, **environment):
    """The command in a shell's words."""
    command = f"{shlex.quote(sys.executable)} -m lora {arguments}"
    environment = {**os.environ, **environment}
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("command", "unbuffered"), [("inspect {}", ""), ("inspect {}", "1"), ("--help", "")])
def test_a_stdout_that_is_full(path, command, unbuffered):
    done = shell(f"{command.format(shlex.quote(str(path)))} >/dev/full", PYTHONUNBUFFERED=unbuffered)
    said = "error: what is printed is not written to stdout: No space left on device.\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.slow
def test_a_stdout_or_a_stderr_that_is_closed(path, tmp_path):
    out = tmp_path / "out"
    command = f"convert {{}} {out} --format lora"
    done = shell(f"{command.format(shlex.quote(str(path)))} >&-")
    said = "error: stdout is closed, and must be open for what is printed: `>/dev/null` drops it.\n"
    assert (done.returncode, done.stderr) == (2, said)
    assert not out.exists()
    done = shell(f"{command.format('nothing')} 2>&-")
    assert (done.returncode, done.stdout) == (2, "")
    done = shell(f"{command.format(shlex.quote(str(path)))} 2>&-")
    assert (done.returncode, done.stdout.startswith(f"{out}: ")) == (0, True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_terminals(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress([1, 2], "counting")) == [1, 2]
    assert sys.stderr.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress([1, 2, 3], "counting")) == [1, 2, 3]
    said = sys.stderr.getvalue()
    assert "counting" in said
    assert "2/3" in said
    assert said.endswith(" \r")
