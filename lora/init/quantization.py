"""LoftQ: adapters on quantised bases that start where the quantisation has lost least."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from lora.errors import Problems, instance, is_count, join, raise_all, table
from lora.functional.fused import exact_dtype, without_autocast
from lora.layers.layer import LoRALayer
from lora.layers.undo import undo_on_error
from lora.layers.weights import is_packed
from lora.models.blocks import Pair, tensors_of
from lora.models.model import Names, lora_layers, names_of, without_wrappers
from lora.models.spectral import decomposed, form_problems, rank_problems, scaling_problems, split, weight_blocks
from lora.models.start import keep_start, remember_start, start_from, unwritable

_WHAT = "loftq: nothing was changed"
Weights = Mapping[str, Tensor] | Callable[[str], Tensor]


@dataclass(frozen=True)
class LoftQModule:
    """One started module, and how far its weight is from the unquantised one.

    `before` is ‖W − Q‖ / ‖W‖ of the base that there was, `after` is ‖W − Q − s · B A‖ / ‖W‖.
    """

    name: str
    r: int
    before: float
    after: float


@dataclass(frozen=True)
class LoftQReport:
    """What `lora.loftq` did: a row for each module."""

    modules: tuple[LoftQModule, ...]

    def __str__(self) -> str:
        rows = [(m.name, m.r, f"{100 * m.before:.2f} %", f"{100 * m.after:.2f} %") for m in self.modules]
        return table(("module", "r", "lost before", "lost now"), rows)


@torch.inference_mode(False)
@torch.no_grad()
def loftq(model: nn.Module, weights: Weights, steps: int = 1, *, niter: int | None = None) -> LoftQReport:
    """LoftQ: let A and B make up for what quantising the base has lost.

        min ‖W − Q − s · B A‖        Q: the quantised base; s · B A: the best approximation of W − Q at rank r

    With more steps, Q and B A take turns: Q = quantise(W − s · B A), then B A anew. The first step that makes the error
    larger is undone and ends the turns. The pretrained function is then that of Q + s · B A, near W: `lora.disabled`
    computes it, and the adapter that `lora.save_adapter` writes is what training adds to it, so that a base in full
    precision can load it. `lora.eject` leaves the base as it was with one step, and quantised anew after more.

    Args:
        model: a model with LoRA layers on quantised bases (`lora.register_weight`). Others in it stay as they are.
        weights: the unquantised weights, by their names in the model, such as "layers.0.q_proj.weight": a mapping, or a
            function of a name, which is asked twice for each and may read from a file.
        steps: number of turns; 1 leaves the base as it is. Default: 1.
        niter: None for the exact SVD; a number for that many power iterations of a randomised one, as in "pissa_niter".
            Default: None.

    Returns:
        A report that prints as a table: module, rank, and ‖W − W'‖ / ‖W‖ before and now.

    Raises:
        ValueError: no LoRA layer has a quantised base; a scaling is not above 0; a rank is above that of its weight; a
            weight is missing, has another shape, is not finite, or equals the quantised base (nothing to correct);
            `steps` is not an integer of at least 1. One error lists all, and the model is as it was.

    From "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv:2310.08659, algorithm 1.

    >>> import torch, lora
    >>> class Rounded(torch.nn.Linear):
    ...     def pack(self, weight):
    ...         self.weight = torch.nn.Parameter((weight * 4).round().to(torch.int8), requires_grad=False)
    ...     def unpack(self):
    ...         return self.weight / 4
    ...     def forward(self, x):
    ...         return torch.nn.functional.linear(x, self.unpack(), self.bias)
    >>> lora.register_weight(Rounded, Rounded.unpack, Rounded.pack)
    >>> model, weight = torch.nn.Sequential(Rounded(2, 2, bias=False)), torch.tensor([[1.1, 0.0], [0.0, 0.5]])
    >>> model[0].pack(weight)
    >>> _ = lora.inject(model, target_modules=["0"], r=1)
    >>> print(lora.loftq(model, {"0.weight": weight}))
    module  r  lost before  lost now
    0       1  8.28 %       0.00 %
    >>> model(torch.eye(2)).detach().round(decimals=4)
    tensor([[1.1000, 0.0000],
            [0.0000, 0.5000]])
    """
    layers = [layer for layer in lora_layers(model, "loftq") if layer.r > 0 and is_packed(layer)]
    names = names_of(model)
    raise_all(_WHAT, _argument_problems(weights, steps, niter, layers))
    with Problems(_WHAT) as problems:
        for layer in layers:
            problems.add(*(f"{names[layer][0]}: {problem}" for problem in _problems(layer, names, weights)))
        problems.add(*(unwritable(layers, names) if steps > 1 else ()))
    modules = []
    with undo_on_error(layers) as undo, undo:
        for layer in layers:
            keep_start(undo, layer, writes_base=steps > 1)
            weight = _original(layer, names, weights)
            assert weight is not None, "_problems() has looked"
            with without_autocast(weight.device):
                before, after = _start(layer, weight, steps, niter)
            size = float(weight.norm()) or 1.0
            modules.append(LoftQModule(names[layer][0], layer.r, before / size, after / size))
    return LoftQReport(tuple(modules))


def _argument_problems(weights: object, steps: object, niter: object, layers: Sequence[LoRALayer]) -> Iterator[str]:
    if not isinstance(weights, Mapping) and not callable(weights):
        yield f"`weights` must be a mapping, or a function of a name, got {instance(weights)}."
    if not is_count(steps, 1):
        yield f"`steps` must be an integer of at least 1, got {steps!r}."
    if niter is not None and not is_count(niter):
        yield f"`niter` must be None or an integer of at least 0, got {niter!r}."
    if not layers:
        yield "no LoRA layer has a base that is quantised; there is no loss to make up for."


def _problems(layer: LoRALayer, names: Names, weights: Weights) -> Iterator[str]:
    """What keeps a layer from starting."""
    yield from scaling_problems(layer)
    form = list(form_problems(layer))
    yield from form
    base, weight = layer.lora_base_weight(), _original(layer, names, weights)
    if not form:
        yield from rank_problems(layer, [tuple(block.shape) for block in layer.lora_weight_blocks(base)])
    if weight is None:
        yield f"`weights` has no {' nor '.join(_keys(layer, names))}."
    elif weight.shape != base.shape:
        yield f"the weight must have the base's shape {tuple(base.shape)}, got {tuple(weight.shape)}."
    elif not bool(weight.isfinite().all()):
        yield "the weight holds NaN or infinity."
    elif torch.equal(weight, base.to(weight.dtype)):
        yield "its base has lost nothing of the weight: A and B would both start at zero and never receive a gradient."


def _keys(layer: LoRALayer, names: Names) -> list[str]:
    """The names that the layer's weight may have."""
    return [join(without_wrappers(name), "weight") for name in names[layer]]


def _original(layer: LoRALayer, names: Names, weights: Weights) -> Tensor | None:
    """The unquantised weight, in float32 or float64, where the layer is; None if there is none."""
    ask = weights.__getitem__ if isinstance(weights, Mapping) else weights
    for key in _keys(layer, names):
        with suppress(KeyError):
            weight = ask(key).detach()
            return weight.to(layer.lora_A.device, exact_dtype(weight.dtype))
    return None


def _start(layer: LoRALayer, weight: Tensor, steps: int, niter: int | None) -> tuple[float, float]:
    """Start A and B; ‖W − Q‖ before and ‖W − Q − s · B A‖ after."""
    untouched = layer.lora_base_weight()
    before = float((weight - untouched).norm())
    pairs, error = _fit(layer, weight, niter)
    for _ in range(1, steps):
        base = layer.lora_base_weight()
        layer.lora_write_base(weight - _update(layer, pairs))
        better, less = _fit(layer, weight, niter)
        if not less < error:
            layer.lora_write_base(base)
            pairs, error = _fit(layer, weight, niter)
            break
        pairs, error = better, less
    start_from(layer, pairs, writes_base=False)
    # The pretrained weight is what was quantised, not what quantising left of it.
    remember_start(layer, base_written=not torch.equal(layer.lora_base_weight(), untouched))
    return before, error


def _fit(layer: LoRALayer, weight: Tensor, niter: int | None) -> tuple[list[Pair], float]:
    """The best s · B A for what the base lacks, and the norm of what is left."""
    lost = weight - layer.lora_base_weight()
    q = layer.lora_block_rank()
    pairs = split(layer, [decomposed(block, q, niter) for block in weight_blocks(layer, lost)])
    return pairs, float((lost - _update(layer, pairs)).norm())


def _update(layer: LoRALayer, pairs: Sequence[Pair]) -> Tensor:
    """s · B A of these blocks, in the shape of the weight."""
    return layer.lora_scaling * layer.lora_delta(*tensors_of(layer, pairs))
