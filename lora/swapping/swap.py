"""Room for other adapters in a model: any of them, of whatever rank, without compiling again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lora.adapters.adapter import Adapter
from lora.adapters.single import Form, with_rank
from lora.errors import join, raise_all
from lora.layers.layer import LoRALayer
from lora.models.blocks import block_rank, blocks_of, layer_rank, padded, tensors_of
from lora.models.model import lora_layers, names_of, sharded_problems
from lora.swapping import switch


def prepare_for_swap(model: nn.Module, max_r: int) -> None:
    """Make room for adapters of up to `max_r` in a model, so that it is compiled once for all of them.

    Fills A and B of every layer up with zeros, to rank `max_r`, which changes nothing that the model computes: what is
    zero stays zero in training. `lora.load_adapter` then takes adapters of any rank up to `max_r`, and
    `lora.save_adapter` writes the one that is there at its own rank. Under `torch.compile` a layer reads its scaling,
    and whether it is enabled, from a tensor:

        y = W₀ x + b + where(on, s · B A drop(x), 0)

    so that nothing is compiled again when an adapter is swapped, when `layer.scaling` is set, or in `lora.disabled`.
    Without it the model computes as before, with larger A and B.

    State dicts have the same keys, with A and B of rank `max_r`. The Parameter objects stay; an optimizer that has
    seen them at their old size has to be made anew, and so has one that has trained another adapter: its momentum would
    move what is zero. While a compiled model is disabled, gradients of A and B are zeros, not None. Prepare first, then
    wrap, shard and compile.

    Args:
        model: a model with LoRA layers. It may have been prepared before, for a smaller rank.
        max_r: the rank to make room for; factored convolutions whose groups do not divide it get the next one that
            they divide.

    Raises:
        TypeError: `max_r` is not an integer.
        ValueError: there is no LoRA layer, `max_r` is below the rank of one, its parameters are sharded, it waits for
            data, started as a part of its base weight (PiSSA and the like), or is of a user's kind with a
            `lora_forward` of its own. One error lists all, and the model is as it was.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(lora.Linear(8, 4, r=2), lora.Linear(4, 4, r=3))
    >>> lora.prepare_for_swap(model, max_r=8)
    >>> model[0].lora_A.shape, model[0]
    (torch.Size([8, 8]), Linear(in_features=8, out_features=4, bias=True, r=8, lora_alpha=4, ...padded_from=(2, 1)))
    >>> other = torch.nn.Sequential(lora.Linear(8, 4, r=5), lora.Linear(4, 4, r=1))
    >>> lora.load_adapter(model, lora.adapter_of(other), check_base=False)
    >>> [settings["r"] for settings in lora.adapter_of(model).modules.values()]
    [5, 1]
    """
    if not isinstance(max_r, int) or isinstance(max_r, bool):
        raise TypeError(f"`max_r` must be an integer, got {max_r!r}.")
    layers = [layer for layer in lora_layers(model, "prepare_for_swap") if layer.r > 0]
    names = names_of(model)
    problems = [f"{names[m][0] or 'the model'}: {problem}" for m in names for problem in _problems(m, max_r)]
    problems += sharded_problems(layers, names, "prepare the model, then shard it")
    if not layers:
        problems.append("no LoRA layer has a rank above 0.")
    raise_all("prepare_for_swap: nothing was changed", problems)
    grown = [_with_room_for(layer, max_r) for layer in layers]  # all that may fail, before anything is changed
    for layer, larger in zip(layers, grown, strict=True):
        layer.padded_from = layer.padded_from or (layer.r, layer.lora_alpha)
        layer.r, layer.lora_alpha = larger.r, larger.lora_alpha
        for parameter, value, grad in zip((layer.lora_A, layer.lora_B), larger.values, larger.grads, strict=True):
            has_grad, parameter.grad = parameter.grad is not None, None
            with torch.inference_mode(parameter.is_inference()):
                parameter.data = value.clone() if parameter.is_inference() else value
            parameter.grad = grad if has_grad else None
        switch.add(layer)


def _problems(module: nn.Module, max_r: int) -> Iterator[str]:
    """Why a module cannot be prepared, or has to be later."""
    if isinstance(module, DistributedDataParallel):
        yield "is wrapped in DistributedDataParallel, which knows the sizes of its parameters; prepare, then wrap."
    if not isinstance(module, LoRALayer) or module.r == 0:
        return
    taken = [name for name in switch.NAMES if module.padded_from is None and hasattr(module, name)]
    if taken:
        yield f"has tensors of its own by names that are needed: {', '.join(taken)}."
    if module.lora_start is not None:
        yield (
            "its adapter started as a part of its base weight, without which it would be another model's; save it "
            "with `lora.save_adapter`, and load it into the plain base model."
        )
    if module.awaits:
        yield f"waits for data (`init_lora_weights={module.awaits!r}`); call `lora.calibrate` first."
    if module.r > max_r:
        yield f"`max_r` (={max_r}) must be at least its rank, {module.r}."
    owner = next(cls for cls in type(module).__mro__ if "lora_forward" in vars(cls))
    if owner.__module__.partition(".")[0] != "lora":
        yield f"its kind has a `lora_forward` of its own ({owner.__name__}), which may take the scaling for a constant."
    try:
        module.block_rows()
    except ValueError as error:
        yield str(error)


# ---- between an adapter's own rank and that of a layer which has room for it -------------------------------------


class _Larger(NamedTuple):
    """What a layer with room has in the place of what it had. Gradients that there are not yet are anything."""

    r: int
    lora_alpha: float
    values: tuple[Tensor, Tensor]
    grads: tuple[Tensor, Tensor]


def _with_room_for(layer: LoRALayer, max_r: int) -> _Larger:
    A, B = layer.lora_A, layer.lora_B
    q = -(-max_r * B.shape[1] // layer.r)
    r = layer_rank(layer, q)
    settings = with_rank({"scaling": layer.scaling, "use_rslora": layer.use_rslora}, r)
    dA, dB = (factor if factor.grad is None else factor.grad for factor in (A, B))
    return _Larger(r, settings["lora_alpha"], _at(layer, A, B, q), _at(layer, dA, dB, q))


def with_room(adapter: Adapter, modules: Mapping[str, nn.Module]) -> Adapter:
    """The adapter at the ranks of a model's layers, where these are prepared for swaps and have room for it."""
    changed, tensors = dict(adapter.modules), dict(adapter.tensors)
    for name, settings in adapter.modules.items():
        layer = modules.get(name)
        if not isinstance(layer, LoRALayer) or layer.padded_from is None:
            continue
        A, B = adapter.pair(name)
        changed[name] = {**settings, "padded_from": (settings["r"], settings["lora_alpha"])}
        if _is_smaller(layer, settings["r"], A, B):
            changed[name] |= {key: with_rank(settings, layer.r)[key] for key in ("r", "lora_alpha")}
            A, B = _at(layer, A, B, layer.lora_B.shape[1])
            tensors |= {join(name, "lora_A"): A, join(name, "lora_B"): B}
    return replace(adapter, modules=changed, tensors=tensors)


def _is_smaller(layer: LoRALayer, r: int, A: Tensor, B: Tensor) -> bool:
    """Whether these are an A and a B of the layer's form, at a smaller rank."""
    shapes = (r * layer.lora_A.shape[0], layer.lora_A.shape[1:]), (r * layer.lora_B.shape[1], layer.lora_B.shape[2:])
    ours = (A.shape[0] * layer.r, A.shape[1:]), (B.dim() > 1 and B.shape[1] * layer.r, B.shape[2:])
    return r < layer.r and ours == shapes and B.shape[0] == layer.lora_B.shape[0]


def check_rank(layer: LoRALayer, r: int) -> None:
    """ValueError if a layer that is prepared for swaps has no room for an adapter of this rank."""
    if layer.padded_from is not None and r > layer.r:
        raise ValueError(switch.NO_ROOM.format(r, layer.r))


def without_room(layer: LoRALayer, settings: dict[str, Any], A: Tensor, B: Tensor) -> Form:
    """Settings, A and B of a layer that is prepared for swaps at the rank of its adapter, if no more of it is used."""
    assert layer.padded_from is not None, "asked of layers that are prepared"
    r, lora_alpha = layer.padded_from
    q = block_rank(layer, r)
    if any(bool(factor.any()) for B_g, A_g in blocks_of(layer, A, B) for factor in (B_g[:, q:], A_g[q:])):
        return settings, A, B
    return {**settings, "r": r, "lora_alpha": lora_alpha}, *_at(layer, A, B, q)


@torch.inference_mode(False)
@torch.no_grad()
def _at(layer: LoRALayer, A: Tensor, B: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """A and B whose blocks have the rank `q`: filled up with zeros, or cut; new memory."""
    pairs = [(B[:, :q], A[:q]) for B, A in blocks_of(layer, A, B)]
    return tensors_of(layer, [padded(B, A, q) for B, A in pairs])
