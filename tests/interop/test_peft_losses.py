"""Where PEFT loses adapters of a folder that is right, save_adapter warns, and names them; nowhere else does it."""

import copy
import types
import warnings

import peft
import pytest
import torch
import transformers
from peft_models import QUIET
from torch import nn

import lora

pytestmark = QUIET

SIZES = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_experts_per_tok": 2},
    "moe_intermediate_size": 8,
}
IDS = torch.tensor([[5, 7, 9, 11, 13, 4]])
MODELS = {
    "a dense layer beside experts": lambda: transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, mlp_only_layers=[0], head_dim=8
    ),
    "shared experts": lambda: transformers.DeepseekV3Config(
        **SIZES, n_routed_experts=4, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, n_group=1, topk_group=1,
    ),
    "as it is": lambda: transformers.Qwen2MoeConfig(**SIZES, num_experts=4, shared_expert_intermediate_size=8),
    "no experts": lambda: transformers.LlamaConfig(**SIZES),
}  # fmt: skip
MLP = ["gate_proj", "up_proj", "down_proj"]


def outputs(base, targets, folder):
    """What we compute, and what PEFT does with the folder that we write; and what save_adapter warns of."""
    ours = copy.deepcopy(base)
    lora.inject(ours, target_modules=targets, r=2, init_lora_weights=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora.save_adapter(ours, folder, format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that PEFT has no place for, or misses
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    return ours, theirs, [str(one.message) for one in caught]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("targets", [MLP, ["down_proj"], ["o_proj"]], ids=len)
def test_it_warns_where_peft_computes_another_function_and_nowhere_else(kind, targets, tmp_path):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(MODELS[kind]()).eval()
    ours, theirs, warned = outputs(base, targets, tmp_path / "a")
    expected, got = ours(IDS).logits, theirs(IDS).logits
    lost = kind in ("a dense layer beside experts", "shared experts") and targets != ["o_proj"]
    assert len(warned) == lost
    if not lost:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        return
    assert (got - expected).abs().max() > 0.01
    adapted = [name for name, module in ours.named_modules() if isinstance(module, lora.LoRALayer)]
    assert f"save_adapter: PEFT 0.21 loses the adapters of {adapted[0]}" in warned[0]
    back = copy.deepcopy(base)
    lora.load_adapter(back, tmp_path / "a")
    assert torch.equal(back(IDS).logits, expected)


def test_half_of_them_is_more_than_peft_takes(tmp_path):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(MODELS["shared experts"]())
    lora.inject(base, target_modules=["up_proj"], r=2)
    with pytest.warns(UserWarning, match=r"loses the adapters of model\.layers\.0\.mlp\.up_proj.*, or raises"):
        lora.save_adapter(base, tmp_path, format="portable")
    lora.eject(base)
    with pytest.raises(ValueError, match="Cannot convert PEFT target"):
        peft.PeftModel.from_pretrained(base, tmp_path)


class Named(nn.Module):
    """A model of a user's own that says to be of a type of transformers'."""

    def __init__(self, model_type):
        super().__init__()
        self.config = types.SimpleNamespace(model_type=model_type)
        self.block = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("w1", "w2", "w3", "gate", "other", *MLP)})

    def forward(self, x):
        return sum(layer(x) ** (n + 1) for n, layer in enumerate(self.block.values()))


@pytest.mark.parametrize("model_type", ["mixtral", "minimax", "olmoe", "qwen2_moe", "gemma3", "unheard-of"])
@pytest.mark.parametrize("target", ["w2", "gate", "down_proj"])
def test_every_name_that_is_taken_for_an_experts(model_type, target, tmp_path):
    base, x = Named(model_type), torch.randn(3, 4)
    ours, theirs, warned = outputs(base, [f"block.{target}", "block.other"], tmp_path)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5) == (not warned)
