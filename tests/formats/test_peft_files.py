"""Adapters that PEFT wrote: we load them and compute the same, or refuse them with the reason."""

import copy
import json

import peft
import pytest
import safetensors.torch
import torch
import transformers
from peft_models import (
    MERGEABLE,
    PREFIX,
    QUIET,
    Net,
    adapted,
    by_peft,
    gpt2,
    same,
    theirs,
    train,
)
from torch import nn
from toy_model import snapshot

import lora

pytestmark = QUIET


THEIRS = {
    "everything": {"target_modules": MERGEABLE},
    "rslora": {"target_modules": MERGEABLE, "use_rslora": True},
    "ranks and alphas": {
        "target_modules": MERGEABLE,
        "rank_pattern": {"o": 3, "^conv2": 8},
        "alpha_pattern": {"emb|conv[12]": 1, r"block\.o": 2},
    },
    "grouped patterns": {
        "target_modules": MERGEABLE,
        "rank_pattern": {r"(?:block\.)+o": 3, r"^(?!.*emb|o).*": 8},
        "alpha_pattern": {r"(block\.)?o": 1, r"(?P<which>qkv|conv2)": 2},
    },
    "an expression": {"target_modules": r"block\..|qkv"},
    "all linear": {"target_modules": "all-linear"},
    "biases of the layers": {"target_modules": MERGEABLE, "bias": "lora_only"},
    "all biases": {"target_modules": MERGEABLE, "bias": "all"},
    "modules in full": {"target_modules": MERGEABLE, "modules_to_save": ["head", "norm"]},
    "gaussian": {"target_modules": ["qkv"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["qkv"], "init_lora_weights": "orthogonal"},
    "with dropout": {"target_modules": ["qkv"], "lora_dropout": 0.5},
}


@pytest.mark.parametrize("fields", THEIRS.values(), ids=THEIRS)
def test_we_compute_what_peft_does(tmp_path, fields):
    base = Net()
    model = by_peft(base, tmp_path / "a", **{"r": 4, "lora_alpha": 7} | fields)
    plain = copy.deepcopy(base)
    lora.load_adapter(plain, tmp_path / "a")
    same(plain.eval(), model, base)
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(wanted)
    lora.save_adapter(plain, tmp_path / "b", format="peft")
    same(theirs(base, tmp_path / "b"), model, base)
    again = safetensors.torch.load_file(tmp_path / "b" / "adapter_model.safetensors")
    before = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_merged_layer_takes_pefts_pair_exactly(tmp_path, use_rslora):
    base = Net()
    fields = {"r": 4, "lora_alpha": 7, "target_modules": ["qkv", "emb", "conv2"], "use_rslora": use_rslora}
    model = by_peft(base, tmp_path / "a", **fields)
    ours = adapted(base, target_modules=["qkv", "emb", "conv2"], enable_lora={}, use_rslora=not use_rslora)
    lora.load_adapter(ours, tmp_path / "a")
    same(ours, model, base)
    tensors = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    A, B = (tensors[f"{PREFIX}qkv.lora_{part}.weight"] for part in "AB")
    assert torch.equal(ours.qkv.lora_A, A.repeat(3, 1))
    assert torch.equal(ours.qkv.lora_B, B)
    masked = adapted(base, target_modules=["qkv", "emb", "conv2"])
    before = snapshot(masked)
    with pytest.raises(lora.AdapterError, match="qkv: has an update in the file that the model's splits cannot hold"):
        lora.load_adapter(masked, tmp_path / "a")
    assert snapshot(masked) == before


def test_an_embeddings_base_weight_that_peft_saves_is_compared_and_not_written_again(tmp_path):
    base = Net()
    model = train(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["emb", "o"])))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    tensors = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    tensors[f"{PREFIX}emb.base_layer.weight"] = base.emb.weight.detach().clone()
    safetensors.torch.save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    plain, other = copy.deepcopy(base), copy.deepcopy(base)
    version = plain.emb.weight._version
    lora.load_adapter(plain, tmp_path / "a")
    same(plain.eval(), model, base)
    assert plain.emb.weight._version == version
    nn.init.normal_(other.emb.weight)
    before = snapshot(other)
    with pytest.raises(lora.AdapterError, match=r"emb\.weight: only 0 of its \d+ rows are those of the file"):
        lora.load_adapter(other, tmp_path / "a")
    assert snapshot(other) == before
    lora.load_adapter(other, tmp_path / "a", check_base=False)
    assert torch.equal(other.emb.weight, base.emb.weight)  # as PEFT loads it


@pytest.mark.parametrize("embeddings", [False, True])
def test_pefts_gpt2_whose_embeddings_are_saved_as_well(tmp_path, embeddings):
    base = gpt2()
    targets = ["wte", "c_attn", "c_proj", *(["lm_head"] if embeddings else [])]
    model = train(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=targets)))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=embeddings)
    keys = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert (f"{PREFIX}transformer.wte.base_layer.weight" in keys) == embeddings
    plain = copy.deepcopy(base)
    lora.load_adapter(plain, tmp_path / "a")
    same(plain.eval(), model, base)


MORE = [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor")
@pytest.mark.parametrize("fields", MORE, ids=str)
def test_more_than_lora_is_refused(tmp_path, fields):
    base = Net()
    by_peft(base, tmp_path / "a", r=2, target_modules=["qkv"], **fields)
    before = snapshot(base)
    with pytest.raises(lora.AdapterError, match="`init_lora_weights` is "):
        lora.load_adapter(base, tmp_path / "a")
    assert snapshot(base) == before


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pissa_that_peft_converted_is_a_plain_lora(tmp_path):
    base = Net()
    config = peft.LoraConfig(r=2, target_modules=["o"], init_lora_weights="pissa")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's example does
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    train(model, 1)
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    plain = copy.deepcopy(base)
    lora.load_adapter(plain, tmp_path / "a")
    same(plain.eval(), model, base)


def test_a_convolution_whose_groups_peft_mixes_is_refused(tmp_path):
    base = Net()
    by_peft(base, tmp_path / "a", r=4, target_modules=["conv1", "conv3", "o"])
    before = snapshot(base)
    with pytest.raises(lora.AdapterError) as caught:
        lora.load_adapter(base, tmp_path / "a")
    assert "conv1: its update mixes the 2 groups" in str(caught.value)
    assert "conv3: its update mixes the 4 groups" in str(caught.value)
    assert snapshot(base) == before


OTHERS = {
    "IA3": lambda: peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["qkv"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=["qkv"], total_step=10),
    "VeRA": lambda: peft.VeraConfig(target_modules=["qkv"]),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_methods_are_refused(tmp_path, make):
    base = Net()
    peft.get_peft_model(copy.deepcopy(base), make()).save_pretrained(tmp_path / "a")
    with pytest.raises(lora.AdapterError, match="`peft_type` must be 'LORA', got "):
        lora.load_adapter(base, tmp_path / "a")


def test_a_target_parameter_may_be_the_weight_of_a_layer(tmp_path):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(4, 4))
            self.o = nn.Linear(4, 4)

        def forward(self, x):
            return self.o(x) @ self.experts

    base = Experts()
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["o.weight"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        [parameter.normal_() for name, parameter in model.named_parameters() if "lora_" in name]
    model.save_pretrained(tmp_path / "a")
    lora.load_adapter(base, tmp_path / "a")
    assert isinstance(base.o, lora.LoRALayer)
    x = torch.randn(3, 4)
    torch.testing.assert_close(base(x), model(x))


NAMED = {"default": "default", "another": "mine", "like a key": "weight_1"}


@pytest.mark.parametrize("name", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_raw_state_dict_of_pefts_has_the_adapters_name(tmp_path, name, use_dora):
    base = Net()
    fields = {"r": 2, "target_modules": ["o", "qkv"] if use_dora else ["emb", "o"], "modules_to_save": ["head"]}
    config = peft.LoraConfig(**fields, use_dora=use_dora)
    model = train(peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    folder = tmp_path if name == "default" else tmp_path / name
    for path in {folder, tmp_path}:  # PEFT saves all but "default" in a folder of its own
        plain = copy.deepcopy(base)
        lora.load_adapter(plain, path)
        same(plain.eval(), model, base)
    state = model.state_dict()
    raw = {key: tensor.clone() for key, tensor in state.items() if "lora_" in key or "modules_to_save" in key}
    assert f"{PREFIX}o.lora_A.{name}.weight" in raw
    assert f"{PREFIX}head.modules_to_save.{name}.weight" in raw
    safetensors.torch.save_file(raw, folder / "adapter_model.safetensors")
    plain = copy.deepcopy(base)
    lora.load_adapter(plain, folder)
    same(plain.eval(), model, base)


def test_of_several_adapters_one_must_be_named(tmp_path):
    base = Net()
    config = peft.LoraConfig(r=2, target_modules=["o"])
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="one")
    model.add_adapter("two", config)
    train(model).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"one in each of its folders one, two: name the one that is meant, as"):
        lora.load_adapter(base, tmp_path)
    raw = {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" in key}
    raw |= {key.replace(".one.", "."): tensor.clone() for key, tensor in raw.items() if ".one." in key}
    safetensors.torch.save_file(raw, tmp_path / "one" / "adapter_model.safetensors")
    with pytest.raises(lora.AdapterError, match=r"it holds several adapters \(one without a name, one, two\)"):
        lora.load_adapter(base, tmp_path / "one")


def test_what_is_null_in_a_configuration_is_as_it_is_by_default(tmp_path):
    base = Net()
    model = by_peft(base, tmp_path / "a", r=2, target_modules=["o"], bias="none")
    path = tmp_path / "a" / "adapter_config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    nulls = dict.fromkeys(said.keys() - {"peft_type", "r", "lora_alpha"})
    path.write_text(json.dumps(said | nulls), encoding="utf-8")
    plain = copy.deepcopy(base)
    lora.load_adapter(plain, tmp_path / "a")
    same(plain.eval(), model, base)
    for name in ("r", "lora_alpha"):  # nobody could guess these
        path.write_text(json.dumps(said | {name: None}), encoding="utf-8")
        with pytest.raises(lora.AdapterError, match=f"`{name}` must be"):
            lora.read_adapter(tmp_path / "a")


def test_pefts_torch_files(tmp_path):
    base = Net()
    model = by_peft(
        base, tmp_path / "a", r=2, target_modules=["emb", "o", "conv2"], bias="all", modules_to_save=["head"]
    )
    tensors = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "a" / "adapter_model.bin")
    for name in ("", "adapter_model.bin"):
        plain = copy.deepcopy(base)
        lora.load_adapter(plain, tmp_path / "a" / name)
        same(plain.eval(), model, base)


def test_the_name_of_the_base_model_goes_both_ways(tmp_path):
    gpt2().save_pretrained(tmp_path / "gpt2")
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    model = copy.deepcopy(base)
    lora.inject(model, target_modules=["c_attn"], r=2)
    lora.save_adapter(model, tmp_path / "a", format="peft")
    assert peft.PeftConfig.from_pretrained(tmp_path / "a").base_model_name_or_path == str(tmp_path / "gpt2")
    assert lora.read_adapter(tmp_path / "a").base_model == str(tmp_path / "gpt2")
    by_peft(base, tmp_path / "b", r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    assert lora.read_adapter(tmp_path / "b").base_model == str(tmp_path / "gpt2")
