"""LoRA on bitsandbytes' layers beside PEFT's: outputs, gradients, and a few steps from the same start."""

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

import lora

QUANTISED = {
    "nf4": lambda: bnb.nn.Linear4bit(64, 48, quant_type="nf4", compute_dtype=torch.float32),
    "fp4": lambda: bnb.nn.Linear4bit(64, 48, quant_type="fp4", compress_statistics=False, compute_dtype=torch.float32),
    "int8": lambda: bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False),
}


class Net(nn.Module):
    """A quantised layer between dense ones."""

    def __init__(self, name):
        super().__init__()
        self.before, self.quantised, self.after = nn.Linear(5, 64), QUANTISED[name](), nn.Linear(48, 3)
        # How transformers tells PEFT.
        self.is_loaded_in_8bit, self.is_loaded_in_4bit = name == "int8", name != "int8"

    def forward(self, x):
        return self.after(self.quantised(self.before(x).tanh()).tanh())


def models_of(name, **settings):
    """One base model; the same adapted by us and by PEFT, from the same start."""
    base = Net(name).to("cpu")
    fields = {"target_modules": ["before", "quantised"], "r": 4, "lora_alpha": 6, **settings}
    ours, theirs = copy.deepcopy(base), peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    lora.inject(ours, **fields)
    with torch.no_grad():
        for layer in ("before", "quantised"):
            mine, other = getattr(ours, layer), getattr(theirs.base_model.model, layer)
            for own, there in ((mine.lora_A, other.lora_A), (mine.lora_B, other.lora_B)):
                there["default"].weight.copy_(own.normal_(std=0.3))
            if mine.use_dora:
                other.lora_magnitude_vector["default"].weight.copy_(mine.lora_magnitude.uniform_(0.5, 2))
    return base, ours, theirs


def trained(model, name):
    """A parameter that trains, by its name here."""
    if isinstance(model, peft.PeftModel):
        model, (layer, own) = model.base_model.model, name.split(".")
        where = {"lora_magnitude": "lora_magnitude_vector"}.get(own, own)
        return model.get_submodule(f"{layer}.{where}")["default"].weight
    return model.get_parameter(name)


# Of int8 layers PEFT's DoRA loses the rows' maxima on a CPU: the first forward fails.
@pytest.mark.parametrize(
    ("name", "use_dora"), [("nf4", False), ("fp4", False), ("int8", False), ("nf4", True), ("fp4", True)]
)
def test_same_outputs_gradients_and_steps(name, use_dora):
    _, *models = models_of(name, use_dora=use_dora)
    x, target = torch.randn(6, 5), torch.randn(6, 3)
    names = [key for key, parameter in models[0].named_parameters() if parameter.requires_grad]
    assert len(names) == (6 if use_dora else 4)
    outputs, gradients = [], []
    for model in models:
        parameters = [trained(model, key) for key in names]
        optimizer = torch.optim.SGD(parameters, lr=0.02)
        outputs.append([])
        for step in range(4):
            y = model(x)
            (y - target).square().mean().backward()
            if step == 0:
                gradients.append([parameter.grad.clone() for parameter in parameters])
            outputs[-1].append(y.detach())
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert (outputs[0][0] - outputs[0][-1]).abs().max() > 0.01


@pytest.mark.parametrize("name", QUANTISED)
def test_adapters_go_to_peft_and_back(name, tmp_path):
    base, ours, theirs = models_of(name)
    lora.save_adapter(ours, tmp_path / "peft", format="peft")
    x = torch.randn(6, 5)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").train()  # in eval() it may repack
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    lora.load_adapter(base, tmp_path / "theirs")
    torch.testing.assert_close(base(x), theirs(x), rtol=1e-4, atol=1e-5)
