"""What a person sees of a run: a progress bar, metrics as JSONL, and the loss curve as a picture."""

import json
import os
import time
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from tqdm import tqdm

from phi3.loop import Step, perplexity

Record = dict[str, Any]
METRICS, CURVE = "metrics.jsonl", "loss.png"


class Report:
    """Collects a run's records; each is appended to the metrics file as it comes, unless `writes` is False."""

    def __init__(
        self, output_dir: Path, records: list[Record], steps: int, logging_steps: int, writes: bool = True
    ) -> None:
        self.output_dir, self.writes = output_dir, writes
        self.records = list(records)
        self.logging_steps = logging_steps
        done = max((record["step"] for record in records), default=0)
        # A resumed run starts from its checkpoint's records: later ones were of steps now done again.
        if writes:
            partial = output_dir / f".{METRICS}.partial"
            partial.write_text("".join(map(_line, records)), encoding="utf-8")
            os.replace(partial, output_dir / METRICS)
        # tqdm's own steps per second count the measurements in; tokens/s, which do not, take their place.
        shape = "{desc} {n_fmt}/{total_fmt} |{bar:16}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=steps, initial=done, desc="step", bar_format=shape)
        self._tokens, self._seconds = 0, 0.0

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def step(self, number: int, step: Step, seconds: float) -> None:
        """Records step `number` (from 1) every `logging_steps`; shows it in the bar in any case."""
        self._tokens, self._seconds = self._tokens + step.tokens, self._seconds + seconds
        speed = self._tokens / max(self._seconds, 1e-9)
        self.bar.set_postfix_str(
            f"loss {step.loss:.3f}, lr {step.learning_rate:.1e}, {speed:.0f} tokens/s", refresh=False
        )
        self.bar.update()
        if number % self.logging_steps == 0:
            record = {"loss": step.loss, "learning_rate": step.learning_rate, "grad_norm": step.grad_norm}
            self._add({"step": number, **record, "tokens_per_second": round(speed, 1)})
            self._tokens, self._seconds = 0, 0.0

    def evaluation(self, number: int, loss: float) -> None:
        """Records and prints a held-out measurement after `number` steps."""
        self._add({"step": number, "eval_loss": loss, "eval_perplexity": perplexity(loss)})
        tqdm.write(f"step {number}: held-out loss {loss:.4f}, perplexity {perplexity(loss):.2f}")

    @property
    def evaluations(self) -> list[Record]:
        return [record for record in self.records if "eval_loss" in record]

    def draw(self) -> Path:
        """The loss curve of all records."""
        path = self.output_dir / CURVE
        if self.writes:
            draw_curve(self.records, path)
        return path

    def _add(self, record: Record) -> None:
        self.records.append(record)
        if self.writes:
            with open(self.output_dir / METRICS, "a", encoding="utf-8") as file:
                file.write(_line(record))


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def draw_curve(records: list[Record], path: Path) -> None:
    """Training loss as a line, held-out loss as points with their perplexity."""
    matplotlib.use("Agg")  # needs no screen
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    trained = [(record["step"], record["loss"]) for record in records if "loss" in record]
    held_out = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    if trained:
        axes.plot(*zip(*trained, strict=True), color="tab:blue", alpha=0.7, label="training, each step's rows")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    for step, loss in held_out[:: max(1, len(held_out) // 5)]:
        note = f"perplexity {perplexity(loss):.1f}"
        side = "right" if step and step == held_out[-1][0] else "left"  # of the point; within the frame
        place = {"xytext": (-6 if side == "right" else 6, 8), "textcoords": "offset points", "ha": side}
        axes.annotate(note, (step, loss), fontsize=8, **place)
    axes.set(xlabel="step", ylabel="loss per token (nats)", title="Replies' loss while fine-tuning with LoRA")
    axes.margins(x=0.08, y=0.12)
    axes.grid(alpha=0.3)
    if trained or held_out:
        axes.legend(loc="upper right")  # losses fall; to look for the best place takes long with many points
    figure.savefig(path, dpi=120)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
