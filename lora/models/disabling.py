"""The model without its adapters, for as long as a block is open, and for the caller alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ContextDecorator

import torch
import torch.nn as nn
from torch import Tensor

from lora.errors import Problems, join
from lora.layers import switch
from lora.layers.layer import LoRALayer
from lora.layers.switch import Block
from lora.layers.weights import is_sharded
from lora.models.exchange import Exchanged, exchanged, trained_in
from lora.models.model import lora_layers, names_of, owned_tensors
from lora.models.training import has_moved, originals, resized_problems


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Within ``with lora.disabled(model):`` the model computes what the base model does.

    Modules and biases that train in full, and buffers that training changed (running statistics), have the values that
    they had when LoRA was put in.

    The block is its caller's: other threads and other tasks of asyncio have the model with LoRA meanwhile. Tasks that
    are started in the block belong to it, and what another thread calls through a copy of its context
    (``contextvars.copy_context().run``). Two things hold for all callers:

    - Where more than A, B and magnitudes trained, the base's tensors stand in the model until the block is left. A
      forward by another caller then raises RuntimeError, in LoRA layers and in what has the base's tensors. State dicts
      are of what trained, in the block as well, and are loaded into it; it follows where the model is moved or cast.
      Optimizer steps change it, too, but belong outside of the block.
    - A compiled model (`torch.compile`) is disabled for everyone while any block is open.

    Activation checkpointing computes a forward again in its backward: call both in the block, or both outside.

    Args:
        model: a model with LoRA layers, or a part of one.

    Raises:
        ValueError: there is no LoRA layer in the model, or what trains in full is sharded or was resized since.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 2))
    >>> before = model(torch.ones(8))
    >>> _ = lora.inject(model, target_modules=["0"], r=2)
    >>> _ = torch.nn.init.ones_(model[0].lora_B)
    >>> with lora.disabled(model):
    ...     bool((model(torch.ones(8)) == before).all())
    True
    """
    return _Disabled(model)


# A model's modules, each with its parents and its names there.
Places = dict[nn.Module, list[tuple[nn.Module, str]]]


class _Disabled(ContextDecorator, AbstractContextManager[None]):
    """Entered whole or not at all, and left whole: what an interruption leaves undone is done again."""

    block: Block | None = None
    #: The thread that enters or leaves it, while one does.
    thread: int = 0

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.exchanges: list[Exchanged] = []
        self.places: Places = {}

    def _recreate_cm(self) -> _Disabled:  # as a decorator: one for each call
        return _Disabled(self.model)

    def __enter__(self) -> None:
        if self.block is not None:
            raise RuntimeError("disabled: this block was entered already; call `lora.disabled(model)` for each.")
        try:
            return self._enter()
        except BaseException:
            self._leave()
            raise

    def __exit__(self, *exception: object) -> None:
        try:
            return self._leave()
        except BaseException:
            self._leave()
            raise

    def __del__(self) -> None:
        if self.block is not None or self.thread:  # an interruption came before `__exit__` could begin, or twice
            self._leave()

    def _enter(self) -> None:
        layers = lora_layers(self.model, "disabled", inside_disabled=True, several=True)
        with Problems("disabled: nothing was changed") as problems:
            problems.add(*_sharded_problems(self.model), *resized_problems(self.model))
        self._take_turn()
        exchanges = [*_exchanges(self.model)]
        block = self.block = Block(layers)
        block.exchanges, self.exchanges = bool(exchanges), exchanges
        self.places = _places(self.model) if exchanges else {}
        for layer in layers:
            switch.add(layer, block)
        for one in exchanges:
            one.begin(block)
        for layer in layers:
            layer.lora_refresh()
        block.enter()
        self._end_turn()

    def _leave(self) -> None:
        block = self.block
        if block is not None:
            block.close()
            self._take_turn()
            for one in self.exchanges:
                one.end(block)
            _hand_on(self.exchanges, self.places)
            for layer in block.layers:
                switch.remove(layer, block)
                if isinstance(layer, LoRALayer):
                    layer.lora_refresh()
            block.layers, self.exchanges, self.places, self.block = [], [], {}, None
        self._end_turn()

    # One at a time enters or leaves. An interruption could leave a lock of `threading` taken for ever. A turn knows
    # whose it is, and one operation of a dict takes it: after an interruption it can be taken, and given back, again.

    def _take_turn(self) -> None:
        self.thread = threading.get_ident()
        # A finaliser may interrupt its own thread's turn. It cannot wait for that, and disturbs nothing.
        while (whose := _turn.setdefault("whose", self)) is not self and whose.thread != self.thread:
            time.sleep(1e-4)

    def _end_turn(self) -> None:
        if _turn.get("whose") is self:
            _turn.pop("whose", None)
        if self.block is None:
            self.thread = 0


_turn: dict[str, _Disabled] = {}


def _places(model: nn.Module) -> Places:
    places: Places = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    return places


def _hand_on(exchanges: list[Exchanged], places: Places) -> None:
    """Let modules that were made in the block in the place of others have what trained in these."""
    for one in exchanges:
        for parent, name in places.get(one.module, ()):
            now = parent._modules.get(name)
            if now is not one.module:
                one.hand_on(now)


def _sharded_problems(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():  # FSDP2 puts tensors of its own in their places for every forward
        for own in originals(module):
            if is_sharded(getattr(module, own, None)) and has_moved(module, own):
                yield f"{join(name, own)}: trains in full and is sharded; compute with a base model of its own."


def _exchanges(model: nn.Module) -> Iterator[Exchanged]:
    """What the base's values have to take the place of, also where they have done so for other blocks already."""
    places: dict[int, list[tuple[nn.Module, str, Tensor]]] = {}  # tied tensors have several
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for one in owned_tensors(names_of(model)):
        tensor = trained_in(one.module, one.own, one.tensor)
        places.setdefault(id(tensor), []).append((one.module, one.own, tensor))
    for module in model.modules():
        for own, before in originals(module).items():
            known = exchanged(module).get(own)
            if known is not None:
                moved[id(known.trained)] = known.trained, known.base
            elif has_moved(module, own):
                tensor = getattr(module, own)
                if id(tensor) not in moved:
                    moved[id(tensor)] = tensor, _base(tensor, before)
    for key, (tensor, base) in moved.items():
        for module, own, _ in places[key]:
            known = exchanged(module).get(own)
            yield Exchanged(module, own, tensor, base) if known is None else known


@torch.no_grad()
def _base(tensor: Tensor, before: Tensor) -> Tensor:
    base = before.to(tensor.device, tensor.dtype)
    return nn.Parameter(base, False) if isinstance(tensor, nn.Parameter) else base.clone()
