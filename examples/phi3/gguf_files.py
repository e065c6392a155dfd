"""GGUF files, which llama.cpp runs: an adapter as its LoRA file, and a Phi-3 to put it on."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor, nn

import lora
from phi3.errors import UserError

ARCHITECTURE = "phi3"

# What llama.cpp calls the parts of a Phi-3, and of each of its blocks.
_PARTS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# How weights can be stored, and the number that says so.
DTYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def export_gguf(adapter: lora.Adapter, path: str | os.PathLike[str]) -> Path:
    """Writes an adapter of a Phi-3 as llama.cpp's LoRA file, in float32.

    llama.cpp computes y = W x + (alpha / r) · B A x, with one alpha for the whole file and each pair's own rank r.
    So alpha is the largest rank, and B holds what is left of its own scaling: B · scaling · r / alpha. A merged
    linear layer becomes one pair of rank G·r with a block-diagonal B.

    Args:
        adapter: what to write; it stays as it is.
        path: the file; what is there is replaced.

    Returns:
        The path.

    Raises:
        UserError: llama.cpp has no place for something in the adapter, or the adapter is not sound. One error lists
            everything, and nothing is written.
    """
    pairs = _pairs(adapter)
    alpha = max(A.shape[0] for _, A, _ in pairs.values())
    problems, tensors = [], {}
    for name, (scaling, A, B) in pairs.items():
        folded = (B.double() * (scaling * A.shape[0] / alpha)).float()
        for part, tensor in {"lora_a": A.float(), "lora_b": folded}.items():
            if not tensor.isfinite().all():
                problems.append(f"{name}: {part} is too large for float32, with a scaling of {scaling}.")
            tensors[f"{name}.{part}"] = tensor.detach().cpu().contiguous().numpy()
    _raise_all("the adapter cannot be written for llama.cpp", problems)
    with _writing(Path(path)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, array in tensors.items():
            writer.add_tensor(name, array)
    return Path(path)


def export_base(
    model: nn.Module, vocabulary: str | os.PathLike[str], path: str | os.PathLike[str], dtype: str = "f16"
) -> Path:
    """Writes a Phi-3 as a GGUF file, with the tokenizer and the chat template of another GGUF file.

    For models whose rope changes with the length, and for tokenizers that are in no GGUF file, there is llama.cpp's
    own `convert_hf_to_gguf.py`.

    Args:
        model: a `Phi3ForCausalLM`; LoRA layers in it are written without their adapters.
        vocabulary: the GGUF file with the same tokenizer.
        path: the file; what is there is replaced.
        dtype: of the matrices: f32, f16, bf16 or q8_0. Vectors are always f32. Default: f16.

    Raises:
        UserError: the model is not one that can be written so; one error lists everything, and nothing is written.
    """
    fields = gguf.GGUFReader(vocabulary).fields
    _raise_all("the model cannot be written for llama.cpp", _base_problems(model, len(fields[_TOKENS].data)))
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    with _writing(Path(path)) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        _add_hyperparameters(writer, model.config)
        writer.add_file_type(DTYPES[dtype])
        for key, field in fields.items():
            if key.startswith("tokenizer."):
                writer.add_key_value(key, field.contents(), *field.types[:2])
        for name, parameter in model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            if leaf != "weight":
                continue  # lora_A and lora_B; `_base_problems` knows of no other
            array = parameter.detach().float().cpu().numpy()
            stored = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(f"{tensor_name(owner)}.weight", gguf.quantize(array, stored), raw_dtype=stored)
    return Path(path)


def tensor_name(module: str) -> str | None:
    """What llama.cpp calls this module of a Phi-3, without the `.weight`; None if it has no name for it."""
    in_block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if in_block is None:
        return _PARTS.get(module)
    part = _BLOCK_PARTS.get(in_block[2])
    return part and f"blk.{in_block[1]}.{part}"


_TOKENS = gguf.Keys.Tokenizer.LIST


def _pairs(adapter: lora.Adapter) -> dict[str, tuple[float, Tensor, Tensor]]:
    """Scaling, A and B of each module by llama.cpp's name for its weight; UserError with all that is in the way."""
    unsound = list(adapter.problems())
    problems = unsound + [
        f"{name} trains in full: a LoRA file has no place for it." for name in adapter.trained_in_full
    ]
    pairs = {}
    for module, settings in adapter.modules.items():
        if reason := _no_place(module, settings):
            problems.append(f"{module}: {reason}")
        elif not unsound:
            try:
                single, A, B = settings.single(*adapter.pair(module))
                pairs[f"{tensor_name(module)}.weight"] = single.scaling, A, B
            except ValueError as error:  # shapes that do not fit
                problems.append(f"{module}: {error}")
    _raise_all("the adapter cannot be written for llama.cpp", problems)
    return pairs


def _no_place(module: str, settings: Any) -> str | None:
    kind = getattr(settings.base, "kind", None)
    if settings.use_dora:
        return "llama.cpp knows no DoRA; merge the adapter instead."
    if tensor_name(module) is None:
        return "llama.cpp has no name for it in a Phi-3."
    if kind != "linear":  # an embedding's pair on a tied head would end llama.cpp's process
        return f"llama.cpp adapts linear layers, and this is of the kind {kind!r}."
    return None


def _base_problems(model: nn.Module, tokens: int) -> Iterator[str]:
    config = model.config
    if config.model_type != ARCHITECTURE:
        yield f"it is a {config.model_type!r}, not a {ARCHITECTURE!r}."
    rope = config.rope_parameters["rope_type"]
    if rope != "default":
        yield f"its rope is of the type {rope!r}: use llama.cpp's convert_hf_to_gguf.py."
    if config.vocab_size != tokens:
        yield f"it has {config.vocab_size} tokens, and the vocabulary {tokens}."
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf not in ("lora_A", "lora_B") and (leaf != "weight" or tensor_name(owner) is None):
            yield f"llama.cpp has no name for {name} in a Phi-3."


def _add_hyperparameters(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head_dim))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_sliding_window(config.sliding_window or 0)  # 0: none


@contextmanager
def _writing(path: Path) -> Iterator[gguf.GGUFWriter]:
    """A writer whose file gets its name at the end: all of the file or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(partial, ARCHITECTURE)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _raise_all(what: str, problems: Iterator[str] | list[str]) -> None:
    listed = "\n".join(f"  - {problem}" for problem in problems)
    if listed:
        raise UserError(f"{what}, because\n{listed}")
