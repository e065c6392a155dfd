"""Adapters by best approximation at a rank: of another adapter, or of what a full fine-tune changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from lora.adapters.adapter import Adapter, ModuleAdapter
from lora.adapters.base import Base, describe
from lora.arithmetic.algebra import check, copied, named, sound, widest
from lora.errors import AdapterError, Problems, is_count, is_number, raise_all, short
from lora.layers.layer import LoRALayer
from lora.layers.parts import Part, tensor_name
from lora.layers.registry import class_for, kind_for
from lora.models.blocks import (
    Pair,
    block_rank,
    cut,
    dense_spectrum,
    layer_rank,
    padded,
    pairs_of,
    shares,
    smallest_rank,
    spectrum,
    tensors_of,
)
from lora.models.config import LoraConfig, find_targets
from lora.models.injection import adapter_dtype
from lora.models.model import Names, by_tensor, is_persistent, name_of, names_of, owned_tensors, without_wrappers
from lora.models.refusals import refusal

# The kinds of layer whose updates are matrices that can be known from the weight.
_FORMS = ("linear", "embedding", "conv", "stack")


def rank_problems(r: Any, energy: Any) -> Iterator[str]:
    """What is wrong with a choice of rank, by number or by the energy to keep."""
    if (r is None) == (energy is None):
        yield f"either `r` or `energy` must be given, got {short(r)} and {short(energy)}."
    if r is not None and not is_count(r, 1):
        yield f"`r` must be an integer of at least 1, got {short(r)}."
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        yield f"`energy` must be above 0 and at most 1, got {short(energy)}."


class Resized(NamedTuple):
    """What `lora.resize` made: `adapter`, and for each module the share of Σσ² that was `kept`."""

    adapter: Adapter
    kept: dict[str, float]


def resize(adapter: Adapter, r: int | None = None, *, energy: float | None = None) -> Resized:
    """The adapter at another rank: each module's update at its best approximation of that rank.

    By QR of B and A and an SVD of their core, in float64; ΔW is not made. A rank above the one that there is fills up
    with zeros and is exact, A and B to the bit. All splits of a merged linear layer, and all groups of a convolution,
    have one rank. The scaling stays, and so does what trained in full. What goes beyond the update's own rank is zero
    in A and in B, and does not train.

    Args:
        adapter: what to resize; it stays as it is.
        r: the rank of every module.
        energy: instead of `r`: for each module the smallest rank that keeps this share of Σσ², the squared singular
            values of its update; at most the rank that there is.

    Returns:
        A pair of the adapter and, by module, the share of Σσ² that was kept.

    Raises:
        ValueError: neither `r` nor `energy` is given, or both, or one is out of range.
        AdapterError: the adapter is not sound, a module is of a user's own kind, or `groups` of a factored convolution
            do not divide `r`. One error lists all.

    >>> import torch, lora
    >>> settings = {"r": 2, "lora_alpha": 2, "lora_dropout": 0.0, "use_rslora": False, "scaling": 1.0}
    >>> settings["base"] = {"kind": "linear", "shape": [2, 2]}
    >>> B = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> adapter, kept = lora.resize(lora.Adapter({"up": settings}, {"up.lora_A": torch.eye(2), "up.lora_B": B}), 1)
    >>> adapter.delta("up").round(decimals=4) + 0, round(kept["up"], 4)
    (tensor([[3., 0.],
            [0., 0.]]), 0.9)
    """
    what = "resize: nothing was computed"
    raise_all(what, rank_problems(r, energy))
    check([adapter], what)
    result, kept = copied(adapter), {}
    with Problems(what, AdapterError) as problems:
        for name, module in adapter.modules.items():
            with problems.at(name):
                layer = adapter.layer(name)
                pairs, kept[name] = _resized(layer, r, energy)
                result.modules[name] = module.at_rank(layer_rank(layer, pairs[0][0].shape[1]))
                result.tensors.update(named(name, tensors_of(layer, pairs), widest(adapter.pair(name))))
    return Resized(sound(result, what), kept)


def _resized(layer: LoRALayer, r: int | None, energy: float | None) -> tuple[list[Pair], float]:
    """The blocks at another rank, and the share of the energy that they keep."""
    now, pairs = layer.lora_block_rank(), pairs_of(layer)
    q = 0 if r is None else block_rank(layer, r)
    if q >= now:
        return [padded(B, A, q) for B, A in pairs], 1.0
    spectra = [spectrum(B, A) for B, A in pairs]
    share = shares(spectra)
    if energy is not None:
        q = block_rank(layer, layer_rank(layer, smallest_rank(share, energy)))
    if q == now:
        return pairs, 1.0
    return [cut(part, q) for part in spectra], float(share[min(q, len(share)) - 1])


class Extracted(NamedTuple):
    """What `lora.extract` made: `adapter`, and for each adapted module the share of Σσ² that was `kept`."""

    adapter: Adapter
    kept: dict[str, float]


def extract(
    base: nn.Module,
    finetuned: nn.Module,
    r: int | None = None,
    *,
    energy: float | None = None,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    target_parameters: Sequence[str] | None = None,
) -> Extracted:
    """The adapter that turns a model into its full fine-tune, as nearly as its rank allows.

        s · B A ≈ W_finetuned − W_base        by SVD; s = 1

    Every layer that can be adapted and whose weight differs gets the best approximation of the difference. All else
    that differs (biases, norms, layers of other kinds or outside `target_modules`) is kept in full. At full rank
    `lora.load_adapter` makes of `base` what computes as `finetuned` does, to rounding.

    Args:
        base, finetuned: models of one architecture, without LoRA layers; they stay as they are.
        r: rank of every module, but no more than its weight has.
        energy: instead of `r`: for each module the smallest rank that keeps this share of Σσ², the squared singular
            values of the difference.
        target_modules: which layers to adapt, as in `lora.LoraConfig`. Default: None, all that can be.
        exclude_modules: which not to adapt, as there. Default: None.
        target_parameters: which parameters of modules to adapt, a mixture's experts say, as there. Default: None.

    Returns:
        A pair of the adapter and, by module, the share of Σσ² that was kept. A and B are of the base weight's dtype,
        and float32 where that is narrower; convolutions are factored. What is kept in full is of the base's dtype. A
        module with several names is in it under the first; a tensor that several modules share is adapted in each of
        them, or kept in full if one of them cannot be.

    Raises:
        ValueError: neither `r` nor `energy` is given, or both, or one is out of range; the models differ in the names
            or shapes of their tensors, have LoRA layers, or tensors that are packed, sharded or not finite; a target
            matches nothing or cannot be adapted; `groups` of a convolution do not divide `r`; or no layer to adapt
            differs. One error lists all.

    >>> import copy, torch, lora
    >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> finetuned = copy.deepcopy(base)
    >>> with torch.no_grad():
    ...     _ = finetuned[0].weight.add_(1), finetuned[0].bias.zero_()
    >>> adapter, kept = lora.extract(base, finetuned, r=1)
    >>> list(adapter.modules), adapter.trained_in_full, round(kept["0"], 4)
    (['0'], ['0.bias'], 1.0)
    """
    what = "extract: nothing was computed"
    raise_all(what, rank_problems(r, energy))
    raise_all(what, _mismatches(base, finetuned))
    names = names_of(base)
    changes = _Changes(base, finetuned, names)
    with Problems(what) as problems:
        layers = _layers(base, names, changes, (target_modules, exclude_modules, target_parameters), problems)
        full = changes.in_full(layers)
        problems.add(*changes.problems(full))
        for name, layer in layers.items():
            try:
                block_rank(layer, r or layer.r)
            except ValueError as error:
                problems.add(f"{name}: {error} A layer outside `target_modules` is kept in full.")
        if not layers and not problems:
            problems.add(f"no layer to adapt differs; what differs: {', '.join(full) or 'nothing'}.")
    rest = describe(names, {id(changes.ours[name]) for name in full}, _weights_of(layers))
    adapter, kept = Adapter({}, {}, list(full), base_model=name_of(base), rest=rest), {}
    for name, layer in layers.items():
        weight = changes.theirs[tensor_name(layer, name, "weight")]
        adapter.modules[name], pair, kept[name] = _approximated(layer, weight, r, energy)
        adapter.tensors.update(named(name, pair, adapter_dtype(layer)))
    for name in full:
        adapter.tensors[name] = changes.theirs[name].detach().to("cpu", changes.ours[name].dtype, copy=True)
    return Extracted(sound(adapter, what), kept)


def _approximated(
    layer: LoRALayer, weight: Tensor, r: int | None, energy: float | None
) -> tuple[ModuleAdapter, tuple[Tensor, Tensor], float]:
    """The adapter, A and B that come closest to what `weight` differs by, and the share that they keep."""
    dtype = torch.promote_types(adapter_dtype(layer), weight.dtype)
    difference = weight.detach().to(layer.weight.device, dtype) - layer.weight.detach().to(dtype)
    spectra = [dense_spectrum(matrix) for matrix in layer.lora_weight_blocks(difference)]
    share = shares(spectra)
    q = smallest_rank(share, energy) if energy is not None else min(block_rank(layer, r or 1), len(share))
    module = ModuleAdapter.of(layer).with_scaling_one(layer_rank(layer, q))
    pair = tensors_of(layer, [cut(part, q) for part in spectra])
    return module, pair, float(share[q - 1])


# ---- what differs ----------------------------------------------------------------------------------------------


class _Changes:
    """Which tensors of the base model differ in the fine-tuned one, by the modules that own them."""

    def __init__(self, base: nn.Module, finetuned: nn.Module, names: Names) -> None:
        self.ours, self.theirs = _tensors(base), _tensors(finetuned)
        # A tensor that has several names is one entry here.
        self.known_as = {
            id(group[0].tensor): [without_wrappers(name) for one in group for name in one.names]
            for group in by_tensor(filter(is_persistent, owned_tensors(names)))
        }
        self.changed = {name for name, ours in self.ours.items() if _differs(ours, self.theirs[name])}

    def names_of_tensor(self, name: str) -> list[str]:
        """All names of the tensor that has this one."""
        return self.known_as[id(self.ours[name])]

    def in_full(self, layers: dict[str, LoRALayer]) -> list[str]:
        """The first names of the tensors that differ, and that no layer's adapter changes."""
        adapted = _weights_of(layers)
        return [keys[0] for keys in self.known_as.values() if self.changed & set(keys) and keys[0] not in adapted]

    def problems(self, full: Sequence[str]) -> Iterator[str]:
        """Tensors that are one in the base model, have to be kept in full, and are several in the other."""
        for keys in map(self.names_of_tensor, full):
            if any(_differs(self.theirs[keys[0]], self.theirs[key]) for key in keys):
                yield f"{', '.join(keys)}: one tensor in `base`, and different ones in `finetuned`."


def _layers(
    base: nn.Module,
    names: Names,
    changes: _Changes,
    wanted: tuple[str | Sequence[str] | None, str | Sequence[str] | None, Sequence[str] | None],
    problems: Problems,
) -> dict[str, LoRALayer]:
    """The layers to adapt, by their first names, as LoRA layers that share the base's tensors.

    Args:
        wanted: `target_modules`, `exclude_modules` and `target_parameters`.
    """
    target_modules, excluded, parameters = wanted
    everything = target_modules is None
    config = LoraConfig(
        target_modules=".*" if target_modules is None else target_modules,
        exclude_modules=excluded,
        target_parameters=parameters,
    )
    targets = find_targets(base, names, config, (), problems)
    layers: dict[str, LoRALayer] = {}
    for module in targets:
        name = without_wrappers(names[module][0])
        reason = refusal(base, names[module], module)
        layer = None if reason else _lora_twin(module)
        if layer is not None:
            layers[name] = layer
        elif not everything or isinstance(module, Part):
            problems.add(f"{name}: {reason or 'its update cannot be known from its weight.'}")
    adapted = {tensor_name(module, without_wrappers(name), "weight") for module in targets for name in names[module]}

    def is_to_change(name: str, layer: LoRALayer) -> bool:
        keys = set(changes.names_of_tensor(tensor_name(layer, name, "weight")))
        return bool(changes.changed & keys) and keys <= adapted

    return {name: layer for name, layer in layers.items() if is_to_change(name, layer)}


def _lora_twin(module: nn.Module) -> LoRALayer | None:
    """The module as a LoRA layer, its tensors shared and it itself untouched; None if its kind says too little."""
    kind = kind_for(type(module))
    assert kind is not None, "refusal() has looked"
    if isinstance(module, Part):
        twin: Any = type(module)(_frozen_twin(module.lora_owner), module.lora_parameter)
    else:
        twin = _frozen_twin(module)
    kind, form = kind.lora_configure(twin, splits=None, enable_lora=None, factored=True)
    twin.__class__ = class_for(kind, type(twin))
    twin.lora_add(getattr(module, "groups", 1), **form)  # the least rank that fits
    known = Base.of(twin).kind in _FORMS and twin.lora_not_in_weight() is None
    return twin if known else None


def _frozen_twin(module: nn.Module) -> nn.Module:
    """A module that shares another's attributes, and the values of its parameters, but not these."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {
        own: None if parameter is None else nn.Parameter(parameter.detach(), False)
        for own, parameter in module._parameters.items()
    }
    return twin


def _weights_of(layers: Mapping[str, LoRALayer]) -> set[str]:
    """The full names of the layers' weights."""
    return {tensor_name(layer, name, "weight") for name, layer in layers.items()}


def _mismatches(base: nn.Module, finetuned: nn.Module) -> Iterator[str]:
    """What keeps two models from being compared tensor by tensor."""
    for what, model in (("base", base), ("finetuned", finetuned)):
        layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
        if layers:
            first = ", after `bank.keep(name)`" if any(layer.lora_seats for layer in layers) else " first"
            yield f"`{what}` has LoRA layers; merge or eject them{first}."
    ours, theirs = _tensors(base), _tensors(finetuned)
    yield from (f"{name} is missing in `finetuned`." for name in ours if name not in theirs)
    yield from (f"{name} is missing in `base`." for name in theirs if name not in ours)
    for name in (name for name in ours if name in theirs):
        a, b = ours[name], theirs[name]
        wrong = [what for what, tensor in (("base", a), ("finetuned", b)) if not _has_values(tensor)]
        if wrong:
            yield f"{name} must be a dense tensor with values in `{'` and `'.join(wrong)}`."
        elif a.shape != b.shape:
            yield f"{name} must have one shape in both, got {tuple(a.shape)} and {tuple(b.shape)}."
        elif _differs(a, b) and not all(bool(tensor.isfinite().all()) for tensor in (a, b)):
            yield f"{name} differs, and holds NaN or infinity."


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under all their names."""
    owned = filter(is_persistent, owned_tensors(names_of(model)))
    return {without_wrappers(name): one.tensor for one in owned for name in one.names}


def _has_values(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta


def _differs(a: Tensor, b: Tensor) -> bool:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return not torch.equal(a.detach().to(dtype), b.detach().to(a.device, dtype))
