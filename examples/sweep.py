"""Which learning rate, and which rank? One adapter for each setting, all in one batch, on one pass over the data.

With nothing but pip, on a CPU, in a few minutes: four rates and three ranks on SmolLM2-135M-Instruct, which learns to
chat as people do in chitchat-dataset.

    python examples/sweep.py
    python examples/sweep.py --rates 3e-4 1e-3 3e-3 --ranks 8 64 --max-steps 200 --output-dir my_sweep

Every adapter of the bank gets its own copy of each step's rows, and has its own AdamW and its own clipping: it becomes
what a run of its own would make of it. The base's weights are read once for all of them, which is what a step on a few
short rows spends its time on. `--one-by-one` trains the same settings one after the other for a few steps too, in
turns with all at once, and says what that takes and how far the losses are apart.

In --output-dir: adapter.safetensors (the best by its held-out loss), sweep.jsonl (a line for each setting) and
sweep.png. Model and data are phi3_chat.py's, and so are the flags.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from phi3 import chat_data, chats, checkpoints, loop, packing, pretrained, settings
from phi3.errors import Diverged, UserError
from phi3.settings import Settings
from phi3_chat import cache_of, load_model
from torch import Tensor, nn
from tqdm import tqdm

import lora
from lora.errors import table

training_config: Settings = {
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "max_seq_length": 32,
    "max_steps": 100,
    "gradient_checkpointing": False,
    "bf16": False,
    "seed": 0,
}

peft_config: Settings = {
    "lora_dropout": 0.0,
    "use_dora": False,
    "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}

run_config: Settings = {
    "model": pretrained.SMOLLM2,
    "data": chat_data.CHITCHAT,
    "data_split": "train",
    "train_conversations": 1000,
    "eval_conversations": 8,
    "attn_implementation": "sdpa",
    "device": "auto",
    "output_dir": "sweep_output",
    "cache_dir": None,
}

DICTIONARIES = {
    "training (training_config)": training_config,
    "adapters (peft_config)": peft_config,
    "model, data and output (run_config)": run_config,
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
RANKS = (2, 8, 32)
RECORDS, PICTURE = "sweep.jsonl", "sweep.png"
LINES = ("-", "--", ":", "-.")  # one for each rank


class Setting(NamedTuple):
    """What a sweep tries."""

    rank: int
    rate: float


class Learner:
    """One setting as it is trained: its adapter's Parameters, its own optimizer, and its losses and norms so far."""

    def __init__(self, setting: Setting, parameters: Sequence[nn.Parameter], training: Settings) -> None:
        self.setting, self.parameters = setting, parameters
        self.max_norm = training["max_grad_norm"] or math.inf
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=training["weight_decay"], fused=True)
        self.losses: list[float] = []
        self.norms: list[float] = []  # of the gradient, before clipping

    def step(self, loss: float, times: float) -> None:
        """Clip and step, at so many times the setting's rate."""
        self.losses.append(loss)
        self.norms.append(nn.utils.clip_grad_norm_(self.parameters, self.max_norm).item())
        for group in self.optimizer.param_groups:
            group["lr"] = times * self.setting.rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def losses_of(model: nn.Module, batch: packing.Batch, copies: int) -> Tensor:
    """The summed loss of each copy of a batch's rows, (copies)."""
    tensors = (tensor.repeat(copies, 1) for tensor in batch[:3])  # (copies · rows, length), copy by copy
    return loop.loss_sum(model, packing.Batch(*tensors, copies * batch.size), "none").view(copies, -1).sum(1)


def owners(names: Sequence[str], batch: packing.Batch) -> list[str]:
    """Whose each row is, when every adapter has a copy of a batch's rows."""
    return [name for name in names for _ in range(len(batch.input_ids))]


def train_step(model: nn.Module, learners: Sequence[Learner], batch: packing.Batch, times: float) -> None:
    """One step of all learners, each on its own copy of the batch's rows."""
    losses = losses_of(model, batch, len(learners)) / batch.labelled  # each the mean over its own labels
    losses.sum().backward()  # and not the mean over learners: each gets the gradient that it would get alone
    for learner, loss in zip(learners, losses.tolist(), strict=True):
        learner.step(loss, times)


@torch.no_grad()
def held_out_losses(model: nn.Module, bank: lora.AdapterBank, held_out: Sequence[packing.Batch]) -> dict[str, float]:
    """Each adapter's mean loss over all labelled tokens that were held out."""
    total = 0.0
    with loop.evaluating(model):
        for batch in held_out:
            with bank.rows(owners([*bank], batch)):
                total = total + losses_of(model, batch, len(bank))  # (adapters)
    mean = total / sum(batch.labelled for batch in held_out)
    return dict(zip(bank, mean.tolist(), strict=True))


class Sweep(NamedTuple):
    """What to train, on what."""

    model: nn.Module
    data: chats.Chats
    settings: dict[str, Setting]  # by the names of their adapters
    configs: dict[str, lora.LoraConfig]
    training: Settings
    total: int  # steps

    def batch(self, step: int) -> tuple[packing.Batch, float]:
        """The rows of a step, and its learning rate as a ratio to the peak."""
        [batch] = self.data.order.step(step)
        times = loop.learning_rate_at(step, self.total, self.training | {"learning_rate": 1.0})
        return batch.to(self.model.device), times

    def start(self) -> tuple[lora.AdapterBank, list[Learner]]:
        """A bank with an adapter for each setting; all of one rank start alike."""
        bank = lora.bank(self.model)
        for name, config in self.configs.items():
            torch.manual_seed(self.training["seed"])
            bank[name] = config
            bank.seed(name, self.training["seed"])
        learners = [Learner(self.settings[name], bank.parameters(name), self.training) for name in bank]
        return bank, learners

    def together(self, bank: lora.AdapterBank, learners: Sequence[Learner], step: int) -> None:
        """One step of all."""
        batch, times = self.batch(step)
        with bank.rows(owners([*bank], batch)):
            train_step(self.model, learners, batch, times)

    def alone(self, name: str, steps: int) -> tuple[list[float], float]:
        """The losses of the first steps of one setting in a plain model, and the seconds that they took."""
        torch.manual_seed(self.training["seed"])
        lora.inject(self.model, self.configs[name])
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        learner = Learner(self.settings[name], parameters, self.training)
        torch.manual_seed(self.training["seed"])
        started = time.perf_counter()
        for step in range(steps):
            train_step(self.model, [learner], *self.batch(step))
        seconds = time.perf_counter() - started
        lora.eject(self.model)
        return learner.losses, seconds


def compare(sweep: Sweep, steps: int, rounds: int = 3) -> dict[str, float]:
    """All settings in one batch against one after the other, in turns: seconds a step, and how far losses differ."""
    apart = dict.fromkeys(sweep.settings, 0.0)
    seconds, losses = [], {}
    names = [*sweep.settings]
    for n in range(rounds):
        bank, learners = sweep.start()
        started = time.perf_counter()
        for step in range(steps):
            sweep.together(bank, learners, step)
        seconds.append(time.perf_counter() - started)
        bank.keep(None)
        for name in names[n::rounds]:
            losses[name], apart[name] = sweep.alone(name, steps)
    pairs = [(one, losses[name]) for name, one in zip(names, (learner.losses for learner in learners), strict=True)]
    differ = max(abs(a - b) / b for these, those in pairs for a, b in zip(these, those, strict=True))
    return {"at once": statistics.median(seconds) / steps, "one by one": sum(apart.values()) / steps, "differ": differ}


def prepare(flags: argparse.Namespace) -> Sweep:
    """The model, its data and the settings to try."""
    training, peft, run = (settings.chosen(flags, defaults) for defaults in DICTIONARIES.values())
    torch.manual_seed(training["seed"])
    conversations = chat_data.read(run["data"], run["data_split"], cache_of(run))
    model, tokenizer = load_model(run, training)
    fixed = {"gradient_accumulation_steps": 1, "num_train_epochs": 1.0}
    data = chats.prepare(conversations, tokenizer, run | {"sample_replies": 0}, training | fixed, model.device)
    splits = pretrained.fused_splits(model.config, peft["target_modules"])
    chosen, configs = {}, {}
    for rank in dict.fromkeys(flags.ranks):
        for n, rate in enumerate(dict.fromkeys(flags.rates)):
            name = f"rank{rank}_rate{n}"
            chosen[name] = Setting(rank, rate)
            configs[name] = lora.LoraConfig(r=rank, lora_alpha=flags.scaling * rank, splits=splits, **peft)
    total = loop.total_steps(training | fixed, data.order.steps_per_epoch)
    return Sweep(model.train(), data, chosen, configs, training, total)


def run(flags: argparse.Namespace) -> None:
    """From the flags to the files in the output directory."""
    folder = Path(flags.output_dir).expanduser()
    if (folder / RECORDS).exists() and not flags.overwrite:
        raise UserError(f"{str(folder)!r} holds a sweep already: --overwrite, or choose another --output-dir")
    sweep = prepare(flags)
    try:
        bank, learners = sweep.start()
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot adapt this model: {error}") from error
    print(f"{len(bank)} settings, {sweep.total} steps", flush=True)
    started = time.perf_counter()
    with bank.use(None):
        before = loop.held_out_loss(sweep.model, sweep.data.held_out)
    with tqdm(total=sweep.total, desc="step") as bar:
        for step in range(sweep.total):
            sweep.together(bank, learners, step)
            bar.set_postfix_str(f"losses {', '.join(f'{learner.losses[-1]:.2f}' for learner in learners)}", False)
            bar.update()
    held_out = held_out_losses(sweep.model, bank, sweep.data.held_out)
    seconds = time.perf_counter() - started
    found = [name for name, loss in held_out.items() if math.isfinite(loss)]
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, bank, learners, held_out)
    if not found:
        raise Diverged("no setting's loss is finite at the end; try lower --rates")
    draw(folder / PICTURE, learners, held_out, before)
    best = min(found, key=lambda name: held_out[name])
    bank.save(best, folder / checkpoints.ADAPTER)
    print(report(bank, learners, held_out, best))
    print(f"Held-out loss {before:.4f} before. All settings took {seconds:.0f} s, measurements included.")
    print(f"Everything is in {folder}: the best in {checkpoints.ADAPTER}, {RECORDS}, {PICTURE}.", flush=True)
    if flags.one_by_one:
        bank.keep(None)
        print(compared(compare(sweep, flags.one_by_one), flags.one_by_one))


def report(bank: lora.AdapterBank, learners: Sequence[Learner], held_out: dict[str, float], best: str) -> str:
    """A line for each setting."""
    rows = []
    for name, learner in zip(bank, learners, strict=True):
        size = sum(parameter.numel() for parameter in learner.parameters)
        last = statistics.fmean(learner.losses[-max(1, len(learner.losses) // 4) :])
        losses = (f"{last:.4f}", f"{held_out[name]:.4f}", f"{loop.perplexity(held_out[name]):.2f}")
        rows.append((learner.setting.rank, f"{learner.setting.rate:g}", size, *losses, "best" * (name == best)))
    return table(("rank", "rate", "parameters", "loss, last quarter", "held out", "perplexity", ""), rows)


def compared(result: dict[str, float], steps: int) -> str:
    """The times of both ways, and how far they are apart in what they compute."""
    ways = [(way, f"{result[way]:.2f}", f"{result[way] / result['at once']:.2f}") for way in ("at once", "one by one")]
    return (
        f"{table(('all settings', 'seconds a step', 'ratio'), ways)}\n"
        f"Losses of the first {steps} steps differ by {result['differ']:.1e} of themselves, at most."
    )


def write(folder: Path, bank: lora.AdapterBank, learners: Sequence[Learner], held_out: dict[str, float]) -> None:
    """A line for each setting, with its losses and gradients' norms; null is what is not finite."""
    with open(folder / RECORDS, "w", encoding="utf-8") as file:
        for name, learner in zip(bank, learners, strict=True):
            curves = {"losses": learner.losses, "grad_norms": learner.norms}
            record = {**learner.setting._asdict(), "held_out": held_out[name], **curves}
            file.write(json.dumps({key: finite(value) for key, value in record.items()}) + "\n")


def finite(value: Any) -> Any:
    """A number, or each of a list; None for what is not finite, which JSON has no word for."""
    if isinstance(value, list):
        return [finite(each) for each in value]
    return value if math.isfinite(value) else None


def draw(path: Path, learners: Sequence[Learner], held_out: dict[str, float], before: float) -> None:
    """Loss over steps of each setting; final held-out loss over the learning rate, for each rank."""
    matplotlib.use("Agg")  # needs no screen
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = sorted({learner.setting.rate for learner in learners})
    ranks = sorted({learner.setting.rank for learner in learners})
    for learner in learners:
        style = LINES[ranks.index(learner.setting.rank) % len(LINES)]
        label = f"{learner.setting.rate:g}" if learner.setting.rank == ranks[0] else None
        left.plot(smooth(learner.losses), style, color=f"C{rates.index(learner.setting.rate)}", label=label, lw=1.2)
    left.set(xlabel="step", ylabel="loss per token (nats), smoothed", title="Training, all settings on the same rows")
    left.legend(title="learning rate", fontsize=8, loc="upper right")
    final = {each.setting: loss for each, loss in zip(learners, held_out.values(), strict=True)}
    for n, rank in enumerate(ranks):
        losses = [final[Setting(rank, rate)] for rate in rates]
        right.plot(rates, losses, f"o{LINES[n % len(LINES)]}", color="0.2", alpha=0.8, label=f"{rank}")
    right.axhline(before, color="0.7", lw=1)
    right.annotate("before", (rates[0], before), (0, 3), textcoords="offset points", fontsize=8, color="0.5")
    right.set(xscale="log", xlabel="learning rate", ylabel="loss per token (nats)", title="Held out, at the end")
    right.legend(title="rank", fontsize=8, loc="lower left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def smooth(losses: Sequence[float], keep: float = 0.8) -> list[float]:
    """A running mean in which what is old fades; all settings see the same rows, so all are smoothed alike."""
    mean, weight, smoothed = 0.0, 0.0, []
    for loss in losses:
        mean, weight = keep * mean + loss, keep * weight + 1
        smoothed.append(mean / weight)
    return smoothed


def positive(kind: type) -> Any:
    """A number above 0, for argparse."""

    def number(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    number.__name__ = f"{kind.__name__} above 0"
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--rates", type=positive(float), nargs="+", default=RATES, metavar="RATE", help="peak learning rates to try")
    add("--ranks", type=positive(int), nargs="+", default=RANKS, metavar="R", help="ranks to try")
    add("--scaling", type=positive(float), default=2.0, help="lora_alpha / r of all (default: 2)")
    add(
        "--one-by-one",
        type=positive(int),
        nargs="?",
        const=3,
        metavar="STEPS",
        help="also train one setting after the other, for so many steps (3), and compare times and losses",
    )
    add("--overwrite", action="store_true", help="replace a sweep that is in --output-dir")
    for title, defaults in DICTIONARIES.items():
        settings.add_flags(parser, title, defaults)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep; 0 if all went well, 2 for a mistake in what it was given, 1 if every setting diverged."""
    try:
        run(parse(argv))
    except (UserError, Diverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
