"""Merged weights in low precision that keep the update: rounded or coded for the inputs of their layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn as nn
from torch import Tensor

from lora.errors import Problems, raise_all
from lora.functional.codes import Coded, change_for_inputs
from lora.functional.fused import exact_dtype, without_autocast
from lora.functional.rounding import lost_in_rows, round_for_inputs
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.layers.linear import LinearLoRA
from lora.layers.parts import Part
from lora.layers.undo import undo_on_error
from lora.models.batches import Counted, Inputs, Step, batches_problems, results
from lora.models.model import Names
from lora.models.readers import read_by_others
from lora.models.training import may_move

# What sums over inputs may take in any case, in bytes; as much as the adapted weights do, they may as well.
_ROOM = 2**30


class Kept(NamedTuple):
    """A merged weight, as its layer stores it or as codes and scales, and the shares of the update that it lost.

    Attributes:
        lost: ‖Q − W‖ / ‖W − W₀‖.
        lost_on_inputs: the root of E‖(Q − W) x‖² / E‖(W − W₀) x‖².
        nearest_on_inputs: the same, had every number been rounded to nearest.
    """

    weight: Tensor | Coded
    lost: float
    lost_on_inputs: float
    nearest_on_inputs: float


@torch.inference_mode(False)
@torch.no_grad()
def keep_updates(
    model: nn.Module,
    layers: Sequence[LoRALayer],
    names: Names,
    batches: Iterable[Any],
    step: Step | None,
    what: str,
    undo: undo_on_error,
    packed: bool = False,
) -> dict[LoRALayer, Kept]:
    """The merged weights of those layers for which their inputs matter; the model is as before.

    Args:
        what: the heading of errors.
        undo: of all modules of the model: it puts back what an error or an interruption leaves.
        packed: whether packed weights are to be packed again. Default: False, to be dense.

    Raises:
        ValueError: `batches` or `step` are no such things, no batch reached a layer, or its inputs are not finite.
    """
    raise_all(what, batches_problems(batches, step))
    rounded = [*_rounded(model, layers, packed)]
    groups = [*_groups(rounded, max(_ROOM, sum(_bytes(layer.weight) for layer in rounded)))]
    if len(groups) > 1 and iter(batches) is batches:  # once through, it is empty
        batches = list(batches)
    undo.keep(*(buffer for buffer in model.buffers() if may_move(buffer)))
    kept: dict[LoRALayer, Kept] = {}
    with Problems(what) as problems:
        for group in groups:
            seen = {layer: Inputs(layer) for layer in group}
            if not _observe(model, seen, batches, step):
                raise_all(what, ["there must be at least one batch, and `batches` is empty."])
            for layer in group:
                its = seen.pop(layer)
                found = [f"{names[layer][0]}: {problem}" for problem in its.problems()]
                problems.add(*found)
                if not found:
                    kept[layer] = _kept(layer, its.second_moment(), packed)
    return kept


def _rounded(model: nn.Module, layers: Iterable[LoRALayer], packed: bool) -> Iterator[LinearLoRA]:
    """Those whose weight is rounded when it is merged, and of which it is known what it is multiplied by, and how."""
    read = read_by_others(model)
    for layer in layers:
        if isinstance(layer, LinearLoRA) and not isinstance(layer, Part) and layer not in read:
            if layer.lora_is_in_place():
                continue
            if packed and weights.packing_of(layer) is not None:
                loses = weights.read_codes(layer) is not None
            else:
                dtype = layer.lora_base_weight().dtype
                loses = dtype != exact_dtype(dtype)
            if loses:
                yield layer


def _groups(layers: Iterable[LinearLoRA], room: int) -> Iterator[list[LinearLoRA]]:
    """The layers in turn, as many at a time as have room for their sums, in bytes; or one."""
    group: list[LinearLoRA] = []
    taken = 0
    for layer in layers:
        its = 4 * layer.lora_features(layer)[0] ** 2
        if group and taken + its > room:
            yield group
            group, taken = [], 0
        group.append(layer)
        taken += its
    if group:
        yield group


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _observe(model: nn.Module, seen: Mapping[LinearLoRA, Inputs], batches: Iterable[Any], step: Step | None) -> int:
    """Run the model on the batches, as it would serve; returns how many they are."""
    counted = Counted(None)
    with ExitStack() as hooks, _evaluating(model):
        for layer, its in seen.items():
            hooks.enter_context(its.watch(layer, counted))
        return sum(1 for _ in results(model, batches, step, counted))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in `eval()`; after it every module has its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.train(True) if isinstance(module, LoRALayer) else setattr(module, "training", True)


def _kept(layer: LinearLoRA, moments: Tensor, packed: bool) -> Kept:
    base = layer.lora_base_weight()
    exact = exact_dtype(base.dtype)
    coded = weights.read_codes(layer) if packed else None
    with without_autocast(base.device):
        moments = moments.to(exact)
        W = layer.lora_stored(layer.lora_merge_into(torch.empty_like(base, dtype=exact)))  # (out, in)
        update = W - layer.lora_stored(base).to(exact)
        weight: Tensor | Coded
        if coded is None:
            Q, nearest = round_for_inputs(W, moments, base.dtype), W.to(base.dtype)
            weight = torch.empty_like(base)
            layer.lora_stored(weight).copy_(Q)
        else:
            twin = packed_again(layer, layer.lora_compute_merged())
            nearest = weights.read_weight(twin)
            # Of an update larger than the steps between codes, the nearest lose less than those that there were.
            starts = (coded, cast(Coded, weights.read_codes(twin)))
            start = min(starts, key=lambda one: float(lost_in_rows(W - one.dense().to(exact), moments).sum()))
            weight = change_for_inputs(W, moments, start)
            Q = weight.dense()
        error, of_nearest = W - Q.to(exact), W - nearest.to(exact)
        size, on_inputs = update.norm(), lost_in_rows(update, moments).sum()
        lost, at_nearest = (_share(lost_in_rows(one, moments).sum(), on_inputs) ** 0.5 for one in (error, of_nearest))
    return Kept(weight, _share(error.norm(), size), lost, at_nearest)


def packed_again(layer: LoRALayer, merged: Tensor) -> LoRALayer:
    """A twin of the layer with the merged weight, packed to nearest as the layer's weight is."""
    twin = copy.deepcopy(layer)
    weights.write_weight(twin, merged)
    return twin


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else 0.0
