"""What --export writes: the adapter for PEFT, for any server of adapters or for llama.cpp, or the merged model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import lora
from phi3 import gguf_files
from phi3.errors import UserError


def _merged(model: nn.Module, tokenizer: Any, path: Path) -> None:
    model.save_pretrained(path, state_dict=lora.merged_state_dict(model))
    tokenizer.save_pretrained(path)


def _gguf(model: nn.Module, tokenizer: Any, path: Path) -> None:
    gguf_files.export_gguf(lora.adapter_of(model), path)


# What each export is called in the output directory, and what writes it.
EXPORTS: dict[str, tuple[str, Callable[[nn.Module, Any, Path], None]]] = {
    "peft": ("peft", lambda model, tokenizer, path: lora.save_adapter(model, path, format="peft")),
    "portable": ("portable", lambda model, tokenizer, path: lora.save_adapter(model, path, format="portable")),
    "gguf": ("adapter.gguf", _gguf),
    "merged": ("merged", _merged),
}


def export(model: nn.Module, tokenizer: Any, folder: Path, wanted: list[str]) -> None:
    """Writes what is wanted into the output directory; a UserError says which could not be written."""
    for name in wanted:
        file, write = EXPORTS[name]
        try:
            write(model, tokenizer, folder / file)
        except (ValueError, OSError) as error:
            raise UserError(f"--export {name}: {error}") from error
        print(f"Exported for others: {folder / file}")
