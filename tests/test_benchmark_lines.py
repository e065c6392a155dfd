"""Curves of several libraries are compared with the first, and kept as each has run."""

import importlib
import json
from pathlib import Path

import matplotlib  # noqa: F401 (for the pictures)
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def lines(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("lines")


def test_what_has_run_by_the_same_command_is_not_run_again(lines, tmp_path):
    path, ran = tmp_path / "topic.json", []

    def train(name, *losses, **numbers):
        ran.append(name)
        return lines.Training(list(losses), numbers)

    def interrupted():
        raise KeyboardInterrupt

    wanted = {"one": lambda: train("one", 2.0, 1.0), "two": interrupted}
    with pytest.raises(KeyboardInterrupt):
        lines.run(path, "?", "the command", wanted)
    assert "| one | 0 | – | 0 | 2.00000 | 1.00000 |\n" in (tmp_path / "topic.md").read_text(encoding="utf-8")
    wanted["two"] = lambda: train("two", 2.0, 1.5, held_out=3.0)
    found = lines.run(path, "?", "the command", wanted)
    assert ran == ["one", "two"]
    assert found == {"one": ([2.0, 1.0], {}), "two": ([2.0, 1.5], {"held_out": 3.0})}
    assert json.loads(path.read_text(encoding="utf-8"))["losses"] == {"one": [2.0, 1.0], "two": [2.0, 1.5]}
    assert (tmp_path / "topic.md").read_text(encoding="utf-8").startswith("# topic\n\n?\n\n![](topic.png)\n")
    lines.run(path, "?", "another command", wanted)
    assert ran == ["one", "two", "one", "two"]


def test_differences_are_relative_to_the_first_library(lines):
    losses = {"one": [4.0] * 20, "two": [4.0] * 18 + [5.0, 3.5]}
    head, _, one, two = lines.compared({name: lines.Training(its) for name, its in losses.items()})
    assert "from one's loss" in head
    assert one == "| one | 0 | – | 0 | 4.00000 | 4.00000 |"
    assert two == "| two | 2.5e-01 | 19 | 6.2e-02 | 4.00000 | 4.25000 |"
