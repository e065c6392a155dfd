"""What a compiler sees of a bank: tensors, which blocks and adapters exchange, in the place of names and numbers.

    y = W₀ x + b + where(i = k, s_k · B_k A_k drop_k(x), 0)        for each slot k; i is the slot of the row

To `torch.compile` an attribute, a number or a key of a dict is a constant, and what it makes holds for this one alone;
a context variable it cannot read at all. A tensor is an input. So a layer has *slots*, each for one adapter, and
tensors which say the slot of each row, and scaling and dropout of each slot. They are filled when a block is entered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lora.functional.fused import exact_dtype, spread
from lora.layers.conv import ConvLoRA
from lora.layers.embedding import EmbeddingLoRA
from lora.layers.in_place import twin_of
from lora.layers.layer import LoRALayer
from lora.layers.linear import LinearLoRA
from lora.layers.registry import class_for

# What `Slot.lora_numbers` holds.
_SCALING, _DROPOUT, _MAGNIFIES = range(3)


class Slot(LoRALayer):
    """In front of the class of a seat: a twin of a seat, of which a compiler cannot tell whose it is.

    Attributes:
        lora_numbers: scaling, dropout, and 1 for magnitudes that count; zeros where no adapter is.
    """

    lora_base_class = LoRALayer

    lora_numbers: Tensor

    def lora_drop(self, input: Tensor) -> Tensor:
        return input  # the layer has dropped what is to be dropped

    def lora_read_scaling(self) -> float | Tensor:
        return self.lora_numbers[_SCALING]


class Slots:
    """A layer's slots, and which rows have them.

    Attributes:
        per: for what `ids` are: "all" rows, each "row", each "token"; or "", where no block is open.
        flattened, in_step: as `Choice.flattened` and `Choice.everyone`.
        ids: the number of each row's adapter. One more than there are is none.
        index: the place in `present` of each number; one more than there are for adapters that are not in this layer.
        present: the slots that a forward computes with: twins of seats, or spare ones in their places.
        stacks: whether all slots may be one stack of matrices.
        drops, magnifies: whether there was ever an adapter with dropout here, or with magnitudes.
    """

    per: str = ""
    flattened: bool = False
    in_step: bool = False
    ids: Tensor
    index: Tensor
    stacks: bool = False
    drops: bool = False
    magnifies: bool = False

    def __init__(self) -> None:
        self.present: Sequence[Any] = ()
        self.told: tuple[Any, ...] = ()  # what the rest was made for: the bank's adapters, version and room first
        self.seats: dict[str, Any] = {}  # by name, in the bank's order
        self.forms: dict[str, Any] = {}  # of the seats
        self.twins: dict[str, Any] = {}  # of seats
        self.spares: dict[Any, list[Any]] = {}  # by the form, or without room by the name

    def like(self, form: tuple[Any, ...]) -> Any:
        """A seat, or a spare slot, of this form."""
        return self.spares[form][0] if self.spares[form] else self.seats[form[0]]

    def __reduce__(self) -> tuple[type[Slots], tuple[()]]:
        return Slots, ()  # they are filled in the next block


# ---- the forward -----------------------------------------------------------------------------------------------------


def traced_forward(layer: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer's forward as a compiler follows it: with each row's own adapter, whichever that will be."""
    if layer.lora_is_in_place():
        raise RuntimeError(
            f"{layer.lora_name}: {type(layer).__name__} has a forward of its own, which computes with one adapter at a "
            "time and cannot be compiled with a bank of them; without `fullgraph=True` the rest of the model is."
        )
    if "parametrizations" in layer._modules:
        raise RuntimeError(
            f"{layer.lora_name}: has a parametrization, and cannot be compiled with a bank of adapters; without "
            "`fullgraph=True` the rest of the model is."
        )
    y: Tensor = layer.lora_base_forward(input, *args, **kwargs)
    if layer.lora_disabled is not None:
        return y
    layer.lora_bank.watch()
    slots: Slots = layer.lora_slots
    if slots.in_step:
        raise RuntimeError(f"{layer.lora_name}: is sharded by FSDP2, and cannot be compiled with a bank of adapters.")
    where = slots.index.index_select(0, slots.ids.reshape(-1)).view(slots.ids.shape)
    if slots.per != "all":
        where = _fitted(layer, slots, where, input)
    if slots.stacks and len(slots.present) > 1 and where.dim() < 2:
        y = _plus_stacked(layer, slots, input, where, y)
    else:
        y = _plus_each(layer, slots, input, where, y)
    return _magnified(slots, where, y) if slots.magnifies else y


def _fitted(layer: Any, slots: Slots, where: Tensor, input: Tensor) -> Tensor:
    """The slots of rows, in the shape of the first dimensions of a layer's input; ValueError if they cannot be."""
    if layer.lora_routed:
        raise RuntimeError(
            f"{layer.lora_name}: is given tokens that a router chose, and a compiler cannot tell whether all rows have "
            "one adapter; use `bank.use(name)` here, with a batch for each adapter."
        )
    lead = input.dim() - (not isinstance(layer, EmbeddingLoRA))
    if isinstance(layer, ConvLoRA):
        lead = int(input.dim() == layer.weight.dim())
    shape, count = input.shape[:lead], where.numel()
    known = [where]
    if (layer.lora_places or layer.lora_turned) and slots.per == "row" and lead:
        layer.lora_check_sizes(count, shape)
    if slots.per == "token":  # they may be flattened, or packed into one row
        known += [where.view(1, -1), where.flatten()]
    for fitted in known:
        dims = fitted.dim()
        if dims <= lead and all(shape[dim] == fitted.shape[dim] for dim in range(dims)):
            return fitted
    if slots.flattened and lead and shape[0] % count == 0 and not (lead > 1 and shape[1] == count):
        return where.flatten().repeat_interleave(shape[0] // count)
    raise ValueError(
        f"{layer.lora_name}: the input of this layer has not as many rows as the bank was given adapters for. Where a "
        "model flattens its tokens or packs sequences, say the adapter of each token, with `bank.rows(names, "
        'per="token")`, or that they stand row by row, with `bank.rows(names, flattened=True)`; `bank.use(name)` is '
        "for one adapter in all rows."
    )


def _plus_each(layer: Any, slots: Slots, input: Tensor, where: Tensor, y: Tensor) -> Tensor:
    """y and what each slot adds in turn, to its own rows: those of others are zeros to it, there and back."""
    for k, slot in enumerate(slots.present):
        x, on = input, where == k
        if slots.per != "all" and x.is_floating_point():
            x = torch.where(_beside(on, x), x, 0)
        if slots.drops and layer.training:
            x = _dropped(x, slot.lora_numbers[_DROPOUT])
        update = slot.lora_update(x, slot.lora_numbers[_SCALING]).to(y.dtype)
        y = y + torch.where(_beside(on, y), update, 0)
    return y


def _plus_stacked(layer: Any, slots: Slots, input: Tensor, where: Tensor, y: Tensor) -> Tensor:
    """y and what the slots add, with a matrix for each row out of the stack of all: the row's own, or one of zeros."""
    first = slots.present[0]
    pieces = first.lora_slices()
    where = where.reshape(-1)  # (n), or (1) for one adapter in all rows
    n = where.shape[0]
    x = input.reshape(n, -1, input.shape[-1])  # (n, tokens, in_features)
    numbers = torch.stack([*(slot.lora_numbers for slot in slots.present), torch.zeros_like(first.lora_numbers)])
    numbers = numbers.index_select(0, where)[:, :, None, None]  # (n, 3, 1, 1)
    if slots.drops and layer.training:
        x = _dropped(x, numbers[:, _DROPOUT])
    q = max(slot.lora_block_rank() for slot in slots.present)
    As = [slot.lora_A.to(x.dtype).view(len(pieces), -1, x.shape[-1]) for slot in slots.present]
    As = [F.pad(A, (0, 0, 0, q - A.shape[1])) for A in As]  # (slices, q, in_features) each
    Bs = [F.pad(slot.lora_B, (0, q - slot.lora_B.shape[1])) for slot in slots.present]  # (outputs, q) each
    A = torch.stack([*As, torch.zeros_like(As[0])]).index_select(0, where)  # (n, slices, q, in_features)
    B = torch.stack([*Bs, torch.zeros_like(Bs[0])]).index_select(0, where)  # (n, outputs, q)
    B, left = spread(B, numbers[:, _SCALING], x.dtype)
    h = torch.bmm(x, A.flatten(1, 2).mT)  # (n, tokens, slices · q)
    updates, end, taken = [], 0, 0
    for g, (start, stop) in enumerate(pieces):
        if start > end:
            updates.append(y.new_zeros(n, x.shape[1], start - end))
        part = B[:, taken : taken + stop - start]  # (n, size, q)
        updates.append(torch.bmm(h[:, :, g * q : (g + 1) * q], part.mT) * left)
        end, taken = stop, taken + stop - start
    if y.shape[-1] > end:
        updates.append(y.new_zeros(n, x.shape[1], y.shape[-1] - end))
    update = torch.cat([part.to(y.dtype) for part in updates], -1)  # (n, tokens, out_features)
    on = (where < len(slots.present))[:, None, None]
    return y + torch.where(on, update, 0).view(y.shape)


def _magnified(slots: Slots, where: Tensor, y: Tensor) -> Tensor:
    """y, in which each row of an adapter with magnitudes is scaled by them."""
    for k, slot in enumerate(slots.present):
        on = _beside((where == k) & (slot.lora_numbers[_MAGNIFIES] != 0), y)
        # What is not its own is zeros to it: a gradient of 0 times its gain would be NaN where the gain is.
        y = torch.where(on, slot.lora_magnified(torch.where(on, y, 0)), y)
    return y


def _dropped(x: Tensor, p: Tensor) -> Tensor:
    """x with dropout of a probability in a tensor."""
    kept = torch.rand(x.shape, device=x.device) >= p
    return torch.where(kept, x / (1 - p).to(x.dtype), 0)


def _beside(on: Tensor, other: Tensor) -> Tensor:
    """A mask of first dimensions in a shape that goes with all."""
    return on.view(*on.shape, *[1] * (other.dim() - on.dim())) if on.dim() else on


# ---- filling the slots -----------------------------------------------------------------------------------------------


@torch.inference_mode(False)
@torch.no_grad()
def tell(adapters: Any, choice: Any) -> None:
    """Let the layers of a bank know the innermost open block, in the words that a compiler understands.

    Args:
        adapters: the bank's.
        choice: the block; None if none is open.
    """
    if choice is None:
        for layer in adapters.traced_layers:
            slots_of(layer).per = ""
        return
    if choice.owners is None:
        per, shape, owners, order = "all", (), (None if choice.name is None else 0,), (choice.name,)
    else:
        per, shape, owners, order = choice.per, choice.shape, choice.owners, choice.order
    room, known = adapters.room, [*adapters.known]
    size = None if room is None else 1 if per == "all" else max(room, len(order))
    count = len(known) if size is None else size
    # In one order, whatever that of the rows; what is no longer in the bank is nowhere.
    ranks = {name: n for n, name in enumerate(known if size is None else sorted(filter(None, order)))}
    numbers = [ranks.get(name, count) for name in order]
    names = {number: name for number, name in zip(numbers, order, strict=True) if name in ranks}
    values = [count if owner is None else numbers[owner] for owner in owners]
    told = adapters.known, adapters.traced_version, room, size, *names.items()
    ids: dict[torch.device, Tensor] = {}
    indices: dict[Any, Tensor] = {}
    for layer in adapters.traced_layers:
        if "parametrizations" in layer._modules:  # it is not compiled
            continue
        slots, device = slots_of(layer), layer.weight.device
        if slots.told != told:
            if slots.told[:3] != told[:3]:
                _renew(layer, slots, known, room)
            index = _place(layer, slots, names, count, size)
            if (device, index) not in indices:
                indices[device, index] = torch.tensor(index, device=device)
            # To a compiler tensors that are one must stay one, and others others.
            slots.index, slots.told = indices[device, index].detach(), told
        if device not in ids:
            ids[device] = torch.tensor(values, device=device).view(shape)
        slots.per, slots.ids, slots.flattened, slots.in_step = per, ids[device], choice.flattened, choice.everyone


def slots_of(layer: Any) -> Slots:
    """A layer's slots."""
    slots: Slots | None = vars(layer).get("lora_slots")
    if slots is None:
        slots = vars(layer)["lora_slots"] = Slots()
    return slots


def _renew(layer: Any, slots: Slots, order: Sequence[str], room: int | None) -> None:
    """Bring a layer's slots up to date with its seats; what a compiler has seen of adapters that are gone stays."""
    slots.twins = {}
    slots.seats = {name: layer.lora_seats[name] for name in order if name in layer.lora_seats}
    slots.forms = {name: (None if room else name, *_form(seat)) for name, seat in slots.seats.items()}
    slots.drops |= any(seat.lora_dropout > 0 for seat in slots.seats.values())
    magnified = slots.magnifies
    slots.magnifies |= any(seat.use_dora for seat in slots.seats.values())
    has = {*slots.forms.values()}
    like = {form[-1] for form in has}
    kept = {form for form in slots.spares if form in has or (room and (form[-1] in like or not like))}
    slots.spares = {form: slots.spares[form] for form in slots.spares if form in kept and slots.magnifies == magnified}
    for spare in (spare for spares in slots.spares.values() for spare in spares):
        spare._parameters.update({name: layer._parameters[name] for name in layer.lora_base_tensors})
    for name, form in slots.forms.items():
        if form not in slots.spares:
            slots.spares[form] = [_twin(layer, slots, slots.seats[name], is_spare=True)] if room else []
    slots.stacks = _stack([*map(slots.like, slots.spares)])


def _form(seat: Any) -> tuple[Any, ...]:
    """What adapters that have the same slots have in common."""
    own = tuple(getattr(seat, name) for name in seat.lora_settings[len(LoRALayer.lora_settings) :])
    A, B = seat.lora_A, seat.lora_B
    return type(seat), own, A.shape, B.shape, (A.dtype, B.dtype, A.device)


def _place(layer: Any, slots: Slots, names: Mapping[int, str], count: int, size: int | None) -> tuple[int, ...]:
    """Put the adapters of these names into a layer's slots; the place that each number has there.

    With room there are as many slots of each form as adapters may be in a batch; without one for each adapter.
    """
    here: dict[Any, dict[int, str]] = {}
    for number, name in names.items():
        if name in slots.seats:
            here.setdefault(slots.forms[name], {})[0 if size is None else number] = name
    present: list[Any] = []
    placed: dict[str, int] = {}
    for form, spares in slots.spares.items():
        taken = here.get(form, {})
        for n in range(size or 1):
            if n in taken:
                name = taken[n]
                placed[name] = len(present)
                twin = slots.twins.get(name)
                if twin is None:
                    twin = slots.twins[name] = _twin(layer, slots, slots.seats[name])
                present.append(twin)
            else:
                while n >= len(spares):
                    spares.append(_twin(layer, slots, slots.like(form), is_spare=True))
                present.append(spares[n])
    slots.present = present
    nowhere = len(present)
    return (*(placed.get(names.get(number, ""), nowhere) for number in range(count)), nowhere)


def _twin(layer: Any, slots: Slots, seat: Any, is_spare: bool = False) -> Any:
    """A seat as a slot; a spare one has tensors of its own, whose values nothing reads."""
    cls = type(seat) if isinstance(seat, Slot) else class_for(Slot, type(seat))
    twin = twin_of(seat, cls, {})
    own = {name: layer._parameters[name] for name in layer.lora_base_tensors}
    for name in ("lora_A", "lora_B"):
        own[name] = _spare(seat._parameters[name]) if is_spare else seat._parameters[name]
    has_magnitude = seat.use_dora and not is_spare
    if slots.magnifies:
        exact, device = exact_dtype(own["lora_A"].dtype), own["lora_A"].device
        ones = torch.ones(seat.lora_magnitudes(layer, own["lora_B"].shape), dtype=exact, device=device)
        own["lora_magnitude"] = seat._parameters["lora_magnitude"] if has_magnitude else _spare(ones)
    numbers = [0.0] * 3 if is_spare else [seat.lora_scaling, seat.lora_dropout, float(has_magnitude)]
    vars(twin).update(use_dora=slots.magnifies, lora_place=None, _parameters=own)
    dtype = exact_dtype(own["lora_A"].dtype)
    vars(twin)["lora_numbers"] = torch.tensor(numbers, dtype=dtype, device=own["lora_A"].device)
    return twin


def _spare(like: Tensor) -> nn.Parameter:
    """A Parameter that a compiler takes for another; its gradients, which are zeros, are not kept."""
    spare = nn.Parameter(torch.zeros_like(like.data))
    spare.register_post_accumulate_grad_hook(_forget)  # type: ignore[no-untyped-call]
    return spare


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _stack(slots: Sequence[Any]) -> bool:
    """Whether slots may be one stack of matrices, of whatever ranks."""
    kinds = {type(slot) for slot in slots}
    if any(getattr(kind, own, None) is not getattr(LinearLoRA, own) for kind in kinds for own in _OF_LINEAR):
        return False
    return len({(tuple(slot.lora_slices()), slot._parameters["lora_A"].dtype) for slot in slots}) == 1


# What a stack of matrices computes in the place of.
_OF_LINEAR = "lora_down", "lora_up", "lora_update", "lora_product"
