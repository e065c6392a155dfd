"""The training loop: steps, the learning rate's course, and held-out measurements."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora
from lora.functional import linear_cross_entropy
from phi3.chat_data import IGNORED
from phi3.errors import Diverged
from phi3.packing import Batch
from phi3.settings import Settings

T = TypeVar("T")


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


def loss_sum(model: nn.Module, batch: Batch, reduction: str = "sum") -> Tensor:
    """Cross-entropy of the labelled tokens, summed: sums add up over batches, means do not.

    With the reduction "none": that of each labelled token, row by row.
    """
    hidden = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state  # (rows, length, hidden_size)
    # Each position predicts the next token. The head, a fifth of a small model's work, runs only on
    # positions with a label to predict.
    targets = batch.labels[:, 1:]
    labelled = targets != IGNORED
    return head_loss(model.lm_head, hidden[:, :-1][labelled], targets[labelled], reduction)


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross-entropy of these rows of hidden states, (labelled tokens, hidden_size).

    A frozen head's logits, by far the largest tensor of a step, are never there all at once, nor kept for backward.
    """
    # Only of a plain layer is the weight all that it computes with: one with LoRA has A and B as well, and a quantized
    # or sharded one has a forward of its own.
    if type(head) is nn.Linear and type(head.weight) is nn.Parameter:
        return linear_cross_entropy(hidden, head.weight, targets, head.bias, reduction=reduction)
    return F.cross_entropy(head(hidden).float(), targets, reduction=reduction)


class Alone:
    """One process that does all of a run by itself. phi3_distributed.py has the engine for several that share one."""

    rank, ranks = 0, 1  # which share of each step's rows is ours, of how many shares
    process, main = 0, True  # our number; whether it is we who print, and write files
    sharded = False  # whether no process holds all of the model

    def on_main(self, act: Callable[[], T]) -> T:
        """What `act` returns in the main process; a UserError there is raised in all."""
        return act()

    def together(self, act: Callable[[], T]) -> T:
        """What `act` returns here; a UserError in any process is raised in all."""
        return act()

    def gathered(self, value: T) -> list[T]:
        """Every process's value."""
        return [value]

    def total(self, number: float) -> float:
        """The sum over all shares."""
        return number

    def shard(self, model: nn.Module, seed: int) -> None:
        """Parts the model, which is the same in every process, among them."""

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """`loss_sum` of this process's batch, whose gradient is averaged over the shares."""
        return loss_sum(model, batch)

    def sum_gradients(self, model: nn.Module) -> None:
        """Adds up what gradients are still in parts, after backward."""

    def whole(self, value: Any, parameter: Tensor | None = None) -> Any:
        """A value, of the optimizer's state of a parameter say, as a process that is alone has it."""
        return value

    def part(self, value: Any, parameter: Tensor) -> Any:
        """This process's part of such a value."""
        return value


ALONE = Alone()


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    lr: float,
    max_norm: float,
    engine: Alone = ALONE,
) -> Step:
    """One optimizer step over several batches, as over one big batch.

    Args:
        lr: the learning rate; a group with `times` steps with as many times of it.
        engine: who else has batches for this step.

    Raises:
        Diverged: when the loss or the gradient is not finite; the weights are then as they were.
    """
    labelled = engine.total(sum(batch.labelled for batch in micro_batches))
    mean = 0.0
    for batch in micro_batches:
        loss = engine.loss_sum(model, batch) / labelled
        total = engine.total(loss.item())
        if not math.isfinite(total):  # in no process must backward begin, or the others would wait for this one
            raise Diverged(f"the loss is {total}")
        (loss * engine.ranks).backward()  # engines average gradients, and ours are to be summed
        mean += total
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("times", 1.0)
    engine.sum_gradients(model)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = engine.whole(nn.utils.clip_grad_norm_(trainable, max_norm or math.inf)).item()
    if not math.isfinite(norm):
        raise Diverged(f"the gradient's norm is {norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(mean, lr, norm, int(engine.total(sum(batch.size for batch in micro_batches))))


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
def held_out_loss(model: nn.Module, held_out: Iterable[Batch], engine: Alone = ALONE) -> float:
    """Mean cross-entropy over all labelled tokens of all shares; its exponential is the perplexity."""
    total, labelled = 0.0, 0
    with evaluating(model):
        for batch in held_out:
            total += engine.loss_sum(model, batch).item()
            labelled += batch.labelled
    return engine.total(total) / engine.total(labelled)


def perplexity(loss: float) -> float:
    """e to the loss; infinite where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
