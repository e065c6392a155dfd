"""save_adapter and load_adapter: what goes through a file, and a file that is whole whenever the writer dies."""

import copy
import json
import os
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from conftest import STORED, example, make
from toy_model import IDS, Model, snapshot

import lora
from lora.adapters import checkpoint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


@torch.no_grad()
def train(model):
    """Move everything that trains."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))
    return model


def saved(path, model=None, **fields):
    """A trained model whose adapter is in the file, and the base model."""
    model = Model() if model is None else model
    base = copy.deepcopy(model)
    lora.inject(model, **{"target_modules": ["q_proj", "v_proj"], "r": 2, **fields})
    lora.save_adapter(train(model), path)
    return model, base


def content(path):
    """All that is in a file: the metadata of the adapter, and each tensor's bytes."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118 (no dict)
        return json.loads(file.metadata()["lora"]), tensors


# ---- what goes through a file ----------------------------------------------------------------------------------

FIELDS = {
    "plain": {},
    "ranks": {"rank_pattern": {r"layers\.0\..*": 4}, "alpha_pattern": {"v_proj": 3}},
    "rslora and dropout": {"use_rslora": True, "lora_dropout": 0.1},
    "splits": {"splits": {"q_proj": (4, 2, 2)}, "enable_lora": {"q_proj": [1, 0, 1], "v_proj": [True, False]}},
    "an embedding": {"target_modules": ["embed", "head"]},
    "biases": {"bias": "all"},
    "the layers' biases": {"bias": "lora_only"},
    "modules": {"modules_to_save": ["head", "norm"]},
    "everything": {"bias": "all", "modules_to_save": ["embed", "head"]},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_plain_model_becomes_the_model_that_was_saved(path, fields, training):
    model, plain = saved(path, **fields)
    plain.train(training)
    lora.load_adapter(plain, path)
    assert torch.equal(plain.eval()(IDS), model.eval()(IDS))
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert [repr(m) for m in plain.modules()] == [repr(m) for m in model.modules()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_model_with_lora_takes_over_everything(path, fields, training):
    model, other = saved(path, Model().double(), **fields)
    lora.inject(other, **{"target_modules": ["q_proj", "v_proj"], "r": 2, **fields, "merge_weights": True})
    with torch.no_grad():
        train(other).train(training)(IDS)  # in eval() there is a merged weight now, which must be seen to be old
        parameters = dict(other.named_parameters())
        lora.load_adapter(other, path)
        torch.testing.assert_close(other.eval()(IDS), model.eval()(IDS))
    assert all(parameter is parameters[name] for name, parameter in other.named_parameters())


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_what_was_loaded_is_marked_saved_disabled_and_ejected_like_what_was_injected(path, fields, tmp_path):
    model, plain = saved(path, **fields)
    base = copy.deepcopy(plain)
    lora.load_adapter(plain, path)
    bias = fields.get("bias", "none")
    ours, theirs = lora.lora_state_dict(plain, bias), lora.lora_state_dict(model, bias)
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    lora.save_adapter(plain, tmp_path / "again")
    assert content(tmp_path / "again") == content(path)
    with lora.disabled(plain):
        assert torch.equal(plain(IDS), base(IDS))
    lora.eject(plain)
    assert torch.equal(plain(IDS), base(IDS))


@pytest.mark.parametrize("kind", STORED)
def test_every_kind_of_layer_goes_through_a_file(path, kind):
    layer, x = make(kind), example(kind)
    layer.scaling = 0.7
    lora.save_adapter(nn.Sequential(layer), path)
    other = copy.deepcopy(layer)
    train(other)
    other.scaling = 1
    with torch.no_grad():
        other.weight.copy_(layer.weight)
        other.bias.copy_(layer.bias) if getattr(layer, "bias", None) is not None else None
    lora.load_adapter(nn.Sequential(other), path)
    assert torch.equal(other(x), layer(x))


def test_buffers_of_modules_that_train_in_full_go_along(path):
    base = nn.ModuleDict({"a": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    base["norm"].register_buffer("cache", torch.ones(2), persistent=False)
    plain = copy.deepcopy(base)
    lora.inject(base, target_modules=["a"], modules_to_save=["norm"])
    base["norm"](torch.randn(8, 4))
    lora.save_adapter(base, path)
    lora.load_adapter(plain, path)
    assert torch.equal(plain["norm"].running_var, base["norm"].running_var)
    assert plain["norm"].num_batches_tracked == 1
    assert "norm.cache" not in content(path)[1]


def test_scaling_that_was_changed_by_hand_is_kept(path):
    model, plain = saved(path)
    model.layers[0].attn["q_proj"].scaling = 0.3125
    lora.save_adapter(model, path)
    lora.load_adapter(plain, path)
    assert plain.layers[0].attn["q_proj"].scaling == 0.3125
    assert plain.layers[1].attn["q_proj"].scaling == 8 / 2
    assert torch.equal(plain(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtypes_of_base_and_adapter_are_kept(path, dtype):
    model, plain = saved(path, Model().to(dtype))
    lora.load_adapter(plain, path)
    assert {n: p.dtype for n, p in plain.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert torch.equal(plain(IDS), model(IDS))


def test_the_base_may_be_in_another_dtype(path):
    model, plain = saved(path)
    lora.load_adapter(plain.to(torch.bfloat16), path)
    loaded, saved_ = (dict(lora.lora_state_dict(each)) for each in (plain, model))
    assert loaded.keys() == saved_.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, saved_[name].to(tensor.dtype))


def test_a_shared_layer_is_saved_once(path):
    layer = nn.Linear(4, 4)
    model, plain = saved(path, nn.ModuleDict({"a": layer, "b": layer}), target_modules=["b"])
    lora.load_adapter(plain, path)
    assert plain["a"] is plain["b"]
    assert torch.equal(plain["b"](torch.ones(4)), model["b"](torch.ones(4)))


def test_an_adapter_that_two_layers_share_is_saved(path):
    model, plain = saved(path)
    first, second = (layer.attn["q_proj"] for layer in model.layers)
    second.lora_A = first.lora_A
    lora.save_adapter(model, path)
    lora.load_adapter(plain, path)
    assert torch.equal(plain(IDS), model(IDS))


def test_tied_weights_that_train_are_saved_once_and_stay_tied(path):
    model, plain = saved(path, Model(tied=True), modules_to_save=["head"])
    lora.load_adapter(plain, path)
    assert plain.head.weight is plain.embed.weight
    assert torch.equal(plain(IDS), model(IDS))


def test_the_root_layer_itself_goes_through_a_file(path):
    model, plain = saved(path, nn.Linear(4, 4), target_modules="all-linear")
    lora.load_adapter(plain, path)
    assert torch.equal(plain(torch.ones(4)), model(torch.ones(4)))


def test_the_file_is_one_safetensors_file_with_all_that_it_takes_to_use_it(path):
    model, _ = saved(path, use_rslora=True, modules_to_save=["layers.0.norm"])
    assert os.listdir(path.parent) == [path.name]
    tensors = safetensors.torch.load_file(path)
    expected = lora.lora_state_dict(model)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())
    about, _ = content(path)
    assert about["version"] == 2
    assert about["trained_in_full"] == ["layers.0.norm.weight", "layers.0.norm.bias"]
    entry = about["modules"]["layers.0.attn.q_proj"]
    assert {key: entry[key] for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "scaling")} == {
        "r": 2, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": True, "scaling": 8 / 2**0.5,
    }  # fmt: skip


def test_saving_changes_nothing(path):
    model, _ = saved(path, bias="all")
    before = snapshot(model)
    lora.save_adapter(model, str(path))
    assert snapshot(model) == before


def test_a_path_may_be_a_string_with_any_name(tmp_path):
    model, plain = saved(str(tmp_path / "ein Adapter, größer"))
    lora.load_adapter(plain, str(tmp_path / "ein Adapter, größer"))
    assert torch.equal(plain(IDS), model(IDS))


# ---- atomic ----------------------------------------------------------------------------------------------------


def fails(*args, **kwargs):
    raise OSError("no space left on device")


@pytest.mark.parametrize("name", ["os.replace", "os.fsync", "safetensors.torch.save", "builtins.open"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch, name):
    model, _ = saved(path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(name, fails)
        with pytest.raises(OSError, match="no space"):
            lora.save_adapter(model, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_nothing_is_at_the_path_before_the_whole_file_is(path, monkeypatch):
    model, _ = saved(path)
    path.unlink()
    monkeypatch.setattr("os.fsync", lambda _: seen.append(path.exists()))
    seen = []
    lora.save_adapter(model, path)
    assert seen == [False]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_not_written(path, poison):
    model, _ = saved(path, bias="all")
    before = path.read_bytes()
    nn.init.constant_(model.layers[0].attn["q_proj"].lora_B, poison)
    nn.init.constant_(model.layers[1].norm.bias, poison)
    with pytest.raises(lora.AdapterError, match="is not written, because") as caught:
        lora.save_adapter(model, path)
    assert str(caught.value).count("holds NaN or infinity") == 2
    assert "layers.0.attn.q_proj.lora_B" in str(caught.value)
    assert path.read_bytes() == before


def test_a_model_without_lora_has_nothing_to_save(path):
    with pytest.raises(ValueError, match="save_adapter: there is no LoRA layer in this Model"):
        lora.save_adapter(Model(), path)
    assert not path.exists()


# A process that forks writers and kills each one at a moment of its own; then the file must be one of the two.
KILLER = """
import os, random, signal, sys, time
import safetensors.torch, torch, lora
torch.set_num_threads(1)
path, model = sys.argv[1], torch.nn.Sequential(torch.nn.Linear(512, 512))
lora.inject(model, target_modules=["0"], r=64)
random.seed(0)
for attempt in range(30):
    writer = os.fork()
    if writer == 0:
        value = 0
        while True:
            value = 1 - value
            torch.nn.init.constant_(model[0].lora_A, value), torch.nn.init.constant_(model[0].lora_B, value)
            lora.save_adapter(model, path)
    for _ in range(10_000):
        if os.path.exists(path):
            break
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.02))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    tensors = safetensors.torch.load_file(path)
    found = {float(tensor.min()) for tensor in tensors.values()} | {float(tensor.max()) for tensor in tensors.values()}
    assert len(tensors) == 2 and found in ({0.0}, {1.0}), found
    lora.load_adapter(model, path)
print("whole")
"""


def test_a_writer_that_is_killed_at_any_moment_leaves_a_whole_file(path):
    result = subprocess.run([sys.executable, "-c", KILLER, str(path)], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "whole", result.stderr


def test_loading_reports_what_inject_does(tmp_path):
    model, plain = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)) for _ in range(2))
    report = lora.inject(model, target_modules=["0"], modules_to_save=["1"], r=2)
    lora.save_adapter(model, tmp_path / "a")
    assert lora.load_adapter(plain, tmp_path / "a", check_base=False) == report
    assert lora.load_adapter(model, tmp_path / "a") == report  # of a model that had LoRA


@pytest.mark.parametrize("step", ["remember_values", "report_of"])
def test_an_error_after_the_settings_are_taken_over_leaves_all_values_as_they_were(step, monkeypatch):
    def fails(*args):
        raise MemoryError

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    plain = copy.deepcopy(model)
    lora.inject(model, target_modules=["a"], modules_to_save=["head"], r=2)
    nn.init.ones_(model["head"].weight)
    before = snapshot(plain)
    monkeypatch.setattr(checkpoint, step, fails)
    with pytest.raises(MemoryError):
        lora.load_adapter(plain, lora.adapter_of(model))
    assert snapshot(plain) == before
    assert type(plain["a"]) is nn.Linear
