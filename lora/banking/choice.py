"""Which adapter of a bank each row of a batch has: a matter of the caller, not of the model.

A block `with bank.rows(…)` or `with bank.use(…)` belongs to the context that it is entered in (`contextvars`): a
thread, or a task of asyncio. Layers look for the innermost one of their bank.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import cached_property
from math import prod
from threading import get_ident
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from lora.banking.history import History, Span, begun
from lora.banking.traced import tell
from lora.errors import Problems, is_count, short, some
from lora.functional.rows import Rows
from lora.layers.replay import Replays
from lora.layers.switch import of_caller

# The blocks that were entered in a context, or in one that it was copied from, the innermost last.
_entered: ContextVar[tuple[Choice, ...]] = ContextVar("lora_bank", default=())


class Choice:
    """Which adapters are chosen in a block: one for all rows, or one for each.

    Attributes:
        adapters: of which bank.
        name: the adapter of all rows; None for the base.
        owners: for each row the place of its adapter in `order`, or None; None if `name` is for all.
        rows: the same as runs of rows.
        order: the names of the adapters that have rows.
        shape: that of the rows' adapters, as they were given.
        per: what these are the adapters of: "row" or "token".
        flattened: a tensor of n times as many rows has n tokens of each row, one row after the other.
        everyone: every adapter that trains gets a gradient, of 0 if it has no rows: FSDP2 reduces those of all ranks in
            step, and on another rank it may have some.
        known: the adapters that the bank had then.
        is_open: whether the block was entered, and has not been left.
        span: what autograd records in the block; None for the block of a module that computes with one adapter.
    """

    def __init__(
        self,
        adapters: Adapters,
        name: str | None,
        owners: Sequence[int | None] | None = None,
        order: Sequence[str] = (),
        shape: tuple[int, ...] = (),
        per: str = "row",
        flattened: bool = False,
        everyone: bool = False,
    ) -> None:
        self.adapters, self.name, self.order, self.shape = adapters, name, order, shape
        self.owners, self.rows = owners, None if owners is None else Rows.of(owners)
        self.per, self.flattened, self.everyone = per, flattened, everyone
        self.known = adapters.known
        self.is_open = False
        self.span: Span | None = None

    @cached_property
    def key(self) -> Hashable:
        """What is equal in two blocks that choose the same."""
        owners = None if self.owners is None else tuple(self.owners)
        return hash((self.name, owners, *self.order, self.shape, self.per, self.flattened))

    @property
    def count(self) -> int:
        """How many rows or tokens there are."""
        return 0 if self.rows is None else self.rows.count

    @property
    def is_of_one(self) -> bool:
        """Whether the rows have one adapter, all of them."""
        return self.rows is not None and [part.rows for part in self.rows.parts] == [slice(0, self.rows.count)]

    def rows_of(self, shape: Sequence[int], where: str) -> Rows:
        """The rows of a tensor whose dimensions but for its features have these sizes; ValueError if they cannot be."""
        assert self.rows is not None, "there is one adapter for all rows"
        count, head = self.rows.count, self.shape
        if self.per == "token" and tuple(shape[: len(head)]) != head:  # they may be flattened, or packed into one row
            head = (1, count) if tuple(shape[:2]) == (1, count) else (count,)
        if tuple(shape[: len(head)]) == head:
            return self.rows.times(prod(shape[len(head) :]))
        if self.flattened and shape and shape[0] % count == 0:
            if shape[1:2] == (count,) and not self.is_of_one:  # as of models that turn a batch to (length, rows, …)
                given = " × ".join(map(str, shape))
                raise ValueError(
                    f"{where}: of the {given} rows of this layer's input, those of `bank.rows(names, flattened=True)` "
                    f"may be the {shape[0]}, or the {count} in the second dimension; `bank.use(name)` is for one "
                    "adapter in all rows."
                )
            return self.rows.times(prod(shape) // count)
        given = " × ".join(map(str, self.shape))
        raise ValueError(
            f"{where}: the input of this layer has {' × '.join(map(str, shape)) or 'no'} rows, and the bank was given "
            f"adapters for {given} {self.per}s. Where a model flattens its tokens or packs sequences, say the adapter "
            'of each token, with `bank.rows(names, per="token")`, or that they stand row by row, with '
            "`bank.rows(names, flattened=True)`; `bank.use(name)` is for one adapter in all rows."
        )


class Block(AbstractContextManager[Choice]):
    """One `with bank.rows(…)` or `with bank.use(…)`: left whole, wherever an interruption comes."""

    def __init__(self, choice: Choice, is_seen: bool = True) -> None:
        self.choice, self.is_seen = choice, is_seen

    def __enter__(self) -> Choice:
        if self.choice.is_open:
            raise RuntimeError("this block of a bank was entered already; make one for each `with`.")
        if self.is_seen:
            self.choice.adapters.check_callers()
        try:
            self.choice.is_open = True
            self.choice.span = begun() if self.is_seen else None
            _entered.set((*filter(_is_open, _entered.get()), self.choice))
            self.choice.adapters.traced_blocks += (self.choice,)
            self.choice.adapters.tell()
        except BaseException:
            self.choice.is_open = False
            raise
        return self.choice

    def __exit__(self, *exception: object) -> None:
        try:
            self.choice.is_open = False
            _entered.set(tuple(filter(_is_open, _entered.get())))
            if self.choice.span is not None:
                self.choice.adapters.history.leave(self.choice.span, self.choice)
            self.choice.adapters.tell()
        except BaseException:
            self.choice.is_open = False
            raise

    def __del__(self) -> None:
        choice: Choice | None = vars(self).get("choice")
        if choice is not None:
            choice.is_open = False  # an interruption came before `__exit__` could begin


def _is_open(choice: Choice) -> bool:
    return choice.is_open


class Seeds:
    """An adapter's own seeds for dropout, which those of others do not move."""

    def __init__(self, seed: int) -> None:
        self.set(seed)

    def set(self, seed: int) -> None:
        """Begin anew, as after `torch.manual_seed(seed)`."""
        self.generator = torch.Generator().manual_seed(seed)
        self._replays = Replays()

    def next(self) -> int:
        """The seed of a forward that runs now."""
        return self._replays.of_this_forward(self._draw)

    def _draw(self) -> int:
        return int(torch.randint(2**62, (), generator=self.generator))

    def __getstate__(self) -> Tensor:
        return self.generator.get_state()

    def __setstate__(self, state: Tensor) -> None:
        self.set(0)
        self.generator.set_state(state)


class Adapters:
    """What the layers of a bank know in common.

    Attributes:
        known: the adapters by name, in order, each with its seeds.
        history: in which blocks forwards were.
        room: for how many different adapters in a batch a compiled model has room; None for no room.
        max_r: the rank that all adapters are filled up to, where there is room.
        traced_layers: the layers of the bank, as keys; and others, which were.
        traced_blocks: the blocks that are open, whoever entered them: a compiled model knows no callers.
        traced_version: a number that is another when layers or their adapters have changed.
        is_traced: whether a compiler has looked, and is to be told of blocks.
    """

    def __init__(self) -> None:
        self.known: dict[str, Seeds] = {}
        self.history = History()
        self.room: int | None = None
        self.max_r: int | None = None
        self.traced_layers: dict[Any, None] = {}
        self.traced_blocks: tuple[Choice, ...] = ()
        self.is_traced = False
        self.traced_version = 0

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {
            "traced_layers": {},
            "traced_blocks": (),
            "is_traced": False,
        }  # layers enter themselves again

    def make_room(self, room: int | None, max_r: int | None, is_new: bool) -> None:
        """Set `room` and `max_r` of a bank that is new; ValueError if they are no such numbers, or not those it has."""
        with Problems("bank: nothing was changed") as problems:
            for name, value, other in (("room", room, "max_r"), ("max_r", max_r, "room")):
                if not is_count(value, 1):
                    given = short(value)
                    problems.add(f"`{name}` must be an integer of at least 1, as `{other}` is given; got {given}.")
            if not is_new and (room, max_r) != (self.room, self.max_r):
                problems.add(
                    f"this model's bank was made with `room` {self.room} and `max_r` {self.max_r}, and not with {room} "
                    f"and {max_r}; `bank.keep(None)` takes it out."
                )
        self.room, self.max_r = room, max_r

    def changed(self) -> None:
        """Called when adapters came or went."""
        self.traced_version += 1
        self.tell()

    def tell(self) -> None:
        """Let a compiled model know the innermost open block."""
        self.traced_blocks = tuple(filter(_is_open, self.traced_blocks))
        if self.is_traced:
            self.traced_layers = {layer: None for layer in self.traced_layers if vars(layer).get("lora_bank") is self}
            inner = self.traced_blocks[-1] if self.traced_blocks else None
            tell(self, None if inner is None or self._gone(inner) else inner)

    def check_callers(self) -> None:
        """RuntimeError where a compiled model would compute with a block of another caller's."""
        others = {*filter(_is_open, self.traced_blocks)}.difference(_entered.get()) if self.is_traced else ()
        if others and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(
                "a block of this bank is open in another thread or task, and a compiled model computes with the last "
                "one that was entered, whoever calls it; with a model that was compiled, let one caller at a time have "
                "a block open."
            )

    def watch(self) -> None:
        """Called by a compiler that begins to look, while it looks; RuntimeError if no block is open."""
        inner = next(filter(_is_open, reversed(self.traced_blocks)), None)
        if inner is None:
            raise self._none_chosen()
        self._check_known(inner)
        if not self.is_traced:
            self.is_traced = True
            if inner in _entered.get():
                self.check_callers()
            self.tell()

    # A compiler is to run it, not to follow it. `torch.compiler.assume_constant_result` sets this as well, and imports
    # the whole compiler, which takes seconds.
    watch._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @staticmethod
    def seeds_of(name: str) -> Seeds:
        """The seeds that an adapter of this name begins with: they go by its name and torch's own seed."""
        return Seeds((torch.initial_seed() + crc32(name.encode())) % 2**63)

    def chosen(self, device: torch.device) -> Choice:
        """The innermost block of the caller's; RuntimeError if there is none, or it is not for what is computed."""
        if torch.compiler.is_dynamo_compiling():
            raise RuntimeError(
                "a module that computes with one adapter's weight at a time (attention, recurrent layers, experts, "
                "classes with a forward of their own) cannot be compiled with a bank of adapters; without "
                "`fullgraph=True` the rest of the model is."
            )
        recomputes = torch._C._current_graph_task_id() != -1
        own = [choice for choice in _entered.get() if choice.adapters is self and choice.is_open]
        # Autograd computes checkpointed forwards again; for accelerators in threads of its own, which have no context.
        if not own and recomputes and device.type != "cpu":
            callers: tuple[Choice, ...] = of_caller(_entered)
            own = [choice for choice in callers if choice.adapters is self and choice.is_open]
        if own:
            choice = own[-1]
            if recomputes:
                self.history.check(own)
            elif choice.span is not None and choice.span.thread != get_ident():
                self.history.threads = True
            if choice.known is not self.known:
                self._check_known(choice)
            return choice
        raise self._none_chosen()

    def _none_chosen(self) -> RuntimeError:
        return RuntimeError(
            f"no adapter is chosen: this model has a bank of them ({', '.join(self.known)}). Call it within "
            "`with bank.use(name):`, or `with bank.rows(names):` with one name for each row, where None is the base. "
            "(A backward through checkpointed layers computes them again, and belongs in the block, too.)"
        )

    def _gone(self, choice: Choice) -> list[str]:
        return [repr(name) for name in (choice.name, *choice.order) if name is not None and name not in self.known]

    def _check_known(self, choice: Choice) -> None:
        gone = self._gone(choice)
        if gone:
            raise RuntimeError(
                f"the block of a bank that is open has rows of {some(gone, len(gone))}, and the bank no longer has: it "
                "was taken out after the block was made."
            )


def nested(names: Any) -> tuple[tuple[int, ...], list[Any]]:
    """The shape of nested lists, and what is in them; ValueError if they are not of one length, or have no values."""
    if isinstance(names, (Tensor, np.ndarray)):
        names = _values(names)
    if isinstance(names, str) or not isinstance(names, Sequence):
        return (), [int(names) if isinstance(names, np.integer) else names]
    inner = [nested(each) for each in names]
    shapes = {shape for shape, _ in inner}
    if len(shapes) > 1:
        raise ValueError(f"the lists must be of one length, got {', '.join(map(str, sorted(shapes)))}.")
    return (len(inner), *next(iter(shapes), ())), [value for _, values in inner for value in values]


def _values(numbers: Tensor | np.ndarray) -> Any:
    """An array's numbers as nested lists."""
    try:
        values = numbers.tolist()
        has_some = not any(isinstance(one, _SYMBOLS) for one in nested(values)[1])
    except RuntimeError:
        has_some = False
    if not has_some:
        raise ValueError(
            f"`names` must have values that can be read, and those of this {type(numbers).__name__} cannot be: it is "
            "on the meta device, say, or is traced. What is traced keeps the adapters that it was traced with; give "
            "them as a list."
        )
    return values


_SYMBOLS = torch.SymInt, torch.SymFloat, torch.SymBool
