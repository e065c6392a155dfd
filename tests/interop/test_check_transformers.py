"""lora.check says what reentrant checkpointing over a frozen embedding does, and what to do about it."""

import pytest
import torch
import transformers

import lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated"),
]
IDS = torch.tensor([[5, 7, 9, 11, 13]])


def trained(use_reentrant, grads_for_inputs=False, dead=False):
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    lora.inject(model, target_modules=["q_proj", "up_proj", "lm_head"], r=2)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if grads_for_inputs:  # transformers 5 does so by itself
        model.enable_input_require_grads()
    else:
        model.disable_input_require_grads()
    if dead:  # what is not called
        for layer in model.model.layers:
            layer.mlp.forward = lambda x: x
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return model


def test_layers_under_it_are_named_with_what_to_do():
    report = lora.check(trained(use_reentrant=True))
    inside = ["self_attn.q_proj", "mlp.up_proj"]
    assert list(report.idle) == [f"model.layers.{n}.{name}" for n in (0, 1) for name in inside]
    for reason in report.idle.values():
        assert "over inputs that need no gradient, as a frozen embedding's" in reason
        assert "call `model.enable_input_require_grads()`, or pass `use_reentrant=False`" in reason


@pytest.mark.parametrize(("use_reentrant", "grads"), [(True, True), (False, False)])
def test_and_what_to_do_helps(use_reentrant, grads):
    assert not lora.check(trained(use_reentrant, grads)).idle


def test_where_others_around_it_learn_it_is_something_else():
    report = lora.check(trained(use_reentrant=True, grads_for_inputs=True, dead=True))
    reasons = {name: reason for name, reason in report.idle.items() if name.endswith("up_proj")}
    assert [name.rpartition(".")[2] for name in reasons] == ["up_proj"] * 2
    assert all(reason.startswith("no gradient came to it: it was not called") for reason in reasons.values())
