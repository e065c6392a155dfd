"""Does a training step take the memory that examples/memory_plan.py says?

A step is forward, backward and `AdamW(fused=True)` of the pretrained model of examples/phi3_chat.py (downloaded once),
with LoRA of r = 16 and float32 in its four projections, on 256 tokens for each rank: in one process, or in two on
gloo, by DDP or FSDP2. Each engine has processes of its own, with one thread each. The loss is the model's own, which
has all logits; or in chunks, as the example's is.

    python benchmarks/memory.py [--only WORDS] [--quick]

Planned are the base weights, adapters, gradients, optimizer state, activations and the rest, at the peak; of FSDP2
only what a rank holds between steps. Two things are measured after a first step, on the rank that has most:

- tensors: what is there before a step (parameters, optimizer state, buckets), and the most that torch's profiler sees
  allocated on top of that during one. Libraries' own memory is not in it, nor what the allocator keeps or splits.
- resident: the most memory that the system says the process has, less what it had after the same had been done with a
  toy: torch, transformers, the process group and their buffers are in this baseline.

In one process also: the bytes that autograd keeps for backward, distinct storages, parameters aside.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import datetime
import gc
import json
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import counts
import torch
import torch.distributed as dist
import torch.nn.functional as F
from machine import machine, only, peak_mib
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora
from lora.errors import table
from lora.functional import linear_cross_entropy

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # which are no package
import memory_plan
from decoders import decoder_of
from memory_plan import Training
from phi3 import fetch, pretrained, tiny

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
TIMEOUT = 600  # seconds that a rank waits for another
RANKS = {"one": 1, "ddp": 2, "fsdp2": 2}
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One way to train; a toy if quick."""

    engine: str
    dtype: str
    checkpointing: bool
    chunks: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        """What `--only` looks at."""
        return f"{self.engine}, {self.dtype}" + ", checkpointing" * self.checkpointing + ", in chunks" * self.chunks

    @property
    def training(self) -> Training:
        """The same for the plan."""
        rows, tokens = (2, 32) if self.quick else (1, 256)
        return Training(
            base_dtype=self.dtype,
            batch_size=rows,
            seq_len=tokens,
            gradient_checkpointing=self.checkpointing,
            loss_in_chunks=self.chunks,
            device="cpu",
            ranks=RANKS[self.engine],
        )


def measure(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What the ranks of cases of one engine measured, each number on the rank that has most of it."""
    context, count = multiprocessing.get_context("spawn"), RANKS[cases[0].engine]
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (cases, rank, f"{folder}/store", theirs)
            processes.append(context.Process(target=serve, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            found = [pipe.recv() for pipe in pipes]
        except EOFError:
            raise RuntimeError(f"{cases[0].engine}: a process ended") from None
        finally:
            for process in processes:
                process.join(timeout=5)
                process.kill()
    return [{name: max(one[name] for one in ranks) for name in ranks[0]} for ranks in zip(*found, strict=True)]


def serve(cases: Sequence[Case], rank: int, store: str, pipe: Any) -> None:
    """One rank of the cases of one engine."""
    torch.set_num_threads(1)
    count = RANKS[cases[0].engine]
    if count > 1:
        timeout = datetime.timedelta(seconds=TIMEOUT)
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, count), rank=rank, world_size=count, timeout=timeout
        )
    try:
        quick = cases[0].quick
        model = tiny.model(layers=6) if quick else pretrained.load(pretrained.SMOLLM2, fetch.default_cache_dir())[0]
        for parameter in model.parameters():  # a file's own pages would count as the process', too, once they are read
            parameter.data = parameter.data.clone()
        pipe.send([look(case, model) for case in cases])
    except Exception:
        traceback.print_exc()
    finally:
        if count > 1:
            dist.destroy_process_group()


def look(case: Case, pretrained_model: nn.Module) -> dict[str, float]:
    """What this process measures of a case, with a copy of the model."""
    toy = Steps(case, tiny.model())
    toy.step()
    del toy
    baseline = resident()
    steps = Steps(case, copy.deepcopy(pretrained_model))
    steps.step()
    at_rest = resident()
    reset_peak()
    steps.step()
    peak = peak_mib() * MIB
    own = steps.bytes()
    found = {"at rest": at_rest - baseline, "resident": peak - baseline, "own": own}
    found["tensors"] = own + most_allocated(steps.step)
    if case.engine == "one":
        found["kept"] = counts.kept(steps.loss, steps.model)
    print(case.name, found, flush=True)
    return found


class Steps:
    """A model that trains on random tokens."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        self.case, training = case, case.training
        model = model.to(getattr(torch, case.dtype)).train()
        names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        lora.inject(model, r=training.r, target_modules=names, adapter_dtype=torch.float32)
        if case.checkpointing:
            model.activation_checkpointing_enable()
        self.ids = torch.randint(model.config.vocab_size, (training.batch_size, training.seq_len))
        self.model = _ENGINES[case.engine](model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def loss(self) -> torch.Tensor:
        """A forward pass; in chunks as in the example."""
        if self.case.chunks:
            hidden = self.model.model(input_ids=self.ids, use_cache=False).last_hidden_state
            labels = F.pad(self.ids[:, 1:], (0, 1), value=-100)
            return linear_cross_entropy(hidden, self.model.lm_head.weight, labels)
        loss: torch.Tensor = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        return loss

    def step(self) -> None:
        """A whole step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bytes(self) -> int:
        """What is there between steps: parameters and the optimizer's state on this rank, and DDP's buckets."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        tensors = [_local(tensor) for tensor in (*self.model.parameters(), *state)]
        buckets = sum(p.nbytes for p in self.model.parameters() if p.requires_grad and self.case.engine == "ddp")
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()) + buckets


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, dist.tensor.DTensor) else tensor


def _fsdp2(model: nn.Module) -> nn.Module:
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


_ENGINES = {"one": lambda model: model, "ddp": DistributedDataParallel, "fsdp2": _fsdp2}


def resident() -> int:
    """Bytes that the process has now, when what it does not need has been given back."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 2**10


def reset_peak() -> None:
    """Let the peak begin at what there is now."""
    Path("/proc/self/clear_refs").write_text("5")


def most_allocated(step: Any) -> int:
    """The most bytes of tensors that there are during a step beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


# ---- the plan, and both in a table -------------------------------------------------------------------------------


_TITLES = {"one": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}


def planned(case: Case) -> dict[str, Any]:
    """What the plan says of a case: of FSDP2 only what is there between steps."""
    config = tiny.model(layers=6).config if case.quick else _config()
    decoder, training = decoder_of(config.to_dict()), case.training
    terms = memory_plan.plan(decoder, training, _TITLES[case.engine])
    states = ("base weights", "adapters", "optimizer state", "DDP's buckets")
    found = {"own": sum(terms[name] for name in states), "terms": terms}
    if case.engine != "fsdp2":
        kept = memory_plan.kept(decoder, training) + memory_plan.kept_by_loss(decoder, training)
        found |= {"total": memory_plan.total(terms), "kept": kept}
    return found


def _config() -> Any:
    return pretrained.AutoConfig.from_pretrained(pretrained.smollm2_as_phi3(fetch.default_cache_dir()))


_HEADER = ("case", "planned MiB", "tensors", "measured / planned", "resident", "measured / planned", "kept by autograd")


def row(name: str, result: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    said, found = result["planned"], result["measured"]
    total = said.get("total")
    cells = [name, f"{total / MIB:.0f}" if total else "–"]
    for what in ("tensors", "resident"):
        cells += [f"{found[what] / MIB:.0f}", f"{found[what] / total:.3f}" if total else "–"]
    kept = found.get("kept")
    return [*cells, "–" if kept is None else f"{kept / MIB:.1f} of {said['kept'] / MIB:.1f}"]


def own_row(name: str, result: Mapping[str, Any]) -> list[str]:
    """Of what there is between steps."""
    said, found = result["planned"], result["measured"]
    cells = [name, f"{said['own'] / MIB:.2f}", f"{found['own'] / MIB:.2f}"]
    return [*cells, f"{found['at rest'] / MIB:.0f}", f"{found['at rest'] / said['own']:.3f}"]


_OWN_HEADER = ("case", "planned MiB", "tensors", "resident", "measured / planned")
_NOTE = "Between steps: base weights, adapters, optimizer state and DDP's buckets."


def write(out: Path, about: Mapping[str, str], results: Mapping[str, Any]) -> None:
    """The results as memory.json and memory.md."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": about, "results": results}, indent=1, ensure_ascii=False)
    (out / "memory.json").write_text(text + "\n", encoding="utf-8")
    parts = ["# memory", __doc__.strip(), _markdown(_HEADER, [row(*item) for item in results.items()])]
    parts += [_NOTE, _markdown(_OWN_HEADER, [own_row(*item) for item in results.items()])]
    parts += ["## Measured on", "\n".join(f"- {key}: {value}" for key, value in about.items())]
    (out / "memory.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def main(*argv: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy: whether it runs")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases that have these words in their name")
    parser.add_argument("--out", type=Path, help="folder for the results (default: results/, of all cases)")
    chosen = parser.parse_args(argv or None)
    about, results = machine(), {}
    about["command"] = "python benchmarks/memory.py" + " --quick" * chosen.quick + only(chosen.only)
    for engine in RANKS:
        chunks = (False, True) if engine == "one" else (False,)
        cases = [Case(engine, *settings, chosen.quick) for settings in product(DTYPES, (False, True), chunks)]
        cases = [case for case in cases if chosen.only in case.name]
        for case, found in zip(cases, measure(cases) if cases else [], strict=True):
            results[case.name] = {"case": asdict(case), "planned": planned(case), "measured": found}
    print(table(_HEADER, [row(*item) for item in results.items()]))
    print(table(_OWN_HEADER, [own_row(*item) for item in results.items()]))
    out = chosen.out or (None if chosen.quick or chosen.only else RESULTS)
    if out:
        write(out, about, results)


if __name__ == "__main__":
    main()
