"""Models on several devices. Public is tensor parallelism: styles for torch's `parallelize_module` that know of LoRA.

They are imported when one is asked for, and DTensor with them, which takes a second: `import lora` comes through here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lora.parallel.tensor_parallel import (
        ColwiseParallel,
        MergedColwiseParallel,
        RowwiseParallel,
        clip_grad_norm_,
        plan_of,
        sum_gradients,
    )

__all__ = [
    "ColwiseParallel",
    "MergedColwiseParallel",
    "RowwiseParallel",
    "clip_grad_norm_",
    "plan_of",
    "sum_gradients",
]

_OLDEST = (2, 11)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lora.parallel' has no attribute {name!r}")
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST:  # a nightly build counts as its release
        raise ImportError(
            f"lora.parallel.{name} needs torch 2.11 or newer, and this is torch {torch.__version__}: older releases "
            "compute wrong norms of divided gradients, or restore divided layers wrongly from checkpoints."
        )
    return getattr(import_module("lora.parallel.tensor_parallel"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
