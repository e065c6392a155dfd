"""Formats of other libraries: PEFT's folders, their portable form, and loralib's state dicts."""

from __future__ import annotations

from lora.adapters.formats import FORMATS, Format
from lora.formats import loralib, peft, peft_folder
from lora.formats.peft_losses import losses
from lora.formats.portable import portable


def enter() -> None:
    """Enter these formats in the table by which adapters are read and written."""
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
    FORMATS["portable"] = Format(
        "PEFT",
        write=lambda adapter, path, names: peft.write(portable(adapter), path, names),
        losses=losses,
        files=files,
    )
    FORMATS["loralib"] = Format("loralib", read=loralib.read, reads=loralib.reads)
