"""A decoder like Llama, as a model's config.json describes it: its layers and their sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    raise_all(where, _problems(config))
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


def _problems(config: Mapping[str, Any]) -> list[str]:
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


def raise_all(heading: str, problems: Sequence[str]) -> None:
    """ValueError that lists the problems, if there are any."""
    if problems:
        raise ValueError(f"{heading}:\n" + "\n".join(f"  - {problem}" for problem in problems))
