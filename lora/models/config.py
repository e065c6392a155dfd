"""What to adapt and how, in PEFT's words, and which modules of a model these words mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
import torch.nn as nn

from lora.errors import Problems, did_you_mean, last_parts, short
from lora.layers.linear import LinearLoRA
from lora.layers.parts import Part
from lora.layers.registry import kind_for
from lora.layers.settings import settings_problems
from lora.layers.starts import Init, init_problem
from lora.models.model import Memory, Names, is_lazy, owned_tensors, unwrapped
from lora.models.parameters import find_parameters, known_by, once, within
from lora.models.patterns import Patterns, at_end, ends_of, is_plain
from lora.models.peft_words import in_layers, layer_expressions, layers_problems, takes_peft_words, tell_of_layout
from lora.models.training import BIAS_CHOICES

#: PEFT's task types, each with the ends of the names of the heads that it trains in full, as PEFT finds them.
HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
}

# The fields that map patterns to values, each with an example.
_BY_PATTERN = {
    "rank_pattern": "{'qkv_proj': 16}",
    "alpha_pattern": "{'qkv_proj': 32}",
    "splits": "{'qkv_proj': (64, 16, 16)}",
    "enable_lora": "{'qkv_proj': (True, False, True)}",
}
# Those of them that may name a module for what it keeps for itself.
_BY_MODULE = ("rank_pattern", "alpha_pattern")

_FLAGS = ("fan_in_fan_out", "inference_mode", "use_rslora", "use_dora", "freeze_A", "factored", "merge_weights")
_MOST_HINTS = 10  # for one field


@takes_peft_words
@dataclass(kw_only=True)
class LoraConfig:
    """What `lora.inject` is to do. The fields are PEFT's, with PEFT's meanings and defaults, and a few more.

    All words of PEFT's configuration are taken: ``lora.LoraConfig(**config.to_dict())`` is one of PEFT's. A word that
    means nothing here is an error that says what to do, unless it asks for nothing.

    A *name* matches a module whose full name equals it or ends with a dot and it (`"q_proj"`, `"self_attn.q_proj"`). A
    *pattern* is a name that may be a regular expression (`r"layers\\.[01]\\..*"`); the first that matches is used.

    Args:
        r: rank of the updates. Default: 8.
        lora_alpha: numerator of the scaling lora_alpha / r. Default: 8, as in PEFT; layers that are constructed start
            from loralib's 1.
        lora_dropout: probability of dropping an input feature on the LoRA path. Default: 0.
        target_modules: names of the modules to adapt; or one string, a regular expression that must match a full name
            entirely; or "all-linear", every linear layer but the output embedding, routers, and those that cannot be
            adapted, which the report lists with the reason. Of `nn.MultiheadAttention` all projections are adapted, of
            recurrent layers all matrices.
        target_parameters: names of parameters to adapt that a module keeps for itself and no layer has, such as a
            mixture's experts ("experts.gate_up_proj", a stack of matrices), as in PEFT; with dropout and DoRA, which
            PEFT has not. Default: None.
        exclude_modules: names, or one regular expression, of modules to leave alone. Default: None.
        layers_to_transform: the numbers of the layers, one or a list, that targets must be in, unless they are named in
            full; not with a regular expression in `target_modules`. Default: None, all layers.
        layers_pattern: the names of the lists in which `layers_to_transform` counts: "h", "layers". Default: None, the
            first number in a module's name with two names before it ("model.layers.3.q_proj").
        rank_pattern: r for modules that match a pattern. Default: {}.
        alpha_pattern: lora_alpha for modules that match a pattern. Default: {}.
        modules_to_save: names of modules to train in full and to save with the adapter. Default: None.
        bias: biases to train: "none", "all" or "lora_only". Default: "none".
        fan_in_fan_out: how a layer stores its weight is known from its class; said of other layers, a warning.
            Default: False.
        inference_mode: let nothing train. Default: False.
        use_rslora: scale by lora_alpha / √r (arXiv:2312.03732). Default: False.
        use_dora: train a magnitude for each output (arXiv:2402.09353; `lora.Linear`). Default: False.
        freeze_A: leave lora_A as it starts (LoRA-FA, arXiv:2308.03303; `lora.mark_only_lora_as_trainable`).
            Default: False.
        init_lora_weights: how A and B start: a bool, a name, or a function of a layer (`lora.initialize`). Some ways
            change the base weights, so that W₀ + s · B A stays as it was. Default: True.
        task_type: one of PEFT's. The head of the task, which no pretrained file holds, is trained and saved like
            `modules_to_save`: for "SEQ_CLS" and "TOKEN_CLS" the modules whose names end in "classifier" or "score"
            (DistilBert's "pre_classifier", too), for "QUESTION_ANS" those that end in "qa_outputs". "CAUSAL_LM",
            "SEQ_2_SEQ_LM" and "FEATURE_EXTRACTION" train nothing more. Default: None.
        splits: for fused projections, the sizes of the parts by pattern: {"qkv_proj": (576, 192, 192)}. Default: {}.
        enable_lora: which splits to adapt, by pattern. Default: {}, all of them.
        factored: A and B of a convolution are two convolutions, as in PEFT (see `lora.Conv2d`). Default: True; layers
            that are constructed keep loralib's form, so that loralib's code and files go on working.
        merge_weights: serve `eval()` from merged weights. Default: False, since each layer then keeps a copy of its
            weight; layers that are constructed have loralib's default, True.
        adapter_dtype: dtype of A and B. Default: None, the weight's, but at least float32. A model that is cast later
            takes A and B along, except to dtypes of less than 16 bits (float8): weights are only stored in these, and
            whatever trains in a LoRA layer, biases too, keeps its dtype. Modules that train in full
            (`modules_to_save`) and biases of other layers are cast as torch casts them.

    Raises:
        ValueError: a value is out of range; the error lists all of them.

    >>> import lora
    >>> config = lora.LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"layers.0.q_proj": 8})
    >>> config.r
    4
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] | None = None
    bias: str = "none"
    fan_in_fan_out: bool = False
    inference_mode: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    freeze_A: bool = False
    init_lora_weights: Init = True
    task_type: str | None = None
    splits: Mapping[str, Sequence[int]] = field(default_factory=dict)
    enable_lora: Mapping[str, bool | Sequence[bool | int]] = field(default_factory=dict)
    factored: bool = True
    merge_weights: bool = False
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        with Problems("LoraConfig: a value is not valid") as problems:
            for option in _BY_PATTERN:
                if getattr(self, option) is None:  # as PEFT takes it
                    setattr(self, option, {})
            problems.add(*self._type_problems())
            problems.raise_any()
            if self.task_type is not None:  # a plain string, where PEFT's enum was given
                self.task_type = next(name for name in HEADS if name == self.task_type)
            problems.add(*dict.fromkeys(self._value_problems()))

    def _type_problems(self) -> Iterator[str]:
        for option in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
            value = getattr(self, option)
            if not (value is None or isinstance(value, str) or _are_names(value)):
                yield f"`{option}` must be a list of names, got {short(value)}."
        for option in ("modules_to_save", "target_parameters"):
            if isinstance(getattr(self, option), str):
                yield f"`{option}` must be a list of names, got the string {short(getattr(self, option))}."
        for option in _BY_PATTERN:
            value = getattr(self, option)
            if not isinstance(value, Mapping) or not _are_names(list(value)):
                yield f"`{option}` must map patterns to values, for example {_BY_PATTERN[option]}; got {short(value)}."
        yield from filter(None, [init_problem(self.init_lora_weights)])
        yield from layers_problems(self)
        for option in _FLAGS:
            if not isinstance(getattr(self, option), bool):
                yield f"`{option}` must be True or False, got {short(getattr(self, option))}."
        if self.task_type is not None and self.task_type not in (*HEADS,):
            yield f"`task_type` must be one of {', '.join(map(repr, HEADS))}, got {short(self.task_type)}."
        dtype = self.adapter_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            yield f"`adapter_dtype` must be a floating-point torch.dtype, got {short(dtype)}."

    def _value_problems(self) -> Iterator[str]:
        for r in (self.r, *self.rank_pattern.values()):
            yield from settings_problems(r, self.lora_alpha, self.lora_dropout, self.use_rslora)
        for alpha in self.alpha_pattern.values():
            yield from settings_problems(self.r, alpha, self.lora_dropout, self.use_rslora)
        if self.r == 0 or 0 in self.rank_pattern.values():
            yield "`r` must be at least 1 to adapt a module; leave the module out of `target_modules` instead."
        if not self.target_modules and not self.target_parameters:
            yield "`target_modules` must name the modules to adapt, or be 'all-linear', where no parameters are named."
        if self.bias not in BIAS_CHOICES:
            yield f"`bias` must be one of {', '.join(map(repr, BIAS_CHOICES))}, got {short(self.bias)}."
        for given, used in self._expressions():
            try:
                re.compile(used)
            except re.error as error:
                yield f"{given!r} must be a name or a regular expression: {error}."

    def _expressions(self) -> Iterator[tuple[str, str]]:
        """Every string in the config that should be a regular expression, as it was given and as it is used."""
        yield from ((p, p) for p in (self.target_modules, self.exclude_modules) if isinstance(p, str))
        for option in _BY_PATTERN:
            yield from ((pattern, at_end(pattern)) for pattern in getattr(self, option) if not is_plain(pattern))
        yield from layer_expressions(self).items()


class Settings(TypedDict, total=False):
    """The fields of `LoraConfig` as keywords, for type checkers."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: str | Sequence[str] | None
    target_parameters: Sequence[str] | None
    exclude_modules: str | Sequence[str] | None
    layers_to_transform: int | Sequence[int] | None
    layers_pattern: str | Sequence[str] | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: Sequence[str] | None
    bias: str
    fan_in_fan_out: bool
    inference_mode: bool
    use_rslora: bool
    use_dora: bool
    freeze_A: bool
    init_lora_weights: Init
    task_type: str | None
    splits: Mapping[str, Sequence[int]]
    enable_lora: Mapping[str, bool | Sequence[bool | int]]
    factored: bool
    merge_weights: bool
    adapter_dtype: torch.dtype | None


def patterns_of(config: LoraConfig) -> dict[str, Patterns[Any]]:
    """The values that a config gives by pattern, by the names of its fields."""
    return {option: Patterns(getattr(config, option)) for option in _BY_PATTERN}


def _are_names(value: object) -> bool:
    return isinstance(value, Iterable) and all(isinstance(name, str) for name in value)


# ---- the modules that a config means -------------------------------------------------------------------------------


def find_targets(
    model: nn.Module, names: Names, config: LoraConfig, saved: Sequence[nn.Module], problems: Problems
) -> list[nn.Module]:
    """The modules to adapt; a name or pattern that matches none is a problem. "all-linear" leaves `saved` alone.

    Parts that stand for parameters are among them, and in `names` from now on.
    """
    found = len(problems.found)
    if config.target_modules == "all-linear":
        kinds = {module: kind_for(type(module)) for module in names}
        linear = [module for module, kind in kinds.items() if kind and issubclass(kind, LinearLoRA)]
        # A model within it, such as a decoder of text, may know of one that the whole does not.
        models: Any = [module for module in names if hasattr(module, "get_output_embeddings")]
        outputs = {id(one.get_output_embeddings()) for one in models}
        targets = [module for module in linear if id(module) not in outputs]
        if not targets:
            problems.add("`target_modules` 'all-linear' matches no module: there is no linear layer.")
        in_full = {part for module in saved for part in module.modules()}
        targets = [module for module in targets if module not in in_full]
    else:
        targets = _select("target_modules", config.target_modules or (), names, problems)
    excluded, _ = _matching(config.exclude_modules or (), names)
    targets = in_layers(config, [module for module in targets if module not in excluded], names, problems)
    tell_of_layout(config, targets)
    targets = once(
        [*within(targets, names, problems), *find_parameters(names, config.target_parameters or (), problems)]
    )
    excluded |= set(_select("exclude_modules", config.exclude_modules or (), names, problems))  # parts, too
    targets = [each for each in targets if each not in excluded and getattr(each, "lora_owner", None) not in excluded]
    if not targets and len(problems.found) == found:
        problems.add("`exclude_modules` and what trains in full leave no module to adapt.")
    adapted, known = {module: names[module] for module in targets}, known_by(targets, names)
    for option in _BY_PATTERN:
        problems.add(*_unused(option, getattr(config, option), known if option in _BY_MODULE else adapted))
    return targets


def find_saved(model: nn.Module, names: Names, config: LoraConfig, problems: Problems) -> list[nn.Module]:
    """The modules to train in full: those of `modules_to_save`, and the heads of the task."""
    asked = _select("modules_to_save", config.modules_to_save or (), names, problems)
    ends = HEADS.get(config.task_type or "", ())
    # As in PEFT, a name counts by how it ends, whole components or not: "pre_classifier" is as new as "classifier".
    named = [module for module, known in names.items() if any(name.endswith(ends) for name in known)]
    wanted = {*asked, *(module for module in named if [*module.parameters()])}
    if ends and not wanted:
        problems.add(_no_head(unwrapped(model), config.task_type, ends))
    return [module for module in names if module in wanted]


def check_saved(
    names: Names, config: LoraConfig, saved: Sequence[nn.Module], targets: Sequence[nn.Module], problems: Problems
) -> None:
    """Note each module that cannot train in full beside those that are to be adapted."""
    to_adapt = set(targets)
    known = {module: names[module] for module in targets if not is_lazy(module)}
    adapted = Memory(one for one in owned_tensors(known) if one.own == "weight")
    parts: dict[nn.Module, list[Part]] = {}
    for part in targets:
        if isinstance(part, Part):
            parts.setdefault(part.lora_owner, []).append(part)
    order, asked = {module: number for number, module in enumerate(names)}, {*(config.modules_to_save or ())}
    for module in saved:
        name = names[module][0]
        if is_lazy(module):
            problems.add(f"{name}: is lazy and has no values to train yet; run one forward pass first.")
            continue
        inside = {part for each in module.modules() for part in (each, *parts.get(each, ())) if part in to_adapt}
        tied = {one.module for parameter in module.parameters() for one in adapted.sharing(parameter)} - inside
        wrong = {"be adapted, or hold a module that is": inside, "share a weight with one adapted": tied}
        for hold, found in wrong.items():
            if found:
                listed = ", ".join(names[part][0] for part in sorted(found, key=order.__getitem__))
                is_asked = any(end in asked for known_as in names[module] for end in ends_of(known_as))
                whose = "a module of `modules_to_save`" if is_asked else f"the head of `task_type` {config.task_type!r}"
                problems.add(f"{name}: {whose} trains in full and cannot {hold}: {listed}.")


def _no_head(model: nn.Module, task: str | None, ends: Iterable[str]) -> str:
    body = getattr(model, "base_model", None)  # transformers' word; a model's heads are beside it
    beside = [repr(name) for name, child in model.named_children() if child is not body and [*child.parameters()]]
    hint = f" (beside the body it has {', '.join(beside)})" if beside else ""
    looked_for = " or ".join(map(repr, ends))
    return (
        f"`task_type` {task!r} trains the head, and no module with parameters of this {type(model).__name__} has a "
        f"name that ends in {looked_for}; name the head in `modules_to_save`{hint}."
    )


def _select(option: str, targets: str | Iterable[str], names: Names, problems: Problems) -> list[nn.Module]:
    """The modules that any of `targets` matches by any of their names; a target that matches none is a problem."""
    found, unmatched = _matching(targets, names)
    problems.add(*_matching_nothing(option, unmatched, names, "module"))
    return [module for module in names if module in found]


def _matching(targets: str | Iterable[str], names: Names) -> tuple[set[nn.Module], list[str]]:
    """The modules that any of these matches by any of their names, and those that match none."""
    if isinstance(targets, str):
        pattern = re.compile(targets)
        found = {module for module, known in names.items() if any(map(pattern.fullmatch, known))}
        return found, [] if found else [targets]
    ends = {module: {end for name in known for end in ends_of(name)} for module, known in names.items()}
    wanted, there = dict.fromkeys(targets), set[str]().union(*ends.values())
    found = {module for module, its in ends.items() if not its.isdisjoint(wanted)}
    return found, [target for target in wanted if target not in there]


def _unused(option: str, patterns: Mapping[str, object], adapted: Names) -> Iterator[str]:
    """A complaint for each pattern that matches no adapted module, or is never the first to."""
    if not patterns:
        return
    lookup = Patterns(patterns)
    matching = [lookup.matching(known) for known in adapted.values()]
    first, any_at_all = {numbers[0] for numbers in matching if numbers}, set[int]().union(*matching)
    given = [*patterns]
    unmatched = [pattern for number, pattern in enumerate(given) if number not in any_at_all]
    yield from _matching_nothing(option, unmatched, adapted, "adapted module")
    for number in sorted(any_at_all - first):
        yield f"`{option}` {given[number]!r} is never used: patterns before it match all its modules."


def _matching_nothing(option: str, targets: Sequence[str], names: Names, what: str) -> Iterator[str]:
    """A complaint for each of these, the first ones with hints, which take time."""
    known = last_parts(name for its in names.values() for name in its) if targets else []
    for number, target in enumerate(targets):
        hint = did_you_mean(target, known) if number < _MOST_HINTS else ""
        yield f"`{option}` {target!r} matches no {what}{hint}."
