"""How a decoder is trained: what of it is adapted, in which dtypes, by which optimizer, on how large a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora.config import did_you_mean, name_matches
from lora.planning.decoder import Decoder, Layer
from lora.settings import raise_all


@dataclass(frozen=True)
class BaseDtype:
    """What the base weights take.

    Attributes:
        size: bytes of a value that is not packed, and of one that is computed with.
        packed: bytes of a packed weight by its rows and columns, of linear layers in the blocks; None: not packed.
        formula: the same in words.
    """

    size: int
    packed: Callable[[int, int], int] | None = None
    formula: str = ""


def _nf4(rows: int, columns: int) -> int:
    codes, constants = -(-rows * columns // 2), -(-rows * columns // 64)
    return codes + constants + 4 * -(-constants // 256) + 4 * (16 + 256 + 1)  # and the two tables, and the mean


BASE_DTYPES = {
    "float32": BaseDtype(4, formula="4 bytes"),
    "bfloat16": BaseDtype(2, formula="2 bytes"),
    "float16": BaseDtype(2, formula="2 bytes"),
    "nf4": BaseDtype(2, _nf4, "1/2 byte, and 1 for each 64 values, and 4 for each 64 · 256; computes in 2 bytes"),
    "int8": BaseDtype(2, lambda rows, columns: rows * columns + 4 * rows, "1 byte, and 4 for each row; 2 to compute"),
}
ADAPTER_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Optimizer:
    """State of a trained tensor: bytes for each of its n values of size a, and for the tensor itself."""

    state: Callable[[int, int], int]
    formula: str


OPTIMIZERS = {
    "adamw": Optimizer(lambda n, a: 2 * a * n + 4, "2 · a, and 4 for each tensor"),
    "adamw8bit": Optimizer(  # bitsandbytes leaves small tensors alone
        lambda n, a: 2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n, "2, and 8 for each 256; 8 for small tensors"
    ),
    "lion": Optimizer(lambda n, a: a * n, "a"),
    "sgd": Optimizer(lambda n, a: 0, "0"),
    "sgd-momentum": Optimizer(lambda n, a: a * n, "a"),
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings that memory depends on; names as in `lora.LoraConfig` where it has them.

    Args:
        r: rank of the updates. Default: 16.
        target_modules: names of the layers to adapt, or "all-linear": those in the blocks. Default: "all-linear".
        use_dora: train a magnitude for each output. Default: False.
        freeze_A: leave A as it starts (LoRA-FA). Default: False.
        split_fused: an update for each projection that is fused in a layer (`splits`). Default: False.
        base_dtype: a key of `BASE_DTYPES`. Default: "bfloat16".
        adapter_dtype: a key of `ADAPTER_DTYPES`. Default: "float32".
        optimizer: a key of `OPTIMIZERS`. Default: "adamw".
        batch_size, seq_len: rows and tokens of a batch that a rank computes at once. Default: 1 and 2048.
        gradient_checkpointing: keep each block's input alone, and compute the block again in backward. Default: False.
        fused_mlp: the MLP as one function (`lora.functional.lora_swiglu`). Default: False.
        loss_parallel: under tensor parallelism, the loss from logits that stay sharded. Default: False.
        ranks: how many ranks DDP replicates to, or FSDP2 shards over. Default: 1.
        tp: how many ranks tensor parallelism shards over. Default: 1.
    """

    r: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    use_dora: bool = False
    freeze_A: bool = False
    split_fused: bool = False
    base_dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    optimizer: str = "adamw"
    batch_size: int = 1
    seq_len: int = 2048
    gradient_checkpointing: bool = False
    fused_mlp: bool = False
    loss_parallel: bool = False
    ranks: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"`{name}` must be at least 1, got {getattr(self, name)!r}."
            for name in ("r", "batch_size", "seq_len", "ranks", "tp")
            if getattr(self, name) < 1
        ]
        for name, known in (
            ("base_dtype", BASE_DTYPES),
            ("adapter_dtype", ADAPTER_DTYPES),
            ("optimizer", OPTIMIZERS),
        ):
            if getattr(self, name) not in known:
                problems.append(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        raise_all("there is no plan", problems)

    @property
    def base(self) -> BaseDtype:
        """What the base weights take."""
        return BASE_DTYPES[self.base_dtype]

    def check(self, decoder: Decoder) -> None:
        """ValueError that lists what does not go with this decoder, if anything."""
        layers = (*decoder.block, *decoder.outside)
        problems = []
        names = [] if self.target_modules == "all-linear" else list(self.target_modules)
        for target in names:
            if not any(name_matches(layer.name, target) for layer in layers):
                hint = did_you_mean(target, (layer.name for layer in layers))
                problems.append(f"`target_modules` {target!r} matches no layer of a {decoder.model_type}{hint}.")
        if self.split_fused and not decoder.fused:
            problems.append(f"`split_fused` is for fused projections, which a {decoder.model_type} has not.")
        if self.fused_mlp:
            problems += self._fused_mlp_problems(decoder)
        raise_all("there is no plan", problems)

    def _fused_mlp_problems(self, decoder: Decoder) -> list[str]:
        both = sum(self.adapts(layer) for layer in decoder.block if layer.name.startswith("mlp."))
        wrong = {
            f"has gate and up in one layer, which a {decoder.model_type} has not": not decoder.fused,
            "is adapted in gate_up_proj and down_proj": decoder.fused and both < 2,
            "has no magnitudes; leave out either it or `use_dora`": self.use_dora,
            f"has dense weights, not {self.base_dtype}": self.base.packed is not None,
        }
        return [f"`fused_mlp` is for an MLP that {what}." for what, is_wrong in wrong.items() if is_wrong]

    def adapts(self, layer: Layer) -> bool:
        """Whether the layer gets an adapter."""
        if self.target_modules == "all-linear":
            return layer.style in ("colwise", "rowwise") and layer.name != "lm_head"
        return any(name_matches(layer.name, target) for target in self.target_modules)

    def parts(self, layer: Layer) -> int:
        """How many updates of rank r the layer gets."""
        return layer.parts if self.split_fused else 1

    def trains_A(self, layer: Layer) -> bool:
        """Whether lora_A trains: an embedding's starts at zero, and always does."""
        return not self.freeze_A or layer.style == "embedding"
