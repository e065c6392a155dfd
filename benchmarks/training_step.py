"""What does LoRA cost in a whole training step, in time and in peak memory, and does it learn the same?

A step is forward, backward and `AdamW(fused=True)`, against the frozen model with a gradient for its input embeddings,
which all variants compute. "llama" is a Llama of 6 layers with 576 features, r = 8, on 512 tokens, with an adapter in
every linear layer but the head. "phi3" is the pretrained model of examples/phi3_chat.py (downloaded once), r = 16 in
its four projections, on 4 × 256 tokens; its peak memory and losses come from a process of its own for each variant.
"phi3-mini", on accelerators alone, has the sizes of Phi-3-mini and random weights, on 2048 tokens.

PEFT adapts a fused projection as one matrix. "lora" does the same there, and must find the same losses, with no
dropout, from the same A and B = 0; "lora, split" gives q, k, v, gate and up an update each.

    python benchmarks/training_step.py [--quick]
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product

import torch
from harness import Case, main
from machine import peak_mib
from models import Plan, build
from rivals import trainable

F32, BF16 = torch.float32, torch.bfloat16
STEPS = 4
SHAPES = {
    "llama": (1, 512),
    "phi3": (4, 256),
    "phi3-nf4": (4, 256),
    "phi3-mini": (1, 2048),
}  # rows and tokens of a batch
# What to compare with the frozen model, by model and dtype: libraries, and the dtypes of their adapters.
VARIANTS = {
    ("llama", F32): [("loralib", F32), ("PEFT", F32), ("lora", F32)],
    ("llama", BF16): [("loralib", BF16), ("PEFT", BF16), ("lora", BF16), ("PEFT", F32), ("lora", F32)],
    ("phi3", F32): [("PEFT", F32), ("lora", F32), ("lora, split", F32)],
    ("phi3", BF16): [("PEFT", F32), ("lora", F32), ("lora, split", F32)],
}
ON_ACCELERATORS = {("phi3-mini", BF16): VARIANTS["phi3", BF16]}


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    found: dict[str, Callable[[], Case]] = {}
    chosen = VARIANTS | ({} if torch.get_default_device().type == "cpu" else ON_ACCELERATORS)
    for ((model, dtype), variants), dropout in product(chosen.items(), (0.0, 0.05)):
        name = f"{model}, {str(dtype).removeprefix('torch.')}" + (f", dropout {dropout:g}" if dropout else "")
        found[name] = partial(case, plans(model, quick, dtype, variants, dropout), apart=model == "phi3")
    return found


def plans(
    model: str, quick: bool, dtype: torch.dtype, variants: list[tuple[str, torch.dtype]], dropout: float
) -> dict[str, Plan]:
    """The frozen model, and it with an adapter by each of these libraries."""
    found = {"frozen": Plan(model, quick, dtype, "frozen", dtype, dropout)}
    for library, adapter in variants:
        label = library if adapter == dtype else f"{library}, float32 adapter"
        found[label] = Plan(model, quick, dtype, library, adapter, dropout)
    return found


def case(plans: dict[str, Plan], apart: bool) -> Case:
    """All variants of one model; `apart` also looks at each in a process of its own."""
    columns = {}
    if apart:
        looks = {name: look(plan) for name, plan in plans.items()}
        columns = {column: {name: seen[column] for name, seen in looks.items()} for column in looks["frozen"]}
    return Case({name: Training(plan).step for name, plan in plans.items()}, columns)


def look(plan: Plan) -> dict[str, float]:
    """What `take_steps` sees in a new process; in this one if quick, as a process takes seconds to start."""
    if plan.quick:
        return take_steps(plan)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(take_steps, plan).result()


def take_steps(plan: Plan) -> dict[str, float]:
    """The losses before and after a few steps, and the most memory that this process has had."""
    training = Training(plan)
    losses = [training.step() for _ in range(STEPS + 1)]
    return {"peak MiB": peak_mib(), "first loss": losses[0], f"loss after {STEPS} steps": losses[-1]}


class Training:
    """A model, its optimizer and one batch, of random tokens that are the same for all variants."""

    def __init__(self, plan: Plan) -> None:
        self.model = build(plan)
        generator = torch.Generator().manual_seed(0)
        rows, length = SHAPES[plan.model]
        shape = rows, length // (16 if plan.quick else 1)
        ids = torch.randint(self.model.config.vocab_size, shape, generator=generator, device="cpu")
        self.ids = ids.to(torch.get_default_device())
        self.x = self.model.get_input_embeddings()(self.ids).detach().requires_grad_()
        parameters = trainable(self.model) or [self.x]  # the frozen model has none: torch wants one
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        self.x.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def loss(self) -> torch.Tensor:
        return self.model(inputs_embeds=self.x, labels=self.ids, use_cache=False).loss


if __name__ == "__main__":
    main(__file__, __doc__, cases)
