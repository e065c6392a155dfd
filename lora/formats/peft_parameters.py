"""PEFT's `target_parameters`: how its files name and pack adapters of parameters that are no layers' weights.

PEFT wraps a module once for each of its parameters that are adapted, in the order in which it has them. So of three
parameters the first has `<module>.base_layer.base_layer` for its name there, and the last `<module>`. Of a stack of E
matrices it packs A (E, r, in) as (E · r, in), expert by expert, and B (E, out, r) as (out, r · E), in which the expert
counts fastest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lora.adapters.adapter import Adapter, Form, ModuleAdapter
from lora.adapters.base import Base
from lora.errors import Problems, is_count, join, short
from lora.formats.peft_attention import Place
from lora.layers.settings import scaling_of
from lora.models.patterns import ends_of

_WRAPPER = ".base_layer"
# The orders in which mixtures of experts have them, torch's attention, and a layer of torch's recurrent ones.
_ORDERS = (
    ("gate_up_proj", "gate_proj", "up_proj", "down_proj"),
    ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ("weight_ih", "weight_hh", "weight_hr"),
)
_OF_A_LAYER = re.compile(r"(weight_[ih][hr])(?:_l(\d{1,9}))?(_reverse)?")
# unsloth's word in the configuration for how B is packed, and what it says: as in PEFT, or expert by expert.
LAYOUT = "lora_B_layout"
_AS_PEFT, _BY_EXPERT = "rank_major", "grouped_by_expert"


# ---- writing --------------------------------------------------------------------------------------------------------


def parameters_of(adapter: Adapter, attention: Mapping[str, Iterable[str]]) -> dict[str, ModuleAdapter]:
    """The parameters that an adapter adapts, but for those of attention, which PEFT adapts by name."""
    attentive = {name for names in attention.values() for name in names}
    return {
        name: settings
        for name, settings in adapter.modules.items()
        if settings.base.parameter and name not in attentive
    }


def names_in_file(parameters: Iterable[str]) -> dict[str, str]:
    """What PEFT calls parameters in its weights, by their own names."""
    of_owner: dict[str, list[str]] = {}
    for name in parameters:
        of_owner.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: owner + _WRAPPER * (len(names) - 1 - n)
        for owner, names in of_owner.items()
        for n, name in enumerate(_in_order(names) or names)
    }


def parameter_problems(parameters: Mapping[str, ModuleAdapter], names: Iterable[str]) -> Iterator[str]:
    """What PEFT cannot do to parameters, in a model whose modules have these names."""
    owners = {name.rpartition(".")[0]: name for name in parameters}
    yield from (f"{name}: PEFT has no DoRA for parameters." for name, about in parameters.items() if about.use_dora)
    if "" in owners:
        yield f"{owners['']}: PEFT adapts no parameters of the model itself, only of modules within it."
    for other in names if owners else ():
        if other not in owners:
            yield from (
                f"{owners[end]}: PEFT would adapt the parameter of {other}, too, whose name ends alike."
                for end in ends_of(other)
                if end in owners
            )


def packed(settings: ModuleAdapter, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B as PEFT has them."""
    if settings.base.kind != "stack":
        return A, B
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)  # (E · r, in), (out, r · E)


# ---- reading --------------------------------------------------------------------------------------------------------


def config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a configuration's words on parameters."""
    wanted = config.get("target_parameters") or []
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        yield f"`target_parameters` must be a list of names, got {short(wanted)}."
    layout = config.get(LAYOUT)
    if layout not in (None, _AS_PEFT, _BY_EXPERT):
        yield f"`{LAYOUT}` must be {_AS_PEFT!r} or {_BY_EXPERT!r}, got {short(layout)}."


def parameters_in(
    config: Mapping[str, Any], names: Iterable[str], noted: Iterable[str], problems: Problems
) -> dict[str, Place]:
    """Which of the names in a file are those of parameters, and which parameters they are.

    Args:
        config: PEFT's.
        names: of all that has an A and a B in the file.
        noted: names that lora has written beside them, in their order.
        problems: where to put what cannot be told.
    """
    wanted: dict[str, list[str]] = {}
    for target in config.get("target_parameters") or ():
        owner, _, own = target.rpartition(".")
        wanted.setdefault(owner, []).append(own)
    depths: dict[str, int] = {}
    for name in names:
        owner = name
        while owner.endswith(_WRAPPER):
            owner = owner.removesuffix(_WRAPPER)
        depths[owner] = depths.get(owner, 0) + 1
    order = list(noted)
    found: dict[str, Place] = {}
    for owner, depth in depths.items():
        own = {join(owner, own): None for end in ("", *ends_of(owner)) for own in wanted.get(end, ())}
        if not own:
            continue
        known = [name for name in order if name in own]
        sure = known if len(known) == depth else _in_order(own)
        if len(own) != depth:
            problems.add(
                f"{owner}: `target_parameters` names {len(own)} parameters of it ({', '.join(own)}), and there are "
                f"{depth} pairs of A and B."
            )
        elif sure is None:
            problems.add(
                f"{owner}: which pair of A and B belongs to which of {', '.join(own)} only PEFT's model says, where "
                "it depends on the order in which its module has them."
            )
        else:
            places = (Place(name, name, parameter=True) for name in sure)
            found |= {owner + _WRAPPER * (depth - 1 - n): place for n, place in enumerate(places)}
    return found


def unpacked(config: Mapping[str, Any], r: int, lora_alpha: float, A: Tensor, B: Tensor) -> Form:
    """The adapter of a parameter: of a matrix, or of a stack of them; ValueError where that cannot be told."""
    if A.dim() != 2 or B.dim() != 2 or 0 in (*A.shape, *B.shape):
        raise ValueError(f"lora_A and lora_B must be two matrices, got {(*A.shape,)} and {(*B.shape,)}.")
    count, rest = divmod(A.shape[0], r) if is_count(r, 1) else (0, 1)
    if rest or B.shape[1] != A.shape[0]:
        raise ValueError(f"the shapes {(*A.shape,)} and {(*B.shape,)} do not fit r = {r} in the configuration.")
    use_rslora = config.get("use_rslora") or False
    settings = ModuleAdapter(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=config.get("lora_dropout") or 0.0,
        use_rslora=use_rslora,
        use_dora=False,
        scaling=scaling_of(lora_alpha, r, use_rslora),
        base=Base(kind="linear", parameter=True),
    )
    if count == 1:
        return settings, A, B
    layout, mapping = config.get(LAYOUT), config.get("auto_mapping")
    if layout is None and r > 1 and isinstance(mapping, dict) and mapping.get("unsloth_fixed"):
        raise ValueError(
            "unsloth wrote it, which until September 2026 packed lora_B of experts otherwise than PEFT, and the "
            f"numbers do not say which way: set {LAYOUT!r} in the configuration to {_BY_EXPERT!r} if it was trained by "
            f"such a version, or else to {_AS_PEFT!r}."
        )
    if layout == _BY_EXPERT:
        stack = B.reshape(-1, count, r).transpose(0, 1)  # (E, out, r)
    else:
        stack = B.reshape(-1, r, count).permute(2, 0, 1)
    base = replace(settings.base, kind="stack", fan_in_fan_out=None)
    return replace(settings, base=base), A.reshape(count, r, -1), stack.contiguous()


def _in_order(names: Iterable[str]) -> list[str] | None:
    """Parameters of one module in the order in which modules have them; None if that is not known."""
    by_name = {name: _place(name.rpartition(".")[2]) for name in names}
    places = [*by_name.values()]
    if len(places) > 1 and (None in places or len({place[0] for place in places if place}) > 1):
        return None
    return sorted(by_name, key=lambda name: by_name[name] or ())


def _place(own: str) -> tuple[int, ...] | None:
    """Which order a parameter of this name is in, and where."""
    layer, direction = 0, 0
    if of_layer := _OF_A_LAYER.fullmatch(own):
        own, layer, direction = of_layer[1], int(of_layer[2] or 0), len(of_layer[3] or "")
    for number, order in enumerate(_ORDERS):
        if own in order:
            return number, layer, direction, order.index(own)
    return None
