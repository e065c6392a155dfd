"""What --export writes: the adapter for PEFT, for any server of adapters or for llama.cpp, or the merged model."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

import lora
from phi3 import gguf_files, quantizing
from phi3.errors import UserError

Writer = Callable[[nn.Module, Any, Path], None]

# A full disk is a SafetensorError where safetensors notices it, and too little memory a RuntimeError of torch's.
_FAILURES = (UserError, ValueError, OSError, RuntimeError, MemoryError, SafetensorError)


def _merged(model: nn.Module, tokenizer: Any, path: Path) -> None:
    _check_ends(model)
    state = quantizing.merged_state(model) if quantizing.is_quantized(model) else lora.merged_state_dict(model)
    path.mkdir(exist_ok=True)  # where a file is in the way, save_pretrained would only log that it did nothing
    model.save_pretrained(path, state_dict=state)
    tokenizer.save_pretrained(path)


def _check_ends(model: nn.Module) -> None:
    """A UserError where the merged folder's config would say what no longer holds."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    adapted = [name for name, module in model.named_modules() if module in ends and isinstance(module, lora.LoRALayer)]
    if adapted and model.config.tie_word_embeddings:
        raise UserError(
            f"{' and '.join(adapted)} is adapted, and config.tie_word_embeddings is True: merged, input and output "
            "embeddings would no longer be tied. Leave it out of --target-modules."
        )


def _gguf(model: nn.Module, tokenizer: Any, path: Path) -> None:
    gguf_files.export_gguf(lora.adapter_of(model), path)


# What each export is called in the output directory, and what writes it.
EXPORTS: dict[str, tuple[str, Writer]] = {
    "peft": ("peft", lambda model, tokenizer, path: lora.save_adapter(model, path, format="peft")),
    "portable": ("portable", lambda model, tokenizer, path: lora.save_adapter(model, path, format="portable")),
    "gguf": ("adapter.gguf", _gguf),
    "merged": ("merged", _merged),
}


def _only_merge(model: nn.Module, tokenizer: Any, path: Path) -> None:
    _check_ends(model)
    if not quantizing.is_quantized(model):  # which needs a dense copy of the model
        lora.merged_state_dict(model)


# The adapters are small enough to be written for a trial; a whole model is not.
_TRIALS = EXPORTS | {"merged": ("merged", _only_merge)}


def check(model: nn.Module, wanted: list[str]) -> None:
    """Tries the exports before training; a UserError lists all that cannot work, whatever the values will be."""
    with tempfile.TemporaryDirectory() as folder:
        _, failed = _write(_TRIALS, model, None, Path(folder), wanted)
    _raise(failed)


def export(model: nn.Module, tokenizer: Any, folder: Path, wanted: list[str]) -> None:
    """Writes what can be written into the output directory; then a UserError lists what could not."""
    written, failed = _write(EXPORTS, model, tokenizer, folder, wanted)
    for path in written:
        print(f"Exported for others: {path}")
    _raise(failed)


def _write(
    exports: Mapping[str, tuple[str, Writer]], model: nn.Module, tokenizer: Any, folder: Path, wanted: list[str]
) -> tuple[list[Path], dict[str, Exception]]:
    """The paths that were written, and the errors by the names of the other exports."""
    written, failed = [], {}
    for name in wanted:
        file, write = exports[name]
        try:
            write(model, tokenizer, folder / file)
            written.append(folder / file)
        except _FAILURES as error:
            failed[name] = error
    return written, failed


def _raise(failed: dict[str, Exception]) -> None:
    if failed:
        errors = list(failed.values())
        raise UserError("\n".join(f"--export {name}: {error}" for name, error in failed.items())) from errors[0]
