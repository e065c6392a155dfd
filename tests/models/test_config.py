"""LoraConfig: its words, what it refuses, and how names and patterns match."""

import dataclasses
import re
import sys

import pytest
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import lora
from lora.errors import did_you_mean
from lora.models.config import Settings
from lora.models.patterns import Patterns, ends_of

CHOICES = "one of 'none', 'all', 'lora_only'"

REFUSALS = {
    "negative r": ({"r": -1}, "`r` must be an integer of at least 0, got -1."),
    "fractional r": ({"r": 2.5}, "`r` must be an integer of at least 0, got 2.5."),
    "bool r": ({"r": True}, "`r` must be an integer of at least 0, got True."),
    "zero r": ({"r": 0}, "`r` must be at least 1 to adapt a module"),
    "zero r in a pattern": ({"rank_pattern": {"a": 0}}, "`r` must be at least 1 to adapt a module"),
    "bad r in a pattern": ({"rank_pattern": {"a": "4"}}, "`r` must be an integer of at least 0, got '4'."),
    "NaN alpha": ({"lora_alpha": float("nan")}, "`lora_alpha` must be a finite number, got nan."),
    "infinite alpha": ({"alpha_pattern": {"a": float("inf")}}, "`lora_alpha` must be a finite number, got inf."),
    "dropout of 1": ({"lora_dropout": 1.0}, "`lora_dropout` must be at least 0 and below 1, got 1.0."),
    "negative dropout": ({"lora_dropout": -0.1}, "`lora_dropout` must be at least 0 and below 1, got -0.1."),
    "no targets": ({"target_modules": None}, "`target_modules` must name the modules to adapt"),
    "empty targets": ({"target_modules": []}, "`target_modules` must name the modules to adapt"),
    "bad bias": ({"bias": "lora"}, f"`bias` must be {CHOICES}, got 'lora'."),
    "string to save": (
        {"modules_to_save": "head"},
        "`modules_to_save` must be a list of names, got the string 'head'.",
    ),
    "bad regex": ({"target_modules": "(q"}, "'(q' must be a name or a regular expression: "),
    "bad regex to exclude": ({"exclude_modules": "[v"}, "'[v' must be a name or a regular expression: "),
    "bad pattern": ({"splits": {"*qkv": (1, 2)}}, "'*qkv' must be a name or a regular expression: "),
}
if sys.version_info >= (3, 11):  # Python 3.10 takes flags anywhere
    REFUSALS["flags inside a pattern"] = (
        {"rank_pattern": {"(?i)Q_PROJ": 4}},
        "'(?i)Q_PROJ' must be a name or a regular expression: ",
    )


@pytest.mark.parametrize(("fields", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_value_out_of_range_is_refused_in_words(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lora.LoraConfig(**{"target_modules": ["a"], **fields})


def test_one_error_names_every_value_that_is_wrong():
    with pytest.raises(ValueError, match="LoraConfig") as caught:
        lora.LoraConfig(r=-3, lora_alpha=float("inf"), lora_dropout=2, bias="some", exclude_modules="(")
    for part in ("-3", "inf", "got 2.", "'some'", "target_modules", "'('"):
        assert part in str(caught.value)


def test_a_message_is_not_repeated_for_each_pattern():
    with pytest.raises(ValueError, match="must be an integer") as caught:
        lora.LoraConfig(target_modules=["a"], r=-1, alpha_pattern={"a": 1, "b": 2})
    assert str(caught.value).count("must be an integer") == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": None},  # as in some adapter_config.json files
        {"alpha_pattern": None},
        {"target_modules": ("a",)},
        {"target_modules": {"a"}},
        {"lora_dropout": 0},
        {"lora_alpha": 0.5},
    ],
    ids=str,
)
def test_values_as_peft_takes_them_are_taken(fields):
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    assert len(lora.inject(model, lora.LoraConfig(**{"target_modules": ["a"], **fields})).modules) == 1


def test_inject_takes_the_fields_as_keywords_of_the_same_types():
    fields = {field.name: field.type for field in dataclasses.fields(lora.LoraConfig)}
    assert {name: hint.__forward_arg__ for name, hint in Settings.__annotations__.items()} == fields


def test_fields_are_keywords_only():
    with pytest.raises(TypeError):
        lora.LoraConfig(8, 16)


def test_a_config_that_was_made_wrong_afterwards_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    config = lora.LoraConfig(target_modules=["0", "1"])
    config.lora_dropout = 7
    with pytest.raises(ValueError, match="lora_dropout"):
        lora.inject(model, config)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())


NAMES = {
    ("q_proj", "q_proj"): True,
    ("layers.0.q_proj", "q_proj"): True,
    ("layers.0.q_proj", "0.q_proj"): True,
    ("layers.0.q_proj", "layers.0.q_proj"): True,
    ("layers.0.q_proj", "proj"): False,
    ("layers.0.q_proj", "layers.0"): False,
    ("layers.10.q_proj", "0.q_proj"): False,
    ("layers.0.qXproj", "q.proj"): False,
    ("layers.0.q_proj", ".*"): False,
    ("", ""): True,
    ("q_proj", ""): False,
}


@pytest.mark.parametrize(("name", "target"), NAMES, ids=map(str, NAMES))
def test_a_name_matches_itself_and_dotted_suffixes(name, target):
    assert (target in ends_of(name)) is NAMES[name, target]


PATTERNS = {
    ("layers.0.q_proj", "q_proj"): True,
    ("layers.0.q_proj", r"layers\.0\..*"): True,
    ("layers.0.q_proj", r"0\.[qv]_proj"): True,
    ("layers.0.q_proj", r"q_proj|v_proj"): True,
    ("layers.0.v_proj", r"q_proj|v_proj"): True,
    ("layers.0.v_proj.base", r"q_proj|v_proj"): False,
    ("layers.10.q_proj", r"0\.q_proj"): False,
    ("layers.0.q_proj", "proj"): False,
    ("layers.0.q_proj\n", "q_proj"): False,
    ("layers.0.q_proj", "^layers.0.q_proj$"): True,
    ("layers.0.q_proj", "^q_proj"): False,
}


@pytest.mark.parametrize(("name", "pattern"), PATTERNS, ids=map(repr, PATTERNS))
def test_a_pattern_matches_whole_last_components(name, pattern):
    assert bool(Patterns({pattern: None}).matching([name])) is PATTERNS[name, pattern]


PARTS = st.lists(st.sampled_from(["layers", "0", "1", "10", "q_proj", "proj", "q"]), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(name=PARTS, target=PARTS)
def test_a_name_matches_where_its_last_components_are_the_targets(name, target):
    expected = name[-len(target) :] == target
    assert (".".join(target) in ends_of(".".join(name))) is expected
    assert bool(Patterns({re.escape(".".join(target)): None}).matching([".".join(name)])) is expected


@settings(max_examples=60, deadline=None)
@given(
    layers=st.sets(st.integers(0, 11), min_size=1),
    exclude=st.sets(st.integers(0, 11)),
    rank=st.sets(st.integers(0, 11)),
)
def test_any_choice_of_layers_adapts_those_and_no_others(layers, exclude, rank):
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))
    wanted = layers - exclude
    fields = {
        "target_modules": [str(i) for i in sorted(layers)],
        "exclude_modules": "|".join(map(str, exclude)) or None,
        "rank_pattern": {str(i): 3 for i in rank},
        "r": 1,
    }
    if not wanted or rank - wanted:  # nothing left to adapt, or a pattern that matches nothing
        with pytest.raises(ValueError, match=r"inject: nothing was changed"):
            lora.inject(model, **fields)
        assert not any(isinstance(m, lora.LoRALayer) for m in model)
    else:
        lora.inject(model, **fields)
        ranks = {i: m.r for i, m in enumerate(model) if isinstance(m, lora.LoRALayer)}
        assert ranks == {i: 3 if i in rank else 1 for i in wanted}


LAYERS = [f"layers.{i}{own}" for i in range(9) for own in ("", ".q_proj", ".v_proj")]
HINTS = {
    "q_prj": " (did you mean 'q_proj', 'v_proj'?)",
    "layers.0.vproj": " (did you mean 'v_proj', 'q_proj'?)",
    "wqkv": " (names end in 'layers', 'q_proj', 'v_proj', 'head', 'norm', …)",
}


@pytest.mark.parametrize(("target", "hint"), HINTS.items(), ids=HINTS)
def test_a_name_that_matches_nothing_gets_a_hint(target, hint):
    assert did_you_mean(target, ["", "layers", *LAYERS, "head", "norm"]) == hint


def test_a_model_without_names_gives_no_hint():
    assert did_you_mean("q_proj", [""]) == ""
