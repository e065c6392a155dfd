"""PEFT's words in a `LoraConfig` that need more than a field: those that count layers, or mean nothing here."""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch.nn as nn

from lora.errors import Problems, is_count, short, some
from lora.layers.registry import kind_for
from lora.models.model import Names, without_wrappers

T = TypeVar("T")
Config = Any  # a LoraConfig, whose file imports this one


# ---- words that mean nothing here ----------------------------------------------------------------------------------

# Notes of PEFT's on where a configuration comes from, and values that count only beside a word below.
_NOTES = {
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    "megatron_core",
    "qalora_group_size",
}
# Words that ask for what is done in another way, or not at all: what they may say, and what to do instead.
_CALIBRATE = "`lora.calibrate` takes the data and these settings after `inject`"
#: Words under which an adapter computes something else than W₀ + s · B A.
OTHER_UPDATES = (
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("velora_config", "monteclora_config"),
)
_NOT_HERE = "leave it out: with it the adapter would compute something else than W₀ + s · B A"
_ELSEWHERE: dict[str, tuple[Sequence[object], str]] = {
    "peft_type": ((None, "LORA"), "only 'LORA' is known here"),
    "eva_config": ((None,), _CALIBRATE),
    "corda_config": ((None,), _CALIBRATE),
    "lora_ga_config": ((None,), _CALIBRATE),
    "loftq_config": ((None, {}), "`lora.loftq` takes the original weights and these settings after `inject`"),
    "megatron_config": ((None,), "`lora.parallel` has LoRA for layers that are split over devices, as DTensors"),
    "ensure_weight_tying": ((None, False), "adapt one of the layers whose weights are tied, not both"),
    "layer_replication": ((None,), "replicate the layers first, then inject"),
    "runtime_config": ((None,), "leave it out: offload the weights with the tool that trains"),
    "trainable_token_indices": ((None,), "name the embedding in `target_modules` or in `modules_to_save`"),
    "lora_bias": ((None, False), "let the layer's own bias train, by `bias='lora_only'`"),
    **dict.fromkeys(OTHER_UPDATES, ((None, False), _NOT_HERE)),
}


def takes_peft_words(cls: type[T]) -> type[T]:
    """Let a configuration take all of PEFT's words: those that ask for nothing are dropped, others say what to do."""
    made: Any = cls.__init__
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]

    @functools.wraps(made)
    def init(self: T, *args: Any, **given: Any) -> None:
        beyond = {word: given.pop(word) for word in [*given] if word not in known}
        unknown = [word for word in beyond if word not in _NOTES and word not in _ELSEWHERE]
        if unknown:
            hints = (f"{word!r}{_hint_for(word, known)}" for word in unknown)
            raise TypeError(f"{cls.__name__} has no field {some(hints, len(unknown))}.")
        with Problems(f"{cls.__name__}: a word of PEFT's has no meaning here") as problems:
            problems.add(*_problems(beyond))
        made(self, *args, **given)

    cls.__init__ = init  # type: ignore[method-assign, assignment]
    return cls


def _hint_for(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _problems(beyond: Mapping[str, object]) -> Iterator[str]:
    for word in filter(_ELSEWHERE.__contains__, beyond):
        fine, instead = _ELSEWHERE[word]
        if beyond[word] not in fine:
            yield f"`{word}` is {short(beyond[word])}; {instead}."


# ---- layers by their numbers ---------------------------------------------------------------------------------------

# The first number in a name that stands behind two others, as PEFT takes it for the layer's.
_NUMBERED = r".*?\.[^.]*\.(?P<number>\d+)\."


def layers_problems(config: Config) -> Iterator[str]:
    """What is wrong with the values of `layers_to_transform` and `layers_pattern`."""
    layers, patterns = config.layers_to_transform, config.layers_pattern
    if layers is not None and not is_count(layers) and not _is_list_of(layers, is_count):
        yield f"`layers_to_transform` must be the number of a layer, or a list of them, got {short(layers)}."
    if not (patterns is None or isinstance(patterns, str) or _is_list_of(patterns, _is_name)):
        yield f"`layers_pattern` must be a name, or a list of names, got {short(patterns)}."
    elif patterns and layers is None:
        yield "`layers_pattern` says where `layers_to_transform` counts, which is not given."
    if layers is not None and isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        yield "`layers_to_transform` goes with names; a regular expression in `target_modules` says the layers itself."


def _is_list_of(value: object, is_one: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset, range)) and all(map(is_one, value))


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def layer_expressions(config: Config) -> dict[str, str]:
    """The regular expression that finds a layer's number in a name, for each of `layers_pattern`."""
    patterns = config.layers_pattern or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return {pattern: rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\." for pattern in patterns}


def in_layers(config: Config, targets: list[nn.Module], names: Names, problems: Problems) -> list[nn.Module]:
    """Of these modules those in the layers of `layers_to_transform`, and those that `target_modules` names in full."""
    said = config.layers_to_transform
    wanted = {said} if isinstance(said, int) else {*(said or ())}
    if not wanted or not targets:
        return targets
    expressions = {pattern: re.compile(used) for pattern, used in layer_expressions(config).items()}
    in_full = set() if isinstance(config.target_modules, str) else {*config.target_modules}
    kept, there, unused = list[nn.Module](), set[int](), {*expressions}
    for module in targets:
        known = [*map(without_wrappers, names[module])]
        numbers = {number for name in known if (number := _number_in(name, expressions, unused)) is not None}
        there |= numbers
        if numbers & wanted or not in_full.isdisjoint(known):
            kept.append(module)
    for pattern in filter(unused.__contains__, expressions):
        problems.add(f"`layers_pattern` {pattern!r} matches no target.")
    missing = sorted(wanted - there)
    if missing and not (unused and not there):
        listed = some(map(str, missing), len(missing))
        problems.add(
            f"`layers_to_transform` {listed}: no target is in {_layers(missing)}{_hint(there, names[targets[0]][0])}."
        )
    return kept


def _number_in(name: str, expressions: Mapping[str, re.Pattern[str]], unused: set[str]) -> int | None:
    """The number of the layer that a module of this name is in; None where there is none."""
    if not expressions:
        found = re.match(_NUMBERED, name)
    else:
        matches = {pattern: match for pattern, each in expressions.items() if (match := each.match(name))}
        unused.difference_update(matches)
        found = next(iter(matches.values()), None)
    return int(found["number"]) if found else None


def _layers(numbers: Sequence[int]) -> str:
    return "a layer of this number" if len(numbers) == 1 else "layers of these numbers"


def _hint(there: set[int], example: str) -> str:
    if there:
        return f" (they are in {some(map(str, sorted(there)), len(there))})"
    return f" ({example!r} has no number after two names; name the list that holds the layers in `layers_pattern`)"


# ---- what a layer's class says -------------------------------------------------------------------------------------


def tell_of_layout(config: Config, targets: Sequence[nn.Module]) -> None:
    """Warn, as PEFT does, where `fan_in_fan_out` is said of layers none of which stores its weight so."""
    if config.fan_in_fan_out and targets and not any(map(_is_transposed, targets)):
        warnings.warn(
            "`fan_in_fan_out` is True, but no adapted layer stores its weight as (in_features, out_features). It "
            "changes nothing: a layer's class says how its weight is stored.",
            stacklevel=4,
        )


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "fan_in_fan_out", getattr(kind_for(type(module)), "fan_in_fan_out", False)))
