"""A pretrained Phi-3: from a folder, from the hub, or made out of SmolLM2's Llama weights."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from phi3 import fetch
from phi3.errors import UserError, first_line

SMOLLM2 = "smollm2"  # the name that stands for the default model

# What a Llama and a Phi-3 say in the same words. Phi-3's own fields are set in `phi3_from_llama`.
_SHARED = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "tie_word_embeddings",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
]


def load(name: str, cache_dir: Path, **model_kwargs: Any) -> tuple[Phi3ForCausalLM, Any]:
    """The model and tokenizer called `name`: "smollm2", a local folder, or an id on the hub.

    Args:
        model_kwargs: for `from_pretrained`, such as `dtype` and `attn_implementation`.

    Raises:
        UserError: when there is no such model, or it is not a Phi-3.
    """
    source = str(smollm2_as_phi3(cache_dir)) if name == SMOLLM2 else name
    _check_is_phi3(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, **model_kwargs)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"cannot load the model {name!r}: {first_line(error)}") from error
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {name!r} has no chat template, which chat data needs")
    return model, tokenizer


def _check_is_phi3(source: str) -> None:
    # Looked at before anything is downloaded: a local folder's mistakes must not become a hub look-up.
    looks_local = Path(source).expanduser().is_absolute() or source.startswith(".") or source.count("/") > 1
    if looks_local and not Path(source).is_dir():
        raise UserError(f"there is no model folder {source!r} (--model)")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        where = "a readable model folder" if Path(source).is_dir() else "a folder here or a model on the hub"
        raise UserError(f"--model {source!r} is not {where}: {first_line(error)}") from error
    if config.model_type != "phi3":
        raise UserError(f"{source!r} is a {config.model_type!r} model; this example adapts Phi-3's fused projections")


def smollm2_as_phi3(cache_dir: Path) -> Path:
    """A folder with SmolLM2-135M-Instruct as a Phi-3, converted once and cached (540 MB, float32)."""
    folder = cache_dir / "smollm2-135m-instruct-phi3"
    whole = folder / "config.json"
    if whole.is_file():
        return folder
    gguf = fetch.fetch(fetch.SMOLLM2, cache_dir)
    print("Converting SmolLM2-135M-Instruct to Phi-3's layout (once)", flush=True)
    llama = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    partial = cache_dir / f".{folder.name}-{os.getpid()}"
    try:
        with torch.random.fork_rng():  # the run that converts goes on as every later one does
            save(phi3_from_llama(llama), partial)
        tokenizer.save_pretrained(partial)
        if not whole.is_file():  # an earlier release could leave a folder without a model
            shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as error:
        if not whole.is_file():  # another process may have been faster, which is as good
            raise UserError(f"cannot write {str(folder)!r} (--cache-dir): {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def save(model: Phi3ForCausalLM, folder: Path) -> None:
    """As `save_pretrained`, which writes in the first process of a group alone; here each is to have a whole folder."""
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def phi3_from_llama(llama: LlamaForCausalLM) -> Phi3ForCausalLM:
    """The same function in Phi-3's class. Phi-3 is a Llama whose q, k, v and gate, up are fused."""
    config = llama.config
    if config.attention_bias or config.mlp_bias:
        raise ValueError("Phi-3 has no biases; this Llama has")
    shared = {field: getattr(config, field) for field in _SHARED}
    phi3 = Phi3ForCausalLM(
        Phi3Config(
            **shared,
            # Longer inputs than this would switch a longrope; the default rope has nothing to switch.
            original_max_position_embeddings=config.max_position_embeddings,
            sliding_window=None,
        )
    ).to(llama.dtype)
    # With tied embeddings `lm_head.weight` is listed too, and is the same tensor in both models.
    phi3.load_state_dict(fuse(llama.state_dict()), strict=True)
    phi3.generation_config = llama.generation_config
    return phi3.eval()


def fuse(llama_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Llama's weights under Phi-3's names: the rows of q, k, v and of gate, up one below the other."""
    state = dict(llama_state)
    for key in llama_state:
        if key.endswith("q_proj.weight"):
            parts = [state.pop(key.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
            state[key.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif key.endswith("gate_proj.weight"):
            parts = [state.pop(key.replace("gate_proj", part)) for part in ("gate_proj", "up_proj")]
            state[key.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
    return state


def fused_splits(config: Any, target_modules: str | Sequence[str] = "all-linear") -> dict[str, tuple[int, ...]]:
    """Rows of each part of Phi-3's fused projections, for `LoraConfig(splits=…)`; of those that are targets."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key_value = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    splits = {
        "qkv_proj": (query, key_value, key_value),
        "gate_up_proj": (config.intermediate_size, config.intermediate_size),
    }
    if isinstance(target_modules, str):
        return splits
    leaves = {name.rpartition(".")[2] for name in target_modules}
    return {name: parts for name, parts in splits.items() if name in leaves}


def fingerprint(model: torch.nn.Module) -> str:
    """A short name for a model's weights: the names, the shapes, and some numbers out of each."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        # A few numbers suffice to tell fine-tuned weights from their origin; all of them would take long.
        sample = weight.detach().flatten()[:64].float().cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
