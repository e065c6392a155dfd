"""transformers' plan for Phi-3, with our styles in it."""

import pytest
import torch
from conftest import randomised
from test_parallel import gradients_of, mesh
from torch.distributed.tensor.parallel import parallelize_module
from transformers import Phi3Config, Phi3ForCausalLM

import lora
import lora.parallel


def tiny(tied):
    torch.manual_seed(2)
    config = Phi3Config(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    model = Phi3ForCausalLM(config).double()
    splits = {"qkv_proj": (16, 8, 8), "gate_up_proj": (20, 20)}
    lora.inject(model, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], r=3, splits=splits)
    for layer in model.modules():
        if isinstance(layer, lora.LoRALayer):
            randomised(layer, 0.2)
    return model


def follows_the_plan(tied):
    alone, divided = tiny(tied), tiny(tied)
    styles = lora.parallel.plan_of(divided)
    kinds = {type(style).__name__ for name, style in styles.items() if name.endswith(("qkv_proj", "gate_up_proj"))}
    assert kinds == {"MergedColwiseParallel"}
    parallelize_module(divided, mesh(), styles)
    ids = torch.randint(37, (2, 7), generator=torch.Generator().manual_seed(3))
    outputs = [model(input_ids=ids, labels=ids, use_cache=False) for model in (alone, divided)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits)
    for output in outputs:
        output.loss.backward()
    expected = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    torch.testing.assert_close(gradients_of(divided), expected)
    return len(expected)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("tied", [False, True])
def test_phi3_by_transformers_own_plan_is_that_of_one_process(ranks, tied):
    assert ranks.run(follows_the_plan, tied)[0] == 2 * 4 * 2
