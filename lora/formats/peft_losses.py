"""What PEFT loses of a folder that is right: targets that it takes for those of another version of the model."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch.nn as nn

from lora.adapters.adapter import Adapter
from lora.errors import some

# transformers 5 has a mixture's experts in stacks. PEFT lets adapters from before find them: it takes these targets for
# the experts', whatever they are in this model (a dense layer's, or a shared expert's), and looks for them in the
# stacks. By the name under which transformers knows how such a checkpoint is converted. ("gate" it takes for the
# router, and finds it whatever its class is.)
_TAKEN_FOR_EXPERTS = {
    "mixtral": ("w1", "w2", "w3"),
    "qwen2_moe": ("gate_proj", "up_proj", "down_proj"),
}


def losses(model: nn.Module, adapter: Adapter) -> Iterator[str]:
    """A warning, if PEFT 0.21 would lose adapters of some modules of this model, or raise, though all are written."""
    said = getattr(getattr(model, "config", None), "model_type", None)
    taken = _TAKEN_FOR_EXPERTS.get(_like(said), ())
    layers = (name for name, settings in adapter.modules.items() if not settings.base.parameter)
    names = [name for name in layers if name.rpartition(".")[2] in taken]
    if names:
        yield (
            f"PEFT 0.21 loses the adapters of {some(names, len(names))}, or raises: in a model of the type {said!r} "
            "it takes layers of these names for the experts that transformers 5 keeps in stacks. lora loads this "
            "folder; for PEFT's users merge the adapter, or leave these layers out."
        )


def _like(model_type: object) -> str:
    """The model type as which transformers converts checkpoints of this one; before version 5 it converts none."""
    known = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    return "mixtral" if known and model_type == "mixtral" else str(known.get(model_type))
