"""Flags made from dictionaries of defaults, and the checks that their values have to pass."""

import argparse
import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

from phi3.errors import UserError

Settings = dict[str, Any]


class Setting(NamedTuple):
    """What a key of a dictionary means, which values it may have, and what makes one of a flag's text."""

    help: str
    valid: Callable[[Any], bool] = lambda value: True
    rule: str = ""
    parse: Callable[[str], Any] | None = None  # None: as the default's own type


def _at_least(low: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value >= low, f"at least {low}"


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, "one of " + ", ".join(choices)


def way(text: str) -> bool | str:
    """A value of init_lora_weights, which is a name or one of two bools."""
    return {"true": True, "false": False}.get(text.lower(), text)


_POSITIVE = (lambda value: 0 < value < float("inf"), "a number above 0")
_NOT_NEGATIVE = (lambda value: 0 <= value < float("inf"), "a number from 0 up")

_NAMES = ("target_modules", "modules_to_save", "exclude_modules", "export")
_QUANTIZE = ("nf4", "fp4", "int8")
_EXPORTS = ("peft", "portable", "gguf", "merged")

# All that a dictionary may hold; peft_config may be given more of them than it has at first.
SETTINGS = {
    # training_config
    "learning_rate": Setting("peak learning rate of AdamW", *_POSITIVE),
    "lr_scheduler_type": Setting(
        "how it falls after the warm-up: cosine, linear or constant", *_one_of("cosine", "linear", "constant")
    ),
    "warmup_ratio": Setting("share of the steps over which it rises to its peak", lambda v: 0 <= v <= 1, "from 0 to 1"),
    "lr_ratio": Setting("LoRA+: learning_rate times this is lora_B's (default: the same for both)", *_POSITIVE, float),
    "weight_decay": Setting("AdamW's weight decay", *_NOT_NEGATIVE),
    "max_grad_norm": Setting("clip the gradient to this norm; 0: never", *_NOT_NEGATIVE),
    "per_device_train_batch_size": Setting("rows in a batch", *_at_least(1)),
    "per_device_eval_batch_size": Setting("rows in a batch when measuring", *_at_least(1)),
    "gradient_accumulation_steps": Setting("batches whose gradients make one step", *_at_least(1)),
    "max_seq_length": Setting("tokens in a row, which several conversations share", *_at_least(8)),
    "num_train_epochs": Setting("passes over the data, unless max_steps ends the run", *_POSITIVE),
    "max_steps": Setting("steps in all; -1: as many as the epochs take", lambda v: v == -1 or v > 0, "-1 or above 0"),
    "gradient_checkpointing": Setting("trade a third more time for much less memory"),
    "fused_mlp": Setting("compute each MLP in one function that keeps less for backward"),
    "bf16": Setting("keep the model in bfloat16; the adapter stays in float32"),
    "logging_steps": Setting("steps between two lines of metrics", *_at_least(1)),
    "eval_steps": Setting("steps between two held-out measurements", *_at_least(1)),
    "save_steps": Setting("steps between two checkpoints", *_at_least(1)),
    "save_total_limit": Setting("how many checkpoints to keep", *_at_least(1)),
    "seed": Setting("for the data order, the dropout and the adapter's start", *_at_least(0)),
    # peft_config
    "r": Setting("rank of the adapter", *_at_least(1)),
    "lora_alpha": Setting("the update is scaled by lora_alpha / r", *_POSITIVE),
    "lora_dropout": Setting("dropout before the adapter", lambda v: 0 <= v < 1, "from 0 up to, not including, 1"),
    "bias": Setting("biases to train too: none, all or lora_only", *_one_of("none", "all", "lora_only")),
    "task_type": Setting("what the adapter is for, as PEFT names it", *_one_of("CAUSAL_LM")),
    "target_modules": Setting("layers to adapt, by name; or all-linear", bool, "at least one name"),
    "modules_to_save": Setting("layers to train whole, and save with the adapter"),
    "exclude_modules": Setting("layers not to adapt, by name"),
    "use_rslora": Setting("scale the update by lora_alpha / sqrt(r)"),
    "use_dora": Setting("DoRA: train a magnitude for each output, too"),
    "freeze_A": Setting("LoRA-FA: train lora_B alone; less is kept for backward"),
    "init_lora_weights": Setting(
        "how the adapter starts: true, gaussian, orthogonal, pissa, olora, eva, lora_ga, corda, loftq", parse=way
    ),
    "rank_pattern": Setting("r for some layers, by name"),
    "alpha_pattern": Setting("lora_alpha for some layers, by name"),
    # run_config
    "model": Setting("smollm2 (a real 135M chat model from PyPI), a local folder, or an id on the hub"),
    "data": Setting("chitchat (real chats from PyPI), a JSONL file of messages, or an id on the hub"),
    "data_split": Setting("which split of a data set on the hub"),
    "train_conversations": Setting("conversations to train on, at most", *_at_least(1)),
    "eval_conversations": Setting("conversations to hold out for measuring", *_at_least(1)),
    "sample_replies": Setting("replies to show before and after", *_at_least(0)),
    "max_new_tokens": Setting("tokens in such a reply, at most", *_at_least(1)),
    "quantize": Setting(
        "QLoRA: keep the linear layers in 4 or 8 bits: nf4, fp4 or int8 (wants bitsandbytes)", *_one_of(*_QUANTIZE)
    ),
    "attn_implementation": Setting("attention: sdpa, eager, or flash_attention_2 where installed"),
    "device": Setting("cpu, cuda, cuda:1, …; auto: cuda if there is one"),
    "output_dir": Setting("where checkpoints, metrics, replies and the loss curve go"),
    "export": Setting(
        "write the result for others, too: any of " + ", ".join(_EXPORTS),
        lambda names: set(names) <= set(_EXPORTS),
        "any of " + ", ".join(_EXPORTS),
    ),
    "cache_dir": Setting("where downloads are kept (default: $LORA_EXAMPLES_CACHE, or the user's cache)"),
}


def add_flags(parser: argparse.ArgumentParser, title: str, defaults: Settings) -> None:
    """One flag for each key of a dictionary: `learning_rate` becomes `--learning-rate`."""
    group = parser.add_argument_group(title)
    for key, default in defaults.items():
        if key not in SETTINGS:
            close = difflib.get_close_matches(key, SETTINGS, n=1)
            raise UserError(f"{title}: there is no setting {key!r}" + "".join(f"; {k!r}?" for k in close))
        if isinstance(default, dict):
            continue  # has no form as a flag
        flag, text, parse = "--" + key.replace("_", "-"), SETTINGS[key].help, SETTINGS[key].parse
        if default is not None:
            shown = " ".join(default) if isinstance(default, list) else default
            text += f" (default: {shown})"
        if isinstance(default, bool) and not parse:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        elif key in _NAMES:
            group.add_argument(flag, nargs="+", default=default, metavar="NAME", help=text)
        else:
            kind = parse or (type(default) if default is not None else str)
            group.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=text)


def chosen(flags: argparse.Namespace, defaults: Settings) -> Settings:
    """The dictionary with what the flags say, every value checked."""
    settings = {key: getattr(flags, key, default) for key, default in defaults.items()}
    if settings.get("target_modules") == ["all-linear"]:
        settings["target_modules"] = "all-linear"  # the one string that means more than a name
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Raises one UserError that lists every value that is not allowed."""
    wrong = []
    for key, value in settings.items():
        setting = SETTINGS[key]
        try:
            valid = setting.valid(value) if setting.rule and value is not None else True
        except TypeError:
            valid = False
        if not valid:
            wrong.append(f"--{key.replace('_', '-')} ({key}) is {value!r}; it must be {setting.rule}")
    if wrong:
        raise UserError("\n".join(wrong))
