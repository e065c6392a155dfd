"""LoRA layers for PyTorch: a pretrained layer plus one equation, W = g ⊙ (W₀ + s · B A)."""

from importlib import import_module
from typing import Any

from lora.adapter import Adapter, AdapterError
from lora.algebra import combine, scale, subtract
from lora.checkpoint import adapter_of, load_adapter, save_adapter
from lora.config import LoraConfig
from lora.conv import Conv1d, Conv2d, Conv3d
from lora.disabling import disabled
from lora.embedding import Embedding
from lora.extract import Extracted, extract
from lora.formats import read_adapter, write_adapter
from lora.groups import param_groups
from lora.init.calibrate import calibrate
from lora.init.initialize import initialize
from lora.init.loftq import loftq
from lora.inject import eject, inject
from lora.layer import LoRALayer
from lora.linear import Linear
from lora.merge import merge, merged_state_dict
from lora.merged_linear import MergedLinear
from lora.quantized import register_weight
from lora.registry import register
from lora.resize import Resized, resize
from lora.swap import prepare_for_swap
from lora.training import lora_state_dict, mark_only_lora_as_trainable

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # `lora.parallel` brings DTensor with it, whose import takes a second.
    if name != "parallel":
        raise AttributeError(f"module 'lora' has no attribute {name!r}")
    return import_module("lora.parallel")


__all__ = [
    "Adapter",
    "AdapterError",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Extracted",
    "Linear",
    "LoRALayer",
    "LoraConfig",
    "MergedLinear",
    "Resized",
    "adapter_of",
    "calibrate",
    "combine",
    "disabled",
    "eject",
    "extract",
    "initialize",
    "inject",
    "load_adapter",
    "loftq",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "merged_state_dict",
    "param_groups",
    "prepare_for_swap",
    "read_adapter",
    "register",
    "register_weight",
    "resize",
    "save_adapter",
    "scale",
    "subtract",
    "write_adapter",
]
