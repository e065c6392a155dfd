"""PEFT's `target_parameters`, both ways: the logits of its models are those of ours."""

import copy
import json

import peft
import pytest
import torch
from expert_models import EXPERTS, MODELS, ids, make, randomise
from safetensors.torch import load_file, save_file
from torch import nn

import lora

each_model = pytest.mark.parametrize("name", MODELS)
pytestmark = [
    # PEFT's own: of patterns that are for parameters, which it applies, and of a word of transformers'.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
SETTINGS = [
    {},
    {"use_rslora": True, "target_modules": ["o_proj"]},
    {"rank_pattern": {"down_proj": 2, "layers.1.mlp.experts.gate_up_proj": 5}, "alpha_pattern": {"down_proj": 3}},
]


def logits(model):
    with torch.no_grad():
        return model(ids(), use_cache=False).logits


def of_peft(model, **settings):
    words = {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": EXPERTS, **settings}
    return randomise(peft.get_peft_model(model, peft.LoraConfig(**words)))


@each_model
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_peft_reads_ours(name, settings, tmp_path):
    model, base = make(name), make(name)
    lora.inject(model, target_parameters=EXPERTS, r=3, lora_alpha=6, **settings)
    y = logits(randomise(model))
    assert not torch.allclose(y, logits(base), rtol=0.01, atol=0.01)
    lora.save_adapter(model, tmp_path / "peft", format="peft")
    ours = make(name)
    lora.load_adapter(ours, tmp_path / "peft")
    torch.testing.assert_close(logits(ours), y)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), y)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), y)


@each_model
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_peft_is_read(name, settings, tmp_path):
    theirs = of_peft(make(name), **settings)
    y = logits(theirs)
    theirs.save_pretrained(tmp_path)
    model = make(name)
    assert not torch.allclose(y, logits(model), rtol=0.01, atol=0.01)
    lora.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), y)
    # And into a model that has LoRA already.
    other = make(name)
    lora.inject(other, target_parameters=EXPERTS, r=3, lora_alpha=6, **settings)
    lora.load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), y)


def test_in_bfloat16(tmp_path):
    theirs = of_peft(make("Mixtral", dtype=torch.bfloat16))
    theirs.save_pretrained(tmp_path)
    model = make("Mixtral", dtype=torch.bfloat16)
    lora.load_adapter(model, tmp_path)
    exact = logits(theirs.merge_and_unload().double())
    assert (logits(model).double() - exact).norm() < 0.05 * exact.norm()


# ---- modules of other kinds: one parameter, three, matrices, square ones ----------------------------------------


class Block(nn.Module):
    """Three stacks and a matrix, in the order in which PEFT wraps them."""

    def __init__(self, n=3, size=4, inner=5):
        super().__init__()
        self.router = nn.Parameter(torch.randn(n, size))
        self.gate_proj = nn.Parameter(torch.randn(n, inner, size))
        self.up_proj = nn.Parameter(torch.randn(n, inner, size))
        self.down_proj = nn.Parameter(torch.randn(n, size, inner))

    def forward(self, x):
        shares = torch.softmax(x @ self.router.T, -1)
        hidden = torch.relu(x @ self.gate_proj.mT) * (x @ self.up_proj.mT)
        return torch.einsum("enh,ne->nh", hidden @ self.down_proj.mT, shares)


class Transposed(nn.Module):
    is_transposed = True

    def __init__(self, n=3, size=4):
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(n, size, size))  # square: its shape says nothing

    def forward(self, x):
        return sum(x @ self.down_proj)


class Plain(Transposed):
    is_transposed = False

    def forward(self, x):
        return sum(x @ self.down_proj.mT)


CASES = {
    "three of one module": (Block, ["experts.gate_proj", "experts.up_proj", "experts.down_proj"]),
    "one of several": (Block, ["experts.up_proj"]),
    "a matrix": (Block, ["experts.router"]),
    "square and transposed": (Transposed, ["experts.down_proj"]),
    "square": (Plain, ["experts.down_proj"]),
}


@pytest.mark.parametrize("case", CASES)
def test_other_modules(case, tmp_path):
    make_block, targets = CASES[case]
    base, x = nn.ModuleDict({"experts": make_block()}).double(), torch.randn(6, 4, dtype=torch.float64)
    base.forward = lambda x, base=base: base["experts"](x)
    theirs = randomise(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=[], target_parameters=targets)))
    y = theirs.base_model.model["experts"](x)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs = theirs.unload()
    start = theirs["experts"](x)
    assert not torch.allclose(y, start)
    model = copy.deepcopy(theirs)
    del vars(model)["forward"]
    plain = copy.deepcopy(model)
    lora.load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(model["experts"](x), y)
    lora.save_adapter(model, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours")
    torch.testing.assert_close(again.base_model.model["experts"](x), y)


def test_an_older_pefts_matrices_are_told_apart(tmp_path):
    """Before it looked at `is_transposed`, PEFT gave A the other side of matrices (E, out, in)."""
    theirs = of_peft(make("Mixtral"))
    theirs.save_pretrained(tmp_path)
    model = make("Mixtral")
    lora.load_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_A" in key]:
        A = tensors[key].view(4, 3, -1)  # (E, r, in)
        B = tensors[key.replace("lora_A", "lora_B")].view(-1, 3, 4)  # (out, r, E)
        tensors[key] = B.permute(2, 1, 0).reshape(12, -1)
        tensors[key.replace("lora_A", "lora_B")] = A.permute(2, 1, 0).reshape(-1, 12)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    other = make("Mixtral")
    lora.load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), logits(model))


def test_the_configuration_is_pefts(tmp_path):
    model = make("Mixtral")
    lora.inject(model, target_parameters=EXPERTS, r=3, lora_dropout=0.1)
    lora.save_adapter(model, tmp_path / "peft", format="peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    names = [f"model.layers.{n}.mlp.{own}" for n in (0, 1) for own in EXPERTS]
    assert (config["target_parameters"], config["target_modules"], config["lora_dropout"]) == (names, [], 0.0)
