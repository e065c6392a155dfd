"""The command line itself: help, exit codes, errors, interrupts, output that is never replaced unasked."""

import io
import os
import subprocess
import sys

import pytest
from cli_model import run, trained

import lora
from lora.__main__ import main
from lora.cli import inspect
from lora.cli.progress import progress

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
    assert error.startswith("error: `lora_alpha` is for loralib's files")


def test_interrupted(path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "examine", interrupt)
    assert run(capsys, "inspect", path) == (130, "", "error: interrupted\n")


def test_a_reader_that_leaves_early(path):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        command = [sys.executable, "-m", "lora", "inspect", str(path)]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b""
    assert done.returncode == 141


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
