"""DoRA beside PEFT's from the same start: outputs, gradients, steps, and each other's files."""

import copy
import json

import peft
import pytest
import safetensors.torch
import torch
import transformers
from exchange import peft_files, refused
from pairwise import every_two
from peft_models import IDS, MERGEABLE, QUIET, SPLITS, Net, adapted, by_peft, same, theirs, train
from torch import nn

import lora

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")]

SETTINGS = {"r": 4, "lora_alpha": 6, "use_dora": True}


def gpt2_layer():
    layer = transformers.pytorch_utils.Conv1D(5, 6)
    nn.init.normal_(layer.bias)
    return layer


LAYERS = {
    "Linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "Linear without a bias": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "Conv1D": (gpt2_layer, (2, 3, 6)),
    "Embedding": (lambda: nn.Embedding(7, 5), None),
    "Embedding with padding": (lambda: nn.Embedding(7, 5, padding_idx=2), None),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1), (2, 4, 5, 6)),
    "Conv2d without a bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 5, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
}


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def example(name, dtype):
    shape = LAYERS[name][1]
    return torch.randint(7, (3, 4)) if shape is None else torch.randn(shape, dtype=dtype)


def peft_tensors(model, name="layer"):
    """PEFT's A, B and magnitude of a module, by our names."""
    layer = model.base_model.model.get_submodule(name)
    kind = "lora_embedding" if layer.lora_embedding_A else "lora"
    factors = {f"lora_{part}": getattr(layer, f"{kind}_{part}")["default"] for part in "AB"}
    factors["lora_magnitude"] = layer.lora_magnitude_vector["default"]
    return {own: getattr(held, "weight", held) for own, held in factors.items()}


def pair(base, dtype, **settings):
    """Our model and PEFT's, from the same A and B; magnitudes as each of them starts."""
    base = base.to(dtype)
    ours, fields = copy.deepcopy(base), {**SETTINGS, "target_modules": ["layer"], **settings}
    lora.inject(ours, factored=True, **fields)
    other = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields), autocast_adapter_dtype=False)
    with torch.no_grad():
        for own, tensor in peft_tensors(other).items():
            if own != "lora_magnitude":
                tensor.copy_(ours.layer.get_parameter(own))
    return ours, other


def assert_same_steps(ours, other, x, eps, steps=5):
    """Outputs and gradients at the start and after each of some steps of AdamW."""
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (ours, other)]
    start = ours(x).detach()
    for _ in range(steps):
        for model, optimizer in zip((ours, other), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - 0.5).square().mean().backward()
        close(ours(x), other(x), eps)
        for own, tensor in peft_tensors(other).items():
            close(ours.layer.get_parameter(own).grad, tensor.grad.reshape(ours.layer.get_parameter(own).shape), eps)
        for optimizer in optimizers:
            optimizer.step()
    for own, tensor in peft_tensors(other).items():
        close(ours.layer.get_parameter(own), tensor.reshape(ours.layer.get_parameter(own).shape), eps)
    assert (ours(x) - start).abs().max() > 0.05


def close(got, expected, eps):
    torch.testing.assert_close(got, expected, rtol=eps, atol=eps * max(1e-2, expected.abs().max().item()))


@every_two(name=list(LAYERS), dtype=[torch.float64, torch.float32], use_rslora=[False, True])
def test_the_same_outputs_gradients_and_steps(name, dtype, use_rslora):
    eps = 1e-9 if dtype == torch.float64 else 2e-3
    layer, x = LAYERS[name][0](), example(name, dtype)
    ours, other = pair(One(layer), dtype, use_rslora=use_rslora)
    base = ours.layer.lora_base_forward(x)
    assert torch.equal(ours(x), base)
    close(other(x), base, 1e-6)
    assert_same_steps(ours, other, x, eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_fused_layer_is_peft_s_of_the_block_diagonal_form(dtype):
    """PEFT has one A and one B for all splits; ours, written in that form, has the same function and magnitudes."""
    fields = {"target_modules": ["layer"], "splits": {"layer": (4, 3, 2)}, "enable_lora": {}}
    base = One(nn.Linear(6, 9)).to(dtype)
    model = copy.deepcopy(base)
    lora.inject(model, **SETTINGS, **fields)
    train(model)
    other = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=12, lora_alpha=18, use_dora=True, target_modules=["layer"]),
        autocast_adapter_dtype=False,
    )
    ours, held = model.layer, peft_tensors(other)
    with torch.no_grad():
        held["lora_A"].copy_(ours.lora_A)
        held["lora_B"].copy_(torch.block_diag(*ours.lora_B.split((4, 3, 2))))
        held["lora_magnitude"].copy_(ours.lora_magnitude)
    x, eps = torch.randn(2, 3, 6, dtype=dtype), 1e-10 if dtype == torch.float64 else 1e-4
    dy = torch.randn(2, 3, 9, dtype=dtype)
    close(model(x), other(x), eps)
    model(x).backward(dy)
    other(x).backward(dy)
    close(ours.lora_A.grad, held["lora_A"].grad, eps)
    blocks = [held["lora_B"].grad[i:j, 4 * k : 4 * k + 4] for k, (i, j) in enumerate(((0, 4), (4, 7), (7, 9)))]
    close(ours.lora_B.grad, torch.cat(blocks), eps)
    close(ours.lora_magnitude.grad, held["lora_magnitude"].grad, eps)


def test_with_dropout_means_agree_where_samples_differ():
    """PEFT drops the part (g − 1) · W₀ x as well, with a second base product; the expectation is the same."""
    ours, other = pair(One(nn.Linear(6, 5)), torch.float64, lora_dropout=0.5)
    train(ours)
    with torch.no_grad():
        for own, tensor in peft_tensors(other).items():
            tensor.copy_(ours.layer.get_parameter(own))
    x = torch.randn(1, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = other.eval()(x)
        close(ours(x), expected, 1e-10)
        many = x.expand(4000, 6)
        for model in (ours.train(), other.train()):
            samples = model(many)
            assert ((samples.mean(0) - expected).abs() <= 5 * samples.std(0) / 4000**0.5).all()
            assert (samples.std(0) > 0.01).all()


# ---- files -------------------------------------------------------------------------------------------------------

WHOLE = {"splits": {}, "enable_lora": {}}
WRITTEN = {
    "linear": {"target_modules": ["o", "qkv"], **WHOLE},
    "rslora, ranks and alphas": {
        "target_modules": ["o", "qkv"], **WHOLE, "use_rslora": True,
        "rank_pattern": {"block.o": 3}, "alpha_pattern": {"qkv": 5},
    },
    "merged": {"target_modules": ["qkv", "o"], "enable_lora": {}},
    "embedding": {"target_modules": ["emb"], **WHOLE},
    "convolution": {"target_modules": ["conv2", "o"], **WHOLE},
    "all of these": {"target_modules": MERGEABLE, "enable_lora": {}},
}  # fmt: skip


@pytest.mark.parametrize("fields", WRITTEN.values(), ids=WRITTEN)
def test_peft_computes_what_we_wrote(tmp_path, fields):
    base = Net()
    model = adapted(base, **fields, use_dora=True)
    lora.save_adapter(model, tmp_path / "a", format="peft")
    config, tensors = peft_files(tmp_path / "a")
    assert config["use_dora"] is True
    assert sum("lora_magnitude_vector" in name for name in tensors) == len(tensors) // 3
    same(model, theirs(base, tmp_path / "a"), base, eps=1e-5)
    plain = copy.deepcopy(base)
    lora.load_adapter(plain, tmp_path / "a")
    same(plain.eval(), model, base, eps=1e-5)


PEFTS = {
    "linear": {"target_modules": ["o", "qkv"]},
    "rslora": {"target_modules": ["o"], "use_rslora": True, "rank_pattern": {"block.o": 3}},
    "embedding": {"target_modules": ["emb"]},
    "convolution": {"target_modules": ["conv2", "o"]},
    "all of these": {"target_modules": MERGEABLE, "modules_to_save": ["head"]},
}


@pytest.mark.parametrize("fields", PEFTS.values(), ids=PEFTS)
@pytest.mark.parametrize("into", ["plain", "injected"])
def test_we_compute_what_peft_wrote(tmp_path, fields, into):
    base = Net()
    other = by_peft(base, tmp_path / "a", **SETTINGS, **fields)
    model = copy.deepcopy(base)
    if into == "injected":
        lora.inject(model, **SETTINGS, **fields, factored=True)
    lora.load_adapter(model, tmp_path / "a")
    same(model.eval(), other, base, eps=1e-5)
    lora.save_adapter(model, tmp_path / "again", format="peft")
    assert set(peft_files(tmp_path / "again")[1]) == set(peft_files(tmp_path / "a")[1])
    same(theirs(base, tmp_path / "again"), other, base, eps=1e-5)


def test_pefts_whole_layer_goes_into_a_fused_one(tmp_path):
    base = Net()
    other = by_peft(base, tmp_path / "a", **SETTINGS, target_modules=["qkv"])
    model = copy.deepcopy(base)
    fused = {"splits": SPLITS["splits"], "enable_lora": {"qkv": (True, True, True)}}
    lora.inject(model, **SETTINGS, target_modules=["qkv"], **fused)
    lora.load_adapter(model, tmp_path / "a")
    same(model.eval(), other, base, eps=1e-5)


def test_a_gpt2_from_and_to_peft(tmp_path):
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    base = transformers.GPT2LMHeadModel(config).eval()
    other = by_peft(base, tmp_path / "a", **SETTINGS, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = copy.deepcopy(base)
    lora.load_adapter(model, tmp_path / "a")
    same(model.eval(), other, base, eps=1e-5)
    lora.save_adapter(model, tmp_path / "b", format="peft")
    same(theirs(base, tmp_path / "b"), other, base, eps=1e-5)


def test_merged_weights_are_pefts():
    ours, other = pair(One(nn.Conv2d(4, 6, 3)), torch.float64)
    train(ours)
    with torch.no_grad():
        for own, tensor in peft_tensors(other).items():
            tensor.copy_(ours.layer.get_parameter(own).view_as(tensor))
    lora.merge(ours)
    merged = other.merge_and_unload()
    close(ours.layer.weight, merged.layer.weight, 1e-10)


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_with_magnitudes_and_without_in_one_model(tmp_path):
    model = nn.ModuleDict({"a": lora.Linear(3, 3, r=2, use_dora=True), "b": lora.Linear(3, 3, r=2)})
    refused(
        lambda: lora.save_adapter(model, tmp_path / "a", format="peft"), "`use_dora` for all modules or for none", "a."
    )
    assert not (tmp_path / "a").exists()


def test_splits_that_are_not_adapted(tmp_path):
    model = adapted(Net(), target_modules=["qkv"], use_dora=True)
    refused(
        lambda: lora.save_adapter(model, tmp_path / "a", format="peft"), "qkv: PEFT would have a magnitude for every"
    )


def test_convolutions_with_groups(tmp_path):
    model = adapted(Net(), target_modules=["conv1", "conv3"], use_dora=True, **WHOLE)
    said = refused(lambda: lora.save_adapter(model, tmp_path / "a", format="peft"), "conv1: ", "conv3: ")
    assert said.count("no DoRA for convolutions with groups") == 2


@pytest.mark.parametrize("target", [["o", "qkv"], ["emb", "conv2", "qkv"]])
def test_the_portable_form_has_no_place_for_it(tmp_path, target):
    model = adapted(Net(), target_modules=target, use_dora=True)
    names = [name for name, module in model.named_modules() if isinstance(module, lora.LoRALayer)]
    refused(
        lambda: lora.save_adapter(model, tmp_path / "a", format="portable"),
        *(f"{name} has a magnitude (DoRA), which no scaling can say: merge it." for name in names),
    )
    assert not (tmp_path / "a").exists()


def test_a_file_with_magnitudes_for_a_model_without_and_the_other_way_round(tmp_path):
    base = Net()
    for written in (True, False):
        by_peft(base, tmp_path / f"{written}", r=4, lora_alpha=6, use_dora=written, target_modules=["o"])
        model = copy.deepcopy(base)
        lora.inject(model, r=4, target_modules=["o"], use_dora=not written)
        said = refused(lambda: lora.load_adapter(model, tmp_path / f"{written}"))  # noqa: B023 (called here)
        assert f"`use_dora` is {written} in the file and {not written} in the model" in said


@pytest.mark.parametrize("what", ["missing", "of another shape", "where none belongs"])
def test_files_whose_magnitudes_are_wrong(tmp_path, what):
    base = Net()
    by_peft(base, tmp_path / "a", **SETTINGS, target_modules=["block.o"])
    config, tensors = peft_files(tmp_path / "a")
    (key,) = [name for name in tensors if "magnitude" in name]
    if what == "missing":
        del tensors[key]
    elif what == "of another shape":
        tensors[key] = torch.ones(4)
    else:
        config["use_dora"] = False
    safetensors.torch.save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    model = copy.deepcopy(base)
    refused(lambda: lora.load_adapter(model, tmp_path / "a"), "block.o")
    assert torch.equal(model.eval()(IDS), base.eval()(IDS))
