"""Phi-3's MLP in training as one function, which computes its activation again in backward: --fused-mlp."""

from torch import Tensor, nn
from transformers.models.phi3.modeling_phi3 import Phi3MLP

import lora
from lora.functional import lora_swiglu
from phi3.errors import UserError


class FusedMLP(Phi3MLP):
    """The same parameters and the same function, with less kept for backward."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        layers = self.gate_up_proj, self.down_proj
        plain = any(not isinstance(layer, lora.LoRALayer) or layer.lora_is_off() for layer in layers)
        if plain or not self.training:
            return super().forward(hidden_states)
        return lora_swiglu(hidden_states, *(layer.lora_adapted() for layer in layers))


def fuse(model: nn.Module) -> None:
    """Makes every MLP of the model a fused one, in place."""
    mlps = [module for module in model.modules() if isinstance(module, Phi3MLP)]
    if not mlps or model.config.hidden_act != "silu":
        raise UserError("--fused-mlp is for models with Phi-3's MLP and the activation silu")
    for mlp in mlps:
        if not all(
            isinstance(layer, lora.LoRALayer) and layer.lora_dense for layer in (mlp.gate_up_proj, mlp.down_proj)
        ):
            raise UserError("--fused-mlp needs both gate_up_proj and down_proj among --target-modules")
        if any(layer.use_dora for layer in (mlp.gate_up_proj, mlp.down_proj)):
            raise UserError("--fused-mlp knows no magnitudes: leave out either it or --use-dora")
        mlp.__class__ = FusedMLP
