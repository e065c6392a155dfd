"""A and B of several adapters of a layer in one tensor each, kept while the same rows come again and again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from lora.functional.stacked import Block, Stack
from lora.layers.cache import Cached, remembered


class Stacks:
    """A cache of what `Block.stack` gives, for `eval()` on a CPU: when text is generated, token by token.

    It is as large as the A and B that it is of, which are small: what is large is not stacked (`Block.pays`). As they
    lie, each in its own memory, adapters cannot be multiplied at once; and if they shared memory, `torch.save` of one
    of them would write all.
    """

    def __init__(self) -> None:
        self._made: Cached | None = None
        self._key: Hashable = None

    def keeper(self, key: Hashable) -> Stack | None:
        """What keeps A and B stacked, if the key, of rows and adapters, is the one of the last time; else None."""
        again, self._key = self._key == key, key
        if again:
            return self._stacked
        self._made = None
        return None

    def _stacked(self, block: Block, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if not As[0].is_cpu:  # to compare values would mean to wait
            return block.stack(As, Bs)
        sources = [factors[k] for factors in (As, Bs) for k in block.order]
        return remembered(self, "_made", sources, 0.0, lambda: block.stack(As, Bs), bases=0)

    def drop(self) -> None:
        """Forget them."""
        self._made = self._key = None
