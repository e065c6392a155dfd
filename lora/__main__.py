"""The command line: `python -m lora`, or `lora`.

Exit codes: 0; 1 if `diff` finds a difference or `inspect` something wrong; 2 for mistakes; 130 if interrupted, 143 if
terminated.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from lora import __version__
from lora.cli import convert, in_options, inspect, merging
from lora.errors import clipped, visible

_COMMANDS = (inspect, convert, merging)
_LONGEST = 300  # characters of an error of torch's or Python's
_LONGEST_MESSAGE = 40_000


def parser() -> argparse.ArgumentParser:
    """The parser, which knows all commands."""
    made = _Parser(
        prog="lora",
        description="Look at LoRA adapters; convert, combine, compare and merge them.",
        epilog="example:\n  python -m lora inspect adapter.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"lora {__version__}")
    commands = made.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return made


class _Parser(argparse.ArgumentParser):
    """Its errors escape what cannot be seen, as all messages here do: a shell may have put names of files in."""

    def error(self, message: str) -> NoReturn:
        super().error(clipped(visible(message)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; the exit code.

    Args:
        arguments: Default: those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of modules and files may have characters that a terminal lacks
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:  # a file that is opened later would get its number
        return _refuse("stdout is closed, and must be open for what is printed: `>/dev/null` drops it.")
    try:
        try:
            chosen = parser().parse_args(arguments)
        except SystemExit:
            sys.stdout.flush()  # of the help
            raise
        with _termination():
            code: int = chosen.run(chosen)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has seen enough
        _drop(sys.stdout)
        return 141
    except KeyboardInterrupt:
        return _refuse("interrupted", 130)
    except _Terminated as error:
        return _refuse("terminated", 128 + error.signal)
    except OSError as error:
        if error.strerror is None:  # a sentence of lora's own
            return _refuse(in_options(str(error)))
        if error.filename is not None:
            return _refuse(_line(error))
        _drop(sys.stdout)
        return _refuse(f"what is printed is not written to stdout: {error.strerror}.")
    except ValueError as error:
        return _refuse(in_options(str(error)))
    except (OverflowError, MemoryError, RuntimeError) as error:  # torch's allocator raises the last
        return _refuse(_line(error))


class _Terminated(BaseException):
    """A signal has told the process to end."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@contextmanager
def _termination() -> Iterator[None]:
    """Let signals that end a process end the work as Ctrl-C does: what is half written is removed."""

    def end(number: int, frame: object) -> None:
        for each in before:  # one is enough, and what it has begun is to be finished
            signal.signal(each, signal.SIG_IGN)
        raise _Terminated(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
        before = {n: signal.getsignal(n) for n in numbers if n and signal.getsignal(n) is signal.SIG_DFL}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse(message: str, code: int = 2) -> int:
    """Say on stderr what is wrong; the exit code."""
    if sys.stderr is not None:  # print would take None for stdout
        said = clipped(visible(message, keep="\n"), _LONGEST_MESSAGE)
        try:
            print(f"error: {said}", file=sys.stderr, flush=True)
        except OSError:  # nobody reads it; the exit code says what there is to say
            _drop(sys.stderr)
    return code


def _drop(stream: TextIO) -> None:
    """Let what is left to print go nowhere, or Python would complain as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _line(error: Exception) -> str:
    """An error that is not of lora's own wording, in one line: its kind, and how its message begins."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:_LONGEST]}" if said else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
