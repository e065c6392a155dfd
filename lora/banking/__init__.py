"""Many adapters on one base: keep them, switch, mix them in one batch, and train them at once."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lora.adapters.adapter import Adapter
from lora.adapters.base import describe_tensor, own_tensors
from lora.adapters.checkpoint import adapter_of, load_adapter, save_adapter
from lora.adapters.formats import read_adapter
from lora.banking.choice import Adapters, Block, Choice, nested
from lora.banking.divided import let_divide
from lora.banking.layer import Banked
from lora.banking.layouts import is_turned
from lora.banking.seats import banked, keep_alone, renewed, seat, unseat
from lora.banking.view import View, adapted_in, as_it_is, view_of
from lora.errors import Problems, raise_all, short, some
from lora.layers import starts, weights
from lora.layers.layer import LoRALayer
from lora.layers.parts import with_parts
from lora.layers.state import PARAMETERS
from lora.layers.undo import undo_on_error
from lora.models.config import LoraConfig
from lora.models.idle import CheckReport, check
from lora.models.injection import inject, restore
from lora.models.model import (
    check_none_computed,
    check_none_replaced,
    forget_children,
    lora_layers,
    names_of,
    obstacles,
    remember_layers,
    remember_values,
    sharded_problems,
    unwrapped,
)
from lora.models.readers import let_read
from lora.models.refusals import own_forward_problems
from lora.models.training import originals, param_groups, resized_problems
from lora.swapping import make_room  # one wing knows another: room for ranks is the same for one adapter and for many

Source = Adapter | LoraConfig | str | os.PathLike[str]


def bank(
    model: nn.Module,
    adapters: Mapping[str, Source] | None = None,
    *,
    room: int | None = None,
    max_r: int | None = None,
    check_base: bool = True,
) -> AdapterBank:
    """Give a model several adapters, of which each row of a batch has its own.

        y_i = g_k ⊙ (W₀ x_i + s_k · B_k A_k drop_k(x_i)) + b        for the i-th row, whose adapter is the k-th

    The base's product is computed once, for all rows. Each adapter has its own rank, scaling, dropout and modules, and
    is trained as if it were alone: in one backward pass each gets the gradients of its own rows; one without rows gets
    none, and does not move. What overflows in one stays there.

    Args:
        model: a plain model; or one that has a bank, for another handle of that, to which `adapters` are added. A
            handle of a part of a model sees the layers of that part alone.
        adapters: the adapters by name, in order: each a `lora.LoraConfig`, for one that starts now, a `lora.Adapter`,
            or the file or folder of one, in any format that `lora.read_adapter` knows. Names have no dots.
            Default: none.
        room: for `torch.compile`: how many different adapters a batch may have; within it nothing is compiled again
            when adapters come, go or are replaced. With `max_r`. Default: none, and new adapters are compiled anew.
        max_r: for `torch.compile`: the rank that A and B of all adapters are filled up to with zeros, as by
            `lora.prepare_for_swap`; files and `bank[name]` have an adapter's own. Default: none.
        check_base: as in `lora.load_adapter`. Default: True.

    Returns:
        The bank: a mapping of names to `lora.Adapter`s, with the blocks that choose among them.

    Raises:
        TypeError: a source is none of these.
        OSError: there is no such file or folder (FileNotFoundError), or it cannot be read (PermissionError, …).
        ValueError: a name has a dot or is empty; an adapter does not fit the model; it trains more than A, B and
            magnitudes (`modules_to_save`, biases), or takes its start out of the base weights (PiSSA) or from data
            (EVA); the model has LoRA layers already; a rank is above `max_r`; `room` or `max_r` is given without the
            other, or is not what the model's bank has. One error lists everything, and the model is as it was.

    Related: "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", arXiv:2311.03285; "mLoRA", arXiv:2312.02515.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> config = lora.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    >>> bank = lora.bank(model, {"alice": config, "bob": config})
    >>> x = torch.ones(3, 8)
    >>> with bank.rows(["alice", "bob", None]):
    ...     y = model(x)
    >>> with bank.use("bob"):
    ...     torch.allclose(model(x)[1], y[1])
    True
    """
    made = AdapterBank(model, check_base)
    if (room, max_r) != (None, None):
        made._adapters.make_room(room, max_r, not made._layers())
    made._put(adapters or {}, model)
    return made


class AdapterBank(MutableMapping[str, Adapter]):
    """The adapters of a model that has several, by name: `lora.bank` makes one.

    `bank[name]` is the adapter, which shares the model's tensors. `bank[name] = source` adds an adapter or replaces
    one, `del bank[name]` takes one out; the others stay as they are, and so do their Parameters and what optimizers
    know of these.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> bank = lora.bank(model, {"alice": lora.LoraConfig(target_modules=["0"], r=2)})
    >>> bank["bob"] = lora.LoraConfig(target_modules=["0"], r=3)
    >>> [*bank], bank["bob"].modules["0"]["r"]
    (['alice', 'bob'], 3)
    >>> [tuple(p.shape) for p in bank.parameters("bob")]
    [(3, 8), (4, 3)]
    """

    def __init__(self, model: nn.Module, check_base: bool = True) -> None:
        self._model, self._check_base = unwrapped(model), check_base
        self._own = Adapters()
        _ = self._adapters

    # ---- choosing --------------------------------------------------------------------------------------------

    def use(self, name: str | None) -> Block:
        """Within ``with bank.use(name):`` all rows have this adapter; with None they have none, as in the base model.

        The block is its caller's: other threads and tasks choose for themselves. (A compiled model knows no
        callers, but the block that was entered last.)

        Raises:
            ValueError: there is no such adapter.
        """
        raise_all("use: no adapter is chosen", self._unknown([name]))
        return Block(Choice(self._adapters, name, everyone=self._in_step()))

    def rows(self, names: Sequence[Any] | Tensor, per: str = "row", flattened: bool = False) -> Block:
        """Within ``with bank.rows(names):`` each row of the batch has the adapter of its name.

        Rows that stand side by side are computed without a copy of them: batches that are sorted by adapter are
        fastest. A layer's input must begin with the batch: all that has as many entries in its first dimension is taken
        for that. Call the backward of checkpointed models within the block.

        Args:
            names: for each row a name, None for the base, or the adapter's number in the bank (−1 for the base).
            per: "row", or "token": then `names` has a list for each row, with one for each token, or one for each of
                the tokens of a flattened or packed batch. Default: "row".
            flattened: let an input with n times as many rows as there are names have n for each, one name's after the
                other's. Mixtures of experts make such of a batch's tokens, and beam search of its rows. Default: False,
                an error.

        Raises:
            ValueError: a name is unknown (all are listed), lists are not of one length, `per` is neither of the two, or
                `flattened` is not for rows.
        """
        what = "rows: no adapters are chosen"
        if per not in ("row", "token"):
            raise ValueError(f"{what}: `per` must be 'row' or 'token', got {short(per)}.")
        if flattened and per != "row":
            raise ValueError(f"{what}: `flattened` is for rows, and `per` is {per!r}.")
        shape, given = nested(names)
        if not shape or (per == "row" and len(shape) != 1) or 0 in shape:
            expected = "a list with an entry for each row" if per == "row" else "a list of lists, or one of all tokens"
            raise ValueError(f"{what}: `names` must be {expected}, got one of the shape {shape}.")
        known = [*self._adapters.known]
        raise_all(what, self._unknown(value for value in given if not isinstance(value, Hashable)))
        called: dict[Any, str | None] = {}
        for value in dict.fromkeys(given):
            numbered = isinstance(value, int) and -1 <= value < len(known)
            called[value] = (known[value] if value >= 0 else None) if numbered else value
        truths = {value for value in given if isinstance(value, bool)}  # which are equal to numbers
        raise_all(what, self._unknown([*called.values(), *sorted(truths)]))
        order = [*dict.fromkeys(name for name in called.values() if name is not None)]
        places: dict[str | None, int | None] = {name: number for number, name in enumerate(order)}
        owners = [places.get(called[value]) for value in given]
        return Block(Choice(self._adapters, None, owners, order, shape, per, flattened, self._in_step()))

    def _unknown(self, names: Iterable[Any]) -> Iterator[str]:
        known = self._adapters.known
        for name in names:
            if name is not None and (not isinstance(name, str) or name not in known):
                has = f"the bank has {some(known, len(known))}" if known else "the bank is empty"
                yield f"there is no adapter {short(name)}; {has}."

    def seed(self, name: str, seed: int) -> None:
        """Let an adapter's dropout in mixed batches go on as after ``torch.manual_seed(seed)``.

        It draws from seeds of its own, so that it is the same whatever other adapters are in the batch. They begin with
        what `torch.manual_seed` was last given, and the adapter's name.
        """
        self._known(name, "seed").set(seed)

    # ---- its adapters ------------------------------------------------------------------------------------------

    def parameters(self, name: str) -> list[nn.Parameter]:
        """An adapter's own Parameters, for its own optimizer, and those that parametrizations compute others from."""
        self._known(name, "parameters")
        seats = (layer.lora_seats.get(name) for layer in self._layers())
        return [parameter for one in seats if one is not None for parameter in one._parameters.trained(PARAMETERS)]

    def param_groups(self, name: str, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """An adapter's Parameters in groups for its own optimizer: what `lora.param_groups` makes of it."""
        return param_groups(self._view(name, "param_groups").model, *args, **kwargs)

    def check(self, name: str) -> CheckReport:
        """Which layers' adapters take no part: `lora.check` for one adapter of the bank."""
        return check(self._view(name, "check").model)

    def save(self, name: str, path: str | os.PathLike[str], format: str = "lora") -> None:
        """Save one adapter, as `lora.save_adapter` does of a model with no other."""
        save_adapter(self._view(name, "save").model, path, format)

    def load(self, name: str, source: Adapter | str | os.PathLike[str]) -> None:
        """Load values into an adapter of the same modules and ranks (`lora.load_adapter`); its Parameters stay."""
        view = as_it_is(self._view(name, "load")).model
        adapter, problems = _factors(source if isinstance(source, Adapter) else read_adapter(source), view)
        raise_all(f"load: {name!r} stays as it is", problems)
        try:
            load_adapter(view, adapter, check_base=self._check_base)
        finally:
            self._adapters.changed()

    def keep(self, name: str | None) -> None:
        """Leave one adapter in the model, as its only one, or none, and take out all others: the bank is empty then.

        The adapter's Parameter objects stay. `lora.merge`, `lora.save_adapter` and all else take the model again.
        """
        if name is not None:
            self._known(name, "keep")
        check_none_computed(self._model, "keep")
        layers = self._layers()
        raise_all("keep: nothing was changed", self._in_the_way(layers))
        with self._undone() as undo, undo, torch.no_grad():
            kept = [keep_alone(layer, name) for layer in layers]
            for module in self._model.modules():
                forget_children(module)
                if name is None:
                    restore(module, undo)
            names = names_of(self._model)
            remember_layers(names, [layer for layer in kept if layer is not None])
            remember_values(names)
            raise_all("keep: nothing was changed", let_read(names))
            let_divide(names)
            self._adapters.known = {}

    def __getitem__(self, name: str) -> Adapter:
        return adapter_of(self._view(name, None).model)

    def __setitem__(self, name: str, source: Any) -> None:
        self._put({name: source}, self._model)

    def __delitem__(self, name: str) -> None:
        if name not in self._adapters.known:
            raise KeyError(name)
        check_none_computed(self._model, "del")
        has_room = self._adapters.room is not None  # where layers stay in the bank
        if len(self) == 1 and not has_room:
            return self.keep(None)
        last = [] if has_room else [layer for layer in self._layers() if {*layer.lora_seats} == {name}]
        raise_all(f"del: {name!r} stays in the bank", self._in_the_way(last))
        with self._undone() as undo, undo:
            for layer in map(renewed, self._layers()):
                unseat(layer, name)
            let_divide(self._model.modules())
            self._adapters.known = {other: seeds for other, seeds in self._adapters.known.items() if other != name}
        self._adapters.changed()

    def __contains__(self, name: object) -> bool:
        return name in self._adapters.known

    def __iter__(self) -> Iterator[str]:
        return iter([*self._adapters.known])

    def __len__(self) -> int:
        return len(self._adapters.known)

    def __repr__(self) -> str:
        return f"AdapterBank({some(self._adapters.known, len(self))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterBank) and other._adapters is self._adapters

    def __hash__(self) -> int:
        return hash(self._model)

    # ---- within ------------------------------------------------------------------------------------------------

    @property
    def _adapters(self) -> Adapters:
        """What the model's layers know of the bank: while there is nothing in it, by this handle or another."""
        if not self._own.known:
            found = list(dict.fromkeys(layer.lora_bank for layer in self._layers()))
            if len(found) > 1:
                raise ValueError("bank: this model has parts with banks of their own; ask for those of the parts.")
            self._own = found[0] if found else self._own
        return self._own

    def _in_step(self) -> bool:
        """Whether FSDP2 reduces the gradients of all ranks in step."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return distributed and any(map(weights.is_fully_sharded, self._model.modules()))

    def _layers(self) -> list[Any]:
        return [layer for layer in with_parts(self._model.modules()) if isinstance(layer, Banked)]

    def _known(self, name: str, what: str | None) -> Any:
        if name in self._adapters.known:
            return self._adapters.known[name]
        if what is None:
            raise KeyError(name)
        raise_all(f"{what}: nothing was done", self._unknown([name]))

    def _view(self, name: str, what: str | None) -> View:
        self._known(name, what)
        check_none_replaced(self._model, what or "bank")
        check_none_computed(self._model, what or "bank")
        return view_of(self._model, name)

    def _undone(self) -> undo_on_error:
        return undo_on_error(self._model.modules(), others=[self._adapters])

    def _in_the_way(self, losing: Sequence[LoRALayer]) -> Iterator[str]:
        """What keeps adapters from being taken out, and some layers from becoming plain ones."""
        names = names_of(self._model)
        instead = "what shards it would go on with the adapters; load files of them into a bank of a model of its own"
        yield from sharded_problems(self._layers(), names, instead)
        yield from own_forward_problems(losing, names)
        yield from resized_problems(self._model)

    def _put(self, sources: Mapping[str, Any], given: nn.Module) -> None:
        what = "bank: nothing was changed"
        model, adapters = self._model, self._adapters
        layers = lora_layers(model, "bank", none=True, several=True)
        with self._undone() as undo, undo:
            views: dict[str, View] = {}
            with Problems(what) as problems:
                names = names_of(model)
                problems.add(*(obstacles(names_of(given)) if sources else ()))
                for layer in layers:
                    if layer.r > 0 and not isinstance(layer, Banked):
                        problems.add(f"{names[layer][0]}: has an adapter already, of no bank; `lora.eject` it first.")
                problems.raise_any()
                for name, source in sources.items():
                    if not isinstance(name, str) or not name or "." in name:
                        problems.add(f"{short(name)} is no name for an adapter: that is a string without dots.")
                        continue
                    views[name] = as_it_is(view_of(model))
                    problems.add(*(f"{name}: {problem}" for problem in self._fill(views[name].model, source)))
            for layer in map(renewed, self._layers()):
                for name in {*views} & {*layer.lora_seats}:
                    unseat(layer, name)
            new: list[Any] = [layer for name, view in views.items() for layer in _seat(adapters, name, view)]
            names = names_of(model)
            turned = [*filter(is_turned, names)]
            where = names[turned[0]][0] or "the model" if turned else None
            for layer in new:
                layer.lora_called(names[layer][0], where)
            remember_layers(names, new)
            remember_values(names)
            raise_all(what, let_read(names))
            let_divide(names)
            adapters.known = adapters.known | {name: adapters.seeds_of(name) for name in views}
        adapters.changed()

    def _fill(self, view: nn.Module, source: Any) -> Iterator[str]:
        """Give a view an adapter; what is wrong with it."""
        if not isinstance(source, (LoraConfig, Adapter, str, os.PathLike)):
            kinds = "a LoraConfig, an Adapter, or the path of one"
            raise TypeError(f"bank: an adapter must be given by {kinds}, got {short(source)}.")
        try:
            if isinstance(source, LoraConfig):
                found = [*_beyond(source)]
                _ = None if found else inject(view, source)
            else:
                adapter, found = _factors(source if isinstance(source, Adapter) else read_adapter(source), view)
                _ = None if found else load_adapter(view, adapter, check_base=self._check_base)
            if self._adapters.max_r is not None and not found:
                make_room(view, self._adapters.max_r, "bank")
        except ValueError as error:
            lines = str(error).splitlines()
            found = [line.removeprefix("  - ") for line in lines[1:] or lines]
        yield from found


def _seat(adapters: Adapters, name: str, view: View) -> Iterator[LoRALayer]:
    """Give the model's layers the adapter that a view got; those that have become layers of the bank."""
    for twin, module in view.of.items():
        if originals(twin):
            vars(module).setdefault("lora_originals", originals(twin))
    for adapted, module, parameter in adapted_in(view):
        layer, is_new = banked(module, parameter, adapters)
        seat(layer, name, adapted)
        if is_new:
            yield layer


def _factors(adapter: Adapter, model: nn.Module) -> tuple[Adapter, list[str]]:
    """An adapter without what it replaces of the base model; complaints, where the model has not got that already."""
    full = {*adapter.trained_in_full}
    named = own_tensors(names_of(model)) if full else ()
    ours = {name: (module, own, tensor) for known, module, own, tensor in named for name in full.intersection(known)}
    problems = [
        f"{name}: is in the adapter as it trained, or was resized; a bank holds A, B and magnitudes, and all share the "
        "rest, as it is in the model."
        for name in adapter.trained_in_full
        if name not in ours or not _equal(adapter.tensors[name], ours[name][2])
    ]
    own_ones = {name: tensor for name, tensor in adapter.tensors.items() if name not in full}
    rest = {name: describe_tensor(tensor, module, own) for name, (module, own, tensor) in ours.items()}
    nothing: dict[str, Any] = {"trained_in_full": [], "modules_to_save": [], "kept": []}
    rest = adapter.rest | rest if adapter.rest else {}
    return (replace(adapter, tensors=own_ones, rest=rest, **nothing) if full else adapter), problems


def _equal(theirs: Tensor, ours: Tensor) -> bool:
    whole = weights.of(None, "", ours).whole()
    return theirs.shape == whole.shape and torch.equal(theirs.to(whole.device, whole.dtype), whole)


def _beyond(config: LoraConfig) -> Iterator[str]:
    """What a config asks for that an adapter of a bank cannot have."""
    why = "an adapter of a bank is A, B and magnitudes, and all share the rest"
    if config.modules_to_save:
        yield f"`modules_to_save` (={config.modules_to_save}) must be empty: {why}."
    if config.bias != "none":
        yield f"`bias` (={config.bias!r}) must be 'none': {why}."
    how = config.init_lora_weights
    if isinstance(how, str) and starts.needs_more(how):
        yield (
            f"`init_lora_weights` (={how!r}) needs the base weight or data: start the adapter in a model of its own "
            "(`lora.inject`, `lora.calibrate`), and give the bank `lora.adapter_of(model)`."
        )
