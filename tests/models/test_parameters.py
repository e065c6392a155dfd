"""LoRA on parameters that a module keeps for itself: `target_parameters`."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from releases import since

import lora
from lora.layers.parts import Part, parts_of


class Gate(nn.Module):
    """Two matrices of its own, one of them read by a method that its parent calls, and a bias."""

    def __init__(self, inputs=6, hidden=5, outputs=4):
        super().__init__()
        self.up = nn.Parameter(torch.randn(hidden, inputs))
        self.down = nn.Parameter(torch.randn(outputs, hidden))
        self.down_bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return self.lower(F.linear(x, self.up).relu())

    def lower(self, h):
        return F.linear(h, self.down, self.down_bias)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.gate = Gate()

    def forward(self, x):
        return self.gate(self.proj(x))


class Reader(nn.Module):
    """A parent that computes with its child's parameters, and does not call it."""

    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def forward(self, x):
        return F.linear(F.linear(x, self.gate.up).relu(), self.gate.down, self.gate.down_bias)


class Caller(nn.Module):
    """A parent that calls a method of its child, and not the child."""

    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def forward(self, x):
        return self.gate.lower(F.linear(x, self.gate.up).relu())


def injected(cls=Model, seed=0, **settings):
    torch.manual_seed(seed)
    model = cls()
    lora.inject(model, **{"target_parameters": ["gate.up", "gate.down"], "r": 2, "lora_alpha": 6, **settings})
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return model


def dense(model, x, scaling=3.0):
    """The model's function in float64, by its state dict alone."""
    state = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}

    def weight(name):
        W, A, B = (state.get(f"{name}{end}") for end in ("", "_lora_A", "_lora_B"))
        W = W if A is None else W + scaling * B @ A
        m = state.get(f"{name}_lora_magnitude")
        return W if m is None else m[:, None] * W / W.norm(dim=1, keepdim=True)

    x = x.double()
    if "proj.weight" in state:
        x = x @ state["proj.weight"].T + state["proj.bias"]
    return (x @ weight("gate.up").T).relu() @ weight("gate.down").T + state["gate.down_bias"]


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cls", [Model, Reader, Caller])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"merge_weights": True}], ids=str)
def test_it_computes_with_w(cls, settings):
    model = injected(cls, **settings)
    if settings.get("use_dora"):
        for part in parts_of(model.gate).values():
            nn.init.uniform_(part.lora_magnitude, 0.5, 2)
    for mode in (True, False):
        model.train(mode)
        assert torch.allclose(model(X).double(), dense(model, X), atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(model(X).double(), dense(model, X), atol=1e-5)


@pytest.mark.parametrize("init", [True, "pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_it_starts_as_the_base(init, use_dora):
    torch.manual_seed(0)
    base = Model()
    model = copy.deepcopy(base)
    lora.inject(model, target_parameters=["up", "down"], r=2, init_lora_weights=init, use_dora=use_dora)
    assert torch.allclose(model(X), base(X), atol=1e-5)
    lora.eject(model)
    assert torch.allclose(model(X), base(X), atol=1e-5)
    assert type(model.gate) is Gate
    assert [*model.state_dict()] == [*base.state_dict()]


def test_keys_are_beside_the_parameter():
    model = injected(use_dora=True)
    own = {"up", "down", "down_bias"}
    added = {f"{name}_lora_{end}" for name in ("up", "down") for end in ("A", "B", "magnitude")}
    assert set(model.gate.state_dict()) == own | added
    assert not [*model.gate.children()]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"gate.{name}" for name in added}
    assert set(lora.lora_state_dict(model)) == {f"gate.{name}" for name in added}
    assert model.gate.up is model.state_dict(keep_vars=True)["gate.up"]
    assert isinstance(model.gate, Gate)


def test_gradients_are_those_of_the_dense_weight():
    model = injected().double()
    x = X.double().requires_grad_()
    got = torch.autograd.grad(model(x).square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)])
    y = dense_graph(model, x)
    expected = torch.autograd.grad(y.square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)])
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


def dense_graph(model, x):
    gate = model.gate
    up = gate.up + 3.0 * gate.up_lora_B @ gate.up_lora_A
    down = gate.down + 3.0 * gate.down_lora_B @ gate.down_lora_A
    return (model.proj(x) @ up.T).relu() @ down.T + gate.down_bias


def test_dropout_drops_inputs():
    model = injected(lora_dropout=0.5)
    torch.manual_seed(1)
    assert not torch.equal(model(X), model(X))
    model.eval()
    assert torch.equal(model(X), model(X))
    assert torch.allclose(model(X).double(), dense(model, X), atol=1e-5)


def test_it_prints_its_parts():
    assert "gate): Gate(\n    up: r=2, lora_alpha=6\n    down: r=2, lora_alpha=6\n  )" in str(injected())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_parts_of_their_own(how):
    model = injected()
    twin = how(model)
    assert torch.equal(twin(X), model(X))
    before = model(X).detach()
    with torch.no_grad():
        twin.gate.up_lora_B.zero_()
    assert torch.equal(model(X), before)
    assert not torch.equal(twin(X), before)
    assert all(part.lora_owner is twin.gate for part in parts_of(twin.gate).values())


def test_it_is_saved_and_loaded(tmp_path):
    model = injected(use_dora=True, rank_pattern={"gate.up": 3}, target_modules=["proj"])
    lora.save_adapter(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    fresh = Model()
    report = lora.load_adapter(fresh, tmp_path / "a.safetensors")
    assert [(row.names[0], row.kind, row.r) for row in report.modules] == [
        ("proj", "Linear", 2),
        ("gate.up", "Matrix", 3),
        ("gate.down", "Matrix", 2),
    ]
    assert torch.equal(fresh(X), model(X))
    with torch.no_grad():
        fresh.gate.up_lora_B.zero_()
    lora.load_adapter(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(X), model(X))


def test_another_base_is_refused(tmp_path):
    lora.save_adapter(injected(), tmp_path / "a.safetensors")
    torch.manual_seed(5)
    with pytest.raises(lora.AdapterError, match=r"gate\.up: the base weight is not the one that the adapter"):
        lora.load_adapter(Model(), tmp_path / "a.safetensors")


def test_a_file_for_a_parameter_needs_one(tmp_path):
    lora.save_adapter(injected(), tmp_path / "a.safetensors")
    model = nn.ModuleDict({"gate": nn.Linear(6, 6)})
    with pytest.raises(lora.AdapterError, match=r"gate\.up: there is no such module in the model\."):
        lora.load_adapter(model, tmp_path / "a.safetensors", check_base=False)


def test_the_delta_of_a_part_is_known_without_its_model():
    model = injected()
    delta = lora.adapter_of(model).delta("gate.up")
    assert torch.allclose(delta, 3.0 * model.gate.up_lora_B @ model.gate.up_lora_A)


def test_state_dicts_go_both_ways():
    model, other = injected(use_dora=True), injected(seed=1, use_dora=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    # A pretrained model's state has no magnitudes: those that did not train become its weights'.
    torch.manual_seed(3)
    base = Model()
    fresh = injected(seed=1, use_dora=True)
    with torch.no_grad():
        for part in parts_of(fresh.gate).values():
            part.lora_B.zero_()
            part.reset_magnitude()
    fresh.load_state_dict(base.state_dict(), strict=False)
    assert torch.allclose(fresh(X), base(X), atol=1e-5)


def test_a_start_is_not_given_another_base():
    model = injected(init_lora_weights="pissa")
    with pytest.raises(RuntimeError, match=r"gate\.up is not what the adapter's start was taken out of"):
        model.load_state_dict({"gate.up": torch.randn(5, 6)}, strict=False)


@pytest.mark.parametrize("use_dora", [False, True])
def test_it_is_merged(use_dora):
    model = injected(use_dora=use_dora)
    before, base = model(X), model.gate.up.clone()
    state = lora.merged_state_dict(model)
    assert set(state) == {"proj.weight", "proj.bias", "gate.up", "gate.down", "gate.down_bias"}
    assert torch.equal(model.gate.up, base)
    plain = Model()
    plain.load_state_dict(state)
    assert torch.allclose(plain(X), before, atol=1e-5)
    lora.merge(model)
    assert type(model.gate) is Gate
    assert torch.allclose(model(X), before, atol=1e-5)
    assert set(model.state_dict()) == set(state)


def test_it_is_disabled_for_the_caller():
    torch.manual_seed(0)
    base, model = Model(), injected()
    with lora.disabled(model):
        assert torch.equal(model(X), base(X))
    assert not torch.equal(model(X), base(X))


def test_biases_and_frozen_a():
    model = injected(bias="lora_only", freeze_A=True)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"gate.up_lora_B", "gate.down_lora_B", "gate.down_bias"}
    groups = {group["name"]: len(group["params"]) for group in lora.param_groups(model, 1e-3)}
    assert groups == {"lora_B": 2, "biases": 1}


def test_check_names_a_part_that_takes_no_part():
    class Half(Gate):
        def forward(self, x):
            return F.linear(x, self.up)

    model = nn.ModuleDict({"gate": Half()})
    lora.inject(model, target_parameters=["up", "down"], r=2)
    model["gate"](X).sum().backward()
    assert [*lora.check(model).idle] == ["gate.down"]


def test_casts_and_moves():
    model = injected(merge_weights=True).eval()
    with torch.no_grad():
        model(X)
    model.double()
    assert torch.allclose(model(X.double()), dense(model, X), atol=1e-9)
    model.to(torch.float8_e4m3fn)  # to be stored in it
    assert model.gate.up.dtype is torch.float8_e4m3fn
    assert model.gate.up_lora_A.dtype is torch.float64


def test_merged_weights_follow_what_they_are_made_of():
    model = injected(merge_weights=True).eval()
    with torch.no_grad():
        for change in ("lora_A", "lora_B", "weight"):
            model(X)
            getattr(parts_of(model.gate)["up"], change).add_(1)
            assert torch.allclose(model(X).double(), dense(model, X), atol=1e-4)


@since("2.11", "a compiler knows no attributes of a module by `vars`, and runs the layer uncompiled")
@pytest.mark.parametrize("cls", [Model, Reader, Caller])
def test_it_compiles_whole(cls):
    model = injected(cls)
    expected = model(X)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(X), expected, atol=1e-5)
    compiled(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_it_is_checkpointed(use_reentrant):
    model = injected()
    model(X).square().sum().backward()
    expected = model.gate.up_lora_A.grad.clone()
    model.zero_grad()
    x = X.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.allclose(model.gate.up_lora_A.grad, expected)


@given(
    inputs=st.integers(1, 5),
    hidden=st.integers(1, 5),
    r=st.integers(1, 3),
    batch=st.lists(st.integers(0, 3), max_size=2),
    use_rslora=st.booleans(),
)
def test_shapes(inputs, hidden, r, batch, use_rslora):
    torch.manual_seed(0)
    model = nn.ModuleDict({"gate": Gate(inputs, hidden, 2)})
    lora.inject(model, target_parameters=["up", "down"], r=r, lora_alpha=3, use_rslora=use_rslora)
    for part in parts_of(model["gate"]).values():
        nn.init.normal_(part.lora_B)
    x = torch.randn(*batch, inputs)
    scaling = 3 / r**0.5 if use_rslora else 3 / r
    got = model["gate"](x)
    assert got.shape == (*batch, 2)
    assert torch.allclose(got.double(), dense(model, x, scaling), atol=1e-4)


# ---- mistakes ------------------------------------------------------------------------------------------------------


def reasons(make, **settings):
    torch.manual_seed(0)
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="inject: nothing was changed") as caught:
        lora.inject(model, **settings)
    assert [type(module) for module in model.modules()] == classes
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }
    return re.sub(r"^.*\n", "", str(caught.value)).replace("  - ", "").splitlines()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = Gate(), Gate()
        self.other.up = self.one.up
        self.one.down = nn.Parameter(self.one.down.detach().half().to(torch.int8), requires_grad=False)
        self.other.down_lora_A = 3


def test_every_mistake_is_named_at_once():
    assert reasons(Tied, target_parameters=["one.up", "one.down", "other.down", "down_bias", "one.upp"], r=2) == [
        "`target_parameters` 'one.upp' matches no parameter (did you mean 'up'?).",
        "one.up: is tied to other.up, which the update would leave out, or change too.",
        "one.down: its numbers are packed in torch.int8, and its module reads them as they are.",
        "one.down_bias: has the shape (4,); LoRA adapts matrices, and stacks of them.",
        "other.down: its module has down_lora_A already, which LoRA needs for itself.",
        "other.down_bias: has the shape (4,); LoRA adapts matrices, and stacks of them.",
    ]


def test_a_string_is_no_list():
    with pytest.raises(ValueError, match="`target_parameters` must be a list of names, got the string 'up'"):
        lora.LoraConfig(target_parameters="up")


def test_nothing_is_adapted_twice():
    model = injected()
    with pytest.raises(ValueError, match=r"gate\.up: has LoRA already; eject or merge it first\."):
        lora.inject(model, target_parameters=["up"])


def test_what_trains_in_full_is_not_adapted():
    assert reasons(Model, target_parameters=["gate.up"], modules_to_save=["gate"]) == [
        "gate: a module of `modules_to_save` trains in full and cannot be adapted, or hold a module that is: gate.up."
    ]


def test_starts_of_data_are_for_layers():
    assert reasons(Model, target_parameters=["gate.up"], init_lora_weights="eva") == [
        "gate.up: is a parameter, whose inputs cannot be observed; 'eva' is for layers."
    ]


def test_an_instance_with_a_forward_of_its_own():
    def make():
        model = Model()
        model.gate.forward = lambda x: x
        return model

    assert len(reasons(make, target_parameters=["gate.up"])) == 1


def test_the_weight_of_a_layer_is_the_layer():
    torch.manual_seed(0)
    model = Model()
    lora.inject(model, target_parameters=["proj.weight", "gate.up"], r=2)
    assert isinstance(model.proj, lora.LoRALayer)
    assert set(parts_of(model.gate)) == {"up"}


def test_an_excluded_parameter_is_left_alone():
    torch.manual_seed(0)
    model = Model()
    lora.inject(model, target_parameters=["up", "down"], exclude_modules=["gate.down"], r=2)
    assert set(parts_of(model.gate)) == {"up"}


def test_all_linear_and_parameters_together():
    torch.manual_seed(0)
    model = Model()
    report = lora.inject(model, target_modules="all-linear", target_parameters=["up"], r=2)
    assert [row.names[0] for row in report.modules] == ["proj", "gate.up"]
    assert dict(report.unreached) == {"gate.down": 20}


def test_a_use_that_cannot_drop_inputs_says_so():
    class Summed(Gate):
        def forward(self, x):
            return x @ self.up.sum(0)

    model = nn.ModuleDict({"gate": Summed()})
    lora.inject(model, target_parameters=["up"], r=2, lora_dropout=0.5)
    with pytest.raises(RuntimeError, match=r"`lora_dropout` \(=0\.5\) must be 0 for `up` of a Summed: the forward"):
        model["gate"](X)


def test_adapters_are_swapped(tmp_path):
    other = injected(r=3)
    lora.save_adapter(other, tmp_path / "a.safetensors")
    model = injected()
    before = model(X)
    lora.prepare_for_swap(model, max_r=4)
    assert torch.allclose(model(X), before, atol=1e-5)
    model.double()
    assert torch.allclose(model(X.double()), before.double(), atol=1e-5)
    lora.load_adapter(model.float(), tmp_path / "a.safetensors")
    assert torch.allclose(model(X), other(X), atol=1e-5)


def test_a_part_is_no_module_of_the_model():
    model = injected()
    assert not any(isinstance(module, Part) for module in model.modules())
