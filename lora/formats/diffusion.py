"""Adapters of diffusion models, as kohya's scripts, diffusers and ai-toolkit name them; diffusers' are written, too.

A file may hold adapters of several models of a pipeline, whose names say which one: `unet.….to_q`, or with all dots as
underscores `lora_unet_…_to_q`, which only the model can take apart again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor

from lora.adapters.adapter import PARAMETERS, Adapter, ModuleAdapter
from lora.adapters.formats import object_in
from lora.adapters.paths import check_place, writing
from lora.adapters.saving import write_tensors
from lora.errors import AdapterError, Problems, join, raise_all, short
from lora.formats import peft
from lora.formats.peft_attention import attention_in
from lora.formats.portable import portable
from lora.layers.conv import ConvLoRA
from lora.layers.layer import LoRALayer
from lora.layers.registry import kind_for

FILE = "pytorch_lora_weights.safetensors"
FILES = (FILE, "pytorch_lora_weights.bin")
_CONFIGS = "lora_adapter_metadata"
# The models of a pipeline, as names begin.
_MODELS = ("unet", "transformer", "transformer_2", "prior", "diffusion_model")
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# And as kohya's names begin; what it calls lora_unet may be a transformer.
_PREFIXES = {
    "lora_unet_": _MODELS,
    "lora_transformer_": ("transformer",),
    "lora_te_": _ENCODERS[:1],
    **{f"lora_te{n + 1}_": (encoder,) for n, encoder in enumerate(_ENCODERS)},
}
# Words of these models: `transformer.h.0.attn` is a language model's.
_WORDS = re.compile(r"(transformer|down|up|mid|double|single)_blocks?\.|\.attn[12]\b|\.attn\.to_([qkv]|out)\b")
# How diffusers named its attention before 0.22, and what its modules are called.
_PROCESSORS = (
    (re.compile(r"\.processor\.to_out$"), ".to_out.0"),
    (re.compile(r"\.processor\.(to_[qkv])$"), r".\1"),
    (re.compile(r"(\.self_attn)\.to_([qkv]|out)$"), r"\1.\2_proj"),
)


# ---- names ----------------------------------------------------------------------------------------------------------


def plain(name: str) -> str:
    """A module's name, of one that may have been an attention processor's."""
    for pattern, instead in _PROCESSORS:
        name = pattern.sub(instead, name)
    return name


def is_diffusers(path: Path, metadata: Mapping[str, str], names: Iterable[str]) -> bool:
    """Whether names without a configuration are a diffusion model's, in which s is 1 where nobody says another."""
    if path.name in FILES or _CONFIGS in metadata:
        return True
    names = list(names)
    return bool(names) and all(_model_of(name) for name in names) and any(map(_WORDS.search, names))


def _model_of(name: str) -> str | None:
    first = name.partition(".")[0]
    if first != name and first in (*_MODELS, *_ENCODERS):
        return first
    return next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)


def meant(adapter: Adapter, modules: Mapping[str, nn.Module], problems: Problems) -> Adapter:
    """The adapter with the names and the shapes of a model's modules, where it has them."""
    flattened: dict[str, list[str]] = {}
    for name in modules:
        flattened.setdefault(name.replace(".", "_"), []).append(name)
    models = {_model_of(name) for name in adapter.modules}
    names: dict[str, str] = {}
    for name in adapter.modules:
        found = sorted({*_candidates(name, len(models) == 1, modules, flattened)})
        if len(found) > 1:
            problems.add(f"{name}: may be {' or '.join(found)}.")
        names[name] = found[0] if found else name
    if len(models) > 1 and any(name not in modules for name in names.values()):
        listed = ", ".join(sorted(model or "none" for model in models))
        problems.add(
            f"the file holds adapters of several models ({listed}): load it into one module that has them as children, "
            'as `torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})`.'
        )
    if len({*names.values()}) < len(names):
        return adapter  # the names clash, which is an error of its own
    settings, tensors = dict[str, ModuleAdapter](), dict[str, Tensor]()
    for old, new in names.items():
        settings[new], pair = _shaped(modules.get(new), adapter.modules[old], *adapter.pair(old))
        tensors |= {join(new, part): tensor for part, tensor in zip(PARAMETERS, pair, strict=True)}
        magnitude = adapter.magnitude(old)
        if magnitude is not None:
            tensors[join(new, "lora_magnitude")] = magnitude
    return replace(adapter, modules=settings, tensors=tensors)


def _candidates(
    name: str, alone: bool, modules: Mapping[str, nn.Module], flattened: Mapping[str, list[str]]
) -> Iterator[str]:
    """The modules that a name of a file may stand for; `alone` says that all of the file is for one model."""
    model = _model_of(name)
    if name in modules:
        yield name
    elif model is None:
        return
    elif model not in _PREFIXES:
        rest = name.removeprefix(f"{model}.")
        bare = rest.removeprefix("text_model.")  # which transformers 5 has left out
        for form in (f"{model}.{bare}", *((rest, bare) if alone else ())):
            if form in modules:
                yield form
    else:
        rest = name.removeprefix(model)
        for form in {rest, rest.removeprefix("text_model_"), _of_stability(rest)}:
            for key in (*(f"{child}_{form}" for child in _PREFIXES[model]), *([form] if alone else [])):
                yield from flattened.get(key, ())


def _shaped(
    module: nn.Module | None, settings: ModuleAdapter, A: Tensor, B: Tensor
) -> tuple[ModuleAdapter, tuple[Tensor, Tensor]]:
    """A module's adapter in the shape of the model's: a convolution with a kernel of 1 may be stored as linear."""
    kind = type(module) if isinstance(module, LoRALayer) else kind_for(type(module)) if module is not None else None
    if kind is None:
        return settings, (A, B)
    size: Any = getattr(module, "kernel_size", None)
    if issubclass(kind, ConvLoRA) and settings.base.kind == "linear" and {*size} == {1} and module.groups == 1:  # type: ignore[union-attr]
        shape = (B.shape[0], A.shape[1], *size)
        base = replace(settings.base, kind="conv", shape=shape, fan_in_fan_out=False)
        return replace(settings, base=base, factored=True), (A.view(*A.shape, *size), B.view(*B.shape, *size))
    flat = A.dim() > 2 and A[0, 0].numel() == 1
    if not issubclass(kind, ConvLoRA) and settings.base.kind == "conv" and flat:
        base = replace(settings.base, kind="linear", shape=None, fan_in_fan_out=None)
        return replace(settings, base=base, factored=None), (A.flatten(1), B.flatten(1))
    return settings, (A, B)


# ---- names of the models that Stability published, in the places of diffusers' --------------------------------------

_LAYERS = 2  # of a block, in Stable Diffusion 1, 2 and XL
_ELSEWHERE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_IN_A_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input|output)_blocks_(\d{1,3})_(\d)_(\w+)|middle_block_([012])_(\w+)")


def _of_stability(name: str) -> str:
    """A flattened name as diffusers has it; the name itself, if it is none of Stability's.

    >>> _of_stability("input_blocks_4_1_proj_in"), _of_stability("output_blocks_2_2_conv")
    ('down_blocks_1_attentions_0_proj_in', 'up_blocks_0_upsamplers_0_conv')
    """
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    found = _BLOCK.fullmatch(name)
    if found is None:
        return name
    side, number, inner, rest, middle, in_middle = found.groups()
    if middle is not None:
        place = ("resnets_0", "attentions_0", "resnets_1")[int(middle)]
        return f"mid_block_{place}_{_IN_A_RESNET.get(in_middle, in_middle)}"
    block, layer = divmod(int(number) - (side == "input"), _LAYERS + 1)
    way = "down" if side == "input" else "up"
    if rest == ("op" if side == "input" else "conv"):
        return f"{way}_blocks_{block}_{way}samplers_0_conv"
    place = "resnets" if inner == "0" else "attentions"
    return f"{way}_blocks_{block}_{place}_{layer}_{_IN_A_RESNET.get(rest, rest)}"


# ---- what diffusers says in the metadata ----------------------------------------------------------------------------


def configured(path: Path, metadata: Mapping[str, str], names: Iterable[str]) -> peft.Said | None:
    """What the configurations of a pipeline's models, PEFT's, say of their modules; None where a file has none."""
    if _CONFIGS not in metadata:
        return None
    what = f"read_adapter: {path} is not loaded"
    said = object_in(metadata, _CONFIGS)
    if said is None:
        raise AdapterError(f"{what}: its metadata must have an object under {_CONFIGS!r}.")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        model, _, option = key.partition(".")
        configs.setdefault(model, {"peft_type": "LORA"})[option] = value
    bare: dict[str, list[str]] = {}
    for name in names:
        model, _, rest = name.partition(".")
        bare.setdefault(model, []).append(rest)
    for config in configs.values():
        peft.check_config(what, config)
    by_model = {model: peft.said_by(what, configs[model], rest) for model, rest in bare.items() if model in configs}

    def of(name: str) -> tuple[Mapping[str, Any], Any, Any]:
        model, _, rest = name.partition(".")
        if model not in by_model:
            raise ValueError(f"the metadata say nothing of {short(model)} under {_CONFIGS!r}.")
        return by_model[model](rest)

    return of


# ---- diffusers' file, written ---------------------------------------------------------------------------------------


def write(adapter: Adapter, path: Path, names: Iterable[str], function: str) -> None:
    """Write the folder that diffusers' `load_lora_weights` reads: one rank and s = 1, as its old releases want it."""
    what = f"{function}: {path} is not written"
    adapter = portable(adapter, function)
    by_model: dict[str, list[str]] = {}
    for name in adapter.modules:
        by_model.setdefault(_model_of(name) or "", []).append(name)
    raise_all(what, _without_place(adapter, by_model.keys() - {*_MODELS, *_ENCODERS}), AdapterError)
    check_place(path, "folder")
    others = [*names]
    configs: dict[str, Any] = {}
    for model, adapted in by_model.items():
        start = f"{model}."
        bare = [name.removeprefix(start) for name in adapted]
        r = adapter.modules[adapted[0]].r
        targets = peft.targets(bare, [name.removeprefix(start) for name in others if name.startswith(start)])
        config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": targets}
        configs |= {f"{start}{option}": value for option, value in config.items()}
    forms = {name: (settings, *adapter.pair(name)) for name, settings in adapter.modules.items()}
    with writing(path):
        path.mkdir(exist_ok=True)
    write_tensors(path / FILE, peft.named(adapter, forms), {_CONFIGS: json.dumps(configs)}, function)


def _without_place(adapter: Adapter, unknown: Collection[str]) -> Iterator[str]:
    """What of an adapter diffusers has no place for."""
    if unknown:
        yield (
            "names must begin with the model of the pipeline that they belong to. Save it from a module that has the "
            'model as a child: `lora.save_adapter(torch.nn.ModuleDict({"unet": unet}), folder, format="diffusers")`; '
            f"the child is one of {', '.join((*_MODELS, *_ENCODERS))}."
        )
    for owner, names in attention_in(adapter).items():
        yield f"{', '.join(names)}: diffusers adapts layers, and {owner} has parameters of its own."
    for name, settings in adapter.modules.items():
        if settings.base.kind not in ("linear", "conv"):
            yield f"{name}: diffusers adapts no layer of the kind {settings.base.kind}."
        elif beyond := settings.base.beyond_peft:
            yield f"{name}: diffusers would compute the update of a convolution without its {beyond}."
