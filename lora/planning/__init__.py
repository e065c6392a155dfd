"""How much memory fine-tuning a decoder with LoRA takes on each rank, by formula, before anything is made."""

from lora.planning.decoder import Decoder, read_decoder
from lora.planning.engines import ENGINES, Plan, plan
from lora.planning.terms import TERMS, Rank, Term
from lora.planning.training import Training

__all__ = ["ENGINES", "TERMS", "Decoder", "Plan", "Rank", "Term", "Training", "plan", "read_decoder"]
