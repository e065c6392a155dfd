"""What calibration refuses, with all problems at once and the model as it was."""

import math

import pytest
import torch
from calibration import BATCHES, METHODS, loss_of, waiting
from torch import nn
from toy_model import IDS, Model, snapshot

import lora

methods = pytest.mark.parametrize("how", METHODS)


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs) for m in model.modules()
    )


def refused(model, batches, *words, **options):
    """One ValueError that has all these words; the model is as it was, to the bit."""
    before, rows = snapshot(model), hooks(model)
    with pytest.raises(ValueError, match=r".") as error:
        lora.calibrate(model, batches, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert snapshot(model) == before
    assert hooks(model) == rows
    return str(error.value)


@methods
def test_layers_that_no_batch_reached_are_listed(how):
    def part(model, batch):
        return model.layers[0](model.embed(batch)).sum()

    message = refused(waiting(how)[0], BATCHES, "layers.1.attn.q_proj", "layers.1.mlp.down_proj", "head", step=part)
    assert "layers.0" not in message
    assert message.count("reached it.") == 5


def test_a_layer_that_runs_without_gradients_has_none():
    def part(model, batch):
        with torch.no_grad():
            x = model.layers[0](model.embed(batch))
        return model.head(model.layers[1](x)).square().mean()

    message = refused(waiting("lora_ga")[0], BATCHES, "layers.0.attn.q_proj: no batch's loss reached it", step=part)
    assert message.count("reached it.") == 4


@methods
@pytest.mark.parametrize("batches", [[], iter(()), torch.utils.data.DataLoader([])])
def test_no_batches(how, batches):
    message = refused(waiting(how)[0], batches, "at least one batch", step=loss_of)
    assert message.count("\n") == 1


@methods
def test_numbers_that_are_not_finite(how):
    model, _ = waiting(how)
    model.layers[1].norm.weight.data[3] = math.nan
    words = ["layers.1.mlp.up_proj", "layers.1.mlp.down_proj", "head", "not finite"]
    message = refused(model, BATCHES, *words, step=loss_of)
    assert ("layers.0.attn.q_proj" in message) == (how == "lora_ga")


def test_data_that_say_nothing():
    for how, x, words in [
        ("eva", torch.ones(5, 6), "its inputs are all the same"),
        ("eva", torch.randn(2, 6), "EVA needs more than r (=2) inputs, and it had 2"),
        ("lora_ga", torch.zeros(5, 6), "its gradient is zero"),
        ("corda", torch.zeros(5, 6), "its inputs are zero"),
    ]:
        model, _ = waiting(how, nn.Sequential(nn.Linear(6, 4)), target_modules=["0"])
        refused(model, [x], f"0: {words}", step=loss_of)


def test_corda_has_nothing_to_take_from_a_weight_of_zeros_or_not_finite():
    for value, words in [(0.0, "all zeros"), (math.nan, "NaN")]:
        model, _ = waiting("corda", target_modules=["q_proj", "head"])
        model.head.weight.data.fill_(value)
        assert "q_proj" not in refused(model, BATCHES, words, "head:")


def test_layers_that_cannot_wait_are_listed_at_once():
    model = Model()
    lora.inject(model, target_modules=["embed", "q_proj", "head"], r=9, init_lora_weights="eva")
    refused(
        model,
        BATCHES,
        "embed: 'eva' is for linear layers, not for an Embedding",
        "head: r must be at most 8",
        "r` is 9",
    )
    model = Model()
    lora.inject(model, target_modules=["q_proj", "head"], r=5, lora_alpha=-1, init_lora_weights="lora_ga")
    refused(model, BATCHES, "head: 2 · r must be at most 8, the rank of a matrix of 10 × 8", step=loss_of)
    model = Model()
    lora.inject(model, target_modules=["q_proj"], r=9, lora_alpha=-1, init_lora_weights="corda")
    refused(model, BATCHES, "q_proj: r must be at most 8", "`scaling` must be above 0", step=loss_of)


@pytest.mark.parametrize("how", ["lora_ga", "corda"])
def test_a_base_weight_that_is_another_modules_too(how):
    model, base = waiting(how, Model(tied=True), target_modules=["head"])
    refused(model, BATCHES, "head: its weight is tied to that of embed", step=loss_of)
    model, base = waiting("eva", Model(tied=True), target_modules=["head"])
    lora.calibrate(model, BATCHES)
    torch.testing.assert_close(model(IDS), base(IDS))


def test_steps_that_fail_leave_nothing_behind():
    for how in METHODS:
        model, _ = waiting(how)
        before, rows = snapshot(model), hooks(model)

        def fails(model, batch):
            model(batch)
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            lora.calibrate(model, BATCHES, step=fails)
        assert snapshot(model) == before
        assert hooks(model) == rows


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda model, batch: model(batch), "got a tensor of (2, 4, 10)"),
        (lambda model, batch: None, "got a NoneType"),
        (lambda model, batch: {"logits": model(batch)}, "got a NoneType"),
        (lambda model, batch: torch.zeros(()), "depends on no layer that waits"),
        (lambda model, batch: model(batch).sum().detach(), "depends on no layer that waits"),
    ],
)
def test_lora_ga_needs_a_loss(step, words):
    refused(waiting("lora_ga")[0], BATCHES, "LoRA-GA needs", words, step=step)


def test_arguments_out_of_range_are_listed_at_once():
    wrong = {"step": 3, "rho": 0.5, "corda_method": "opm", "stable_gamma": 0}
    message = refused(waiting("eva")[0], IDS, "`batches`", *(f"`{name}`" for name in wrong), **wrong)
    assert message.count("\n") == 5
    refused(waiting("eva")[0], {"x": IDS}, "got a dict; one batch goes into a list")
    refused(waiting("corda")[0], BATCHES, "`rho` (=2) is for EVA", rho=2)
    for rho in (math.nan, math.inf, "2"):
        refused(waiting("eva")[0], BATCHES, "`rho` must be at least 1", rho=rho)
    with pytest.raises(ValueError, match="there is no LoRA layer"):
        lora.calibrate(Model(), BATCHES)
