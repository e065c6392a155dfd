"""Tensor parallelism: styles for the plans of torch's `parallelize_module`, that know of LoRA.

They are torch's own styles, by the same names and arguments, and do what those do with layers without LoRA. In a layer
with LoRA they divide the adapter as the base weight is divided: forward and backward need the base layer's collectives,
and no others.

    import lora.parallel
    from torch.distributed.tensor.parallel import parallelize_module

    lora.inject(model, …)  # first
    parallelize_module(model, mesh, {"up": lora.parallel.ColwiseParallel(), "down": lora.parallel.RowwiseParallel()})
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel as _Colwise
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.parallel import RowwiseParallel as _Rowwise

from lora.errors import instance, raise_all, some
from lora.layers import weights
from lora.layers.embedding import EmbeddingLoRA
from lora.layers.layer import LoRALayer
from lora.layers.linear import LinearLoRA, MergedLinearLoRA
from lora.layers.registry import class_for
from lora.layers.undo import undo_on_error
from lora.models.model import by_tensor, names_of, owned_tensors, without_wrappers
from lora.parallel.dtensor import dim_of_rows, in_model_order, in_rank_order
from lora.parallel.forward import (
    ColwiseEmbedding,
    ColwiseLinear,
    LocalForward,
    RowwiseEmbedding,
    RowwiseLinear,
    TensorParallel,
)

__all__ = [
    "ColwiseParallel",
    "MergedColwiseParallel",
    "RowwiseParallel",
    "clip_grad_norm_",
    "plan_of",
    "sum_gradients",
]


class ColwiseParallel(_Colwise):
    """Divides a layer's outputs among ranks: W and B by their rows, A on every rank.

        y_l = x W_lᵀ + b_l + s · (drop(x) Aᵀ) B_lᵀ

    An embedding's dimensions are divided: its weight by columns. Magnitudes (DoRA) are divided as the outputs.
    Gradients of A are parts of a sum until they are used (`sum_gradients`). Layers without LoRA are torch's style's.

    Args:
        input_layouts, output_layouts, use_local_output: as in torch's `ColwiseParallel`.

    Raises:
        ValueError: when it is applied to a `MergedLinear` (that needs `MergedColwiseParallel`), or to a layer that is
            quantised, sharded already, or started from its base weight or awaits data.

    From "Megatron-LM", arXiv:1909.08053, section 3.

    >>> import lora.parallel
    >>> plan = {"attention.wq": lora.parallel.ColwiseParallel(), "attention.wo": lora.parallel.RowwiseParallel()}
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not is_adapted(module):
            return super()._apply(module, device_mesh)
        if isinstance(module, MergedLinearLoRA):
            raise ValueError("a MergedLinear is divided split by split: use `lora.parallel.MergedColwiseParallel`.")
        local = local_forward(module, {LinearLoRA: ColwiseLinear, EmbeddingLoRA: ColwiseEmbedding}, device_mesh)
        return divide(self, module, local, (Replicate(),))


class RowwiseParallel(_Rowwise):
    """Divides a layer's inputs among ranks: W and A by their columns, B on every rank.

        y = Σ_l x_l W_lᵀ + s · (drop(x_l) A_lᵀ) Bᵀ + b

    An embedding's vocabulary is divided: its weight by rows, A and B on every rank. With DoRA a forward costs one more
    reduction, of the squared norms. Gradients of what every rank has are parts of a sum until they are used
    (`sum_gradients`). Layers without LoRA are torch's style's.

    Args:
        input_layouts, output_layouts, use_local_output: as in torch's `RowwiseParallel`.

    Raises:
        ValueError: when it is applied to a layer that is quantised, sharded already, or started from its base weight
            or awaits data, or to an embedding with DoRA.

    From "Megatron-LM", arXiv:1909.08053, section 3.

    >>> import lora.parallel
    >>> lora.parallel.RowwiseParallel(use_local_output=False).use_local_output
    False
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not is_adapted(module):
            return super()._apply(module, device_mesh)
        local = local_forward(module, {LinearLoRA: RowwiseLinear, EmbeddingLoRA: RowwiseEmbedding}, device_mesh)
        ids = isinstance(module, EmbeddingLoRA)
        self.desired_input_layouts = (Replicate() if ids else Shard(-1),)
        return divide(self, module, local, self.desired_input_layouts)


class MergedColwiseParallel(_Colwise):
    """Divides every split of a fused projection among ranks by itself, so that each has its share of q, of k and of v.

    A rank's output is (its part of q, of k, of v) side by side, as of a smaller fused projection: attention goes on
    with the rank's own heads. With `output_layouts=Replicate()` it is the whole output in the model's order. The
    weight's rows are kept in the ranks' order; `state_dict`, `load_state_dict` and `lora.save_adapter` have them in the
    model's, for which all ranks have to call `state_dict()`. (An optimizer's state stays in the ranks' order.)

    Args:
        splits: sizes of the splits, for layers that do not say theirs: `nn.Linear`, `lora.Linear`. Default: None, those
            of the `lora.MergedLinear`.
        input_layouts, output_layouts, use_local_output: as in torch's `ColwiseParallel`.

    Raises:
        ValueError: when it is applied to a layer whose splits are not known, do not add up to its outputs, or cannot be
            divided by the number of ranks; or as `ColwiseParallel` raises it. `use_local_output=False` with a divided
            output, which would be a DTensor in the ranks' order.

    From "Megatron-LM", arXiv:1909.08053, section 3.

    >>> import lora.parallel
    >>> plan = {"attention.qkv": lora.parallel.MergedColwiseParallel()}
    """

    def __init__(
        self,
        splits: Sequence[int] | None = None,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(input_layouts=input_layouts, output_layouts=output_layouts, use_local_output=use_local_output)
        self.splits = None if splits is None else tuple(splits)
        if not use_local_output and isinstance(self.output_layouts[0], Shard):
            raise ValueError("`use_local_output=False` needs `output_layouts=Replicate()`: parts are in ranks' order.")

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, (nn.Linear, LinearLoRA)):
            raise ValueError(f"`MergedColwiseParallel` is for linear layers, not for {instance(module)}.")
        splits = self._splits_of(module, device_mesh.size())
        local = local_forward(module, {LinearLoRA: ColwiseLinear}, device_mesh) if is_adapted(module) else None
        with undo_on_error([module]) as undo, undo:
            vars(module)["divided_splits"] = (splits, device_mesh.size())
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    ordered = in_rank_order(module, own, parameter.detach())
                    setattr(module, own, nn.Parameter(ordered, parameter.requires_grad))
            module.register_state_dict_post_hook(state_in_model_order)  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(state_in_rank_order)  # type: ignore[no-untyped-call]
            if local is None:
                super()._apply(module, device_mesh)
            else:
                divide(self, module, local, (Replicate(),))
        return module

    def _splits_of(self, module: Any, ranks: int) -> tuple[int, ...]:
        splits = tuple(getattr(module, "splits", ()) or self.splits or ())
        outputs = module.weight.shape[dim_of_rows(module, "weight")]
        if not splits:
            raise ValueError(f"{instance(module)} does not say how it is split; give `splits`.")
        if self.splits not in (None, splits):
            raise ValueError(f"`splits` (={self.splits}) disagrees with the layer's own splits (={splits}).")
        if sum(splits) != outputs:
            raise ValueError(f"`splits` (={splits}) must add up to `out_features` (={outputs}).")
        if any(size % ranks for size in splits):
            raise ValueError(f"each of the `splits` (={splits}) must be divisible by the number of ranks (={ranks}).")
        return splits

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: Any, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        gathered = not output_layouts[0].is_shard(-1) and not output_layouts[0].is_shard(outputs.dim() - 1)
        prepare: Any = _Colwise._prepare_output_fn
        output = prepare(output_layouts, use_local_output or gathered, mod, outputs, device_mesh)
        if not gathered:
            return output
        output = in_order_of_output(output, *mod.divided_splits)
        return output if use_local_output else DTensor.from_local(output, device_mesh, output_layouts, run_check=False)


# ---- dividing one layer -----------------------------------------------------------------------------------------


def is_adapted(module: nn.Module) -> bool:
    """Whether the module is a layer with LoRA."""
    return isinstance(module, LoRALayer) and module.r > 0


def local_forward(layer: Any, table: Mapping[type[LoRALayer], type[LocalForward]], mesh: DeviceMesh) -> LocalForward:
    """What each rank is to do with the layer; ValueError with all that keeps the layer from being divided so."""
    kinds = [kind for kind in table if isinstance(layer, kind)]
    sums = bool(kinds) and table[kinds[0]].sums
    raise_all(
        f"tensor parallelism: this {type(layer).__name__} was not divided among ranks",
        _problems(layer, bool(kinds), sums, mesh),
    )
    return table[kinds[0]](type(layer), mesh)


def _problems(layer: Any, known: bool, sums: bool, mesh: DeviceMesh) -> Iterator[str]:
    if mesh.ndim != 1:
        yield f"the mesh must have one dimension, got {mesh.ndim}: pass a part of it, `mesh['tp']` say."
    if layer.lora_seats:
        names = some(layer.lora_seats, len(layer.lora_seats))
        yield (
            f"it has a bank of adapters ({names}), which are not divided; leave one in the model, `bank.keep(name)`, "
            "or shard it by `fully_shard`."
        )
    if not known:
        yield "only linear layers and embeddings can be tensor-parallel."
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        yield "it is sharded already; tensor parallelism comes first, then `fully_shard`."
    if not layer.lora_dense or weights.packing_of(layer) is not None:
        yield f"its weight, {instance(layer.weight)}, is packed, or its forward is not its base class's."
    if layer.lora_start is not None or layer.lora_needs_data:
        yield f"it starts from its base weight or from data (`init_lora_weights={layer.init_lora_weights!r}`)."
    if isinstance(layer, EmbeddingLoRA) and layer.sparse:
        yield "`sparse` gradients are not divided."
    if isinstance(layer, EmbeddingLoRA) and (layer.max_norm is not None or (sums and layer.use_dora)):
        yield "`max_norm`, and `use_dora` where the vocabulary is divided, need whole columns or rows."


def divide(style: Any, layer: Any, local: LocalForward, layout: tuple[Placement, ...]) -> nn.Module:
    """Divide the layer's tensors, and let it take and give what the style says."""
    with undo_on_error([layer]) as undo, undo:
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


# ---- plans in transformers' words -------------------------------------------------------------------------------

# transformers' words for the styles of a plan: a style for the layer, whose splits it may know.
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": lambda: ColwiseParallel(),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": lambda: RowwiseParallel(),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
}
# What every rank has whole: of no concern while nothing in it trains.
_WHOLE = ("replicate", "replicated_with_grad_allreduce")


def plan_of(model: nn.Module, plan: Mapping[str, str] | None = None) -> dict[str, ParallelStyle]:
    """A plan for `parallelize_module` from one in transformers' words, such as "colwise_gather_output".

    A `lora.MergedLinear` gets `MergedColwiseParallel`; what has no LoRA is divided as the plan says.

    Args:
        model: the model, with LoRA.
        plan: styles by names of modules, in which `*` stands for any layer's number. Default: None, `model.tp_plan`.

    Returns:
        Styles by modules' names.

    Raises:
        ValueError: there is no plan, a name matches no module, a word is not known, or a tied weight that trains would
            come apart; all are listed.

    >>> import torch, lora, lora.parallel
    >>> model = torch.nn.ModuleDict({"up": lora.Linear(4, 8, r=2), "down": lora.Linear(8, 4, r=2)})
    >>> lora.parallel.plan_of(model, {"up": "colwise", "down": "rowwise"})["down"]
    RowwiseParallel(input_layouts=(Shard(dim=-1),), output_layouts=(Replicate(),), use_local_output=True)
    """
    words: Mapping[str, str] = getattr(model, "tp_plan", None) or {} if plan is None else plan
    modules, styles = dict(model.named_modules()), dict[str, ParallelStyle]()
    known: dict[str, list[str]] = {}
    for name in modules:
        known.setdefault(without_wrappers(name), []).append(name)
    problems = [] if words else [f"there is no plan for this {type(model).__name__}; give one as `plan`."]
    for pattern, word in words.items():
        names = known.get(pattern, []) if "*" not in pattern else _matching(pattern, known)
        trained = [name for name in names for p in modules[name].parameters() if p.requires_grad]
        if not names:
            problems.append(f"{pattern}: matches no module.")
        elif word in _WHOLE and trained:
            problems.append(f"{pattern}: is {word!r}, and {trained[0]} trains; its gradients would not be added up.")
        elif word not in _STYLES and word not in _WHOLE:
            problems.append(f"{pattern}: no style is called {word!r}; known are {', '.join(map(repr, _STYLES))}.")
        elif word in _STYLES:
            styles |= {name: _style_for(modules[name], word) for name in names}
    raise_all("plan_of: no plan was made", [*problems, *_coming_apart(model, styles)])
    return styles


def _matching(pattern: str, known: Mapping[str, Sequence[str]]) -> list[str]:
    """The modules whose names match a pattern, in which `*` stands for any layer's number."""
    expression = re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
    return [name for bare, names in known.items() if expression.fullmatch(bare) for name in names]


def _coming_apart(model: nn.Module, styles: Mapping[str, ParallelStyle]) -> Iterator[str]:
    """Trained parameters with several owners, which the plan would make several parameters."""
    for group in by_tensor(owned_tensors(names_of(model))):
        names = [one.names[0] for one in group]
        trains = isinstance(group[0].tensor, nn.Parameter) and group[0].tensor.requires_grad
        if len(names) > 1 and trains and any(name.rpartition(".")[0] in styles for name in names):
            together = " and ".join(names)
            yield f"{together} are one tied, trainable parameter; this plan would split it into separate ones."


def _style_for(module: nn.Module, word: str) -> ParallelStyle:
    style = _STYLES[word]()
    if isinstance(module, MergedLinearLoRA) and isinstance(style, ColwiseParallel):
        return MergedColwiseParallel(output_layouts=style.output_layouts[0])
    return style


# ---- gradients of which each rank has a part --------------------------------------------------------------------


@torch.no_grad()
def sum_gradients(model: nn.Module) -> None:
    """Add up the gradients of which each rank has a part, in one reduction for each mesh.

    Without it torch adds up one after the other where they are used: in `clip_grad_norm_`, and again in the optimizer.

    Args:
        model: a model with tensor-parallel layers, after the last backward of a step; all ranks call.

    >>> import torch, lora, lora.parallel
    >>> lora.parallel.sum_gradients(torch.nn.Sequential(lora.Linear(4, 2, r=1)))  # nothing is divided: nothing to add
    """
    meshes: dict[tuple[DeviceMesh, int, torch.dtype], list[Any]] = {}
    for parameter in model.parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            for dim, placement in enumerate(gradient.placements):
                if placement.is_partial():
                    meshes.setdefault((gradient.device_mesh, dim, gradient.dtype), []).append(parameter)
    for (mesh, dim, _), parameters in meshes.items():
        parts = [parameter.grad.to_local() for parameter in parameters]
        summed = torch.cat([part.reshape(-1) for part in parts])
        torch.distributed.all_reduce(summed, group=mesh.get_group(dim))
        for parameter, part, piece in zip(
            parameters, parts, torch.split(summed, [part.numel() for part in parts]), strict=True
        ):
            placements = [Replicate() if n == dim else p for n, p in enumerate(parameter.grad.placements)]
            sizes = {"shape": parameter.shape, "stride": parameter.stride()}
            parameter.grad = DTensor.from_local(piece.view_as(part), mesh, placements, run_check=False, **sizes)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to a norm of at most `max_norm`, taken over all of the model.

    torch's own takes no model in which some gradients are divided among ranks and others are not. Adds up first what
    ranks have parts of (`sum_gradients`).

    Args:
        model: a model with tensor-parallel layers, and others; all ranks call.
        max_norm: the largest norm.

    Returns:
        The norm before, a tensor without dimensions, the same on all ranks.

    >>> import torch, lora, lora.parallel
    >>> model = torch.nn.Sequential(lora.Linear(4, 2, r=1))
    >>> model[0].lora_B.grad = torch.full((2, 1), 3.0)
    >>> lora.parallel.clip_grad_norm_(model, 1.0), model[0].lora_B.grad.norm().round(decimals=4)
    (tensor(4.2426), tensor(1.))
    """
    sum_gradients(model)
    by_mesh: dict[DeviceMesh | None, list[Any]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    norms = [nn.utils.get_total_norm([parameter.grad for parameter in group]) for group in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.tensor(0.0)
    for group in by_mesh.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total
