"""What of PEFT's adapters is a part of a tensor of the base model's: rows of embeddings, and what is added to biases.

    W₀[indices] = rows         `trainable_token_indices`
    b = b₀ + s · b_B           `lora_bias`, a bias of B

Only with the model are these tensors of a module. Until then they stand among those that trained in full, under names
of their own, and the adapter is of a format of its own, that no other takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lora.adapters.adapter import Adapter
from lora.errors import Problems, is_count, join, short
from lora.functional.fused import exact_dtype
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.models.patterns import ends_of
from lora.models.start import pretrained_weight
from lora.models.training import originals

FORMAT = "peft, in parts"
INDICES, BIAS = "trainable_token_indices", "lora_bias"
_ROWS, _PLACES, _BIAS = "token_adapter.trainable_tokens_delta", "token_adapter.indices", "lora_B.bias"
_RAW = (
    (re.compile(r"\.token_adapter\.trainable_tokens_delta(\.[^.]+)?$"), f".{_ROWS}"),
    (re.compile(r"\.lora_B(\.[^.]+)?\.bias$"), f".{_BIAS}"),
)


def known(key: str) -> str | None:
    """The name that a part has here; None if a tensor is none."""
    return next((ending.sub(instead, key) for ending, instead in _RAW if ending.search(key)), None)


# ---- reading --------------------------------------------------------------------------------------------------------


def unannounced(parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[str]:
    """Parts of which the configuration says nothing, and settings for which the file has none."""
    for option, end, what in ((BIAS, _BIAS, "bias of B"), (INDICES, _ROWS, "rows")):
        having = [name for name in parts if name.endswith(end)]
        if not config.get(option):
            yield from (f"{name}: `{option}` is not set in the configuration." for name in having)
        elif not having:
            yield f"`{option}` is set, and the file holds no {what}."


def noted(adapter: Adapter, parts: Mapping[str, Tensor], config: Mapping[str, Any], problems: Problems) -> Adapter:
    """The adapter with its parts, and with what the configuration says of them."""
    found: dict[str, Tensor] = {}
    for name, tensor in parts.items():
        with problems.at(name):
            module = name.removesuffix(f".{_ROWS}")
            if module != name:
                found[join(module, _PLACES)] = _places(module, tensor, config.get(INDICES))
            else:
                tensor = _scaled(adapter, name.removesuffix(f".{_BIAS}"), tensor)
            found[name] = tensor
    if not parts:
        return adapter
    trained = [*adapter.trained_in_full, *found]
    return replace(adapter, tensors={**adapter.tensors, **found}, trained_in_full=trained, format=FORMAT)


def _places(module: str, rows: Tensor, said: Any) -> Tensor:
    """The indices of rows: a list for the input embeddings, or one for each module by the end of its name."""
    if isinstance(said, dict):
        said = next((said[end] for end in ends_of(module) if end in said), None)
    if isinstance(said, list) and (rows.dim() != 2 or len(rows) != len(said)):
        raise ValueError(f"`{INDICES}` names {len(said)} rows, and the file has the shape {(*rows.shape,)}.")
    if not isinstance(said, list) or not all(map(is_count, said)) or len({*said}) < len(said):
        raise ValueError(f"`{INDICES}` must list the indices of its rows, each once, got {short(said)}.")
    return torch.tensor(said, dtype=torch.int64)


def _scaled(adapter: Adapter, module: str, bias: Tensor) -> Tensor:
    if module not in adapter.modules:
        raise ValueError("is a bias of B, and there is no B.")
    settings, B = adapter.modules[module], adapter.pair(module)[1]
    if settings.use_dora or settings.base.kind == "embedding":
        raise ValueError("is a bias of B, which PEFT has neither with DoRA nor in embeddings.")
    if bias.shape != (B.shape[0],) or not bias.is_floating_point():
        raise ValueError(f"must have the shape {(B.shape[0],)}, got {(*bias.shape,)} of {bias.dtype}.")
    return bias.to(exact_dtype(bias.dtype)) * settings.scaling


# ---- in a model -----------------------------------------------------------------------------------------------------


def resolved(adapter: Adapter, modules: Mapping[str, nn.Module], problems: Problems) -> Adapter:
    """The adapter with whole tensors, made of the model's own: rows do not train on, biases do."""
    tensors, full, kept = dict(adapter.tensors), dict.fromkeys(adapter.trained_in_full), [*adapter.kept]
    for part, own, change in _CHANGES:
        for name in [name for name in full if name.endswith(f".{part}")]:
            module = name.removesuffix(f".{part}")
            key = join(module, own)
            with problems.at(key):
                base = tensors[key] if key in tensors else _of_base(modules.get(module), own)
                tensors[key] = change(base, tensors[name], tensors.get(join(module, _PLACES)))
                kept += [key] if own == "weight" and key not in full else []
                full[key] = None
    left = {name for name in full if name.endswith((f".{_ROWS}", f".{_PLACES}", f".{_BIAS}"))}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in left}
    return replace(
        adapter,
        tensors=tensors,
        trained_in_full=[name for name in full if name not in left],
        kept=kept,
        format="peft",
    )


def _of_base(module: nn.Module | None, own: str) -> Tensor:
    """A module's own tensor, whole, as it was pretrained."""
    if module is None:
        raise ValueError("there is no such module in the model.")
    tensor = originals(module).get(own, module._parameters.get(own))
    if tensor is None and own == "bias":
        raise ValueError(
            "the adapter adds to it, and the module has none: give it one of zeros, as in "
            "`module.bias = torch.nn.Parameter(torch.zeros(module.out_features))`."
        )
    if tensor is None or not tensor.is_floating_point():
        raise ValueError("the adapter changes a part of it, but the module has no such floating-point tensor.")
    if own == "weight" and isinstance(module, LoRALayer) and module.lora_start is not None:
        tensor = pretrained_weight(module)
    return weights.of(module, own, tensor).whole().detach()


def _with_rows(weight: Tensor, rows: Tensor, places: Tensor | None) -> Tensor:
    assert places is not None, "it was noted"
    if weight.dim() != 2 or weight.shape[1] != rows.shape[1] or int(places.max()) >= len(weight):
        raise ValueError(
            f"the adapter has rows {short(places.tolist())} of {rows.shape[1]} values for it, and its shape is "
            f"{(*weight.shape,)}; if rows were added where the adapter was trained, call "
            "`model.resize_token_embeddings` first."
        )
    places, rows = places.to(weight.device), rows.to(weight.device, weight.dtype)
    return weight.index_copy(0, places, rows)


def _with_bias(bias: Tensor, more: Tensor, places: Tensor | None) -> Tensor:
    if bias.shape != more.shape:
        raise ValueError(f"must have the shape {(*more.shape,)}, got {(*bias.shape,)}.")
    return (bias.to(more.dtype) + more.to(bias.device)).to(bias.dtype)


_CHANGES: tuple[tuple[str, str, Callable[[Tensor, Tensor, Tensor | None], Tensor]], ...] = (
    (_ROWS, "weight", _with_rows),
    (_BIAS, "bias", _with_bias),
)
