"""What a class's methods are found to read is found once, is found anew where they are replaced, and keeps no class."""

import functools
import gc
import weakref

import torch
import torch.nn.functional as F
from torch import nn

import lora
from lora.layers.code import reads_what_it_is_given, words


def reader():
    """A class of its own, whose forward calls its layer."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)

        forward = decorated(called)

    return Reader


def called(self, x):
    return self.proj(x)


def read(self, x):
    return F.linear(x, self.proj.weight)


def doubled(self, x):
    return 2 * F.linear(x, self.proj.weight)


def decorated(forward):
    """Around any forward the same code."""

    @functools.wraps(forward)
    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    return call


def adapted(cls):
    model = cls()
    lora.inject(model, target_modules=["proj"], r=2)
    nn.init.normal_(model.proj.lora_B)
    return model


def weight_of(model):
    return model.proj.weight + model.proj.lora_scaling * model.proj.lora_B @ model.proj.lora_A


def test_a_forward_that_is_replaced_is_read_anew():
    cls, x = reader(), torch.randn(3, 4)
    kept = [adapted(cls)]  # what was found of the class, and a class that was made of it, are in use
    kept[0](x)
    for forward, times in ((decorated(read), 1), (decorated(doubled), 2), (read, 1)):
        cls.forward = forward
        model = adapted(cls)
        torch.testing.assert_close(model(x), times * F.linear(x, weight_of(model)))
        kept.append(model)


class Mentions(nn.Module):
    """Of two variables that stand side by side, Python 3.13 loads both at once."""

    def forward(self, x, held):
        return F.linear(x, self.state_dict(*())["w"]) + F.linear(x, held.weight)


def test_what_is_named_is_found_in_the_code_of_every_python():
    found = words(Mentions, "forward")
    assert found >= {"x", "self", "held", "state_dict()", "self.state_dict()", "w", "weight"}
    assert "held.state_dict()" not in found
    assert reads_what_it_is_given(Mentions)


class NamedAlike(nn.Module):
    """It reads the weight of its own `x`, and not that of its argument."""

    def forward(self, x):
        return F.linear(x, self.x.weight)


def test_an_attribute_that_is_named_as_an_argument_is_not_the_argument():
    assert not reads_what_it_is_given(NamedAlike)


def test_a_class_that_reads_no_weight_goes_with_its_modules():
    cls = reader()
    model = adapted(cls)
    model(torch.ones(1, 4))
    gone = weakref.ref(cls)
    del cls, model
    gc.collect()
    assert gone() is None
