"""Save a model's adapter to a file, and load it again, strictly both ways."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch.nn as nn
from torch import Tensor

from lora.adapters.adapter import PARAMETERS, Adapter, ModuleAdapter
from lora.adapters.base import describe, describe_tensor, own_tensors, tied, trained_in_full
from lora.adapters.fitting import Fit, Target
from lora.adapters.formats import FORMATS, read_adapter, write_as
from lora.adapters.paths import as_path
from lora.errors import AdapterError, join, raise_all
from lora.layers import weights
from lora.layers.layer import LoRALayer
from lora.layers.parts import tensor_name
from lora.layers.undo import undo_on_error
from lora.models.idle import idle_problem
from lora.models.injection import InjectionReport, adapt, report_of
from lora.models.model import (
    Names,
    check_not_disabled,
    lora_layers,
    name_of,
    names_of,
    obstacles,
    remember_layers,
    remember_values,
    resized_embeddings,
    unreadable,
    unwrapped,
    without_wrappers,
)
from lora.models.readers import let_read
from lora.models.start import pretrained_weight, since_start
from lora.models.training import is_kept, keep, let_train, remember, train_in_full, trains_in_full


@weights.outside_inference_mode
def save_adapter(model: nn.Module, path: str | os.PathLike[str], format: str = "lora") -> None:
    """Save what LoRA trained in a model: one safetensors file, with ranks, scaling and splits inside.

    Holds each adapter, every other parameter that trains (biases, `modules_to_save`), and what of the base model nobody
    else has: embeddings that were resized since `from_pretrained`, and buffers that training moved, such as running
    statistics. Of all other parameters and buffers it holds a sample, so that loading into another model says
    where it differs. Written beside `path` and then renamed: whatever fails, and killed at any moment, the old adapter
    or the new one is there, never half of one, nor a folder with files of both.

    Of a sharded model (FSDP2, tensor parallel) every rank has to call this. The first alone writes the file, the one
    that a single process would write; the others return when it is there, or raise what the first does. Of replicas
    (DistributedDataParallel) one is enough.

    Args:
        model: a model with LoRA layers.
        path: the file, `.safetensors` by custom, or a folder that exists, in which the file is adapter.safetensors; a
            folder for PEFT's formats.
        format: "lora"; "peft"; "portable": PEFT's with one rank for all and scaling 1, which vLLM, llama.cpp's
            converter and others read alike; or "diffusers" (`lora.write_adapter`). Default: "lora".

    Warns:
        UserWarning: adapters are as they started, while others have learnt since `lora.inject`; or PEFT would lose
            adapters of some layers (a mixture's dense ones).

    Raises:
        TypeError: `path` is no path.
        ValueError: there is no LoRA layer in the model, no such format, or `path` is empty.
        OSError: there is no folder to write to (FileNotFoundError); a file where a folder belongs, or another adapter
            which could be taken for this one (FileExistsError); or it cannot be written (PermissionError, …).
        AdapterError: a tensor is empty, or holds NaN or infinity, or the format has no place for something; all are
            listed, and nothing is written.

    >>> import os, tempfile, torch, lora
    >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
    >>> model = torch.nn.Sequential(lora.Linear(8, 4, r=2))
    >>> lora.save_adapter(model, path)
    >>> _ = lora.load_adapter(model, path)
    """
    model = unwrapped(model)
    lora_layers(model, "save_adapter", reads=True)
    ranks, names, what = weights.ranks_of(model), names_of(model), f"save_adapter: {path} is not written"
    adapter = _adapter_of(model, names, what, keep=ranks.is_first)

    def write() -> None:
        raise_all(what, () if format == "lora" else _beyond_names(names, adapter), AdapterError)
        if idle := idle_problem(model, names):
            warnings.warn(f"save_adapter: {idle}", stacklevel=4)
        for loss in FORMATS[format].losses(model, adapter) if format in FORMATS else ():
            warnings.warn(f"save_adapter: {loss}", stacklevel=4)
        known = [without_wrappers(name) for group in names.values() for name in group]
        write_as(adapter, path, format, known, "save_adapter")

    ranks.on_first(write)


def _beyond_names(names: Names, adapter: Adapter) -> Iterator[str]:
    """What of the model PEFT would not know by the names in an adapter."""
    for known in names.values():
        if len(known) > 1 and without_wrappers(known[0]) in adapter.modules:
            yield f"{', '.join(known)}: are names of one module, of which PEFT would adapt only the first."
    yield from tied(names, {*adapter.trained_in_full} - {*adapter.kept})


@weights.outside_inference_mode
def load_adapter(
    model: nn.Module,
    source: str | os.PathLike[str] | Adapter,
    *,
    check_base: bool = True,
    lora_alpha: float | None = None,
) -> InjectionReport:
    """Load an adapter into a plain model or into one with LoRA layers.

    A plain model gets LoRA layers first, as the file describes them, and is frozen but for what the file holds. The
    scaling is the file's. Strict both ways: every tensor of the file is used and every adapter parameter of the
    model is written. PEFT's and loralib's adapters take the form of the model's layers, where that is exact: one A for
    a fused projection becomes an A for each of its splits. In names, prefixes of wrappers (`module.`, `_orig_mod.`,
    `base_model.model.`) do not count.

    What the file holds of the base model (rows that were added to embeddings, running statistics) is written into it,
    and does not train; `lora.disabled` and `lora.eject` put back what was there.

    Of a sharded model (FSDP2, tensor parallel) every rank has to call this. The first alone reads the file, which need
    not be there for the others, and all of them load it, or raise the same error. A model gets its LoRA layers before
    it is sharded: by `lora.inject`, or by this from a file.

    Args:
        model: the base model, or a model with the same modules adapted.
        source: a file or folder in any format that `lora.read_adapter` knows, or an adapter that was read; of a sharded
            model what the first rank says counts.
        lora_alpha: the numerator of the scaling, for files that do not say it, as loralib's. Default: None.
        check_base: raise if the base model is not the one that the adapter was trained in (the same in another dtype
            is): adapted weights and all other parameters and buffers are compared by samples. Default: True.

    Returns:
        The report of `lora.inject`, for all layers that have LoRA now.

    Raises:
        OSError: there is no such file or folder (FileNotFoundError), or it cannot be read (PermissionError, …).
        TypeError: `source` is neither a path nor an adapter, or `lora_alpha` is given for a format that says it.
        ValueError: `source` is empty.
        AdapterError: the file is not an adapter; a tensor is missing, unexpected, empty, of the wrong shape or dtype,
            or holds NaN or infinity; there is no scaling; the base model is another, or has another head, rows or
            statistics; two tensors of the file differ that are one tied tensor in the model; a model without LoRA
            layers is wrapped in DistributedDataParallel already. One error lists everything, and the model is as it
            was.

    >>> import os, tempfile, torch, lora
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> _ = lora.inject(base, target_modules=["0"], r=2)
    >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
    >>> lora.save_adapter(base, path)
    >>> lora.eject(base)
    >>> lora.load_adapter(base, path).modules[0].r
    2
    """
    wrappers, model = [*obstacles(names_of(model))], unwrapped(model)
    lora_layers(model, "load_adapter", none=True, reads=True)
    ranks = weights.ranks_of(model)
    adapter, what = ranks.on_first(lambda: _sound(source, lora_alpha, to_send=not ranks.alone))
    raise_all(what, _in_parts(names_of(model)), AdapterError)
    if adapter.trained_in_full or adapter.modules_to_save:  # open blocks would take these for the base's
        check_not_disabled(model, "load_adapter")
    fit = Fit(model, adapter, check_base, what)
    raise_all(what, ranks.from_all(fit.problems.found + (wrappers if fit.plans else [])), AdapterError)
    saved = [fit.modules[name] for name in fit.adapter.modules_to_save]
    with undo_on_error(model.modules()) as undo, undo:
        layers = adapt(fit.plans)
        remember_layers(fit.names, layers)
        raise_all(what, let_read(fit.names), AdapterError)
        if layers:
            for module in saved:
                train_in_full(module)
            let_train(model)
        targets = _take_over(fit)
        remember_values(fit.names)
        adapted = [module for module in fit.names if isinstance(module, LoRALayer) and module.r > 0]
        report = report_of(model, fit.names, adapted, tuple(fit.adapter.modules_to_save))
        _write(targets, undo)
        for layer in adapted:
            layer.lora_fresh = None
    return report


def _sound(source: str | os.PathLike[str] | Adapter, lora_alpha: float | None, to_send: bool) -> tuple[Adapter, str]:
    """An adapter with nothing wrong in it, ready to be sent to other processes if need be; and errors' first line."""
    if not isinstance(source, Adapter):
        path = as_path(source, "source", " or a lora.Adapter")
        return read_adapter(path, lora_alpha=lora_alpha), f"load_adapter: {path} is not loaded"
    if lora_alpha is not None:
        raise TypeError("`lora_alpha` is for files that do not say it; an adapter that was read has its scaling.")
    what = "load_adapter: the adapter is not loaded"
    raise_all(what, source.problems(), AdapterError)
    if to_send:  # without its device, its graph, and what else shares its memory
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in source.tensors.items()}
        source = replace(source, tensors=copies)
    return source, what


@weights.outside_inference_mode
def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a model, without the model; it shares the model's tensors, but for layers with room for others.

    Of a sharded model (FSDP2, tensor parallel) every rank has to call this, and gets the whole adapter, on the CPU, in
    tensors of its own.

    Of layers whose start was taken out of their base weights (`lora.initialize`) it is what they have learnt since, at
    twice their rank, in tensors of its own.

    Args:
        model: a model with LoRA layers.

    Raises:
        ValueError: there is no LoRA layer in the model, or `lora.disabled` has tensors exchanged in it.
        AdapterError: DeepSpeed's ZeRO-3 keeps tensors of it in parts; all are listed.

    >>> import torch, lora
    >>> lora.adapter_of(torch.nn.Sequential(lora.Linear(8, 4, r=2))).delta("0").shape
    torch.Size([4, 8])
    """
    model = unwrapped(model)
    lora_layers(model, "adapter_of", reads=True)
    return _adapter_of(model, names_of(model), "adapter_of: no adapter was taken", keep=True)


def _adapter_of(model: nn.Module, names: Names, what: str, keep: bool) -> Adapter:
    """The adapter; without its tensors, gathered one at a time, if it is another rank that is to `keep` them."""
    adapted = {
        without_wrappers(known[0]): layer
        for layer, known in names.items()
        if isinstance(layer, LoRALayer) and layer.r > 0
    }
    raise_all(what, _in_parts(names), AdapterError)
    full, kept = _held(model, names)
    raise_all(what, _quantised(full, kept), AdapterError)
    about: dict[str, ModuleAdapter] = {}
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted.items():
        about[name], its = _own(layer)
        if tensor_name(layer, name, "weight") in full:
            about[name] = replace(about[name], base=replace(about[name].base, sample=None))  # the file holds all of it
        tensors |= {join(name, own): tensor for own, tensor in its.items() if keep}
    for name, (module, own) in full.items():
        whole = _whole(module, own)
        tensors |= {name: whole} if keep else {}
    modules_to_save = [without_wrappers(known[0]) for module, known in names.items() if trains_in_full(module)]
    held = {id(getattr(module, own)) for module, own in full.values()}
    others = describe(names, held, {tensor_name(layer, name, "weight") for name, layer in adapted.items()})
    return Adapter(about, tensors, list(full), modules_to_save, name_of(model), kept=kept, rest=others)


def _held(model: nn.Module, names: Names) -> tuple[dict[str, tuple[nn.Module, str]], list[str]]:
    """What a model's adapter holds beside A and B, as modules and names within; and the names of what did not train."""
    full = {name: (module, own) for name, module, own in trained_in_full(names)}
    kept = [name for name, (module, own) in full.items() if is_kept(module, own)]
    held = {id(getattr(module, own)) for module, own in full.values()}
    ends = {*resized_embeddings(model)}
    for known, module, own, tensor in own_tensors(names):
        if module in ends and id(tensor) not in held and own in module._parameters:
            full[known[0]] = module, own
            kept.append(known[0])
            held.add(id(tensor))
    return full, kept


def _quantised(full: Mapping[str, tuple[nn.Module, str]], kept: Sequence[str]) -> Iterator[str]:
    """A complaint for each part of the base model that nobody else has, and that is quantised."""
    for name in kept:
        module, own = full[name]
        if own == "weight" and describe_tensor(getattr(module, own))["shape"] is None:
            yield (
                f"{name}: rows were added to it, which only this model has, and it is quantised; leave it out when the "
                "model is quantised."
            )


def _in_parts(names: Names) -> Iterator[str]:
    """A complaint for each wrapper or tensor that has the model's parameters in another form than the model."""
    yield from unreadable(names)
    for layer, known in names.items():
        if isinstance(layer, LoRALayer):
            yield from weights.split_up_problems(
                (tensor_name(layer, without_wrappers(known[0]), own), parameter)
                for own, parameter in layer.lora_parameters()
            )
    yield from weights.split_up_problems((name, getattr(module, own)) for name, module, own in trained_in_full(names))


def _own(layer: LoRALayer) -> tuple[ModuleAdapter, dict[str, Tensor]]:
    """The settings and the tensors of a layer's adapter."""
    about = ModuleAdapter.of(layer)
    tensors = {own: _whole(layer, own) for own, _ in layer.lora_parameters()}
    if layer.lora_start is not None:
        about = replace(about, scaling=about.scaling or 1.0).at_rank(2 * layer.r)
        pair = [*since_start(weights.ranks_of(layer).with_whole(layer, *PARAMETERS), about.scaling)]
    else:
        r, lora_alpha, *pair = layer.lora_trimmed(*(tensors[own] for own in PARAMETERS))
        about = replace(about, r=r, lora_alpha=lora_alpha)
    return about, tensors | dict(zip(PARAMETERS, pair, strict=True))


def _whole(module: nn.Module, own: str) -> Tensor:
    """One of a module's own tensors; of a sharded one a whole copy on the CPU, where there is room for it.

    A base weight comes as it was pretrained, whatever an initialiser took out of it.
    """
    tensor: Tensor = getattr(module, own)
    if own == "weight" and isinstance(module, LoRALayer) and module.lora_start is not None:
        tensor = pretrained_weight(module)
    whole = weights.of(module, own, tensor).whole()
    return whole.cpu() if weights.is_sharded(tensor) else whole


def _take_over(fit: Fit) -> list[Target]:
    """Give the model the settings of an adapter that fits it; the values that are to be written next."""
    adapter, targets = fit.adapter, list[Target]()
    kept = {*adapter.kept}
    for name, settings in adapter.modules.items():
        layer = fit.modules[name]
        assert isinstance(layer, LoRALayer), "it fits"
        layer.lora_take(settings.r, settings.lora_alpha, float(settings.scaling), settings.use_rslora)
        targets += [(layer, own, adapter.tensors[join(name, own)]) for own, _ in layer.lora_parameters()]
    for name in adapter.trained_in_full:
        owner, _, own = name.rpartition(".")
        module = fit.modules[owner]
        if name in kept:
            keep(module, own)
        else:
            remember(module, own)
            if own in module._parameters:
                getattr(module, own).requires_grad_(True)
        targets.append((module, own, adapter.tensors[name]))
    return targets + fit.as_before


def _write(targets: Sequence[Target], undo: undo_on_error) -> None:
    """Write values into modules' tensors; the Parameter objects stay."""
    for module, own, value in targets:
        undo.keep(getattr(module, own))
        weights.of(module, own).write(value)
