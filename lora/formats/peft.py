"""PEFT's format: a folder with adapter_config.json and adapter_model.safetensors (or .bin), written and read."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lora.adapters.adapter import MAGNITUDE, PARAMETERS, Adapter, Form, ModuleAdapter, dtype_problems
from lora.adapters.base import Base, sample_of
from lora.adapters.formats import object_in, rest_as_metadata, rest_of
from lora.adapters.paths import kind
from lora.errors import AdapterError, Problems, is_number, join, raise_all, short, some
from lora.formats import peft_merged, peft_parts
from lora.formats.expressions import cost_problem, pattern_problem
from lora.formats.peft_attention import (
    Place,
    attention_among,
    attention_in,
    attention_problems,
    is_follower,
    place_in,
    placed,
)
from lora.formats.peft_folder import CONFIG, adapter_in, check_folder, read_folder, write_folder
from lora.formats.peft_parameters import (
    config_problems,
    names_in_file,
    packed,
    parameter_problems,
    parameters_in,
    parameters_of,
    unpacked,
)
from lora.formats.portable import over_all_channels, singles, within_groups
from lora.layers.settings import alpha_of, scaling_of, settings_problems
from lora.models.patterns import Patterns, Words, ends_of, starts_of
from lora.models.peft_words import OTHER_UPDATES
from lora.models.training import is_bias

# Of a module, by its name: its configuration, its rank and its lora_alpha; ValueError if a file does not say them.
Said = Callable[[str], tuple[Mapping[str, Any], Any, Any]]

# Metadata of ours: for each linear layer whether its weight is stored transposed. PEFT says one thing for all.
LAYOUTS = "fan_in_fan_out"
# And what is known of the weights that are adapted, of which PEFT's folder says nothing.
BASES = "base"
_NOTED = ("shape", "sample", "margin")
PREFIX = "base_model.model."
# What transformers calls its Conv1D layers, whose weight is stored transposed; other models' nn.Linear bear them, too.
_MAYBE_TRANSPOSED = ("c_attn", "c_proj", "c_fc", "q_attn")
# The tensors of an adapter, by how their names end; saved from a raw state dict they bear the adapter's name as well.
_PARTS = {
    "lora_A": re.compile(r"\.lora_A(\.[^.]+)?\.weight$|\.lora_embedding_A(\.[^.]+)?$"),
    "lora_B": re.compile(r"\.lora_B(\.[^.]+)?\.weight$|\.lora_embedding_B(\.[^.]+)?$"),
    MAGNITUDE: re.compile(r"\.lora_magnitude_vector(\.(?!weight$)[^.]+)?(?:\.weight)?$"),
}
# Settings under which an adapter's A and B alone do not say what it computes.
_REFUSED_SETTINGS = (*OTHER_UPDATES, "layer_replication")
_PATTERNS = ("rank_pattern", "alpha_pattern")
# Initialisers that change the base weight: the adapter belongs to what is left of it.
_REFUSED_INITS = re.compile(r"pissa.*|olora|loftq|corda|lora_ga")


# ---- writing --------------------------------------------------------------------------------------------------------


def write(adapter: Adapter, path: Path, names: Iterable[str], function: str) -> None:
    """Write the folder that PEFT's `from_pretrained` reads.

    Args:
        names: of all modules of the model, where it is there: a target that is also the end of another module's name
            is then written as part of a regular expression, which PEFT matches as a whole.
    """
    what = f"{function}: {path} is not written"
    forms = singles(adapter, what)
    attention = attention_in(adapter)
    parameters = parameters_of(adapter, attention)
    raise_all(what, [*_homeless(adapter), *parameter_problems(parameters, names)], AdapterError)
    check_folder(path)
    layouts = {name: settings.base.fan_in_fan_out for name, (settings, _, _) in forms.items()}
    known = {name: {fact: getattr(s.base, fact) for fact in _NOTED} for name, (s, _, _) in forms.items()}
    forms = placed(forms, attention)
    tensors = {f"{PREFIX}{_full_key(name, forms)}": adapter.tensors[name] for name in adapter.trained_in_full}
    tensors |= {f"{PREFIX}{key}": tensor for key, tensor in named(adapter, forms, names_in_file(parameters)).items()}
    metadata = {LAYOUTS: json.dumps(layouts), BASES: json.dumps(known), **rest_as_metadata(adapter)}
    write_folder(path, tensors, metadata, _config(adapter, forms, names, [*parameters]), function)


def named(
    adapter: Adapter, forms: Mapping[str, Form], called: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Tensor]:
    """A, B and magnitudes by PEFT's names: those that are `called` otherwise than the layers."""
    tensors: dict[str, Tensor] = {}
    for name, (settings, A, B) in forms.items():
        embedding, place = settings.base.kind == "embedding", called.get(name, name)
        A, B = packed(settings, over_all_channels(A, settings.base.groups), B)
        for part, tensor in (("A", A), ("B", B)):
            tensors[f"{place}." + (f"lora_embedding_{part}" if embedding else f"lora_{part}.weight")] = tensor
        magnitude = adapter.magnitude(name) if settings.use_dora else None
        if magnitude is not None:
            shape = (1, -1, *[1] * (A.dim() - 2)) if A.dim() > 2 else (-1,)
            tensors[f"{place}.lora_magnitude_vector"] = magnitude.view(shape)
    return tensors


def _homeless(adapter: Adapter) -> Iterator[str]:
    """What PEFT has no name for, and what trained in full, but is no bias nor in a module that does as a whole."""
    for name, settings in adapter.modules.items():
        beyond = settings.base.beyond_peft
        if beyond:
            yield f"{name}: PEFT would compute the update of a convolution without its {beyond}."
    if "" in adapter.modules:
        yield "the model is itself the layer that is adapted: PEFT adapts layers within a model."
    yield from attention_problems(adapter)
    with_dora = [name for name, settings in adapter.modules.items() if settings.use_dora]
    if with_dora and len(with_dora) < len(adapter.modules):
        yield f"PEFT has `use_dora` for all modules or for none; here it is for {', '.join(with_dora)}."
    for name in with_dora:
        if not all(adapter.modules[name].enable_lora or (True,)):
            yield f"{name}: PEFT would have a magnitude for every output, and here splits without LoRA have none."
        if adapter.modules[name].base.groups > 1:
            yield f"{name}: PEFT has no DoRA for convolutions with groups."
    saved = _saved(adapter)
    words, taken = Words(saved), dict[str, list[str]]()
    for name in adapter.modules:  # PEFT goes by how names end, and by whole parts within them
        for word in {*words.ending(name), *words.within(name)}:
            taken.setdefault(word, []).append(name)
    for name in filter(taken.__contains__, saved):
        yield f"{name} trains in full, and PEFT would take {', '.join(taken[name])} for it as well."
    whole, kept = {*adapter.modules_to_save}, {*adapter.kept}
    for name in adapter.trained_in_full:
        owner, _, own = name.rpartition(".")
        if owner not in whole and not is_bias(own) and name not in kept:
            yield f"{name} is trained on its own; PEFT can store only biases and whole modules (`modules_to_save`)."


def _saved(adapter: Adapter) -> dict[str, None]:
    """Modules that train in full, without those within one another."""
    whole = dict.fromkeys(adapter.modules_to_save)
    return {name: None for name in whole if whole.keys().isdisjoint(starts_of(name))}


def _full_key(name: str, forms: Mapping[str, Form]) -> str:
    owner, _, own = name.rpartition(".")
    owner = place_in(owner, forms)
    return f"{owner}.base_layer.{own}" if owner in forms else name


def _config(
    adapter: Adapter, forms: Mapping[str, Form], names: Iterable[str], parameters: Collection[str]
) -> dict[str, Any]:
    about = {name: settings for name, (settings, _, _) in forms.items() if not is_follower(name)}
    rslora = all(settings.use_rslora for settings in about.values())
    ranks = {name: settings.r for name, settings in about.items()}
    alphas = {name: alpha_of(s.scaling, s.r, rslora) for name, s in about.items()}
    r, lora_alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    # PEFT adapts no parameter with either of these.
    linear = [settings.base for settings in about.values() if settings.base.kind == "linear" and not parameters]
    lora_dropout = 0.0 if parameters else max(settings.lora_dropout for settings in about.values())
    alone = {*adapter.trained_in_full} - {*adapter.kept}
    biases = {name.rpartition(".")[0] for name in alone} - set(adapter.modules_to_save)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _short(lora_alpha),
        "lora_dropout": lora_dropout,
        "use_rslora": rslora,
        "use_dora": any(settings.use_dora for settings in about.values()),
        "fan_in_fan_out": bool(linear) and all(base.fan_in_fan_out for base in linear),
        "target_modules": targets([name for name in about if name not in parameters], names),
        **({"target_parameters": [*parameters]} if parameters else {}),
        "rank_pattern": {_exactly(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {_exactly(name): _short(alpha) for name, alpha in alphas.items() if alpha != lora_alpha},
        "modules_to_save": [*_saved(adapter)] or None,
        "bias": "none" if not biases else "lora_only" if biases <= about.keys() else "all",
        "init_lora_weights": True,
    }


def _short(number: float) -> float:
    return int(number) if number == int(number) else number


def _exactly(name: str) -> str:
    """A pattern for one name: PEFT would match the ends of names, too."""
    return f"^{re.escape(name)}"


def targets(adapted: list[str], names: Iterable[str]) -> list[str] | str:
    """`target_modules` that mean these modules, and none of the others among all names of the model."""
    ends = {*adapted}
    if not any(end in ends for name in names if name not in ends for end in ends_of(name)):
        return adapted
    return "|".join(map(re.escape, adapted))


# ---- reading --------------------------------------------------------------------------------------------------------


def read(path: Path) -> Adapter:
    """Read a folder of PEFT's, or one of the files in it; AdapterError if it is something else, or more than LoRA."""
    path = adapter_in(path)
    folder = path if kind(path) == "folder" else path.parent
    what = f"read_adapter: {folder} is not loaded"

    file, config, tensors, metadata = read_folder(path, lambda config: check_config(what, config))
    pairs, full, problems = _sort(tensors)
    parts = {name: full.pop(key) for key in [*full] if (name := peft_parts.known(key))}
    with Problems(what, AdapterError) as found:
        found.add(*problems, *peft_parts.unannounced(parts, config))
        places = attention_among(pairs, config.get("peft_version"))
        places |= parameters_in(config, pairs, object_in(metadata, BASES) or (), found)
        said = said_by(what, config, [*pairs, *(place.by for place in places.values())])
        adapter = _adapter(config, said, pairs, full, places, found)
        found.raise_any()
        adapter = peft_parts.noted(adapter, parts, config, found)
    _tell(adapter, config, metadata)
    kept, rest = rest_of(metadata, file)
    return replace(adapter, kept=kept, rest=rest) if kept or rest else adapter


def _tell(adapter: Adapter, config: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """What is known of the weights that are adapted: what lora has noted, where it wrote the folder.

    Whether a linear layer's weight is stored transposed PEFT's configuration says once for all layers, as it is in the
    last which it met: None where only the model knows.
    """
    layouts, bases = (object_in(metadata, key) for key in (LAYOUTS, BASES))
    for name, settings in adapter.modules.items():
        noted = (bases or {}).get(name)
        noted = noted if isinstance(noted, dict) else {}
        facts = {fact: noted[fact] for fact in _NOTED if noted.get(fact) is not None}
        if settings.base.kind in ("linear", "stack"):
            sure = settings.base.kind == "linear" and not config.get("fan_in_fan_out")
            sure = sure and name.rpartition(".")[2] not in _MAYBE_TRANSPOSED
            layout = (False if sure else None) if layouts is None else layouts.get(name)
            facts["fan_in_fan_out"] = layout if isinstance(layout, bool) else None
        adapter.modules[name] = replace(settings, base=Base.from_mapping({**settings.base, **facts}))


def check_config(what: str, config: Mapping[str, Any]) -> None:
    """AdapterError that lists what is wrong with a configuration, or more than LoRA."""
    raise_all(what, _config_problems(config), AdapterError)


def said_by(what: str, config: Mapping[str, Any], names: Sequence[str]) -> Said:
    """What a configuration says of modules; AdapterError if it would take too long to find out."""
    longest = max(map(len, names), default=1)
    patterns = {option: config.get(option) or {} for option in _PATTERNS}
    raise_all(
        what, (p for option in _PATTERNS for p in _pattern_problems(option, patterns[option], longest)), AdapterError
    )
    raise_all(what, filter(None, [cost_problem(patterns, names)]), AdapterError)
    ranks, alphas = (Patterns(patterns[option]) for option in _PATTERNS)
    return lambda name: (
        config,
        ranks.value([name], config.get("r", 8)),
        alphas.value([name], config.get("lora_alpha", 8)),
    )


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"`peft_type` must be 'LORA', got {short(config.get('peft_type'))}."
    for name in _REFUSED_SETTINGS:
        if config.get(name):
            yield f"`{name}` is set: what the adapter computes is more than its A and B say."
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and _REFUSED_INITS.fullmatch(init):
        yield f"`init_lora_weights` is {short(init)}, which changes the base weight; let PEFT convert it first."
    yield from settings_problems(config.get("r", 8), config.get("lora_alpha", 8), config.get("lora_dropout") or 0.0)
    for option in ("use_rslora", "use_dora", peft_parts.BIAS):
        if not isinstance(config.get(option) or False, bool):
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
    yield from (*config_problems(config), *peft_merged.problems(config))
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
    called: set[str] = set()  # the adapters, by the names that raw keys bear
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        part, found = next(((p, match) for p, ending in _PARTS.items() if (match := ending.search(name))), (None, None))
        called.update({next(filter(None, found.groups()), "")} if found else ())
        if part is None:
            full[name] = tensor
        else:
            module = _PARTS[part].sub("", name)
            kind = "embedding" if "lora_embedding_" in name[len(module) :] else "linear"
            pairs.setdefault(module, {})[part] = tensor
            pairs[module][kind] = tensor
    if len(called) > 1:
        names = some((name.removeprefix(".") or "one without a name" for name in sorted(called)), len(called))
        problems.append(f"it holds several adapters ({names}); save each by itself, as PEFT's `save_pretrained` does.")
    elif called - {""}:
        full = {name.replace(f".modules_to_save{min(called)}.", "."): tensor for name, tensor in full.items()}
    full = {re.sub(r"\.(base_layer|modules_to_save)\.", ".", name): tensor for name, tensor in full.items()}
    return pairs, full, problems


def modules_of(
    pairs: Mapping[str, Mapping[str, Tensor]],
    said: Said,
    problems: Problems,
    places: Mapping[str, Place] = MappingProxyType({}),
) -> tuple[dict[str, ModuleAdapter], dict[str, Tensor]]:
    """The settings and the tensors of modules, from what a file has for each, and says of each.

    Args:
        places: what those of the file's names stand for that are no layer's.
    """
    modules: dict[str, ModuleAdapter] = {}
    tensors: dict[str, Tensor] = {}
    for told, pair in pairs.items():
        place = places.get(told, Place(told, told))
        name = place.name
        wrong = [f"{name}: {part} is missing." for part in PARAMETERS if part not in pair]
        wrong += [p for part in _PARTS if part in pair for p in dtype_problems(join(name, part), pair[part])]
        problems.add(*wrong)
        if wrong:
            continue
        with problems.at(name):
            config, r, lora_alpha = said(place.by)
            A, B = pair["lora_A"], pair["lora_B"]
            if place.parameter and place.by == name:
                modules[name], A, B = unpacked(config, r, lora_alpha, A, B)
            elif config.get(peft_merged.OPTION):
                modules[name], A, B = peft_merged.form_of(config, r, lora_alpha, A, B)
            else:
                modules[name] = _settings(config, r, lora_alpha, pair, place)
                A = within_groups(A, modules[name].base.groups)
            tensors |= {join(name, "lora_A"): A, join(name, "lora_B"): B}
            if MAGNITUDE in pair:  # of a convolution (1, out_channels, 1, …)
                tensors[join(name, MAGNITUDE)] = pair[MAGNITUDE].flatten()
    if not pairs:
        problems.add("it adapts no module.")
    return modules, tensors


def _adapter(
    config: Mapping[str, Any],
    said: Said,
    pairs: Mapping[str, Mapping[str, Tensor]],
    full: dict[str, Tensor],
    places: Mapping[str, Place],
    problems: Problems,
) -> Adapter:
    modules, tensors = modules_of(pairs, said, problems, places)
    # PEFT saves the weight of an adapted embedding, perhaps with rows added to it, beside its adapter.
    for name in full:
        owner, _, own = name.rpartition(".")
        if owner in modules and own == "weight":
            base = replace(modules[owner].base, shape=tuple(full[name].shape), sample=sample_of(full[name]))
            modules[owner] = replace(modules[owner], base=base)
    # With `bias="all"` PEFT saves the biases that modules_to_save had before as well; nothing computes with them.
    before = {name for name in full if ".original_module." in name and name.replace(".original_module.", ".") in full}
    full = {name: tensor for name, tensor in full.items() if name not in before}
    saved = _owners(config.get("modules_to_save") or [], full)
    base_model = config.get("base_model_name_or_path")
    base_model = base_model if isinstance(base_model, str) else None
    biases_train = (config.get("bias") or "none") != "none"
    whole = {*saved}
    kept = [
        name
        for name in full
        if name.rpartition(".")[0] not in whole and not (biases_train and is_bias(name.rpartition(".")[2]))
    ]
    return Adapter(modules, {**tensors, **full}, list(full), saved, base_model, "peft", kept)


def _owners(patterns: list[str], full: Iterable[str]) -> list[str]:
    """The modules that own tensors which trained in full, and whose names, or a parent's, end as one of `patterns`.

    Whole components or not, as PEFT goes by them: "classifier" is for DistilBert's "pre_classifier" as well.
    """
    owners, words = dict.fromkeys(name.rpartition(".")[0] for name in full), Words(patterns)
    return [owner for owner in owners if any(map(words.ending, (*starts_of(owner), owner)))]


def _settings(
    config: Mapping[str, Any], r: Any, lora_alpha: Any, pair: Mapping[str, Tensor], place: Place
) -> ModuleAdapter:
    A, B = pair["lora_A"], pair["lora_B"]
    lora_alpha = lora_alpha * place.times
    if A.dim() != B.dim() or not 2 <= A.dim() <= 5 or 0 in (*A.shape, *B.shape):
        raise ValueError(f"lora_A and lora_B must be two matrices or two kernels, got {(*A.shape,)} and {(*B.shape,)}.")
    if r % B.shape[1] or r != A.shape[0] or (A.dim() == 2 and r != B.shape[1]):
        raise ValueError(f"the shapes {(*A.shape,)} and {(*B.shape,)} do not fit r = {r} in {CONFIG}.")
    if A.dim() == 2:
        base = Base(kind="embedding" if "embedding" in pair else "linear", parameter=place.parameter)
    else:
        groups = int(r) // B.shape[1]
        base = Base(kind="conv", shape=(B.shape[0], A.shape[1] // groups, *A.shape[2:]), groups=groups)
    use_rslora = config.get("use_rslora") or False
    return ModuleAdapter(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=config.get("lora_dropout") or 0.0,
        use_rslora=use_rslora,
        use_dora=config.get("use_dora") or False,
        factored=True if A.dim() > 2 else None,
        scaling=scaling_of(lora_alpha, r, use_rslora),
        base=base,
    )
