"""Parametrizations, of torch.nn.utils.parametrize, that a model with adapters gets: they count, and stay whole."""

import copy

import pytest
import torch
from interruptions import whole
from releases import through_a_compiler
from torch import nn
from torch.nn.utils import parametrize

import lora


class Halved(nn.Module):
    """Exactly."""

    def forward(self, value):
        return value / 2


class Owner(nn.Module):
    """A matrix of its own."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return nn.functional.linear(x, self.up)


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Recurrent(nn.GRU):
    def forward(self, x):
        return super().forward(x)[0]


# A base, what adapts it, its input, and the name of an adapted weight: A and B are called after it where it is a part.
MODELS = {
    "Linear": (lambda: nn.Linear(6, 5), {"target_modules": ["x"]}, (3, 4, 6), ""),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), {"target_modules": ["x"]}, (3, 4, 5, 5), ""),
    "Embedding": (lambda: nn.Embedding(7, 6), {"target_modules": ["x"]}, None, ""),
    "parameter": (Owner, {"target_parameters": ["x.up"]}, (3, 4, 6), "up_"),
    "attention": (lambda: Attention(6, 2, batch_first=True), {"target_modules": ["x"]}, (3, 4, 6), "in_proj_weight_"),
    "recurrent": (lambda: Recurrent(6, 6, batch_first=True), {"target_modules": ["x"]}, (3, 4, 6), "weight_hh_l0_"),
}
each_model = pytest.mark.parametrize("name", MODELS)


def base_of(name):
    torch.manual_seed(0)
    make, config, shape, prefix = MODELS[name]
    x = torch.randint(7, (3, 4)) if shape is None else torch.randn(shape, dtype=torch.float64)
    return nn.ModuleDict({"x": make()}).double().requires_grad_(False), config, x, prefix


def banked(name, use_dora=True):
    model, config, x, prefix = base_of(name)
    config = lora.LoraConfig(r=2, use_dora=use_dora, init_lora_weights=False, **config)
    return model, lora.bank(model, {"a": config, "b": config}), x, prefix, config


def outputs(model, bank, x):
    with bank.use("a"):
        alone = model["x"](x)
    with bank.rows(["b", "a", None]):
        return torch.stack([alone, model["x"](x)])


@pytest.mark.parametrize("own", ["lora_A", "lora_B", "lora_magnitude"])
@each_model
def test_what_is_computed_counts_for_its_adapter_alone(name, own):
    model, bank, x, prefix, _ = banked(name)
    tensor = f"{prefix}{own}_a"
    parameter = getattr(model["x"], tensor)
    with torch.no_grad():
        parameter /= 2
        expected = outputs(model, bank, x)
        parameter *= 2
    trained = [id(parameter) for parameter in bank.parameters("a")]
    parametrize.register_parametrization(model["x"], tensor, Halved())
    torch.testing.assert_close(outputs(model, bank, x), expected)
    assert [id(parameter) for parameter in bank.parameters("a")] == trained
    outputs(model, bank, x).sin().sum().backward()
    assert parameter.grad.count_nonzero() > 0
    with torch.no_grad():
        model.eval()
        for _ in range(2):  # the second time from what is kept
            torch.testing.assert_close(outputs(model, bank, x), expected)
        parameter /= 2
        assert not torch.allclose(outputs(model, bank, x), expected)


CHANGES = {
    "keep": lambda bank, config: bank.keep("a"),
    "keep the other": lambda bank, config: bank.keep("b"),
    "delete": lambda bank, config: bank.__delitem__("a"),
    "delete the other": lambda bank, config: bank.__delitem__("b"),
    "add": lambda bank, config: bank.__setitem__("c", config),
    "read": lambda bank, config: bank["a"],
    "read the other": lambda bank, config: bank["b"],
    "save the other": lambda bank, config: bank.save("b", "nowhere"),
    "groups": lambda bank, config: bank.param_groups("b", lr=1.0),
    "bank": lambda bank, config: lora.bank(bank._model, {"c": config}),
}


@each_model
def test_until_it_is_removed_nothing_else_is_done_and_all_stays_as_it_was(name):
    model, bank, x, prefix, config = banked(name)
    before = {name: bank[name] for name in "ab"}
    tensor = f"{prefix}lora_A_a"
    parametrize.register_parametrization(model["x"], tensor, Halved())
    expected = outputs(model, bank, x)
    state = whole(model)
    for what, change in CHANGES.items():
        with pytest.raises(ValueError, match=r"a tensor of x\S* is computed by a parametrization; remove the param"):
            change(bank, config)
        assert whole(model) == state, what
    assert torch.equal(outputs(model, bank, x), expected)
    parametrize.remove_parametrizations(model["x"], tensor, leave_parametrized=False)
    for adapter, was in before.items():
        assert all(torch.equal(tensor, was.tensors[name]) for name, tensor in bank[adapter].tensors.items())
    del bank["b"]
    bank.keep("a")
    lora.merge(model)


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "attention", "recurrent"])
def test_one_of_the_bases_own_tensors_counts_and_must_be_removed_before_the_adapter_is(name):
    model, config, x, _ = base_of(name)
    twin = copy.deepcopy(model)
    own = next(own for own, _ in model["x"].named_parameters() if "bias" in own)
    for one in (model, twin):
        torch.manual_seed(1)
        nn.init.normal_(getattr(one["x"], own))
        lora.inject(one, r=2, init_lora_weights=False, **config)
    parametrize.register_parametrization(model["x"], own, Halved())
    with torch.no_grad():
        getattr(twin["x"], own).div_(2)
    torch.testing.assert_close(model["x"](x), twin["x"](x))
    state = whole(model)
    for change in (lora.eject, lora.merge):
        with pytest.raises(ValueError, match=r"a tensor of x\S* is computed by a parametrization; remove the param"):
            change(model)
    assert whole(model) == state
    parametrize.remove_parametrizations(model["x"], own)
    for one in (model, twin):
        lora.merge(one)
    torch.testing.assert_close(model["x"](x), twin["x"](x))


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("own", ["lora_A_a", "weight"])
def test_such_a_layer_is_not_compiled(own, early):
    model, bank, x, _, _ = banked("Linear", use_dora=False)
    torch._dynamo.reset()
    compiled = torch.compile(model["x"], backend="eager")
    if not early:
        with bank.use("a"):
            compiled(x)
    parametrize.register_parametrization(model["x"], own, Halved())
    original = getattr(model["x"].parametrizations, own).original.requires_grad_()
    with bank.use("a"):
        (expected,) = torch.autograd.grad(model["x"](x).sin().sum(), original)
        (found,) = torch.autograd.grad(compiled(x).sin().sum(), original)
        torch.testing.assert_close(found, expected)
        with torch.no_grad():
            original += 1
        torch.testing.assert_close(compiled(x), model["x"](x))
        torch._dynamo.reset()
        said = through_a_compiler("x: has a parametrization, and cannot be compiled with a bank of adapters")
        with pytest.raises(RuntimeError, match=said):
            torch.compile(model["x"], backend="eager", fullgraph=True)(x)
