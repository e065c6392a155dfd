"""benchmarks/images.py: what it compares is what it says, on a toy of the same architecture."""

import argparse
import importlib
import json
import math
from pathlib import Path

import loralib  # noqa: F401 (the benchmarks' extra, whose versions the results name)
import peft  # noqa: F401
import pytest
import torch

import lora

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# And learning rates, in half decades, at which the toy learns in eight steps.
LORA = {
    "LoRA, r=1": -1,
    "LoRA, r=4": -1,
    "LoRA, r=16": -2,
    "LoRA, r=4, depthwise in full": -2,
}
FULL = ["full fine-tuning", "full fine-tuning, batch statistics"]


@pytest.fixture
def images(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("images")


@pytest.fixture
def task(images):
    return images.toy()


def plan_of(images, name, rate=-2):
    return images.plan_of(name, rate, 0, 8, 8, 12)  # seed, images per class, steps, images in a step


def moved(model, task):
    """The names of the pretrained network's tensors that are others now, apart from the classifier's."""
    now = model.state_dict()
    return {
        name
        for name, tensor in task.model.state_dict().items()
        if not name.startswith("_fc.") and not torch.equal(now[name], tensor)
    }


def named(model, cls):
    return {name: module for name, module in model.named_modules() if isinstance(module, cls)}


@pytest.mark.slow
def test_every_method_has_a_row_and_what_has_run_is_not_run_again(images, tmp_path, monkeypatch):
    def runs():
        return json.loads((tmp_path / "images.json").read_text(encoding="utf-8"))["runs"]

    images.main("--quick", "--seeds", "0", "--out", str(tmp_path))
    assert [run["plan"]["method"] for run in runs()] == list(images.METHODS)
    written = (tmp_path / "images.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in written.splitlines() if line.startswith("| ")]
    assert rows == ["method", "---", *images.METHODS]
    assert str(tmp_path) not in written
    assert (tmp_path / "images.png").read_bytes().startswith(b"\x89PNG")

    first, ran, run = runs(), [], images.run
    monkeypatch.setattr(images, "run", lambda plan, task: ran.append((plan.method, plan.seed)) or run(plan, task))
    images.main("--quick", "--seeds", "0", "--out", str(tmp_path))
    assert (ran, runs()) == ([], first)
    images.main("--quick", "--seeds", "0", "1", "--methods", "linear probe", "LoRA, r=4", "--out", str(tmp_path))
    assert ran == [("linear probe", 1), ("LoRA, r=4", 1)]
    assert runs()[: len(first)] == first


@pytest.mark.parametrize("name", LORA)
def test_lora_learns_beside_weights_that_stay_to_the_bit(images, task, name):
    plan = plan_of(images, name, rate=LORA[name])
    model = images.trained(plan, task)
    in_full = {key for key in task.model.state_dict() if "_depthwise_conv" in key and "in full" in name}
    assert moved(model, task) == in_full
    convolutions = named(task.model, torch.nn.Conv2d)
    assert {*named(model, lora.Conv2d)} == {key for key, one in convolutions.items() if one.kernel_size == (1, 1)}
    result = images.measured(model, plan, task)
    assert result["KL on photographs"] > 0
    assert result["merged, largest difference of scores"] < 1e-4
    untrained = images.measured(images.trained(plan_of(images, name, rate=-20), task), plan, task)
    assert result["validation loss"] < untrained["validation loss"] - 0.05


def test_the_linear_probe_trains_the_classifier_alone(images, task):
    plan = plan_of(images, "linear probe", rate=-1)
    model = images.trained(plan, task)
    assert moved(model, task) == set()
    result = images.measured(model, plan, task)
    assert (result["KL on photographs"], result["same first class"]) == (0, 1)
    assert result["trained parameters"] == 24 * 3 + 3
    # What it is measured by, the features of the pretrained network, is what the whole network computes.
    test = task.split(0, 8)["test"]
    with torch.no_grad():
        right = (model(task.images[test]).argmax(1) == task.labels[test]).double().mean()
    assert result["test accuracy"] == right


@pytest.mark.parametrize("name", FULL)
def test_full_fine_tuning_trains_all_and_has_the_statistics_that_it_says(images, task, name):
    plan = plan_of(images, name)
    model = images.trained(plan, task)
    statistics = {key for key, _ in task.model.named_buffers()}
    weights = {key for key, _ in task.model.named_parameters() if not key.startswith("_fc.")}
    assert moved(model, task) == weights | (statistics if "batch statistics" in name else set())
    assert images.measured(model, plan, task)["trained parameters"] == sum(p.numel() for p in model.parameters())
    assert not model.training


def test_a_merge_that_is_wrong_is_seen(images, task, monkeypatch):
    plan = plan_of(images, "LoRA, r=4")
    model = images.trained(plan, task)
    monkeypatch.setattr(images.lora, "merge", images.lora.eject)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        images.measured(model, plan, task)


def test_images_to_train_on_are_drawn_by_the_seed_and_the_others_are_the_same_for_all(images, task):
    first, second = (task.split(seed, 8) for seed in (0, 1))
    for part in ("validation", "test"):
        assert torch.equal(first[part], second[part])
    assert set(first["training"].tolist()) != set(second["training"].tolist())
    for rows in (first, second):
        everything = torch.cat([*rows.values()])
        assert len(everything.unique()) == len(everything) == 3 * 8 + 32 + 32
        assert task.labels[rows["training"]].bincount().tolist() == [8, 8, 8]


def test_a_rate_at_which_another_seed_falls_apart_is_not_taken(images):
    ran = []

    def result(plan):
        ran.append((plan.rate, plan.seed))
        return {"validation loss": 9 if (plan.rate, plan.seed) == (-3, 1) else 1 + (plan.rate + 3) ** 2}

    chosen = argparse.Namespace(seeds=[0, 1], rates=12, per_class=1, steps=1, rows=1)
    row = images.searched("LoRA, r=1", chosen, argparse.Namespace(result=result))
    assert (row.rate, row.tried) == (-4, [-5, -4, -3, -2])
    assert {rate for rate, seed in ran if seed == 1} == {-3, -4}  # -2 cannot be better
    chosen.seeds = [0]
    assert images.searched("LoRA, r=1", chosen, argparse.Namespace(result=result)).rate == -3


@pytest.mark.parametrize(
    ("kernel", "rows", "columns", "sides"),  # left, right, above, below
    [(3, 8, 8, [0, 1, 0, 1]), (5, 8, 8, [1, 2, 1, 2]), (3, 7, 10, [0, 1, 1, 1]), (5, 10, 7, [2, 2, 1, 2])],
)
def test_a_stride_of_two_pads_as_the_weights_were_trained(images, kernel, rows, columns, sides):
    """As TensorFlow's "SAME", in numbers written out by hand."""
    conv = torch.nn.Conv2d(1, 1, kernel, 2, bias=False)
    x = torch.ones(1, 1, rows, columns)
    padded = images.efficientnet.padded(x, conv)
    assert torch.equal(padded, torch.nn.functional.pad(x, sides))
    assert conv(padded).shape[2:] == (math.ceil(rows / 2), math.ceil(columns / 2))


def test_the_network_has_the_names_and_the_size_of_the_pretrained_one(images):
    with torch.device("meta"):
        model = images.efficientnet.EfficientNet()
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    assert len(model._blocks) == 16
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["_conv_stem.weight"] == (32, 3, 3, 3)
    assert shapes["_blocks.0._project_conv.weight"] == (16, 32, 1, 1)
    assert shapes["_blocks.3._depthwise_conv.weight"] == (144, 1, 5, 5)
    assert shapes["_blocks.15._bn2.running_var"] == (320,)
    assert shapes["_fc.weight"] == (1000, 1280)


@pytest.mark.parametrize("shape", [(300, 500, 3), (500, 300, 3), (252, 252, 3)])
def test_photographs_are_cut_from_corners_and_the_middle(images, shape):
    photograph = torch.randint(0, 256, shape, dtype=torch.uint8)
    found = images.crops(photograph)
    assert found.shape == (5, 3, 224, 224)
    assert -1.1 < found.min() < -0.5 < 0.5 < found.max() < 1.1
