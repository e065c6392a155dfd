"""A command that is told to end leaves nothing behind; one that is killed leaves what the next one removes."""

import os
import signal
import subprocess
import sys

import pytest
from interruptions import is_interrupted_in_thread
from torch import nn

import lora
from lora.__main__ import _Terminated, _termination, main
from lora.adapters import saving
from lora.adapters.saving import alone_in, clear_left_folders
from lora.cli.folder import whole_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and locks of POSIX")

# A merge that never ends. Signals do what they do by default, also where the tests run in the background.
SCRIPT = """
import argparse, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
import lora.__main__ as door
from lora.cli.folder import whole_folder

def run(arguments):
    with whole_folder(pathlib.Path(sys.argv[1])) as folder:
        (folder / "model.safetensors").write_bytes(b"new")
        print("ready", flush=True)
        time.sleep(60)

class Parser:
    def parse_args(self, arguments):
        return argparse.Namespace(run=run)

door.parser = Parser
sys.exit(door.main([]))
"""


def started(out):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"old")
    return tmp_path / "out"


SIGNALS = [("SIGTERM", 143), pytest.param("SIGHUP", 129, marks=pytest.mark.slow)]
SIGNALS += [pytest.param("SIGINT", 130, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "code"), SIGNALS)
def test_what_is_told_to_end_leaves_nothing(name, code, out):
    process = started(out)
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (code, f"error: {'interrupted' if name == 'SIGINT' else 'terminated'}\n")
    assert os.listdir(out.parent) == ["out"]
    assert (out / "model.safetensors").read_bytes() == b"old"


@pytest.mark.slow
def test_what_a_killed_one_has_left_goes_with_the_next_and_what_is_at_work_stays(out):
    killed = started(out)
    killed.kill()
    killed.communicate(timeout=60)
    assert len(os.listdir(out.parent)) == 2
    working = out.parent / f".out.{'2' * 16}.tmp"
    working.mkdir()
    (out.parent / f".out.{'0' * 16}.tmp.x").mkdir()  # these are not ours
    (out.parent / ".other.0123456789abcdef.tmp").mkdir()
    with alone_in(working), whole_folder(out) as folder:
        (folder / "model.safetensors").write_bytes(b"newer")
    assert (out / "model.safetensors").read_bytes() == b"newer"
    others = {f".out.{'0' * 16}.tmp.x", ".other.0123456789abcdef.tmp"}
    assert {*os.listdir(out.parent)} == {"out", working.name, *others}


def test_what_was_there_before_is_put_back_if_the_exchange_was_killed(out):
    old, new = (out.with_name(f".out.{'1' * 16}.{end}") for end in ("old", "tmp"))
    out.rename(old)
    new.mkdir()
    with alone_in(old):
        clear_left_folders(out)
        assert old.exists()
    clear_left_folders(out)
    assert os.listdir(out.parent) == ["out"]
    assert (out / "model.safetensors").read_bytes() == b"old"


def test_ctrl_c_at_any_line_leaves_the_old_folder_or_the_new_one(out, monkeypatch):
    monkeypatch.setattr(saving, "_PATIENCE", 0)  # who is interrupted as it gives a lock back, has it until it ends

    def write():
        with whole_folder(out) as folder:
            (folder / "model.safetensors").write_bytes(b"new")

    n, found = 0, set()
    while is_interrupted_in_thread(write, n):
        found.add((out / "model.safetensors").read_bytes())
        (out / "model.safetensors").write_bytes(b"old")
        n += 1
    assert n > 50
    assert found == {b"old", b"new"}


def test_what_is_there_is_not_replaced_by_what_was_there_before(out):
    old = out.with_name(f".out.{'1' * 16}.old")
    old.mkdir()
    clear_left_folders(out)
    assert os.listdir(out.parent) == ["out"]


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(_Terminated), _termination():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize(
    "closed", ["2>&1 | head -c 0; exit ${PIPESTATUS[0]}", pytest.param("2>/dev/full", marks=pytest.mark.slow)]
)
def test_an_error_that_nobody_reads_is_an_exit_code(closed, tmp_path):
    said = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m lora inspect nothing {closed}"], capture_output=True, cwd=tmp_path
    )
    assert (said.returncode, said.stdout, said.stderr) == (2, b"", b"")


@pytest.mark.parametrize("given", ["1" + "0" * 20, "1" + "0" * 5000, "1" + "0" * 12, "-1"])
@pytest.mark.parametrize("command", ["resize", "combine"])
def test_any_number_is_refused_in_few_words(command, given, tmp_path, capsys):
    path = tmp_path / "a"
    lora.save_adapter(nn.Sequential(lora.Linear(8, 4, r=2, bias=False)), path)
    paths = [str(path), str(tmp_path / "b")]
    paths = paths if command == "resize" else [*paths[::-1], "--method", "svd"]
    try:
        code = main([command, *paths, "--r", given])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2
    assert "error: " in said
    assert len(said) < 2000
    assert os.listdir(tmp_path) == ["a"]
