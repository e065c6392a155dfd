"""Files as other tools write them, of adapters with random values, and by each tool's own formula what they compute."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import nn

R = 4


class Written(NamedTuple):
    path: Path
    model: nn.Module
    updates: dict  # of each weight, in float64, by the name of its module
    more: dict  # what a user has to say beside


def nested(**layers):
    """A model whose modules have these names, with `__` for dots."""
    model = nn.Module()
    for name, layer in layers.items():
        *parents, own = name.split("__")
        place = model
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place._modules[parent]
        place.add_module(own, layer)
    return model


def unet():
    block = "down_blocks__0__attentions__0__"
    return nested(
        conv_in=nn.Conv2d(4, 8, 3, padding=1),
        **{
            f"{block}proj_in": nn.Conv2d(8, 6, 1),
            f"{block}transformer_blocks__0__attn1__to_q": nn.Linear(6, 6, bias=False),
            f"{block}transformer_blocks__0__attn1__to_out__0": nn.Linear(6, 6),
            "down_blocks__0__resnets__0__conv1": nn.Conv2d(8, 6, 3, padding=1),
        },
    )


def text_encoder():
    return nested(text_model__encoder__layers__0__self_attn__q_proj=nn.Linear(6, 6))


def language_model():
    return nested(
        model__embed_tokens=nn.Embedding(11, 6),
        model__layers__0__self_attn__q_proj=nn.Linear(6, 8),
        model__layers__0__mlp__down_proj=nn.Linear(10, 6, bias=False),
    )


def names_of(model):
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def pair(layer, r=R):
    """A and B of a layer in torch's layout: of a convolution two kernels, of an embedding as of a linear layer."""
    out, into, *kernel = layer.weight.shape if not isinstance(layer, nn.Embedding) else layer.weight.T.shape
    return torch.randn(r, into, *kernel), torch.randn(out, r, *[1] * len(kernel))


def product(A, B):
    """B A in float64: Σ_j B[o, j] A[j], whatever the kernel."""
    A, B = A.double().numpy(), B.double().numpy()
    return np.einsum("oj,j...->o...", B.reshape(B.shape[:2]), A)


def as_weight(layer, update):
    return update.T if isinstance(layer, nn.Embedding) else update


def load(path):
    return safetensors.torch.load_file(path)


def save(path, tensors, metadata=None):
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata)
    return path


# ---- diffusion models -----------------------------------------------------------------------------------------------


def kohya(folder, prefix="lora_unet", with_alpha=True):
    """sd-scripts: ΔW = (alpha / r) · up down, and s = 1 where there is no alpha."""
    model, tensors, updates = unet(), {}, {}
    for n, (name, layer) in enumerate(names_of(model).items()):
        (A, B), alpha, key = pair(layer, R + n), 1.5 + n, f"{prefix}_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B}
        tensors |= {f"{key}.alpha": torch.tensor(alpha)} if with_alpha else {}
        updates[name] = product(A, B) * (alpha / (R + n) if with_alpha else 1)
    return Written(
        save(folder / "kohya.safetensors", tensors, {"ss_network_module": "networks.lora"}), model, updates, {}
    )


def ai_toolkit(folder):
    """ai-toolkit: PEFT's names after `transformer.`, no alpha: ΔW = B A."""
    model, tensors, updates = nested(transformer_blocks__0__attn__to_k=nn.Linear(6, 6)), {}, {}
    for name, layer in names_of(model).items():
        A, B = pair(layer)
        tensors |= {f"transformer.{name}.lora_A.weight": A, f"transformer.{name}.lora_B.weight": B}
        updates[name] = product(A, B)
    metadata = {"format": "pt", "software": '{"name": "ai-toolkit"}'}
    return Written(save(folder / "my_lora.safetensors", tensors, metadata), model, updates, {})


def diffusers(folder):
    """diffusers: PEFT's configuration of each model in the metadata: ΔW = (lora_alpha / r) B A."""
    model = nn.ModuleDict({"unet": unet(), "text_encoder": text_encoder()})
    alphas, tensors, updates, configs = {"unet": 6, "text_encoder": 2}, {}, {}, {}
    for child, lora_alpha in alphas.items():
        config = {"r": R, "lora_alpha": lora_alpha, "rank_pattern": {}, "alpha_pattern": {}, "peft_type": "LORA"}
        for n, (name, layer) in enumerate(names_of(model[child]).items()):
            (A, B), alpha = pair(layer, R + n % 2), 5 if n == 1 else lora_alpha
            config["rank_pattern"] |= {name: R + 1} if n % 2 else {}
            config["alpha_pattern"] |= {name: 5} if n == 1 else {}
            tensors |= {f"{child}.{name}.lora_A.weight": A, f"{child}.{name}.lora_B.weight": B}
            updates[f"{child}.{name}"] = product(A, B) * alpha / (R + n % 2)
        configs |= {f"{child}.{key}": value for key, value in config.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(configs)}
    save(folder / "pytorch_lora_weights.safetensors", tensors, metadata)
    return Written(folder, model, updates, {})


def old_diffusers(folder):
    """diffusers before 0.22: its attention processors' names, and no alpha."""
    model = nn.ModuleDict({"unet": unet(), "text_encoder": text_encoder()})
    attention = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    keys = {
        f"{attention}.to_q": f"{attention}.processor.to_q_lora",
        f"{attention}.to_out.0": f"{attention}.processor.to_out_lora",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
        ),
    }
    tensors, updates = {}, {}
    for name, key in keys.items():
        A, B = pair(model.get_submodule(name))
        tensors |= {f"{key}.down.weight": A, f"{key}.up.weight": B}
        updates[name] = product(A, B)
    torch.save(tensors, folder / "pytorch_lora_weights.bin")
    return Written(folder, model, updates, {})


def mixed_diffusers(folder):
    """diffusers' training scripts: names that it has old ones for are converted, all others stay PEFT's."""
    model = nn.ModuleDict({"unet": unet()})
    tensors, updates = {}, {}
    for name, layer in names_of(model).items():
        A, B = pair(layer)
        words = ("lora.down", "lora.up") if ".attn1." in name else ("lora_A", "lora_B")
        tensors |= {f"{name}.{word}.weight": tensor for word, tensor in zip(words, (A, B), strict=True)}
        updates[name] = product(A, B)
    return Written(save(folder / "any.safetensors", tensors), model, updates, {})


# ---- language models ------------------------------------------------------------------------------------------------


def raw_peft(folder, adapter=".default"):
    """PEFT's names in one file, without its configuration: the user says lora_alpha."""
    model, tensors, updates = language_model(), {}, {}
    for name, layer in names_of(model).items():
        A, B = pair(layer)
        for part, tensor in (("A", A), ("B", B)):
            embeds = isinstance(layer, nn.Embedding)
            ending = f"lora_embedding_{part}{adapter}" if embeds else f"lora_{part}{adapter}.weight"
            tensors[f"base_model.model.{name}.{ending}"] = tensor
        updates[name] = as_weight(layer, product(A, B)) * 7 / R
    return Written(save(folder / "raw.safetensors", tensors), model, updates, {"lora_alpha": 7})


def mlx_lm(folder):
    """mlx-lm: y + scale · (x @ lora_a) @ lora_b."""
    model, tensors, updates = language_model(), {}, {}
    for name, layer in names_of(model).items():
        A, B = pair(layer)
        tensors |= {f"{name}.lora_a": A.T, f"{name}.lora_b": B.T}
        updates[name] = as_weight(layer, product(A, B)) * 20.0
    save(folder / "adapters.safetensors", tensors)
    about = {"fine_tune_type": "lora", "num_layers": 16, "model": "mlx-community/some"}
    about["lora_parameters"] = {"rank": R, "scale": 20.0, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    return Written(folder, model, updates, {})


def torchtune(folder):
    """torchtune's own names: ΔW = (alpha / rank) B A, both in the configuration that it writes for PEFT."""
    model, tensors, updates = (
        nested(layers__0__attn__q_proj=nn.Linear(6, 8), layers__0__mlp__w1=nn.Linear(6, 9)),
        {},
        {},
    )
    for name, layer in names_of(model).items():
        A, B = pair(layer)
        tensors |= {f"{name}.lora_a.weight": A, f"{name}.lora_b.weight": B}
        updates[name] = product(A, B) * 10 / R
    torch.save(tensors, folder / "adapter_model.pt")
    about = {"r": R, "lora_alpha": 10, "target_modules": ["q_proj", "gate_proj"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    return Written(folder / "adapter_model.pt", model, updates, {})


def litgpt(folder):
    """LitGPT: loralib's names under "model"; the user says lora_alpha."""
    model = nested(transformer__h__0__attn__proj=nn.Linear(6, 6), lm_head=nn.Linear(6, 11, bias=False))
    tensors, updates = {}, {}
    for name, layer in names_of(model).items():
        A, B = pair(layer)
        tensors |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        updates[name] = product(A, B) * 16 / R
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    return Written(folder / "lit_model.pth.lora", model, updates, {"lora_alpha": 16})


TOOLS = {
    "kohya": kohya,
    "ai-toolkit": ai_toolkit,
    "diffusers": diffusers,
    "diffusers before 0.22": old_diffusers,
    "diffusers' training scripts": mixed_diffusers,
    "PEFT's tensors alone": raw_peft,
    "mlx-lm": mlx_lm,
    "torchtune": torchtune,
    "LitGPT": litgpt,
}
