"""What does the loss over a frozen head of 49,152 words take, in time and in memory, by itself and in a training step?

"all logits" is the head, and `cross_entropy` of its outputs in float32: in a step, transformers' own loss. "lora" is
`lora.functional.linear_cross_entropy`. "torch, in chunks" is `torch.nn.functional.linear_cross_entropy` with options as
they are by default, where torch has it.

"loss alone" is of 1024 rows of 576 random features, forward and backward to these. A step is that of training_step.py's
"phi3", the pretrained model of examples/phi3_chat.py (downloaded once), r = 16 in its four projections, on 4 × 256
tokens; with and without gradient checkpointing. "allocated" is the most that torch's profiler sees allocated at a time,
on top of what was there before; "kept" is what autograd keeps from the loss alone for its backward.

    python benchmarks/cross_entropy.py [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from counts import kept
from harness import Case, main
from memory import most_allocated
from models import Plan
from torch import Tensor, nn
from training_step import Training

from lora.functional import linear_cross_entropy

ROWS, FEATURES, WORDS = 1024, 576, 49152
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIB = 2**20


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    found: dict[str, Callable[[], Case]] = {
        f"loss alone, {name}": partial(alone, dtype, quick) for name, dtype in DTYPES.items()
    }
    for (name, dtype), checkpointing in product(DTYPES.items(), (False, True)):
        found[f"step, {name}{', checkpointing' * checkpointing}"] = partial(step, dtype, checkpointing, quick)
    return found


# ---- the loss alone --------------------------------------------------------------------------------------------------


def alone(dtype: torch.dtype, quick: bool) -> Case:
    """The loss of random features, and its gradient for them."""
    generator = torch.Generator().manual_seed(0)
    rows, words = (ROWS // 16, WORDS // 16) if quick else (ROWS, WORDS)
    head = nn.Linear(FEATURES, words, bias=False, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(rows, FEATURES, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(words, (rows,), generator=generator)
    losses = {name: partial(loss, head, hidden, labels) for name, loss in LOSSES.items()}
    steps = {name: partial(_gradient, loss, hidden) for name, loss in losses.items()}
    first, *others = (made().float() for made in steps.values())
    for other in others:  # what is timed computes the same
        assert (other - first).norm() <= 4 * torch.finfo(dtype).eps * first.norm()
    columns = {
        "allocated MiB": {name: most_allocated(made) / MIB for name, made in steps.items()},
        "kept MiB": {name: kept(loss, head) / MIB for name, loss in losses.items()},
    }
    unseen = "torch, in chunks" in LOSSES
    return Case(steps, columns, note="Hooks on saved tensors do not see what torch's own keeps." if unseen else "")


def _gradient(loss: Callable[[], Tensor], hidden: Tensor) -> Tensor:
    return torch.autograd.grad(loss(), hidden)[0]


def _all_logits(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), labels)


def _lora(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, head.weight, labels)


def _torch(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, head.weight, labels, options=nn.LinearCrossEntropyOptions())


LOSSES = {"all logits": _all_logits, "lora": _lora}
if hasattr(F, "linear_cross_entropy"):
    LOSSES["torch, in chunks"] = _torch


# ---- in a training step ----------------------------------------------------------------------------------------------


def step(dtype: torch.dtype, checkpointing: bool, quick: bool) -> Case:
    """Whole steps; what they allocate, and the first loss, which both must find."""
    plan = Plan("phi3", quick, dtype, "lora", torch.float32, 0.0)
    trainings = {"all logits": Training(plan), "lora": InChunks(plan)}
    if checkpointing:
        for training in trainings.values():
            training.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    steps = {name: training.step for name, training in trainings.items()}
    firsts = {name: made() for name, made in steps.items()}
    assert abs(firsts["lora"] / firsts["all logits"] - 1) < torch.finfo(dtype).eps
    columns = {
        "allocated MiB": {name: most_allocated(made) / MIB for name, made in steps.items()},
        "first loss": firsts,
    }
    return Case(steps, columns)


class InChunks(Training):
    """A step without all logits."""

    def loss(self) -> Tensor:
        hidden = self.model.model(inputs_embeds=self.x, use_cache=False).last_hidden_state  # (rows, tokens, features)
        labels = F.pad(self.ids[:, 1:], (0, 1), value=-100)  # each position predicts the next token
        return linear_cross_entropy(hidden, self.model.lm_head.weight, labels)


if __name__ == "__main__":
    main(__file__, __doc__, cases)
