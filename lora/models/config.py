"""What to adapt and how: PEFT's words, and how they match the names of a model's modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from lora.errors import raise_all
from lora.layers.layer import settings_problems
from lora.layers.starts import Init, init_problem
from lora.models.training import BIAS_CHOICES

T = TypeVar("T")

#: PEFT's task types, each with the names of the heads that it trains in full: ends of names, as PEFT goes by them.
HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
}

_BY_PATTERN = ("rank_pattern", "alpha_pattern", "splits", "enable_lora")


@dataclass(kw_only=True)
class LoraConfig:
    """What `lora.inject` shall do. The fields are PEFT's, with PEFT's meanings and defaults, and a few more.

    A *name* matches a module whose full name is it or ends with a dot and it (`"q_proj"`, `"self_attn.q_proj"`). A
    *pattern* is a name that may be a regular expression (`r"layers\\.[01]\\..*"`); the first that matches is used.

    Args:
        r: rank of the updates. Default: 8.
        lora_alpha: numerator of the scaling lora_alpha / r. Default: 8.
        lora_dropout: probability of dropping an input feature on the LoRA path. Default: 0.
        target_modules: names of the modules to adapt; or one string, a regular expression that full names must
            match entirely; or "all-linear", every linear layer but the output embedding.
        exclude_modules: names, or one regular expression, of modules to leave alone. Default: None.
        rank_pattern: r for modules that match a pattern. Default: {}.
        alpha_pattern: lora_alpha for modules that match a pattern. Default: {}.
        modules_to_save: names of modules to train in full and to save with the adapter. Default: None.
        bias: biases to train: "none", "all" or "lora_only". Default: "none".
        use_rslora: scale by lora_alpha / √r (arXiv:2312.03732). Default: False.
        use_dora: train a magnitude for each output (arXiv:2402.09353; `lora.Linear`). Default: False.
        freeze_A: leave lora_A as it starts (LoRA-FA, arXiv:2308.03303; `lora.mark_only_lora_as_trainable`).
            Default: False.
        init_lora_weights: how A and B start: a bool, a name, or a function of a layer (`lora.initialize`). Some ways
            write the base weights, so that the sum is what it was. Default: True.
        task_type: one of PEFT's: "SEQ_CLS" and "TOKEN_CLS" train and save, as `modules_to_save` does, the modules whose
            names end in "classifier" or "score" (DistilBert's "pre_classifier", too), and "QUESTION_ANS" those in
            "qa_outputs": heads that no pretrained file holds. "CAUSAL_LM", "SEQ_2_SEQ_LM" and "FEATURE_EXTRACTION"
            train nothing more. Default: None.
        splits: for fused projections, the sizes of the parts by pattern: {"qkv_proj": (576, 192, 192)}. Default: {}.
        enable_lora: which splits to adapt, by pattern; all where nothing is said. Default: {}.
        factored: the factored form for convolutions (see `lora.Conv2d`). Default: True.
        merge_weights: serve `eval()` from merged weights, at the cost of a copy of each. Default: False.
        adapter_dtype: dtype of A and B. Default: None, the weight's, and float32 where that is narrower. A model
            that is cast later takes them along, but for dtypes of less than 16 bits (float8), which weights are stored
            in: what trains in a LoRA layer, biases too, stays as it is. Modules that train in full (`modules_to_save`)
            and biases of other layers are plain torch, and are cast like every other.

    Raises:
        ValueError: a value is out of range; all of them are named.

    >>> import lora
    >>> config = lora.LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"layers.0.q_proj": 8})
    >>> config.r
    4
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] | None = None
    bias: str = "none"
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
        for option in _BY_PATTERN:
            if getattr(self, option) is None:  # as PEFT takes it
                setattr(self, option, {})
        problems = self._type_problems()
        raise_all("LoraConfig: nothing was changed", problems)
        for r in (self.r, *self.rank_pattern.values()):
            for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
                problems += settings_problems(r, alpha, self.lora_dropout)
        if self.r == 0 or 0 in self.rank_pattern.values():
            problems.append("`r` must be at least 1 to adapt a module; leave it out of `target_modules` instead.")
        if not self.target_modules:
            problems.append("`target_modules` must name the modules to adapt, or be 'all-linear'.")
        if self.task_type is not None:
            self.task_type = next(name for name in HEADS if name == self.task_type)  # of PEFT's enum, the plain string
        if self.bias not in BIAS_CHOICES:
            problems.append(f"`bias` must be one of {', '.join(map(repr, BIAS_CHOICES))}, got {self.bias!r}.")
        for expression in self.expressions():
            problems += _problems_of(expression)
        raise_all("LoraConfig: nothing was changed", dict.fromkeys(problems))

    def _type_problems(self) -> list[str]:
        problems = []
        for option in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, option)
            if not (value is None or isinstance(value, str) or _names(value)):
                problems.append(f"`{option}` must be a list of names, got {value!r}.")
        if isinstance(self.modules_to_save, str):
            problems.append(f"`modules_to_save` must be a list of names, got the string {self.modules_to_save!r}.")
        for option in _BY_PATTERN:
            value = getattr(self, option)
            if not isinstance(value, Mapping) or not _names(list(value)):
                problems.append(f"`{option}` must say by pattern, as in {{'qkv_proj': …}}, got {value!r}.")
        problems += filter(None, [init_problem(self.init_lora_weights)])
        for option in ("use_rslora", "use_dora", "freeze_A", "factored", "merge_weights"):
            if not isinstance(getattr(self, option), bool):
                problems.append(f"`{option}` must be True or False, got {getattr(self, option)!r}.")
        if self.task_type is not None and self.task_type not in (*HEADS,):
            problems.append(f"`task_type` must be one of {', '.join(map(repr, HEADS))}, got {self.task_type!r}.")
        dtype = self.adapter_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            problems.append(f"`adapter_dtype` must be a floating-point torch.dtype, got {dtype!r}.")
        return problems

    def expressions(self) -> list[tuple[str, str]]:
        """Every regular expression in the config, as it was given and as it is used."""
        whole = [(p, p) for p in (self.target_modules, self.exclude_modules) if isinstance(p, str)]
        by_module = (self.rank_pattern, self.alpha_pattern, self.splits, self.enable_lora)
        return whole + [(pattern, _at_end(pattern)) for mapping in by_module for pattern in mapping]


def name_matches(name: str, target: str) -> bool:
    """Whether a module's full name is `target` or ends with it, whole components compared."""
    return name == target or name.endswith(f".{target}")


def pattern_matches(name: str, pattern: str) -> bool:
    """Whether a module's full name, or its last components, match a regular expression entirely."""
    return re.fullmatch(_at_end(pattern), name) is not None


def for_module(patterns: Mapping[str, T], names: Iterable[str], default: T) -> T:
    """The value of the first pattern that matches one of the module's names."""
    matching = (value for pattern, value in patterns.items() if any(pattern_matches(name, pattern) for name in names))
    return next(matching, default)


def _names(value: object) -> bool:
    return isinstance(value, Iterable) and all(isinstance(name, str) for name in value)


def _at_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})"


def _problems_of(expression: tuple[str, str]) -> list[str]:
    given, used = expression
    try:
        re.compile(used)
    except re.error as error:
        return [f"{given!r} must be a name or a regular expression: {error}."]
    return []
