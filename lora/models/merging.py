"""Fold adapters into their base weights, for good or in a state dict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from lora.errors import Problems, instance, short, table
from lora.functional.codes import Coded
from lora.functional.fused import exact_dtype, is_plain, is_storage
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.layers.parts import tensor_name
from lora.layers.registry import plain_base
from lora.layers.state import PARAMETERS
from lora.layers.undo import undo_on_error
from lora.models.batches import Step
from lora.models.keeping import Kept, keep_updates, packed_again
from lora.models.model import (
    Memory,
    Names,
    forget_children,
    lora_layers,
    names_of,
    owned_tensors,
    sharded_problems,
    without_wrappers,
)
from lora.models.readers import let_read_no_more
from lora.models.refusals import own_forward_problems
from lora.models.training import forget_originals


@dataclass(frozen=True)
class MergedModule:
    """One merged module: its name, the dtype of its weight, and the share of the update that rounding lost.

    If it was packed, also how, and the share of the update that packing the merged weight again would lose; None where
    it was packed again, and `lost` is what that has lost. If it was rounded or coded for its inputs x, also the share
    of the update's effect on them, ‖(W' − W) x‖ / ‖(W − W₀) x‖ over all x that were seen, which it lost, and which it
    would have lost if every number had been rounded, or packed, to nearest.
    """

    name: str
    dtype: str
    lost: float
    packed: str | None = None
    lost_packed: float | None = None
    lost_on_inputs: float | None = None
    nearest_on_inputs: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """What `lora.merge` did: how much of each module's update was lost to rounding.

    `lost` is ‖round(W₀ + Δ) − W₀ − Δ‖ / ‖Δ‖ with Δ = s · B A: 0 if nothing of the update was lost, 1 if rounding lost
    as much as there was. In a large matrix it is measured on evenly spaced columns, half a million values or more.
    """

    modules: tuple[MergedModule, ...]

    @property
    def lost(self) -> float:
        """The largest loss of any module."""
        return max((module.lost for module in self.modules), default=0.0)

    def __str__(self) -> str:
        header, rows = ["module", "dtype", "update lost to rounding"], [[m.name, m.dtype] for m in self.modules]
        columns = [[f"{100 * m.lost:.2f} %" for m in self.modules]]
        if any(m.lost_on_inputs is not None for m in self.modules):
            header += ["on its inputs", "if rounded to nearest"]
            columns += [[_percent(m.lost_on_inputs, 2) for m in self.modules]]
            columns += [[_percent(m.nearest_on_inputs, 2) for m in self.modules]]
        if any(m.packed for m in self.modules):
            is_dense = any(m.lost_packed is not None for m in self.modules)
            header += ["was packed as", "lost if packed again"] if is_dense else ["packed as"]
            columns += [[m.packed or "-" for m in self.modules]]
            columns += [[_percent(m.lost_packed, 0) for m in self.modules]] if is_dense else []
        return table(header, [(*row, *cells) for row, *cells in zip(rows, *columns, strict=True)])


def _percent(share: float | None, digits: int) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def merge(
    model: nn.Module, batches: Iterable[Any] | None = None, *, step: Step | None = None, packed: bool = False
) -> MergeReport:
    """Write W = g ⊙ (W₀ + s · B A) into the base weights, in place, and leave plain torch layers.

    The sum is computed in float32 (float64 where the weight is) and rounded once, to the weight's dtype. In bfloat16
    rounding loses a good part of a small update; the report says how much. Packed (quantised) weights become dense, in
    the dtype that their layer computes in; the report says how much packing them again would lose. (Weights in
    bitsandbytes' int8 without a bias do not say what that is, and take the dtype that most of the model's other numbers
    have.) With `packed` they are packed again, which to nearest loses about all of an ordinary update: the codes stay
    what they were. (Where the scales are quantised too, they are rounded anew, and of a small update more than all can
    be lost.)

    **With `batches`** weights in bfloat16 and float16 are rounded for the inputs x that their layers are given,

        W' with a small E‖(W' − W) x‖²        instead of every number to nearest

    which keeps more of what the update does: the error of one column is made good in others whose inputs go along with
    its own. No row has more of that error than to nearest. So are linear layers rounded, fused ones and DoRA too;
    convolutions, embeddings, parameters that are no layer's, and layers with a forward of their own or whose weights
    others read are rounded to nearest. Weights in float32 and float64 lose nothing, and need no batches. The model
    runs in `eval()` on inputs like those that it will meet, of as many tokens as the widest layer has in_features or
    more; the shares in the report are of these very inputs, and those of others are larger.

    With `batches` and `packed`, weights in bitsandbytes' 4 bits (rows of whole blocks) get codes, and scales of their
    blocks, for which that error is small. They start from those that the weight had, or from the nearest, whichever
    lose less: of no layer is more lost than its update, or than nearest codes lose. Other packed weights are packed to
    nearest.

    Done whole or not at all: an error or Ctrl-C half-way leaves the model as it was, to the bit. For that, the base
    weights that were written are kept until the end, in copies on the CPU: as much memory as all adapted weights take.
    (`python -m lora merge` merges a folder of files in less.) With `batches` the rounded weights take as much again,
    and sums over inputs, of in_features² float32 numbers for each layer, take 1 GiB or as much as the adapted weights,
    if that is more: where not all have room, the batches run once for each part of the layers that has.

    Args:
        model: a model with LoRA layers, injected or constructed.
        batches: each is given to the model as keywords (a mapping), as arguments (a tuple or list) or as one argument
            (anything else), as `lora.calibrate` does. Positions that an `attention_mask` leaves out do not count.
            Default: None, to nearest.
        step: a function of model and batch, called instead of the model. Default: None.
        packed: whether packed weights stay packed. Default: False, they become dense.

    Returns:
        A report that prints as a table: module, dtype, and the share of the update that rounding lost; with `batches`
        also of its effect on the inputs.

    Raises:
        ValueError: there is no LoRA layer; a weight is tied to another module's (which the update would change too),
            is sharded, or is neither dense nor packed in a known way; the update has another shape than the weight; a
            merged weight would not be finite; or the instance of a layer has its own `forward`. With `batches`: there
            are none, none reached a layer, or what it was given is not finite. With `packed`: no weight is. One error
            lists everything, and the model is as it was.
        TypeError: `packed` is neither True nor False.

    From "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323, section
    3: its order of columns and its feedback of errors, here on the grid of the weight's dtype, and then a few rounds
    over the columns in which each is rounded again. "QuantEase: Optimization-based Quantization for Language Models",
    arXiv:2309.01885, section 3: the codes of packed weights, one after the other.

    >>> import torch, lora
    >>> layer = lora.Linear(8, 4, r=2)
    >>> model = torch.nn.Sequential(layer)
    >>> _ = torch.nn.init.ones_(layer.lora_B)
    >>> before = model(torch.ones(8))
    >>> lora.merge(model).lost < 1e-5
    True
    >>> type(model[0]), bool((model(torch.ones(8)) - before).abs().max() < 1e-5)
    (<class 'torch.nn.modules.linear.Linear'>, True)
    """
    if not isinstance(packed, bool):
        raise TypeError(f"merge: `packed` must be True or False, got {short(packed)}.")
    what = "merge: nothing was changed"
    layers = [layer for layer in lora_layers(model, "merge") if layer.r > 0]
    names = names_of(model)
    memory = Memory(owned_tensors(names))
    with Problems(what) as problems:
        _check(layers, names, problems)
        problems.add(*own_forward_problems(lora_layers(model, "merge"), names))
        if packed and not any(map(_is_packed_as_known, layers)):
            problems.add("`packed` is for packed weights, and no LoRA layer has one.")
        for layer in layers:
            others = memory.tied_to(layer)
            if others:
                untie = "" if _is_packed_as_known(layer) else "use `lora.merged_state_dict`, which unties them, or "
                problems.add(
                    f"{names[layer][0]}: its weight is tied to that of {others}, which would change too; "
                    f"{untie}give one a copy of the weight."
                )
    with undo_on_error(model.modules()) as undo, undo:
        kept = {} if batches is None else keep_updates(model, layers, names, batches, step, what, undo, packed)
        usual = _usual_dtype(names)
        rows = [_merge(layer, names[layer][0], undo, kept.pop(layer, None), packed, usual) for layer in layers]
        for layer in lora_layers(model, "merge", none=True):  # those with r = 0
            layer.lora_remove()
        for module in model.modules():
            forget_originals(module)
            forget_children(module)
            let_read_no_more(module)
            weights.prepare_training(module, False)
    return MergeReport(tuple(rows))


def merged_state_dict(
    model: nn.Module, batches: Iterable[Any] | None = None, *, step: Step | None = None
) -> dict[str, Tensor]:
    """The state dict of the plain model with all adapters merged; the model stays as it is.

    Keys and layouts are the pretrained model's (with `fan_in_fan_out`, the transposed weight stays transposed). Weights
    that are tied in the model are entries of their own.

    Args:
        model: a model with LoRA layers.
        batches, step: what to run the model on, for weights in bfloat16 and float16 to be rounded as `lora.merge` does
            it. Default: None, to nearest.

    Returns:
        `model.state_dict()` with merged weights and without the adapters; tensors that LoRA does not touch are shared.

    Raises:
        ValueError: there is no LoRA layer, or one cannot be merged; or what `lora.merge` says of `batches`. One error
            lists all.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(lora.Linear(8, 4, r=2))
    >>> sorted(lora.merged_state_dict(model))
    ['0.bias', '0.weight']
    """
    what, reads = "merged_state_dict: nothing was returned", batches is None  # the batches are to meet LoRA
    layers = [layer for layer in lora_layers(model, "merged_state_dict", reads=reads) if layer.r > 0]
    names = names_of(model)
    with Problems(what) as problems:
        _check(layers, names, problems)
        for layer in layers:
            if _is_packed_as_known(layer):
                problems.add(f"{names[layer][0]}: its base weight is packed; use `lora.merge`, on a copy if need be.")
            beyond = layer.lora_not_in_weight()
            if beyond:
                problems.add(f"{names[layer][0]}: a state dict cannot say that {beyond}; use `lora.merge`.")
    kept: dict[LoRALayer, Kept] = {}
    if batches is not None:
        with undo_on_error(model.modules()) as undo, undo:
            kept = keep_updates(model, layers, names, batches, step, what, undo)
    state: dict[str, Tensor] = dict(model.state_dict())
    for layer in layers:
        merged = cast(Tensor, kept[layer].weight) if layer in kept else layer.lora_compute_merged()
        for known in names[layer]:
            name = without_wrappers(known)
            state[tensor_name(layer, name, "weight")] = merged
            for own, _ in layer.lora_parameters():
                del state[tensor_name(layer, name, own)]
    return state


@torch.no_grad()
def _merge(
    layer: LoRALayer, name: str, undo: undo_on_error, kept: Kept | None, packed: bool, usual: torch.dtype | None
) -> MergedModule:
    """Leave a plain layer with W, which is rounded to nearest if it is not `kept`."""
    if _is_packed_as_known(layer):
        return _pack_again(layer, name, undo, kept) if packed else _unpack(layer, name, kept, usual)
    dtype = layer.weight.dtype
    lost = rounding_lost(layer) if kept is None else kept.lost
    undo.keep(*weights.written_with(layer))
    if kept is None:
        layer.lora_merge()
    else:
        layer.weight.copy_(cast(Tensor, kept.weight))
    layer.lora_remove()
    return MergedModule(name, _word(dtype), lost, None, None, *_on_inputs(kept))


def _usual_dtype(names: Names) -> torch.dtype | None:
    """That of most of the model's own numbers in floating point, but for those of packed weights; None without any."""
    sizes: Counter[torch.dtype] = Counter()
    for one in owned_tensors(names):
        packed = one.own == "weight" and weights.is_packed(one.module)
        if one.own not in PARAMETERS and not packed and one.tensor.is_floating_point():
            sizes[one.tensor.dtype] += one.tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def _unpack(layer: LoRALayer, name: str, kept: Kept | None, usual: torch.dtype | None) -> MergedModule:
    """Leave a plain layer with a dense weight, and say what packing that again would lose."""
    before, lost = layer.lora_base_weight(), rounding_lost(layer) if kept is None else kept.lost
    merged = layer.lora_compute_merged() if kept is None else cast(Tensor, kept.weight)
    packing = type(layer.weight).__name__
    lost_packed = _lost(weights.read_weight(packed_again(layer, merged)), merged, before)
    if kept is None and usual is not None and not weights.says_dtype(layer):
        exact, merged = merged, merged.to(usual)
        lost = _lost(merged, exact, before)
    layer.lora_remove()
    module: nn.Module = layer
    module.__class__ = plain_base(type(layer))
    module.weight = nn.Parameter(merged, False)
    if isinstance(module._parameters.get("bias"), Tensor):  # some layers cast it to what they compute in
        module.bias.data = module.bias.data.to(merged.dtype)
    return MergedModule(name, _word(merged.dtype), lost, packing, lost_packed, *_on_inputs(kept))


def _pack_again(layer: LoRALayer, name: str, undo: undo_on_error, kept: Kept | None) -> MergedModule:
    """Leave a plain layer with W packed as W₀ was."""
    before, merged = layer.lora_base_weight(), layer.lora_compute_merged()
    undo.keep(*weights.written_with(layer))
    if kept is None:
        weights.write_weight(layer, merged)
    else:
        weights.write_codes(layer, cast(Coded, kept.weight))
    lost = _lost(weights.read_weight(layer), merged, before) if kept is None else kept.lost
    packing = type(layer.weight).__name__
    layer.lora_remove()
    return MergedModule(name, _word(merged.dtype), lost, packing, None, *_on_inputs(kept))


def _on_inputs(kept: Kept | None) -> tuple[float | None, float | None]:
    return (None, None) if kept is None else (kept.lost_on_inputs, kept.nearest_on_inputs)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _lost(now: Tensor, merged: Tensor, before: Tensor) -> float:
    """‖now − W‖ / ‖W − W₀‖."""
    exact = exact_dtype(merged.dtype)
    update, error = merged.to(exact) - before.to(exact), now.to(exact) - merged.to(exact)
    return float(error.norm() / update.norm()) if update.any() else 0.0


def _is_packed_as_known(layer: LoRALayer) -> bool:
    """Whether the base weight is packed, and can be read."""
    return weights.packing_of(layer) is not None


@torch.no_grad()
def rounding_lost(layer: LoRALayer) -> float:
    """‖round(W₀ + Δ) − W₀ − Δ‖ / ‖Δ‖ of the layer's weight; for a large one, of a part."""
    weight, A = layer.lora_sampled(layer.lora_base_weight(), layer.lora_A)
    dtype = weight.dtype
    exact = exact_dtype(dtype)
    weight, update = weight.to(exact), layer.lora_scaling * layer.lora_delta(A.to(exact), layer.lora_B.to(exact))
    if layer.use_dora:
        update = (weight + update) * layer.lora_gain(exact) - weight
    size, error = update.norm(), ((weight + update).to(dtype).to(exact) - weight).sub_(update).norm()
    return float(error / size) if size else 0.0


@torch.no_grad()
def _check(layers: list[LoRALayer], names: Names, problems: Problems) -> None:
    """Note why layers cannot be merged."""
    instead = "save the adapter (`lora.save_adapter`), and merge that in one process, as `python -m lora merge` does"
    problems.add(*sharded_problems(layers, names, instead))
    for layer in layers:
        own = ((tensor_name(layer, names[layer][0], own), tensor) for own, tensor in layer._parameters.items())
        problems.add(*weights.split_up_problems(own))
    for layer in [] if problems else layers:
        with problems.at(names[layer][0]):
            _check_values(layer)


def _check_values(layer: LoRALayer) -> None:
    """ValueError if the weight of a layer, that this process has whole, cannot be merged."""
    if layer.weight.is_meta:
        raise ValueError("has no values yet, being on the meta device.")
    computes = layer.lora_dense or layer.lora_is_in_place()
    if not _is_packed_as_known(layer) and not (computes and is_plain(layer.weight, layer.lora_A, layer.lora_B)):
        what = f"{instance(layer.weight)} in {instance(layer)}"
        raise ValueError(f"{what} is neither dense nor packed in a known way.")
    _check_shapes(layer)
    if is_storage(layer.weight.dtype):
        raise ValueError(
            f"its weight is stored in {layer.weight.dtype}, which would lose the update; cast the model to the dtype "
            "that it computes in first."
        )
    if not _is_surely_finite(layer) and not bool((merged := layer.lora_compute_merged()).isfinite().all()):
        raise ValueError(f"the merged weight would not be finite in {merged.dtype}.")


def _check_shapes(layer: LoRALayer) -> None:
    """ValueError if the update does not have the weight's shape, as where only one of them was resized."""
    weight = tuple(layer.lora_weight_shape() if _is_packed_as_known(layer) else layer.weight.shape)
    A, B = (factor.to("meta") for factor in (layer.lora_A, layer.lora_B))
    try:
        fits = tuple(layer.lora_delta(A, B).shape) == weight
    except (RuntimeError, ValueError):  # of shapes that cannot be multiplied, or divided
        fits = False
    if fits and layer.use_dora:
        fits = layer.lora_magnitude.shape == (layer.lora_magnitudes(layer, tuple(B.shape)),)
    if not fits:
        own = ", ".join(f"{name} {tuple(parameter.shape)}" for name, parameter in layer.lora_parameters())
        raise ValueError(f"{own} do not fit the weight {weight}; give them back the shapes that they had together.")


def _is_surely_finite(layer: LoRALayer) -> bool:
    """Whether the largest that a merged weight could be is finite, from one look at each tensor."""
    if layer.use_dora or _is_packed_as_known(layer):
        return False
    if layer.weight.numel() == 0:
        return True
    W, A, B = (_largest(tensor) for tensor in (layer.weight, layer.lora_A, layer.lora_B))
    return W + abs(layer.lora_scaling) * A * B * layer.lora_block_rank() < torch.finfo(layer.weight.dtype).max


def _largest(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor)  # in one pass, with nothing made; NaN makes both of them NaN
    return max(-float(low), float(high))
