"""A tiny Phi-3 of transformers under `torch.compile`: one graph, which adapters, sizes and switches do not change."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Phi3Config, Phi3ForCausalLM

import lora


def tiny(r, seed):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    model = Phi3ForCausalLM(Phi3Config(**sizes, **heads)).eval()
    lora.inject(
        model,
        target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        r=r,
        splits={"qkv_proj": (16, 8, 8), "gate_up_proj": (24, 24)},
    )
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            torch.nn.init.normal_(module.lora_B, std=0.3)
    return model


@pytest.mark.slow
def test_phi3_is_compiled_once_for_all_adapters_and_lengths():
    torch._dynamo.reset()
    model, others = tiny(2, 1), [tiny(r, r) for r in (3, 4)]
    lora.prepare_for_swap(model, 4)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for other, length in zip(others, (7, 11), strict=True):
            lora.load_adapter(model, lora.adapter_of(other))
            ids = torch.randint(40, (3, length))
            got = compiled(ids, use_cache=False).logits
            torch.testing.assert_close(got, other(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
            with lora.disabled(model), lora.disabled(other):
                got = compiled(ids, use_cache=False).logits
                torch.testing.assert_close(got, other(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
