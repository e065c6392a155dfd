"""Does fine-tuning with LoRA fit on my GPU? Says so from a model's config.json, before anything is downloaded.

    python examples/memory_plan.py config.json --r 16 --seq-len 4096 --gradient-checkpointing --memory 24

The loss is a model's own, which has all logits; with `--loss-in-chunks` it is that of phi3_chat.py, which never has.

It knows decoders like Llama (`model_type` "llama", "mistral", "phi3" or "qwen2"), and needs nothing but Python.
Weights, gradients, optimizer states and what autograd keeps for backward are exact; docs/memory.md has the formulas,
and says how far the peak is from measurements. With `--ranks` it plans DDP, which takes what one process takes, and
buckets of the gradients' size; and of FSDP2 what is exact: the shares of weights, gradients and optimizer states that a
rank holds. FSDP2's weights that are whole for a moment, and what its step keeps and makes, are not planned. Nor are:

- tensor parallelism, and weights that are quantised and sharded;
- torch and CUDA themselves, and what an allocator keeps or splits;
- padding masks, `modules_to_save`, `rank_pattern`, and optimizers that are not fused.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from decoders import Decoder, Layer, raise_all, read_decoder

# ---- how it is trained -------------------------------------------------------------------------------------------


def _nf4(rows: int, columns: int) -> int:
    codes, constants = -(-rows * columns // 2), -(-rows * columns // 64)
    return codes + constants + 4 * -(-constants // 256) + 4 * (16 + 256 + 1)  # and the two tables, and the mean


# Bytes of a value: of the base weights that are not quantised, and of what is computed with; of A and B.
BASE_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "nf4": 2, "int8": 2}
ADAPTER_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes of a quantised weight by its rows and columns: of linear layers in the blocks, as bitsandbytes has them.
QUANTISED: dict[str, Callable[[int, int], int]] = {"nf4": _nf4, "int8": lambda rows, columns: rows * (columns + 4)}
# Bytes of the state of a trained tensor, which has n values of a bytes.
OPTIMIZERS: dict[str, Callable[[int, int], int]] = {
    "adamw": lambda n, a: 2 * a * n + 4,
    "adamw8bit": lambda n, a: 2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n,  # bitsandbytes leaves small ones alone
    "lion": lambda n, a: a * n,
    "sgd": lambda n, a: 0,
    "sgd-momentum": lambda n, a: a * n,
}
# Logits at a time, where the loss is computed in chunks.
CHUNKS = {"gpu": 2**25, "cpu": 2**23}
CHOICES: dict[str, Iterable[str]] = {
    "device": CHUNKS,
    "base_dtype": BASE_DTYPES,
    "adapter_dtype": ADAPTER_DTYPES,
    "optimizer": OPTIMIZERS,
}


def _setting(default: Any, about: str) -> Any:
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True, kw_only=True)
class Training:
    """What memory depends on, by the names of `lora.LoraConfig` where it has them."""

    r: int = _setting(16, "rank of the updates")
    target_modules: str | tuple[str, ...] = _setting("all-linear", "names of layers, or all linear ones in the blocks")
    use_dora: bool = _setting(False, "train a magnitude for each output")
    freeze_A: bool = _setting(False, "leave A as it starts (LoRA-FA)")
    split_fused: bool = _setting(False, "an update for each projection that is fused in a layer (`splits`)")
    base_dtype: str = _setting("bfloat16", "of the base weights")
    adapter_dtype: str = _setting("float32", "of A and B")
    optimizer: str = _setting("adamw", "that updates the adapter")
    batch_size: int = _setting(1, "rows that a rank computes at once")
    seq_len: int = _setting(2048, "tokens of a row")
    gradient_checkpointing: bool = _setting(False, "compute each block again in backward")
    fused_mlp: bool = _setting(False, "the MLP as one function, `lora.functional.lora_swiglu`")
    loss_in_chunks: bool = _setting(False, "never all logits at once, `lora.functional.linear_cross_entropy`")
    device: str = _setting("gpu", "that trains: on it depends how large a chunk is")
    ranks: int = _setting(1, "of DDP and FSDP2")

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("r", "batch_size", "seq_len", "ranks")}
        problems = [f"`{name}` must be at least 1, got {count!r}." for name, count in counts.items() if count < 1]
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                problems.append(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        raise_all("Training", problems)

    @property
    def tokens(self) -> int:
        """T, of a batch."""
        return self.batch_size * self.seq_len

    @property
    def b(self) -> int:
        """Bytes of a value that is computed with."""
        return BASE_DTYPES[self.base_dtype]

    def check(self, decoder: Decoder) -> None:
        """ValueError that lists what does not go with this decoder, if anything."""
        model, problems = decoder.model_type, []
        for target in () if self.target_modules == "all-linear" else self.target_modules:
            if not any(layer.matches(target) for layer in decoder.layers):
                known = ", ".join(layer.name.rpartition(".")[2] for layer in decoder.layers)
                problems.append(f"`target_modules` {target!r} matches no layer of a {model}, which has {known}.")
        if self.split_fused and not decoder.fused:
            problems.append(f"`split_fused` is for fused projections, which a {model} does not have.")
        mlp = [layer for layer in decoder.layers if layer.reads in ("second norm", "product")]
        wrong = {
            f"has gate and up in one layer; a {model} has not": not decoder.fused,
            "is adapted in gate_up_proj and down_proj": not all(map(self.adapts, mlp)),
            "has no magnitudes; leave out either it or `use_dora`": self.use_dora,
            f"has dense weights, not {self.base_dtype}": self.base_dtype in QUANTISED,
        }
        if self.fused_mlp:
            problems += [f"`fused_mlp` is for an MLP that {what}." for what, is_wrong in wrong.items() if is_wrong]
        if self.loss_in_chunks and any(self.adapts(layer) for layer in decoder.layers if layer.reads == "last norm"):
            problems.append("`loss_in_chunks` is for a head that is not adapted; leave out either it or lm_head.")
        raise_all("plan", problems)

    def adapts(self, layer: Layer) -> bool:
        """Whether the layer gets an adapter."""
        if self.target_modules == "all-linear":
            return layer.in_block
        return any(layer.matches(target) for target in self.target_modules)

    def rows_of_A(self, layer: Layer) -> int:
        """r for each update that the layer gets."""
        return self.r * (layer.parts if self.split_fused else 1)

    def trains_A(self, layer: Layer) -> bool:
        """Whether lora_A trains: an embedding's starts at zero, and always does."""
        return not self.freeze_A or layer.reads == "ids"


# ---- what is held, and what autograd keeps, to the byte ----------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A parameter that is in the model so many times."""

    shape: tuple[int, ...]
    size: int  # bytes of a value
    times: int
    packed: int | None = None  # bytes, if it is quantised
    adapter: bool = False
    trains: bool = False

    def values(self, shards: int = 1) -> int:
        """Values on the fullest rank: FSDP2 shards rows."""
        return -(-self.shape[0] // shards) * math.prod(self.shape[1:])

    def bytes(self, shards: int = 1) -> int:
        """Bytes of all of it on the fullest rank."""
        return self.times * (self.values(shards) * self.size if self.packed is None else self.packed)


def tensors(decoder: Decoder, training: Training) -> list[Stored]:
    """Every parameter of the model with its adapters."""
    found = [Stored((decoder.hidden,), training.b, times=2 * decoder.blocks + 1)]  # norms
    for layer in decoder.layers:
        times = decoder.blocks if layer.in_block else 1
        if not layer.tied:
            quantised = QUANTISED.get(training.base_dtype) if layer.in_block else None
            packed = quantised(layer.rows, layer.columns) if quantised else None
            found.append(Stored((layer.rows, layer.columns), training.b, times, packed))
        if layer.bias:
            found.append(Stored((layer.rows,), training.b, times))
        if training.adapts(layer):
            found += adapter(layer, training, times)
    return found


def adapter(layer: Layer, training: Training, times: int) -> Iterator[Stored]:
    """A, B and, with DoRA, the magnitudes of a layer."""
    outputs, inputs = layer.rows, layer.columns
    if layer.reads == "ids":  # an embedding is looked up: its inputs are its rows
        outputs, inputs = inputs, outputs
    a = ADAPTER_DTYPES[training.adapter_dtype]
    yield Stored((training.rows_of_A(layer), inputs), a, times, adapter=True, trains=training.trains_A(layer))
    yield Stored((outputs, training.r), a, times, adapter=True, trains=True)
    if training.use_dora:
        yield Stored((outputs,), 4, times, adapter=True, trains=True)


def kept(decoder: Decoder, training: Training) -> int:
    """What is kept for backward, the loss aside: blocks or their inputs, rotation, the last norm, adapters outside."""
    T, b, d = training.tokens, training.b, decoder.hidden
    outside = [layer for layer in decoder.layers if training.adapts(layer) and not layer.in_block]
    norm = 4 * d + 4
    blocks = T * b * d if training.gradient_checkpointing else kept_by_block(decoder, training)
    rotation = 2 * b * training.seq_len * decoder.head_size
    last = norm + b * d * _keeps(decoder, training, "last norm")
    if not training.gradient_checkpointing and not any(layer.reads == "ids" for layer in outside):
        last -= norm  # of the first block, before which nothing trains
    return decoder.blocks * blocks + rotation + T * last + _kept_by_adapters(outside, training)


def kept_by_block(decoder: Decoder, training: Training) -> int:
    """What autograd keeps of one block."""
    b, d, m, q, k = training.b, decoder.hidden, decoder.intermediate, decoder.query, decoder.key_value
    norms = 2 * (4 * d + 4)  # their inputs, in float32, and a number for each token
    norms += b * d * (_keeps(decoder, training, "first norm") + _keeps(decoder, training, "second norm"))  # outputs
    attention = b * (q + k)  # queries and keys, rotated
    # A value is a part of the output of a fused projection, and keeps all of it.
    attention += b * (q + 2 * k if decoder.fused else k)
    # Phi-3's rotation lays queries out head by head, and attention its output as these: o_proj gets a copy of it.
    copies = 2 if decoder.fused and _keeps(decoder, training, "attention") else 1
    attention += copies * b * q + 4 * decoder.heads  # the output, and log-sum-exp
    mlp = 2 * b * m  # gate and up
    if not training.fused_mlp:
        mlp += b * m * (1 + _keeps(decoder, training, "product"))  # SiLU(gate), and the input of down_proj
    adapted = [layer for layer in decoder.layers if training.adapts(layer) and layer.in_block]
    return training.tokens * (norms + attention + mlp) + _kept_by_adapters(adapted, training)


def _keeps(decoder: Decoder, training: Training, x: str) -> bool:
    """Whether an adapted layer keeps this input, for the gradient of its A."""
    return any(training.adapts(layer) and training.trains_A(layer) for layer in decoder.layers if layer.reads == x)


def _kept_by_adapters(layers: Iterable[Layer], training: Training) -> int:
    """h of each layer; with DoRA also its output and gain."""
    T, b, found = training.tokens, training.b, 0
    for layer in layers:
        found += T * b * training.rows_of_A(layer)
        if training.use_dora:  # g and the norms in float32, and where those are zero
            found += (T * b + 4 + 4 + 1) * (layer.columns if layer.reads == "ids" else layer.rows)
    return found


def kept_by_loss(decoder: Decoder, training: Training) -> int:
    """What is kept for backward, until the loss has had it, and labels of 8 bytes.

    That is the logits' log-softmax in float32; in chunks it is the gradient of the hidden states.
    """
    each = training.b * decoder.hidden if training.loss_in_chunks else 4 * decoder.vocabulary
    return training.tokens * (each + 8)


def made_by_loss(decoder: Decoder, training: Training) -> int:
    """What there is beside that, at most: two gradients of the log-softmax, at its backward.

    In chunks it is the hidden states, an index and a loss for each token, and the logits of one chunk: in float32, and
    in what is computed with, if that is another dtype.
    """
    T, V, b = training.tokens, decoder.vocabulary, training.b
    if not training.loss_in_chunks:
        return 8 * T * V
    each = 4 if b == 4 else 4 + b
    return T * (b * decoder.hidden + 12) + each * V * rows_at_a_time(T, V, training.device)


def rows_at_a_time(tokens: int, vocabulary: int, device: str) -> int:
    """The tokens of a chunk: all chunks have as many, but for the last."""
    pieces = -(-tokens * vocabulary // CHUNKS[device])
    return -(-tokens // pieces)


# ---- the plan ----------------------------------------------------------------------------------------------------

LATE = ("logits and loss", "backward of a block")  # not there at the same time: the larger counts
TERMS = ("base weights", "adapters", "gradients", "optimizer state", "DDP's buckets", "activations", *LATE)
ENGINES = ("one process", "DDP", "FSDP2")


def plan(decoder: Decoder, training: Training, engine: str) -> dict[str, int]:
    """Bytes on the fullest rank by one of `ENGINES`: those of `TERMS` that are planned."""
    training.check(decoder)
    shards, found = training.ranks if engine == "FSDP2" else 1, tensors(decoder, training)
    state = OPTIMIZERS[training.optimizer]
    gradients = sum(t.bytes(shards) for t in found if t.trains)
    terms = {
        "base weights": sum(t.bytes(shards) for t in found if not t.adapter),
        "adapters": sum(t.bytes(shards) for t in found if t.adapter),
        "gradients": gradients,
        "optimizer state": sum(t.times * state(t.values(shards), t.size) for t in found if t.trains),
        "DDP's buckets": gradients if engine == "DDP" else 0,
    }
    if engine == "FSDP2":
        if training.base_dtype in QUANTISED:
            del terms["base weights"]
        return terms
    terms["activations"] = kept(decoder, training)
    terms["logits and loss"] = kept_by_loss(decoder, training) + made_by_loss(decoder, training)
    # With checkpointing a block is computed again; the largest quantised weight is dense for a moment.
    again = kept_by_block(decoder, training) if training.gradient_checkpointing else 0
    dense = max((t.values() * t.size for t in found if t.packed is not None), default=0)
    made = training.tokens * training.b * (2 * decoder.intermediate + 3 * decoder.hidden)
    terms["backward of a block"] = made + again + dense
    return terms


def total(terms: Mapping[str, int]) -> int:
    """Bytes at the peak, as far as they are planned."""
    return sum(terms.values()) - min(terms.get(name, 0) for name in LATE)


# ---- the command -------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", type=Path, help="config.json of the model")
    for setting in fields(Training):
        options: dict[str, Any] = {"help": f"{setting.metadata['about']} (default: {setting.default})"}
        if setting.default is False:
            options = {"help": setting.metadata["about"], "action": "store_true"}
        elif setting.name == "target_modules":
            options |= {"nargs": "+", "metavar": "NAME"}
        elif setting.name in CHOICES:
            options["choices"] = CHOICES[setting.name]
        else:
            options |= {"type": int, "metavar": "N"}
        parser.add_argument(f"--{setting.name.replace('_', '-')}", default=setting.default, **options)
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a device, in GiB: say what fits")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plans; 1 if none is known to fit into the memory that is given, 2 for mistakes."""
    flags = parse(argv)
    settings = {setting.name: getattr(flags, setting.name) for setting in fields(Training)}
    names = flags.target_modules
    settings["target_modules"] = "all-linear" if names in ("all-linear", ["all-linear"]) else tuple(names)
    try:
        decoder, training = read_decoder(flags.config), Training(**settings)
        plans = {engine: plan(decoder, training, engine) for engine in ENGINES[: 3 if training.ranks > 1 else 1]}
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = tensors(decoder, training)
    base, adapters = (sum(t.times * t.values() for t in found if t.adapter is is_so) for is_so in (False, True))
    print(
        f"{decoder.model_type}: {decoder.blocks} blocks, {base:,} parameters in {training.base_dtype}, "
        f"{adapters:,} in adapters of r = {training.r} in {training.adapter_dtype}\n\n{table(plans)}"
    )
    memory = flags.memory
    fits = {} if memory is None else {engine: total(terms) <= memory * 2**30 for engine, terms in plans.items()}
    for engine, is_so in fits.items():
        verdict = "does not fit" if not is_so else "fits" if engine != "FSDP2" else "is not known to fit"
        print(f"{engine} {verdict} in {memory:g} GiB")
    return 0 if memory is None or fits["one process"] else 1  # DDP takes more


def table(plans: Mapping[str, Mapping[str, int]]) -> str:
    """The plans side by side."""
    rows = [["GiB on each rank", *plans]]
    names = [name for name in TERMS if any(terms.get(name) for terms in plans.values())]
    rows += [[name, *(_cell(name, terms) for terms in plans.values())] for name in names]
    rows += [["total", *("≥ " * (engine == "FSDP2") + _gib(total(terms)) for engine, terms in plans.items())]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    note = "( ): not there at the peak, and not counted" + "; –, ≥: not planned, a rank takes more" * (len(plans) > 1)
    return "\n".join([*lines, "", note])


def _cell(name: str, terms: Mapping[str, int]) -> str:
    if name not in terms:
        return "–"
    counts = name not in LATE or name == max(LATE, key=terms.__getitem__)
    return _gib(terms[name]) if counts else f"({_gib(terms[name])})"


def _gib(count: int) -> str:
    return f"{count / 2**30:,.3f}"


if __name__ == "__main__":
    sys.exit(main())
