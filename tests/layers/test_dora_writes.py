"""DoRA follows what is written to its parameters, in whatever way, though it remembers what it has summed."""

import pytest
import torch
from counting import Operations
from magnitudes import assert_formula, dora, formula, input_of, leaves
from torch import nn

SEVERAL = ["Linear", "MergedLinear", "Embedding", "Conv2d", "Conv2d factored"]


def other(tensor):
    return torch.randn_like(tensor)


def replaced(layer, name):
    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(other(old), old.requires_grad))


def exchanged(layer, name):
    """As FSDP does where no `__setattr__` sees it."""
    old = layer._parameters[name]
    layer._parameters[name] = nn.Parameter(other(old), old.requires_grad)


def loaded(layer, name, assign=False):
    layer.load_state_dict({**layer.state_dict(), name: other(getattr(layer, name))}, assign=assign)


@torch.no_grad()
def in_place(layer, name):
    getattr(layer, name).copy_(other(getattr(layer, name)))


def through_data(layer, name):
    getattr(layer, name).data.mul_(-1.5)


def other_data(layer, name):
    getattr(layer, name).data = other(getattr(layer, name))


def swapped(layer, name):
    """As `Module._apply` does with `torch.__future__.set_swap_module_params_on_conversion`."""
    old = getattr(layer, name)
    torch.utils.swap_tensors(old, nn.Parameter(other(old), old.requires_grad))


def stepped(layer, name):
    parameter = getattr(layer, name)
    parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW([parameter], lr=0.3).step()
    parameter.grad = None


WRITES = {
    "in place": in_place,
    "through .data": through_data,
    "other .data": other_data,
    "replaced": replaced,
    "exchanged": exchanged,
    "swapped": swapped,
    "stepped": stepped,
    "loaded": loaded,
    "assigned": lambda layer, name: loaded(layer, name, assign=True),
}


@pytest.mark.parametrize(
    ("form", "write"),
    [
        *(("Linear", write) for write in WRITES),
        *((form, write) for form in SEVERAL[1:] for write in ("in place", "loaded")),
    ],
)
def test_it_follows_what_is_written(form, write):
    for name in ("weight", "lora_A", "lora_B", "lora_magnitude"):
        layer, x = dora(form, dtype=torch.float64), input_of(form, torch.float64)
        layer(x), layer.eval()(x)
        with torch.no_grad():
            layer(x)  # a merged weight, too
        WRITES[write](layer, name)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), formula(layer, x, leaves(layer)), rtol=1e-11, atol=1e-11)
        assert_formula(layer.train(), x)
        WRITES[write](layer, name)
        assert_formula(layer, x)


@pytest.mark.parametrize("form", SEVERAL)
def test_it_follows_the_scaling_and_the_dtype(form):
    layer, x = dora(form), input_of(form)
    layer(x)
    layer.scaling = 0.25
    assert_formula(layer, x)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        assert_formula(layer.to(dtype), input_of(form, dtype))


def test_the_base_weights_squares_are_summed_once():
    layer, x = dora("Linear"), input_of("Linear")

    def sums():
        with Operations() as counted:
            layer(x).sum().backward()
        return counted.names.count("linalg_vector_norm")

    assert [sums(), sums()] == [0, 0]  # the constructor has
    in_place(layer, "lora_B")
    assert sums() == 0
    in_place(layer, "weight")
    assert [sums(), sums()] == [1, 0]
    layer.to(torch.float64)
    assert layer._squares is None  # nor kept beside the new weight
    layer.float()
    assert [sums(), sums()] == [1, 0]


def test_a_forward_in_inference_mode_leaves_nothing_that_training_could_meet():
    layer, x = dora("Linear"), input_of("Linear")
    with torch.inference_mode():
        layer(x), layer.eval()(x)
    assert_formula(layer.train(), x.requires_grad_())
