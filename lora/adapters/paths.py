"""Paths that users name, the system's errors about them in words, and files that are read though others write them.

The class of a system's error stays what it is, and so does `errno`. Its text says which path is meant, as the user
wrote it, what must hold, and what was found.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lora.errors import AdapterError, visible

T = TypeVar("T")
_WAITS = (0.0, 0.001, 0.005, 0.02, 0.1)  # seconds before a file that changed is read again
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def as_path(given: object, name: str = "path", otherwise: str = "") -> Path:
    """The path that an argument is.

    Args:
        given: what the user gave.
        name: of the argument, for errors.
        otherwise: what else the argument may be, for errors.

    Raises:
        TypeError: it is neither a string nor an os.PathLike of one.
        ValueError: it is empty, has a NUL character, or characters that no name on this system can have.

    >>> as_path("adapter.safetensors").name
    'adapter.safetensors'
    """
    text = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(text, str):
        decoded = f"; os.fsdecode(`{name}`) makes one" if isinstance(text, bytes) else ""
        raise TypeError(f"`{name}` must be a str or an os.PathLike{otherwise}, got {type(text).__name__}{decoded}.")
    if not text:
        raise ValueError(f"`{name}` must name a file or a folder, got ''.")
    try:
        fits = "\0" not in text and bool(os.fsencode(text))
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise ValueError(f"`{name}` must have no NUL and no surrogate characters, got {text!a}.")
    return Path(text)


def kind(path: Path, to_write: bool = False) -> str | None:
    """What there is: "file", "folder", "FIFO", "socket", "device", or None if there is nothing; links are followed."""
    with writing(path) if to_write else reading(path):
        try:
            return _KINDS.get(stat.S_IFMT(path.stat().st_mode), "thing of an unknown kind")
        except (FileNotFoundError, NotADirectoryError):
            return None


def open_file(path: Path) -> io.BufferedReader:
    """Open a file to read. What is no file is not opened: a FIFO would keep the reader waiting for ever."""
    with reading(path):
        what = kind(path)
        if what == "folder":
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if what not in ("file", None):
            raise OSError(f"{path} is not read: it is a {what}, and must be a file.")
        return open(path, "rb")


def read_steadily(path: Path, read: Callable[[io.BufferedReader], T]) -> T:
    """What `read` makes of an open file; a file that changes meanwhile is read again, a few times.

    Raises:
        AdapterError: the file has changed each time; or what `read` raises of a file that has not changed.
    """
    changed = ""
    for wait in _WAITS:
        time.sleep(wait)
        with reading(path), open_file(path) as file:
            before = _state(file)
            try:
                made = read(file)
            except AdapterError as error:
                if _state(file) == before and is_at(path, file):
                    raise AdapterError(f"{error}{changed}") from None
            else:
                if _state(file) == before:
                    return made
        changed = f"\n{path} has changed while it was read."
    raise AdapterError(changed.strip())


def _state(file: io.BufferedReader) -> tuple[int, int]:
    said = os.fstat(file.fileno())
    return said.st_size, said.st_mtime_ns


def is_at(path: Path, file: io.BufferedReader) -> bool:
    """Whether an open file is still the one at its path."""
    if sys.platform == "win32":  # where nothing takes the place of an open file, and the two may be numbered otherwise
        return True
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError:
        return False


def check_place(path: Path, wanted: str = "file") -> None:
    """OSError if no file, or no folder, can be written: something else is there, or no folder around it.

    What a rename replaces may be a device: as root, `/dev/null` would become a file.
    """
    with writing(path):
        what = kind(path, to_write=True)
        if what == "folder" and wanted != "folder":
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if what not in (wanted, None):
            raise FileExistsError(f"{path} is not written: it is a {what}, and must be a {wanted} or nothing.")
        os.stat(os.path.join(os.path.dirname(os.path.realpath(path)), "."))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Let errors of the system's that are raised in reading `path` be sentences about it."""
    with _in_words(path, "read"):
        yield


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let errors of the system's that are raised in writing `path`, or what is to take its place, be about `path`."""
    with _in_words(path, "written"):
        yield


@contextmanager
def _in_words(path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # it is a sentence already
            raise
        told = type(error)(visible(_sentence(path, error, done)))
        told.errno = error.errno
        raise told from None


def _sentence(path: Path, error: OSError, done: str) -> str:
    if error.errno == errno.ENOENT:
        return _nothing(path) if done == "read" else _nowhere(path)
    if error.errno == errno.EISDIR:
        reason = "it is a folder, and must be a file"
    elif error.errno == errno.ENOTDIR:
        parent = next((str(parent) for parent in reversed(path.parents) if not os.path.isdir(parent)), "its parent")
        reason = f"{parent} is a file, and must be a folder"
    elif error.errno in (errno.EACCES, errno.EPERM):
        reason = "there is no permission to " + ("read it" if done == "read" else "write in its folder")
    elif error.errno == errno.ELOOP:
        reason = "its links lead in a circle"
    elif error.errno == errno.ENAMETOOLONG:
        longest = max(len(os.fsencode(part)) for part in path.parts)
        reason = f"it is too long, at {len(os.fsencode(path))} bytes, or one of its parts is, at {longest}"
    else:
        said = str(error.strerror)
        reason = f"{said[:1].lower()}{said[1:]}"
    return f"{path} is not {done}: {reason}."


def _nothing(path: Path) -> str:
    """That there is nothing to read, and where the way to it ends."""
    missing = next((parent for parent in reversed(path.parents) if not os.path.lexists(parent)), None)
    if path.is_symlink():
        why = f": it is a link to {os.readlink(path)}, which is not there"
    else:
        why = f": there is no folder {missing}" if missing else ""
    return f"there is no file {path}{why}.{_tilde(path)}"


def _nowhere(path: Path) -> str:
    """That there is no folder to write to."""
    if path.is_symlink():
        folder = os.path.dirname(os.path.realpath(path))
        return f"there is no folder {folder} to write to, where the link {path} leads."
    return f"there is no folder {path.parent} to write {path.name} to.{_tilde(path)}"


def _tilde(path: Path) -> str:
    return " Python does not expand `~`; os.path.expanduser does." if str(path).startswith("~") else ""
