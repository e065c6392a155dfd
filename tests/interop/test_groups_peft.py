"""lora.param_groups beside PEFT's create_loraplus_optimizer: the same rates, and the same model after some steps."""

import copy

import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from toy_model import IDS, Model

import lora
from lora.models.training import param_groups

LR, RATIO, DECAY, EMBEDDING = 1e-3, 16.0, 0.1, 5e-4
FIELDS = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "embed"], "modules_to_save": ["head"]}


def theirs(model):
    """PEFT's model and optimizer."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**FIELDS))
    options = {"loraplus_weight_decay": DECAY, "loraplus_lr_embedding": EMBEDDING}
    return adapted, create_loraplus_optimizer(adapted, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, **options)


def ours(model, adapted):
    """Our model and optimizer, from the same start as `adapted`."""
    lora.inject(model, **FIELDS)
    for name, module in model.named_modules():
        if isinstance(module, lora.LoRALayer):
            twin = adapted.base_model.model.get_submodule(name)
            kind = "lora_embedding" if isinstance(module, nn.Embedding) else "lora"
            for factor in "AB":
                held = getattr(twin, f"{kind}_{factor}")["default"]
                getattr(module, f"lora_{factor}").data.copy_(getattr(held, "weight", held))
    return model, torch.optim.AdamW(param_groups(model, LR, RATIO, DECAY, lr_embedding=EMBEDDING))


def rates(model, optimizer):
    """Learning rate and decay of each parameter, by its name without PEFT's parts."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)].removeprefix("base_model.model.")
            for part in (".default", ".modules_to_save"):
                name = name.replace(part, "")
            name = name.replace("lora_embedding", "lora").replace("lora_A.weight", "lora_A")
            found[name.replace("lora_B.weight", "lora_B")] = group["lr"], group["weight_decay"]
    return found


def test_the_same_rates_and_decays():
    base = Model()
    adapted, optimizer = theirs(copy.deepcopy(base))
    model, own = ours(copy.deepcopy(base), adapted)
    assert rates(model, own) == rates(adapted, optimizer)
    assert rates(model, own)["layers.0.attn.q_proj.lora_B"] == (LR * RATIO, DECAY)


def test_the_same_model_after_some_steps():
    base = Model()
    adapted, optimizer = theirs(copy.deepcopy(base))
    model, own = ours(copy.deepcopy(base), adapted)
    before = model(IDS).detach()
    for _ in range(4):
        for trained, stepper in ((adapted, optimizer), (model, own)):
            stepper.zero_grad()
            trained(IDS).square().mean().backward()
            stepper.step()
    assert (model(IDS) - before).abs().max() > 1e-3
    torch.testing.assert_close(model(IDS), adapted(IDS), rtol=1e-4, atol=1e-5)


def test_where_we_differ():
    """PEFT raises the rate of every vector; LoRA+ has no reason for that beside lora_B."""
    fields = {**FIELDS, "target_modules": ["q_proj"], "modules_to_save": ["norm"], "bias": "lora_only"}
    adapted = peft.get_peft_model(Model(), peft.LoraConfig(**fields))
    optimizer = create_loraplus_optimizer(adapted, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO)
    model = Model()
    lora.inject(model, **fields)
    own = rates(model, torch.optim.AdamW(param_groups(model, LR, RATIO)))
    peft_rates = {name.replace("base_layer.", ""): rate for name, rate in rates(adapted, optimizer).items()}
    different = {name: rate for name, rate in own.items() if rate != peft_rates[name]}
    layers = [f"layers.{number}" for number in (0, 1)]
    vectors = {f"{layer}.{name}" for layer in layers for name in ("attn.q_proj.bias", "norm.weight", "norm.bias")}
    assert different == dict.fromkeys(vectors, (LR, 0.0))
    assert {peft_rates[name] for name in vectors} == {(LR * RATIO, 0.0)}


def test_lora_fa_freezes_what_peft_freezes():
    base = Model()
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**FIELDS))
    peft.optimizers.create_lorafa_optimizer(adapted, r=2, lora_alpha=4, lr=LR)
    frozen = {name for name, p in adapted.named_parameters() if "lora_" in name and not p.requires_grad}
    lora.inject(base, **FIELDS)
    lora.mark_only_lora_as_trainable(base, freeze_A=True)
    ours = {name for name, p in base.named_parameters() if "lora_" in name and not p.requires_grad}
    assert ours == {name.removeprefix("base_model.model.").replace(".default.weight", "") for name in frozen}
    assert len(ours) == 4
