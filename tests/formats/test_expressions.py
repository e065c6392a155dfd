"""What all regular expressions of a file may cost, with all of its names: known before any of them is matched."""

import json
import time

import pytest
import safetensors.torch
import torch

import lora
from lora.formats import peft
from lora.formats.expressions import _MOST_STEPS, _costs, cost_problem, pattern_problem
from lora.models.patterns import Patterns

MODULES = [f"model.layers.{i}.mlp.experts.{j}.gate_proj" for i in range(24) for j in range(128)]
DOTS = ["a." * 190 + f"a{i:03d}" for i in range(50)]
USUAL = [
    r".*\.(gate|up|down)_proj",
    r"(.*)\.layers\.(\d+)\.(.*)_proj",
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up)_proj",
    r"layers\.[0-9]+\..*",
    r"^model\.layers\.([0-9]|1[0-9])\..*_proj$",
    r".*experts.*",
    r"(?:model\.)?(?:layers\.)?(?:[0-9]|1[0-9])\..*",
    r"^(?!.*vision).*\.(?P<which>gate|up)_proj",
    r"(?<=model\.)layers\.(\d)*\.mlp.*",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_ones_are_matched_with_many_names(pattern):
    assert pattern_problem(pattern, max(map(len, MODULES))) is None
    assert cost_problem({"rank_pattern": {pattern: 4}, "alpha_pattern": {pattern: 8}}, MODULES) is None


def test_names_of_modules_are_matched_with_as_many_names():
    for patterns in (dict.fromkeys(MODULES), {f"^{name}": 1 for name in MODULES}):
        assert cost_problem({"rank_pattern": patterns, "alpha_pattern": patterns}, MODULES) is None


@pytest.mark.parametrize("pattern", [r"(model\.)*(layers\.){1,2}[0-9]+.*", r"(?:ab){3}", r"((ab)*)?", "(.)+", "[(?:]a"])
def test_a_group_that_matches_letters_in_one_way_may_be_repeated(pattern):
    assert pattern_problem(pattern, 40) is None


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"(a|b)*", r"(a?)+", r"((a)b)*", r"(a*)*", r"(?:a+)+", r"(?:.*a){5}", "()*", r"(\b)*x", r"(?=a){60000}"),
        *(r"(a)(\1)*", r"(?i:q)", r"(?>a)", r"(?(1)a|b)", r"(?#)a", r"(^){60000}", r"(?P=n)*"),
    ],
)
def test_a_group_is_repeated_only_if_it_matches_letters_in_one_way(pattern):
    assert "too intricate" in pattern_problem(pattern, 40)


@pytest.mark.parametrize("unit", [r"(?:a)*", r"(?:aa)*", r"(?=.*a.*a).*", r"(?<=a)a*", r"(?:a.)*", r"(.*b)?"])
def test_groups_cost_what_is_counted(unit):
    name = "a" * 50
    patterns = [unit * n + "[b]" for n in range(1, 12)]
    fine = [p for p in patterns if not (pattern_problem(p, 50) or cost_problem({"rank_pattern": {p: 1}}, [name] * 50))]
    began = time.perf_counter()
    lookup = Patterns({fine[-1]: 1})
    assert [lookup.value([name], 0) for _ in range(50)] == [0] * 50
    assert time.perf_counter() - began < 5  # 0.1 s where it was measured


# Each of them, and each name, is fine by itself.
MANY = {
    "sets": ["[a.]*[a.]*[b]" + "x" * k for k in range(30)],
    "anything": [".*.*[b]" + "x" * k for k in range(30)],
    "alternatives": ["(a|aa|aaa)(a|aa|aaa)(a|aa|aaa)(a|aa|aaa)" + "b" * k for k in range(3000)],
    "what may be absent": ["a?" * 8 + "b" * k for k in range(900)],
    "many": [f"(a|b){k}" for k in range(30_000)],
    "long": [f"[a-z]{'x' * k}" for k in range(900)],
    "plain ones, each of a form of its own": ["".join(".a"[k >> bit & 1] for bit in range(14)) for k in range(2**14)],
}


@pytest.mark.parametrize("patterns", MANY.values(), ids=MANY)
def test_many_that_are_fine_by_themselves_are_refused_together(patterns):
    assert all(pattern_problem(pattern, len(DOTS[0])) is None for pattern in patterns[:5])
    assert cost_problem({"rank_pattern": dict.fromkeys(patterns[:1])}, DOTS[:1]) is None
    names = DOTS * 40 if "plain" in next(key for key, value in MANY.items() if value is patterns) else DOTS
    assert "would take too long" in cost_problem({"rank_pattern": dict.fromkeys(patterns)}, names)


@pytest.mark.parametrize("end", ["x", "z", "xyz", r"\.z"])
def test_what_never_comes_is_looked_for_behind_all_that_may_be_before_it(end):
    """2,000 names of 16 letters and one pattern, in a file of 0.5 MB, took 26 s: it was counted as none at all."""
    names = [f"layers.{i}.a.a.q" for i in range(2000)]
    assert cost_problem({"rank_pattern": {".*" * 9 + end: 1}}, names)
    assert cost_problem({"rank_pattern": {".*" * 9 + end: 1}}, names[:2]) is None


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_file_of_many_is_refused_before_they_are_matched(option, tmp_path, monkeypatch):
    tensors = {f"base_model.model.{name}.lora_{part}.weight": torch.ones(1, 1) for name in DOTS for part in "AB"}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, option: dict.fromkeys(MANY["sets"], 1)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    monkeypatch.setattr(peft.Patterns, "value", lambda *_: pytest.fail("it was matched"))
    with pytest.raises(lora.AdapterError, match="with 50 names would take too long"):
        lora.read_adapter(tmp_path)


def test_what_is_too_much_is_known_before_all_is_counted():
    parts = []
    patterns = {f"(a|b){k}.*.*c": 1 for k in range(4000)}
    for cost in _costs({"rank_pattern": patterns}, DOTS):
        parts.append(cost)
        if sum(parts) > _MOST_STEPS:
            break
    assert len(parts) < 10**4
    assert cost_problem({"rank_pattern": patterns}, DOTS)
