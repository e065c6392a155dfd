"""Put LoRA into a model's layers and take it out again: always in place."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from lora.errors import Problems, some, table, with_article
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.layers.parts import Part, enter_part
from lora.layers.registry import Kind, adapted_class, class_for, kind_for
from lora.layers.undo import undo_on_error
from lora.layers.weights import is_writable
from lora.models.config import LoraConfig, Settings, check_saved, find_saved, find_targets, patterns_of
from lora.models.model import (
    Memory,
    Names,
    forget_children,
    initialized_parameters,
    lora_layers,
    names_of,
    obstacles,
    owned_tensors,
    remember_layers,
    remember_values,
    sharded_problems,
)
from lora.models.parameters import check_dropout, known_by
from lora.models.patterns import Patterns
from lora.models.readers import let_read, let_read_no_more, read_as_tensors
from lora.models.refusals import own_forward_problems, unfit, unreached, why_alone, why_not_yet
from lora.models.start import begin, give_back, is_kept_apart, problems_of_start
from lora.models.training import (
    forget_originals,
    has_moved,
    let_train,
    originals,
    resized_problems,
    train_in_full,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module: its names in the model, and its adapter."""

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    r: int
    scaling: float
    parameters: int
    tied_to: tuple[str, ...] = ()


@dataclass(frozen=True)
class InjectionReport:
    """What `lora.inject` did: a row for each module, and how much of the model trains.

    Attributes:
        modules: the adapted modules, in the model's order.
        trainable: number of parameters that train.
        total: number of all parameters.
        saved_in_full: names of the modules that train in full.
        left_out: linear layers that "all-linear" left alone, by name, each with the reason.
        unreached: matrices, and stacks of them, that are in no linear layer (a mixture's experts), with their sizes.
    """

    modules: tuple[AdaptedModule, ...]
    trainable: int
    total: int
    saved_in_full: tuple[str, ...] = field(default=())
    left_out: Mapping[str, str] = field(default_factory=dict)
    unreached: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [
            (m.names[0], m.kind, " × ".join(map(str, m.shape)), m.r, f"{m.scaling:g}", m.parameters)
            for m in self.modules
        ]
        lines = [table(("module", "kind", "weight", "r", "scaling", "parameters"), rows)]
        for m in self.modules:
            if m.names[1:]:
                lines.append(f"{m.names[0]} is one module with {', '.join(m.names[1:])}: they share the adapter.")
            if m.tied_to:
                lines.append(
                    f"{m.names[0]}.weight is tied to {some(m.tied_to, len(m.tied_to))}, which the adapter leaves alone."
                )
        if self.saved_in_full:
            lines.append(f"trained in full: {', '.join(self.saved_in_full)}")
        lines += [f"left out: {name} {reason}" for name, reason in self.left_out.items()]
        if self.unreached:
            alike = Counter(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in self.unreached)
            listed = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in alike.items())
            share = 100 * sum(self.unreached.values()) / max(self.total, 1)
            lines.append(f"not in a linear layer, and so not reached: {share:.1f} % of the parameters, in {listed}")
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"trainable: {self.trainable:,} of {self.total:,} parameters ({share:.2f} %)")
        return "\n".join(lines)


_NO_DROPOUT = "its parent may pass its weight to a kernel, which cannot drop inputs; adapt it with `lora_dropout=0`."


@dataclass(frozen=True)
class Adaptation:
    """One module and the adapter that it is to get."""

    module: nn.Module
    kind: Kind
    settings: dict[str, Any]


def inject(model: nn.Module, config: LoraConfig | None = None, **settings: Unpack[Settings]) -> InjectionReport:
    """Put LoRA into a model's layers, in place, and freeze everything else.

    Module objects, Parameter objects, hooks, tied weights, devices, dtypes and training flags stay the same. The model
    computes what it did before until it is trained.

    Resize a vocabulary (transformers' `resize_token_embeddings`) before this, if at all. Afterwards, an adapted
    embedding and heads tied to it follow: added ids have no update, and the updates of removed ids go. Parameter
    objects stay, but gradients are dropped, and an optimizer must be made anew, since its state has the old shapes.
    DoRA's magnitudes of an embedding follow only when ids are added. A head that is not tied is replaced, and loses its
    LoRA: saving, merging and `lora.disabled` then raise, and name it. They do so for every layer that was replaced by
    one without LoRA, except children of `nn.Sequential` and `nn.ModuleList`.

    Args:
        model: any module. Known kinds of layer are nn.Linear, nn.Embedding, nn.Conv1d, 2d and 3d, transformers' Conv1D,
            their subclasses, and what `lora.register` added.
        config: what to adapt and how.
        **settings: the fields of a `LoraConfig`, instead of `config`.

    Returns:
        A report that prints as a table: module, kind, weight, r, scaling, parameters, and the trainable share. With
        "all-linear" it names what was left out, with the reason, and what share of the model is in no linear layer.

    Raises:
        TypeError: both `config` and settings are given, or neither.
        ValueError: a name or pattern matches nothing; a module has LoRA already or cannot have it; its parent bypasses
            its forward; settings do not fit it; or the model is wrapped in DistributedDataParallel already. One error
            lists everything, and the model is as it was.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> print(lora.inject(model, target_modules=["0"], r=2, lora_alpha=4))
    module  kind    weight  r  scaling  parameters
    0       Linear  8 × 8   2  2                32
    trainable: 32 of 122 parameters (26.23 %)
    """
    if (config is None) == (not settings):
        raise TypeError("inject takes either a LoraConfig or its fields as keywords.")
    if not isinstance(config, (LoraConfig, type(None))):
        hint = "; `lora.LoraConfig(**config.to_dict())` is one" if hasattr(config, "peft_type") else ""
        got = f"{type(config).__module__}.{type(config).__name__}"
        raise TypeError(f"`config` must be a lora.LoraConfig, got {with_article(got)}{hint}.")
    config = config or LoraConfig(**settings)
    before = lora_layers(model, "inject", none=True, replaced=True)
    names = names_of(model)
    plans = []
    with Problems("inject: nothing was changed") as problems:
        saved = find_saved(model, names, config, problems)
        targets = find_targets(model, names, config, saved, problems)
        check_saved(names, config, saved, targets, problems)
        patterns, by = patterns_of(config), known_by(targets, names)
        every, left_out = config.target_modules == "all-linear", dict[str, str]()
        dry = read_as_tensors(names, targets) if every and config.lora_dropout else set()
        for module in targets:
            name, why_never = names[module][0], unfit(module)
            if every and (reason := why_never or (_NO_DROPOUT if module in dry else why_alone(module))):
                left_out[name] = reason
                continue
            with problems.at(name):
                if reason := why_not_yet(model, names[module], module) or why_never:
                    raise ValueError(reason)
                plans.append(_plan(names[module], by[module], module, config, patterns))
        if left_out and len(left_out) == len(targets):
            problems.add(*(f"{name or 'the model'}: {reason}" for name, reason in left_out.items()))
        problems.add(*obstacles(names))
        for module, known in names.items():  # adapted or not: gradients have to come through all of them
            if "weight" in module._parameters and (reason := weights.why_not_train(module)):
                problems.add(f"{known[0]}: {reason}")
    with undo_on_error(model.modules()) as undo, undo:
        layers = adapt(plans)
        remember_layers(names, layers)
        problems.add(*problems_of_start(layers, names, config.init_lora_weights), *let_read(names))
        problems.raise_any()
        for module in saved:
            train_in_full(module)
        let_train(model, config.bias, config.freeze_A)
        if config.inference_mode:
            model.requires_grad_(False)
        remember_values(names)
        begin(layers, config.init_lora_weights, undo)
        for layer in before:  # what they have learnt says nothing of those that begin now
            layer.lora_fresh = None
    report = report_of(model, names, layers, tuple(names[module][0] for module in saved))
    if not every:
        return report
    return replace(report, left_out=left_out, unreached=unreached(names))


def eject(model: nn.Module) -> None:
    """Take LoRA out of a model, in place: the base model is back, in plain torch layers.

    Parameters that trained in full (`modules_to_save`, biases) and buffers get back the values that they had when LoRA
    was put in. All `requires_grad` flags stay as they are.

    Args:
        model: a model with LoRA layers, injected or constructed.

    Raises:
        ValueError: there is no LoRA layer in the model, it is sharded, the instance of a layer has its own `forward`,
            or what trained in full was resized since. Nothing has changed then.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 2))
    >>> _ = lora.inject(model, target_modules=["0"], r=2)
    >>> lora.eject(model)
    >>> model
    Sequential(
      (0): Linear(in_features=8, out_features=2, bias=True)
    )
    """
    layers = lora_layers(model, "eject", replaced=True)
    instead = "what shards it would go on with the adapter; load the pretrained weights into a model of its own"
    names = names_of(model)
    with Problems("eject: nothing was changed") as problems:
        problems.add(*sharded_problems(layers, names, instead), *own_forward_problems(layers, names))
        problems.add(*resized_problems(model))
    with undo_on_error(model.modules()) as undo, undo, torch.no_grad():
        for layer in layers:
            if is_kept_apart(layer):
                undo.keep(*weights.written_with(layer))
            give_back(layer)
        for module in model.modules():
            restore(module, undo)
        restored: set[int] = set()
        for layer in layers:
            layer.lora_remove(restore_layout=id(layer.weight) not in restored)
            restored.add(id(layer.weight))


def restore(module: nn.Module, undo: undo_on_error) -> None:
    """Give a module what it was before training, its layers and parts aside, and let it forget that time."""
    for name, value in originals(module).items():
        now: torch.Tensor = getattr(module, name)
        if not has_moved(module, name):
            continue
        if now.shape == value.shape and is_writable(now):
            undo.keep(now)
            now.copy_(value)
        else:  # a buffer that has grown, or is another one now
            module._buffers[name] = value.to(now.device, now.dtype)
    forget_originals(module)
    forget_children(module)
    let_read_no_more(module)
    weights.prepare_training(module, False)


@torch.inference_mode(False)
def adapt(plans: Sequence[Adaptation]) -> list[LoRALayer]:
    """Carry out plans: the modules become LoRA layers, whose adapters have no values yet."""
    for plan in plans:
        layer: Any = plan.module
        part = layer if isinstance(layer, Part) else None
        if isinstance(layer, LoRALayer):  # with r = 0: a base layer by another name
            layer.lora_remove()
        vars(layer).pop("forward", None)  # the class's own, or `why_not_yet` would have said so
        layer.__class__ = class_for(plan.kind, type(layer))
        layer.lora_add(**plan.settings)
        layer.lora_injected = True
        if part is not None:
            enter_part(part)
    return [plan.module for plan in plans if isinstance(plan.module, LoRALayer)]


# ---- one module's adapter, and the report ----------------------------------------------------------------------


def _plan(
    names: Sequence[str],
    known: Sequence[str],
    module: nn.Module,
    config: LoraConfig,
    patterns: Mapping[str, Patterns[Any]],
) -> Adaptation:
    """The adapter that `config` gives to the module of these names; ValueError where its settings do not fit.

    Args:
        known: `names`, and those of the module that keeps it, by which patterns for r and lora_alpha may mean it.
    """
    check_dropout(module, config.lora_dropout)
    kind = kind_for(type(module))
    assert kind is not None, "why_not_yet() has looked"
    kind, own = kind.lora_configure(
        module,
        splits=patterns["splits"].value(names, None),
        enable_lora=patterns["enable_lora"].value(names, None),
        factored=config.factored,
    )
    settings: dict[str, Any] = {
        "r": patterns["rank_pattern"].value(known, config.r),
        "lora_alpha": patterns["alpha_pattern"].value(known, config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "merge_weights": config.merge_weights,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "adapter_dtype": config.adapter_dtype or adapter_dtype(module),
    }
    _, shape_B = kind.lora_shapes(module, settings["r"], **own)  # raises where they do not fit
    if config.use_dora:
        adapted_class(kind, module).lora_check_dora(module, shape_B)
    return Adaptation(module, kind, settings | own)


def adapter_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a module's adapter trains in: the weight's, and float32 where that is narrower."""
    weight: Any = module.weight
    return weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32


def report_of(
    model: nn.Module, names: Names, layers: Sequence[LoRALayer], saved: tuple[str, ...] = ()
) -> InjectionReport:
    """What `inject` reports of a model in which these layers were adapted."""
    left_alone = Memory(owned_tensors(names)).left_alone(layers)
    rows = []
    for layer in layers:
        rows.append(
            AdaptedModule(
                names=names[layer],
                kind=type(layer).__name__,
                shape=layer.lora_weight_shape(),
                r=layer.r,
                scaling=layer.lora_scaling,
                parameters=sum(parameter.numel() for _, parameter in layer.lora_parameters()),
                tied_to=left_alone[layer],
            )
        )
    parameters = initialized_parameters(model)
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    packed = sum(math.prod(layer.lora_weight_shape()) - layer.weight.numel() for layer in layers)  # two in a byte, say
    return InjectionReport(tuple(rows), trainable, total + packed, saved)
