"""What does LoRA beside a weight of four bits (QLoRA) cost beyond the frozen layer, in time and in memory?

Forward and backward with r = 16 and gradients for the input, A and B, against bitsandbytes' frozen NF4 layer with a
gradient for the input. "kept" is what autograd keeps for backward, "made" all new storage of a step, both in sizes of
what they are a ratio to. "The six products alone" are the frozen layer and LoRA's products into memory that is there
already, with no dropout and no layer around them. loralib knows no quantised layers. A training step is that of
training_step.py, its model quantised by the example's `--quantize nf4`.

    python benchmarks/quantized.py [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import bitsandbytes as bnb
import rivals
import torch
import training_step
from harness import Case, main
from linear import BF16, DROPOUTS, F32, R, against_frozen
from torch import nn

# in_features, out_features, tokens, dtype to compute in, dtype of the adapter
SHAPES = {
    "qkv 3072→9216, 512 tokens, float32": (3072, 9216, 512, F32, F32),
    "576→960, 512 tokens, float32": (576, 960, 512, F32, F32),
    "576→960, 512 tokens, bfloat16, float32 adapter": (576, 960, 512, BF16, F32),
}


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    scale = 16 if quick else 1
    found: dict[str, Callable[[], Case]] = {}
    for (name, (i, o, n, dtype, adapter)), p in product(SHAPES.items(), DROPOUTS):
        words = f", dropout {p:g}" if p else ""
        found[name + words] = partial(case, i // scale, o // scale, n // scale, dtype, adapter, p)
    for p in DROPOUTS:
        name = "a training step of phi3, 4 × 256 tokens, float32" + (f", dropout {p:g}" if p else "")
        found[name] = partial(step, quick, p)
    return found


def step(quick: bool, dropout: float) -> Case:
    """The example's pretrained model, as training_step.py trains it."""
    libraries = [("PEFT", F32), ("lora", F32), ("lora, split", F32)]
    return training_step.case(training_step.plans("phi3-nf4", quick, F32, libraries, dropout), apart=True)


def case(i: int, o: int, n: int, dtype: torch.dtype, adapter: torch.dtype, dropout: float) -> Case:
    return against_frozen(layers(i, o, dtype, adapter, dropout), i, o, n, dtype, dropout)


def layers(i: int, o: int, dtype: torch.dtype, adapter: torch.dtype, dropout: float) -> dict[str, nn.Module]:
    """The frozen layer in NF4, and it with a LoRA by each library."""
    base = bnb.nn.Linear4bit(i, o, bias=False, quant_type="nf4", compute_dtype=dtype).to(dtype).to("cpu")
    theirs = rivals.with_peft(base, R, dropout)
    for parameter in rivals.trainable(theirs):  # beside whole numbers PEFT's are float32
        parameter.data = parameter.data.to(adapter)
    ours = rivals.with_lora(base, R, dropout, adapter)
    return {"frozen": base.requires_grad_(False), "PEFT": theirs, "lora": ours}


if __name__ == "__main__":
    main(__file__, __doc__, cases)
