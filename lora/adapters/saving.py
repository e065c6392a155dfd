"""Files that are replaced whole: whatever fails, and whenever, the old file is there or the new one.

What is new is written beside the old, under a hidden name of its own, and takes its place by a rename. The writer holds
a lock on it meanwhile. A file without a lock is left of a writer that was killed, and the next writer removes it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from torch import Tensor

from lora.adapters.files import packed
from lora.adapters.paths import check_place, writing

if sys.platform != "win32":
    import fcntl

_AT_WORK = 3600.0  # seconds: an older file is taken for left behind, where the system has no locks
_PATIENCE = 60.0  # seconds that another writer of a folder is waited for
_BETWEEN = 0.01


def replace_file(path: Path, content: bytes) -> None:
    """Write a file: the old content or the new one is there, whenever this is killed.

    A link stays one, and a file that is replaced gives its permissions and its owner to the new one.
    """
    replace_files({path: content})


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], function: str = "write_adapter"
) -> None:
    """Write a safetensors file with a checksum: the old file or the new one is there, whenever this is killed.

    Raises:
        OSError: there is no folder to write it to, or it cannot be written.
        AdapterError: `read_tensors` could not read such a file; nothing is written.
    """
    replace_file(path, packed(path, tensors, metadata, function))


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write several files: an error or an interruption leaves all old or all new.

    All are written first, and then renamed in turn; only a kill between two renames leaves the first new and the
    others old.
    """
    for path in contents:
        check_place(path)
    with ExitStack() as beside:
        _exchange([beside.enter_context(_written(path, content)) for path, content in contents.items()])


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let other writers of a folder that enter this wait, as far as the system has locks.

    One that holds it for a minute (it may be stopped) is waited for no longer.
    """
    with _locked(folder, _PATIENCE):
        yield


# ---- one file that is to take the place of another -------------------------------------------------------------------


class _New(NamedTuple):
    """A new file, and the one that it is to replace: its path, the file that this leads to, and a second name of it."""

    path: Path
    file: Path
    real: Path
    old: Path


@contextmanager
def _written(path: Path, content: bytes) -> Iterator[_New]:
    """A file with the new content, beside the old one; if it has not taken its place at the end, it is removed."""
    real = Path(os.path.realpath(path))  # a link stays one
    beside = old = hidden(real)
    with writing(path):
        remove_left_over(real)
        before = _permissions(real)
        mode = 0o666 if before is None else before.st_mode & 0o777  # not even for a moment may more people read it
        try:
            while True:
                beside = hidden(real)  # another writer may be about to remove the one before, by its name
                with open(beside, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                    locked = _lock(file.fileno())
                    if locked is not False and beside.exists():
                        if before is not None:
                            _pass_on(before, file)
                        _write(file, content)
                        if locked is None:  # Windows renames no open file
                            file.close()
                        yield _New(path, beside, real, old)
                        return
                beside.unlink(missing_ok=True)  # another writer has removed it: it seemed to be left behind
        finally:
            beside.unlink(missing_ok=True)
            old.unlink(missing_ok=True)


def _exchange(new: list[_New]) -> None:
    """Let new files take the places of the old ones; after an error or an interruption all old ones are there."""
    for each in new[:-1]:
        with suppress(OSError):  # not every system has second names; readers of a folder can do without
            os.link(each.real, each.old)
    there = [each.real.exists() for each in new]
    try:
        for each in new:
            with writing(each.path):
                os.replace(each.file, each.real)
    except BaseException:
        _put_back(new, there)
        raise


def _put_back(new: list[_New], there: list[bool]) -> None:
    if not any(each.file.exists() for each in new):  # the interruption came after the last
        return
    for each, was_there in zip(new, there, strict=True):
        if each.old.exists():
            os.replace(each.old, each.real)
        elif not was_there and not each.file.exists():
            each.real.unlink(missing_ok=True)


def _permissions(real: Path) -> os.stat_result | None:
    try:
        return real.stat()
    except FileNotFoundError:
        return None


def _pass_on(before: os.stat_result, file: BinaryIO) -> None:
    """Give a new file the owner and the permissions of the one whose place it is to take."""
    if sys.platform != "win32":
        with suppress(OSError):  # only root gives files away
            os.fchown(file.fileno(), before.st_uid, before.st_gid)
        with suppress(OSError):  # not every file system has permissions
            os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


# ---- hidden names, and what killed writers have left -----------------------------------------------------------------


def hidden(real: Path, end: str = "tmp") -> Path:
    """A name of its own, beside a file or a folder, for what is to take its place, or has stood there."""
    return real.with_name(f".{real.name[:24]}.{secrets.token_hex(8)}.{end}")  # never longer than names may be


def _hidden_beside(real: Path, ends: str) -> list[tuple[Path, str]]:
    """What has such a name, and how that ends."""
    ours = re.compile(rf"\.{re.escape(real.name[:24])}\.[0-9a-f]{{16}}\.({ends})")
    try:
        names = os.listdir(real.parent)
    except OSError:
        return []
    return [(real.parent / name, found[1]) for name in names if (found := ours.fullmatch(name))]


def remove_left_over(real: Path) -> None:
    """Remove what writers of a file have left beside it when they were killed, and nothing of one that is at work."""
    for left, _ in _hidden_beside(real, "tmp"):
        with suppress(OSError):
            _remove_if_left(left)


def _remove_if_left(path: Path) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        return
    with open(path, "rb") as file:
        locked, age = _lock(file.fileno()), time.time() - os.fstat(file.fileno()).st_mtime
        if locked:  # removed while it is: a writer that has just made it finds it gone
            path.unlink(missing_ok=True)
    if locked is None and age > _AT_WORK:
        path.unlink(missing_ok=True)


def clear_left_folders(real: Path) -> None:
    """Remove folders that writers of a folder have left beside it when they were killed, and nothing of one at work.

    A writer that was killed as it exchanged the two has left what was there before as the only one: it is put back.
    """
    for left, end in _hidden_beside(real, "tmp|old"):
        with suppress(OSError):
            if stat.S_ISDIR(left.lstat().st_mode) and _is_left(left):
                if end == "old" and not os.path.lexists(real):
                    os.replace(left, real)
                else:
                    shutil.rmtree(left)


def _is_left(folder: Path) -> bool:
    with _locked(folder) as locked:
        return locked is True or (locked is None and time.time() - folder.stat().st_mtime > _AT_WORK)


# ---- locks -----------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path, patience: float = 0.0) -> Iterator[bool | None]:
    """A context with a folder's lock, as `_lock` says; while another writer has it, wait so many seconds for it."""
    handles, locked = list[int](), None
    try:
        with suppress(OSError):  # Windows opens no folders
            handles.append(os.open(folder, os.O_RDONLY))
        if handles:
            ends = time.monotonic() + patience
            while (locked := _lock(handles[0])) is False and time.monotonic() < ends:
                time.sleep(_BETWEEN)
        yield locked
    finally:
        try:
            _unlock(handles)
        except BaseException:  # an interruption that came before it was done
            _unlock(handles)
            raise


def _lock(handle: int) -> bool | None:
    """Whether an open file or folder is locked for us now; None where there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _unlock(handles: list[int]) -> None:
    """Close what was locked; a process that was forked meanwhile, and has it open, too, does not keep the lock."""
    if handles and sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(handles[0], fcntl.LOCK_UN)
    if handles:
        os.close(handles.pop())
