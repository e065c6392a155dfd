"""The training loop: steps, the learning rate's course, and held-out measurements."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora
from phi3.chat_data import IGNORED
from phi3.errors import Diverged
from phi3.packing import Batch
from phi3.settings import Settings


class Step(NamedTuple):
    """What one optimizer step tells."""

    loss: float  # mean over the labelled tokens
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int  # that went through the model, padding not counted


def make_optimizer(model: nn.Module, config: Settings) -> torch.optim.AdamW:
    """AdamW over what is trainable. `fused` steps several times faster over many small tensors.

    Each group knows its learning rate's ratio to the one that is configured, as `times`.
    """
    peak = config["learning_rate"]
    groups = lora.param_groups(model, peak, config.get("lr_ratio") or 1.0, config["weight_decay"])
    return torch.optim.AdamW([group | {"times": group["lr"] / peak} for group in groups], fused=True)


def total_steps(config: Settings, steps_per_epoch: int) -> int:
    """`max_steps`, or as many as the epochs take."""
    if config["max_steps"] > 0:
        return config["max_steps"]
    return math.ceil(config["num_train_epochs"] * steps_per_epoch)


def learning_rate_at(step: int, total: int, config: Settings) -> float:
    """The learning rate of step number `step` (from 0): a linear rise, then the schedule's fall."""
    warmup = math.ceil(config["warmup_ratio"] * total)
    if step < warmup:
        return config["learning_rate"] * (step + 1) / warmup
    passed = (step - warmup) / max(1, total - warmup)
    shapes = {"cosine": (1 + math.cos(math.pi * passed)) / 2, "linear": 1 - passed, "constant": 1.0}
    return config["learning_rate"] * shapes[config["lr_scheduler_type"]]


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the labelled tokens, summed: sums add up over batches, means do not."""
    hidden = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state  # (rows, length, hidden_size)
    # Each position predicts the next token. The head, a fifth of a small model's work, runs only on
    # positions with a label to predict.
    targets = batch.labels[:, 1:]
    labelled = targets != IGNORED
    logits = model.lm_head(hidden[:, :-1][labelled])  # (labelled tokens, vocab_size)
    return F.cross_entropy(logits.float(), targets[labelled], reduction="sum")


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: Sequence[Batch], lr: float, max_norm: float
) -> Step:
    """One optimizer step over several batches, as over one big batch.

    Args:
        lr: the learning rate; a group with `times` steps with as many times of it.

    Raises:
        Diverged: when the loss or the gradient is not finite; the weights are then as they were.
    """
    labelled = sum(batch.labelled for batch in micro_batches)
    mean = 0.0
    for batch in micro_batches:
        loss = loss_sum(model, batch) / labelled
        if not math.isfinite(loss.item()):
            raise Diverged(f"the loss is {loss.item()}")
        loss.backward()
        mean += loss.item()
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("times", 1.0)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(trainable, max_norm or math.inf).item()
    if not math.isfinite(norm):
        raise Diverged(f"the gradient's norm is {norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(mean, lr, norm, sum(batch.size for batch in micro_batches))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` inside, and what it was before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Iterable[Batch]) -> float:
    """Mean cross-entropy over all labelled tokens; its exponential is the perplexity."""
    total, labelled = 0.0, 0
    with evaluating(model):
        for batch in held_out:
            total += loss_sum(model, batch).item()
            labelled += batch.labelled
    return total / labelled


def perplexity(loss: float) -> float:
    """e to the loss; infinite where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
