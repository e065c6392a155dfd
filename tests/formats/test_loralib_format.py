"""loralib's files against loralib: a model of its layers, saved flat, and ours that load the file, compute the same."""

import copy

import loralib
import pytest
import safetensors.torch
import torch
from pairwise import every_two
from torch import nn
from toy_model import snapshot

import lora

ALPHA = 6


class Theirs(nn.Module):
    """A model of loralib's layers."""

    def __init__(self, merged=True):
        super().__init__()
        self.emb = loralib.Embedding(11, 6, r=3, lora_alpha=ALPHA)
        self.attn = nn.ModuleDict({"query": loralib.Linear(6, 6, r=2, lora_alpha=ALPHA), "value": nn.Linear(6, 6)})
        if merged:
            self.qkv = loralib.MergedLinear(6, 18, r=2, lora_alpha=ALPHA, enable_lora=[True, False, True])
        self.conv = loralib.Conv2d(1, 4, 3, r=2, lora_alpha=ALPHA, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        x = self.emb(ids)
        x = x + self.attn["value"](self.attn["query"](x))
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(x).chunk(3, -1)
            x = q * k.tanh() + v
        return self.head(self.conv(x[:, None]).mean((-1, -2)))


class Plain(Theirs):
    """The same model of torch's layers."""

    def __init__(self, theirs):
        nn.Module.__init__(self)
        self.emb = nn.Embedding(11, 6)
        self.attn = nn.ModuleDict({"query": nn.Linear(6, 6), "value": nn.Linear(6, 6)})
        if hasattr(theirs, "qkv"):
            self.qkv = nn.Linear(6, 18)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        base = {name.replace("conv.conv.", "conv."): value for name, value in theirs.state_dict().items()}
        self.load_state_dict({name: value.clone() for name, value in base.items() if "lora_" not in name})


IDS = torch.tensor([[1, 2, 3, 10], [0, 0, 7, 8]])
TARGETS = {"target_modules": ["emb", "query", "qkv", "conv"], "rank_pattern": {"emb": 3}, "factored": False}
MERGED = {"enable_lora": {"qkv": [True, False, True]}}


def trained(**options):
    """loralib's model with random adapters, before any is merged, and the plain base."""
    model = Theirs(**options)
    base = Plain(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model, base


def save(state, path, kind):
    torch.save(state, path) if kind == "torch" else safetensors.torch.save_file(state, path)
    return path


def same(ours, theirs, base):
    with torch.no_grad():
        expected = theirs.train()(IDS)  # not merged; there is no dropout
        torch.testing.assert_close(ours.eval()(IDS), expected, rtol=1e-5, atol=1e-5)
        assert (expected - base(IDS)).abs().max() > 0.05


files = pytest.mark.parametrize("kind", ["torch", "safetensors"])


@files
def test_every_layer_in_a_model_with_lora(tmp_path, kind):
    theirs, base = trained()
    path = save(loralib.lora_state_dict(theirs), tmp_path / "a.pt", kind)
    ours = copy.deepcopy(base)
    lora.inject(ours, r=2, lora_alpha=1, **TARGETS, **MERGED)
    lora.load_adapter(ours, path, lora_alpha=ALPHA)
    same(ours, theirs, base)
    assert ours.conv.scaling == ALPHA / 2
    assert ours.emb.scaling == ALPHA / 3
    for name, tensor in loralib.lora_state_dict(theirs).items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@files
def test_every_layer_but_a_fused_one_in_a_plain_model(tmp_path, kind):
    theirs, base = trained(merged=False)
    path = save(loralib.lora_state_dict(theirs), tmp_path / "a.pt", kind)
    ours = copy.deepcopy(base)
    lora.load_adapter(ours, path, lora_alpha=ALPHA)
    same(ours, theirs, base)
    assert (ours.conv.r, ours.conv.factored) == (2, False)
    assert ours.conv.scaling == ALPHA / 2
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == set(loralib.lora_state_dict(theirs))
    lora.save_adapter(ours, tmp_path / "again")
    again = copy.deepcopy(base)
    lora.load_adapter(again, tmp_path / "again")
    same(again, theirs, base)


@files
def test_a_fused_layer_is_refused_in_a_plain_model_for_its_splits(tmp_path, kind):
    theirs, base = trained()
    path = save(loralib.lora_state_dict(theirs), tmp_path / "a.pt", kind)
    before = snapshot(base)
    with pytest.raises(lora.AdapterError) as caught:
        lora.load_adapter(base, path, lora_alpha=ALPHA)
    assert "qkv: lora_A (4, 6) and lora_B (12, 2) are those of a fused layer, whose splits loralib's" in str(
        caught.value
    )
    assert str(caught.value).count("\n  - qkv") >= 1
    assert "query" not in str(caught.value)
    assert snapshot(base) == before


@files
def test_without_a_lora_alpha_there_is_no_scaling(tmp_path, kind):
    theirs, base = trained()
    path = save(loralib.lora_state_dict(theirs), tmp_path / "a.pt", kind)
    before = snapshot(base)
    with pytest.raises(lora.AdapterError, match="it has no scaling: loralib's files say nothing of lora_alpha"):
        lora.load_adapter(base, path)
    assert snapshot(base) == before


@files
@pytest.mark.parametrize("injected", [False, True])
def test_a_task_head_and_biases_beside_the_adapter(tmp_path, kind, injected):
    theirs, base = trained(merged=False)
    with torch.no_grad():
        for parameter in (theirs.head.weight, theirs.head.bias, theirs.attn["value"].bias):
            parameter.copy_(torch.randn(parameter.shape))
    state = loralib.lora_state_dict(theirs)
    names = ("head.weight", "head.bias", "attn.value.bias")
    state |= {name: theirs.state_dict()[name] for name in names}
    path = save(state, tmp_path / "a.pt", kind)
    ours = copy.deepcopy(base)
    if injected:
        fields = {**TARGETS, "target_modules": ["emb", "query", "conv"]}
        lora.inject(ours, r=2, modules_to_save=["head"], **fields)
        ours.attn["value"].bias.requires_grad_(True)
    lora.load_adapter(ours, path, lora_alpha=ALPHA)
    same(ours, theirs, base)
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == set(state)
    with torch.no_grad(), lora.disabled(ours):
        torch.testing.assert_close(ours(IDS), base(IDS))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_loralibs_own_choice_of_biases(tmp_path, bias):
    theirs, base = trained(merged=False)
    nn.init.normal_(theirs.attn["query"].bias)
    if bias == "all":
        nn.init.normal_(theirs.conv.conv.bias)
    path = save(loralib.lora_state_dict(theirs, bias=bias), tmp_path / "a.pt", "torch")
    ours = copy.deepcopy(base)
    lora.load_adapter(ours, path, lora_alpha=ALPHA)
    same(ours, theirs, base)


def test_two_names_of_one_bias_of_a_convolution_are_refused(tmp_path):
    theirs, base = trained(merged=False)
    state = loralib.lora_state_dict(theirs, bias="all")
    assert "conv.conv.bias" in state
    path = save(state | {"conv.bias": torch.zeros(4)}, tmp_path / "a.pt", "torch")
    with pytest.raises(lora.AdapterError, match=r"conv.conv.bias and conv.bias are one parameter in loralib"):
        lora.load_adapter(base, path, lora_alpha=ALPHA)


def test_names_as_in_loralibs_roberta(tmp_path):
    inner = nn.ModuleDict({"query": loralib.Linear(8, 8, r=4, lora_alpha=16), "value": nn.Linear(8, 8)})
    for name in ("self", "attention", "0"):
        inner = nn.ModuleDict({name: inner})
    theirs = nn.ModuleDict({"roberta": nn.ModuleDict({"encoder": nn.ModuleDict({"layer": inner})})})
    key = "roberta.encoder.layer.0.attention.self.query"
    nn.init.normal_(theirs.get_submodule(key).lora_B)
    state = loralib.lora_state_dict(theirs)
    assert set(state) == {f"{key}.lora_A", f"{key}.lora_B"}
    ours = copy.deepcopy(theirs)
    query = nn.Linear(8, 8)
    query.weight, query.bias = theirs.get_submodule(key).weight, theirs.get_submodule(key).bias
    ours.get_submodule(key.removesuffix(".query"))["query"] = query
    lora.load_adapter(ours, save(state, tmp_path / "a.pt", "torch"), lora_alpha=16)
    x = torch.randn(3, 8)
    torch.testing.assert_close(ours.get_submodule(key)(x), theirs.get_submodule(key)(x), rtol=1e-5, atol=1e-5)


@every_two(k=[1, 2, 3], groups=[1, 2], injected=[False, True], format=[None, "lora", "peft", "portable"])
def test_convolutions_of_any_kernel_and_groups(tmp_path, k, groups, injected, format):
    theirs = nn.Sequential(loralib.Conv2d(4, 6, k, r=3, lora_alpha=5, groups=groups, stride=2))
    nn.init.normal_(theirs[0].lora_B)
    ours = nn.Sequential(nn.Conv2d(4, 6, k, groups=groups, stride=2))
    ours[0].load_state_dict(theirs[0].conv.state_dict())
    base = copy.deepcopy(ours)
    if injected:
        lora.inject(ours, target_modules=["0"], r=3, factored=False)
    lora.load_adapter(ours, save(loralib.lora_state_dict(theirs), tmp_path / "a.pt", "torch"), lora_alpha=5)
    assert ours[0].r == 3
    assert ours[0].scaling == 5 / 3
    if format:
        lora.save_adapter(ours, tmp_path / "b", format=format)
        ours = base
        lora.load_adapter(ours, tmp_path / "b")
    x = torch.randn(2, 4, 7, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("mask", [[True, True], [False, True], [True, False, True]], ids=str)
@pytest.mark.parametrize("format", ["lora", "peft", "portable"])
def test_merged_layers_of_any_mask(tmp_path, mask, fan_in_fan_out, format):
    sizes = {"in_features": 5, "out_features": 6, "r": 2, "lora_alpha": 7, "fan_in_fan_out": fan_in_fan_out}
    theirs = nn.Sequential(loralib.MergedLinear(**sizes, enable_lora=mask))
    nn.init.normal_(theirs[0].lora_B)
    ours = nn.Sequential(lora.MergedLinear(**sizes, enable_lora=mask))
    lora.mark_only_lora_as_trainable(ours)
    with torch.no_grad():
        ours[0].weight.copy_(theirs[0].weight)
        ours[0].bias.copy_(theirs[0].bias)
    lora.load_adapter(ours, save(loralib.lora_state_dict(theirs), tmp_path / "a.pt", "torch"), lora_alpha=7)
    x = torch.randn(3, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    lora.save_adapter(ours, tmp_path / "b", format=format)
    nn.init.normal_(ours[0].lora_A)
    lora.load_adapter(ours, tmp_path / "b")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@files
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_do_not_count(tmp_path, kind, prefix):
    theirs, base = trained(merged=False)
    state = {prefix + name: value for name, value in loralib.lora_state_dict(theirs).items()}
    lora.load_adapter(base, save(state, tmp_path / "a.pt", kind), lora_alpha=ALPHA)
    same(base, theirs, Plain(Theirs(merged=False)))


def test_what_a_flat_file_leaves_open_is_not_written_as_another_format_without_the_model(tmp_path):
    theirs, _ = trained()
    path = save(loralib.lora_state_dict(theirs), tmp_path / "a.pt", "torch")
    adapter = lora.read_adapter(path, lora_alpha=ALPHA)
    for format in ("peft", "portable"):
        with pytest.raises(lora.AdapterError, match="only its model knows"):
            lora.write_adapter(adapter, tmp_path / "b", format)
    assert not (tmp_path / "b").exists()
