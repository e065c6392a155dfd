"""What a calibration pass sees: sums over the inputs of layers, and over the gradients of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lora.errors import instance
from lora.functional.fused import exact_dtype
from lora.layers.linear import LinearLoRA
from lora.models.batches import Counted, Inputs, Step, input_of, results
from lora.models.disabling import disabled


def observe(
    model: nn.Module,
    statistics: Mapping[LinearLoRA, Statistic],
    batches: Iterable[Any],
    step: Step | None,
    ignore_index: int | None,
) -> int:
    """Run the pretrained model on the batches once, and let each layer's statistic see them; returns how many."""
    counted = Counted(ignore_index)
    probe = torch.zeros((), requires_grad=True)  # what every output depends on, so that it has a gradient
    with_loss = any(isinstance(statistic, Gradients) for statistic in statistics.values())
    count = 0
    with ExitStack() as hooks:
        for layer, statistic in statistics.items():
            hooks.enter_context(statistic.watch(layer, counted, probe))
        with disabled(model), torch.set_grad_enabled(with_loss):
            for result in results(model, batches, step, counted):
                count += 1
                if with_loss:
                    torch.autograd.grad(_loss(result), probe, allow_unused=True)
    return count


# ---- what is summed ------------------------------------------------------------------------------------------------


class Gradients:
    """Σ dyᵀ x, the gradient of a layer's weight, for each block of rows that an update goes to."""

    def __init__(self, layer: LinearLoRA) -> None:
        self.count, self.changed = 0, False
        self.slices = layer.lora_slices()
        self.blocks: list[Tensor] = []

    def watch(self, layer: LinearLoRA, counted: Counted, probe: Tensor) -> RemovableHandle:
        """See all inputs of the layer with the gradients of its outputs, until the handle is removed."""

        def see(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None  # the first of the two forwards of an activation checkpoint
            x = input_of(args, kwargs).detach()
            version = x._version
            output = output + probe

            def see_gradient(dy: Tensor) -> None:
                self.changed |= x._version != version
                self.add(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))

            output.register_hook(see_gradient)  # type: ignore[no-untyped-call]
            return output

        return layer.register_forward_hook(see, with_kwargs=True)

    @torch.no_grad()
    def add(self, dy: Tensor, x: Tensor) -> None:
        """Take in rows of the output's gradient (n, out_features) and of the input (n, in_features)."""
        dy, x = dy.to(exact_dtype(dy.dtype)), x.to(exact_dtype(x.dtype))
        if not self.blocks:
            self.blocks = [dy.new_zeros(stop - start, x.shape[1]) for start, stop in self.slices]
        for block, (start, stop) in zip(self.blocks, self.slices, strict=True):
            block.addmm_(dy[:, start:stop].T, x)
        self.count += len(x)

    def problems(self) -> Iterator[str]:
        """Why nothing can be made of what was seen."""
        if self.changed:
            yield "its input was changed in place after it was used; its weight's gradient needs it."
        if not self.count:
            yield "no batch's loss reached it."
        elif not all(bool(block.isfinite().all()) for block in self.blocks):
            yield "its gradient is not finite."


Statistic = Inputs | Gradients


def _loss(result: Any) -> Tensor:
    """The loss in what a step returned: itself, its `loss`, or its entry of that name."""
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", result)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of {tuple(loss.shape)}" if isinstance(loss, Tensor) else instance(loss)
        raise ValueError(
            "LoRA-GA needs a loss: `step`, or without one the model, must return a scalar tensor, or something that "
            f"has one as its `loss` (transformers' models do, where a batch has labels); got {what}."
        )
    if not loss.requires_grad:
        raise ValueError("LoRA-GA needs the loss's gradient, and this loss depends on no layer that waits for it.")
    return loss
