"""LoRA as functions of tensors: each plain equation, and beside it the same with a hand-written backward."""

from lora.functional.beside import lora_beside, plain_lora_beside
from lora.functional.conv import Geometry, lora_conv, plain_lora_conv
from lora.functional.cross_entropy import linear_cross_entropy, plain_linear_cross_entropy
from lora.functional.embedding import Lookup, lora_embedding, plain_lora_embedding
from lora.functional.linear import lora_linear, plain_lora_linear
from lora.functional.magnitude import magnify, plain_magnify
from lora.functional.rows import Rows, Update, lora_linear_rows, plain_lora_linear_rows
from lora.functional.swiglu import Adapted, lora_swiglu, plain_lora_swiglu

__all__ = [
    "Adapted",
    "Geometry",
    "Lookup",
    "Rows",
    "Update",
    "linear_cross_entropy",
    "lora_beside",
    "lora_conv",
    "lora_embedding",
    "lora_linear",
    "lora_linear_rows",
    "lora_swiglu",
    "magnify",
    "plain_linear_cross_entropy",
    "plain_lora_beside",
    "plain_lora_conv",
    "plain_lora_embedding",
    "plain_lora_linear",
    "plain_lora_linear_rows",
    "plain_lora_swiglu",
    "plain_magnify",
]
