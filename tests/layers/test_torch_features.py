"""What torch can do with a layer, it can do with a LoRA layer."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from conftest import (
    KINDS,
    LAYERS,
    WITH_DROPOUT,
    assert_equation,
    example,
    make,
    plain_twin,
    randomised,
    with_float32_adapter,
)
from pairwise import every_two
from torch import nn
from torch.nn.utils import parametrize, skip_init
from torch.utils.checkpoint import checkpoint

import lora

each_kind = pytest.mark.parametrize("kind", KINDS)


def by_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": lambda m: pickle.loads(pickle.dumps(m)), "deepcopy": copy.deepcopy, "torch.save": by_torch_save}


@every_two(kind=KINDS, copied=COPIES, mode=["train", "eval", "served", "disabled", "injected"])
def test_copies_are_the_same_layer_in_every_mode(kind, copied, mode):
    layer, x = make(kind).train(mode == "train"), example(kind)
    if mode == "injected":
        layer = plain_twin(make(kind, r=0)).float()
        lora.inject(layer, target_modules=[""], r=2)
        randomised(layer)
    off = lora.disabled(layer) if mode == "disabled" else nullcontext()
    with torch.set_grad_enabled(mode != "served"), off:
        expected = layer(x)
        other = copied(layer)
        assert torch.equal(other(x), expected)
    assert type(other) is type(layer)
    assert repr(other) == repr(layer)
    assert (other.training, other.r, other.scaling) == (layer.training, layer.r, layer.scaling)
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in layer.parameters()]
    assert other.weight is not layer.weight


class Scaled(nn.Linear):
    """A user's own layer, for which no class is written."""

    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("copied", COPIES)
def test_a_layer_whose_class_was_made_for_a_users_layer_is_copied_like_any(copied):
    layer, x = Scaled(6, 5), torch.randn(3, 6)
    lora.inject(layer, target_modules=[""], r=2)
    other = COPIES[copied](randomised(layer))
    assert type(other) is type(layer)
    assert isinstance(other, Scaled)
    assert torch.equal(other(x), layer(x))


def test_a_merged_weight_is_not_pickled():
    layer = lora.Linear(200, 200, r=2).eval()
    before = len(pickle.dumps(layer))
    with torch.no_grad():
        layer(torch.ones(200))
    assert len(pickle.dumps(layer)) < before + 1000


# ---- devices and dtypes -----------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_made_on_meta_it_becomes_the_layer_that_its_state_dict_says(kind, how):
    source, x = make(kind), example(kind)
    layer = LAYERS[kind][0](**LAYERS[kind][1], r=2, lora_alpha=3, device="meta")
    assert all(parameter.is_meta for parameter in layer.parameters())
    if how == "to_empty":
        layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    else:
        layer.load_state_dict(source.state_dict(), assign=True)
    torch.testing.assert_close(layer(x), source(x))
    assert {k: p.requires_grad for k, p in layer.named_parameters()} == {
        k: p.requires_grad for k, p in source.named_parameters()
    }


@pytest.mark.parametrize("how", [skip_init, lambda cls, *a, **k: cls(*a, device="meta", **k).to_empty(device="cpu")])
def test_without_initialisation_reset_parameters_gives_sound_values(how):
    layer = how(lora.Linear, 6, 5, r=2)
    layer.reset_parameters()
    assert layer.lora_A.abs().max() <= (1 / 6) ** 0.5
    assert layer.lora_A.any()
    assert not layer.lora_B.any()


@each_kind
def test_meta_tensors_run_through_it(kind):
    layer, x = make(kind), example(kind)
    shape = layer(x).shape
    assert layer.to("meta")(x.to("meta")).shape == shape
    assert layer.eval()(x.to("meta")).shape == shape


@each_kind
def test_default_dtype_and_device_are_used(kind):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            layer = LAYERS[kind][0](**LAYERS[kind][1], r=2)
    finally:
        torch.set_default_dtype(before)
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.float64, "meta")}


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_a_default_device_does_not_matter_to_a_layer_that_is_elsewhere(kind):
    layer, x = make(kind, lora_dropout=0.5), example(kind)
    with torch.device("meta"):
        assert layer(x).device.type == "cpu"


@every_two(kind=KINDS, dtype=[torch.bfloat16, torch.float16], dropout=[0.0, 0.5])
def test_a_half_precision_base_trains_a_float32_adapter_without_autocast(kind, dtype, dropout):
    layer = with_float32_adapter(make(kind, dtype=dtype))
    layer.lora_dropout = dropout if kind in WITH_DROPOUT else 0.0
    x = example(kind, dtype)
    x.requires_grad_(x.is_floating_point())
    y = layer(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert (layer.lora_A.grad.dtype, layer.lora_B.grad.dtype) == (torch.float32, torch.float32)
    assert not x.is_floating_point() or x.grad.dtype == dtype
    layer.lora_dropout = 0.0
    assert_equation(layer, x)
    with torch.no_grad():
        assert_equation(layer.eval(), x)


@each_kind
def test_a_float32_base_takes_a_half_precision_adapter(kind):
    layer, x = make(kind), example(kind)
    layer.lora_A, layer.lora_B = nn.Parameter(layer.lora_A.bfloat16()), nn.Parameter(layer.lora_B.bfloat16())
    layer(x).square().sum().backward()
    assert (layer.lora_A.grad.dtype, layer.lora_B.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(layer.train()(x), layer.eval()(x))
        assert_equation(layer, x)


@every_two(kind=KINDS, dtype=[torch.float32, torch.float64], mode=["train", "eval", "served"])
def test_autocast_gives_the_dtype_that_it_gives_the_base(kind, dtype, mode):
    layer, x = make(kind, dtype=dtype).train(mode == "train"), example(kind, dtype)
    twin = plain_twin(layer)
    with torch.set_grad_enabled(mode != "served"), torch.autocast("cpu", torch.bfloat16):
        y, base = layer(x), layer.lora_base_forward(x)
    assert y.dtype == base.dtype
    expected = twin(x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.03 * expected.abs().max().item())


@each_kind
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast_trains_a_float32_adapter(kind, input_dtype):
    layer, x = make(kind, **({"lora_dropout": 0.5} if kind in WITH_DROPOUT else {})), example(kind, input_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().square().mean().backward()
    assert (layer.lora_A.grad.dtype, layer.lora_B.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_backward_may_run_under_autocast_that_forward_did_not_see(kind):
    layer, x = make(kind), example(kind, requires_grad=True)
    loss = layer(x).square().mean()
    expected = torch.autograd.grad(loss, [x, layer.lora_A], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, [x, layer.lora_A])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * other.abs().max().item())


@each_kind
def test_a_merged_weight_that_was_made_under_autocast_is_as_exact_as_any(kind):
    layer, x = make(kind).eval(), example(kind)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        assert_equation(layer, x)


# ---- modes ------------------------------------------------------------------------------------------------------


@each_kind
def test_after_inference_mode_it_trains(kind):
    layer, x = make(kind).eval(), example(kind)
    with torch.inference_mode():
        served = layer(x)
    for _, parameter in layer.lora_parameters():  # the merged weight then serves with gradients on, too
        parameter.requires_grad_(False)
    if x.is_floating_point():
        layer(x.requires_grad_()).sum().backward()
        assert x.grad.any()
    for _, parameter in layer.lora_parameters():
        parameter.requires_grad_(True)
    layer(x).square().sum().backward()
    assert layer.lora_A.grad.any()
    torch.testing.assert_close(layer.train()(x), served.clone())


@each_kind
def test_in_eval_with_gradients_on_the_adapter_trains_as_in_training_and_without_dropout(kind):
    layer, x, gradients = make(kind), example(kind), []
    for training, dropout in ((True, 0.0), (False, 0.9)):
        layer.train(training).lora_dropout = dropout if kind in WITH_DROPOUT else 0.0
        gradients.append(torch.autograd.grad(layer(x).square().sum(), [layer.lora_A, layer.lora_B]))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_in_training_without_gradients_there_is_dropout_and_no_merged_weight(kind):
    layer, x = make(kind, lora_dropout=0.5), example(kind)
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))
    assert layer._merged is None


@pytest.mark.parametrize("kind", WITH_DROPOUT)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_dropout_again(kind, reentrant):
    layer, x = make(kind, lora_dropout=0.5), example(kind, requires_grad=True)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        layer.zero_grad()
        x.grad = None
        y = call(x)
        torch.rand(3)  # the generator has moved on when backward begins
        y.square().sum().backward()
        results.append([y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@each_kind
@pytest.mark.parametrize("swap", [False, True])
def test_loading_in_eval_works_however_torch_writes_parameters(kind, swap):
    layer, other, x = make(kind), make(kind), example(kind)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        with torch.no_grad():
            layer.eval()(x)
            layer.load_state_dict(other.state_dict())
            torch.testing.assert_close(layer(x), other.eval()(x))
            assert_equation(layer.double(), x.double() if x.is_floating_point() else x)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_parametrized_tensors_count_in_every_mode(kind, name):
    class Double(nn.Module):
        def forward(self, value):
            return 2 * value

    layer, x = make(kind), example(kind)
    parametrize.register_parametrization(layer, name, Double())
    assert_equation(layer, x)
    with torch.no_grad():
        assert_equation(layer.eval(), x)
        layer.parametrizations[name].original.mul_(2)
        assert_equation(layer, x)
    parametrize.remove_parametrizations(layer, name)
    assert type(layer) is LAYERS[kind][0]
