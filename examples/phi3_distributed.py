"""Fine-tunes Phi-3 with LoRA in several processes: phi3_chat.py's run, flags and files, on torch's own engines.

On one machine, with as many processes as it has GPUs (or, to try it, two on a CPU):

    torchrun --standalone --nproc-per-node 2 -- examples/phi3_distributed.py

That is FSDP2: every process holds a share of the model, and takes its share of each step's rows. `--tp 2` divides each
layer between two processes instead (tensor parallel), and with more processes FSDP2 shares out model and rows among
the pairs. `--ddp` keeps a whole model in each process, which --quantize needs. (Without the `--`, torchrun takes our
--r for one of its own flags.) On two machines, the same on each:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 -- \\
        examples/phi3_distributed.py --tp 8

The real thing, which wants GPUs and `pip install datasets`:

    torchrun --standalone --nproc-per-node 8 -- examples/phi3_distributed.py --bf16 --gradient-checkpointing \\
        --model microsoft/Phi-3-mini-4k-instruct --data HuggingFaceH4/ultrachat_200k --data-split train_sft \\
        --train-conversations 20000 --max-seq-length 2048 --per-device-train-batch-size 8 \\
        --gradient-accumulation-steps 8 --learning-rate 2e-4 --max-steps -1 --output-dir phi3-ultrachat

A step is of per_device_train_batch_size · gradient_accumulation_steps rows in all, however many processes share them:
the losses are phi3_chat.py's, to rounding, but for the dropout. So are the files, which the first process writes, and
--resume goes on from any checkpoint of either script. When a process dies, torchrun ends the others; to have them
start again, and go on from the last checkpoint by themselves (the variable keeps torch 2.13 from telling them where
the dead ones listened):

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts 3 --standalone --nproc-per-node 2 -- \\
        examples/phi3_distributed.py

Losses are then the same ones, but with --tp and dropout, whose masks begin anew. Every process reads the whole model
into the machine's memory before it keeps its share.
"""

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import phi3_chat
import torch
import torch.distributed as dist
from phi3 import checkpoints, loop, outcome, packing
from phi3.errors import Diverged, UserError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lora import parallel
from lora.layers import weights

TIMEOUT = datetime.timedelta(minutes=10)  # for one collective: a process that waits longer ends the run
T = TypeVar("T")


class Ranks(loop.Alone):
    """Processes that share a run: by FSDP2, by tensor parallelism, by both, or by DDP."""

    def __init__(self, flags: argparse.Namespace) -> None:
        world, self.process, self.ddp = dist.get_world_size(), dist.get_rank(), flags.ddp
        check(flags, world)
        self.device = torch.device(device_type(flags.device))
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        self.mesh = init_device_mesh(self.device.type, (world // flags.tp, flags.tp), mesh_dim_names=("data", "tensor"))
        self.rank, self.ranks = self.mesh.get_local_rank("data"), self.mesh.size(0)
        self.main, self.sharded = self.process == 0, world > 1 and not flags.ddp
        self.owners: dict[Tensor, tuple[nn.Module, str]] = {}
        self.forward: Callable[[packing.Batch], Tensor]

    def on_main(self, act: Callable[[], T]) -> T:
        answer = [attempt(act) if self.main else (None, None)]
        dist.broadcast_object_list(answer)
        value, error = answer[0]
        if error:
            raise UserError(error)
        return value

    def together(self, act: Callable[[], T]) -> T:
        value, error = attempt(act)
        errors = dict.fromkeys(error for error in self.gathered(error) if error)
        if errors:
            raise UserError("\n".join(errors))
        return value

    def gathered(self, value: T) -> list[T]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def total(self, number: float) -> float:
        tensor = torch.tensor(float(number), dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.item() / self.mesh.size(1)  # so many processes have the same rows

    def shard(self, model: nn.Module, seed: int) -> None:
        for tensor in model.state_dict().values():  # what was computed, by an SVD say, may depend on the machine
            dist.broadcast(tensor, 0)
        if self.mesh.size(1) > 1:
            tensor_parallel(model, self.mesh["tensor"])
        if self.sharded and self.ranks > 1:
            for layer in model.model.layers:
                fully_shard(layer, mesh=self.mesh["data"])
            fully_shard(model, mesh=self.mesh["data"])  # what is left: embeddings and the last norm
        else:
            model.to(self.device)
        # The loss takes a way of its own through the model, which has to be known as FSDP2's hooks are on `forward`.
        model.loss_sum = MethodType(loop.loss_sum, model)
        register_fsdp_forward_method(model, "loss_sum")
        self.forward = DistributedDataParallel(Loss(model)) if self.ddp else model.loss_sum
        for module in model.modules():
            self.owners |= {parameter: (module, own) for own, parameter in module.named_parameters(recurse=False)}
        if self.rank:  # other rows, other dropout; with the same rows it is the same
            torch.manual_seed(seed + self.rank)

    def loss_sum(self, model: nn.Module, batch: packing.Batch) -> Tensor:
        return self.forward(batch.to(self.device))

    def sum_gradients(self, model: nn.Module) -> None:
        parallel.sum_gradients(model)

    def whole(self, value: Any, parameter: Tensor | None = None) -> Any:
        if not isinstance(value, DTensor):
            return value
        return value.full_tensor() if parameter is None else weights.of(*self.owners[parameter], value).whole().cpu()

    def part(self, value: Any, parameter: Tensor) -> Any:
        if value.shape != parameter.shape:
            return value
        return weights.of(*self.owners[parameter], parameter).sharded_like(value)


class Loss(nn.Module):
    """`loss_sum` as a module, which is what DDP wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: packing.Batch) -> Tensor:
        return loop.loss_sum(self.model, batch)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divides the layers as transformers' plan for the model says."""
    try:
        parallelize_module(model, mesh, parallel.plan_of(model))
    except ValueError as error:
        raise UserError(f"--tp: {error}") from error
    whole = [name for name, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if whole:
        raise UserError(f"--tp divides none of these, which are to be trained: {', '.join(whole)}")


def attempt(act: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `act` returns, and the message of a UserError that it raises instead."""
    try:
        return act(), None
    except UserError as error:
        return None, str(error)


def check(flags: argparse.Namespace, world: int) -> None:
    """A UserError that lists what does not go together."""
    problems = []
    if flags.tp < 1 or world % flags.tp:
        problems.append(f"--tp {flags.tp} must divide the number of processes, {world}")
    if flags.tp > 1 and flags.ddp:
        problems.append("--ddp keeps whole models, --tp divides them: leave out one")
    if flags.tp > 1 and flags.fused_mlp:
        problems.append("--fused-mlp computes with whole layers: leave out either it or --tp")
    if flags.quantize and not flags.ddp:
        problems.append("--quantize makes weights that cannot be sharded: give --ddp, too")
    if flags.device not in ("auto", "cpu", "cuda"):
        problems.append(f"--device is {flags.device!r}; it must be auto, cpu or cuda: each process has its own")
    if problems:
        raise UserError("\n".join(problems))


def device_type(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def parse(argv: list[str] | None) -> argparse.Namespace:
    """phi3_chat.py's flags, and how to share the work."""
    parser = phi3_chat.make_parser(__doc__)
    group = parser.add_argument_group("processes")
    group.add_argument("--tp", type=int, default=1, metavar="N", help="divide each layer among so many (default: 1)")
    group.add_argument("--ddp", action="store_true", help="a whole model in every process, instead of FSDP2")
    return parser.parse_args(argv)


def exit_code(argv: list[str] | None) -> int:
    """Runs the example; the exit code, which is the same in every process."""
    flags = argparse.Namespace()
    try:
        flags = parse(argv)
        engine = Ranks(flags)
        # Where torchrun has started processes again, after one had failed; on the other machines it does not count.
        restarted = any(engine.gathered(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))
        if restarted and checkpoints.steps_in(Path(flags.output_dir).expanduser()):
            flags.resume = "latest"
        flags.device = "cpu"  # where every process reads the model, before `shard` moves what it keeps
        phi3_chat.run(flags, engine)
    except (UserError, Diverged) as error:
        return outcome.explain(error, flags)
    except SystemExit as stop:  # argparse has printed why
        return int(stop.code or 0)
    return 0


def run(argv: list[str] | None = None) -> int:
    """`exit_code` in one process of a group, of which only the first says something."""
    with contextlib.ExitStack() as quiet:
        if dist.get_rank():
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            code = exit_code(argv)
        except KeyboardInterrupt as error:  # the others are wherever they are: wait for nobody
            outcome.explain(error, argparse.Namespace())
            raise
    dist.barrier()  # torchrun ends all when one has failed: not before the first has said why
    return code


def main() -> int:
    """Sets up the group of the processes that torchrun has started, and runs the example in it."""
    if "RANK" not in os.environ:
        print("error: start this with torchrun: torchrun --nproc-per-node 2 …", file=sys.stderr)
        return 2
    dist.init_process_group(timeout=TIMEOUT)
    code = run()
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
