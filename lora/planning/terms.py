"""The terms of a rank's memory, each a formula in words beside the same in code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from lora.planning.decoder import Decoder, Layer
from lora.planning.sharding import Layout, Stored, tensors
from lora.planning.training import OPTIMIZERS, Training

LETTERS = """
d hidden size, m intermediate size, V vocabulary, H heads, q and k features of all queries and of all keys, L blocks;
T tokens of a rank's batch; b bytes of a value in the dtype that is computed in, a in that of A and B; r rank;
N ranks that FSDP2 shards over, t ranks of tensor parallelism (1 without)
""".strip()


@dataclass(frozen=True)
class Rank:
    """One of the ranks that train, the one that holds most."""

    decoder: Decoder
    training: Training
    layout: Layout

    @cached_property
    def tensors(self) -> list[Stored]:
        """Every parameter of the model."""
        return tensors(self.decoder, self.training)

    @property
    def T(self) -> int:
        """Tokens of a batch."""
        return self.training.batch_size * self.training.seq_len

    @property
    def b(self) -> int:
        """Bytes of a value that is computed with."""
        return self.training.base.size

    def adapted(self, *reading: str) -> list[Layer]:
        """The adapted layers, or those of them that read one of these."""
        layers = (*self.decoder.block, *self.decoder.outside)
        return [layer for layer in layers if self.training.adapts(layer) and (not reading or layer.reads in reading)]

    def keeps(self, x: str) -> bool:
        """Whether a layer keeps this input for the gradient of its A."""
        return any(self.training.trains_A(layer) for layer in self.adapted(x))


@dataclass(frozen=True)
class Term:
    """Something that takes memory.

    Attributes:
        name: as the command prints it.
        formula: in words; letters as in `LETTERS`.
        bytes: the same in code.
        at_peak: such terms are not there at the same time: the largest counts.
    """

    name: str
    formula: str
    bytes: Callable[[Rank], int]
    at_peak: bool = False


# ---- activations -------------------------------------------------------------------------------------------------


def _outputs(rank: Rank, layer: Layer) -> int:
    """Features of a layer's output on a rank."""
    if layer.style == "embedding":
        return layer.columns
    return layer.rows // (rank.layout.tp if layer.style == "colwise" else 1)


def _kept_by_adapters(rank: Rank, layers: Iterable[Layer]) -> int:
    """Bytes for each token of h, and of what DoRA scales."""
    training = rank.training
    outputs = {layer: _outputs(rank, layer) if training.use_dora else 0 for layer in layers}
    return sum(rank.b * (training.parts(layer) * training.r + n) for layer, n in outputs.items())


def _kept_by_gains(rank: Rank, layers: Iterable[Layer]) -> int:
    """Bytes of DoRA's g - 1, of the norms in float32, and of where those are 0; no matter how many tokens."""
    return sum((rank.b + 4 + 1) * _outputs(rank, layer) for layer in layers) if rank.training.use_dora else 0


def _values(rank: Rank) -> int:
    d, t = rank.decoder, rank.layout.tp
    # A value is a part of the output of a fused projection, and keeps all of it.
    return rank.b * (d.query + 2 * d.key_value if d.fused else d.key_value) // t


def _attention(rank: Rank) -> int:
    d = rank.decoder
    # Phi-3's rotation lays queries out head by head, and attention its output as these: o_proj gets a copy of it.
    copies = 2 if d.fused and rank.keeps("attention") else 1
    return (copies * rank.b * d.query + 4 * d.heads) // rank.layout.tp


#: What autograd keeps of a block: name, formula and bytes, for each token.
KEPT: tuple[Term, ...] = (
    Term("the norms' inputs in float32", "2 · (4·d + 4)", lambda rank: 2 * (4 * rank.decoder.hidden + 4)),
    Term(
        "x of q, k, v and of gate, up, once each",
        "2 · b·d, where A trains",
        lambda rank: rank.b * rank.decoder.hidden * (rank.keeps("first norm") + rank.keeps("second norm")),
    ),
    Term(
        "h = A x of each adapted layer; its y with DoRA",
        "Σ b·r, and with DoRA Σ b · outputs",
        lambda rank: _kept_by_adapters(rank, (layer for layer in rank.adapted() if layer in rank.decoder.block)),
    ),
    Term(
        "queries and keys, turned",
        "b·(q + k)/t",
        lambda rank: rank.b * (rank.decoder.query + rank.decoder.key_value) // rank.layout.tp,
    ),
    Term("values", "b·k/t; of a fused projection all: b·(q + 2·k)/t", _values),
    Term(
        "attention's output, which is x of o_proj, and log-sum-exp",
        "(b·q + 4·H)/t; of a fused projection (2·b·q + 4·H)/t, where A of o_proj trains",
        _attention,
    ),
    Term("gate and up", "2·b·m/t", lambda rank: 2 * rank.b * rank.decoder.intermediate // rank.layout.tp),
    Term(
        "SiLU of gate",
        "b·m/t; 0 with `fused_mlp`",
        lambda rank: 0 if rank.training.fused_mlp else rank.b * rank.decoder.intermediate // rank.layout.tp,
    ),
    Term(
        "x of down_proj",
        "b·m/t, where A trains; 0 with `fused_mlp`",
        lambda rank: (
            rank.b * rank.decoder.intermediate // rank.layout.tp
            if rank.keeps("product") and not rank.training.fused_mlp
            else 0
        ),
    ),
)


def block(rank: Rank) -> int:
    """What autograd keeps of one block; over a packed weight also A and B, cast."""
    cast = rank.training.base.packed is not None and rank.training.adapter_dtype == "float32"
    factors = (t for t in rank.tensors if t.adapter and not t.outside and len(t.shape) == 2)
    casts = sum(rank.b * t.values(Layout()) for t in factors) if cast else 0
    gains = _kept_by_gains(rank, (layer for layer in rank.adapted() if layer in rank.decoder.block))
    return rank.T * sum(term.bytes(rank) for term in KEPT) + gains + casts


def kept(rank: Rank) -> int:
    """What is kept for backward: blocks, or their inputs; the rotation; the last norm, and adapters outside."""
    d, b, outside = rank.decoder.hidden, rank.b, rank.adapted("ids", "last norm")
    norm = 4 * d + 4
    if rank.training.gradient_checkpointing:
        blocks = rank.decoder.blocks * rank.T * b * d
    else:  # nothing trains before the first block's first norm, unless the embedding is adapted
        blocks = rank.decoder.blocks * block(rank) - (0 if rank.adapted("ids") else rank.T * norm)
    last = norm + b * d * rank.keeps("last norm") + _kept_by_adapters(rank, outside)
    rotation = 2 * b * rank.training.seq_len * rank.decoder.head_size
    return blocks + rotation + rank.T * last + _kept_by_gains(rank, outside)


def _logits(rank: Rank) -> int:
    """Logits of a token on a rank."""
    return rank.decoder.vocabulary // (rank.layout.tp if rank.training.loss_parallel else 1)


def kept_by_loss(rank: Rank) -> int:
    """The logits' log-softmax in float32, and labels of 8 bytes: kept for backward, too, until the loss has had it."""
    return rank.T * (4 * _logits(rank) + 8)


def _loss(rank: Rank) -> int:
    return kept_by_loss(rank) + rank.T * 8 * _logits(rank)


def _work(rank: Rank) -> int:
    d, m, b, t = rank.decoder.hidden, rank.decoder.intermediate, rank.b, rank.layout.tp
    again = block(rank) if rank.training.gradient_checkpointing else 0
    return again + rank.T * (2 * b * m // t + 3 * b * d) + _unpacked(rank)


def _unpacked(rank: Rank) -> int:
    return max((t.values(rank.layout) * t.size for t in rank.tensors if t.packing is not None), default=0)


# ---- parameters and what belongs to them -------------------------------------------------------------------------


def _sum(rank: Rank, wanted: Callable[[Stored], bool]) -> int:
    return sum(t.times * t.bytes(rank.layout) for t in rank.tensors if wanted(t))


def _optimizer(rank: Rank) -> int:
    state = OPTIMIZERS[rank.training.optimizer].state
    return sum(t.times * state(t.values(rank.layout), t.size) for t in rank.tensors if t.trains)


def _buckets(rank: Rank) -> int:
    return _sum(rank, lambda t: t.trains) if rank.layout.replicas > 1 else 0


def _unsharded(rank: Rank) -> int:
    if rank.layout.shards == 1:
        return 0
    whole = Layout(tp=rank.layout.tp)
    outside = sum(t.bytes(whole) for t in rank.tensors if t.outside)
    one = sum(t.bytes(whole) * t.times // rank.decoder.blocks for t in rank.tensors if not t.outside)
    gradients = sum(t.bytes(whole) for t in rank.tensors if t.trains and not t.outside)
    return outside + 2 * one + 2 * gradients


TERMS: tuple[Term, ...] = (
    Term(
        "base weights",
        "Σ rows · columns · bytes of the dtype; with TP rows/t or columns/t, with FSDP2 ⌈rows/N⌉",
        lambda rank: _sum(rank, lambda t: not t.adapter),
    ),
    Term(
        "adapters",
        "Σ a·r·(inputs + outputs), A with r for each split, and 4 · outputs with DoRA; with TP outputs/t or inputs/t "
        "of one factor, the other whole; with FSDP2 ⌈rows/N⌉",
        lambda rank: _sum(rank, lambda t: t.adapter),
    ),
    Term("gradients", "those of A, if it trains, B and magnitudes", lambda rank: _sum(rank, lambda t: t.trains)),
    Term("optimizer state", "for each trained value, by --optimizer", _optimizer),
    Term("DDP's buckets", "as gradients; 0 with gradient_as_bucket_view", _buckets),
    Term(
        "FSDP2's whole weights",
        "embedding, head and last norm, which stay; two blocks, one of them prefetched; a block's gradients, twice",
        _unsharded,
    ),
    Term("activations", "L · block, or with checkpointing L · T·b·d; and what the last norm keeps: T·(4·d + 4)", kept),
    Term("logits and loss", "T·V·(4 log-softmax + 8 its gradients)", _loss, at_peak=True),
    Term(
        "backward of a block",
        "T·(2·b·m/t + 3·b·d), with checkpointing also the block; of packed weights the largest, unpacked",
        _work,
        at_peak=True,
    ),
)
