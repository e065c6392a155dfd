"""Starts that go by data: EVA, LoRA-GA and CorDA, after one pass over a few batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from lora.errors import Problems, instance, is_number, raise_all, table
from lora.functional.fused import without_autocast
from lora.init.data import CORDA, METHODS, Options, Start
from lora.init.observe import observe
from lora.layers.layer import LoRALayer
from lora.layers.linear import LinearLoRA
from lora.layers.settings import alpha_of
from lora.layers.undo import undo_on_error
from lora.models.batches import Step, batches_problems
from lora.models.blocks import tensors_of
from lora.models.model import Names, lora_layers, names_of, sharded_problems
from lora.models.spectral import form_problems
from lora.models.start import keep_start, start_from, unroundable, unwritable
from lora.models.training import may_move

_WHAT = "calibrate: nothing was changed"


@dataclass(frozen=True)
class CalibratedModule:
    """One started module: its name, method, rank, and the share of what the method looks at that the rank holds.

    EVA: of the variance of the inputs. LoRA-GA: of Σσ² of the gradient, in the 2 r vectors that A and B take. CorDA: of
    Σσ² of W₀ C.
    """

    name: str
    method: str
    r: int
    share: float


@dataclass(frozen=True)
class CalibrationReport:
    """What `lora.calibrate` did: a row for each module, and the number of batches that it saw."""

    modules: tuple[CalibratedModule, ...]
    batches: int

    def __str__(self) -> str:
        rows = [(m.name, m.method, m.r, f"{100 * m.share:.1f} %") for m in self.modules]
        return f"{table(('module', 'method', 'r', 'explained'), rows)}\nbatches: {self.batches:,}"


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    step: Step | None = None,
    rho: float = 1.0,
    ignore_index: int | None = -100,
    corda_method: str = "ipm",
    stable_gamma: float = 16.0,
) -> CalibrationReport:
    """Start the layers that wait for data: those with `init_lora_weights` of "eva", "lora_ga" or "corda".

        EVA       A = the r leading principal directions of the layer's inputs, B = 0
        LoRA-GA   A = c V_{1…r}ᵀ, B = c U_{r+1…2r} of the gradient ∂L/∂W₀ = U S Vᵀ; c² = √rows / γ
        CorDA     B = U_r √(S_r / s), A = √(S_r / s) V_rᵀ C⁻¹ with W₀ C = U S Vᵀ; C = E[x xᵀ]

    The batches run once through the pretrained model, in the mode (`train()` or `eval()`) that it is in. EVA leaves W₀
    alone. LoRA-GA and CorDA take s · B A out of it, so that the model computes what it did, to rounding; `lora.eject`
    puts it back. Call this before the optimizer is made: with `rho` above 1, A and B are new parameters. In distributed
    training every process has to be given the same batches.

    For each layer one sum is kept until the end, in float32, or float64 where the data is: in_features² numbers for EVA
    and CorDA, as many as the adapted weight has for LoRA-GA. For 4096 features that is 64 MiB.

    Args:
        model: a model with LoRA layers, of which some wait. Only linear layers can; the others in it stay as they are.
        batches: each is given to the model as keywords (a mapping), as arguments (a tuple or list) or as one argument
            (anything else), its tensors moved to the device of the model's first parameter.
        step: a function of model and batch, called instead. Where a layer waits for LoRA-GA it must return the loss, or
            something that has the loss as its `loss`. Default: None.
        rho: let EVA move ranks between its layers, to where they explain most of the variance: each layer gets
            between 1 and rho · r, all of them together what they had. The scalings stay. Default: 1, ranks stay.
        ignore_index: in batches that are mappings, EVA and CorDA pass over inputs at positions with this label, and
            those that `attention_mask` leaves out. None: labels do not matter. Default: -100.
        corda_method: "ipm" trains the directions that matter most for these data, to learn a task like theirs; "kpm"
            trains those that matter least, to keep what the model knows of them. Default: "ipm".
        stable_gamma: γ of LoRA-GA: the larger, the smaller A and B. Default: 16.

    Returns:
        A report that prints as a table: module, method, rank, and the share that the rank explains.

    Raises:
        ValueError: no layer waits; one that waits is not linear, has a rank above that of its weight (LoRA-GA needs
            2 r), has a base weight that would be written but is tied to another module's or packed, or (CorDA) a
            scaling that is not above 0; an argument is out of range; there are no batches, or no loss for LoRA-GA; no
            batch reached a layer; inputs or gradients are not finite, all zero or (EVA) all the same. One error lists
            all, and the model is as it was.

    From "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", arXiv:2410.07170, section
    3; "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv:2407.05000, section 3; "CorDA:
    Context-Oriented Decomposition Adaptation of Large Language Models", arXiv:2406.05223, section 3. EVA centres the
    inputs and LoRA-GA scales A and B, as their authors' code does. C has a mean diagonal of 1 here, so that the size of
    the inputs does not move weight between A and B, and 1 % of the identity is added, as in the authors' code.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    >>> _ = lora.inject(model, target_modules=["0"], r=1, init_lora_weights="eva")
    >>> x = torch.tensor([[1.0, 2.0, 0.0], [1.0, -2.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, -1.0]])
    >>> print(lora.calibrate(model, [x]))
    module  method  r  explained
    0       eva     1  80.0 %
    batches: 1
    >>> model[0].lora_A.detach().abs().round(decimals=4)
    tensor([[0., 1., 0.]])
    """
    names = names_of(model)
    layers = [layer for layer in lora_layers(model, "calibrate") if layer.r > 0 and layer.lora_needs_data]
    options = Options(rho, corda_method, stable_gamma)
    raise_all(_WHAT, [*_argument_problems(batches, step, options), *_waiting_problems(names, layers, options)])
    waiting: dict[LinearLoRA, Any] = {layer: METHODS[str(layer.lora_needs_data)] for layer in layers}  # type: ignore[misc]
    seen: dict[LinearLoRA, Any] = {layer: method.statistic(layer) for layer, method in waiting.items()}
    with undo_on_error(model.modules()) as undo, undo:
        undo.keep(*(buffer for buffer in model.buffers() if may_move(buffer)))  # in `train()` the batches move them
        count = observe(model, seen, batches, step, ignore_index)
        raise_all(_WHAT, [] if count else ["there must be at least one batch, and `batches` is empty."])
        with Problems(_WHAT) as problems:
            for layer, statistic in seen.items():
                found = list(statistic.problems()) or filter(None, [waiting[layer].lacks(layer, statistic)])
                problems.add(*(f"{names[layer][0]}: {problem}" for problem in found))
        starts: dict[LinearLoRA, Start] = {}
        for method in METHODS.values():
            its = {layer: seen.pop(layer) for layer in waiting if waiting[layer] is method}
            starts.update(method.start(its, options))
        modules = []
        for layer, method in waiting.items():
            keep_start(undo, layer, method.writes_base)
            start = starts[layer]
            modules.append(CalibratedModule(names[layer][0], str(layer.lora_needs_data), start.r, start.share))
            _begin(layer, start, method.writes_base)
    return CalibrationReport(tuple(modules), count)


# ---- what can be wrong -----------------------------------------------------------------------------------------


def _argument_problems(batches: Any, step: Any, options: Options) -> Iterator[str]:
    yield from batches_problems(batches, step)
    if not is_number(options.rho) or options.rho < 1:
        yield f"`rho` must be at least 1, got {options.rho!r}."
    if options.corda_method not in CORDA:
        yield f"`corda_method` must be one of {', '.join(map(repr, CORDA))}, got {options.corda_method!r}."
    if not is_number(options.stable_gamma) or options.stable_gamma <= 0:
        yield f"`stable_gamma` must be above 0, got {options.stable_gamma!r}."


def _waiting_problems(names: Names, layers: list[LoRALayer], options: Options) -> Iterator[str]:
    """What is wrong with the layers that wait, before any data is seen."""
    if not layers:
        yield f"no layer waits for data; `lora.inject` takes `init_lora_weights` of {', '.join(map(repr, METHODS))}."
    elif options.rho != 1 and all(layer.lora_needs_data != "eva" for layer in layers):
        yield f"`rho` (={options.rho}) is for EVA, and no layer waits for that."
    elif options.rho != 1 and any(len(layer.lora_ranks()) > 1 for layer in layers):
        yield f"`rho` (={options.rho}) would take the room of layers that are prepared for swaps; prepare them later."
    for layer in layers:
        method, name = METHODS[str(layer.lora_needs_data)], names[layer][0]
        if not isinstance(layer, LinearLoRA):
            yield f"{name}: {layer.lora_needs_data!r} is for linear layers, not for {instance(layer)}."
            continue
        if layer.lora_is_in_place():
            yield f"{name}: has a forward of its own, in which nobody sees what its weight is multiplied by."
        yield from (f"{name}: {problem}" for problem in (*form_problems(layer), *method.problems(layer)))
    others = [layer for layer in layers if not METHODS[str(layer.lora_needs_data)].writes_base]
    yield from sharded_problems(others, names, "calibrate it before the model is sharded")
    written = [layer for layer in layers if METHODS[str(layer.lora_needs_data)].writes_base]
    yield from unwritable(written, names)
    yield from unroundable(written, names)


# ---- the start -------------------------------------------------------------------------------------------------


def _begin(layer: LinearLoRA, start: Start, writes_base: bool) -> None:
    """Give the layer its A and B, of another rank perhaps, and let it train."""
    r = start.r
    if r != layer.r:
        layer.lora_alpha = alpha_of(layer.lora_scaling, r, layer.use_rslora)
        layer.r = r
        for name, value in zip(("lora_A", "lora_B"), tensors_of(layer, start.pairs), strict=True):
            old: nn.Parameter = getattr(layer, name)
            setattr(layer, name, nn.Parameter(torch.empty_like(value, dtype=old.dtype, device=old.device)))
            getattr(layer, name).requires_grad_(old.requires_grad)
    with without_autocast(layer.weight.device):
        start_from(layer, start.pairs, writes_base=writes_base)
