"""Does fine-tuning with LoRA fit on my GPU? Says so from a model's config.json, before anything is downloaded.

    python examples/memory_plan.py config.json --r 16 --seq-len 4096 --gradient-checkpointing --memory 24

It knows decoders like Llama (`model_type` "llama", "mistral", "phi3" or "qwen2"), and needs nothing but Python.
Weights, gradients, optimizer states and what autograd keeps for backward are exact; docs/memory.md has the formulas,
and says how far the peak is from measurements. With `--ranks` it plans DDP, which takes what one process takes, and
buckets of the gradients' size; and of FSDP2 what is exact: the shares of weights, gradients and optimizer states that a
rank holds. FSDP2's weights that are whole for a moment, and what its step keeps and makes, are not planned. Nor are:

- tensor parallelism, and weights that are quantised and sharded;
- torch and CUDA themselves, and what an allocator keeps or splits;
- padding masks, dropout over quantised weights, `modules_to_save`, `rank_pattern`, and optimizers that are not fused.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

# ---- the model ---------------------------------------------------------------------------------------------------

MODEL_TYPES = ("llama", "mistral", "phi3", "qwen2")
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Layer:
    """A linear layer, weight (out_features, in_features), or an embedding, weight (vocabulary, features)."""

    name: str
    rows: int
    columns: int
    reads: str  # its input: layers that read the same share one tensor
    bias: bool = False
    parts: int = 1  # how many projections are fused in it
    tied: bool = False  # its weight is another layer's

    @property
    def in_block(self) -> bool:
        """Whether every block has one."""
        return self.reads not in ("ids", "last norm")

    def matches(self, target: str) -> bool:
        """Whether its name ends with the target, whole components compared, as in `lora.inject`."""
        return f".{self.name}".endswith(f".{target}")


@dataclass(frozen=True)
class Decoder:
    """Blocks of attention and a gated MLP, all alike, between an embedding and a head."""

    model_type: str
    hidden: int
    intermediate: int
    vocabulary: int
    blocks: int
    heads: int
    head_size: int
    query: int  # features of all queries
    key_value: int  # features of all keys, and of all values
    fused: bool  # q, k, v are one layer, and gate, up another
    layers: tuple[Layer, ...]


def read_decoder(path: Path) -> Decoder:
    """The decoder that transformers would make from a config.json."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a model's config.json: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, a model's config, got a {type(config).__name__}.")
    return decoder_of(config, str(path))


def decoder_of(config: Mapping[str, Any], where: str = "config") -> Decoder:
    """The decoder of a config, with transformers' defaults for fields that may be missing."""
    _raise_all(where, _config_problems(config))
    model_type, fused = config["model_type"], config["model_type"] == "phi3"
    d, m, blocks, heads, V = (config[name] for name in SIZES)
    head_size = config.get("head_dim") or d // heads
    q, kv = heads * head_size, (config.get("num_key_value_heads") or heads) * head_size
    output_bias, mlp_bias = (model_type == "llama" and bool(config.get(f"{x}_bias")) for x in ("attention", "mlp"))
    query_bias = output_bias or model_type == "qwen2"
    query = {"qkv": q + 2 * kv} if fused else {"q": q, "k": kv, "v": kv}
    gated = {"gate_up": 2 * m} if fused else {"gate": m, "up": m}
    parts = (3, 2) if fused else (1, 1)
    layers = [Layer("embed_tokens", V, d, "ids")]
    layers += [Layer(f"self_attn.{x}_proj", n, d, "first norm", query_bias, parts[0]) for x, n in query.items()]
    layers += [Layer("self_attn.o_proj", d, q, "attention", output_bias)]
    layers += [Layer(f"mlp.{x}_proj", n, d, "second norm", mlp_bias, parts[1]) for x, n in gated.items()]
    layers += [Layer("mlp.down_proj", d, m, "product", mlp_bias)]
    layers += [Layer("lm_head", V, d, "last norm", tied=bool(config.get("tie_word_embeddings")))]
    return Decoder(model_type, d, m, V, blocks, heads, head_size, q, kv, fused, tuple(layers))


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("model_type") not in MODEL_TYPES:
        known = ", ".join(map(repr, MODEL_TYPES))
        problems.append(f"`model_type` must be one of {known}, got {config.get('model_type')!r}.")
    optional = [name for name in ("num_key_value_heads", "head_dim") if config.get(name) is not None]
    for name in (*SIZES, *optional):
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"`{name}` must be a positive integer, got {value!r}.")
    if not problems:
        d, heads = config["hidden_size"], config["num_attention_heads"]
        keys = config.get("num_key_value_heads") or heads
        if heads % keys:
            problems.append(f"`num_attention_heads` (={heads}) must be divisible by `num_key_value_heads` (={keys}).")
        if not config.get("head_dim") and d % heads:
            problems.append(
                f"without `head_dim`, `hidden_size` (={d}) must be divisible by `num_attention_heads` (={heads})."
            )
    return problems


def _raise_all(heading: str, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"{heading}:\n" + "\n".join(f"  - {problem}" for problem in problems))


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
CHOICES: dict[str, Iterable[str]] = {
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
    ranks: int = _setting(1, "of DDP and FSDP2")

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("r", "batch_size", "seq_len", "ranks")}
        problems = [f"`{name}` must be at least 1, got {count!r}." for name, count in counts.items() if count < 1]
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                problems.append(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        _raise_all("Training", problems)

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
        _raise_all("plan", problems)

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
    """h of each layer; with DoRA also its output and gain; over a quantised weight A and B, cast."""
    T, b, found = training.tokens, training.b, 0
    for layer in layers:
        found += T * b * training.rows_of_A(layer)
        if training.use_dora:  # g and the norms in float32, and where those are zero
            found += (T * b + 4 + 4 + 1) * (layer.columns if layer.reads == "ids" else layer.rows)
        if training.base_dtype in QUANTISED and training.adapter_dtype == "float32" and layer.in_block:
            found += sum(b * t.values() for t in adapter(layer, training, 1) if len(t.shape) == 2)
    return found


def kept_by_loss(decoder: Decoder, training: Training) -> int:
    """The logits' log-softmax in float32, and labels of 8 bytes: kept for backward, too, until the loss has had it."""
    return training.tokens * (4 * decoder.vocabulary + 8)


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
    # At its backward the loss has two gradients of its log-softmax.
    terms["logits and loss"] = kept_by_loss(decoder, training) + 8 * training.tokens * decoder.vocabulary
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
