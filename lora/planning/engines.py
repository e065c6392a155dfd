"""The engines of torch's that can train, and what each takes on a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lora.planning.decoder import Decoder
from lora.planning.sharding import Layout
from lora.planning.terms import TERMS, Rank
from lora.planning.training import Training

#: By name, how the ranks share the work; in the order in which they become harder to use.
ENGINES: dict[str, Callable[[Training], Layout]] = {
    "one": lambda training: Layout(),
    "ddp": lambda training: Layout(replicas=training.ranks),
    "fsdp2": lambda training: Layout(shards=training.ranks),
    "tp": lambda training: Layout(tp=training.tp),
    "fsdp2-tp": lambda training: Layout(shards=training.ranks, tp=training.tp),
}
TITLES = {
    "one": "one process",
    "ddp": "DDP over {ranks}",
    "fsdp2": "FSDP2 over {ranks}",
    "tp": "TP {tp}",
    "fsdp2-tp": "FSDP2 {ranks} × TP {tp}",
}


@dataclass(frozen=True)
class Plan:
    """What one engine takes.

    Attributes:
        engine: a key of `ENGINES`.
        title: the same with the number of ranks.
        processes: how many ranks there are, each with a device of its own.
        terms: bytes on the fullest rank, by the names of `TERMS`.
        problems: why the engine cannot train this model so; nothing if it can.
    """

    engine: str
    title: str
    processes: int
    terms: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def counted(self) -> dict[str, int]:
        """The terms that are there at the peak: of those that come one after the other the largest."""
        late = {term.name: self.terms[term.name] for term in TERMS if term.at_peak}
        largest = max(late, key=late.__getitem__)
        return {name: size for name, size in self.terms.items() if name not in late or name == largest}

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.counted.values())


def plan(decoder: Decoder, training: Training, engine: str) -> Plan:
    """What training takes by an engine.

    >>> from lora.planning.decoder import decoder_of
    >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    >>> decoder = decoder_of({"model_type": "llama", "num_attention_heads": 4, **sizes})
    >>> plan(decoder, Training(r=2, base_dtype="float32"), "one").terms["adapters"]
    15872
    """
    training.check(decoder)
    layout = ENGINES[engine](training)
    title = TITLES[engine].format(ranks=training.ranks, tp=training.tp)
    problems = _problems(decoder, training, layout)
    rank = Rank(decoder, training, layout)
    terms = {} if problems else {term.name: term.bytes(rank) for term in TERMS}
    return Plan(engine, title, layout.processes, terms, tuple(problems))


def _problems(decoder: Decoder, training: Training, layout: Layout) -> list[str]:
    sizes = {
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.key_value_heads,
        "intermediate_size": decoder.intermediate,
        "vocab_size": decoder.vocabulary,
    }
    problems = [
        f"`{name}` (={size}) must be divisible by `tp` (={layout.tp})."
        for name, size in sizes.items()
        if size % layout.tp
    ]
    if training.base.packed is not None and (layout.shards > 1 or layout.tp > 1):
        problems.append(f"how {training.base_dtype} weights are sharded is not known.")
    return problems
