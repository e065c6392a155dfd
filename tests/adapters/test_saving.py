"""Saving: whatever fails, and whenever, the old adapter is read or the new one, whole; and what is beside it goes."""

import builtins
import errno
import os
import shutil
import stat
import subprocess
import sys
import time

import pytest
import torch
from interruptions import HOUSE, ends_of, is_interrupted_in_thread, lines_of
from saves import FORMATS, WRITING, adapter, held, held_for_peft, hidden

import lora
from lora.adapters import files, saving
from lora.formats import torch_files

FOLDERS = [format for format in FORMATS if format != "lora"]


class Place:
    """A path in a format, with the old adapter or nothing, and a new one to be saved there."""

    def __init__(self, folder, format):
        self.folder, self.format, self.path = folder, format, folder / "a"
        self.known = {}
        for name, one in (("old", adapter(1)), ("new", adapter(2))):
            lora.write_adapter(one, folder / name, format)
            self.known[name] = lora.read_adapter(folder / name)

    def again(self, before="old"):
        """What is there is what was there before."""
        if self.path.is_dir():
            shutil.rmtree(self.path)
        self.path.unlink(missing_ok=True)
        if before == "old" and self.format == "lora":
            shutil.copy(self.folder / "old", self.path)
        elif before == "old":
            shutil.copytree(self.folder / "old", self.path)

    def save(self, name="new"):
        lora.write_adapter(self.known[name], self.path, self.format)

    def holds(self):
        """What is read, by everybody: "old", "new" or "nothing"."""
        found = held(self.path, self.known)
        assert self.format == "lora" or held_for_peft(self.path, self.known) == found
        return found

    def left(self):
        return hidden(self.folder) + (hidden(self.path) if self.path.is_dir() else [])


@pytest.fixture(params=["lora", "peft", pytest.param("portable", marks=pytest.mark.slow)])
def place(request, tmp_path):
    return Place(tmp_path, request.param)


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


# A file that was interrupted between its opening and the block that closes it is closed when it is collected.
UNCLOSED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


# Of all lines, the first and the last time that each is met; of those that write, every time.
LINES = {
    "some lines that write": (WRITING, 4),
    "some lines": pytest.param(HOUSE, 8, marks=pytest.mark.slow),
    "every line that writes": pytest.param(WRITING, 1, marks=pytest.mark.exhaustive),
    "every line": pytest.param(HOUSE, 1, marks=pytest.mark.exhaustive),
}


@UNCLOSED
@pytest.mark.parametrize(("where", "step"), LINES.values(), ids=LINES)
@pytest.mark.parametrize("before", ["old", "nothing"])
def test_an_interruption_leaves_the_old_adapter_or_the_new_one(place, before, where, step):
    place.again(before)
    seen = lines_of(place.save, where)
    found = set()
    for n in (ends_of(seen) if where == HOUSE else range(len(seen)))[::step]:
        place.again(before)
        is_interrupted_in_thread(place.save, n, where)
        found.add(place.holds())
        assert place.path.exists() or before == "nothing"
        assert not place.path.is_dir() or os.listdir(place.path)
    place.again(before)
    place.save()
    assert place.holds() == "new"
    assert len(seen) > 40
    assert found == {before, "new"}
    place.save()
    assert place.left() == []


# ---- errors of the system's ----------------------------------------------------------------------------------------


class Failing:
    """Every call to the system that a save makes, the n-th of which fails."""

    def __init__(self, monkeypatch, n, times=1):
        self.calls, self.n, self.times = [], n, times
        for name in ("fsync", "link", "mkdir", "replace", "unlink", "fchmod"):
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))
        monkeypatch.setattr(saving.fcntl, "flock", self.wrap("flock", saving.fcntl.flock))
        monkeypatch.setattr(builtins, "open", self.open(builtins.open))

    def wrap(self, name, call):
        def wrapped(*args, **kwargs):
            self.count(name)
            return call(*args, **kwargs)

        return wrapped

    def count(self, name):
        self.calls.append(name)
        if self.n <= len(self.calls) < self.n + self.times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open(self, call):
        def wrapped(path, mode="r", **kwargs):
            if not {*mode} & {*"xwa"}:
                return call(path, mode, **kwargs)
            self.count("open")
            file = call(path, mode, **kwargs)
            return Watched(file, self)

        return wrapped


class Watched:
    def __init__(self, file, failing):
        self.file, self.failing = file, failing
        self.fileno, self.close = file.fileno, file.close

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.failing.count("write")
        self.file.write(content[len(content) // 2 :])

    def flush(self):
        self.failing.count("flush")
        self.file.flush()


@pytest.mark.parametrize("times", [1, 100], ids=["once", "from then on"])
@pytest.mark.parametrize("before", ["old", pytest.param("nothing", marks=pytest.mark.slow)])
def test_a_call_to_the_system_that_fails_leaves_the_old_adapter_or_the_new_one(place, monkeypatch, before, times):
    n, seen = 0, set()
    while True:
        n += 1
        place.again(before)
        with monkeypatch.context() as patch:
            failing = Failing(patch, n, times)
            try:
                place.save()
                raised = None
            except OSError as error:
                raised = error
        seen |= {*failing.calls}
        if raised is None:
            assert place.holds() == "new"
        elif times == 1:  # what failed once can be undone
            assert place.holds() in (before, "new")
        else:
            assert held(place.path, place.known) in (before, "new")
        assert raised is None or raised.errno == errno.ENOSPC
        if n > len(failing.calls):
            break
        place.save()
        assert place.left() == []
    assert {"open", "write", "flush", "fsync", "replace"} <= seen


# ---- kill -9 -------------------------------------------------------------------------------------------------------

# A process that forks writers, each of which is gone at a line of its own, without a word, or is killed at a moment of
# its own; or two that are not, while it reads.
START = """
import contextlib, itertools, os, pathlib, random, shutil, signal, sys, time
import torch, lora
torch.set_num_threads(1)
from interruptions import Lines
from saves import WRITING, held, hidden
from test_saving import Place
folder, format, how, step, writers, reads = pathlib.Path(sys.argv[1]), *sys.argv[2:]
place = Place(folder, format)
"""
KILLER = """
found = {}
random.seed(0)

def at_line_n(n):
    with Lines(n, lambda: os._exit(9), WRITING):
        place.save()
    os._exit(0)

def at_rename_n(n):
    real, calls = os.replace, []
    def rename(*paths):
        calls.append(paths)
        real(*paths) if len(calls) < n else os._exit(9)
    os.replace = rename
    place.save()
    os._exit(0)

def endless(n):
    for k in range(10**9):
        place.save(("old", "new")[k % 2])

for before, how in itertools.product(("old", "nothing"), how.split("+")):
    n, status = 1, 9
    while status == 9:
        place.again(before)
        child = os.fork()
        if child == 0:
            {"lines": at_line_n, "renames": at_rename_n, "moments": endless}[how](n)
        if how == "moments":
            time.sleep(random.uniform(0.005, 0.05))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        status = 9 * (n < int(step)) if how == "moments" else status
        what = held(place.path, place.known)
        assert what in (before, "old", "new"), what
        found[before, what] = found.get((before, what), 0) + 1
        place.save("old")
        assert held(place.path, place.known) == "old" and not place.left(), place.left()
        n += int(step) if how == "lines" else 1
print(sum(found.values()), sorted(found))
"""


def run(script, *arguments):
    roots = [os.path.dirname(__file__), os.path.join(os.path.dirname(__file__), "..", "helpers")]
    roots += [os.path.join(os.path.dirname(__file__), ".."), os.path.dirname(HOUSE)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("how", "step"),
    [
        pytest.param("lines", 8, marks=pytest.mark.slow),
        pytest.param("lines", 1, marks=pytest.mark.exhaustive),
        pytest.param("moments", 10, marks=pytest.mark.slow),
        pytest.param("moments", 100, marks=pytest.mark.exhaustive),
    ],
)
def test_a_writer_that_is_killed_at_any_moment_leaves_the_old_adapter_or_the_new_one(tmp_path, format, how, step):
    run(START + KILLER, tmp_path, format, how, step, 0, 0)


# ---- at the same time ----------------------------------------------------------------------------------------------

WRITERS = """
found, children, reads = {"old": 0, "new": 0}, [], int(reads)
place.again()
for writer in range(int(writers)):
    children.append(os.fork())
    if children[-1] == 0:
        for n in range(10**9):
            place.save(("old", "new")[(n + writer) % 2])
try:
    for _ in range(reads):
        found[held(place.path, place.known)] += 1
    for child in children:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "a writer has failed"
finally:
    for child in children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has failed, and is gone
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
assert held(place.path, place.known) in found
place.save("old")
assert not place.left() and held(place.path, place.known) == "old"
assert found["old"] + found["new"] == reads and min(found.values()) > 0, found
print("whole")
"""


@pytest.mark.slow
def test_a_folder_is_whole_when_its_writer_is_killed_and_while_two_write(tmp_path):
    said = run(START + KILLER + WRITERS, tmp_path, "peft", "renames+lines", 23, 2, 40)
    assert "('nothing', 'new'), ('nothing', 'nothing'), ('old', 'new'), ('old', 'old')" in said
    assert said.endswith("whole")


@pytest.mark.parametrize(
    ("writers", "reads"),
    [
        pytest.param(2, 60, marks=pytest.mark.slow),
        *(pytest.param(writers, 600, marks=pytest.mark.exhaustive) for writers in (1, 2, 4)),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_many_readers_find_whole_adapters_while_others_write(tmp_path, format, writers, reads):
    assert run(START + WRITERS, tmp_path, format, "", 0, writers, reads) == "whole"


# ---- what killed writers have left ---------------------------------------------------------------------------------

LEFT = ".a.0123456789abcdef.tmp"


@pytest.mark.parametrize("format", FORMATS)
def test_what_killed_writers_have_left_goes_with_the_next_save(tmp_path, format):
    place = Place(tmp_path, format)
    place.again()
    left = [tmp_path / LEFT]
    if format != "lora":
        names = ("adapter_model.safetensor", "adapter_config.json")
        left = [place.path / f".{name}.0123456789abcdef.tmp" for name in names]
    others = [left[0].with_name(name) for name in (".a.0123.tmp", "a.tmp", ".b.0123456789abcdef.tmp", "README.md")]
    for file in left + others:
        file.write_bytes(b"half")
    (left[0].with_name(".a.0000456789abcdef.tmp")).mkdir()
    place.save()
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in others)
    assert place.holds() == "new"


def test_what_a_writer_at_work_has_beside_stays(tmp_path, monkeypatch):
    seen, real = [], os.fsync

    def another_writes(handle):
        monkeypatch.setattr(os, "fsync", real)
        seen.append(hidden(tmp_path))
        saving.replace_file(tmp_path / "a", b"other")
        assert hidden(tmp_path) == seen[0]
        real(handle)

    monkeypatch.setattr(os, "fsync", another_writes)
    saving.replace_file(tmp_path / "a", b"mine")
    assert (tmp_path / "a").read_bytes() == b"mine"
    assert len(seen[0]) == 1
    assert hidden(tmp_path) == []


def test_where_the_system_has_no_locks_age_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_lock", lambda handle: None)
    old, young = tmp_path / LEFT, tmp_path / LEFT.replace("0", "1")
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 3601,) * 2)
    saving.replace_file(tmp_path / "a", b"mine")
    assert hidden(tmp_path) == [young.name]
    (tmp_path / "folder").mkdir()
    place = Place(tmp_path / "folder", "peft")
    place.again()
    place.save()
    assert place.holds() == "new"


def test_a_writer_whose_new_file_is_taken_for_one_that_was_left_makes_another(tmp_path, monkeypatch):
    real, taken = saving._lock, []

    def lock(handle):
        if not taken:
            taken.extend(hidden(tmp_path))
            (tmp_path / taken[0]).unlink()
        return real(handle)

    monkeypatch.setattr(saving, "_lock", lock)
    saving.replace_file(tmp_path / "a", b"mine")
    assert (tmp_path / "a").read_bytes() == b"mine"
    assert len(taken) == 1


def test_a_folder_whose_writer_is_stopped_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_PATIENCE", 0.05)
    with saving.alone_in(tmp_path), saving.alone_in(tmp_path):
        pass
    monkeypatch.setattr(saving, "_PATIENCE", 60)
    started = time.monotonic()
    with saving.alone_in(tmp_path):
        pass
    assert time.monotonic() - started < 10


# ---- permissions and links -----------------------------------------------------------------------------------------


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o444, 0o777])
def test_a_file_that_is_replaced_keeps_its_permissions(place, permissions, monkeypatch):
    place.again()
    replaced = [place.path] if place.format == "lora" else [*place.path.iterdir()]
    for file in replaced:
        file.chmod(permissions)
    real, seen = os.open, []

    def noting(path, flags, mode=None):
        seen.extend([] if mode is None else [mode])  # with which a file is made: not even then may more people read it
        return real(path, flags) if mode is None else real(path, flags, mode)

    monkeypatch.setattr(os, "open", noting)
    place.save()
    assert place.holds() == "new"
    assert {mode(file) for file in replaced} == {*seen} == {permissions}


def test_a_new_file_has_the_permissions_that_the_process_gives(place):
    before = os.umask(0o027)
    try:
        place.again("nothing")
        place.save()
    finally:
        os.umask(before)
    assert {mode(file) for file in ([place.path] if place.format == "lora" else place.path.iterdir())} == {0o640}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_file_that_root_replaces_keeps_its_owner(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    os.chown(tmp_path / "a", 65534, 65534)
    saving.replace_file(tmp_path / "a", b"new")
    assert (os.stat(tmp_path / "a").st_uid, os.stat(tmp_path / "a").st_gid) == (65534, 65534)


@pytest.mark.parametrize("format", FOLDERS)
def test_links_in_a_folder_stay_links(tmp_path, format):
    place = Place(tmp_path, format)
    place.again()
    (tmp_path / "elsewhere").mkdir()
    for file in [*place.path.iterdir()]:
        file.rename(tmp_path / "elsewhere" / file.name)
        file.symlink_to(tmp_path / "elsewhere" / file.name)
    place.save()
    assert place.holds() == "new"
    assert all(file.is_symlink() for file in place.path.iterdir())
    assert len([*(tmp_path / "elsewhere").iterdir()]) == 2


# ---- files that change while they are read -------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("how", ["replaced", "written in place"])
def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch, format, how):
    place = Place(tmp_path, format)
    place.again()
    file = place.path if format == "lora" else place.path / "adapter_model.safetensors"
    new = tmp_path / "new" if format == "lora" else tmp_path / "new" / file.name
    real, opened = files._header, []

    def then_change(handle, path, limit):
        opened.append(path)
        if how == "replaced" and len(opened) == 1:
            place.save()
        elif how != "replaced" and len(opened) < 3:
            file.write_bytes(new.read_bytes()[: -5 if len(opened) == 1 else None])
        return real(handle, path, limit)

    monkeypatch.setattr(files, "_header", then_change)
    if how != "replaced" and format != "lora":
        shutil.copy(tmp_path / "new" / "adapter_config.json", place.path)
    assert held(place.path, place.known) == "new"
    assert len(opened) > 1


def test_a_file_of_torchs_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(3)}, tmp_path / "new")
    (tmp_path / "a").write_bytes((tmp_path / "new").read_bytes()[:-30])
    real, times = torch_files._check_directory, []

    def then_change(file, size):
        times.append(size)
        if len(times) == 1:
            (tmp_path / "a").write_bytes((tmp_path / "new").read_bytes())
        real(file, size)

    monkeypatch.setattr(torch_files, "_check_directory", then_change)
    assert torch.equal(torch_files.read_torch(tmp_path / "a")["a"], torch.ones(3))
    assert len(times) == 2


def test_a_file_that_changes_each_time_is_not_read(tmp_path, monkeypatch):
    saving.write_tensors(tmp_path / "a", {}, {})
    real, times = files._header, []

    def then_change(handle, path, limit):
        times.append(path)
        os.utime(path, ns=(len(times), len(times)))
        return real(handle, path, limit)

    monkeypatch.setattr(files, "_header", then_change)
    with pytest.raises(lora.AdapterError) as caught:
        files.read_header(tmp_path / "a")
    assert str(caught.value) == f"{tmp_path / 'a'} has changed while it was read."
    assert 1 < len(times) < 20
