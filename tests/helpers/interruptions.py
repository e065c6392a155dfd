"""Ctrl-C, or a kill, at any line of lora/: a trace function does it there. And what a model is, to the bit."""

import sys
import threading
from collections.abc import Callable
from dis import opname
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora
from lora.layers.parts import Part
from lora.layers.undo import undo_on_error

HOUSE = str(Path(lora.__file__).parent)


def ctrl_c() -> None:
    raise KeyboardInterrupt


class Lines:
    """Within it, KeyboardInterrupt is raised as the n-th line of lora/ begins; never, for None. `seen` are all lines.

    A generator's lines, and those of context managers' exits, count as any. Of what is not lora's nothing is traced.

    Args:
        do: what is done there instead of Ctrl-C.
        where: the files whose lines count, by how their paths begin.
    """

    def __init__(
        self, at: int | None = None, do: Callable[[], object] = ctrl_c, where: str | tuple[str, ...] = HOUSE
    ) -> None:
        self.at, self.do, self.where, self.seen = at, do, where, []
        self._finaliser: Any = None

    def __enter__(self) -> "Lines":
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: Any, event: str, argument: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(self.where) or self._finaliser is not None:
            return None
        if frame.f_code.co_name != "__del__":
            return self._line
        self._finaliser = frame  # what is raised in one Python ignores
        return self._end

    def _end(self, frame: Any, event: str, argument: object) -> Callable[..., Any]:
        if event == "return":
            self._finaliser = None
        return self._end

    def _line(self, frame: Any, event: str, argument: object) -> Callable[..., Any]:
        if event == "line" and not _jumps_back(frame):
            self.seen.append((frame.f_code, frame.f_lineno))
            if len(self.seen) - 1 == self.at:
                self.do()  # what is raised ends the tracing
        return self._line


def _jumps_back(frame: Any) -> bool:
    """Whether a loop begins anew. Since Python 3.12, what a trace function raises there is given to no handler."""
    now = opname[frame.f_code.co_code[frame.f_lasti]]
    return sys.version_info >= (3, 12) and now in ("JUMP_BACKWARD", "FOR_ITER")  # in 3.13, and in 3.12


def is_interrupted(function: Callable[[], object], at: int, where: str | tuple[str, ...] = HOUSE) -> bool:
    """Whether a call was interrupted at its n-th line, and not at its end before that."""
    grad = torch.is_grad_enabled()
    try:
        with Lines(at, where=where):
            function()
    except KeyboardInterrupt:
        return True
    finally:  # Python leaves a context as it is if it is interrupted between the block's end and the context's own
        torch.set_grad_enabled(grad)
    return False


def is_interrupted_in_thread(function: Callable[[], object], at: int, where: str | tuple[str, ...] = HOUSE) -> bool:
    """The same in a thread of its own.

    Where a generator is interrupted in this way, CPython 3.11 takes what it was handling for what its thread is
    handling, for ever.
    """
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(is_interrupted(function, at, where))
        except BaseException as error:
            found.append(error.with_traceback(None))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return bool(found[0])


def lines_of(function: Callable[[], object], where: str | tuple[str, ...] = HOUSE) -> list[tuple[Any, int]]:
    """All lines of a call that comes to its end."""
    with Lines(where=where) as lines:
        function()
    return lines.seen


def ends_of(seen: list[tuple[Any, int]]) -> list[int]:
    """Where each line is met first, and where it is last."""
    first = {line: n for n, line in reversed([*enumerate(seen)])}
    last = {line: n for n, line in enumerate(seen)}
    return sorted({*first.values(), *last.values()})


def interrupted_undo(monkeypatch: Any, at: int) -> Lines:
    """From now on the next undo is interrupted, too: as the n-th line of lora/ begins in it."""
    lines, leave = Lines(at), undo_on_error.__exit__

    def exit(undo: undo_on_error, kind: type | None, *error: object) -> None:
        if kind is None or lines.seen:
            return leave(undo, kind, *error)
        with lines:
            return leave(undo, kind, *error)

    monkeypatch.setattr(undo_on_error, "__exit__", exit)
    return lines


# ---- what a model is ---------------------------------------------------------------------------------------------

# Computed anew when they are old; and a count of writes, those that were undone among them.
_CACHES = ("_merged", "_norms", "_squares", "_checked", "lora_fresh", "traced_layers", "traced_version", "lora_stacks")
_BACK = ("lora_owner", "holder")  # from a part, or a seat, to the module that it is of


def whole(model: nn.Module, objects: bool = True) -> list[Any]:
    """All that a model is, to the bit, and in which objects: equal for two models that nothing can tell apart."""

    def which(one: object) -> int | None:
        return id(one) if objects else None

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            form = type(value), value.dtype, tuple(value.shape), value.stride(), value.requires_grad
            own = which(value), value.data_ptr() if objects else None, of(value.grad), of(vars(value))
            return form, own, bits(value)
        if isinstance(value, torch.Generator):
            return bits(value.get_state())
        if isinstance(value, dict):
            return [(key, of(one)) for key, one in value.items() if key not in (*_CACHES, *_BACK)]
        if isinstance(value, (list, tuple)):
            return [of(one) for one in value]
        if isinstance(value, set):
            return sorted(map(str, value))
        if hasattr(value, "__dict__") and (isinstance(value, Part) or not callable(value)):
            return which(value), type(value), of(vars(value))
        return which(value) if callable(value) else value

    return [(name, type(module), which(module), of(vars(module))) for name, module in model.named_modules()]


def bits(value: Tensor) -> bytes:
    """The bits of a tensor's values."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
