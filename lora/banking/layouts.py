"""Where the arguments and outputs of torch's own modules have rows: not always in their first dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn as nn
from torch import Tensor


class Axis(NamedTuple):
    """Where a tensor has rows: in which dimension, and how many entries of it each row has."""

    dim: int
    each: int = 1


# Where a tensor of a module's has rows; None if it has none.
_Where = Callable[[Any, Tensor], Axis | None]


class Layout(NamedTuple):
    """Where the arguments and outputs of a class have rows: by the arguments' names, and the outputs' order."""

    inputs: Mapping[str, _Where]
    outputs: Sequence[_Where]


def _in_batch(module: Any, tensor: Tensor) -> Axis | None:
    """(batch, length, features) or, as torch has it by default, (length, batch, features)."""
    attention = next((m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), module)
    return None if tensor.dim() < 3 else Axis(0 if attention.batch_first else 1)


def _in_first(module: Any, tensor: Tensor) -> Axis | None:
    """(batch, …), of which a tensor without a batch has but one dimension."""
    return None if tensor.dim() < 2 else Axis(0)


def _in_second(module: Any, tensor: Tensor) -> Axis | None:
    """(layers, batch, features)."""
    return None if tensor.dim() < 3 else Axis(1)


def _in_heads(module: Any, mask: Tensor) -> Axis | None:
    """(batch · heads, length, length), or a mask (length, length) for all."""
    heads = next(m.num_heads for m in module.modules() if isinstance(m, nn.MultiheadAttention))
    return None if mask.dim() < 3 else Axis(0, heads)


_QUERIES = dict.fromkeys(("query", "key", "value"), _in_batch)
_SOURCE = {"src": _in_batch, "mask": _in_heads, "src_mask": _in_heads, "src_key_padding_mask": _in_first}
_TARGET = {
    **dict.fromkeys(("tgt", "memory"), _in_batch),
    **dict.fromkeys(("tgt_mask", "memory_mask"), _in_heads),
    **dict.fromkeys(("tgt_key_padding_mask", "memory_key_padding_mask"), _in_first),
}
_ENCODER, _DECODER = Layout(_SOURCE, (_in_batch,)), Layout(_TARGET, (_in_batch,))
_ATTENTION = Layout({**_QUERIES, "key_padding_mask": _in_first, "attn_mask": _in_heads}, (_in_batch, _in_first))
_RECURRENT = Layout({"input": _in_batch, "hx": _in_second}, (_in_batch, _in_second))
_CELL = Layout({"input": _in_first, "hx": _in_first}, (_in_first, _in_first))
#: By the function that is called, which classes that derive from these may have of their own.
LAYOUTS: dict[Any, Layout] = {
    nn.MultiheadAttention.forward: _ATTENTION,
    **dict.fromkeys((cls.forward for cls in (nn.RNN, nn.LSTM, nn.GRU)), _RECURRENT),
    **dict.fromkeys((cls.forward for cls in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)), _CELL),
    **dict.fromkeys((cls.forward for cls in (nn.TransformerEncoderLayer, nn.TransformerEncoder)), _ENCODER),
    **dict.fromkeys((cls.forward for cls in (nn.TransformerDecoderLayer, nn.TransformerDecoder)), _DECODER),
    nn.Transformer.forward: Layout({**_SOURCE, **_TARGET}, (_in_batch,)),
}
# Of transformers: these turn their batches to (length, batch, features), and have no attribute that says so.
_TURNED = {"XLNetModel", "LongformerSelfAttention", "LEDEncoderSelfAttention"}


def is_turned(module: nn.Module) -> bool:
    """Whether a module is known to compute with (length, batch, features)."""
    return getattr(module, "batch_first", None) is False or type(module).__name__ in _TURNED
