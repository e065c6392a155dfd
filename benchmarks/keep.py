"""What does a merge lose of what a model has learnt: into bfloat16, and into NF4 again; to nearest, and for its inputs?

SmolLM2-135M-Instruct in Phi-3's class, in bfloat16 or with its linear layers in bitsandbytes' NF4 (QLoRA), learns to
chat as in examples/phi3_chat.py (r = 16, a float32 adapter). Then the adapter is merged, to nearest and with
`lora.merge(model, batches)` for some rows of its training data, weights in NF4 with `packed=True`, and compared with
the unmerged model on conversations that are held out: the divergence KL(unmerged ‖ merged) and the loss, per token that
has a label. All is computed in float32 from the weights in bfloat16, unpacked where they are in NF4, so that nothing
else differs. A tenth of the scaling stands for an adapter that has learnt less: its update is nearer to the weights'
last bit.

    python benchmarks/keep.py [--bases bfloat16 nf4] [--steps 40] [--tokens 1024 4096] [--adapters FOLDER] [--quick]

`--adapters` keeps the trained adapter of each base, and takes it from there the next time. What the results have of
other bases stays.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chatting
import torch
import torch.nn.functional as F
from machine import machine
from torch import Tensor, nn

import lora
from lora.errors import table
from lora.layers.weights import is_packed, read_weight

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # which are no package
import phi3_chat
from phi3 import loop, quantizing
from phi3.packing import IGNORED, Batch

RESULTS = Path(__file__).parent / "results"
ROWS = 3  # of 256 tokens in a step, as in the example
LR = 1e-3
SCALES = (1.0, 0.1)
BASES: dict[str, str | None] = {"bfloat16": None, "nf4": "nf4"}  # what they are quantised to


def hidden(model: nn.Module, batch: Batch) -> Tensor:
    """What the head is given: rows are several conversations, of which the positions tell one from the next."""
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    return model.model(**inputs, use_cache=False).last_hidden_state


@torch.no_grad()
def predictions(model: nn.Module, held_out: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
    """Logits (tokens, words) at the positions that have a label, and the labels."""
    found = []
    for batch in held_out:
        labels = batch.labels[:, 1:]
        labelled = labels != IGNORED
        logits = model.lm_head(hidden(model, batch)[:, :-1][labelled])
        found.append((logits, labels[labelled]))
    return found


def compared(now: list[tuple[Tensor, Tensor]], unmerged: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """KL(unmerged ‖ now) and the loss of `now`, per token."""
    tokens, kl, loss = sum(len(labels) for _, labels in now), 0.0, 0.0
    for (logits, labels), (logits_0, _) in zip(now, unmerged, strict=True):
        # In float64: a divergence of 1e-8 is less than float32's rounding of its terms.
        q, p = (F.log_softmax(each, -1, dtype=torch.float64) for each in (logits, logits_0))
        kl += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        loss += float(F.nll_loss(q, labels, reduction="sum"))
    return {"KL": kl / tokens, "held-out loss": loss / tokens}


def trained(base: str, steps: int, folder: Path | None, toy: Path | None) -> tuple[nn.Module, nn.Module, Any]:
    """The model with its adapter in float32, in `eval()`; the same with all of its values in float32; and the data."""
    course = chatting.Course(0, LR, steps, ROWS, {"training": {"bf16": True}, "run": {"quantize": BASES[base]}})
    model, data, training, settings, general = chatting.load(course, toy)
    quantizing.quantize(model, general["quantize"], settings)
    exact = dense(model)
    for one in (model, exact):
        phi3_chat.inject(one, settings)
    path = folder / f"{base}.safetensors" if folder else None
    if path and path.exists():
        lora.load_adapter(model, path)
    else:
        for _ in chatting.steps(model, loop.make_optimizer(model, training), data, training):
            pass
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            lora.save_adapter(model, path)
    for its, ours in zip(lora_layers(exact), lora_layers(model), strict=True):
        for name, parameter in ours.lora_parameters():
            its._parameters[name].data.copy_(parameter)
    return model.requires_grad_(False).eval(), exact.requires_grad_(False).eval(), data


def lora_layers(model: nn.Module) -> list[lora.LoRALayer]:
    return [module for module in model.modules() if isinstance(module, lora.LoRALayer)]


def dense(model: nn.Module) -> nn.Module:
    """A copy in float32, unpacked where it is packed."""
    twin = copy.deepcopy(model)
    for name, layer in [*twin.named_modules()]:
        if isinstance(layer, nn.Linear) and is_packed(layer):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(read_weight(layer), False), layer.bias
            twin.set_submodule(name, plain)
    return twin.float()


def measure(model: nn.Module, exact: nn.Module, data: Any, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each scale and way to round."""
    held_out, rows = data.held_out[:1], []  # 8 rows of 256 tokens
    layers, packed = (*lora_layers(model), *lora_layers(exact)), any(map(is_packed, lora_layers(model)))
    full = layers[0].scaling
    with lora.disabled(exact):
        pretrained = predictions(exact, held_out)
    for scale in SCALES:
        for layer in layers:
            layer.scaling = full * scale
        unmerged = predictions(exact, held_out)

        found = {"unmerged": unmerged, "without the adapter": pretrained}
        found = {name: compared(now, unmerged) for name, now in found.items()}
        for wanted in (0, *tokens):
            merged = copy.deepcopy(model)
            batches = taken(data.order, wanted)
            start = time.perf_counter()
            report = lora.merge(merged, batches or None, step=hidden, packed=packed)
            seconds = time.perf_counter() - start
            way = f"merged for {sum(batch.size for batch in batches)} tokens" if batches else "merged to nearest"
            shares = {"lost on its inputs": [m.lost_on_inputs for m in report.modules]} if batches else {}
            shares |= {"if to nearest": [m.nearest_on_inputs for m in report.modules]} if batches else {}
            means = {name: statistics.mean(values) for name, values in shares.items()}
            now = compared(predictions(dense(merged), held_out), unmerged)
            found[way] = {**now, "seconds": seconds, **means}
            print(way, found[way], flush=True)
        rows += [{"scaling": full * scale, "model": way, **numbers} for way, numbers in found.items()]
    return rows


def taken(order: Any, tokens: int) -> list[Batch]:
    """Batches of the first steps, of as many tokens."""
    batches: list[Batch] = []
    step = 0
    while sum(batch.size for batch in batches) < tokens:
        batches += order.step(step)
        step += 1
    return batches


COLUMNS = {
    "scaling": "{:g}",
    "model": "{}",
    "KL": "{:.2e}",
    "held-out loss": "{:.5f}",
    "lost on its inputs": "{:.3f}",
    "if to nearest": "{:.3f}",
    "seconds": "{:.1f}",
}


def write(out: Path | None, found: dict[str, dict[str, Any]]) -> None:
    """Print the tables, and put keep.json and keep.md into the folder `out`, with what it has of other bases."""
    path = out / "keep.json" if out else None
    if path and path.exists():
        found = json.loads(path.read_text(encoding="utf-8")) | found
    parts = ["# keep", (__doc__ or "").strip()]
    for base in filter(found.__contains__, BASES):
        rows, about = found[base]["rows"], found[base]["machine"]
        cells = [[form.format(row[name]) if name in row else "–" for name, form in COLUMNS.items()] for row in rows]
        print(f"{base}\n{table(list(COLUMNS), cells)}")
        lines = ["| " + " | ".join(line) + " |" for line in (list(COLUMNS), ["---"] * len(COLUMNS), *cells)]
        parts += [f"## {base}", "\n".join(lines), "\n".join(f"- {key}: {value}" for key, value in about.items())]
    parts.append("Shares are means over the adapted layers, on the inputs that the merge was given.")
    if out and path:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (out / "keep.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main(*argv: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps of a toy: whether it runs, not how well")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), help="what the weights are in")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 40; 2 when quick)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="to round for")
    parser.add_argument("--adapters", type=Path, help="a folder to take the adapters from, or to keep them in")
    parser.add_argument("--out", type=Path, help="folder for keep.json and .md (default: results)")
    chosen = parser.parse_args(argv or None)
    steps, found = chosen.steps or (2 if chosen.quick else 40), {}
    for base in chosen.bases:
        about = machine()
        about["command"] = (
            f"python benchmarks/keep.py --bases {base} --steps {steps} --tokens {' '.join(map(str, chosen.tokens))}"
        )
        with tempfile.TemporaryDirectory() as folder:
            toy = chatting.toy_folder(Path(folder)) if chosen.quick else None
            model, exact, data = trained(base, steps, chosen.adapters, toy)
            rows = measure(model, exact, data, chosen.tokens)
        found[base] = {"machine": about, "rows": rows}
        write(chosen.out or (None if chosen.quick else RESULTS), found)


if __name__ == "__main__":
    main()
