"""Formats of other libraries: PEFT's folders, their portable form, and loralib's state dicts."""

from __future__ import annotations

from lora.adapters.formats import FORMATS, Format
from lora.adapters.single import portable
from lora.formats import from_peft, loralib, peft


def enter() -> None:
    """Enter these formats in the table by which adapters are read and written."""
    FORMATS["peft"] = Format(
        "PEFT",
        peft.write,
        lambda path, lora_alpha: from_peft.read(path),
        from_peft.reads,
        from_peft.claims,
        (peft.CONFIG, *from_peft.READERS),
    )
    FORMATS["portable"] = Format(
        "PEFT", lambda adapter, path, names: peft.write(portable(adapter), path, names), files=FORMATS["peft"].files
    )
    FORMATS["loralib"] = Format("loralib", read=loralib.read, reads=loralib.reads)
