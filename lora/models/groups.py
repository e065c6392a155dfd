"""Parameter groups for an optimizer: LoRA+'s two learning rates, and weight decay only where it belongs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.nn as nn

from lora.errors import is_number, raise_all
from lora.layers.layer import LoRALayer
from lora.models.model import lora_layers
from lora.models.training import is_bias

# Norms whose weights need not be vectors.
_NORMS = (nn.LayerNorm, nn.RMSNorm)


class _Rule(NamedTuple):
    rate: str  # which of the learning rates
    decays: bool


# In embeddings A starts at zero, and B at random.
_RULES = {
    "lora_A": _Rule("lr", True),
    "lora_B": _Rule("raised", True),
    "embedding_A": _Rule("embedding_raised", True),
    "embedding_B": _Rule("embedding", True),
    "lora_magnitude": _Rule("lr", False),
    "biases": _Rule("lr", False),
    "weights": _Rule("lr", True),
    "norms": _Rule("lr", False),
}


def param_groups(
    model: nn.Module,
    lr: float,
    lr_ratio: float = 16.0,
    weight_decay: float = 0.0,
    *,
    lr_embedding: float | None = None,
) -> list[dict[str, Any]]:
    """What trains in a model, in groups for a torch optimizer: LoRA+.

        lr of lora_B = lr_ratio · lr of lora_A

    B starts at zero and adds up r features, A adds up all of the layer's: at one learning rate for both, B learns too
    slowly the wider the layer is. Compared with plain LoRA, take a somewhat smaller `lr`.

    Args:
        model: a model with LoRA layers.
        lr: learning rate of A, and of everything that is not named here.
        lr_ratio: how many times higher that of the factor that starts at zero is: B, and in embeddings A. Default: 16.
        weight_decay: of A, B and weights that train in full; magnitudes (DoRA), biases, norms and other vectors have
            none. Default: 0.
        lr_embedding: learning rate of both factors in embeddings, if these are to have one of their own.
            Default: None.

    Returns:
        Dicts with "params", "lr", "weight_decay" and "name", which is of "lora_A", "lora_B", "embedding_A",
        "embedding_B", "lora_magnitude", "biases", "weights" and "norms" (the last three: `bias` and
        `modules_to_save`). Each parameter with `requires_grad` is in exactly one, a tied one, too; frozen ones are in
        none, and empty groups are left out. Learning-rate schedulers of torch scale each group's own rate.

    Raises:
        ValueError: a number is out of range, nothing trains, or there is no LoRA layer; all that is wrong is listed.

    From "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354. PEFT's `create_loraplus_optimizer`
    gives embeddings 1e-6 (its `loraplus_lr_embedding`), and raises the rate of magnitudes, biases and norms as well.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> _ = lora.inject(model, target_modules=["0"], modules_to_save=["1"], r=2)
    >>> groups = lora.param_groups(model, lr=1e-4, lr_ratio=10, weight_decay=0.01)
    >>> for group in groups:
    ...     print(group["name"], group["lr"], group["weight_decay"], len(group["params"]))
    lora_A 0.0001 0.01 1
    lora_B 0.001 0.01 1
    biases 0.0001 0.0 1
    weights 0.0001 0.01 1
    >>> optimizer = torch.optim.AdamW(groups)
    """
    lora_layers(model, "param_groups")
    numbers = {"lr": lr, "lr_ratio": lr_ratio, **({} if lr_embedding is None else {"lr_embedding": lr_embedding})}
    problems = [
        f"`{name}` must be a finite number above 0, got {value!r}."
        for name, value in numbers.items()
        if not is_number(value) or value <= 0
    ]
    if not is_number(weight_decay) or weight_decay < 0:
        problems.append(f"`weight_decay` must be a finite number of at least 0, got {weight_decay!r}.")
    members: dict[str, list[nn.Parameter]] = {role: [] for role in _RULES}
    for role, parameter in _trainable(model):
        members[role].append(parameter)
    if not any(members.values()):
        problems.append(f"nothing in this {type(model).__name__} trains; see `lora.mark_only_lora_as_trainable`.")
    raise_all("param_groups: there are no groups", problems)
    rates = {"lr": lr, "raised": lr * lr_ratio, "embedding": lr, "embedding_raised": lr * lr_ratio}
    if lr_embedding is not None:
        rates |= {"embedding": lr_embedding, "embedding_raised": lr_embedding}
    return [
        {
            "params": members[role],
            "lr": float(rates[rule.rate]),
            "weight_decay": float(weight_decay) if rule.decays else 0.0,
            "name": role,
        }
        for role, rule in _RULES.items()
        if members[role]
    ]


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What trains, with its role; a tied parameter once, as what it is first."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield _role(module, name, parameter), parameter


def _role(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    if isinstance(module, LoRALayer) and name in ("lora_A", "lora_B", "lora_magnitude"):
        embeds = module.starts_at_zero == "lora_A" and name != "lora_magnitude"
        return name.replace("lora", "embedding") if embeds else name
    if is_bias(name):
        return "biases"
    return "norms" if parameter.dim() < 2 or isinstance(module, _NORMS) else "weights"
