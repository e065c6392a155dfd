"""nn.MultiheadAttention in PEFT's format: LoRA in all of its projections, with one rank and one scaling.

PEFT adapts the module as a whole. What it adds to `in_proj_weight` bears the name of the module itself, what it adds to
`out_proj` that of a layer within; one configuration is for both, and neither is there without the other. Up to 0.21 it
adds the update of `out_proj` twice, in each forward and when it merges (its pull request 3774): s · B A in its file
means 2 s · B A there.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from lora.adapters.adapter import Adapter, Form
from lora.errors import join, short
from lora.functional.fused import exact_dtype
from lora.models.blocks import padded

_IN, _OUT, _PLACE_OF_OUT = "in_proj_weight", "out_proj", ".base_layer.out_proj"
#: How often PEFT adds the update of `out_proj`.
TIMES = 2
_TWICE_UP_TO = 0, 21
_OF_OTHER_WIDTHS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


# ---- writing --------------------------------------------------------------------------------------------------------


def attention_in(adapter: Adapter) -> dict[str, list[str]]:
    """The modules whose projections an adapter adapts, each with the names of what is adapted there."""
    known = {*adapter.rest, *adapter.modules, *adapter.trained_in_full}
    found: dict[str, list[str]] = {}
    for name in adapter.modules:
        owner, _, own = name.rpartition(".")
        if own == _IN or (own == _OUT and any(join(owner, other) in known for other in (_IN, *_OF_OTHER_WIDTHS))):
            found.setdefault(owner, []).append(name)
    return found


def attention_problems(adapter: Adapter) -> Iterator[str]:
    """Why PEFT cannot adapt these as they are adapted here."""
    known = {*adapter.rest, *adapter.modules, *adapter.trained_in_full}
    for owner, names in attention_in(adapter).items():
        if not owner:
            yield "the model is itself the attention that is adapted: PEFT adapts modules within a model."
        if any(join(owner, other) in known for other in _OF_OTHER_WIDTHS):
            yield (
                f"{', '.join(names)}: PEFT adapts no attention whose keys or values have a width of their own (`kdim`, "
                "`vdim`)."
            )
        for name in names:
            if adapter.modules[name].use_dora:
                yield f"{name}: PEFT has no DoRA for attention."


def placed(forms: Mapping[str, Form], attention: Mapping[str, list[str]]) -> dict[str, Form]:
    """The same by the names that PEFT gives them: of each module both projections, at one rank and one scaling."""
    owners = {name: owner for owner, names in attention.items() for name in names}
    at: dict[str, Form] = {}
    for name, form in forms.items():
        if name not in owners:
            at[name] = form
        elif owners[name] not in at:
            owner = owners[name]
            both = [forms.get(join(owner, own)) for own in (_IN, _OUT)]
            at |= dict(zip((owner, f"{owner}{_PLACE_OF_OUT}"), _alike(*both), strict=True))
    return at


def _alike(first: Form | None, second: Form | None) -> list[Form]:
    """The forms of `in_proj_weight` and `out_proj` at one rank and scaling; zeros for what is not there."""
    most, A, B = max((form for form in (first, second) if form is not None), key=lambda form: form[0].r)
    width, made = A.shape[1], []
    for form, times, added in ((first, 3, 1), (second, 1, TIMES)):
        settings, its_A, its_B = form or (most, A.new_zeros(0, width), B.new_zeros(times * width, 0))
        factor = settings.scaling / most.scaling / added
        if math.frexp(factor)[0] != 0.5:  # no power of two, by which nothing is rounded
            its_B = its_B.to(exact_dtype(its_B.dtype))
        its_B, its_A = padded(its_B * factor, its_A, most.r)
        made.append((replace(most, base=replace(most.base, parameter=False)), its_A, its_B))
    return made


def is_follower(place: str) -> bool:
    """Whether PEFT adapts what it calls so because it adapts what is around it."""
    return place.endswith(_PLACE_OF_OUT)


def place_in(name: str, forms: Mapping[str, Form]) -> str:
    """What PEFT calls a module, for which there may be a place in attention."""
    place = f"{name.removesuffix(f'.{_OUT}')}{_PLACE_OF_OUT}"
    return place if place in forms and name.endswith(f".{_OUT}") else name


# ---- reading --------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """What one of PEFT's names stands for.

    Attributes:
        name: the name of the layer, or of the parameter.
        by: the name that PEFT's settings are given to.
        parameter: whether it is a parameter.
        times: how often PEFT adds the update.
    """

    name: str
    by: str
    parameter: bool = False
    times: int = 1


def attention_among(places: Iterable[str], version: object) -> dict[str, Place]:
    """What those of PEFT's names stand for that are of attention, in a file that this version has written."""
    known, found = {*places}, dict[str, Place]()
    newer = isinstance(version, str) and _number(version) > _TWICE_UP_TO
    for place in known:
        owner = place.removesuffix(_PLACE_OF_OUT)
        if owner != place and owner in known:
            found[owner] = Place(join(owner, _IN), owner, parameter=True)
            found[place] = Place(join(owner, _OUT), owner, times=1 if newer else TIMES)
    if found and newer:
        warnings.warn(
            f"PEFT {short(version)} has written LoRA of nn.MultiheadAttention, and is newer than what is known here. "
            f"Up to {'.'.join(map(str, _TWICE_UP_TO))}, PEFT adds the update of `out_proj` twice; this one is taken "
            "to add it once. Compare its outputs with these.",
            stacklevel=2,
        )
    return found


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:2])
