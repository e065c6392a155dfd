"""Preferences against a reference: policy and reference are two adapters on one base, as if they were two models.

Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290, equation 7:

    loss = −log σ(β · ((log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l))))
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_model import Model

import lora

BETA = 0.3
CONFIG = lora.LoraConfig(target_modules=["q_proj", "up_proj", "embed"], r=2, lora_alpha=4, init_lora_weights=False)
CHOSEN = torch.tensor([[1, 2, 3, 9], [0, 7, 4, 5], [3, 3, 8, 1]])  # (pairs, tokens)
REJECTED = torch.tensor([[1, 2, 6, 6], [0, 7, 9, 2], [3, 3, 0, 0]])


def base():
    torch.manual_seed(0)
    return Model().double()


def adapter(seed):
    model = base()
    torch.manual_seed(seed)
    lora.inject(model, CONFIG)
    return lora.adapter_of(model.double())


def alone(seed):
    """A model of its own with this adapter; None: the base."""
    model = base()
    if seed is not None:
        lora.load_adapter(model, adapter(seed))
    return model


def sequence_logps(logits, ids):
    """log π(y): of each token after the first, given those before it; (rows, tokens, vocabulary) → (rows)."""
    return F.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)


def dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    """The loss of each pair, in torch."""
    return -F.logsigmoid(BETA * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)))


def expected_loss(policy, reference):
    """Equation 7 in numpy, float64, from two models of their own."""

    def logps(model, ids):
        logits = model(ids).detach().numpy()[:, :-1]
        chosen = np.take_along_axis(logits, ids.numpy()[:, 1:, None], -1)[..., 0]
        return (chosen - np.log(np.exp(logits).sum(-1))).sum(-1)

    margins = [logps(policy, ids) - logps(reference, ids) for ids in (CHOSEN, REJECTED)]
    return np.mean(np.log1p(np.exp(-BETA * (margins[0] - margins[1]))))


def by_blocks(reference):
    """The loss of a model with a bank, one forward for each of policy and reference."""

    def loss(model, bank):
        ids = torch.cat([CHOSEN, REJECTED])
        with bank.use("policy"):
            policy = sequence_logps(model(ids), ids).chunk(2)
        with torch.no_grad(), bank.use(reference):
            frozen = sequence_logps(model(ids), ids).chunk(2)
        return dpo(*policy, *frozen).mean()

    return loss


def by_rows(reference):
    """The same of one batch, of which each row has its adapter."""

    def loss(model, bank):
        ids = torch.cat([CHOSEN, REJECTED] * 2)
        with bank.rows(["policy"] * 6 + [reference] * 6):
            logps = sequence_logps(model(ids), ids)
        policy, frozen = logps.split(6)
        return dpo(*policy.chunk(2), *frozen.detach().chunk(2)).mean()

    return loss


def of_two_models(policy, reference):
    ids = torch.cat([CHOSEN, REJECTED])
    ours = sequence_logps(policy(ids), ids).chunk(2)
    with torch.no_grad():
        theirs = sequence_logps(reference(ids), ids).chunk(2)
    return dpo(*ours, *theirs).mean()


def optimizer_of(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


@pytest.mark.parametrize("way", [by_blocks, by_rows], ids=["two forwards", "one batch"])
@pytest.mark.parametrize("reference", ["reference", None], ids=["an adapter", "the base"])
def test_two_adapters_train_as_two_models(way, reference):
    model = base()
    bank = lora.bank(model, {"policy": adapter(1), "reference": adapter(2)})
    policy, other = alone(1), alone(None if reference is None else 2)
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    for parameter in bank.parameters("reference"):  # in one batch its rows would get gradients of 0, and decay
        parameter.requires_grad_(False)
    frozen = copy.deepcopy({name: tensor.detach() for name, tensor in bank["reference"].tensors.items()})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    ours = optimizer_of([*bank.parameters("policy"), *bank.parameters("reference")])
    theirs = optimizer_of([parameter for parameter in policy.parameters() if parameter.requires_grad])
    own, one = bank["policy"].tensors, lora.adapter_of(policy).tensors
    for _ in range(4):
        loss, twin = way(reference)(model, bank), of_two_models(policy, other)
        # Sums of some hundred float64 numbers, in another order where rows stand side by side.
        assert loss.item() == pytest.approx(expected_loss(policy, other), rel=1e-12)
        loss.backward()
        twin.backward()
        for name, parameter in one.items():
            torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-9, atol=1e-13)
        assert all(parameter.grad is None for parameter in bank.parameters("reference"))
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in one.items():
            torch.testing.assert_close(own[name], parameter, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in bank["reference"].tensors.items())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_an_old_policy_is_a_copy_that_training_does_not_move():
    """GRPO's ratio π / π_old (arXiv:2402.03300): 1 as the snapshot is taken, and of the old values from then on."""
    model = base()
    bank = lora.bank(model, {"policy": adapter(1)})
    optimizer = optimizer_of(bank.parameters("policy"))
    for step in range(3):
        bank["old"] = bank["policy"]  # adds, or replaces: the policy and its optimizer go on
        snapshot = alone(1)
        lora.load_adapter(snapshot, bank["policy"])
        for inner in range(2):
            with bank.use("policy"):
                new = sequence_logps(model(CHOSEN), CHOSEN)
            with torch.no_grad(), bank.use("old"):
                old = sequence_logps(model(CHOSEN), CHOSEN)
            ratio = (new - old).exp()
            torch.testing.assert_close(old, sequence_logps(snapshot(CHOSEN), CHOSEN), rtol=1e-12, atol=1e-12)
            is_one = (ratio - 1).abs() < 1e-10
            assert is_one.all() if inner == 0 else not is_one.any(), step
            (ratio * torch.tensor([1.0, -0.5, 0.2])).sum().neg().backward()
            optimizer.step()
            optimizer.zero_grad()
    bank.load("old", bank["policy"])  # the same in place: Parameters stay
    kept = [*map(id, bank.parameters("old"))]
    bank.load("old", bank["policy"])
    assert [*map(id, bank.parameters("old"))] == kept
    assert not {*kept} & {*map(id, bank.parameters("policy"))}
