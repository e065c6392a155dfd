"""Does LoRA on a convolutional network learn as much as full fine-tuning, from few images, and what does it forget?

EfficientNet-Lite0, which knows ImageNet's photographs (efficientnet.py), learns scikit-learn's handwritten digits, 8×8
pixels enlarged to 48×48, from ten of each. Compared are a linear probe (a new classifier on frozen features), `lora` on
the 1×1 convolutions with the classifier, and full fine-tuning, with AdamW and a cosine schedule, in float32. Each has
the learning rate whose loss is the lowest on images that it is neither trained nor tested on, as a mean over the seeds:
searched in half decades, until both neighbours of the best are worse, if only for the first seed. A seed draws the
images to train on, their order, the classifier and the start of A.

What is forgotten is seen on photographs: the divergence KL(before ‖ after) of the 1000 classes that the pretrained
classifier gives for the features before and after, and how many photographs keep their first class.

Batch norm computes with the pretrained statistics, in `eval()`: so the network starts as the pretrained one, and what
it says of an image does not depend on the others of its batch. The last method computes with the statistics of its
batches instead, which are few images.

    pip install -e ".[study]"
    python benchmarks/images.py [--seeds 0 1 2] [--methods "LoRA, r=4"] [--per-class 10] [--steps 60] [--quick]

What has been run and is in the results is not run again.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import efficientnet
import images_table
import safetensors.torch
import torch
import torch.nn.functional as F
from kept import Runs, search
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import lora

RESULTS = Path(__file__).parent / "results"
TESTED, VALIDATED = 800, 397  # of 1797 images; training draws from the 600 others
SIDE, PHOTOGRAPH = 48, 224  # pixels of a digit, and of a photograph, as in pretraining
SMOOTHED = 0.1  # of the labels' weight is for all classes alike, as when the network was pretrained
CLASSIFIER = 10**-2.5  # the learning rate of the classifier beside others: the linear probe's best
POINTWISE = ["_expand_conv", "_project_conv", "_conv_head"]  # 88 % of the convolutions' weights


@dataclass(frozen=True)
class Method:
    """What trains beside the new classifier, and the learning rate to try first: 10 to the power of `start` / 2."""

    start: int
    lora: Mapping[str, Any] = field(default_factory=dict)
    full: bool = False
    statistics: bool = False  # batch norm's, of the batches


METHODS = {
    "linear probe": Method(-5),
    "LoRA, r=1": Method(-4, lora={"r": 1}),
    "LoRA, r=4": Method(-5, lora={"r": 4}),
    "LoRA, r=16": Method(-5, lora={"r": 16}),
    "LoRA, r=4, depthwise in full": Method(-5, lora={"r": 4, "modules_to_save": ["_fc", "_depthwise_conv"]}),
    "full fine-tuning": Method(-7, full=True),
    "full fine-tuning, batch statistics": Method(-7, full=True, statistics=True),
}


@dataclass(frozen=True)
class Plan:
    """One run; everything that its outcome depends on."""

    method: str
    rate: int  # in half decades
    seed: int
    per_class: int
    steps: int
    rows: int
    settings: Mapping[str, Any]


def plan_of(name: str, *sizes: int) -> Plan:
    """A plan with what the method is; where its search starts is no part of that."""
    settings = {key: value for key, value in asdict(METHODS[name]).items() if key != "start"}
    return Plan(name, *sizes, settings)


@dataclass
class Task:
    """A network that knows something, images for it to learn, and photographs that show what it still knows."""

    model: efficientnet.EfficientNet
    images: Tensor  # (N, 3, H, W)
    labels: Tensor  # (N,)
    photographs: Tensor  # (M, 3, H', W')
    tested: int
    validated: int

    @cached_property
    def features(self) -> Tensor:
        """Of all images, by the pretrained network: (N, head)."""
        return computed(self.model.features, self.images)

    @cached_property
    def known(self) -> Tensor:
        """What the pretrained network says of the photographs: (M, 1000), in float64."""
        return self.classes_of(self.model)

    def classes_of(self, model: efficientnet.EfficientNet) -> Tensor:
        """The pretrained classifier's log-probabilities for a network's features of the photographs."""
        scores = self.model._fc(computed(model.features, self.photographs))
        return scores.detach().log_softmax(1, dtype=torch.float64)

    def split(self, seed: int, per_class: int) -> dict[str, Tensor]:
        """Which images are for training, validation and the test; the last two are the same for all seeds."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))
        test, validation, rest = order.split([self.tested, self.validated, len(order) - self.tested - self.validated])
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
        training = torch.cat([rest[self.labels[rest] == label][:per_class] for label in self.labels.unique()])
        return {"training": training, "validation": validation, "test": test}


# ---- what is learnt, and what is known -----------------------------------------------------------------------------


def digits() -> Task:
    """The pretrained network, scikit-learn's digits, and five crops each of photographs that packages ship."""
    import matplotlib.image  # here, since a toy needs neither of them
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_digits, load_sample_images

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8), in -1 … 1
    images = F.interpolate(images, (SIDE, SIDE), mode="bilinear").expand(-1, 3, -1, -1)
    hopper = matplotlib.image.imread(get_sample_data("grace_hopper.jpg", asfileobj=False))
    photographs = torch.cat([crops(torch.tensor(each)) for each in (*load_sample_images().images, hopper)])
    model = efficientnet.pretrained().to(memory_format=torch.channels_last)
    return Task(model, like(images), torch.tensor(found.target), like(photographs), TESTED, VALIDATED)


def crops(photograph: Tensor) -> Tensor:
    """Corners and middle of (H, W, 3) in 0 … 255: (5, 3, 224, 224) in -1 … 1."""
    image = photograph.movedim(-1, 0)[None].float() / 127.5 - 1
    scale = PHOTOGRAPH * 9 / 8 / min(image.shape[2:])
    image = F.interpolate(image, scale_factor=scale, mode="bilinear", antialias=True)
    height, width = (size - PHOTOGRAPH for size in image.shape[2:])
    places = [(0, 0), (0, width), (height, 0), (height, width), (height // 2, width // 2)]
    return torch.cat([image[..., y : y + PHOTOGRAPH, x : x + PHOTOGRAPH] for y, x in places])


def toy() -> Task:
    """The same architecture with few random weights, and images whose class is seen in their brightness."""
    torch.manual_seed(0)
    model = efficientnet.EfficientNet(5, stages=((1, 3, 1, 1, 8), (2, 5, 2, 2, 8)), head=24).eval()
    labels = torch.arange(96) % 3
    images = torch.randn(96, 3, 8, 8) / 4 + (labels.float() - 1)[:, None, None, None]
    return Task(model.to(memory_format=torch.channels_last), like(images), labels, like(images[:6]), 32, 32)


def like(images: Tensor) -> Tensor:
    """In the layout in which a CPU convolves channel by channel in half of the time."""
    return images.contiguous(memory_format=torch.channels_last)


# ---- one run -------------------------------------------------------------------------------------------------------


def run(plan: Plan, task: Task) -> dict[str, Any]:
    """Train by one method, and measure."""
    return measured(trained(plan, task), plan, task)


def trained(plan: Plan, task: Task) -> efficientnet.EfficientNet:
    """The network after training, in `eval()`."""
    torch.manual_seed(plan.seed)
    method = METHODS[plan.method]
    model = copy.deepcopy(task.model).requires_grad_(method.full)
    model._fc = nn.Linear(model._fc.in_features, int(task.labels.max()) + 1)
    if method.lora:
        settings = {"target_modules": POINTWISE, "modules_to_save": ["_fc"], "lora_alpha": method.lora["r"]}
        lora.inject(model, **{**settings, **method.lora})
    network, inputs = scored(model, method, task)
    training = task.split(plan.seed, plan.per_class)["training"]
    optimizer = torch.optim.AdamW(groups(model, plan.rate), weight_decay=0.0)
    highest = [group["lr"] for group in optimizer.param_groups]
    schedule = OneCycleLR(optimizer, highest, total_steps=plan.steps, pct_start=0.2, cycle_momentum=False)
    network.train(method.statistics)
    for rows in batches(training, plan):
        loss = F.cross_entropy(network(inputs[rows]), task.labels[rows], label_smoothing=SMOOTHED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def scored(model: efficientnet.EfficientNet, method: Method, task: Task) -> tuple[nn.Module, Tensor]:
    """What scores the images, and what it is given: of a network that stays as it is, its features suffice."""
    return (model, task.images) if method.full or method.lora else (model._fc, task.features)


def groups(model: efficientnet.EfficientNet, rate: int) -> list[dict[str, Any]]:
    """What trains: the classifier, which is new, and the rest, if there is any; each at its learning rate."""
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    new = [*model._fc.parameters()]
    rest = [parameter for parameter in trains if not any(parameter is each for each in new)]
    if not rest:
        return [{"params": new, "lr": 10 ** (rate / 2)}]
    return [{"params": new, "lr": CLASSIFIER}, {"params": rest, "lr": 10 ** (rate / 2)}]


def batches(training: Tensor, plan: Plan) -> Iterator[Tensor]:
    """The rows of each step: all images once in a new order, and again."""
    generator, left = torch.Generator().manual_seed(plan.seed), training[:0]
    for _ in range(plan.steps):
        while len(left) < plan.rows:
            left = torch.cat([left, training[torch.randperm(len(training), generator=generator)]])
        yield left[: plan.rows]
        left = left[plan.rows :]


@torch.no_grad()
def computed(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Of all inputs, a hundred at a time."""
    return torch.cat([function(some) for some in inputs.split(100)])


def measured(model: efficientnet.EfficientNet, plan: Plan, task: Task) -> dict[str, Any]:
    """What was learnt and what it takes; what was forgotten; and whether a merge and a switch do what they say."""
    method, result = METHODS[plan.method], {}
    network, inputs = scored(model, method, task)
    rows, scores = task.split(plan.seed, plan.per_class), {}
    for part in ("validation", "test"):
        scores[part], labels = computed(network, inputs[rows[part]]), task.labels[rows[part]]
        loss = F.cross_entropy(scores[part], labels).item()
        result[f"{part} loss"] = loss if math.isfinite(loss) else math.inf
        result[f"{part} accuracy"] = (scores[part].argmax(1) == labels).double().mean().item()
    now = task.classes_of(model)
    result["KL on photographs"] = F.kl_div(now, task.known, log_target=True, reduction="batchmean").item()
    result["same first class"] = (now.argmax(1) == task.known.argmax(1)).double().mean().item()
    result["trained parameters"] = sum(each.numel() for each in model.parameters() if each.requires_grad)
    result["saved MB"] = len(saved(model, method)) / 1e6
    if method.lora:
        with lora.disabled(model):
            assert torch.equal(task.classes_of(model), task.known), "switched off, it is the pretrained network"
        merged = copy.deepcopy(model)
        lora.merge(merged)
        by_merged = computed(merged, inputs[rows["validation"]])
        torch.testing.assert_close(by_merged, scores["validation"], rtol=1e-3, atol=1e-3)
        result["merged, largest difference of scores"] = (by_merged - scores["validation"]).abs().max().item()
    return result


def saved(model: efficientnet.EfficientNet, method: Method) -> bytes:
    """The file that holds what was learnt: an adapter, all weights, or the classifier."""
    if not method.lora:
        state = (model if method.full else model._fc).state_dict()
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(model, Path(folder) / "adapter.safetensors")
        return (Path(folder) / "adapter.safetensors").read_bytes()


# ---- all runs ------------------------------------------------------------------------------------------------------


def searched(name: str, chosen: argparse.Namespace, runs: Runs) -> images_table.Row:
    """The results of a method with all seeds at its best learning rate, and the rates that were tried."""

    def result(rate: int, seed: int) -> Mapping[str, Any]:
        return runs.result(plan_of(name, rate, seed, chosen.per_class, chosen.steps, chosen.rows))

    def loss_at(rate: int, seed: int) -> float:
        return result(rate, seed)["validation loss"]

    losses = search(loss_at, METHODS[name].start, chosen.seeds, chosen.rates)
    best = next(iter(losses))
    return images_table.Row(name, best, sorted(losses), [result(best, seed) for seed in chosen.seeds])


def main(*argv: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy, at one rate: whether it runs, not how well")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="runs alone, no table")
    parser.add_argument("--rates", type=int, help="learning rates to try at most (default: 12; 1 when quick)")
    parser.add_argument("--per-class", type=int, default=10, help="images of each class to train on (default: 10)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 60; 8 when quick)")
    parser.add_argument("--rows", type=int, default=20, help="images in a step (default: 20)")
    parser.add_argument("--out", type=Path, help="folder for images.json, .md and .png (default: results)")
    chosen = parser.parse_args(argv or None)
    chosen.steps = chosen.steps or (8 if chosen.quick else 60)
    chosen.rates = chosen.rates or (1 if chosen.quick else 12)
    out = chosen.out or (None if chosen.quick else RESULTS)
    task = cache(toy if chosen.quick else digits)
    runs = Runs(out / "images.json" if out else None, lambda plan: run(plan, task()))
    if not chosen.quick:
        runs.about["versions"] += f", scikit-learn {version('scikit-learn')}"
    rows = [searched(name, chosen, runs) for name in chosen.methods or METHODS]
    sizes = f"--per-class {chosen.per_class} --steps {chosen.steps} --rows {chosen.rows}"
    command = f"python benchmarks/images.py {sizes} --seeds {' '.join(map(str, chosen.seeds))}"
    images_table.write(
        None if chosen.methods else out, (__doc__ or "").strip(), {**runs.about, "command": command}, rows
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
