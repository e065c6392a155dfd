"""The benchmarks run, measure what they say, and write it down."""

import importlib
import itertools
import json
from pathlib import Path

import loralib  # noqa: F401 (the rivals, without which nothing is compared)
import peft  # noqa: F401
import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Those that are sampled below are the quickest: the first, the sixth and the tenth.
SCRIPTS = [
    *("embedding", "linear", "dora", "merged", "swiglu", "decode", "conv"),
    *("experts", "bank", "merge", "methods_time", "training_step", "cross_entropy", "quantized"),
]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at these sizes threads wait more than they work
    yield
    torch.set_num_threads(threads)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_runs_and_writes_its_results(script, tmp_path, monkeypatch):
    harness, module = importlib.import_module("harness"), importlib.import_module(script)
    monkeypatch.setattr(harness, "LEAST_SAMPLE", 0)
    harness.main(module.__file__, module.__doc__, module.cases, "--quick", "--seconds", "1e-9", "--out", str(tmp_path))
    written = json.loads((tmp_path / f"{script}.json").read_text())
    assert list(written["results"]) == list(module.cases(True))
    assert str(tmp_path) not in json.dumps(written)
    for result in written["results"].values():
        first, *others = result["rows"]
        assert first["ratio"] == 1
        assert any(row["variant"].lower().startswith("lora") for row in others)
    assert (tmp_path / f"{script}.md").read_text().startswith(f"# {script}\n")
    assert (tmp_path / f"{script}.png").read_bytes().startswith(b"\x89PNG")


def test_cases_that_are_not_run_can_be_kept_and_say_where_they_were_measured(tmp_path, monkeypatch):
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "LEAST_SAMPLE", 0)

    def run(machine, *options):
        monkeypatch.setattr(harness, "machine", lambda: {"CPU": machine})
        cases = {name: lambda: harness.Case({"frozen": int, "lora": int}) for name in ("first", "second", "third")}
        harness.main("topic.py", "?", lambda quick: cases, "--seconds", "1e-9", "--out", str(tmp_path), *options)
        results = json.loads((tmp_path / "topic.json").read_text())["results"]
        said = (tmp_path / "topic.md").read_text()
        return {name: result["machine"]["CPU"] for name, result in results.items()}, said

    of_one, said = run("one", "--keep")  # where there is nothing yet
    assert of_one == dict.fromkeys(["first", "second", "third"], "one")
    assert "cases:" not in said
    run("two", "--only", "second", "--keep")
    places, said = run("three", "--only", "third", "--keep")
    assert places == {"first": "one", "second": "two", "third": "three"}
    for case, machine in places.items():
        assert f"## Measured on\n\n- cases: {case}\n- CPU: {machine}\n" in said
    assert run("four", "--only", "second")[0] == {"second": "four"}


def test_cases_are_made_on_the_device_and_measured_without_a_mode_through_which_calls_run(tmp_path, monkeypatch):
    harness, seen = importlib.import_module("harness"), []
    monkeypatch.setattr(harness, "LEAST_SAMPLE", 0)

    def make():
        made_on = torch.get_default_device()
        return harness.Case({"limit": lambda: seen.append((made_on, torch._C._len_torch_function_stack()))})

    options = "--seconds", "1e-9", "--out", str(tmp_path)
    for device, made_on in (("cpu", torch.device("cpu")), ("cpu:0", torch.device("cpu:0"))):
        seen.clear()
        harness.main("topic.py", "?", lambda quick: {"case": make}, "--device", device, *options)
        assert {*seen} == {(made_on, 0)}


def test_ratios_are_medians_of_rounds(monkeypatch):
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "LEAST_SAMPLE", 0)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    now, durations = [0.0], {"limit": iter([1, 1, 1, 2, 4, 8, 1]), "other": iter([9, 9, 2, 2, 4, 24, 9])}

    def take(name):
        now[0] += next(durations[name])

    case = harness.Case({"limit": lambda: take("limit"), "other": lambda: take("other")}, {"kept": {"other": 3}})
    limit, other = harness.measure(case, seconds=0)
    assert (limit["ratio"], limit["quartiles"], limit["kept"], limit["rounds"]) == (1, [1, 1], "–", 5)
    assert (other["ratio"], other["quartiles"], other["kept"]) == (2, [1, 3], 3)
    assert (limit["ms"], other["ms"]) == (2000, 4000)


def test_instances_take_turns(monkeypatch):
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "LEAST_SAMPLE", 0)
    monkeypatch.setattr(harness, "RESULTS", None)  # nothing is written
    called, instances = [], itertools.count()

    def make():
        own = next(instances)
        return harness.Case({name: lambda name=name: called.append((own, name)) for name in "ab"}, instances=2)

    harness.main("topic.py", "?", lambda quick: {"case": make}, "--seconds", "1e-9")
    assert next(instances) == 2
    rounds = called[-2 * harness.LEAST_ROUNDS :]
    assert rounds == [(n % 2, name) for n in range(harness.LEAST_ROUNDS) for name in "ab"]


def test_what_is_short_is_repeated_and_setups_are_not_timed():
    harness = importlib.import_module("harness")
    calls = {"short": 0, "set up": 0, "setup": 0}

    def count(name):
        calls[name] += 1

    case = harness.Case(
        {"short": lambda: count("short"), "set up": lambda: count("set up")}, setups={"set up": lambda: count("setup")}
    )
    harness.measure(case, seconds=0)
    assert calls["set up"] == calls["setup"] == 2 + harness.LEAST_ROUNDS
    assert calls["short"] > 100


def test_counts():
    counts, rivals = importlib.import_module("counts"), importlib.import_module("rivals")
    layer, x, dy = nn.Linear(8, 4, bias=False), torch.randn(3, 8, requires_grad=True), torch.randn(3, 4)
    assert counts.kept(lambda: layer(x), layer) == 3 * 8 * 4
    assert counts.flops(lambda: layer(x)) == 2 * 3 * 8 * 4
    assert counts.flops(lambda: torch.zeros(3, 4).addmm_(x.detach(), layer.weight.detach().T)) == 2 * 3 * 8 * 4
    assert counts.made(lambda: layer(x)) == 3 * 4 * 4
    frozen = layer.requires_grad_(False)
    with counts.WithoutBase([frozen.weight]):
        assert not frozen(x).any()
        (dx,) = torch.autograd.grad(frozen(x), x, dy)
    assert not dx.any()
    assert rivals.trainable(frozen) == []


def test_losses_do_not_depend_on_the_library():
    models, steps = importlib.import_module("models"), importlib.import_module("training_step")
    libraries = {"llama": ("loralib", "PEFT", "lora"), "phi3": ("PEFT", "lora")}
    for model, names in libraries.items():
        plans = [models.Plan(model, True, torch.float32, name, torch.float32, 0.0) for name in names]
        first, *others = (list(steps.take_steps(plan).values())[1:] for plan in plans)
        assert first[1] < first[0]
        for losses in others:
            assert losses == pytest.approx(first, rel=1e-5)


def test_large_adapters_are_measured_at_three_sizes(capsys):
    importlib.import_module("large_adapters").main("--quick")
    said = capsys.readouterr().out
    assert "| 6 | 12 | 24 |" in said
    assert said.count("\n| ") == 15


@pytest.mark.slow
def test_a_merge_for_its_inputs_is_measured_against_one_to_nearest(tmp_path):
    keep = importlib.import_module("keep")
    options = ("--quick", "--tokens", "200", "--adapters", str(tmp_path), "--out", str(tmp_path))
    keep.main("--bases", "bfloat16", *options)
    keep.main("--bases", "nf4", *options)
    found = json.loads((tmp_path / "keep.json").read_text(encoding="utf-8"))
    assert list(found) == ["bfloat16", "nf4"]
    for base, its in found.items():
        rows = its["rows"]
        assert [row["model"].split()[0] for row in rows] == ["unmerged", "without", "merged", "merged"] * 2
        for unmerged, without, nearest, kept in (rows[:4], rows[4:]):
            assert unmerged["KL"] == 0
            assert without["KL"] > 0
            assert 0 < kept["KL"] < (nearest["KL"] if base == "nf4" else without["KL"])
            assert 0 < kept["lost on its inputs"] < kept["if to nearest"]
        assert (tmp_path / f"{base}.safetensors").exists()
    assert (tmp_path / "keep.md").read_text(encoding="utf-8").startswith("# keep\n")


def test_no_layer_waits_and_forwards_launch_no_more_than_others_do(tmp_path):
    launches = importlib.import_module("launches")
    found = launches.measured(quick=True)
    for name, libraries in found.items():
        ours = [counts for library, counts in libraries.items() if library.startswith("lora") and library != "loralib"]
        theirs = [counts for library, counts in libraries.items() if library in ("loralib", "PEFT")]
        for forward, backward in ours:
            assert forward.waits + backward.waits == 0, name
        if "DoRA" not in name:
            assert min(c.launches for c, _ in ours) <= min(c.launches for c, _ in theirs), name
        assert min(c.megabytes for c, _ in ours) <= min(c.megabytes for c, _ in theirs), name


def test_the_counts_of_launches_are_written(tmp_path):
    launches = importlib.import_module("launches")
    launches.main("--quick", "--out", str(tmp_path / "launches.md"))
    written = (tmp_path / "launches.md").read_text(encoding="utf-8")
    assert all(f"| {name} | lora" in written for name in launches.cases(True))
    assert str(tmp_path) not in written


@pytest.mark.slow
def test_three_libraries_and_a_bank_have_one_curve(tmp_path):
    curves = importlib.import_module("curves")
    curves.main("--quick", "--steps", "20", "--rows", "2", "--out", str(tmp_path))
    losses = json.loads((tmp_path / "curves_float32.json").read_text(encoding="utf-8"))["losses"]
    assert list(losses) == ["loralib", "PEFT", "lora", "loralib, its loss × 3", "lora, bank"]
    for library, its in losses.items():
        assert its == pytest.approx(losses["loralib"], rel=1e-5), library
    assert losses["lora"][-1] < losses["lora"][0] - 0.1
    assert "| lora, bank |" in (tmp_path / "curves_float32.md").read_text(encoding="utf-8")
    assert (tmp_path / "curves_float32.png").read_bytes().startswith(b"\x89PNG")


def test_every_kind_of_layer_is_right_on_this_device(capsys):
    on_device = importlib.import_module("on_device")
    assert on_device.main("--device", "cpu") == 0
    assert capsys.readouterr().out.endswith("0 wrong on cpu\n")
