"""Do loralib, PEFT and lora learn the same from one start and one order of the data?

The pretrained model of examples/phi3_chat.py learns to chat: r = 16 in its four projections, no dropout, AdamW with a
cosine schedule, rows of the same conversations in the same order. All begin with the same A, and B = 0. "lora, bank" is
the same adapter in a bank, beside another in the same batches that learns ten times as fast. Losses of all steps are
compared with loralib's, as |difference| / loss: what is equal in the equations can differ by rounding alone, which
training carries on.

How far rounding alone carries two runs apart is what "loralib, its loss × 3" shows: loralib once more, whose backward
begins with three times the loss. Gradients are then three times as large, and so is AdamW's eps: nothing changes in
the equations, but 3 is no power of 2, and each gradient is rounded elsewhere. A library that is no further from loralib
than loralib is from itself differs by nothing that can be told from rounding.

    python benchmarks/curves.py [--steps 200] [--rows 1] [--length 128] [--dtype float32] [--quick]

What has been run and is in the results is not run again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import chatting
import lines
import torch
from chatting import Course
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
        model, data, training, *_ = chatting.load(Course(0, LR, self.steps, self.rows, settings), self.toy)
        rates = [loop.learning_rate_at(step, self.steps, training) for step in range(self.steps)]
        return model.requires_grad_(False), [data.order.step(step)[0] for step in range(self.steps)], rates


def alone(run: Run, library: str, times: float = 1.0) -> lines.Training:
    """The losses of all steps by one library; `times` multiplies them for the backward pass."""
    model, batches, rates = run.prepare()
    adapted(model, Plan("phi3", run.toy is not None, run.dtype, library, run.dtype, 0.0))
    optimizer = optimizer_of(trainable(model), times)
    steps = zip(batches, rates, strict=True)
    return lines.Training([step(model, batch, rate, [optimizer], times)[0] for batch, rate in steps])


def in_bank(run: Run) -> lines.Training:
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
    return lines.Training(losses)


def step(
    model: nn.Module, batch: Batch, rate: float, optimizers: Sequence[torch.optim.Optimizer], times: float = 1.0
) -> list[float]:
    """The mean loss of the labelled tokens of each optimizer's rows, before its step; each is ten times as fast."""
    losses = torch.stack([part.sum() / part.count_nonzero() for part in losses_of(model, batch).chunk(len(optimizers))])
    (losses.sum() * times).backward()
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


def optimizer_of(parameters: list[nn.Parameter], times: float = 1.0) -> torch.optim.Optimizer:
    """AdamW; its `eps` grows with the gradients, so that they may have any unit."""
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, eps=1e-8 * times, fused=True)


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1, help="of each batch (default: 1)")
    parser.add_argument("--length", type=int, default=128, help="of each row, in tokens (default: 128)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quick", action="store_true", help="a toy model, and a few lines for it to learn")
    parser.add_argument("--out", type=Path, help="folder for the results (default: results/, if not quick)")
    chosen = parser.parse_args(arguments or None)
    command = "python benchmarks/curves.py"
    command += f" --steps {chosen.steps} --rows {chosen.rows} --length {chosen.length} --dtype {chosen.dtype}"
    out = chosen.out or (None if chosen.quick else RESULTS)
    path = out and out / f"curves_{chosen.dtype}.json"
    with tempfile.TemporaryDirectory() as folder:
        toy = chatting.toy_folder(Path(folder)) if chosen.quick else None
        run = Run(chosen.steps, chosen.rows, chosen.length, getattr(torch, chosen.dtype), toy)
        trainings = {library: partial(alone, run, library) for library in LIBRARIES}
        trainings |= {"loralib, its loss × 3": partial(alone, run, "loralib", 3.0), "lora, bank": partial(in_bank, run)}
        lines.run(path, __doc__ or "", command, trainings)


if __name__ == "__main__":
    main()
