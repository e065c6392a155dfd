"""LoRA layers for PyTorch: a pretrained layer plus one equation, W = W₀ + s · B A."""

from lora.conv import Conv1d, Conv2d, Conv3d
from lora.embedding import Embedding
from lora.layer import LoRALayer
from lora.linear import Linear, MergedLinear
from lora.registry import register

__version__ = "0.1.0"

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "register",
]
