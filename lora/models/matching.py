"""Find the modules that a LoraConfig speaks of, and say all that is wrong with what it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch.nn as nn

from lora.errors import did_you_mean
from lora.layers.layer import LoRALayer
from lora.layers.linear import LinearLoRA
from lora.layers.registry import kind_for
from lora.layers.weights import is_fully_sharded, is_sharded
from lora.models.bypassed import bypass_of
from lora.models.config import HEADS, LoraConfig, name_matches, pattern_matches
from lora.models.model import Memory, Names, has_own_forward, is_lazy, owned_tensors, unwrapped


def find_targets(model: nn.Module, names: Names, config: LoraConfig) -> tuple[list[nn.Module], list[str]]:
    """The modules to adapt, and a complaint for each name or pattern that matches none."""
    problems: list[str] = []
    if config.target_modules == "all-linear":
        targets = _all_linear(model, names)
        if not targets:
            problems.append("`target_modules` 'all-linear' matches no module: there is no linear layer.")
        saved = _to_save(model, names, config, [])
        in_full = {part for module in saved for part in module.modules()}
        targets = [module for module in targets if module not in in_full]
    else:
        targets = _select("target_modules", config.target_modules or (), names, problems)
    excluded = _select("exclude_modules", config.exclude_modules or (), names, problems)
    targets = [module for module in targets if module not in excluded]
    if not targets and not problems:
        problems.append("`exclude_modules` and what trains in full leave no module to adapt.")
    adapted = {module: names[module] for module in targets}
    for option in ("rank_pattern", "alpha_pattern", "splits", "enable_lora"):
        patterns: Mapping[str, object] = getattr(config, option)
        _select(option, patterns, adapted, problems, pattern_matches, "adapted module")
        problems += _shadowed(option, patterns, adapted)
    return targets, problems


def _shadowed(option: str, patterns: Iterable[str], adapted: Names) -> Iterator[str]:
    """A complaint for each pattern that matches, and is never the first to."""
    left = adapted
    for pattern in patterns:
        matching = {module for module, known in adapted.items() if any(pattern_matches(n, pattern) for n in known)}
        if matching and not matching & left.keys():
            yield f"`{option}` {pattern!r} is never used: patterns before it match all its modules."
        left = {module: known for module, known in left.items() if module not in matching}


def find_saved(
    model: nn.Module, names: Names, config: LoraConfig, targets: list[nn.Module]
) -> tuple[list[nn.Module], list[str]]:
    """The modules to train in full, and a complaint for each that cannot be."""
    problems: list[str] = []
    saved = _to_save(model, names, config, problems)
    asked, task = set(_select("modules_to_save", config.modules_to_save or (), names, [])), config.task_type
    known = {module: names[module] for module in targets if not is_lazy(module)}
    adapted = Memory(one for one in owned_tensors(known) if one.own == "weight")
    for module in saved:
        name = names[module][0]
        if is_lazy(module):
            problems.append(f"{name}: is lazy and has no values to train yet; run one forward pass first.")
            continue
        inside = [part for part in module.modules() if part in targets]
        tied = {one.module for parameter in module.parameters() for one in adapted.sharing(parameter)} - set(inside)
        wrong = {"be adapted, or hold a module that is": inside, "share a weight with one adapted": tied}
        for hold, found in wrong.items():
            if found:
                listed = ", ".join(names[part][0] for part in names if part in found)
                whose = "a module of `modules_to_save`" if module in asked else f"the head of `task_type` {task!r}"
                problems.append(f"{name}: {whose} trains in full and cannot {hold}: {listed}.")
    return saved, problems


def _to_save(model: nn.Module, names: Names, config: LoraConfig, problems: list[str]) -> list[nn.Module]:
    """The modules that are asked for by name or by the task; a name or a task that finds none is a problem."""
    asked = _select("modules_to_save", config.modules_to_save or (), names, problems)
    ends = HEADS.get(config.task_type or "", ())
    # As PEFT does, by how names end, whole components or not: "pre_classifier" is as new as "classifier" after it.
    named = [module for module, known in names.items() if any(name.endswith(ends) for name in known)]
    heads = [module for module in named if [*module.parameters()]]
    if ends and not heads and not asked:
        problems.append(_no_head(unwrapped(model), config.task_type, ends))
    return [module for module in names if module in {*asked, *heads}]


def _no_head(model: nn.Module, task: str | None, ends: Iterable[str]) -> str:
    body = getattr(model, "base_model", None)  # transformers' word; beside it are a model's heads
    beside = [repr(name) for name, child in model.named_children() if child is not body and [*child.parameters()]]
    hint = f" (beside the body it has {', '.join(beside)})" if beside else ""
    looked_for = " or ".join(map(repr, ends))
    return (
        f"`task_type` {task!r} trains the head, and no module with parameters of this {type(model).__name__} has a "
        f"name that ends in {looked_for}; name the head in `modules_to_save`{hint}."
    )


def why_not(model: nn.Module, names: Sequence[str], module: nn.Module) -> str | None:
    """The reason why the module of these names cannot be adapted, whatever the settings; None if it can."""
    if isinstance(module, LoRALayer) and module.r > 0:
        return "has LoRA already; eject or merge it first."
    if kind_for(type(module)) is None:
        return f"no kind of LoRA layer adapts a {type(module).__name__}; `lora.register` teaches one."
    if is_lazy(module):
        return "is lazy and has no shape yet; run one forward pass first."
    if is_sharded(module._parameters.get("weight")) or any(map(is_fully_sharded, _around(model, names[0]))):
        return "is sharded, and an adapter put in now would not be: each rank would train its own. Inject, then shard."
    if "weight" not in {**module._parameters, **module._buffers}:
        return "its `weight` is not its own but computed (a parametrization, pruning); make that permanent first."
    if has_own_forward(module):
        return (
            "the instance has its own `forward` attribute (accelerate's hooks set one), which would bypass LoRA; "
            "remove the hook first."
        )
    clash = clashing_names(module)
    if clash:
        return f"uses names that LoRA needs for itself: {', '.join(clash)}."
    for name in names:
        parent_name, _, child = name.rpartition(".")
        reason = bypass_of(model.get_submodule(parent_name), child)
        if reason:
            return reason
    return None


def _around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The module of this name, and all that it is a part of."""
    parts = name.split(".")
    return (model.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1))


def clashing_names(module: nn.Module) -> list[str]:
    """Names of the module's own that its kind of LoRA layer would take for the adapter's."""
    kind = kind_for(type(module))
    if kind is None or isinstance(module, LoRALayer):
        return []
    theirs = {*dir(type(module)), *vars(module), *module._parameters, *module._buffers, *module._modules}
    return sorted((set(dir(kind)) & theirs) - set(dir(nn.Module)) - {"reset_parameters", "__annotations__"})


def _all_linear(model: nn.Module, names: Names) -> list[nn.Module]:
    output_embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = {module: kind_for(type(module)) for module in names}
    return [m for m, kind in kinds.items() if kind and issubclass(kind, LinearLoRA) and m is not output_embeddings]


def _select(
    option: str,
    targets: str | Iterable[str],
    names: Names,
    problems: list[str],
    matches: Callable[[str, str], bool] = name_matches,
    what: str = "module",
) -> list[nn.Module]:
    """The modules that any of `targets` matches by any of their names; a target that matches none is a problem."""
    if isinstance(targets, str):
        targets, matches = [targets], lambda name, pattern: re.fullmatch(pattern, name) is not None
    found: set[nn.Module] = set()
    for target in targets:
        matching = {module for module, known in names.items() if any(matches(name, target) for name in known)}
        found |= matching
        if not matching:
            hint = did_you_mean(target, (name for known in names.values() for name in known if name))
            problems.append(f"`{option}` {target!r} matches no {what}{hint}.")
    return [module for module in names if module in found]
