"""Files that adapters come in: which formats there are, and which one a file has."""

from __future__ import annotations

import os
from pathlib import Path

from lora.adapter import Adapter, AdapterError
from lora.formats import native
from lora.settings import raise_all

_WRITERS = {"lora": native.write}


def read_adapter(path: str | os.PathLike[str], *, lora_alpha: float | None = None) -> Adapter:
    """Read an adapter in whatever format it is, without its model."""
    adapter = native.read(Path(path))
    raise_all(f"{path} is not loaded", adapter.problems(), AdapterError)
    return adapter


def write_adapter(adapter: Adapter, path: str | os.PathLike[str], format: str = "lora") -> None:
    """Write an adapter in a format of your choice."""
    raise_all(f"{path} is not written", adapter.problems(), AdapterError)
    _WRITERS[format](adapter, Path(path))
