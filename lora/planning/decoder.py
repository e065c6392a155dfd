"""A decoder as its config.json describes it: which layers it has, of what shapes, and how they are sharded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.formats.files import open_file, reading
from lora.settings import raise_all


@dataclass(frozen=True)
class Layer:
    """A linear layer, weight (out_features, in_features), or an embedding, weight (vocabulary, features).

    Attributes:
        name: in its block, or in the model.
        rows, columns: of the weight.
        reads: what its input is; layers that read the same share one tensor.
        style: how tensor parallelism shards it, a key of `lora.planning.sharding.STYLES`.
        bias: whether it has one.
        parts: how many projections are fused in it.
        tied: whether its weight is another layer's.
    """

    name: str
    rows: int
    columns: int
    reads: str
    style: str
    bias: bool = False
    parts: int = 1
    tied: bool = False


@dataclass(frozen=True)
class Architecture:
    """What a model type has of its own; a string names the field of the config that says it."""

    fused: bool = False
    query_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False


ARCHITECTURES = {
    "llama": Architecture(query_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Architecture(),
    "phi3": Architecture(fused=True),
    "qwen2": Architecture(query_bias=True),
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Decoder:
    """A Llama-like decoder: blocks of attention and a gated MLP between an embedding and a head.

    Attributes:
        model_type: transformers' name of the architecture.
        hidden, intermediate, vocabulary, blocks, heads, key_value_heads, head_size: sizes.
        fused: q, k, v are one layer, and gate, up another.
        block: the layers of one block.
        outside: the embedding and the head.
    """

    model_type: str
    hidden: int
    intermediate: int
    vocabulary: int
    blocks: int
    heads: int
    key_value_heads: int
    head_size: int
    fused: bool
    block: tuple[Layer, ...]
    outside: tuple[Layer, ...]

    @property
    def query(self) -> int:
        """Features of all queries."""
        return self.heads * self.head_size

    @property
    def key_value(self) -> int:
        """Features of all keys, and of all values."""
        return self.key_value_heads * self.head_size


def read_decoder(path: Path) -> Decoder:
    """The decoder that transformers would make from a config.json; ValueError where it is none that is known."""
    try:
        with reading(path), open_file(path) as file:
            config = json.loads(file.read().decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a model's config.json: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, a model's config, got a {type(config).__name__}.")
    return decoder_of(config, str(path))


def decoder_of(config: Mapping[str, Any], where: str = "the config") -> Decoder:
    """The decoder of a config, with transformers' defaults for fields that may be missing.

    >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    >>> decoder = decoder_of({"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, **sizes})
    >>> [layer.rows for layer in decoder.block]
    [64, 32, 32, 64, 96, 96, 64]
    """
    raise_all(f"{where} is none of a model that can be planned", _problems(config))
    d, m, blocks, heads, V = (config[name] for name in _SIZES)
    key_value_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or d // heads
    architecture = ARCHITECTURES[config["model_type"]]
    q, kv = heads * head_size, key_value_heads * head_size
    biases = [_says(config, getattr(architecture, f"{which}_bias")) for which in ("query", "output", "mlp")]
    make = _fused_block if architecture.fused else _block
    outside = (
        Layer("embed_tokens", V, d, "ids", "embedding"),
        Layer("lm_head", V, d, "last norm", "colwise", tied=bool(config.get("tie_word_embeddings"))),
    )
    sizes = (d, m, V, blocks, heads, key_value_heads, head_size)
    return Decoder(config["model_type"], *sizes, architecture.fused, make(d, m, q, kv, *biases), outside)


def _block(d: int, m: int, q: int, kv: int, query_bias: bool, output_bias: bool, mlp_bias: bool) -> tuple[Layer, ...]:
    return (
        Layer("self_attn.q_proj", q, d, "first norm", "colwise", query_bias),
        Layer("self_attn.k_proj", kv, d, "first norm", "colwise", query_bias),
        Layer("self_attn.v_proj", kv, d, "first norm", "colwise", query_bias),
        Layer("self_attn.o_proj", d, q, "attention", "rowwise", output_bias),
        Layer("mlp.gate_proj", m, d, "second norm", "colwise", mlp_bias),
        Layer("mlp.up_proj", m, d, "second norm", "colwise", mlp_bias),
        Layer("mlp.down_proj", d, m, "product", "rowwise", mlp_bias),
    )


def _fused_block(
    d: int, m: int, q: int, kv: int, query_bias: bool, output_bias: bool, mlp_bias: bool
) -> tuple[Layer, ...]:
    return (
        Layer("self_attn.qkv_proj", q + 2 * kv, d, "first norm", "colwise", query_bias, parts=3),
        Layer("self_attn.o_proj", d, q, "attention", "rowwise", output_bias),
        Layer("mlp.gate_up_proj", 2 * m, d, "second norm", "colwise", mlp_bias, parts=2),
        Layer("mlp.down_proj", d, m, "product", "rowwise", mlp_bias),
    )


def _says(config: Mapping[str, Any], bias: bool | str) -> bool:
    return bool(config.get(bias, False)) if isinstance(bias, str) else bias


def _problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if str(config.get("model_type")) not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        problems.append(f"`model_type` must be one of {known}, got {config.get('model_type')!r}.")
    optional = [name for name in ("num_key_value_heads", "head_dim") if config.get(name) is not None]
    for name in (*_SIZES, *optional):
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"`{name}` must be a positive integer, got {value!r}.")
    if not problems:
        heads, key_value_heads = config["num_attention_heads"], config.get("num_key_value_heads")
        if key_value_heads and heads % key_value_heads:
            problems.append(
                f"`num_attention_heads` (={heads}) must be divisible by `num_key_value_heads` (={key_value_heads})."
            )
        if not config.get("head_dim") and config["hidden_size"] % heads:
            problems.append(
                f"`hidden_size` (={config['hidden_size']}) must be divisible by `num_attention_heads` (={heads}), "
                "or `head_dim` be given."
            )
    return problems
