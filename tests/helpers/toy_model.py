"""A small transformer to adapt, a snapshot of all that a failed call must leave alone, and a file to damage."""

import copy
import json

import safetensors
import safetensors.torch
import torch
import torch.nn as nn

import lora
from lora.adapters.files import checksum


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8, bias=False)})
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(8, 12), "down_proj": nn.Linear(12, 8)})

    def forward(self, x):
        x = x + self.attn["v_proj"](self.attn["q_proj"](x))
        return x + self.mlp["down_proj"](self.mlp["up_proj"](self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.tensor([[1, 2, 3, 9], [0, 0, 4, 5]])


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, lora.LoRALayer)]


def content(tensor):
    if nn.parameter.is_lazy(tensor):
        return None
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
    )


def snapshot(model):
    """All that a failed call must leave alone, to the bit; equal snapshots are equal models."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            module.training,
            [
                (key, id(tensor), tensor.requires_grad, content(tensor))
                for key, tensor in [*module._parameters.items(), *module._buffers.items()]
                if tensor is not None
            ],
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


class AdapterFile:
    """An adapter file that tests change, and the base model that it is for."""

    def __init__(self, path, **fields):
        self.path, self.base, self.fields = path, Model(), fields
        model = copy.deepcopy(self.base)
        lora.inject(model, **self.fields)
        lora.save_adapter(model, path)
        with safetensors.safe_open(path, framework="pt") as file:
            self.about = json.loads(file.metadata()["lora"])
            names = file.keys()
            self.tensors = {name: file.get_tensor(name).clone() for name in names}  # not of the file, as older ones are

    def write(self, about=None, tensors=None):
        about, tensors = about or self.about, self.tensors if tensors is None else tensors
        said = {"format": "pt", "lora": json.dumps(about)}  # with a right checksum: who wrote the file meant all of it
        safetensors.torch.save_file(tensors, self.path, {**said, "sha256": checksum(tensors, said)})

    def model(self, injected):
        model = copy.deepcopy(self.base)
        if injected:
            lora.inject(model, **self.fields)
            for layer in model.layers:
                nn.init.ones_(layer.attn["q_proj"].lora_B)
        return model
