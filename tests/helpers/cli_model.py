"""What the tests of the command line share: a trained model, its base as a folder, and its updates by numpy."""

import copy
import json

import numpy as np
import safetensors.torch
import torch
from conftest import update
from toy_model import Model

import lora
from lora.__main__ import main

FIELDS = {
    "target_modules": ["q_proj", "up_proj", "embed"],
    "r": 2,
    "lora_alpha": 3,
    "splits": {"q_proj": (5, 2, 1)},
    "enable_lora": {"q_proj": [1, 0, 1]},
}


def trained(path, model=None, dtype=torch.float32, **fields):
    """An adapter in a file, the state dict of its base, and the LoRA layers that it is of, by name."""
    model = Model() if model is None else model
    model.to(dtype)
    state = copy.deepcopy(model.state_dict())
    lora.inject(model, **{**FIELDS, **fields})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 2)
    lora.save_adapter(model, path)
    return model, state, {n: m for n, m in model.named_modules() if isinstance(m, lora.LoRALayer) and m.r}


def base_folder(folder, state, files=1, config=None):
    """The folder of a base model: one file, or several with an index."""
    folder.mkdir(parents=True)
    names = list(state)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if files == 1:
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    shards = {f"model-{k + 1:05}-of-{files:05}.safetensors": names[k::files] for k in range(files)}
    for file, keys in shards.items():
        safetensors.torch.save_file({key: state[key] for key in keys}, folder / file, {"format": "pt", "of": file})
    index = {"metadata": {"total_size": 1}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def content(folder):
    """All tensors in a folder's safetensors files, each checked to be there once."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        loaded = safetensors.torch.load_file(file)
        assert not tensors.keys() & loaded.keys()
        tensors |= loaded
    return tensors


def expected(state, layers):
    """W₀ + s · B A in float64, rounded once."""
    merged = dict(state)
    for name, layer in layers.items():
        weight = state[f"{name}.weight"]
        merged[f"{name}.weight"] = (weight.double() + torch.from_numpy(np.ascontiguousarray(update(layer)))).to(
            weight.dtype
        )
    return merged


def run(capsys, *arguments):
    """The exit code of a command, and what it said on stdout and stderr."""
    capsys.readouterr()  # what others said before
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err
