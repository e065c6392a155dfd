"""Do loralib, PEFT and lora learn the same from one start and one order of the data?

The pretrained model of examples/phi3_chat.py learns to chat: r = 16 in its four projections, no dropout, AdamW with a
cosine schedule, rows of the same conversations in the same order. All begin with the same A, and B = 0. "lora, bank" is
the same adapter in a bank, beside another in the same batches that learns ten times as fast. Losses of all steps are
compared with loralib's: what is equal in the equations can differ by rounding alone, which training carries on.

    python benchmarks/curves.py [--steps 200] [--rows 1] [--length 128] [--dtype float32] [--quick]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import methods
import torch
from machine import machine
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from models import Plan, adapted
from phi3 import loop
from phi3.packing import Batch
from rivals import trainable
from torch import Tensor, nn

import lora

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("loralib", "PEFT", "lora")
LR = 1e-3


class Run(NamedTuple):
    """What all libraries are given."""

    steps: int
    rows: int
    length: int
    dtype: torch.dtype
    toy: Path | None

    def prepare(self) -> tuple[nn.Module, list[Batch], list[float]]:
        """The frozen model, and the batch and the learning rate of each step."""
        settings = {"training": {"max_seq_length": self.length, "bf16": self.dtype == torch.bfloat16}}
        plan = methods.Plan("LoRA", 0, LR, self.steps, self.rows, settings | {"peft": {}, "run": {}})
        model, data, training, *_ = methods.load(plan, self.toy)
        rates = [loop.learning_rate_at(step, self.steps, training) for step in range(self.steps)]
        return model.requires_grad_(False), [data.order.step(step)[0] for step in range(self.steps)], rates


def curves(run: Run) -> dict[str, list[float]]:
    """The losses of all steps, by library."""
    found = {}
    for library in LIBRARIES:
        model, batches, rates = run.prepare()
        adapted(model, Plan("phi3", run.toy is not None, run.dtype, library, run.dtype, 0.0))
        optimizer = optimizer_of(trainable(model))
        found[library] = [step(model, batch, rate, [optimizer])[0] for batch, rate in zip(batches, rates, strict=True)]
    found["lora, bank"] = in_bank(run)
    return found


def in_bank(run: Run) -> list[float]:
    """The same adapter, beside another."""
    model, batches, rates = run.prepare()
    adapted(model, Plan("phi3", run.toy is not None, run.dtype, "lora", run.dtype, 0.0))
    start = lora.adapter_of(model)
    lora.eject(model)
    bank = lora.bank(model.requires_grad_(False), {"one": start, "other": start}, check_base=False)
    model.train()
    optimizers = [optimizer_of(bank.parameters(name)) for name in bank]
    losses = []
    for batch, rate in zip(batches, rates, strict=True):
        twice = Batch(*(torch.cat([part, part]) for part in batch[:3]), 2 * batch.size)
        with bank.rows(["one"] * len(batch.labels) + ["other"] * len(batch.labels)):
            losses.append(step(model, twice, rate, optimizers)[0])
    return losses


def step(model: nn.Module, batch: Batch, rate: float, optimizers: Sequence[torch.optim.Optimizer]) -> list[float]:
    """The mean loss of the labelled tokens of each optimizer's rows, before its step; each is ten times as fast."""
    losses = torch.stack([part.sum() / part.count_nonzero() for part in losses_of(model, batch).chunk(len(optimizers))])
    losses.sum().backward()
    for number, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            group["lr"] = rate * 10**number
        optimizer.step()
        optimizer.zero_grad()
    return losses.tolist()


def losses_of(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of each token, (rows, length − 1); zero where there is no label."""
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    each = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), batch.labels[:, 1:], reduction="none")
    return each


def optimizer_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)


def furthest(found: dict[str, list[float]]) -> dict[str, tuple[float, int]]:
    """For each library its largest difference from the first one's loss, relative to that, and in which step."""
    first, *others = found
    pairs = {name: list(zip(found[first], found[name], strict=True)) for name in others}
    apart = {name: [abs(a - b) / a for a, b in losses] for name, losses in pairs.items()}
    return {name: (max(each), each.index(max(each)) + 1) for name, each in apart.items()}


def write(out: Path, found: dict[str, list[float]], about: dict[str, str], name: str) -> None:
    """The curves as <name>.json and .png, and the differences as <name>.md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({"machine": about, "losses": found}, indent=1) + "\n")
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (library, losses), width in zip(found.items(), (6, 4, 2, 1), strict=True):  # one line, if they are the same
        axes.plot(range(1, len(losses) + 1), losses, linewidth=width, label=library)
    axes.set_xlabel("step")
    axes.set_ylabel("loss of the batch")
    axes.legend(frameon=False)
    figure.savefig(out / f"{name}.png", dpi=120)
    rows = [f"| {library} | {at:.1e} | {number} |" for library, (at, number) in furthest(found).items()]
    table = ["| against loralib | largest relative difference of a loss | in step |", "|---|---|---|", *rows]
    assert __doc__ is not None
    parts = [f"# {name}", __doc__.strip(), f"![]({name}.png)", "\n".join(table)]
    parts += ["## Measured on", "\n".join(f"- {key}: {value}" for key, value in about.items())]
    (out / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1, help="of each batch (default: 1)")
    parser.add_argument("--length", type=int, default=128, help="of each row, in tokens (default: 128)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quick", action="store_true", help="a toy model, and a few lines for it to learn")
    parser.add_argument("--out", type=Path, help="folder for the results (default: results/, if not quick)")
    chosen = parser.parse_args(arguments or None)
    with tempfile.TemporaryDirectory() as folder:
        toy = methods.toy_folder(Path(folder)) if chosen.quick else None
        found = curves(Run(chosen.steps, chosen.rows, chosen.length, getattr(torch, chosen.dtype), toy))
    options = [
        f"--steps {chosen.steps}",
        f"--rows {chosen.rows}",
        f"--length {chosen.length}",
        f"--dtype {chosen.dtype}",
    ]
    about = machine() | {"command": " ".join(["python benchmarks/curves.py", *options])}
    for library, (at, number) in furthest(found).items():
        course = f"{found[library][0]:.4f} to {found[library][-1]:.4f}"
        print(f"{library}: at most {at:.1e} from loralib, in step {number}; {course}")
    out = chosen.out or (None if chosen.quick else RESULTS)
    if out is not None:
        write(out, found, about, f"curves_{chosen.dtype}")


if __name__ == "__main__":
    main()
