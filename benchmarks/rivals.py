"""The same adapted layer in each library, with the same weights, A and B."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import loralib
import peft
import torch
from torch import Tensor, nn

import lora

# The constructor arguments that loralib's classes share with torch's.
_LORALIB = {
    nn.Linear: (loralib.Linear, ("in_features", "out_features")),
    nn.Embedding: (loralib.Embedding, ("num_embeddings", "embedding_dim")),
    nn.Conv2d: (loralib.Conv2d, ("in_channels", "out_channels")),
}


def layers(
    base: nn.Module, r: int, dropout: float = 0.0, adapter_dtype: torch.dtype | None = None
) -> dict[str, nn.Module]:
    """The frozen base layer, and it with a LoRA by each library that has one of these dtypes.

    adapter_dtype: of A and B; the base's own if None. loralib knows no other.
    """
    made = {"frozen": copy.deepcopy(base).requires_grad_(False)}
    if adapter_dtype is None:
        made["loralib"] = with_loralib(base, r, dropout)
    made["PEFT"] = with_peft(base, r, dropout, adapter_dtype)
    made["lora"] = with_lora(base, r, dropout, adapter_dtype)
    return made


def with_loralib(base: nn.Module, r: int, dropout: float = 0.0) -> nn.Module:
    """The base layer in loralib; its convolutions have no dropout and write `lora_B @ lora_A` out."""
    cls, names = _LORALIB[type(base)]
    options = {"r": r, "lora_alpha": 2 * r, "dtype": base.weight.dtype, "merge_weights": False}
    if not isinstance(base, nn.Embedding):
        options |= {"bias": base.bias is not None, "lora_dropout": dropout}
    if isinstance(base, nn.Conv2d):
        options |= {"kernel_size": base.kernel_size[0], "padding": base.padding}
    layer = cls(*(getattr(base, name) for name in names), **options)
    getattr(layer, "conv", layer).load_state_dict(base.state_dict(), strict=False)
    loralib.mark_only_lora_as_trainable(layer)
    return same_start(layer)


def with_peft(
    base: nn.Module, r: int, dropout: float = 0.0, adapter_dtype: torch.dtype | None = None, **settings: object
) -> nn.Module:
    """The base layer in PEFT; `settings` are further fields of its LoraConfig."""
    holder = nn.ModuleDict({"layer": copy.deepcopy(base)})
    holder.is_loaded_in_4bit = type(base).__name__ == "Linear4bit"  # which is how transformers tells PEFT
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["layer"], **settings)
    peft.get_peft_model(holder, config, autocast_adapter_dtype=adapter_dtype is not None)
    return same_start(holder["layer"])


def with_lora(
    base: nn.Module, r: int, dropout: float = 0.0, adapter_dtype: torch.dtype | None = None, **settings: object
) -> nn.Module:
    """The base layer in lora; `settings` are further fields of a `lora.LoraConfig`."""
    holder = nn.ModuleDict({"layer": copy.deepcopy(base)})
    settings |= {"r": r, "lora_alpha": 2 * r, "lora_dropout": dropout, "target_modules": ["layer"]}
    lora.inject(holder, adapter_dtype=adapter_dtype or base.weight.dtype, **settings)
    return same_start(holder["layer"])


def step(layer: nn.Module, x: Tensor, dy: Tensor | Sequence[Tensor]) -> None:
    """Forward and backward of a layer of one or more outputs, for what trains and for x, if it wants a gradient."""
    wanted = [tensor for tensor in (x, *trainable(layer)) if tensor.requires_grad]
    y = layer(x)
    if wanted:
        torch.autograd.grad(y, wanted, dy)


def bound(frozen: Callable[[], object], *products: Callable[[], object]) -> Callable[[], None]:
    """The frozen layer, then LoRA's products alone, into memory that is there: what no LoRA beside it can be below."""

    def run() -> None:
        frozen()
        for product in products:
            product()

    return run


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that train: A and B of each layer, in this order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@torch.no_grad()
def same_start(module: nn.Module, up: float = 0.02) -> nn.Module:
    """The module, in training, with random values in each A and B, the same for the same shapes; `up` is B's size."""
    generator = torch.Generator().manual_seed(0)
    for number, parameter in enumerate(trainable(module)):
        size = up if number % 2 else 0.02
        parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * size)
    module.train()  # loralib's returns nothing
    return module


def assert_equal(outputs: Iterable[Tensor]) -> None:
    """All are the first, up to rounding: what is timed computes the same."""
    first, *others = (output.detach() for output in outputs)
    tolerance = 32 * torch.finfo(first.dtype).eps * first.abs().max().item()
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=tolerance)
