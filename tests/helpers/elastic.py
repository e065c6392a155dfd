"""Training for tests of torchrun: `python elastic.py FOLDER STEP`, in each process that torchrun starts.

By DDP, then by FSDP2, with a checkpoint every second step. In step STEP of FSDP2's the last rank kills itself, once.
What is started again goes on from the last checkpoint.
"""

import datetime
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora

STEPS, ROWS, WIDTH = 8, 8, 6


def adapted() -> nn.Module:
    """A small model in float64, the same in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))).double()
    lora.inject(model, target_modules=["0.0", "1.0", "2.0"], r=3, lora_alpha=6)
    return model


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one step."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.rand(2, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return x, y


def train(folder: Path, engine: str, dies_at: int = 0) -> list[float]:
    """The losses of all steps, those before a checkpoint too. `engine` is fsdp, ddp, or alone: one process."""
    folder.mkdir(parents=True, exist_ok=True)
    model = adapted()
    whole = share(model, engine)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = resume(folder, model, optimizer)
    rank, ranks = (0, 1) if engine == "alone" else (dist.get_rank(), dist.get_world_size())
    for step in range(len(losses), STEPS):
        x, y = rows(step)
        loss = (whole(x[rank::ranks]) - y[rank::ranks]).square().sum() / y.numel()
        (loss * ranks).backward()  # the engines average over ranks
        if step + 1 == dies_at and rank == ranks - 1 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        if ranks > 1:
            dist.all_reduce(total)
        losses.append(total.item())
        if (step + 1) % 2 == 0 and ranks > 1:
            save(folder, model, optimizer, losses)
    return losses


def share(model: nn.Module, engine: str) -> nn.Module:
    """What to call forward of."""
    if engine == "ddp":
        return DistributedDataParallel(model)
    if engine == "fsdp":
        for block in model:
            fully_shard(block)
        fully_shard(model)
    return model


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    """A checkpoint: the adapter, the optimizer by torch's distributed checkpoints, and the losses so far."""
    final, partial = folder / f"step-{len(losses)}", folder / "partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    lora.save_adapter(model, partial / "adapter.safetensors")
    dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=partial / "optimizer")
    if dist.get_rank() == 0:
        os.replace(partial, final)
    dist.barrier()


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Loads the last checkpoint, if there is one; its losses."""
    found = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if not found:
        return []
    lora.load_adapter(model, found[-1] / "adapter.safetensors")
    state = get_optimizer_state_dict(model, optimizer)
    dcp.load(state, checkpoint_id=found[-1] / "optimizer")
    set_optimizer_state_dict(model, optimizer, state)
    losses: list[float] = json.loads((found[-1] / "losses.json").read_text())
    print(f"rank {dist.get_rank()} goes on from {found[-1].relative_to(folder.parent)}", flush=True)
    return losses


def main(folder: Path, dies_at: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    train(folder / "ddp", "ddp")
    train(folder / "fsdp", "fsdp", dies_at)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
