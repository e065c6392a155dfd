"""A LoRA layer in state dicts: the pretrained model's keys, and what a start has left of its weight told apart from it.

weight  W₀;  after PiSSA and its like  W₀ − s₀ · B₀ A₀, with a first dimension of 1
lora_A, lora_B, lora_magnitude
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora.layers import weights
from lora.layers.dora import Magnitudes

#: What the parameters of an adapter are called in its layer.
PARAMETERS = ("lora_A", "lora_B", "lora_magnitude")


class StateDicts(Magnitudes):
    """The part of `lora.LoRALayer` that writes state dicts, and loads them."""

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            self.lora_mark_rest(destination, f"{prefix}weight")

    def lora_mark_rest(self, state_dict: dict[str, Tensor], key: str) -> None:
        """Give what a start has left of the base weight a first dimension of 1 in a state dict, if it has.

        It bears the base weight's name, and is none: without A and B the model is broken. In another shape nothing
        takes it for one: whatever loads the state dict fails and names it, `strict=False` and `from_pretrained` too. By
        another name it would only be missing there, and be made at random. It is a view, so that what reads or writes
        state dicts in place (torch.distributed.checkpoint) works.
        """
        if self._keeps_rest() and key in state_dict:
            state_dict[key] = state_dict[key].unsqueeze(0)

    def _keeps_rest(self) -> bool:
        # What quantising lost, and LoftQ takes out of a packed weight, is little, and a base without it as good as any.
        return self.lora_start is not None and self.lora_base_written and not weights.is_packed(self)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        with self.lora_loading({own: f"{prefix}{own}" for own in ("weight", *PARAMETERS)}, state_dict, args[-1]):
            super()._load_from_state_dict(state_dict, prefix, *args)

    @contextmanager
    def lora_loading(self, keys: Mapping[str, str], state_dict: dict[str, Tensor], errors: list[str]) -> Iterator[None]:
        """Load the layer's tensors from a state dict within it, in which they have these keys."""
        found, problem = state_dict.get(keys["weight"]), None
        weight = found if isinstance(found, Tensor) else None  # what is none, torch refuses
        is_rest = weight is not None and weight.dim() == self.weight.dim() + 1 and weight.shape[0] == 1
        if weight is not None and is_rest:
            state_dict[keys["weight"]] = weight = weights.of(None, "weight", weight).without_first()
        if is_rest and not self._keeps_rest():
            problem = (
                "is what a start such as PiSSA's left of its base weight, but the adapter in the model did not start "
                "so; load the pretrained weights, start alike (`lora.initialize`), and then load this."
            )
        elif self.lora_start is not None and weight is not None and not self._has_weight(weight):
            problem = (
                "is not what the adapter's start was taken out of, to which A and B belong; load the pretrained "
                "weights first, and then `lora.initialize`."
            )
        if problem is not None:
            errors.append(f"{keys['weight']} {problem}")
            for key in keys.values():  # the layer stays as it is
                state_dict.pop(key, None)
        # A pretrained model has no magnitudes. Those that have not been trained are what its weights' are.
        missing = weight is not None and self.use_dora and keys["lora_magnitude"] not in state_dict
        untrained = missing and not self.lora_A.is_meta and not self.weight.is_meta and self._has_untrained_magnitude()
        yield
        if untrained:
            self.reset_magnitude()
        if keys["lora_A"] in state_dict and keys["lora_B"] in state_dict:
            self.lora_needs_data = self.lora_fresh = None

    def _has_weight(self, weight: Tensor) -> bool:
        return weights.same_values(weights.of(None, "weight", weight).whole(), weights.of(self, "weight").whole())

    def _has_untrained_magnitude(self) -> bool:
        whole = weights.ranks_of(self).with_whole(self, "weight", *PARAMETERS)
        return torch.allclose(whole.lora_magnitude, whole.lora_norms().to(whole.lora_magnitude), rtol=1e-5, atol=0)
