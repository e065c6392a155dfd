"""Whether LoRA is disabled in a layer: that is a matter of the caller, not of the layer.

A block `with lora.disabled(model)` belongs to the context that it is entered in (`contextvars`): a thread, or a task of
asyncio. A layer knows the blocks that name it, and a context those that were entered in it. Where the two have an open
one in common, the layer is off.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch

# The blocks that were entered in a context, or in one that it was copied from. A block that has been left may still be
# there: it was left in another context, as a generator's finaliser does.
_entered: ContextVar[tuple[Block, ...]] = ContextVar("lora_disabled", default=())


class Block:
    """One `with lora.disabled(model)`.

    Attributes:
        is_open: whether it has not been left.
        exchanges: whether the base's values stand in the model for it, where others trained.
        layers: the layers that it disables, and those that were copied from them meanwhile.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.is_open, self.exchanges, self.layers = True, False, layers

    def enter(self) -> None:
        """Let the block hold in the caller's context."""
        _entered.set((*filter(_is_open, _entered.get()), self))

    def close(self) -> None:
        """Let the block hold nowhere, whatever the context."""
        self.is_open = False
        _entered.set(tuple(filter(_is_open, _entered.get())))


class Switch:
    """The blocks that name a layer: its `lora_disabled` while there are any."""

    def __init__(self) -> None:
        self.blocks: set[Block] = set()

    def is_off(self, device: torch.device) -> bool:
        """Whether the layer is off for the caller; RuntimeError if it is on, and the base's tensors stand in the model.

        Args:
            device: where the layer computes.
        """
        if self._names_one_of(_entered.get()):
            return True
        # Autograd computes checkpointed forwards again; for accelerators in threads of its own, which have no context.
        # As a rule it tells them that of the caller of `backward`. Where it does not, the layer is off if it is for
        # anyone.
        recomputes = device.type != "cpu" and torch._C._current_graph_task_id() != -1
        if recomputes and (not torch._C._is_key_in_tls("context") or self._names_one_of(of_caller(_entered))):
            return True
        if any(block.exchanges for block in tuple(self.blocks)):
            raise RuntimeError(
                "forward: another thread or task is within `lora.disabled`, and more than adapters trained in this "
                "model: the base's biases, modules or buffers stand there meanwhile, for every caller. Let one at a "
                "time compute with such a model, or disable a copy of it; threads that work for the block itself call "
                "through `contextvars.copy_context().run`."
            )
        return False

    def _names_one_of(self, blocks: tuple[Block, ...]) -> bool:
        return any(block.is_open and block in self.blocks for block in blocks)

    def __reduce__(self) -> tuple[type[Switch], tuple[()]]:
        return Switch, ()  # `copy_blocks` fills it

    def __deepcopy__(self, memo: Any) -> Switch:
        twin = Switch()
        twin.blocks = self.blocks.copy()
        return twin


class _Off(Switch):
    """The switch of a replica, with which another thread computes, of a layer that is off for the caller."""

    def is_off(self, device: torch.device) -> bool:
        return True


OFF = _Off()


def copy_blocks(layer: Any) -> None:
    """Let a layer that was copied or unpickled be off in the caller's blocks, if the original was disabled."""
    switch: Switch | None = vars(layer).pop("lora_disabled", None)
    for block in filter(_is_open, _entered.get() if switch is not None else ()):
        if switch is not None and (block in switch.blocks or not switch.blocks):  # a pickle does not say which
            block.layers.append(layer)
            add(layer, block)


def add(layer: Any, block: Block) -> None:
    """Let a layer know a block that disables it."""
    switch = vars(layer).setdefault("lora_disabled", Switch())
    switch.blocks.add(block)


def remove(layer: Any, block: Block) -> None:
    """Let a layer forget a block, which it need not have known."""
    switch = vars(layer).get("lora_disabled")
    if switch is not None:
        switch.blocks.discard(block)
        if not switch.blocks:
            vars(layer).pop("lora_disabled", None)


def _is_open(block: Block) -> bool:
    return block.is_open


def of_caller(variable: ContextVar[tuple[Any, ...]]) -> tuple[Any, ...]:
    """What a variable is in the context that called `backward`, as autograd tells its threads."""
    context: Any = torch._C._get_obj_in_tls("context")
    values: tuple[Any, ...] = () if context is None else context.get(variable, ())
    return values
