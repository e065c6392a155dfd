"""PEFT's format against PEFT: it loads what we write, and computes the same."""

import copy
import json
import re

import pytest
import safetensors.torch
import torch
import transformers
from conftest import randomised
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import every_two
from peft_models import (
    FORMATS,
    IDS,
    QUIET,
    Net,
    adapted,
    same,
    theirs,
    train,
)
from torch import nn

import lora
from lora.models.training import train_in_full

pytestmark = QUIET


FIELDS = {
    "merged with two splits": {"target_modules": ["qkv"]},
    "merged with all splits": {"target_modules": ["qkv"], "enable_lora": {}},
    "merged with one split": {"target_modules": ["qkv"], "enable_lora": {"qkv": (False, True, False)}},
    "merged, rslora": {"target_modules": ["qkv"], "use_rslora": True},
    "linear": {"target_modules": "block.o", "splits": {}, "enable_lora": {}},
    "linear, rslora": {"target_modules": "o", "splits": {}, "enable_lora": {}, "use_rslora": True},
    "an end of another name": {"target_modules": "o", "splits": {}, "enable_lora": {}},
    "embedding": {"target_modules": ["emb"], "splits": {}, "enable_lora": {}},
    "convolutions": {"target_modules": ["conv1", "conv2", "conv3"], "splits": {}, "enable_lora": {}},
    "convolutions, rslora": {
        "target_modules": ["conv1", "conv2", "conv3"], "splits": {}, "enable_lora": {}, "use_rslora": True,
    },
    "everything": {},
    "everything, rslora": {"use_rslora": True},
    "ranks and alphas": {
        "rank_pattern": {"o": 3, "qkv": 5, "conv3": 8}, "alpha_pattern": {"emb": 1, "block.o": 2.5},
    },
    "ranks and alphas, rslora": {
        "rank_pattern": {"block.o": 3, "qkv": 5, "conv1": 2}, "alpha_pattern": {"emb": 1, "o": 2.5}, "use_rslora": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_peft_computes_what_we_do(tmp_path, fields, format):
    base = Net()
    model = adapted(base, **fields)
    lora.save_adapter(model, tmp_path / "a", format=format)
    same(model, theirs(base, tmp_path / "a"), base)
    plain = copy.deepcopy(base)
    lora.load_adapter(plain, tmp_path / "a")
    same(plain.eval(), model, base)


@pytest.mark.parametrize("format", FORMATS)
def test_scalings_set_by_hand_go_along(tmp_path, format):
    base = Net()
    model = adapted(base, use_rslora=True)
    for i, layer in enumerate(module for module in model.modules() if isinstance(module, lora.LoRALayer)):
        layer.scaling = 0.3 + i
    lora.save_adapter(model, tmp_path / "a", format=format)
    same(model, theirs(base, tmp_path / "a"), base)


@pytest.mark.parametrize("format", FORMATS)
def test_layers_with_rslora_and_without(tmp_path, format):
    base = Net()
    model = adapted(base, use_rslora=True)
    model.o.use_rslora, model.o.scaling = False, 6 / 4
    lora.save_adapter(model, tmp_path / "a", format=format)
    same(model, theirs(base, tmp_path / "a"), base)


@pytest.mark.parametrize("format", FORMATS)
def test_adapters_in_bfloat16(tmp_path, format):
    base = Net()
    model = adapted(base, adapter_dtype=torch.bfloat16)
    lora.save_adapter(model, tmp_path / "a", format=format)
    tensors = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16 if format == "peft" else torch.float32}
    same(model, theirs(base, tmp_path / "a"), base)


@every_two(n=[1, 2, 3], groups=[1, 2], use_rslora=[False, True], format=FORMATS)
def test_loralibs_convolutions(tmp_path, n, groups, use_rslora, format):
    cls, kernel = [nn.Conv1d, nn.Conv2d, nn.Conv3d][n - 1], 3
    base = nn.ModuleDict({"c": cls(4, 6, kernel, stride=2, padding=1, groups=groups)})
    model = copy.deepcopy(base)
    lora.inject(model, target_modules=["c"], r=2, lora_alpha=5, use_rslora=use_rslora, factored=False)
    train(model)
    lora.save_adapter(model, tmp_path / "a", format=format)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    grown = groups**2 * kernel ** (2 * (n // 2))
    assert config["r"] == 2 * grown
    if not use_rslora and format == "peft":
        assert config["lora_alpha"] == 5 * grown
    x = torch.randn(2, 4, *[6] * n)
    expected, got = model["c"](x), theirs(base, tmp_path / "a").base_model.model["c"](x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    assert (expected - base["c"](x)).abs().max() > 0.1


@pytest.mark.parametrize("splits", [{}, {"c_attn": (16, 16, 16)}], ids=["whole", "merged"])
@pytest.mark.parametrize("format", FORMATS)
def test_transformers_conv1d(tmp_path, splits, format):
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    base = transformers.GPT2LMHeadModel(config).eval()
    model = copy.deepcopy(base)
    lora.inject(model, target_modules=["c_attn", "c_proj"], r=3, splits=splits)
    train(model)
    lora.save_adapter(model, tmp_path / "a", format=format)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))["fan_in_fan_out"] is True
    same(model, theirs(base, tmp_path / "a"), base)
    plain = copy.deepcopy(base)
    lora.load_adapter(plain, tmp_path / "a")
    same(plain.eval(), model, base)
    update = lora.read_adapter(tmp_path / "a").delta("transformer.h.0.attn.c_attn", torch.float64)
    torch.testing.assert_close(update, lora.adapter_of(model).delta("transformer.h.0.attn.c_attn", torch.float64))


@pytest.mark.parametrize(
    "fields", [{"bias": "lora_only"}, {"bias": "all"}, {"modules_to_save": ["head", "block.norm"]}]
)
def test_biases_and_modules_that_train_in_full(tmp_path, fields):
    base = Net()
    model = adapted(base, **fields)
    lora.save_adapter(model, tmp_path / "a", format="peft")
    loaded = theirs(base, tmp_path / "a")
    same(model, loaded, base)
    assert loaded.peft_config["default"].bias == fields.get("bias", "none")
    plain = copy.deepcopy(base)
    lora.load_adapter(plain, tmp_path / "a")
    same(plain.eval(), model, base)
    ours, expected = ({name for name, p in m.named_parameters() if p.requires_grad} for m in (plain, model))
    assert ours == expected
    again = adapted(base, **fields)
    lora.load_adapter(again, tmp_path / "a")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_buffers_of_modules_that_train_in_full(tmp_path):
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.block["norm"] = nn.Sequential(nn.BatchNorm1d(7), nn.Linear(6, 6))

        def forward(self, ids):
            return self.head(self.block["norm"](self.o(self.emb(ids)))[..., :4]).mean(1)

    base = Normed()
    model = adapted(base, target_modules=["o"], splits={}, enable_lora={}, modules_to_save=["norm"])
    model.train()(IDS)
    lora.save_adapter(model.eval(), tmp_path / "a", format="peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["modules_to_save"] == ["block.norm"]
    same(model, theirs(base, tmp_path / "a"), base)
    plain = copy.deepcopy(base)
    lora.load_adapter(plain, tmp_path / "a")
    same(plain.eval(), model, base)


NAMES = {
    "0 and 3.0": ("0", "3.0"),
    "o and block.o": ("o", "block.o"),
    "three of one end": ("x", "a.x", "b.a.x"),
    "characters of expressions": ("a+", "b.a+", "(b)[a]*|^$"),
    "a backslash and a brace": ("a{2}", "b.a{2}", "\\d"),
    "an end without a dot": ("head", "ahead"),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("names", [names for names in NAMES.values() if "\\d" not in names], ids=str)
@pytest.mark.parametrize("ranks", [False, True])
def test_names_that_end_or_look_like_others(tmp_path, names, ranks, format):
    def build(entries):
        inner = {}
        for name in entries:
            first, _, rest = name.partition(".")
            inner.setdefault(first, []).append(rest) if rest else inner.setdefault(first, None)
        return nn.ModuleDict({k: nn.Linear(3, 3) if v is None else build(v) for k, v in inner.items()})

    base = build(names)
    x = torch.randn(4, 3)
    for target in names:
        model = copy.deepcopy(base)
        lora.inject(model, target_modules=re.escape(target), r=2)
        if ranks:
            lora.eject(model)
            pattern = {f"^{re.escape(target)}": 5}
            lora.inject(model, target_modules="all-linear", r=2, rank_pattern=pattern, alpha_pattern=pattern)
        train(model)
        lora.save_adapter(model, tmp_path / "a", format=format)
        loaded = theirs(base, tmp_path / "a").base_model.model
        for name in names:
            got = loaded.get_submodule(name)(x)
            torch.testing.assert_close(got, model.get_submodule(name)(x), rtol=1e-5, atol=1e-5)
            is_adapted = hasattr(loaded.get_submodule(name), "lora_A")
            assert is_adapted == (ranks or name == target), name


@pytest.mark.parametrize("target", ["block.o", "ao", "block.o.inner", "x.o.y"])
def test_a_module_to_save_that_peft_would_find_in_a_targets_name_is_refused(tmp_path, target):
    base = nn.ModuleDict({"o": nn.Linear(3, 3)})
    outer = target.partition(".")[0]
    inner = nn.Linear(3, 3)
    for name in reversed(target.split(".")[1:]):
        inner = nn.ModuleDict({name: inner})
    base[outer] = inner
    lora.inject(base, target_modules=re.escape(target), r=2)
    train_in_full(base["o"])
    lora.mark_only_lora_as_trainable(base)
    with pytest.raises(lora.AdapterError, match=f"o trains in full, and PEFT would take {target} for it as well"):
        lora.save_adapter(base, tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    splits=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
    r=st.integers(1, 3),
    use_rslora=st.booleans(),
    format=st.sampled_from(FORMATS),
)
def test_any_splits_and_masks(tmp_path, splits, data, r, use_rslora, format):
    mask = data.draw(st.lists(st.booleans(), min_size=len(splits), max_size=len(splits)).filter(any))
    base = nn.ModuleDict({"qkv": nn.Linear(5, sum(splits)), "o": nn.Linear(5, 5)})
    model = copy.deepcopy(base)
    fields = {"splits": {"qkv": splits}, "enable_lora": {"qkv": mask}, "rank_pattern": {"o": 4}}
    lora.inject(model, target_modules=["qkv", "o"], r=r, use_rslora=use_rslora, **fields)
    train(model)
    other = copy.deepcopy(model)
    randomised(other["qkv"]), randomised(other["o"])
    lora.save_adapter(model, tmp_path / "a", format=format)
    loaded, x = theirs(base, tmp_path / "a").base_model.model, torch.randn(4, 5)
    lora.load_adapter(other, tmp_path / "a")
    for name in ("qkv", "o"):
        torch.testing.assert_close(loaded[name](x), model[name](x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other[name](x), model[name](x), rtol=1e-5, atol=1e-5)
        assert torch.equal(other[name].lora_A, model[name].lora_A)


@pytest.mark.parametrize("geometry", [{"dilation": 2}, {"padding_mode": "circular", "padding": 1}], ids=str)
def test_what_peft_leaves_out_of_convolutions_is_refused_both_ways(geometry, tmp_path):
    model = nn.Sequential(nn.Conv1d(2, 3, 3, **geometry))
    lora.inject(model, target_modules=["0"], r=2, factored=True)
    with pytest.raises(lora.AdapterError, match=r"0: PEFT would compute the update of a convolution without its \w+="):
        lora.save_adapter(model, tmp_path / "theirs", format="peft")
    assert not (tmp_path / "theirs").exists()
    plain = nn.Sequential(nn.Conv1d(2, 3, 3))
    lora.inject(plain, target_modules=["0"], r=2, factored=True)
    lora.save_adapter(plain, tmp_path / "theirs", format="peft")
    with pytest.raises(lora.AdapterError, match=r"0: PEFT ignores"):
        lora.load_adapter(model, tmp_path / "theirs")
