"""Input embedding and output layer that are one weight: what an adapter cannot say of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lora.cli.base import Base

_INPUTS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tok_embedding", "shared"}
_OUTPUTS = {"lm_head", "embed_out", "output_embeddings"}


def tied_problems(base: Base, adapted: Iterable[str], in_full: Iterable[str]) -> Iterator[str]:
    """Why modules cannot be merged, or weights be replaced, because the model ties them.

    Args:
        adapted: the modules with adapters, by their names in the base.
        in_full: keys of the tensors that trained in full: one for both is what training a tied weight leaves.
    """
    if not _ties(base):
        return
    for name in adapted:
        if _last(name) in _INPUTS | _OUTPUTS:
            yield (
                f"{name}: config.json ties the input embedding to the output layer (tie_word_embeddings): "
                "its update would change the other one, too, or be lost."
            )
    owners = {_last(owner) for owner, _, own in (key.rpartition(".") for key in in_full) if own == "weight"}
    if not owners & _INPUTS:
        for owner in sorted(owners & _OUTPUTS):
            yield (
                f"{owner}: trained in full, and config.json ties it to the input embedding (tie_word_embeddings), "
                "which would replace it when the model is loaded."
            )


def _ties(base: Base) -> bool:
    """Whether the model has one weight for both; where its configuration does not say, whether one is missing."""
    text = base.config.get("text_config")
    for config in (base.config, text if isinstance(text, dict) else {}):
        if "tie_word_embeddings" in config:
            return bool(config["tie_word_embeddings"])
    # Up to transformers 4 a configuration leaves out what is as by default, and by default they are tied.
    return bool(base.config) and not any(_last(key.rpartition(".")[0]) in _OUTPUTS for key in base.files)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
