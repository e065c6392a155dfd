"""lora.* against the real loralib: constructors, initial values, state dicts, numerics."""

import inspect
from itertools import product

import loralib
import loralib.layers
import pytest
import torch
from conftest import randomised
from counting import operations
from torch import nn

import lora

LINEAR = [
    dict(zip(("r", "bias", "fan_in_fan_out"), values, strict=True))
    for values in product((0, 3), (True, False), (True, False))
]
MERGED = [
    {"r": r, "enable_lora": mask, "fan_in_fan_out": transposed}
    for r, mask, transposed in product((0, 2), ([True, False, True], [True], [False, False], [True, True]), (0, 1))
]
EMBEDDING = [{"r": 0}, {"r": 3}, {"r": 3, "padding_idx": 1}, {"r": 2, "scale_grad_by_freq": True}]
CONV = [
    {"r": 0},
    {"r": 2},
    {"r": 2, "bias": False},
    {"r": 3, "stride": 2, "padding": 1, "groups": 2},
    {"r": 2, "dilation": 2, "padding": "same", "padding_mode": "circular"},
]
CASES = [
    *[("Linear", (8, 6), options) for options in LINEAR],
    *[("MergedLinear", (8, 6), options) for options in MERGED],
    *[("Embedding", (9, 6), options) for options in EMBEDDING],
    *[("Conv2d", (4, 6, 3), options) for options in CONV],
]
IDS = [f"{name}-{options}" for name, _, options in CASES]
every_case = pytest.mark.parametrize(("name", "sizes", "options"), CASES, ids=IDS)
# loralib fails in the forward pass of a MergedLinear that has a rank and nothing enabled.
RUNNING = [case for case in CASES if not (case[2]["r"] and not any(case[2].get("enable_lora", [True])))]
every_running_case = pytest.mark.parametrize(
    ("name", "sizes", "options"), RUNNING, ids=[f"{name}-{options}" for name, _, options in RUNNING]
)


def pair(name, sizes, options, **more):
    """loralib's layer and ours from the same seed, ours with names as loralib's (Conv2d: without `conv.`)."""
    layers = []
    for library in (loralib, lora):
        torch.manual_seed(3)
        layers.append(getattr(library, name)(*sizes, lora_alpha=5, **options, **more))
    return layers


def parameters(layer):
    return {key.removeprefix("conv."): parameter for key, parameter in layer.named_parameters()}


def an_input(name, dtype=torch.float64):
    if name == "Embedding":
        return torch.tensor([[0, 1, 1, 8], [5, 1, 2, 0]])
    return torch.randn((2, 4, 7, 8) if name == "Conv2d" else (5, 8), dtype=dtype, requires_grad=True)


def trained(name, sizes, options):
    """The pair in float64 with one random adapter."""
    theirs, ours = pair(name, sizes, options, dtype=torch.float64)
    if ours.r:
        randomised(ours)
        theirs.load_state_dict({"lora_A": ours.lora_A, "lora_B": ours.lora_B}, strict=False)
    return theirs, ours


@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Embedding", "Conv1d", "Conv2d", "Conv3d"])
def test_constructors_take_loralibs_arguments_in_its_order_and_with_its_defaults(name):
    theirs = loralib.layers.ConvLoRA if name.startswith("Conv") else getattr(loralib, name)
    expected = [
        (p.name, p.default)
        for p in inspect.signature(theirs).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "conv_module"
    ]
    got = [
        (p.name, list(p.default) if isinstance(p.default, tuple) else p.default)
        for p in inspect.signature(getattr(lora, name)).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert got == expected


@every_case
def test_the_same_seed_gives_loralibs_parameters_bitwise(name, sizes, options):
    theirs, ours = (parameters(layer) for layer in pair(name, sizes, options))
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
        assert ours[key].requires_grad == value.requires_grad, key


@every_case
def test_a_layer_leaves_the_random_generator_as_loralibs_does(name, sizes, options):
    after = []
    for library in (loralib, lora):
        torch.manual_seed(3)
        getattr(library, name)(*sizes, **options)
        after.append(torch.rand(4))
    assert torch.equal(*after)


@pytest.mark.parametrize(
    ("name", "sizes", "options"), [c for c in CASES if c[0] != "Conv2d"], ids=[i for i in IDS if i[:4] != "Conv"]
)
def test_state_dicts_load_strictly_in_both_directions(name, sizes, options):
    theirs, ours = trained(name, sizes, options)
    fresh_theirs, fresh_ours = pair(name, sizes, options, dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    fresh_theirs.load_state_dict(ours.state_dict(), strict=True)
    fresh_ours.load_state_dict(theirs.state_dict(), strict=True)
    for key, value in ours.state_dict().items():
        assert torch.equal(fresh_theirs.state_dict()[key], value), key
        assert torch.equal(fresh_ours.state_dict()[key], value), key


@every_running_case
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_are_loralibs(name, sizes, options, mode):
    theirs, ours = (layer.train(mode == "train") or layer for layer in trained(name, sizes, options))
    x = an_input(name)
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@every_running_case
def test_gradients_are_loralibs(name, sizes, options):
    x, gradients = an_input(name), []
    for layer in trained(name, sizes, options):
        inputs = {**parameters(layer), "x": x}
        inputs = {key: value for key, value in inputs.items() if value.requires_grad}
        output = layer(x)
        wanted = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        gradients.append(dict(zip(inputs, torch.autograd.grad(output, list(inputs.values()), wanted), strict=True)))
    theirs, ours = gradients
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Conv2d"])
def test_the_inputs_gradient_in_eval_is_loralibs(name):
    sizes, options = {
        "Linear": ((8, 6), {"r": 2}),
        "MergedLinear": ((8, 6), {"r": 2, "enable_lora": [True, False]}),
        "Conv2d": ((4, 6, 3), {"r": 2}),
    }[name]
    x = an_input(name)
    theirs, ours = (layer.eval() or layer for layer in trained(name, sizes, options))
    torch.testing.assert_close(torch.autograd.grad(ours(x).sum(), x), torch.autograd.grad(theirs(x).sum(), x))


def test_ten_steps_of_training_end_at_loralibs_parameters():
    x, target, ends = an_input("Linear").detach(), torch.randn(5, 6, dtype=torch.float64), []
    for layer in pair("Linear", (8, 6), {"r": 3}, dtype=torch.float64):
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.mse_loss(layer(x), target).backward()
            optimizer.step()
        ends.append(layer.state_dict())
    torch.testing.assert_close(ends[1], ends[0])


@pytest.mark.parametrize("layout", ["weight", "conv.weight", "both"])
@pytest.mark.parametrize("prefix", ["", "net.0."])
def test_conv2d_loads_loralibs_three_layouts_strictly(layout, prefix):
    theirs, _ = trained("Conv2d", (4, 6, 3), {"r": 2})
    state = {key.removeprefix("conv."): value for key, value in theirs.state_dict().items()}
    if layout != "weight":
        state |= {f"conv.{key}": state[key] for key in ("weight", "bias")}
    if layout == "conv.weight":
        del state["weight"], state["bias"]
    fresh = lora.Conv2d(4, 6, 3, r=2, lora_alpha=5, dtype=torch.float64)
    model = nn.ModuleDict({"net": nn.Sequential(fresh)}) if prefix else fresh
    given = {prefix + key: value for key, value in state.items()}
    model.load_state_dict(given, strict=True)
    x = an_input("Conv2d")
    torch.testing.assert_close(fresh(x), theirs(x))
    assert set(given) == {prefix + key for key in state}, "the caller's dict is left alone"


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_conv2d_refuses_loralibs_two_layouts_at_once_when_they_differ(name):
    theirs, ours = trained("Conv2d", (4, 6, 3), {"r": 2})
    state = {**theirs.state_dict(), name: theirs.state_dict()[f"conv.{name}"] + 1}
    with pytest.raises(RuntimeError, match=rf"conv\.{name} and {name} must be equal"):
        ours.load_state_dict(state, strict=False)


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d"])
def test_convolutions_with_a_kernel_of_one_have_loralibs_shapes_and_values(name):
    theirs, ours = pair(name, (4, 6, 1), {"r": 2})
    for key, value in parameters(theirs).items():
        assert torch.equal(parameters(ours)[key], value), key


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_loralibs_adapter_checkpoint_loads_by_loralibs_recipe(tmp_path, bias):
    theirs, ours = trained("Linear", (8, 6), {"r": 2})
    torch.save(loralib.lora_state_dict(theirs, bias=bias), tmp_path / "lora.pt")
    _, fresh = pair("Linear", (8, 6), {"r": 2}, dtype=torch.float64)
    missing, unexpected = fresh.load_state_dict(torch.load(tmp_path / "lora.pt"), strict=False)
    assert unexpected == []
    assert set(missing) <= {"weight", "bias"}
    x = an_input("Linear")
    torch.testing.assert_close(fresh(x), ours(x))


# ---- what trains, and what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_on_a_model_without_traps_it_is_loralibs(bias):
    def make(library):
        torch.manual_seed(0)
        merged = library.MergedLinear(8, 6, r=2, enable_lora=[True, False, True])
        rest = nn.LayerNorm(4), nn.Linear(4, 8), library.Embedding(4, 4, r=2)
        return nn.Sequential(library.Linear(4, 4, r=2), merged, *rest)

    ours, theirs = make(lora), make(loralib)
    lora.mark_only_lora_as_trainable(ours, bias)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    mine, other = lora.lora_state_dict(ours, bias), loralib.lora_state_dict(theirs, bias)
    assert set(mine) == set(other)
    assert all(torch.equal(value, other[name]) for name, value in mine.items())


def test_the_counter_of_operations_sees_what_loralib_spends():
    theirs = loralib.MergedLinear(256, 768, r=8, enable_lora=[True, True, True])
    plain = operations(nn.Linear(256, 768), 4, 64).flops
    assert operations(theirs, 4, 64).flops > 2 * plain
