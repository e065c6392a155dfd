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
from typing import Any

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel as _Colwise
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.parallel import RowwiseParallel as _Rowwise

from lora.errors import raise_all
from lora.layers.embedding import EmbeddingLoRA
from lora.layers.linear import LinearLoRA, MergedLinearLoRA
from lora.models.model import by_tensor, names_of, owned_tensors, without_wrappers
from lora.parallel.dividing import (
    divide,
    in_order_of_output,
    is_adapted,
    local_forward,
    state_in_model_order,
    state_in_rank_order,
)
from lora.parallel.dtensor import dim_of_rows, in_rank_order
from lora.parallel.gradients import clip_grad_norm_, sum_gradients
from lora.parallel.local import ColwiseEmbedding, ColwiseLinear, RowwiseEmbedding, RowwiseLinear

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
            raise ValueError(f"`MergedColwiseParallel` is for linear layers, not for a {type(module).__name__}.")
        splits = self._splits_of(module, device_mesh.size())
        local = local_forward(module, {LinearLoRA: ColwiseLinear}, device_mesh) if is_adapted(module) else None
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
            raise ValueError(f"a {type(module).__name__} does not say how it is split; give `splits`.")
        if self.splits not in (None, splits):
            raise ValueError(f"`splits` (={self.splits}) are {splits} in the layer.")
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
    problems = [] if words else [f"there is no plan for this {type(model).__name__}; give one as `plan`."]
    for pattern, word in words.items():
        expression = re.escape(pattern).replace(r"\*", "[^.]+")
        names = [name for name in modules if re.fullmatch(expression, without_wrappers(name))]
        trained = [name for name in names for p in modules[name].parameters() if p.requires_grad]
        if not names:
            problems.append(f"{pattern}: matches no module.")
        elif word in _WHOLE and trained:
            problems.append(f"{pattern}: is {word!r}, and {trained[0]} trains; its gradients would not be added up.")
        elif word not in _STYLES and word not in _WHOLE:
            problems.append(f"{pattern}: no style is called {word!r}; known are {', '.join(map(repr, _STYLES))}.")
        elif word in _STYLES:
            styles |= {name: _style_for(modules[name], word) for name in names}
    raise_all("plan_of cannot make a plan", [*problems, *_coming_apart(model, styles)])
    return styles


def _coming_apart(model: nn.Module, styles: Mapping[str, ParallelStyle]) -> Iterator[str]:
    """Trained parameters with several owners, which the plan would make several parameters."""
    for group in by_tensor(owned_tensors(names_of(model))):
        names = [one.names[0] for one in group]
        trains = isinstance(group[0].tensor, nn.Parameter) and group[0].tensor.requires_grad
        if len(names) > 1 and trains and any(name.rpartition(".")[0] in styles for name in names):
            yield f"{', '.join(names)}: is one parameter, which trains, and would be several."


def _style_for(module: nn.Module, word: str) -> ParallelStyle:
    style = _STYLES[word]()
    if isinstance(module, MergedLinearLoRA) and isinstance(style, ColwiseParallel):
        return MergedColwiseParallel(output_layouts=style.output_layouts[0])
    return style
