"""A layer with the adapters of a bank: its base's product once, for all rows, and each adapter's update for its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lora.banking.choice import Adapters, Choice, Seeds
from lora.banking.divided import divide, with_one
from lora.banking.stacks import Stacks
from lora.banking.traced import traced_forward
from lora.errors import instance, some
from lora.functional.rows import Rows, Update, lora_linear_rows
from lora.layers.conv import ConvLoRA
from lora.layers.embedding import EmbeddingLoRA
from lora.layers.in_place import LowRankWeight, computed_names
from lora.layers.layer import LoRALayer
from lora.layers.linear import LinearLoRA
from lora.layers.state import PARAMETERS
from lora.layers.undo import undo_on_error
from lora.layers.vocabulary import WithVocabulary
from lora.layers.weights import is_sharded

# What a layer of a bank keeps beside what every LoRA layer does.
_STATE = (
    *("lora_seats", "lora_bank", "lora_name", "lora_routed", "lora_turned", "lora_places", "lora_base_tensors"),
    *("lora_slots", "lora_stacks"),
)
# The names of layers in one expert of several that are modules: `experts.0.w1`, `experts.expert_0.wi`.
_EXPERT = re.compile(r"(^|\.)experts\.(expert_)?\d+(\.|$)")
# Those of embeddings of places in a sequence: `wpe`, `embed_positions`, `relative_attention_bias`.
_PLACES = re.compile(r"(^|_)(wpe|pos|position|positions|positional|relative)(_|$)")


class Banked(LoRALayer):
    """In front of a layer's class: the layer has several adapters, and each row of its input one of them, or none.

    Attributes:
        lora_seats: the layer with each of its adapters alone, by name. A seat is a LoRA layer that is no module of the
            model; it shares all with this layer but its settings, A, B and magnitudes. These are Parameters of this
            layer, too: `lora_A_<name>` and so on.
        lora_bank: what the layers of the bank know in common.
        lora_name: the layer's name in the model, for errors.
        lora_routed: whether it is given tokens that a router chose.
        lora_turned: a module of the model that takes (length, batch, features), in words; None if there is none.
        lora_places: whether it is an embedding of places in a sequence, which need not be given with rows.
        lora_base_tensors: the names of the parameters that are its base's.
        lora_stacks: A and B of several adapters in one tensor each, as a cache.
    """

    lora_base_class = LoRALayer

    lora_seats: Mapping[str, Any]
    lora_bank: Adapters
    lora_name: str
    lora_routed: bool
    lora_turned: str | None
    lora_places: bool
    lora_base_tensors: tuple[str, ...]
    lora_stacks: Stacks

    # ---- forward ---------------------------------------------------------------------------------------------

    def lora_layer_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As a layer with the adapter of all rows alone, or with each row's own."""
        if torch.compiler.is_dynamo_compiling():
            return traced_forward(self, input, *args, **kwargs)
        if self.lora_disabled is not None and self.lora_is_off():
            return self.lora_base_forward(input, *args, **kwargs)
        choice = self._chosen(input.device)
        if choice.rows is not None:
            return self.lora_mixed(choice, input, *args, **kwargs)
        seat = None if choice.name is None else self.lora_seats.get(choice.name)
        if seat is None:
            return self.lora_base_forward(input, *args, **kwargs)
        output: Tensor = seat.lora_layer_forward(input, *args, **kwargs)
        return output

    def _chosen(self, device: torch.device) -> Choice:
        choice = self.lora_bank.chosen(device)
        if choice.everyone and torch.is_grad_enabled():
            for _, parameter in self.lora_parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return choice

    def lora_mixed(self, choice: Choice, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W₀ x + b once, and each adapter's update for its own rows."""
        if not self.lora_present(choice):
            return self.lora_base_forward(input, *args, **kwargs)
        if self.lora_routed:
            return self._routed(choice, input, *args, **kwargs)
        lead = self._lead(input)
        rows = choice.rows_of(input.shape[:lead], self.lora_name)
        seats = {number: self.lora_seats.get(choice.order[number]) for number, *_ in rows.parts}
        if is_sharded(input):
            raise RuntimeError(
                f"{self.lora_name}: its input is divided among ranks ({instance(input)}), and rows of several adapters "
                "are not; use `bank.use(name)` here."
            )
        if self.lora_is_in_place():
            return self._divided(choice, lead, input, *args, **kwargs)
        if (self.lora_places or self.lora_turned) and choice.per == "row" and not choice.is_of_one:
            self.lora_check_sizes(choice.count, input.shape[:lead])
        for check in type(self).lora_checks if self.training or torch.is_grad_enabled() else ():
            for seat in filter(None, seats.values()):
                check(seat, input)
        if isinstance(self, LinearLoRA) and self.lora_dense:
            updates = [_update(choice, name, seats.get(number)) for number, name in enumerate(choice.order)]
            stack = None if self.training else self.lora_stacks.keeper(choice.key)
            y = lora_linear_rows(input, self.lora_stored(self.weight), self.bias, updates, rows, stack=stack)
            scaled = {n: seat.lora_magnified for n, seat in seats.items() if seat is not None and seat.use_dora}
            return _with_rows(y, rows, lead, scaled) if scaled else y
        y = self.lora_base_forward(input, *args, **kwargs)
        flat = input.reshape(rows.count, *input.shape[lead:])
        parts = dict(
            zip((part.adapter for part in rows.parts), rows.views(rows.parts, flat, rows.gather(flat)), strict=True)
        )
        adds = {
            number: partial(_added, seat, choice.adapters.known[choice.order[number]], parts[number])
            for number, seat in seats.items()
            if seat is not None
        }
        return _with_rows(y, rows, lead, adds)

    def _routed(self, choice: Choice, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Whatever rows there are, if all have one adapter."""
        if not choice.is_of_one:
            raise RuntimeError(
                f"{self.lora_name}: is of one expert among several, which gets tokens that a router chose: nobody "
                "knows whose they are. Use `bank.use(name)` here, with a batch for each adapter."
            )
        y: Tensor = with_one(self, self.lora_layer_forward, choice, choice.order[0], (input, *args), kwargs)
        return y

    def lora_called(self, name: str, turned: str | None = None) -> None:
        """Let it know its name in the model, and that of a module that takes (length, batch, features)."""
        routed = _EXPERT.search(name) is not None
        places = isinstance(self, EmbeddingLoRA) and _PLACES.search(name.rpartition(".")[2]) is not None
        vars(self).update(lora_name=name or "the model", lora_routed=routed, lora_turned=turned, lora_places=places)

    def lora_check_sizes(self, n: int, shape: Sequence[int]) -> None:
        """RuntimeError if what seems to be n rows, each with an adapter of its own, may be n places in a sequence."""
        if shape[0] != n or (len(shape) > 1 and shape[1] != n):
            return
        if self.lora_places:
            why = "is an embedding of places by its name, and what is as long as there are rows may be the places"
        elif self.lora_turned is not None and len(shape) > 1:
            why = (
                "the rows of the batch may be in the first dimension of this layer's input, or in the second: both are "
                f"of size {n}, and {self.lora_turned} takes (length, batch, features)"
            )
        else:
            return
        raise RuntimeError(
            f"{self.lora_name}: {why}. Let the length differ from the number of rows, say the adapter of each token in "
            'the form of this input, with `bank.rows(names, per="token")`, or use `bank.use(name)`.'
        )

    def _divided(self, choice: Choice, lead: int, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The class's own forward, once for each adapter."""
        by_token = choice.per == "token" and lead > 1 and not args and not kwargs
        x = input.flatten(0, lead - 1) if by_token else input
        y: Tensor = divide(self, self.lora_layer_forward, choice, self.lora_name, x, *args, **kwargs)
        return y.view(*input.shape[:lead], *y.shape[1:]) if by_token else y

    def _lead(self, input: Tensor) -> int:
        """How many of the input's first dimensions are rows."""
        if isinstance(self, ConvLoRA):
            return int(input.dim() == self.weight.dim())  # 0 for one image without a batch
        return input.dim() - (not isinstance(self, EmbeddingLoRA))

    # ---- its weight, for a parent that reads it ------------------------------------------------------------------

    def lora_weight_now(self) -> Tensor | LowRankWeight:
        weight: Tensor = self.weight
        if self.lora_is_off():
            return weight
        choice = self._chosen(weight.device)
        if choice.rows is not None:
            if not self.lora_present(choice):
                return weight
            raise RuntimeError(
                f"{self.lora_name}: what is around this layer reads its weight, and of that there is one for each "
                "adapter; use `bank.use(name)` here."
            )
        seat = None if choice.name is None else self.lora_seats.get(choice.name)
        now: Tensor | LowRankWeight = weight if seat is None else seat.lora_weight_now()
        return now

    def lora_present(self, choice: Choice) -> bool:
        """Whether some of the rows have an adapter that is in the layer."""
        return any(name in self.lora_seats for name in choice.order)

    # ---- its adapters ------------------------------------------------------------------------------------------

    def lora_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, seat in self.lora_seats.items():
            for own, parameter in seat.lora_parameters():
                yield f"{own}_{name}", parameter

    def lora_owns_its_tensors(self) -> bool:
        return "weight" in {*self._parameters, *self._buffers} and not computed_names(self)

    def lora_resize(self, size: int) -> None:
        """Nothing: each seat follows for itself, when it is told the size."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(self, WithVocabulary) and name == self.lora_counted[0]):
            return self._set(name, value)
        seats = [*self.lora_seats.values()]  # which follow, or refuse
        with undo_on_error([self, *seats], [seat.lora_magnitude for seat in seats if seat.use_dora]) as undo, undo:
            self._set(name, value)

    def _set(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "__class__":
            return
        plain = not isinstance(value, (Tensor, nn.Module))
        for seat in self.lora_seats.values():
            if name == "weight" or name.startswith(PARAMETERS):
                self.lora_stacks.drop()
                seat._merged = seat._squares = seat._norms = None
                seat._subclassed |= isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter)
            elif plain and name not in _KEPT:
                setattr(seat, name, value)
        if self.lora_seats and name != "training":
            self.lora_bank.traced_version += 1

    def train(self, mode: bool = True) -> Banked:
        super().train(mode)
        for seat in self.lora_seats.values() if mode else ():
            seat._merged = None
        if mode:
            self.lora_stacks.drop()
        return self

    def lora_applied(self, fn: Any) -> Any:
        self.lora_stacks.drop()
        for seat in self.lora_seats.values():
            seat._merged = seat._squares = seat._norms = seat._checked = None
        self.lora_bank.traced_version += 1
        return super().lora_applied(fn)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.lora_bank.traced_layers[self] = None

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError("nn.DataParallel cannot replicate a bank of adapters; use DistributedDataParallel.")

    def lora_repr(self) -> str:
        seats = [f"{name} (r={seat.r})" for name, seat in self.lora_seats.items()]
        return f"adapters: {some(seats, len(seats))}"

    def lora_remove(self, restore_layout: bool = True) -> None:
        for own, _ in [*self.lora_parameters()]:
            del self._parameters[own]
        for name in _STATE:
            vars(self).pop(name, None)
        super().lora_remove(restore_layout)


# What is the layer's own, and not its seats'.
_KEPT = frozenset(
    (*_STATE, "r", "lora_place", "lora_injected", "lora_disabled", "_merged", "_squares", "_norms", "_checked")
) | {"_subclassed", "_in_place"}


def _update(choice: Choice, name: str, seat: Any) -> Update | None:
    """What the adapter of this name adds, by its seat; None where the layer has none of it."""
    if seat is None:
        return None
    A, B = seat.lora_factors()
    dropout = seat.lora_dropout if seat.training else 0.0
    return Update(A, B, seat.lora_scaling, dropout, seat.lora_slices(), choice.adapters.known[name].next)


def _with_rows(y: Tensor, rows: Rows, lead: int, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Tensor:
    """y, out of place, with what functions make of the rows of some adapters in their place.

    Args:
        y: whose first `lead` dimensions are rows.
        rows: which adapter they have.
        lead: how many dimensions.
        changes: the functions, by the adapters.
    """
    flat = y.reshape(rows.count, *y.shape[lead:])
    views = rows.views(rows.parts, flat, rows.gather(flat))
    made = [changes.get(part.adapter, _same)(view) for part, view in zip(rows.parts, views, strict=True)]
    return rows.replaced(rows.parts, flat, made).view(y.shape)


def _added(seat: Any, seeds: Seeds, x: Tensor, y: Tensor) -> Tensor:
    """The base's output of an adapter's rows, and its update for these."""
    y = seat.lora_beside(x, y, seeds.next)
    return seat.lora_magnified(y) if seat.use_dora else y


def _same(y: Tensor) -> Tensor:
    return y
