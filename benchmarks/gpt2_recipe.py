"""loralib's own recipe for GPT-2, in small: does `import lora as loralib` train the same?

The recipe is examples/NLG of https://github.com/microsoft/LoRA: GPT-2 whose fused query, key and value are one layer,
`MergedLinear(r=4, lora_alpha=32, enable_lora=[True, False, True], fan_in_fan_out=True, merge_weights=False)`; then
`mark_only_lora_as_trainable`, AdamW (weight decay 0.01, eps 1e-6) with a linear schedule after a warm-up, label
smoothing of 0.1, `eval()` for the held-out loss and back to `train()`, and `lora_state_dict` for the checkpoint. One
source builds the model; it is given the library, as `import lora as loralib` would.

In small: 3 layers of width 64 and 64 bytes of context, pretrained here on Python's manual, which the standard library
has for `help()`. It is adapted to the sources of five modules; that of another is held out. The learning rate is 3e-3
(the recipe's 2e-4 is for 26,000 steps), and there is no dropout (0.1), since the libraries draw different masks by
design.

    python benchmarks/gpt2_recipe.py [--layer MergedLinear] [--steps 500] [--dtype float32] [--quick]

`--layer Linear` has one A for query, key and value, which PEFT can do as well: it adapts a fused weight whole. In
bfloat16 are all weights; `--dtype autocast` has float32 weights under torch.autocast, as the recipe's `--fp16` has.
"loralib, its loss × 3" is loralib once more, rounded elsewhere, as in curves.py: what differs no more than that differs
by rounding. "merge_weights" is loralib's default, which the recipe turns off: `eval()` then computes with a merged
weight, and loralib writes it over the base and takes it back. "In the other library" is the held-out loss that lora has
from loralib's checkpoint, and loralib from lora's. What has been run and is in the results is not run again.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

import lines
import loralib
import peft
import torch
import torch.nn.functional as F
from rivals import trainable
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora

RESULTS = Path(__file__).parent / "results"
LEARNT = ("argparse", "doctest", "inspect", "tarfile", "typing")  # modules with these sources
HELD_OUT = "optparse"
VOCABULARY = 256  # bytes
LORA = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.0, "fan_in_fan_out": True, "merge_weights": False}
LAYERS: dict[str, dict[str, Any]] = {"MergedLinear": {"enable_lora": [True, False, True]}, "Linear": {}}
Layer = Callable[[int, int], nn.Module]  # of how many features into how many


@dataclass(frozen=True)
class Sizes:
    """Of the model, and of what it learns from."""

    width: int = 64
    layers: int = 3
    heads: int = 4
    context: int = 64
    batch: int = 8
    pretraining: int = 1000  # steps
    held_out: int = 64  # rows
    evaluations: int = 10
    lr: float = 3e-3


QUICK = Sizes(width=32, layers=2, heads=2, context=32, batch=4, pretraining=150, held_out=16, evaluations=4, lr=1e-2)


class Attention(nn.Module):
    """Causal self-attention; `layer` makes the fused projection to query, key and value."""

    def __init__(self, sizes: Sizes, layer: Layer) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.c_attn = layer(sizes.width, 3 * sizes.width)
        self.c_proj = Conv1D(sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (rows, heads, length, width / heads)
        return self.c_proj(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, each after a norm and beside the identity."""

    def __init__(self, sizes: Sizes, layer: Layer) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.attn = Attention(sizes, layer)
        self.c_fc, self.c_proj = Conv1D(4 * sizes.width, sizes.width), Conv1D(sizes.width, 4 * sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2, whose head is its table of words."""

    def __init__(self, sizes: Sizes, layer: Layer) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, sizes.width), nn.Embedding(sizes.context, sizes.width)
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=0.02)
        self.h = nn.ModuleList([Block(sizes, layer) for _ in range(sizes.layers)])
        self.ln_f = nn.LayerNorm(sizes.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


@dataclass(frozen=True)
class Recipe:
    """What all libraries are given."""

    sizes: Sizes
    layer: str
    steps: int
    dtype: torch.dtype
    autocast: bool
    pretrained: Mapping[str, Tensor]

    def model(self, library: ModuleType, **changed: Any) -> nn.Module:
        """The pretrained model with the library's layers, from one seed, as the recipe makes it."""
        torch.manual_seed(0)
        layer = partial(getattr(library, self.layer), **LORA | LAYERS[self.layer] | changed)
        model = GPT2(self.sizes, layer)
        missing, unexpected = model.load_state_dict(self.pretrained, strict=False)
        assert not unexpected
        assert all("lora_" in key for key in missing)
        library.mark_only_lora_as_trainable(model)
        return model.to(self.dtype)

    def peft(self) -> nn.Module:
        """The same with PEFT, for layers with one A: with the A that the others begin with."""
        model = GPT2(self.sizes, conv1d)
        model.load_state_dict(self.pretrained)
        names = {"r": LORA["r"], "lora_alpha": LORA["lora_alpha"], "target_modules": ["c_attn"], "fan_in_fan_out": True}
        peft.get_peft_model(model.to(self.dtype), peft.LoraConfig(**names), autocast_adapter_dtype=False)
        with torch.no_grad():
            for ours, theirs in zip(trainable(model), trainable(self.model(loralib)), strict=True):
                ours.copy_(theirs)
        return model

    def train(self, model: nn.Module, times: float = 1.0) -> lines.Training:
        """Train as the recipe does; `times` multiplies the loss for the backward pass, and with it AdamW's `eps`."""
        base = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
        optimizer = torch.optim.AdamW(trainable(model), lr=self.sizes.lr, weight_decay=0.01, eps=1e-6 * times)
        warmup = max(1, self.steps // 50)
        fall = partial(learning_rate, warmup=warmup, steps=self.steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, fall)
        losses, before = [], self.held_out_loss(model)
        model.train()
        for step, rows in enumerate(self.rows()):
            loss = self.loss(model, rows, label_smoothing=0.1)
            (loss * times).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            if (step + 1) % max(1, self.steps // self.sizes.evaluations) == 0:
                held_out = self.held_out_loss(model)
                model.train()
        parameters = dict(model.named_parameters())
        changed = sum(int((tensor != parameters[name]).sum()) for name, tensor in base.items())
        share = changed / sum(tensor.numel() for tensor in base.values())
        numbers = {"held-out loss before": before, "held-out loss": held_out, "share of the base written": share}
        return lines.Training(losses, numbers)

    def rows(self) -> Iterator[Tensor]:
        """The rows of each step, (batch, context + 1)."""
        text, generator = bytes_of("\n".join(map(source, LEARNT))), torch.Generator().manual_seed(110)
        return batches(text, self.sizes, self.steps, generator)

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        """In `eval()`, without smoothing, on a text that nothing was learnt from."""
        model.eval()
        length = self.sizes.context + 1
        rows = bytes_of(source(HELD_OUT))[: self.sizes.held_out * length].view(-1, length)
        return self.loss(model, rows).item()

    def loss(self, model: nn.Module, rows: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy per byte, in float32 at least."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = model(rows[:, :-1])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), label_smoothing=label_smoothing)


def conv1d(features: int, into: int) -> nn.Module:
    return Conv1D(into, features)


def learning_rate(step: int, warmup: int, steps: int) -> float:
    """As a share of its peak: a linear rise from zero, then a linear fall."""
    return step / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


def source(module: str) -> str:
    """The source of a module of the standard library."""
    return inspect.getsource(importlib.import_module(module))


def bytes_of(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))


def batches(text: Tensor, sizes: Sizes, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows from anywhere in the text, (batch, context + 1)."""
    windows = text.unfold(0, sizes.context + 1, 1)
    for _ in range(steps):
        yield windows[torch.randint(len(windows), (sizes.batch,), generator=generator)]


def pretrain(sizes: Sizes) -> dict[str, Tensor]:
    """The weights of a GPT-2 that has learnt some of Python's manual, in float32."""
    torch.manual_seed(0)
    model = GPT2(sizes, conv1d)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    text = bytes_of("\n".join(topics[name] for name in sorted(topics)))
    for step, rows in enumerate(batches(text, sizes, sizes.pretraining, torch.Generator().manual_seed(0))):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * learning_rate(step + 1, max(1, sizes.pretraining // 10), sizes.pretraining + 1)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def checkpoint(library: ModuleType, model: nn.Module) -> bytes:
    """What the recipe's torch.save writes."""
    file = io.BytesIO()
    torch.save({"model_state_dict": library.lora_state_dict(model)}, file)
    return file.getvalue()


def load(model: nn.Module, written: bytes) -> None:
    """Take A and B from a checkpoint, all of them and nothing else."""
    state = torch.load(io.BytesIO(written))["model_state_dict"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not any("lora_" in key for key in missing)


def trainings(recipe: Recipe) -> dict[str, Callable[[], lines.Training]]:
    """By library and what is changed of the recipe."""

    def train(library: ModuleType, times: float = 1.0, **changed: Any) -> lines.Training:
        model = recipe.model(library, **changed)
        losses, numbers = recipe.train(model, times)
        other = recipe.model(lora if library is loralib else loralib, **changed)
        load(other, checkpoint(library, model))
        return lines.Training(losses, {**numbers, "in the other library": recipe.held_out_loss(other)})

    found = {"loralib": partial(train, loralib), "lora": partial(train, lora)}
    if recipe.layer == "Linear":
        found["PEFT"] = lambda: recipe.train(recipe.peft())
    found["loralib, its loss × 3"] = partial(train, loralib, 3.0)
    for name, library in {"loralib": loralib, "lora": lora}.items():
        found[f"{name}, merge_weights"] = partial(train, library, merge_weights=True)
    return found


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=LAYERS, default="MergedLinear")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "autocast"), default="float32")
    parser.add_argument("--quick", action="store_true", help="a still smaller model: whether it runs")
    parser.add_argument("--out", type=Path, help="folder for the results (default: results/, if not quick)")
    chosen = parser.parse_args(arguments or None)
    command = f"python benchmarks/gpt2_recipe.py --layer {chosen.layer} --steps {chosen.steps} --dtype {chosen.dtype}"
    out, sizes = chosen.out or (None if chosen.quick else RESULTS), QUICK if chosen.quick else Sizes()
    path = out and out / f"gpt2_{chosen.layer}_{chosen.dtype}.json"
    autocast = chosen.dtype == "autocast"
    dtype = torch.float32 if autocast else getattr(torch, chosen.dtype)
    recipe = Recipe(sizes, chosen.layer, chosen.steps, dtype, autocast, pretrain(sizes))
    lines.run(path, __doc__ or "", command, trainings(recipe))


if __name__ == "__main__":
    main()
