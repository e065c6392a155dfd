"""Reading PEFT's format: what its configuration and the names of its tensors mean."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora.adapters.adapter import MAGNITUDE, PARAMETERS, Adapter, ModuleAdapter
from lora.adapters.base import Base, sample_of
from lora.adapters.files import kind, read_object, read_tensors, short
from lora.adapters.formats import FILE, rest_of
from lora.errors import AdapterError, is_number, join, raise_all
from lora.formats.peft import BASES, CONFIG, LAYOUTS, PREFIX, WEIGHTS, within_groups
from lora.formats.torch_files import read_torch
from lora.layers.layer import scaling_of, settings_problems
from lora.models.training import is_bias

Content = tuple[Mapping[str, Tensor], Mapping[str, str]]
READERS: dict[str, Callable[[Path], Content]] = {
    WEIGHTS: read_tensors,
    "adapter_model.bin": lambda path: (read_torch(path), {}),
}
# What transformers calls its Conv1D layers, whose weight is stored transposed; other models' nn.Linear bear them, too.
_MAYBE_TRANSPOSED = ("c_attn", "c_proj", "c_fc", "q_attn")
# The tensors of an adapter, by how their names end; saved from a raw state dict they bear the adapter's name as well.
_PARTS = {
    "lora_A": re.compile(r"\.lora_A(\.default)?\.weight$|\.lora_embedding_A(\.default)?$"),
    "lora_B": re.compile(r"\.lora_B(\.default)?\.weight$|\.lora_embedding_B(\.default)?$"),
    MAGNITUDE: re.compile(r"\.lora_magnitude_vector(\.default)?(\.weight)?$"),
}
_REFUSED_PARTS = {
    "a bias of lora_B (`lora_bias`) has no place here": re.compile(r"\.lora_B(\.default)?\.bias$"),
}
# Settings under which an adapter's A and B alone do not say what it computes.
_REFUSED_SETTINGS = (
    "use_qalora",
    "lora_bias",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
)
_PATTERNS = ("rank_pattern", "alpha_pattern")
_LONGEST_PATTERN = 1000
# Matching goes through all ways in which a pattern may lie on a name, at worst; more than these take too long.
_MOST_WAYS = 10**7
# Initialisers that change the base weight: the adapter belongs to what is left of it.
_REFUSED_INITS = re.compile(r"pissa.*|olora|loftq|corda|lora_ga")


def claims(path: Path) -> bool:
    """Whether a file is read as one of a folder of PEFT's."""
    names = (CONFIG, *READERS)
    return path.name in names and (path.name == CONFIG or kind(path.parent / CONFIG) is not None)


def reads(path: Path) -> bool:
    """Whether there is a folder, or a file of PEFT's: what other formats keep in a folder they have been asked for."""
    return kind(path) == "folder" or claims(path)


def read(path: Path) -> Adapter:
    """Read a folder of PEFT's, or one of the files in it; AdapterError if it is something else, or more than LoRA."""
    whole = kind(path) == "folder"
    folder = path if whole else path.parent
    names = [path.name] if path.name in READERS and not whole else [*READERS]
    file = next((folder / name for name in names if kind(folder / name)), None)
    if file is None:
        names += [FILE] if whole else []  # which would have been read, and not as PEFT's
        raise FileNotFoundError(f"there is no adapter in {folder}: it has none of {', '.join(names)}.")
    config = _read_config(folder / CONFIG)
    what = f"read_adapter: {folder} is not loaded"
    raise_all(what, _config_problems(config), AdapterError)
    tensors, metadata = READERS[file.name](file)
    pairs, full, problems = _sort(tensors)
    for option in _PATTERNS:
        longest = max(map(len, pairs), default=1)
        raise_all(what, _pattern_problems(option, config.get(option) or (), longest), AdapterError)
    adapter = _adapter(config, pairs, full, problems)
    raise_all(what, problems, AdapterError)
    _tell_layouts(adapter, config, metadata)
    _tell_bases(adapter, metadata)
    kept, rest = rest_of(metadata, file)
    return replace(adapter, kept=kept, rest=rest) if kept or rest else adapter


def _tell_layouts(adapter: Adapter, config: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Whether each linear layer's weight is stored transposed; None where only the model knows.

    PEFT's configuration has one flag for all layers, that of the last which it met.
    """
    layouts = _from_json(metadata, LAYOUTS)
    for name, settings in adapter.modules.items():
        if settings.base.kind != "linear":
            continue
        if isinstance(layouts, dict):
            layout = layouts.get(name)
            layout = layout if isinstance(layout, bool) else None
        else:
            sure = not config.get("fan_in_fan_out") and name.rpartition(".")[2] not in _MAYBE_TRANSPOSED
            layout = False if sure else None
        adapter.modules[name] = replace(settings, base=replace(settings.base, fan_in_fan_out=layout))


def _tell_bases(adapter: Adapter, metadata: Mapping[str, str]) -> None:
    """What lora, where it wrote the folder, has noted of the weights that are adapted."""
    bases = _from_json(metadata, BASES)
    for name, settings in adapter.modules.items():
        known = bases.get(name) if isinstance(bases, dict) else None
        facts = known if isinstance(known, dict) else {}
        facts = {fact: facts[fact] for fact in ("shape", "sample") if facts.get(fact) is not None}
        adapter.modules[name] = replace(settings, base=Base.from_mapping({**settings.base, **facts}))


def _from_json(metadata: Mapping[str, str], key: str) -> Any:
    """What an entry of a file's metadata says; None if it says nothing that can be read."""
    try:
        return json.loads(metadata.get(key, "null"))
    except (ValueError, RecursionError):
        return None


def _read_config(path: Path) -> dict[str, Any]:
    if kind(path) is None:
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}, without which PEFT's tensors mean nothing.")
    return read_object(path)


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"`peft_type` must be 'LORA', got {short(config.get('peft_type'))}."
    for name in _REFUSED_SETTINGS:
        if config.get(name):
            yield f"`{name}` is set: what the adapter computes is more than its A and B say."
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and _REFUSED_INITS.fullmatch(init):
        yield f"`init_lora_weights` is {short(init)}, which changes the base weight; let PEFT convert it first."
    yield from settings_problems(config.get("r", 8), config.get("lora_alpha", 8), config.get("lora_dropout", 0.0))
    for option in ("use_rslora", "use_dora"):
        if not isinstance(config.get(option, False), bool):
            yield f"`{option}` must be true or false, got {short(config[option])}."
    for option in _PATTERNS:
        patterns = config.get(option) or {}
        if not isinstance(patterns, dict):
            yield f"`{option}` must map names to numbers, got {short(patterns)}."
            continue
        yield from _pattern_problems(option, patterns, 1)
        yield from (
            f"`{option}`: {short(p)} must have a number, got {short(v)}."
            for p, v in patterns.items()
            if not is_number(v)
        )
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        yield f"`modules_to_save` must be a list of names, got {short(saved)}."


def _pattern_problems(option: str, patterns: Iterable[str], length: int) -> Iterator[str]:
    yield from (f"`{option}`: {problem}" for pattern in patterns if (problem := pattern_problem(pattern, length)))


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """Pairs of A and B by module, tensors that trained in full, and everything that has no place."""
    pairs: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    problems = []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        part = next((part for part, ending in _PARTS.items() if ending.search(name)), None)
        refused = [reason for reason, ending in _REFUSED_PARTS.items() if ending.search(name)]
        if refused:
            problems.append(f"{key}: {refused[0]}.")
        elif part is None:
            full[re.sub(r"\.(base_layer|modules_to_save)\.", ".", name)] = tensor
        else:
            module = _PARTS[part].sub("", name)
            kind = "embedding" if "lora_embedding_" in name[len(module) :] else "linear"
            pairs.setdefault(module, {})[part] = tensor
            pairs[module][kind] = tensor
    return pairs, full, problems


def _adapter(
    config: Mapping[str, Any],
    pairs: Mapping[str, Mapping[str, Tensor]],
    full: dict[str, Tensor],
    problems: list[str],
) -> Adapter:
    modules: dict[str, ModuleAdapter] = {}
    tensors: dict[str, Tensor] = {}
    ranks, alphas = (compiled(config.get(option) or {}) for option in _PATTERNS)
    for name, pair in pairs.items():
        missing = [part for part in PARAMETERS if part not in pair]
        problems += [f"{name}: {part} is missing." for part in missing]
        if not missing:
            try:
                r = value_for(name, ranks, config.get("r", 8))
                lora_alpha = value_for(name, alphas, config.get("lora_alpha", 8))
                modules[name] = _settings(config, r, lora_alpha, pair)
                A = within_groups(pair["lora_A"], modules[name].base.groups)
                tensors |= {join(name, "lora_A"): A, join(name, "lora_B"): pair["lora_B"]}
                if MAGNITUDE in pair:  # of a convolution (1, out_channels, 1, …)
                    tensors[join(name, MAGNITUDE)] = pair[MAGNITUDE].flatten()
            except ValueError as error:
                problems.append(f"{name}: {error}")
    if not pairs:
        problems.append("it adapts no module.")
    for name in [name for name in full if _is_base_weight(name, pairs)]:
        owner = name.rpartition(".")[0]
        if owner in modules:
            base = replace(modules[owner].base, shape=tuple(full[name].shape), sample=sample_of(full[name]))
            modules[owner] = replace(modules[owner], base=base)
    # With `bias="all"` PEFT saves the biases that modules_to_save had before as well; nothing computes with them.
    before = [name for name in full if ".original_module." in name and name.replace(".original_module.", ".") in full]
    full = {name: tensor for name, tensor in full.items() if name not in before}
    saved = _saved(config.get("modules_to_save") or [], full)
    base_model = config.get("base_model_name_or_path")
    base_model = base_model if isinstance(base_model, str) else None
    biases_train = config.get("bias", "none") != "none"
    kept = [
        name
        for name in full
        if name.rpartition(".")[0] not in saved and not (biases_train and is_bias(name.rpartition(".")[2]))
    ]
    return Adapter(modules, {**tensors, **full}, list(full), saved, base_model, "peft", kept)


def _is_base_weight(name: str, pairs: Mapping[str, object]) -> bool:
    # PEFT saves the weight of an adapted embedding beside its adapter: the base's own, perhaps with rows added to it.
    owner, _, own = name.rpartition(".")
    return owner in pairs and own == "weight"


def _saved(patterns: list[str], full: Iterable[str]) -> list[str]:
    """The modules that own tensors which trained in full, and whose names, or a parent's, end as one of `patterns`.

    Whole components or not, as PEFT goes by them: "classifier" is for DistilBert's "pre_classifier" as well.
    """
    owners = dict.fromkeys(name.rpartition(".")[0] for name in full)
    return [owner for owner in owners if any(f"{pattern}." in f"{owner}." for pattern in patterns)]


def _settings(config: Mapping[str, Any], r: Any, lora_alpha: Any, pair: Mapping[str, Tensor]) -> ModuleAdapter:
    A, B = pair["lora_A"], pair["lora_B"]
    if A.dim() != B.dim() or not 2 <= A.dim() <= 5 or 0 in (*A.shape, *B.shape):
        raise ValueError(f"lora_A and lora_B must be two matrices or two kernels, got {(*A.shape,)} and {(*B.shape,)}.")
    if r % B.shape[1] or r != A.shape[0] or (A.dim() == 2 and r != B.shape[1]):
        raise ValueError(f"the shapes {(*A.shape,)} and {(*B.shape,)} do not fit r = {r} in {CONFIG}.")
    if A.dim() == 2:
        base = Base(kind="embedding" if "embedding" in pair else "linear")
    else:
        groups = int(r) // B.shape[1]
        base = Base(kind="conv", shape=(B.shape[0], A.shape[1] // groups, *A.shape[2:]), groups=groups)
    use_rslora = config.get("use_rslora", False)
    return ModuleAdapter(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=config.get("lora_dropout", 0.0),
        use_rslora=use_rslora,
        use_dora=config.get("use_dora", False),
        factored=True if A.dim() > 2 else None,
        scaling=scaling_of(lora_alpha, r, use_rslora),
        base=base,
    )


# ---- patterns of a stranger's, matched as PEFT does, where that is sure to end ---------------------------------------


def compiled(patterns: Mapping[str, Any]) -> list[tuple[re.Pattern[str], Any]]:
    """Patterns, each for a whole name or the end of one after a dot, and their values."""
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]


def value_for(name: str, patterns: Iterable[tuple[re.Pattern[str], Any]], default: Any) -> Any:
    """The value of the first pattern that a name matches."""
    return next((value for pattern, value in patterns if pattern.match(name)), default)


def pattern_problem(pattern: str, length: int = 1) -> str | None:
    """Why a regular expression is not matched with names of up to this length; None if it is."""
    bare = _bare(pattern)
    if len(pattern) > _LONGEST_PATTERN or re.search(r"\)[*+?{]|\(\?", bare) or ways(pattern, length) > _MOST_WAYS:
        long = " with a name so long" if length > 1 else ""
        return f"{pattern[:80]!r} is too intricate to be matched safely{long}."
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{pattern[:80]!r} is no regular expression: {error}."
    return None


def ways(pattern: str, length: int) -> int:
    """In how many ways a pattern without repeated groups may lie on a name of this length, at most.

    >>> ways("q_proj|v_proj", 20), ways(r".*\\.(q|v)_proj", 20)
    (42, 462)
    """
    bare = _bare(pattern)
    repeats = 1 + len(re.findall(r"[*+{]", bare))  # `.*` and its like; one is ours
    choices = math.prod(1 + part.count("|") for part in re.split(r"[()]", bare)) << bare.count("?")
    return choices * math.comb(length + repeats, repeats)


def _bare(pattern: str) -> str:
    return re.sub(r"\\.|\[[^\]]*\]", "x", pattern)  # escapes and sets of characters stand for one character
