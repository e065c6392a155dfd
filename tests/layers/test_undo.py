"""One way to undo: what a block changed in modules and tensors is as it was if the block raises."""

import weakref
from contextlib import suppress

import pytest
import torch
from interruptions import whole
from torch import nn

import lora
from lora.layers.undo import undo_on_error


class Stop(Exception):
    pass


def stop(change, *args):
    change(*args)
    raise Stop


def undone(change, model, *kept):
    with pytest.raises(Stop), undo_on_error(model.modules(), kept) as undo, undo:
        stop(change, model, undo)


def grow(model, undo):
    model.register_buffer("other", torch.ones(1), persistent=False)
    model.register_buffer("count", None)
    model.register_forward_hook(lambda *_: None)
    model.add_module("more", nn.ReLU())
    del model.bias
    model.__class__ = nn.Identity


def retype(model, undo):
    model.weight.grad = None
    model.weight.data = torch.zeros(2, 2, dtype=torch.bfloat16)
    model.weight.grad = torch.zeros(2, 2, dtype=torch.bfloat16)
    model.weight.requires_grad_(False)
    model.weight.note = "of somebody else's"


@pytest.mark.parametrize("change", [grow, retype])
def test_it_puts_back(change):
    model = nn.Linear(4, 3)
    model.register_buffer("count", torch.zeros(1), persistent=False)
    model.weight.grad = torch.ones(3, 4)
    before = whole(model)
    undone(change, model)
    assert whole(model) == before


def test_tensors_that_share_memory_get_the_values_of_before():
    model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    model[1].weight = nn.Parameter(model[0].weight.data)
    before = whole(model)

    @torch.no_grad()
    def add(model, undo):
        for layer in model:
            undo.keep(layer.weight)
            layer.weight.add_(1)

    undone(add, model)
    assert whole(model) == before


def test_flags_of_parameters_that_have_no_shape_yet_come_back():
    model = nn.LazyLinear(3)

    def freeze(model, undo):
        for parameter in model.parameters():
            parameter.requires_grad = False

    undone(freeze, model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("inside", [False, True])
def test_inference_mode_is_in_nobodys_way(inside):
    with torch.inference_mode():
        model = nn.Linear(3, 3)
    with torch.inference_mode(inside):
        undone(lambda *_: None, model, model.weight)
    other = nn.Linear(3, 3)
    before = whole(other)
    with torch.inference_mode(inside):
        undone(lambda other, undo: other.weight.data.zero_(), other, other.weight)
    assert whole(other) == before
    assert other(torch.ones(3)).requires_grad


@pytest.mark.parametrize("error", [None, Stop])
def test_copies_are_let_go_of_at_the_end(error):
    model = nn.Linear(3, 3)
    undo = undo_on_error(model.modules(), [model.weight])
    copy = weakref.ref(next(iter(undo._kept.values())).copy)
    with suppress(Stop), undo, undo:
        if error:
            raise error
    assert copy() is None


def test_what_cannot_be_put_back_keeps_nothing_else_from_it(monkeypatch):
    model = nn.ModuleList([lora.Linear(3, 3, r=1), lora.Linear(3, 3, r=1)])
    before = whole(model)

    def refresh(layer):
        raise KeyError("of the undo")

    def change(model, undo):
        monkeypatch.setattr(lora.Linear, "lora_refresh", refresh)
        model[0].r = 7
        nn.init.zeros_(model[1].lora_A)

    with pytest.raises(KeyError, match="of the undo"):
        undone(change, model, model[1].lora_A)
    assert whole(model) == before
