"""How a layer with LoRA is divided among the ranks of a mesh: what can be, its tensors, and its state dict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_module, distribute_tensor

from lora.errors import raise_all
from lora.layers import weights
from lora.layers.embedding import EmbeddingLoRA
from lora.layers.layer import LoRALayer
from lora.layers.registry import class_for
from lora.parallel.dtensor import in_model_order, in_rank_order
from lora.parallel.local import LocalForward, TensorParallel


def is_adapted(module: nn.Module) -> bool:
    """Whether the module is a layer with LoRA."""
    return isinstance(module, LoRALayer) and module.r > 0


def local_forward(layer: Any, table: Mapping[type[LoRALayer], type[LocalForward]], mesh: DeviceMesh) -> LocalForward:
    """What each rank is to do with the layer; ValueError with all that keeps the layer from being divided so."""
    kinds = [kind for kind in table if isinstance(layer, kind)]
    sums = bool(kinds) and table[kinds[0]].sums
    raise_all(f"this {type(layer).__name__} is not divided among ranks", _problems(layer, bool(kinds), sums, mesh))
    return table[kinds[0]](mesh)


def _problems(layer: Any, known: bool, sums: bool, mesh: DeviceMesh) -> Iterator[str]:
    if mesh.ndim != 1:
        yield f"the mesh must have one dimension, got {mesh.ndim}: pass a part of it, `mesh['tp']` say."
    if not known:
        yield "linear layers and embeddings can be."
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        yield "it is sharded already; tensor parallelism comes first, then `fully_shard`."
    if not layer.dense or weights.packing_of(layer) is not None:
        yield f"its weight, a {type(layer.weight).__name__}, is packed, or its forward is not its base class's."
    if layer.lora_start is not None or layer.awaits:
        yield f"it starts from its base weight or from data (`init_lora_weights={layer.init_lora_weights!r}`)."
    if isinstance(layer, EmbeddingLoRA) and layer.sparse:
        yield "`sparse` gradients are not divided."
    if isinstance(layer, EmbeddingLoRA) and (layer.max_norm is not None or (sums and layer.use_dora)):
        yield "`max_norm`, and `use_dora` where the vocabulary is divided, need whole columns or rows."


def divide(style: Any, layer: Any, local: LocalForward, layout: tuple[Placement, ...]) -> nn.Module:
    """Divide the layer's tensors, and let it take and give what the style says."""
    for own, parameter in layer._parameters.items():
        if parameter is not None:
            source = getattr(style, "src_data_rank", 0)
            if source is None and own.startswith("lora_"):  # weights may be alike already; adapters start at random
                source = 0
            placements = [local.placement(layer, own)]
            whole = distribute_tensor(parameter.detach(), local.mesh, placements, src_data_rank=source)
            setattr(layer, own, nn.Parameter(whole, parameter.requires_grad))
    layer.__class__ = class_for(TensorParallel, type(layer))
    layer.lora_local = local
    return distribute_module(
        layer,
        local.mesh,
        None,
        partial(style._prepare_input_fn, style.input_layouts, layout),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )


def in_order_of_output(output: Tensor, splits: tuple[int, ...], ranks: int) -> Tensor:
    """(..., out_features) in the model's order, from that of the ranks."""
    by_rank = [torch.split(part, [size // ranks for size in splits], -1) for part in output.chunk(ranks, -1)]
    return torch.cat([part for split in zip(*by_rank, strict=True) for part in split], -1)


def state_in_model_order(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """A state dict hook: a divided fused projection's rows as the model has them."""
    _reorder(module, state, prefix, in_model_order)


def state_in_rank_order(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """A hook for what is loaded: rows as the module keeps them."""
    _reorder(module, state, prefix, in_rank_order)


@torch.no_grad()
def _reorder(
    module: nn.Module, state: dict[str, Any], prefix: str, order: Callable[[nn.Module, str, Tensor], Tensor]
) -> None:
    for own in module._parameters:
        name = f"{prefix}{own}"
        # A state dict of parameters themselves, not of their values, has them as they are.
        if name in state and not isinstance(state[name], nn.Parameter):
            state[name] = order(module, own, state[name])
