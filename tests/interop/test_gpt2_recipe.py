"""loralib's recipe for GPT-2 with `import lora as loralib`: the same losses, checkpoints that either library reads."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import loralib
import pytest
import torch

import lora

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEPS = 16
# What rounding explains: a loss is rounded to 2.2e-16, 1.2e-7 in float32, and in bfloat16 it is a mean of 128 losses of
# logits that are rounded to 3.9e-3 each. A lora_alpha that is wrong by 1 % moves the losses by 1e-3.
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-3}


@pytest.fixture(scope="module")
def recipe():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        module = importlib.import_module("gpt2_recipe")
        yield module.Recipe(module.QUICK, "MergedLinear", STEPS, torch.float64, False, module.pretrain(module.QUICK))


@pytest.fixture(scope="module")
def trained(recipe):
    """In float64, by library: the model and what its training told."""
    models = {library: recipe.model(library) for library in (loralib, lora)}
    return {library: (model, recipe.train(model)) for library, model in models.items()}


def furthest(ours, theirs):
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_losses_are_loralibs(recipe, dtype):
    recipe = replace(recipe, dtype=dtype)
    (theirs, measured), (ours, again) = (recipe.train(recipe.model(library)) for library in (loralib, lora))
    assert furthest(ours, theirs) <= BOUNDS[dtype]
    assert again == pytest.approx(measured, rel=BOUNDS[dtype])


def test_an_alpha_that_is_wrong_by_one_percent_is_told_apart(recipe, trained):
    wrong = recipe.train(recipe.model(lora, lora_alpha=32.32)).losses
    assert furthest(wrong, trained[loralib][1].losses) > 1e-4


def test_one_a_for_all_three_has_the_losses_of_loralib_and_peft(recipe):
    recipe = replace(recipe, layer="Linear")
    models = [recipe.model(loralib), recipe.peft(), recipe.model(lora)]
    theirs, peft, ours = (recipe.train(model).losses for model in models)
    assert furthest(peft, theirs) <= BOUNDS[torch.float64]
    assert furthest(ours, theirs) <= BOUNDS[torch.float64]


def test_under_autocast_losses_are_loralibs(recipe):
    recipe = replace(recipe, dtype=torch.float32, autocast=True)
    theirs, ours = (recipe.train(recipe.model(library)).losses for library in (loralib, lora))
    assert furthest(ours, theirs) <= BOUNDS[torch.bfloat16]


def test_merging_at_each_evaluation_changes_no_loss_and_no_weight(recipe, trained):
    base = {name: tensor.clone() for name, tensor in recipe.model(lora).state_dict().items() if "lora_" not in name}
    model = recipe.model(lora, merge_weights=True)
    losses, measured = recipe.train(model)
    assert furthest(losses, trained[loralib][1].losses) <= BOUNDS[torch.float64]
    assert measured["held-out loss"] == pytest.approx(trained[loralib][1].numbers["held-out loss"], rel=1e-14)
    assert measured["share of the base written"] == 0
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in base.items())


@pytest.mark.parametrize(("writer", "reader"), [(loralib, lora), (lora, loralib)])
def test_checkpoints_go_both_ways(recipe, trained, writer, reader):
    module = importlib.import_module("gpt2_recipe")
    model, measured = trained[writer]
    before = measured.numbers["held-out loss before"]
    expected = pytest.approx(measured.numbers["held-out loss"], rel=1e-14)
    part, whole = recipe.model(reader), recipe.model(reader)
    assert recipe.held_out_loss(part) == pytest.approx(before, rel=1e-14)
    module.load(part, module.checkpoint(writer, model))
    assert recipe.held_out_loss(part) == expected
    whole.load_state_dict(model.train().state_dict())  # strictly: the recipe's last file has all weights
    assert recipe.held_out_loss(whole) == expected
    assert measured.numbers["held-out loss"] != pytest.approx(before, rel=1e-3)


@pytest.mark.slow
def test_results_are_written_and_not_run_again(recipe, tmp_path, capsys):
    module = importlib.import_module("gpt2_recipe")
    module.main("--quick", "--steps", "4", "--layer", "Linear", "--dtype", "bfloat16", "--out", str(tmp_path))
    path = tmp_path / "gpt2_Linear_bfloat16.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert list(kept["losses"]) == list(kept["numbers"])
    assert {"loralib", "lora", "PEFT"} < set(kept["losses"])
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    written = path.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {name} | " in written for name in kept["losses"])
    assert str(tmp_path) not in written + json.dumps(kept)
