"""Parameters that DeepSpeed's ZeRO-3 keeps in parts: they are empty here, until someone gathers them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def is_partitioned(tensor: Any) -> bool:
    """Whether this is what ZeRO-3 leaves in the place of a tensor, and not the tensor."""
    whole = getattr(tensor, "ds_shape", None)
    return whole is not None and tensor.numel() != math.prod(whole)


def partitioned_problems(tensors: Iterable[tuple[str, Tensor | None]]) -> Iterator[str]:
    """A complaint for each of these that is kept in parts, and what to do."""
    for name, tensor in tensors:
        if is_partitioned(tensor):
            shape: Any = tensor.ds_shape  # type: ignore[union-attr]
            yield (
                f"{name} is empty: DeepSpeed's ZeRO-3 keeps its {tuple(shape)} in parts; do this within "
                "`deepspeed.zero.GatheredParameters(parameters)`."
            )
