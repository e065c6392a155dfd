"""Models to train, and each library's way of adapting one."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import peft
import rivals
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import lora

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # which are no package
from phi3 import fetch, pretrained, quantizing, tiny

R = {"llama": 8, "phi3": 16, "phi3-nf4": 16, "phi3-mini": 16}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
TARGETS["phi3-nf4"] = TARGETS["phi3-mini"] = TARGETS["phi3"]


@dataclass(frozen=True)
class Plan:
    """One model with one library's adapter; small if quick."""

    model: str
    quick: bool
    dtype: torch.dtype
    library: str
    adapter: torch.dtype
    dropout: float


def build(plan: Plan) -> nn.Module:
    """The model in training, its A random and its B zero: the same for all libraries where their shapes are."""
    torch.manual_seed(0)
    return adapted(_MODELS[plan.model](plan.quick, plan.dtype), plan)


def adapted(model: nn.Module, plan: Plan) -> nn.Module:
    """A model with one library's adapter, in training, with the A and B that all have at the start."""
    _ADAPT[plan.library](model.requires_grad_(False), plan)
    return rivals.same_start(model, up=0.0)


def _llama(quick: bool, dtype: torch.dtype) -> nn.Module:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 8192}
    if quick:
        sizes = {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3)).to(dtype)


def _phi3(quick: bool, dtype: torch.dtype) -> nn.Module:
    if quick:
        return tiny.model().to(dtype)
    model = pretrained.load(pretrained.SMOLLM2, fetch.default_cache_dir(), dtype=dtype)[0]
    return model.to(torch.get_default_device())


def _phi3_nf4(quick: bool, dtype: torch.dtype) -> nn.Module:
    model = _phi3(quick, dtype)
    quantizing.quantize(model, "nf4", {"modules_to_save": None, "init_lora_weights": True})
    model.is_loaded_in_4bit = True  # which is how transformers tells PEFT
    return model


def _phi3_mini(quick: bool, dtype: torch.dtype) -> nn.Module:
    layers = {"num_hidden_layers": 1} if quick else {}
    return Phi3ForCausalLM._from_config(Phi3Config(**layers), dtype=dtype)


def _adapt_loralib(model: nn.Module, plan: Plan) -> None:
    for name, module in _targets(model, plan):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, rivals.with_loralib(module, R[plan.model], plan.dropout))


def _targets(model: nn.Module, plan: Plan) -> Iterable[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if name.rpartition(".")[2] in TARGETS[plan.model]]


def _adapt_peft(model: nn.Module, plan: Plan) -> None:
    config = peft.LoraConfig(**_settings(plan))
    peft.get_peft_model(model, config, autocast_adapter_dtype=plan.adapter != plan.dtype)


def _adapt_lora(model: nn.Module, plan: Plan) -> None:
    lora.inject(model, **_settings(plan), adapter_dtype=plan.adapter)


def _adapt_lora_split(model: nn.Module, plan: Plan) -> None:
    splits = pretrained.fused_splits(model.config)
    lora.inject(model, **_settings(plan), adapter_dtype=plan.adapter, splits=splits)


def _settings(plan: Plan) -> dict[str, object]:
    """What PEFT and lora call by the same names."""
    r, names = R[plan.model], TARGETS[plan.model]
    return {"r": r, "lora_alpha": 2 * r, "lora_dropout": plan.dropout, "target_modules": names}


_MODELS = {"llama": _llama, "phi3": _phi3, "phi3-nf4": _phi3_nf4, "phi3-mini": _phi3_mini}
_ADAPT = {
    "frozen": lambda model, plan: None,
    "loralib": _adapt_loralib,
    "PEFT": _adapt_peft,
    "lora": _adapt_lora,
    "lora, split": _adapt_lora_split,
}
