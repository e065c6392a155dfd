"""Adapters that start as a part of the base weight: what the model computes, gives back, saves and loads."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora
from lora.models import start

torch.manual_seed(0)

X = torch.randn(5, 12)


class Net(nn.Module):
    """One layer of each kind that has blocks."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(9, 12)
        self.qkv = nn.Linear(12, 20)
        self.conv = nn.Conv1d(20, 8, 3, groups=2, padding=1)
        self.head = nn.Linear(8, 6, bias=False)

    def forward(self, ids):
        h = self.qkv(self.tokens(ids))
        return self.head(self.conv(h.mT).mT)


IDS = torch.randint(0, 9, (3, 7))
SETTINGS = {
    "target_modules": ["tokens", "qkv", "conv", "head"],
    "r": 2,
    "lora_alpha": 6,
    "splits": {"qkv": (12, 4, 4)},
    "enable_lora": {"qkv": (True, False, True)},
}
WAYS = ["pissa", "pissa_niter_8", "olora"]


def moved(model):
    """The same after some training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pair(how, **more):
    """The pretrained model, and a copy that has learnt something since it started in this way."""
    torch.manual_seed(0)
    base = Net()
    model = copy.deepcopy(base)
    lora.inject(model, **SETTINGS, init_lora_weights=how, **more)
    return base, model


def close(a, b):
    return torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_the_model_starts_as_it_was_and_its_weights_do_not(how, use_dora):
    base, model = pair(how, use_dora=use_dora)
    close(model(IDS), base(IDS))
    for name in SETTINGS["target_modules"]:
        layer = model.get_submodule(name)
        changed = (layer.weight - base.get_submodule(name).weight).norm()
        assert changed > 0.1 * base.get_submodule(name).weight.norm(), name
        assert layer.lora_A.any(), name
        assert layer.lora_B.any(), name


@pytest.mark.parametrize("how", WAYS)
def test_the_split_without_lora_keeps_its_weight(how):
    base, model = pair(how)
    assert torch.equal(model.qkv.weight[12:16], base.qkv.weight[12:16])


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_disabled_and_eject_give_the_pretrained_model(how, use_dora):
    base, model = pair(how, use_dora=use_dora)
    moved(model)
    assert (model(IDS) - base(IDS)).abs().max() > 1e-2
    with lora.disabled(model):
        close(model(IDS), base(IDS))
    lora.eject(model)
    close(model(IDS), base(IDS))
    for name, value in base.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert not any("lora" in name for module in model.modules() for name in vars(module))


@pytest.mark.parametrize("format", ["lora", "peft", "portable"])
@pytest.mark.parametrize("how", WAYS)
def test_a_plain_base_loads_what_was_learnt(how, format, tmp_path):
    base, model = pair(how)
    moved(model)
    lora.save_adapter(model, tmp_path / "adapter", format=format)
    lora.load_adapter(base, tmp_path / "adapter")
    close(base(IDS), model(IDS))


def test_it_has_twice_the_rank_and_the_scaling(tmp_path):
    _, model = pair("pissa")
    adapter = lora.adapter_of(moved(model))
    for name, settings in adapter.modules.items():
        assert (settings["r"], settings["lora_alpha"], settings["scaling"]) == (4, 12, 3), name
    assert adapter.tensors["qkv.lora_A"].shape == (8, 12)
    assert adapter.tensors["conv.lora_B"].shape == (8, 2, 1)


def test_with_dora_a_plain_base_loads_it_too(tmp_path):
    base, model = pair("pissa", use_dora=True)
    moved(model)
    lora.save_adapter(model, tmp_path / "adapter")
    lora.load_adapter(base, tmp_path / "adapter")
    close(base(IDS), model(IDS))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_model_that_started_alike_loads_it_at_its_own_rank(how, use_dora, tmp_path):
    _, model = pair(how, use_dora=use_dora)
    _, again = pair(how, use_dora=use_dora)
    moved(model)
    lora.save_adapter(model, tmp_path / "adapter")
    lora.load_adapter(again, tmp_path / "adapter")
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    assert again.qkv.r == 2


def test_after_the_scaling_has_changed_as_well(tmp_path):
    base, model = pair("pissa")
    moved(model)
    model.qkv.scaling = 0.7
    lora.save_adapter(model, tmp_path / "adapter")
    _, again = pair("pissa")
    lora.load_adapter(again, tmp_path / "adapter")
    close(again(IDS), model(IDS))
    lora.load_adapter(base, tmp_path / "adapter")
    close(base(IDS), model(IDS))


def test_another_start_is_refused_and_nothing_changes(tmp_path):
    _, model = pair("pissa")
    lora.save_adapter(moved(model), tmp_path / "adapter")
    _, other = pair("olora")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(lora.AdapterError) as error:
        lora.load_adapter(other, tmp_path / "adapter")
    for name in SETTINGS["target_modules"]:
        assert f"{name}: its adapter in the file started from another part of the base weight" in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_an_adapter_of_the_same_rank_is_not_taken_for_one_that_started_so(tmp_path):
    _, plain = pair(True)
    lora.save_adapter(moved(plain), tmp_path / "adapter")
    _, model = pair("pissa")
    with pytest.raises(lora.AdapterError, match=r"qkv: .* `r` must be 4, got 2"):
        lora.load_adapter(model, tmp_path / "adapter")
    lora.save_adapter(moved(pair("pissa")[1]), tmp_path / "peft", format="peft")
    with pytest.raises(lora.AdapterError, match="'peft' does not know; load it into the plain base model"):
        lora.load_adapter(model, tmp_path / "peft")


def test_copies_and_pickles_remember_their_start():
    base, model = pair("pissa")
    moved(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(twin(IDS), model(IDS))
        lora.eject(twin)
        close(twin(IDS), base(IDS))


@pytest.mark.parametrize("how", WAYS)
def test_merging_keeps_the_outputs(how):
    _, model = pair(how, use_dora=True)
    expected = moved(model)(IDS)
    lora.merge(model)
    close(model(IDS), expected)


def test_initialising_again_begins_from_the_pretrained_weight():
    base, model = pair("pissa")
    moved(model)
    for how in ("olora", "pissa", "gaussian", True):
        lora.initialize(model, how)
        close(model(IDS), base(IDS))
    assert model.qkv.lora_start is None
    torch.testing.assert_close(model.qkv.weight, base.qkv.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("initialized", [False, True], ids=["injected", "initialized"])
@pytest.mark.parametrize("r", [1, 3])
def test_each_way_is_the_one_that_is_asked_for(r, initialized):
    """PiSSA shares the singular values between A and B; OLoRA's B has orthonormal columns."""
    for how in ("pissa", "olora"):
        model = nn.Sequential(nn.Linear(12, 8, dtype=torch.float64))
        lora.inject(model, target_modules=["0"], r=r, init_lora_weights=True if initialized else how)
        if initialized:
            lora.initialize(model, how)
        A, B = model[0].lora_A, model[0].lora_B
        torch.testing.assert_close(B.T @ B, A @ A.T if how == "pissa" else torch.eye(r, dtype=torch.float64))


def test_a_constructor_has_no_pretrained_weight_to_start_from():
    for how in ("pissa", "olora", "pissa_niter_2", "loftq"):
        with pytest.raises(ValueError, match=r"needs the pretrained weight: load it, then call `lora.initialize`"):
            lora.Linear(4, 4, r=2, init_lora_weights=how)
    with pytest.raises(ValueError, match=r"`init_lora_weights` must be .* got 'pisa' \(did you mean 'pissa'\?\)"):
        lora.Linear(4, 4, r=2, init_lora_weights="pisa")


def test_all_that_cannot_start_so_is_listed_and_nothing_changes():
    model = Net()
    model.twin = nn.Linear(8, 6, bias=False)
    model.twin.weight = model.head.weight
    with torch.no_grad():
        model.conv.weight[0, 0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="nothing was changed") as error:
        lora.inject(model, **SETTINGS | {"r": 8}, init_lora_weights="pissa")
    for line in (
        "head: its weight is tied to that of twin, which would change too.",
        "conv: its weight holds NaN or infinity.",
        "qkv: r must be at most 4, the rank of a matrix of 4 × 12; `r` is 8.",
        "head: r must be at most 6, the rank of a matrix of 6 × 8; `r` is 8.",
    ):
        assert f"\n  - {line}" in str(error.value)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(before[n], v) or v.isnan().any() for n, v in model.state_dict().items())


def test_an_odd_rank_is_no_orthogonal_start():
    with pytest.raises(ValueError, match="head: `r` must be even"):
        lora.inject(Net(), target_modules=["head"], r=3, init_lora_weights="orthogonal")


def test_a_function_that_fails_leaves_the_model_as_it_was():
    model, called = Net(), []
    before = copy.deepcopy(model.state_dict())

    def fails(layer):
        called.append(layer)
        if len(called) == 2:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lora.inject(model, **SETTINGS, init_lora_weights=fails)
    assert not any(isinstance(module, lora.LoRALayer) for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_function_of_a_layer_starts_it():
    model = Net()
    lora.inject(model, target_modules=["head"], r=2, init_lora_weights=lambda layer: layer.lora_A.fill_(2))
    assert (model.head.lora_A == 2).all()
    assert not model.head.lora_B.any()


def test_what_waits_for_data_does_not_train_without():
    model = Net()
    lora.inject(model, target_modules=["qkv", "head"], r=2, init_lora_weights="eva")
    with pytest.raises(RuntimeError, match=r"`init_lora_weights='eva'` needs data: call `lora.calibrate"):
        model(IDS)
    model.eval()(IDS)


def test_an_adapter_that_is_loaded_waits_no_more_and_half_an_adapter_does():
    layer, x = lora.Linear(12, 6, r=2, init_lora_weights="eva"), torch.ones(12)
    adapter = dict(lora.Linear(12, 6, r=2).lora_parameters())
    layer.load_state_dict({"lora_A": adapter["lora_A"]}, strict=False)
    with pytest.raises(RuntimeError, match="needs data"):
        layer(x)
    layer.load_state_dict(adapter, strict=False)
    layer(x)


def test_loftq_needs_the_weights_from_before():
    with pytest.raises(ValueError, match=r"needs the weights as they were before they were quantised: `lora.loftq"):
        lora.inject(Net(), target_modules=["qkv"], r=2, init_lora_weights="loftq")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_other_dtypes_the_start_is_exact_to_their_rounding(dtype):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 24, dtype=dtype))
    model = copy.deepcopy(base)
    lora.inject(model, target_modules=["0"], r=4, init_lora_weights="pissa")
    x = torch.randn(6, 32, dtype=dtype)
    error = (model(x) - base(x)).double().norm() / base(x).double().norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_pretrained_weights_are_not_loaded_under_an_adapter_that_was_taken_out_of_them():
    base, model = pair("pissa")
    with pytest.raises(RuntimeError, match=r"qkv.weight is not what the adapter's start was taken out of"):
        model.load_state_dict(base.state_dict(), strict=False)
    _, model = pair("pissa")
    _, again = pair("pissa")
    again.load_state_dict(moved(model).state_dict())
    close(again(IDS), model(IDS))


def test_what_does_not_fit_its_start_leaves_the_layer_as_it_is():
    base, model = pair("pissa")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="taken out of"):
        model.load_state_dict(base.state_dict(), strict=False)
    for name in ("qkv.weight", "qkv.lora_A", "head.weight"):
        assert torch.equal(model.state_dict()[name], before[name]), name


@pytest.mark.parametrize("first", ["pissa", "gaussian"])
def test_a_start_that_fails_midway_leaves_the_old_one(first):
    _, model = pair(first)
    moved(model)
    expected, started = model(IDS), [module.lora_start for module in model.children()]
    parameters = [id(parameter) for parameter in model.parameters()]
    seen = []

    def fails(layer):
        layer.lora_A.fill_(1)
        seen.append(layer)
        if len(seen) == 3:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lora.initialize(model, fails)
    close(model(IDS), expected)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert all(module.lora_start is start for module, start in zip(model.children(), started, strict=True))


def test_an_adapter_that_is_loaded_waits_for_nothing(tmp_path):
    _, trained = pair(True)
    lora.save_adapter(moved(trained), tmp_path / "adapter")
    for load in (
        lambda m: lora.load_adapter(m, tmp_path / "adapter"),
        lambda m: m.load_state_dict(trained.state_dict()),
    ):
        _, model = pair("eva")
        load(model)
        close(model.train()(IDS), trained(IDS))


def test_a_scaling_of_zero_is_saved_as_the_loss_of_the_start(tmp_path):
    base, model = pair("pissa")
    moved(model)
    for layer in model.children():
        layer.scaling = 0.0
    lora.save_adapter(model, tmp_path / "adapter")
    lora.load_adapter(base, tmp_path / "adapter")
    close(base(IDS), model(IDS))


def test_trained_magnitudes_survive_the_loading_of_the_base():
    base, model = pair(True, use_dora=True)
    moved(model)
    expected = model(IDS)
    model.load_state_dict(base.state_dict(), strict=False)
    close(model(IDS), expected)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_start_that_finds_no_memory_for_what_is_left_gives_back_nothing_that_was_not_taken(how, monkeypatch):
    def pretrained_weight(layer, sign=1):
        if sign < 0:
            raise MemoryError
        return whole(layer, sign)

    whole = start.pretrained_weight
    model = nn.Sequential(lora.Linear(6, 4, r=2), lora.Linear(4, 4, r=2))
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(start, "pretrained_weight", pretrained_weight)
    with pytest.raises(MemoryError):
        lora.initialize(model, how)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(layer.lora_start is None for layer in model)
