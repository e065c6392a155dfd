"""Each adapter of a bank trains as if it were alone in its model: against plain models, each with one adapter."""

from typing import Any

import pytest
import torch
import torch.nn as nn

import lora

RANKS = 1, 2, 4, 8, 16, 24, 32, 64
SETTINGS = [
    {"r": r, "lora_alpha": 2 * r + n, "lora_dropout": (0.0, 0.1, 0.25)[n % 3], "use_rslora": n % 2 == 1}
    for n, r in enumerate(RANKS)
]
RATES = [10 ** -(1.5 + n / 4) for n in range(len(RANKS))]
NAMES = [f"adapter{n}" for n in range(len(RANKS))]


def pretrained() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 8))


def config(settings: dict[str, Any]) -> lora.LoraConfig:
    return lora.LoraConfig(target_modules=["0", "2", "4"], **settings)


def batches(steps: int, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(32, 8, generator=generator)
    drawn = [torch.randn(rows, 5, 32, generator=generator) for _ in range(steps)]
    return [(x, torch.tanh(x @ teacher)) for x in drawn]  # (rows, tokens, 32), (rows, tokens, 8)


def loss_of(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (y - target).square().mean((1, 2))  # (rows)


def alone(n: int, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The adapter of a plain model after its training, and its losses."""
    model = pretrained()
    torch.manual_seed(100 + n)
    lora.inject(model, config(SETTINGS[n]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATES[n])
    torch.manual_seed(200 + n)
    losses = []
    for x, target in batches(steps, len(RANKS)):
        loss = loss_of(model(x[n : n + 1]), target[n : n + 1]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return lora.adapter_of(model).tensors, losses


def bank_of(model: nn.Module) -> lora.AdapterBank:
    bank = lora.bank(model)
    for n, name in enumerate(NAMES):
        torch.manual_seed(100 + n)
        bank[name] = config(SETTINGS[n])
        bank.seed(name, 200 + n)
    return bank


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_eight_adapters_in_one_batch_become_what_eight_runs_make(steps: int) -> None:
    model = pretrained()
    bank = bank_of(model)
    optimizers = [torch.optim.AdamW(bank.parameters(name), lr=RATES[n]) for n, name in enumerate(NAMES)]
    losses: list[list[float]] = []
    for x, target in batches(steps, len(RANKS)):
        with bank.rows(NAMES):
            each = loss_of(model(x), target)
            each.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(each.tolist())
    for n, name in enumerate(NAMES):
        tensors, its = alone(n, steps)
        # LoRA's products are the same calls, on the same rows. The base's are of 40 rows here, and of 5 there, which
        # may round otherwise: by 1e-7, which Adam's division makes more of with each step.
        assert [step[n] for step in losses] == pytest.approx(its, rel=1e-5)
        for key, tensor in bank[name].tensors.items():
            expected = tensors[key].detach()
            assert torch.allclose(tensor.detach(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
