"""examples/phi3/loop.py: one step, its learning rate, and what it is measured by."""

import math

import pytest
import torch
from counting import Operations
from phi3 import loop, packing, pretrained, tiny
from phi3.chat_data import IGNORED, Tokens
from phi3.errors import Diverged
from test_phi3_packing import stretch

import lora

CONFIG = {
    "learning_rate": 1.0,
    "weight_decay": 0.0,
    "warmup_ratio": 0.2,
    "lr_scheduler_type": "cosine",
    "max_steps": -1,
    "num_train_epochs": 2.5,
}


def adapted(seed=0, dropout=0.0, **changes):
    model = tiny.model(seed)
    for name, value in changes.items():
        setattr(model.config, name, value)
    torch.manual_seed(seed)
    splits = pretrained.fused_splits(model.config)
    lora.inject(
        model,
        target_modules=["qkv_proj", "down_proj"],
        r=4,
        lora_dropout=dropout,
        splits={"qkv_proj": splits["qkv_proj"]},
    )
    return model.train()


def data(rows=4, length=20):
    return [[stretch(length - row, row)] for row in range(rows)]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, *(1 - k / 8 for k in range(8))]),
        ("cosine", [0.5, 1, *((1 + math.cos(math.pi * k / 8)) / 2 for k in range(8))]),
    ],
)
def test_the_learning_rate_rises_and_falls(schedule, expected):
    config = CONFIG | {"lr_scheduler_type": schedule}
    assert [loop.learning_rate_at(step, 10, config) for step in range(10)] == pytest.approx(expected)


def test_without_warm_up_the_first_step_has_the_peak():
    assert loop.learning_rate_at(0, 1, CONFIG | {"warmup_ratio": 0.0}) == 1.0


def test_how_many_steps():
    assert loop.total_steps(CONFIG, steps_per_epoch=7) == 18
    assert loop.total_steps(CONFIG | {"max_steps": 5}, steps_per_epoch=7) == 5


# What may be done to the head: it is frozen, it trains, or it has LoRA.
HEADS = {"frozen": {}, "trains": {"modules_to_save": ["lm_head"]}, "adapted": {"target_modules": ["lm_head", "o_proj"]}}


@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
def test_the_loss_and_its_gradients_are_transformers_own(settings):
    model = tiny.model()
    lora.inject(model, **{"target_modules": ["o_proj"], "r": 4, **settings})
    with torch.no_grad():
        for name, parameter in model.train().named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    batch = packing.collate([[stretch(12, 1), stretch(6, 2)], [stretch(15, 3)]], pad_id=2)
    # Without a cache: with one, transformers does not look at where the position ids start again.
    parts = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "labels": batch.labels}
    theirs = model(**parts, use_cache=False).loss
    theirs.backward()
    expected = gradients(model)
    model.zero_grad()
    ours = loop.loss_sum(model, batch) / batch.labelled
    ours.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(model), expected)


@pytest.mark.parametrize("head", HEADS)
def test_a_frozen_heads_logits_are_never_all_there(head, monkeypatch):
    model = tiny.model()
    lora.inject(model, **{"target_modules": ["o_proj"], "r": 4, **HEADS[head]})
    batch = packing.collate(data(), pad_id=2)
    size = model.config.vocab_size
    monkeypatch.setattr("lora.functional.cross_entropy._LOGITS", {"cpu": 8 * size})  # 8 rows
    with Operations() as counted:
        loop.loss_sum(model.train(), batch).backward()
    assert (counted.largest < batch.labelled * size) == (head == "frozen")
    assert batch.labelled > 8


def test_accumulated_batches_are_one_big_batch():
    rows = data()
    # Not as many labels in one batch as in the other: a mean of means would be another number.
    rows[0] = [Tokens(rows[0][0].input_ids, [IGNORED] * 18 + rows[0][0].labels[18:])]
    steps, weights = [], []
    for size in (4, 2):
        model = adapted()
        batches = list(packing.batches(rows, size, pad_id=2))
        steps.append(loop.train_step(model, loop.make_optimizer(model, CONFIG), batches, 1e-2, 1.0))
        weights.append(lora.lora_state_dict(model))
    assert steps[0].loss == pytest.approx(steps[1].loss, rel=1e-6)
    assert steps[0].grad_norm == pytest.approx(steps[1].grad_norm, rel=1e-4)
    assert steps[0].tokens == steps[1].tokens == 20 + 19 + 18 + 17
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_only_the_adapter_learns_and_learns():
    model, batches = adapted(), list(packing.batches(data(), 4, pad_id=2))
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = loop.make_optimizer(model, CONFIG)
    losses = [loop.train_step(model, optimizer, batches, 1e-2, 1.0).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(dict(model.named_parameters())[name], weight) for name, weight in base.items())


def test_clipping():
    batches = list(packing.batches(data(), 4, pad_id=2))
    for limit in (1e-3, 0.0):  # 0 means never
        model = adapted()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        before = lora.lora_state_dict(model)
        before = {name: tensor.clone() for name, tensor in before.items()}
        norm = loop.train_step(model, optimizer, batches, 1.0, limit).grad_norm
        moved = torch.stack([(t - before[n]).norm() for n, t in lora.lora_state_dict(model).items()]).norm().item()
        assert moved == pytest.approx(limit or norm, rel=1e-2)


def test_gradient_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        model = adapted(dropout=0.3, use_cache=False)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(5)
        loop.loss_sum(model, packing.collate(data(), pad_id=2)).backward()
        found.append(gradients(model))
    assert all(gradient.abs().max() > 0 for name, gradient in found[0].items() if "lora_B" in name)
    torch.testing.assert_close(found[0], found[1])


def test_a_bfloat16_model_has_a_float32_adapter():
    model = tiny.model().bfloat16()
    lora.inject(model, target_modules=["o_proj", "down_proj"], r=4)
    optimizer, batches = loop.make_optimizer(model.train(), CONFIG), list(packing.batches(data(), 4, pad_id=2))
    losses = [loop.train_step(model, optimizer, batches, 1e-2, 1.0).loss for _ in range(8)]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stops_before_it_does_harm(bad):
    model, batches = adapted(), list(packing.batches(data(), 4, pad_id=2))
    optimizer = loop.make_optimizer(model, CONFIG)
    with torch.no_grad():
        model.model.norm.weight.fill_(bad)
    before = {name: tensor.clone() for name, tensor in lora.lora_state_dict(model).items()}
    with pytest.raises(Diverged, match="the loss is"):
        loop.train_step(model, optimizer, batches, 1e-2, 1.0)
    torch.testing.assert_close(lora.lora_state_dict(model), before, rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_stops_too():
    model, batches = adapted(), list(packing.batches(data(), 4, pad_id=2))
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(Diverged, match="the gradient's norm is"):
        loop.train_step(model, loop.make_optimizer(model, CONFIG), batches, 1e-2, 1.0)


def test_the_held_out_loss_is_a_mean_over_tokens():
    model = adapted(dropout=0.5)
    rows = [[stretch(30, 1)], [stretch(3, 2)]]
    together = loop.held_out_loss(model, [packing.collate(rows, pad_id=2)])
    apart = loop.held_out_loss(model, list(packing.batches(rows, 1, pad_id=2)))
    assert together == pytest.approx(apart, rel=1e-5)
    sums = [loop.held_out_loss(model, [packing.collate([row], pad_id=2)]) for row in rows]
    assert together == pytest.approx((29 * sums[0] + 2 * sums[1]) / 31, rel=1e-5)
    assert model.training  # as before


def test_perplexity():
    assert loop.perplexity(math.log(77)) == pytest.approx(77)
    assert loop.perplexity(1e9) == math.inf
