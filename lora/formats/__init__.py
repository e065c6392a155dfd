"""Formats of other tools: PEFT's folders, their portable form, and files that have A and B under a tool's own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora.adapters.adapter import Adapter
from lora.adapters.formats import FORMATS, Format
from lora.adapters.paths import kind
from lora.formats import diffusion, flat, peft, peft_folder, peft_parts
from lora.formats.peft_losses import losses
from lora.formats.portable import portable


def enter() -> None:
    """Enter these formats in the table by which adapters are read and written."""
    FORMATS["mlx"] = Format("mlx-lm", **_in_folder(("adapters.safetensors",)), meant=flat.of_kinds)
    FORMATS["diffusers"] = Format(
        "diffusers",
        write=diffusion.write,
        **_in_folder(diffusion.FILES),
        meant=diffusion.meant,
        only_model="what its modules are called outside of the pipeline",
    )
    files = (peft_folder.CONFIG, *peft_folder.READERS)
    FORMATS["peft"] = Format(
        "PEFT",
        write=peft.write,
        read=lambda path, lora_alpha: peft.read(path),
        reads=peft_folder.reads,
        claims=peft_folder.claims,
        losses=losses,
        files=files,
    )
    FORMATS[peft_parts.FORMAT] = Format(
        "PEFT", meant=peft_parts.resolved, only_model="the tensors of which the file holds parts"
    )
    FORMATS["portable"] = Format(
        "PEFT",
        write=lambda adapter, path, names, function: peft.write(portable(adapter, function), path, names, function),
        losses=losses,
        files=files,
    )
    FORMATS["loralib"] = Format(
        "loralib",
        read=flat.read,
        reads=flat.reads,
        asks=True,
        only_model="what kinds of layers a file of loralib's is for",
    )
    # Of these, and of those above, files are found by `flat`, whatever they are called.
    FORMATS["kohya"] = Format(
        "kohya", meant=diffusion.meant, only_model="which underscores in the file's names stand for dots"
    )
    FORMATS["torchtune"] = Format("torchtune")


def _in_folder(files: tuple[str, ...]) -> dict[str, Any]:
    """How a folder is recognised and read that has an adapter in one of these files."""

    def found(folder: Path) -> Path | None:
        return (
            next((folder / name for name in files if kind(folder / name)), None) if kind(folder) == "folder" else None
        )

    def read(path: Path, lora_alpha: float | None) -> Adapter:
        file = found(path)
        assert file is not None, "it was recognised"
        return flat.read(file, lora_alpha)

    return {"read": read, "reads": lambda path: found(path) is not None, "files": files, "asks": True}
