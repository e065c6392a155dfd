"""Stages of a pipeline (`torch.distributed.pipelining`) with LoRA layers train as one process does."""

import copy

import pytest
import torch
import torch.distributed as dist
from conftest import randomised
from releases import since
from test_ddp import ROUNDING
from torch import nn
from torch.distributed import pipelining as pipe

import lora

WIDTH, BATCH, MICRO = 6, 8, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Four blocks between an embedding and a head, of which a stage keeps some, by their own names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleDict({str(n): Block() for n in range(4)})
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = x if self.embed is None else self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None else self.head(x)


def adapted(use_dora=False):
    torch.manual_seed(1)
    model = Model().double()
    lora.inject(model, target_modules=["embed", "up", "down", "head"], r=2, use_dora=use_dora)
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            randomised(module, 0.3)
    return model


def part_of(model, number, count):
    """The model without what other stages compute."""
    part, size = copy.deepcopy(model), 4 // count
    for n in range(4):
        if n // size != number:
            del part.blocks[str(n)]
    part.embed = part.embed if number == 0 else None
    part.head = part.head if number == count - 1 else None
    return part


def batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(11, (2, BATCH, 3), generator=generator) % 5 for _ in range(3)]


def loss_of(y, target):
    return nn.functional.cross_entropy(y.flatten(0, 1), target.flatten())


def alone(model):
    """Losses, the first gradients, and what has been trained."""
    optimizer, losses, first = optimizer_of([model]), [], None
    for ids, target in batches():
        loss = loss_of(model(ids), target)
        loss.backward()
        losses.append(loss.item())
        first = first or gradients_of([model])
        optimizer.step()
        optimizer.zero_grad()
    return losses, first, trained(model)


def optimizer_of(parts):
    return torch.optim.AdamW([p for part in parts for p in part.parameters() if p.requires_grad], lr=0.02)


def gradients_of(parts):
    return {name: p.grad.clone() for part in parts for name, p in part.named_parameters() if p.requires_grad}


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def is_trained(schedule, per_rank, use_dora, folder):
    """This rank's stages, trained by a schedule; their losses, first gradients and parameters."""
    count, rank = 2 * per_rank, dist.get_rank()
    numbers = [rank + 2 * k for k in range(per_rank)]
    parts = [part_of(adapted(use_dora), number, count) for number in numbers]
    device = torch.device("cpu")
    stages = [pipe.PipelineStage(part, n, count, device) for part, n in zip(parts, numbers, strict=True)]
    run = getattr(pipe, schedule)(stages if per_rank > 1 else stages[0], MICRO, loss_fn=loss_of)
    optimizer, losses, first = optimizer_of(parts), [], None
    for ids, target in batches():
        own: list = []
        inputs = (ids,) if 0 in numbers else ()
        ends = {"target": target, "losses": own} if count - 1 in numbers else {}
        run.step(*inputs, **ends)
        losses += [torch.stack(own).mean().item()] if own else []
        first = first or gradients_of(parts)
        optimizer.step()
        optimizer.zero_grad()
    for number, part in zip(numbers, parts, strict=True):
        lora.save_adapter(part, f"{folder}/stage{number}.safetensors")
    return losses, first, {name: p for part in parts for name, p in trained(part).items()}


@since("2.10", "gloo takes messages of stages for each other's")
@pytest.mark.sampled(3)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    ("schedule", "per_rank"),
    [("ScheduleGPipe", 1), ("Schedule1F1B", 1), ("ScheduleInterleaved1F1B", 2), ("ScheduleLoopedBFS", 2)],
)
def test_stages_with_adapters_train_as_one_process(ranks, tmp_path, schedule, per_rank, use_dora):
    model = adapted(use_dora)
    losses, gradients, parameters = alone(model)
    (none, *first), (ours, *second) = ranks.run(is_trained, schedule, per_rank, use_dora, str(tmp_path))
    assert none == []
    assert ours == pytest.approx(losses, rel=1e-12)
    torch.testing.assert_close(first[0] | second[0], gradients, **ROUNDING)
    torch.testing.assert_close(first[1] | second[1], parameters, **ROUNDING)
    # What the stages save is, together, what one process saves: names, settings and values.
    parts = [lora.read_adapter(tmp_path / f"stage{n}.safetensors") for n in range(2 * per_rank)]
    whole, together = lora.adapter_of(model), lora.Adapter({}, {})
    for part in parts:
        assert not together.tensors.keys() & part.tensors.keys()
        together.modules.update(part.modules)
        together.tensors.update(part.tensors)
    assert together.modules.keys() == whole.modules.keys()
    for name, settings in whole.modules.items():
        assert {**together.modules[name], "base": None} == {**settings, "base": None}
        assert together.modules[name]["base"]["shape"] == settings["base"]["shape"]
    torch.testing.assert_close(together.tensors, whole.tensors, **ROUNDING)
    fresh = adapted(use_dora)
    lora.load_adapter(fresh, together)
    ids = batches()[0][0]
    torch.testing.assert_close(fresh(ids), model(ids), **ROUNDING)
