"""One file with the A and B of every module, as most tools write it: its names say which tool's it is.

A style is how a tool calls the tensors of a module, and where it says their scaling. What no style knows is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn as nn
from torch import Tensor

from lora.adapters.adapter import MAGNITUDE, PARAMETERS, Adapter, ModuleAdapter
from lora.adapters.files import read_header, read_object, read_tensors
from lora.adapters.formats import unasked
from lora.adapters.paths import kind, open_file, reading
from lora.errors import AdapterError, Problems, is_number, short
from lora.formats import diffusion, loralib, peft
from lora.formats.peft_folder import CONFIG
from lora.formats.torch_files import read_torch
from lora.layers.settings import alpha_of

ALPHA = "alpha"
_METADATA_OF_OURS = "lora"
_MAYBE_EMBEDDING = re.compile("emb|wte|wpe")
# How the names of other methods' tensors end, which are no A and B.
_OTHERS = {
    "LoHa": re.compile(r"\.hada_(w[12]_[ab]|t[12])$"),
    "LoKr": re.compile(r"\.lokr_(w[12](_[ab])?|t2)$"),
    "OFT": re.compile(r"\.oft_(blocks|diag)$|\.oft_R(\.\w+)?\.weight$"),
    "IA³": re.compile(r"\.on_input$|\.ia3_l(\.\w+)?$"),
    "LoRA with a third factor (Tucker)": re.compile(r"\.lora_mid\.weight$"),
    "whole differences of weights": re.compile(r"\.(diff|diff_b|set_weight)$"),
    "LoRA of several experts in one tensor": re.compile(r"\.experts\.(base_layer\.)?lora_[AB](\.\w+)?\.weight$"),
}


@dataclass(frozen=True)
class File:
    """What a file holds, and what a user has said of it."""

    path: Path
    pairs: Mapping[str, Mapping[str, Tensor]]  # by module, the tensors of each by `lora_A`, `lora_B`, …
    is_diffusers: bool
    metadata: Mapping[str, str]
    lora_alpha: float | None

    def alpha(self, said: bool, owner: str) -> float | None:
        """The `lora_alpha` that the user gave; TypeError if the file says it."""
        if said and self.lora_alpha is not None:
            raise TypeError(unasked(self.path, owner))
        return self.lora_alpha


class Style(NamedTuple):
    """How a tool writes adapters into one file.

    Attributes:
        format: the name of the format, in the table of formats.
        parts: how the names of a module's tensors end.
        said: what a file says of its modules' ranks and scalings.
        matrices: whether A and B are always two matrices.
        transposed: whether A is (in, r) and B (r, out).
    """

    format: str
    parts: Mapping[str, re.Pattern[str]]
    said: Callable[[File], peft.Said]
    matrices: bool = False
    transposed: bool = False


# ---- what each tool says --------------------------------------------------------------------------------------------


def _or_one(file: File) -> peft.Said:
    """Diffusion tools: `alpha` of a module, or a configuration in the metadata; where there is none, s = 1."""
    configured = diffusion.configured(file.path, file.metadata, [*file.pairs])
    if configured is not None:
        file.alpha(True, "diffusers'")
        return configured
    given = file.alpha(any(ALPHA in pair for pair in file.pairs.values()), "such a file")

    def said(name: str) -> tuple[Mapping[str, Any], int, float]:
        pair = file.pairs[name]
        _check_magnitude(pair)
        r = _rank(pair)
        return _config(pair), r, _number(pair[ALPHA]) if ALPHA in pair else float(r if given is None else given)

    return said


def _raw(file: File) -> peft.Said:
    """PEFT's tensors without its configuration: diffusers', if their names say so; or the user says `lora_alpha`."""
    if file.is_diffusers or any(ALPHA in pair for pair in file.pairs.values()):
        return _or_one(file)
    return _given(file, f"PEFT says it in {CONFIG}, which is not there")


def _given(file: File, why: str) -> peft.Said:
    lora_alpha = file.lora_alpha
    if lora_alpha is None:
        raise AdapterError(
            f"read_adapter: {file.path} has no scaling: {why}; give `lora_alpha`, as it was in training."
        )
    return lambda name: (_config(file.pairs[name]), _rank(file.pairs[name]), lora_alpha)


def _mlx(file: File) -> peft.Said:
    """mlx-lm: `scale` in adapter_config.json is s itself."""
    place = file.path.parent / CONFIG
    if not kind(place):
        return _given(file, f"mlx-lm says it in {CONFIG}, which is not beside it")
    file.alpha(True, "mlx-lm's")
    config = read_object(place)
    about = config.get("lora_parameters")
    about = about if isinstance(about, dict) else {}
    scale, dropout = about.get("scale"), about.get("dropout", 0.0)
    tuned = config.get("fine_tune_type", "lora")
    with Problems(f"read_adapter: {file.path} is not loaded", AdapterError) as problems:
        if tuned not in ("lora", "dora"):
            problems.add(f"`fine_tune_type` must be 'lora' or 'dora' in {place}, got {short(tuned)}.")
        if not is_number(scale):
            problems.add(f"`lora_parameters` must say `scale` in {place}, a number, got {short(scale)}.")
        if "alpha" in about and about["alpha"] != about.get("rank"):
            problems.add(
                f"`lora_parameters` has `alpha` in {place}: mlx-lm multiplied `scale` by alpha / rank up to 0.13, and "
                "passes over it since. Remove `alpha`, after you have put the product in the place of `scale` if the "
                "file is as old."
            )
    assert is_number(scale), "it was looked at"

    def said(name: str) -> tuple[Mapping[str, Any], int, float]:
        pair = file.pairs[name]
        r = _rank(pair)
        return _config(pair) | {"lora_dropout": dropout}, r, alpha_of(float(scale), r)

    return said


def _torchtune(file: File) -> peft.Said:
    """torchtune: PEFT's configuration, beside the file, says r and lora_alpha; its names are not the file's."""
    place = file.path.parent / CONFIG
    if not kind(place):
        return _given(file, f"torchtune says it in {CONFIG}, which is not beside it")
    file.alpha(True, "torchtune's")
    config = read_object(place)
    peft.check_config(f"read_adapter: {file.path} is not loaded", config)
    plain = {option: config[option] for option in ("lora_dropout",) if option in config}
    return lambda name: (_config(file.pairs[name]) | plain, config.get("r", 8), config.get("lora_alpha", 8))


def _config(pair: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"use_dora": MAGNITUDE in pair}


def _check_magnitude(pair: Mapping[str, Tensor]) -> None:
    """ValueError if magnitudes (DoRA) are not one for each output: LyCORIS may have one for each input."""
    shape = pair[MAGNITUDE].shape if MAGNITUDE in pair else None
    if shape is not None and (shape[:1] != pair["lora_B"].shape[:1] or shape.numel() != shape[0]):
        raise ValueError(
            f"`dora_scale` must have a value for each of the {len(pair['lora_B'])} outputs, got the shape {(*shape,)}: "
            "one for each input cannot be read."
        )


def _rank(pair: Mapping[str, Tensor]) -> int:
    A = pair["lora_A"]
    return len(A) if A.dim() else 0  # what is no matrix is refused later


def _number(tensor: Tensor) -> float:
    """What an `alpha` says."""
    if tensor.numel() != 1 or tensor.is_complex():
        raise ValueError(f"`alpha` must be one number, got the shape {(*tensor.shape,)} of {tensor.dtype}.")
    return float(tensor)


# ---- the styles -----------------------------------------------------------------------------------------------------


def _parts(*endings: str, alpha: str = "") -> dict[str, re.Pattern[str]]:
    """How names end: those of A, of B, and of magnitudes where there are some; and those of alphas."""
    by_part = dict(zip((*PARAMETERS, MAGNITUDE), endings, strict=False)) | ({ALPHA: alpha} if alpha else {})
    return {part: re.compile(f"(?:{ending})$") for part, ending in by_part.items()}


_ADAPTER = r"(?:\.(?!weight$)[^.]+)?"  # an adapter's name, as raw state dicts have it
_OLD = r"(?:[._]lora|\.lora_linear_layer)"  # diffusers' word, before it took PEFT's
_OLD_PARTS = (rf"{_OLD}\.down\.weight", rf"{_OLD}\.up\.weight")
_OLD_ALPHA = rf"(?:{_OLD}(?:\.down)?)?\.(?:network_)?alpha"
_PEFTS = tuple(rf"\.lora_{part}{_ADAPTER}\.weight|\.lora_embedding_{part}{_ADAPTER}" for part in "AB")
# Names in a state dict of PEFT's own models: their wrapper's, and an adapter's.
_PEFTS_OWN = re.compile(rf"^{re.escape(peft.PREFIX)}|\.lora_[AB]\.(?!weight$)[^.]+\.weight$")
_PEFTS_MAGNITUDE = rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?"
_STYLES = (
    Style("kohya", _parts(r"\.lora_down\.weight", r"\.lora_up\.weight", r"\.dora_scale", alpha=r"\.alpha"), _or_one),
    Style("diffusers", _parts(*_OLD_PARTS, alpha=_OLD_ALPHA), _or_one),
    Style("peft", _parts(*_PEFTS, _PEFTS_MAGNITUDE, alpha=r"\.alpha"), _raw),
    Style("torchtune", _parts(r"\.lora_a\.weight", r"\.lora_b\.weight", r"\.magnitude"), _torchtune, matrices=True),
    Style("mlx", _parts(r"\.lora_a", r"\.lora_b", r"\.m"), _mlx, matrices=True, transposed=True),
)
# diffusers converts some of PEFT's names into its old ones, and leaves others.
_MIXED = Style(
    "diffusers",
    _parts(*map("|".join, zip(_OLD_PARTS, _PEFTS, strict=True)), _PEFTS_MAGNITUDE, alpha=_OLD_ALPHA),
    _or_one,
)


def _style(path: Path, names: Iterable[str]) -> Style | None:
    """The style that names are of; AdapterError where they are of several, or of another method."""
    found: dict[str, tuple[Style, str]] = {}
    for name in names:
        style = next((s for s in _STYLES if any(s.parts[part].search(name) for part in PARAMETERS)), None)
        if style is not None:
            found.setdefault(style.format, (style, name))
    if found.keys() == {"diffusers", "peft"}:
        return _MIXED
    if len(found) > 1:
        listed = " and ".join(f"{name} ({format}'s)" for format, (_, name) in found.items())
        raise AdapterError(f"read_adapter: {path} is not loaded: it has names of several tools, as {listed}.")
    return next((style for style, _ in found.values()), None)


def _other(name: str) -> str | None:
    return next((method for method, ending in _OTHERS.items() if ending.search(name)), None)


# ---- reading --------------------------------------------------------------------------------------------------------


def reads(path: Path) -> bool:
    """Whether a file is one of torch's, or one of safetensors' with names of a tool's and no metadata of ours."""
    if is_torchs(path):
        return True
    try:
        header = read_header(path)
    except AdapterError:  # its reader says what is wrong, or finds it whole
        return False
    return _METADATA_OF_OURS not in header.metadata and any(map(_is_known, header.tensors))


def _is_known(name: str) -> bool:
    flat = name.rpartition(".")[2] in PARAMETERS  # loralib's
    return (
        flat
        or bool(loralib.OF_A_BANK.search(name))
        or _other(name) is not None
        or any(s.parts[part].search(name) for s in _STYLES for part in PARAMETERS)
    )


def is_torchs(path: Path) -> bool:
    """Whether a file is one of `torch.save`."""
    with reading(path), open_file(path) as file:
        start = file.read(9)
    # By torch before 1.6 it is a pickle; at the place of the ninth byte headers of safetensors begin.
    return start[:4] == b"PK\3\4" or (start[:1] == b"\x80" and start[8:] != b"{")


def read(path: Path, lora_alpha: float | None) -> Adapter:
    """Read a file in whichever style it is; AdapterError if it is in none, or has more than the style knows."""
    tensors, metadata = (read_torch(path), {}) if is_torchs(path) else read_tensors(path)
    style = _style(path, tensors)
    with Problems(f"read_adapter: {path} is not loaded", AdapterError) as problems:
        problems.add(*(f"{name} belongs to {other}, which is not read." for name in tensors if (other := _other(name))))
        problems.raise_any()
        if style is None:
            return loralib.from_state_dict(path, tensors, lora_alpha)
        pairs, full = _sorted(style, tensors, problems)
        problems.add(*_unread(style, full))
        problems.raise_any()
        # PEFT's own models may have words of diffusion models in their names, and s is not 1 there.
        names = () if any(map(_PEFTS_OWN.search, tensors)) else pairs
        is_diffusers = diffusion.is_diffusers(path, metadata, names)
        said = style.said(File(path, pairs, is_diffusers, metadata, lora_alpha))
        modules, own = peft.modules_of(pairs, said, problems)
    if style.format == "mlx":
        unsure = [name for name in modules if _MAYBE_EMBEDDING.search(name.rpartition(".")[2])]
        modules |= {name: _of_kind(modules[name], "mlx-lm's embedding or linear layer") for name in unsure}
    format = style.format
    if format == "peft" and is_diffusers:
        format = "diffusers"
    return Adapter(modules, own, format=format)


def _sorted(
    style: Style, tensors: Mapping[str, Tensor], problems: Problems
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors of each module, and the names of what belongs to none."""
    pairs: dict[str, dict[str, Tensor]] = {}
    keys: dict[tuple[str, str], str] = {}
    full = []
    for key, tensor in tensors.items():
        part, found = next(
            ((part, found) for part, ending in style.parts.items() if (found := ending.search(key))), (None, None)
        )
        if part is None or found is None:
            full.append(key)
            continue
        name = diffusion.plain(key[: found.start()]).removeprefix(peft.PREFIX)
        before = keys.setdefault((name, part), key)
        if before != key:
            problems.add(f"{before} and {key} are both {part} of {name}.")
        pair = pairs.setdefault(name, {})
        if "lora_embedding_" in found.group():
            pair["embedding"] = tensor
        if style.matrices and part in PARAMETERS and tensor.dim() != 2:
            problems.add(f"{key} must be a matrix, got the shape {(*tensor.shape,)}: experts' are not read.")
        elif style.transposed and part in PARAMETERS:
            tensor = tensor.T.contiguous()
        pair[part] = tensor
    return pairs, full


def of_kinds(adapter: Adapter, modules: Mapping[str, nn.Module], problems: Problems) -> Adapter:
    """The adapter with embeddings where the model has them: mlx-lm's files call A and B of both kinds alike."""
    settings = dict(adapter.modules)
    for name in settings.keys() & modules.keys():
        kind = "embedding" if isinstance(modules[name], nn.Embedding) else "linear"
        settings[name] = _of_kind(settings[name], kind)
        if kind == "embedding" and settings[name].use_dora:
            problems.add(
                f"{name}: mlx-lm has a magnitude (DoRA) for each row of an embedding, and lora for each column."
            )
    return replace(adapter, modules=settings)


def _of_kind(settings: ModuleAdapter, kind: str) -> ModuleAdapter:
    return replace(settings, base=replace(settings.base, kind=kind))


def _unread(style: Style, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        more = f" (in {CONFIG} PEFT says what such tensors mean)" if style.format == "peft" else ""
        yield f"{name} is no part of an adapter as {style.format} names them{more}."
