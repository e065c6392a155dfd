"""Two adapters that no mixture of them resembles, and what a folder or a file holds of them."""

import json
import os
from pathlib import Path

import safetensors.torch
import torch
from interruptions import HOUSE

import lora

FORMATS = ["lora", "peft", "portable"]
WRITING = tuple(os.path.join(HOUSE, *parts) for parts in (("adapters", "saving.py"), ("formats", "peft_folder.py")))


def adapter(value, r=None):
    """An adapter whose rank, scaling and values are all of this number."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 3, bias=False))
    lora.inject(model, target_modules=["0", "1"], r=r or value, lora_alpha=7 * value, alpha_pattern={"1": value})
    for layer in model:
        torch.nn.init.constant_(layer.lora_A, value)
        torch.nn.init.constant_(layer.lora_B, value)
        torch.nn.init.constant_(layer.weight, 1)
    return lora.adapter_of(model)


def update(read):
    """The function: what is added to each weight, and how it would train."""
    about = {name: (settings.r, settings.lora_dropout, settings.use_dora) for name, settings in read.modules.items()}
    return about, {name: read.delta(name).tolist() for name in read.modules}, read.trained_in_full


def held(path, known):
    """Which of the known adapters, by their names, is read; an error if it is none of them."""
    try:
        read = lora.read_adapter(path)
    except FileNotFoundError:
        return "nothing"
    return next(name for name, one in known.items() if update(one) == update(read))


def held_for_peft(folder, known):
    """The same by a reader that knows the two files, and nothing of what lora says in them."""
    if not (folder / "adapter_config.json").exists():
        return "nothing"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    ours = {name: one.modules["0"].r for name, one in known.items()}
    (rank,) = {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    return next(name for name, r in ours.items() if r == rank == config["r"])


def hidden(folder):
    """Files that writers have left."""
    return [name for name in os.listdir(Path(folder)) if name.startswith(".")]
