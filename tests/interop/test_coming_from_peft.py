"""docs/coming_from_peft.md says what is so: each word of PEFT's exists there, and each of ours here."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import peft
import pytest
from peft.tuners.lora import LoraModel

import lora

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "coming_from_peft.md").read_text(encoding="utf-8")
ROWS = [
    [re.findall(r"`([^`]+)`", cell) or [cell.strip()] for cell in row.strip("|").split("|")]
    for row in re.findall(r"^\| `.*\|$", PAGE, re.MULTILINE)
]
CALLS = [(theirs, ours) for theirs, ours, *_ in ROWS if not theirs[0].isidentifier()]
WORDS = {word: ours for theirs, ours, *_ in ROWS if theirs[0].isidentifier() for word in theirs}
FIELDS = {field.name for field in dataclasses.fields(lora.LoraConfig)}
THEIRS = {field.name for field in dataclasses.fields(peft.LoraConfig)}


def called(code):
    """What an expression calls, as a dotted name, and the words that it gives by name."""
    call = ast.parse(code, mode="eval").body
    return ast.unparse(call.func).split("."), [word.arg for word in call.keywords if word.arg]


def meant(path, model):
    """What a dotted name means, `model` being of this class."""
    if path[0] == "model":  # of what a PeftModel has not, the model of its LoRA in it is asked
        owner = model if path[1] != "base_model" and hasattr(model, path[1]) else LoraModel
        return getattr(owner, path[-1])
    owner, *rest = peft, *path
    for name in rest:
        owner = getattr(owner, name, None) or importlib.import_module(f"{owner.__name__}.{name}")
    return owner


@pytest.mark.parametrize(("theirs", "ours"), CALLS, ids=[theirs[0] for theirs, _ in CALLS])
def test_each_call_exists_in_both(theirs, ours):
    path, keywords = called(theirs[0])
    function = meant(path, peft.PeftModel)
    assert callable(function)
    accepted = inspect.signature(function).parameters
    assert set(keywords) <= {*accepted} or any(each.kind is each.VAR_KEYWORD for each in accepted.values())
    if ours == ["–"]:
        return
    (name, *rest), keywords = called(ours[0])
    assert name == "lora"
    accepted = inspect.signature(getattr(lora, *rest)).parameters
    assert set(keywords) <= (FIELDS if rest == ["LoraConfig"] else set(accepted))


def test_a_call_gives_what_its_function_takes():
    for _, ours in CALLS:
        if ours != ["–"] and "..." not in ours[0]:
            call = ast.parse(ours[0], mode="eval").body
            function = getattr(lora, call.func.attr)
            if function is not lora.LoraConfig:  # whose words are looked up above
                inspect.signature(function).bind(*call.args, **{word.arg: word.value for word in call.keywords})


def test_the_words_of_a_configuration_are_those_of_peft():
    assert sorted(WORDS) == sorted(THEIRS)


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_a_field_where_the_page_says_so(word):
    assert (WORDS[word] == ["the same"]) == (word in FIELDS)


def test_a_configuration_of_peft_is_taken():
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True)
    assert lora.LoraConfig(**config.to_dict()).use_rslora


def test_the_page_names_all_words_that_peft_has_not():
    ours = re.search(r"lora's own words are (.*?):", PAGE, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", ours)) == FIELDS - THEIRS
