"""What a transformers model says of the checkpoint that it was loaded from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn as nn


def name_of(model: nn.Module) -> str | None:
    """What a transformers model says that it was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def resized_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """Token embeddings and output layers with another number of rows than their checkpoint says.

    The rows that `resize_token_embeddings` added are made at random: nobody else has them. Nothing is said of models
    whose checkpoint is not to be found on this machine, and nothing is downloaded.
    """
    seen: set[nn.Module] = set()
    for module in model.modules():
        if module not in seen and callable(getattr(module, "get_input_embeddings", None)) and name_of(module):
            seen.update(module.modules())
            if _vocabulary_before(module) not in (None, _vocabulary(module.config)):
                ends = (module.get_input_embeddings(), module.get_output_embeddings())  # type: ignore[operator]
                yield from (end for end in ends if isinstance(end, nn.Module))


def _vocabulary_before(model: Any) -> int | None:
    """The size of the vocabulary in the checkpoint's own configuration, if that is on this machine."""
    try:
        return _vocabulary(type(model.config).from_pretrained(name_of(model), local_files_only=True))
    except Exception:  # no such folder, no configuration of transformers', or one that its own class refuses
        return None


def _vocabulary(config: Any) -> int | None:
    try:
        size = config.get_text_config().vocab_size
    except (ValueError, AttributeError):  # several texts, each with a vocabulary; none; no configuration of theirs
        return None
    return size if isinstance(size, int) else None
