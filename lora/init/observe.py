"""What a calibration pass sees: sums over the inputs of layers, and over the gradients of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lora.errors import instance
from lora.functional.fused import exact_dtype
from lora.layers.linear import LinearLoRA
from lora.models.disabling import disabled

Step = Callable[[nn.Module, Any], Any]


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
            for batch in batches:
                counted.take(batch)
                result = (step or run)(model, batch)
                count += 1
                if with_loss:
                    torch.autograd.grad(_loss(result), probe, allow_unused=True)
    return count


# ---- what is summed ------------------------------------------------------------------------------------------------


class Inputs:
    """Number, mean and scatter Σ (x − mean)(x − mean)ᵀ of a layer's inputs, in float32 or float64."""

    def __init__(self, layer: LinearLoRA) -> None:
        self.count = 0
        self.mean, self.scatter = torch.zeros(()), torch.zeros(())

    def watch(self, layer: LinearLoRA, counted: Counted, probe: Tensor) -> RemovableHandle:
        """See all that goes into the layer, until the handle is removed."""

        def see(layer: nn.Module, args: Any, kwargs: Any) -> None:
            self.add(counted.rows(_input(args, kwargs)))

        return layer.register_forward_pre_hook(see, with_kwargs=True)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in rows (n, in_features); the mean of each batch apart, so that a large one costs no precision."""
        if not len(x):
            return
        x = x.to(exact_dtype(x.dtype))
        if not self.count:
            self.mean, self.scatter = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        total = self.count + len(x)
        mean = x.mean(0)
        centred, shift = x - mean, mean - self.mean
        # In place, which autocast leaves alone.
        self.scatter.addmm_(centred.T, centred).addr_(shift, shift, alpha=self.count * len(x) / total)
        self.mean += shift * (len(x) / total)
        self.count = total

    def second_moment(self) -> Tensor:
        """Σ x xᵀ / n (in_features, in_features)."""
        return (self.scatter / self.count).addr_(self.mean, self.mean)

    def problems(self) -> Iterator[str]:
        """Why nothing can be made of what was seen."""
        if not self.count:
            yield "no batch reached it."
        elif not bool(self.scatter.isfinite().all()):
            yield "its inputs are not finite."


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
            x = _input(args, kwargs).detach()
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


def _input(args: Any, kwargs: Any) -> Tensor:
    x: Tensor = args[0] if args else kwargs["input"]
    return x


# ---- batches ---------------------------------------------------------------------------------------------------


class Counted:
    """Which positions of the batch that is running count."""

    def __init__(self, ignore_index: int | None) -> None:
        self.ignore_index = ignore_index
        self.mask: Tensor | None = None

    def take(self, batch: Any) -> None:
        """Positions (N, L) that `attention_mask` marks and that have a label, in a batch that has these by name."""
        named = batch if isinstance(batch, Mapping) else {}
        attention, labels = named.get("attention_mask"), named.get("labels")
        self.mask = attention.bool() if isinstance(attention, Tensor) and attention.dim() == 2 else None
        if self.ignore_index is not None and isinstance(labels, Tensor) and labels.dim() == 2:
            labelled = labels != self.ignore_index
            self.mask = labelled if self.mask is None else labelled & self.mask.to(labels.device)

    def rows(self, x: Tensor) -> Tensor:
        """The inputs that count (n, in_features); all of them where they are not one for each position."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if self.mask is None or x.shape[:-1] not in (self.mask.shape, (self.mask.numel(),)):
            return rows
        return rows[self.mask.flatten().to(x.device)]


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch, which is moved to the model's device first."""
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)
    batch = _moved(batch, device)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _moved(batch: Any, device: torch.device | None) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    return tuple(_moved(value, device) for value in batch) if isinstance(batch, (tuple, list)) else batch


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
