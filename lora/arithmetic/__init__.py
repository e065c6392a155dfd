"""Adapters made of adapters, or of two models: sums, differences, other scalings and ranks; and how far two are apart.

All names here are names of `lora`, too.
"""

from lora.arithmetic.algebra import combine, scale, subtract
from lora.arithmetic.approximation import Extracted, Resized, extract, resize

__all__ = ["Extracted", "Resized", "combine", "extract", "resize", "scale", "subtract"]
