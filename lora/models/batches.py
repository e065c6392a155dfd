"""A model run on batches, and what goes into its layers meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lora.errors import instance
from lora.functional.fused import exact_dtype

Step = Callable[[nn.Module, Any], Any]


def batches_problems(batches: Any, step: Any) -> Iterator[str]:
    """What is wrong with batches, and with a function of a model and a batch, that a user gave."""
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        yield f"`batches` must be an iterable of batches, got {instance(batches)}; one batch goes into a list."
    if step is not None and not callable(step):
        yield f"`step` must be a function of a model and a batch, got {step!r}."


def results(model: nn.Module, batches: Iterable[Any], step: Step | None, counted: Counted) -> Iterator[Any]:
    """What the model, or `step` of it, makes of each batch in turn."""
    for batch in batches:
        counted.take(batch)
        yield (step or run)(model, batch)


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


# ---- what goes into a layer ----------------------------------------------------------------------------------------


class Inputs:
    """Number, mean and scatter Σ (x − mean)(x − mean)ᵀ of a layer's inputs, in float32 or float64."""

    def __init__(self, layer: nn.Module) -> None:
        self.count = 0
        self.mean, self.scatter = torch.zeros(()), torch.zeros(())

    def watch(self, layer: nn.Module, counted: Counted, probe: Tensor | None = None) -> RemovableHandle:
        """See all that goes into the layer, until the handle is removed."""

        def see(layer: nn.Module, args: Any, kwargs: Any) -> None:
            self.add(counted.rows(input_of(args, kwargs)))

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


def input_of(args: Any, kwargs: Any) -> Tensor:
    """The input among the arguments that a layer was called with."""
    x: Tensor = args[0] if args else kwargs["input"]
    return x
