"""benchmarks/methods.py finds the best rates, tells answers from near misses, and keeps what it has run."""

import importlib
import json
import math
from pathlib import Path

import bitsandbytes  # noqa: F401 (for QLoRA)
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def runs_in(folder):
    return json.loads((folder / "methods.json").read_text(encoding="utf-8"))["runs"]


def test_a_search_ends_where_both_neighbours_are_worse():
    search = importlib.import_module("kept").search

    def valley(bottom):
        return lambda rate, seed: abs(rate - bottom) / 2

    assert search(valley(-6), -6, [0]) == {-6: 0, -5: 0.5, -7: 0.5}
    assert search(valley(-3), -6, [0, 1]) == {-3: 0, -6: 1.5, -5: 1, -4: 0.5, -2: 0.5}
    assert search(valley(-9), -6, [0, 1]) == {-9: 0, -6: 1.5, -5: 2, -7: 1, -8: 0.5, -10: 0.5}
    assert next(iter(search(lambda rate, seed: math.nan if rate > -8 else valley(-8)(rate, seed), -6, [0]))) == -8
    assert len(search(lambda rate, seed: rate, -6, [0], most=4)) == 4


def test_the_best_rate_is_run_with_all_seeds_and_must_be_the_best_with_them():
    first, ran = {-7: 0.8, -6: 0.0, -5: 0.5, -4: 1.0}, []

    def loss_at(rate, seed):
        ran.append((rate, seed))
        return 9.0 if (rate, seed) == (-6, 1) else first[rate] + seed / 10

    losses = importlib.import_module("kept").search(loss_at, -6, [0, 1])
    assert next(iter(losses)) == -5
    assert losses == pytest.approx({-6: 4.5, -5: 0.55, -7: 0.8, -4: 1.0})
    assert [rate for rate, seed in ran if seed == 1] == [-6, -5]


def test_rates_are_half_decades():
    methods = importlib.import_module("methods")
    assert [methods.rate_of(number) for number in (-8, -7, -6, -5, -1, 0)] == [1e-4, 3e-4, 1e-3, 3e-3, 0.3, 1.0]


def test_exact_is_what_greedy_decoding_answers():
    problems, methods = importlib.import_module("problems"), importlib.import_module("methods")
    world = problems.toy()
    model = importlib.import_module("copy").deepcopy(world.model)
    optimizer = methods.set_up(model, methods.CHOICES["full fine-tuning"], 3e-2)
    batches = [problems.batch_of(world.lesson(0, 64)[first : first + 8]) for first in range(0, 64, 8)]
    for step in range(60):
        methods.train_step(model, optimizer, batches[step % 8], 1.0 if step < 40 else 0.1)
    asked = [*world.lesson(0, 40), *world.test]
    right = 0
    for question, answer in asked:
        ids = torch.tensor([question])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=len(answer), do_sample=False)
        right += out[0, len(question) :].tolist() == answer
    assert 0 < right < len(asked)
    assert problems.scores(model, asked).exact == right / len(asked)


def test_losses_are_transformers_own():
    problems = importlib.import_module("problems")
    world = problems.toy()
    theirs = world.model(input_ids=world.prose, labels=world.prose).loss
    assert problems.loss_on(world.model, world.prose) == pytest.approx(theirs.item(), rel=1e-5)
    ids, labels = problems.batch_of(world.test)
    theirs = world.model(input_ids=ids, labels=labels).loss
    assert problems.scores(world.model, world.test).loss == pytest.approx(theirs.item(), rel=1e-5)


def test_lessons_are_the_seeds_own_and_have_nothing_that_is_held_out():
    world = importlib.import_module("problems").toy()
    lesson = world.lesson(0, 60)
    assert len(lesson) == 60
    assert lesson == world.lesson(0, 60) != world.lesson(1, 60)
    asked = [str(problem) for problem in (*world.validation, *world.test)]
    assert len({*asked}) == len(asked) == 20
    assert {*asked}.isdisjoint(map(str, lesson))


@pytest.mark.slow
def test_what_has_run_is_not_run_again_and_seeds_follow_at_the_best_rate(tmp_path, capsys):
    methods = importlib.import_module("methods")
    chosen = "--quick", "--steps", "3", "--out", str(tmp_path), "--only", "r = 16, all", "full"
    methods.main(*chosen, "--seeds", "0")
    first = runs_in(tmp_path)
    assert [run["plan"]["choice"] for run in first][:2] == ["before training", "full fine-tuning"]
    sizes = {run["plan"]["choice"]: run["result"]["trained parameters"] for run in first}
    toy = importlib.import_module("problems").toy().model
    assert sizes["full fine-tuning"] == sum(parameter.numel() for parameter in toy.parameters())
    assert sizes["LoRA, r = 16, all"] < sizes["full fine-tuning"]

    capsys.readouterr()
    methods.main(*chosen, "--seeds", "0", "1", "2")
    again = runs_in(tmp_path)
    assert again[: len(first)] == first
    for choice in ("full fine-tuning", "LoRA, r = 16, all"):
        plans = [run["plan"] for run in again if run["plan"]["choice"] == choice]
        seeds = {plan["rate"]: [each["seed"] for each in plans if each["rate"] == plan["rate"]] for plan in plans}
        assert [0, 1, 2] in seeds.values()
    assert capsys.readouterr().out.count(", steps 3: ") == len(again) - len(first) > 0
    methods.main(*chosen, "--seeds", "0", "1", "2")
    assert capsys.readouterr().out.count(", steps 3: ") == 0
    assert runs_in(tmp_path) == again
    written = (tmp_path / "methods.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in written
    assert written.count("| LoRA, r = 16, all | ") == 2
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_each_choice_trains(tmp_path):
    methods = importlib.import_module("methods")
    start = methods.run(methods.Plan("before training", 0.0, 0, 0), True)
    plans = {
        name: methods.run(methods.Plan(name, methods.rate_of(choice.rate), 0, 20), True)
        for name, choice in methods.CHOICES.items()
        if name != "before training"
    }
    for name, result in plans.items():
        assert result["loss"] < start["loss"], name
    sizes = {name: result["trained parameters"] for name, result in plans.items()}
    assert (
        sizes["LoRA-FA"] < sizes["LoRA, r = 16, all"] == sizes["QLoRA, nf4"] < sizes["DoRA"] < sizes["rsLoRA, r = 64"]
    )
    for r in (1, 16, 256):
        parts = sizes[f"LoRA, r = {r}, MLP"] + sizes[f"LoRA, r = {r}, attention"]
        assert sizes[f"LoRA, r = {r}, all"] == parts


def test_a_mean_has_students_interval():
    methods_table = importlib.import_module("methods_table")
    assert methods_table.mean([1.0, 2.0, 3.0], 3) == "2.000 ± 2.484"  # 4.303 · 1 / √3
    assert methods_table.mean([1.5]) == "1.500"


def test_the_best_rate_is_that_of_the_lowest_mean_of_those_with_the_most_seeds():
    methods_table = importlib.import_module("methods_table")

    def run(rate, seed, validation):
        plan = {"choice": "DoRA", "rate": rate, "seed": seed}
        return {"plan": plan, "result": {"validation": validation}}

    runs = [run(0.1, 0, 3.0), run(0.1, 1, 5.0), run(0.2, 0, 2.0), run(0.2, 1, 4.0), run(0.3, 0, 1.0)]
    assert methods_table.best_of(runs, "DoRA") == runs[2:4]  # 0.3 has fewer seeds
    assert methods_table.best_of([run(0.1, 0, math.nan), run(0.2, 0, 7.0)], "DoRA")[0]["plan"]["rate"] == 0.2
    assert methods_table.best_of(runs, "EVA") == []


def test_losses_are_compared_seed_by_seed():
    methods_table = importlib.import_module("methods_table")

    def runs(*losses):
        return [{"plan": {"seed": seed}, "result": {"loss": loss}} for seed, loss in enumerate(losses)]

    assert methods_table.beyond(runs(1.5, 3.5, 5.5), runs(1.0, 3.0, 5.0)) == "0.500 ± 0.000"
    assert methods_table.beyond(list(reversed(runs(1.25, 9.0))), runs(1.0)) == "0.250"
    assert methods_table.beyond(runs(1.0), []) == "–"
