"""What trains and what is saved of it; LoRA switched off for a while, and taken out again."""

import copy

import pytest
import torch
import torch.nn as nn
from pairwise import every_two
from toy_model import IDS, Model, snapshot

import lora

BIASES = ["none", "all", "lora_only"]
QV = ["q_proj", "v_proj"]


class Traps(nn.Module):
    """All that a search for substrings takes for LoRA or for a bias."""

    def __init__(self):
        super().__init__()
        self.lora_encoder = nn.Linear(4, 4)
        self.relative_attention_bias = nn.Embedding(4, 4)
        self.bias_net = nn.Linear(4, 4, bias=False)
        self.mask = nn.Module()
        self.mask.register_buffer("bias", torch.ones(4))
        self.mask.register_parameter("debiased", nn.Parameter(torch.ones(4)))
        self.layer = lora.Linear(4, 4, r=2)
        self.plain = lora.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.rnn = nn.LSTM(4, 4)


ADAPTER = {"layer.lora_A", "layer.lora_B"}
ALL_BIASES = {
    "lora_encoder.bias", "layer.bias", "plain.bias", "attention.in_proj_bias", "attention.bias_k", "attention.bias_v",
    "attention.out_proj.bias", "rnn.bias_ih_l0", "rnn.bias_hh_l0",
}  # fmt: skip
EXPECTED = {"none": ADAPTER, "lora_only": ADAPTER | {"layer.bias"}, "all": ADAPTER | ALL_BIASES}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def trained(**fields):
    """A model after training: its function, and the function that it had before."""
    model = Model()
    before = copy.deepcopy(model)
    lora.inject(model, **{"target_modules": QV, "r": 2, **fields})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))
    return model, before


# ---- marks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [True, False], ids=["from trainable", "from frozen"])
@pytest.mark.parametrize("bias", BIASES)
def test_what_trains_goes_by_module_and_not_by_substring(bias, start):
    model = Traps().requires_grad_(start)
    lora.mark_only_lora_as_trainable(model, bias)
    assert trainable(model) == EXPECTED[bias]


@pytest.mark.parametrize("bias", BIASES)
def test_what_trains_is_what_is_saved(bias):
    model = Traps()
    lora.mark_only_lora_as_trainable(model, bias)
    state = lora.lora_state_dict(model, bias)
    assert set(state) == trainable(model)
    assert all(value.data_ptr() == model.state_dict()[name].data_ptr() for name, value in state.items())


@pytest.mark.parametrize("bias", ["lora", "", None, "None", True, "ALL", ["none"]], ids=repr)
@pytest.mark.parametrize("function", [lora.mark_only_lora_as_trainable, lora.lora_state_dict])
def test_a_bad_bias_raises_before_anything_changes(function, bias):
    model = Traps()
    before = snapshot(model)
    with pytest.raises(ValueError, match="`bias` must be one of 'none', 'all', 'lora_only', got "):
        function(model, bias)
    assert snapshot(model) == before


@pytest.mark.parametrize("bias", BIASES)
def test_modules_to_save_train_and_are_saved_buffers_included(bias):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "c": nn.Linear(4, 4)})
    lora.inject(model, target_modules=["a"], modules_to_save=["norm"], bias=bias)
    biases = {"none": set(), "lora_only": {"a.bias"}, "all": {"a.bias", "c.bias"}}[bias]
    assert trainable(model) == {"a.lora_A", "a.lora_B", "norm.weight", "norm.bias"} | biases
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert set(lora.lora_state_dict(model, bias)) == trainable(model) | buffers
    lora.mark_only_lora_as_trainable(model.requires_grad_(False), bias)
    assert trainable(model) == {"a.lora_A", "a.lora_B", "norm.weight", "norm.bias"} | biases


class WithExtraState(nn.Linear):
    """Its state dict has an entry that is no tensor."""

    def get_extra_state(self):
        return None


def test_a_bias_that_is_none_is_no_entry_of_a_state_dict_that_is_none():
    norm, other = nn.BatchNorm1d(4, track_running_stats=False), WithExtraState(4, 4)
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "norm": norm, "other": other})
    lora.inject(model, target_modules=["a"], modules_to_save=["norm"], bias="all")
    assert set(lora.lora_state_dict(model, "all")) == trainable(model)


def test_a_shared_layer_is_saved_under_both_names():
    layer = lora.Linear(4, 4, r=2)
    state = lora.lora_state_dict(nn.ModuleDict({"x": layer, "y": layer}))
    assert set(state) == {"x.lora_A", "x.lora_B", "y.lora_A", "y.lora_B"}


def test_the_root_layer_itself_is_marked_and_saved():
    layer = lora.Linear(4, 4, r=2)
    lora.mark_only_lora_as_trainable(layer, "lora_only")
    assert trainable(layer) == set(lora.lora_state_dict(layer, "lora_only")) == {"lora_A", "lora_B", "bias"}


def test_the_recipe_of_loralib_works(tmp_path):
    model, before = trained(bias="all", modules_to_save=["head"])
    torch.save(lora.lora_state_dict(model, bias="all"), tmp_path / "ckpt_lora.pt")
    lora.inject(before, target_modules=QV, r=2)
    missing, unexpected = before.load_state_dict(torch.load(tmp_path / "ckpt_lora.pt"), strict=False)
    assert not unexpected
    assert not any("lora_" in name for name in missing)
    assert torch.equal(before(IDS), model(IDS))


# ---- disabled --------------------------------------------------------------------------------------------------

TRAINED = {
    "adapters": {},
    "rank pattern": {"rank_pattern": {"q_proj": 1}},
    "biases": {"bias": "all"},
    "modules": {"modules_to_save": ["head", "norm"]},
    "everything": {"bias": "all", "modules_to_save": ["head", "embed"]},
}


@every_two(fields=TRAINED, merge_weights=[False, True], training=[True, False])
def test_disabled_is_the_base_model_and_then_all_is_back(fields, merge_weights, training):
    model, before = trained(**fields, merge_weights=merge_weights)
    model.train(training)
    with torch.no_grad():
        expected, marks = model(IDS), snapshot(model)
        with lora.disabled(model):
            assert torch.equal(model(IDS), before(IDS))
        after = snapshot(model)
        assert torch.equal(model(IDS), expected)
    ours = {"disabled", "_merged"}
    for name, (cls, keys, *rest) in marks.items():
        assert after[name][0] is cls
        assert set(after[name][1]) - ours == set(keys) - ours
        assert list(after[name][2:]) == rest


def test_disabled_nests():
    model, before = trained(bias="all", modules_to_save=["head"])
    expected, base = model(IDS), before(IDS)
    with lora.disabled(model):
        with lora.disabled(model):
            assert torch.equal(model(IDS), base)
        assert torch.equal(model(IDS), base)
    assert torch.equal(model(IDS), expected)


def test_disabled_ends_with_an_exception():
    model, _ = trained(bias="all", modules_to_save=["head"])
    expected, marks = model(IDS), model.state_dict(keep_vars=True)
    with pytest.raises(KeyboardInterrupt), lora.disabled(model):
        raise KeyboardInterrupt
    assert torch.equal(model(IDS), expected)
    assert all(value is marks[name] for name, value in model.state_dict(keep_vars=True).items())


def test_two_that_overlap_end_in_any_order():
    model, before = trained(bias="all", modules_to_save=["head"])
    expected = model(IDS)

    def base_outputs():
        with lora.disabled(model):
            while True:
                yield model(IDS)

    first, second = base_outputs(), base_outputs()
    assert torch.equal(next(first), before(IDS))
    assert torch.equal(next(second), before(IDS))
    first.close()
    assert torch.equal(next(second), before(IDS))
    second.close()
    assert torch.equal(model(IDS), expected)


def test_a_part_of_a_model_can_be_disabled():
    model, before = trained()
    with lora.disabled(model.layers[0]):
        off, on = (layer.attn["q_proj"](torch.ones(8)) for layer in model.layers)
    assert torch.equal(off, before.layers[0].attn["q_proj"](torch.ones(8)))
    assert not torch.equal(on, before.layers[1].attn["q_proj"](torch.ones(8)))


def test_buffers_are_the_bases_and_do_not_move():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    lora.inject(model, target_modules=["0"], modules_to_save=["1"])
    model(torch.randn(8, 4))
    mean = model[1].running_mean.clone()
    with lora.disabled(model):
        assert not model[1].running_mean.any()
        model(torch.randn(8, 4))
    assert torch.equal(model[1].running_mean, mean)
    with lora.disabled(model):
        assert not model[1].running_mean.any()


@pytest.mark.parametrize("fields", TRAINED.values(), ids=TRAINED)
def test_a_reference_pass_between_forward_and_backward_changes_no_gradient(fields):
    model, before = trained(**fields)
    twin = copy.deepcopy(model)
    policy = model(IDS)
    with torch.no_grad(), lora.disabled(model):
        reference = model(IDS)
    (policy - reference).square().mean().backward()
    (twin(IDS) - before(IDS).detach()).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


def test_a_model_without_lora_cannot_be_disabled():
    with pytest.raises(ValueError, match="disabled: there is no LoRA layer in this Model"), lora.disabled(Model()):
        pass


# ---- eject -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fields", TRAINED.values(), ids=TRAINED)
def test_ejecting_gives_the_base_model_back(fields, training):
    model, before = trained(**fields)
    model.train(training)(IDS), before.train(training)
    parameters = dict(model.named_parameters())
    lora.eject(model)
    assert torch.equal(model(IDS), before(IDS))
    ours, base = snapshot(model), snapshot(before)
    assert {name: entry[:3] for name, entry in ours.items()} == {name: entry[:3] for name, entry in base.items()}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.state_dict().items())
    assert set(model.state_dict()) == set(before.state_dict())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_an_ejected_model_can_be_adapted_again():
    model, _ = trained(bias="all")
    lora.eject(model)
    base = model(IDS)
    lora.inject(model, target_modules=["up_proj"])
    assert torch.equal(model(IDS), base)
    assert not any("q_proj.lora" in name for name, _ in model.named_parameters())


INSIDE = {
    "eject": lora.eject,
    "merge": lora.merge,
    "merged_state_dict": lora.merged_state_dict,
    "inject": lambda model: lora.inject(model, target_modules=["up_proj"]),
    "save_adapter": lambda model: lora.save_adapter(model, "never written"),
    "load_adapter": lambda model: lora.load_adapter(model, "never read"),
}


@pytest.mark.parametrize("function", INSIDE.values(), ids=INSIDE)
def test_a_disabled_model_is_not_changed_or_saved(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = trained(bias="all", modules_to_save=["head"])
    with lora.disabled(model):
        before = snapshot(model)
        with pytest.raises(ValueError, match="disabled"):
            function(model)
        assert snapshot(model) == before


def test_two_transposed_layers_with_one_weight_are_ejected():
    model = nn.Sequential(*(lora.Linear(4, 4, r=2, fan_in_fan_out=True) for _ in range(2)))
    model[1].weight, x = model[0].weight, torch.randn(3, 4)
    before = model(x)
    lora.eject(model)
    torch.testing.assert_close(model(x), before)
