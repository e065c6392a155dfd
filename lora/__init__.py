"""LoRA layers for PyTorch: a pretrained layer plus one equation, W = g ⊙ (W₀ + s · B A)."""

from lora import parallel as parallel
from lora import reports as reports
from lora.adapters.adapter import Adapter
from lora.adapters.checkpoint import adapter_of, load_adapter, save_adapter
from lora.adapters.formats import read_adapter, write_adapter
from lora.arithmetic import Extracted, Resized, combine, extract, resize, scale, subtract
from lora.banking import AdapterBank, bank
from lora.errors import AdapterError
from lora.formats import enter as _enter_formats
from lora.init.calibration import calibrate
from lora.init.quantization import loftq
from lora.layers.conv import Conv1d, Conv2d, Conv3d
from lora.layers.embedding import Embedding
from lora.layers.layer import LoRALayer
from lora.layers.linear import Linear, MergedLinear
from lora.layers.registry import register
from lora.layers.weights import register_weight
from lora.models.config import LoraConfig
from lora.models.disabling import disabled
from lora.models.idle import check
from lora.models.injection import eject, inject
from lora.models.merging import merge, merged_state_dict
from lora.models.start import initialize
from lora.models.training import lora_state_dict, mark_only_lora_as_trainable, param_groups
from lora.parallel.ddp import enter as _enter_checks
from lora.swapping import prepare_for_swap

__version__ = "0.1.0"

# What the wings add to the rings' tables.
_enter_formats()
_enter_checks()

__all__ = [
    "Adapter",
    "AdapterBank",
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
    "bank",
    "calibrate",
    "check",
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
