"""The cross entropy in chunks with a soft cap is the loss that transformers computes for a Gemma 2."""

import pytest
import torch
import transformers

import lora
from lora.functional import cross_entropy, linear_cross_entropy


@pytest.mark.parametrize("softcap", [None, 2.0, 30.0])
def test_it_is_the_models_own_loss(softcap, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_LOGITS", {"cpu": 200})  # 5 rows at a time
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=softcap, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config)
    model.lm_head.weight.data.mul_(40)  # as of a model that is trained, logits are large beside the cap
    lora.inject(model, target_modules=["q_proj", "down_proj"], r=2)
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, 40, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    own = model(ids, labels=labels, use_cache=False)
    theirs = own.loss, *torch.autograd.grad(own.loss, trained)
    hidden = model.model(ids, use_cache=False).last_hidden_state
    cap = config.final_logit_softcapping
    loss = linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, labels[:, 1:], softcap=cap)
    torch.testing.assert_close((loss, *torch.autograd.grad(loss, trained)), theirs, rtol=1e-5, atol=1e-6)
    uncapped = linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, labels[:, 1:])
    assert (bool((uncapped - own.loss).abs() > 0.1)) == (softcap is not None)
