"""Tiny mixtures of experts of transformers', and W of their experts by hand."""

import torch
import transformers as hf

#: What names the experts' parameters of all of them.
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]

_SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2},
}
_LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
}
# For each: its configuration, its class, and what it has beside the sizes.
_MODELS = {
    "Mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, {"num_local_experts": 4}),
    "Qwen3-MoE": (
        hf.Qwen3MoeConfig,
        hf.Qwen3MoeForCausalLM,
        {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "Phi-3.5-MoE": (hf.PhimoeConfig, hf.PhimoeForCausalLM, {"num_local_experts": 4}),
    "GPT-OSS": (
        hf.GptOssConfig,
        hf.GptOssForCausalLM,
        {"num_local_experts": 4, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "DeepSeek-V3": (
        hf.DeepseekV3Config,
        hf.DeepseekV3ForCausalLM,
        {"n_routed_experts": 8, "moe_intermediate_size": 16, **_LATENT},
    ),
}
MODELS = [*_MODELS]


def make(name, implementation="eager", dtype=torch.float64):
    """A model in evaluation, the same each time."""
    config, cls, more = _MODELS[name]
    torch.manual_seed(0)
    model = cls(config(**{**_SIZES, **more})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some start at zero, and small ones would hide what is wrong
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.2)
    model.set_experts_implementation(implementation)
    return model


def ids(rows=2, length=7):
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(1))


def experts_of(model):
    """The modules that have the experts' parameters, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "gate_up_proj") and name.endswith("experts")
    }


def dense_weights(model, dtype=torch.float64):
    """W₀ + s · B A of all experts, by the names of the parameters, in operations that autograd knows."""
    found = {}
    for name, experts in experts_of(model).items():
        for own in ("gate_up_proj", "down_proj"):
            part = vars(experts)["lora_parts"][own]
            A, B = (getattr(experts, f"{own}_lora_{factor}").to(dtype) for factor in "AB")
            W = getattr(experts, own).detach().to(dtype)
            scaling = part.lora_alpha / (part.r**0.5 if part.use_rslora else part.r)
            update = torch.einsum("eor,eri->eoi", B, A) * scaling
            W = W + (update.mT if experts.is_transposed else update)
            if part.use_dora:
                along = 1 if experts.is_transposed else 2
                norm = W.norm(dim=along, keepdim=True).detach()
                W = W / norm * getattr(experts, f"{own}_lora_magnitude").to(dtype).view(norm.shape)
            found[f"{name}.{own}"] = W
    return found


@torch.no_grad()
def randomise(model, std=0.2):
    """The model with other values in A, B and the magnitudes."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn_like(parameter) * (std / 4 if "magnitude" in name else std))
    return model
