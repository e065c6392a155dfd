"""The base's tensors in the places of those that trained, for a while: what each module knows of it.

`lora.disabled` gives the base its own biases, `modules_to_save` and running statistics back, for as long as its block
is open. A module keeps what trained, so that state dicts are written from it and loaded into it all the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lora.functional.fused import is_storage
from lora.layers import switch
from lora.layers.layer import LoRALayer
from lora.layers.switch import Block

_ATTRIBUTE = "lora_exchanged"


class Exchanged:
    """One of a module's own tensors that was exchanged: `own` is its name there.

    Attributes:
        trained: what stood in the place, and will again.
        base: what stands there meanwhile.
        blocks: those for which it does.
    """

    def __init__(self, module: nn.Module, own: str, trained: Tensor, base: Tensor) -> None:
        self.module, self.own, self.trained, self.base = module, own, trained, base
        self.like = base.device, base.dtype
        self.blocks: set[Block] = set()

    # Both can be done again after an interruption, and `end` after a `begin` that was interrupted.

    def begin(self, block: Block) -> None:
        """Put the base's tensor in the place."""
        known = vars(self.module).setdefault(_ATTRIBUTE, _Places(self.module))
        self.blocks.add(block)
        known[self.own] = self
        switch.add(self.module, block)
        known.watch()
        if self._now() is self.trained:
            setattr(self.module, self.own, self.base)

    def end(self, block: Block) -> None:
        """Put back what trained, where the module is now, if no other block needs the base's."""
        self.blocks.discard(block)
        known = vars(self.module).get(_ATTRIBUTE)
        if self.blocks or known is None:
            switch.remove(self.module, block)
            return
        if known.get(self.own) is self:
            self._follow(self._now())
            setattr(self.module, self.own, self.trained)
            known.pop(self.own, None)
        if not known:
            known.unwatch()
            vars(self.module).pop(_ATTRIBUTE, None)
        switch.remove(self.module, block)

    def _now(self) -> Tensor:
        now: Tensor = getattr(self.module, self.own)
        return now

    @torch.no_grad()
    def hand_on(self, other: nn.Module | None) -> None:
        """Give what trained to a module that was made of the base's meanwhile, as a head of a larger vocabulary is."""
        made = None if other is None else other._parameters.get(self.own)
        if made is None or made.shape[1:] != self.trained.shape[1:] or made.is_meta:
            return
        rows = min(len(made), len(self.trained))
        if torch.equal(made[:rows], self.base[:rows].to(made.device, made.dtype)):
            made[:rows].copy_(self.trained[:rows])
            made.requires_grad_(self.trained.requires_grad)

    def _follow(self, now: Tensor) -> None:
        if now is not self.trained and isinstance(now, nn.Parameter) and now.shape[1:] == self.trained.shape[1:]:
            kept = self.trained.detach()[: len(now)]
            if len(now) != len(self.trained):  # of a vocabulary that was resized: what is new is the base's
                new = now.detach()[len(kept) :].to(kept.device, kept.dtype)
                self.trained.grad, self.trained.data = None, torch.cat([kept, new])
        if now is self.trained or (now.device, now.dtype) == self.like:
            return
        keeps = is_storage(now.dtype) and isinstance(self.trained, nn.Parameter)  # as a LoRA layer's `.to()` keeps it
        dtype = self.trained.dtype if keeps else now.dtype
        holder = nn.Module()  # which knows how to move a Parameter, and its gradient, and to keep the object
        if isinstance(self.trained, nn.Parameter):
            holder.register_parameter("one", self.trained)
        else:
            holder.register_buffer("one", self.trained)
        holder._apply(lambda tensor: tensor.to(now.device, dtype))  # type: ignore[no-untyped-call]
        self.trained = holder.one  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "within `lora.disabled` a model that trains biases, modules or buffers besides its adapters has the base's "
            "in their places: copy or pickle it outside of the block. (Its state dict is right within it, too.)"
        )


class _Places(dict[str, Exchanged]):
    """What was exchanged in a module, by name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.handles = module, list[Any]()

    def watch(self) -> None:
        """Have state dicts hold what trained, and forwards refuse callers who did not ask for the base's values."""
        module: Any = self.module
        hooks: list[tuple[Any, Any]] = [(module.register_state_dict_post_hook, _save_trained)]
        hooks.append((module.register_load_state_dict_pre_hook, _load_trained))
        if not isinstance(module, LoRALayer):  # they look after themselves
            hooks.append((module.register_forward_pre_hook, _refuse_others))
        for register, hook in hooks[len(self.handles) :]:
            self.handles.append(register(hook))

    def unwatch(self) -> None:
        for handle in self.handles:
            handle.remove()


def exchanged(module: nn.Module) -> dict[str, Exchanged]:
    """Those of the module's own tensors that are exchanged now, by name."""
    known: dict[str, Exchanged] = vars(module).get(_ATTRIBUTE, {})
    return known


def trained_in(module: nn.Module, own: str, tensor: Tensor) -> Tensor:
    """What stands in a place of a module when nothing is exchanged."""
    one = exchanged(module).get(own)
    return tensor if one is None else one.trained


def _refuse_others(module: nn.Module, args: Any) -> None:
    """RuntimeError for a caller that would have the base's values, and has not asked for them."""
    # What replicas of `nn.DataParallel` have was copied for their caller.
    if torch.compiler.is_compiling() or "_is_replica" in vars(module):
        return
    disabled, one = vars(module).get("lora_disabled"), next(iter(exchanged(module).values()), None)
    if disabled is not None and one is not None:
        disabled.is_off(one.base.device)


def _save_trained(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for own, one in [*exchanged(module).items()]:
        if (key := f"{prefix}{own}") in state:
            keeps_vars = state[key] is getattr(module, own)
            state[key] = one.trained if keeps_vars else one.trained.detach()


@torch.no_grad()
def _load_trained(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any, *args: Any) -> None:
    for own, one in [*exchanged(module).items()]:
        value, now = state.get(f"{prefix}{own}"), getattr(module, own)
        if not isinstance(value, Tensor) or value.shape != one.trained.shape:
            continue  # torch says what is wrong, of the tensor that stands there
        if metadata.get("assign_to_params_buffers", False):
            if isinstance(one.trained, nn.Parameter):
                value = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
                value.requires_grad_(one.trained.requires_grad)
            one.trained = value
        else:
            one.trained.copy_(value)
        state[f"{prefix}{own}"] = now  # which is loaded into itself
