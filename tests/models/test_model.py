"""A model seen whole: which tensors its modules share, and how it is put back after an error."""

import pytest
import torch
import torch.nn as nn

import lora
from lora.layers.undo import undo_on_error
from lora.models.model import Memory, by_tensor, names_of, owned_tensors


def tied():
    """Two names for one module, one Parameter in two modules, and two Parameters in one storage."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "b", "c", "d")})
    model["again"] = model["a"]
    model["b"].weight = model["a"].weight
    model["c"].weight = nn.Parameter(model["a"].weight.data[:2])
    return model


def test_a_tensor_is_found_with_all_its_owners_and_names():
    model = tied()
    groups = [[name for one in group for name in one.names] for group in by_tensor(owned_tensors(names_of(model)))]
    assert groups[0] == ["a.weight", "again.weight", "b.weight"]
    assert [len(group) for group in groups] == [3, 2, 1, 1, 1, 1, 1]


def test_what_shares_memory_is_found_whatever_holds_it():
    model = tied()
    memory = Memory(owned_tensors(names_of(model)))
    for name, sharing in {"a": "abc", "b": "abc", "c": "abc", "d": "d"}.items():
        found = {one.names[0][0] for one in memory.sharing(model[name].weight)}
        assert found == set(sharing)
    assert memory.tied_to(model["c"]) == "a, b"
    assert memory.tied_to(model["d"]) == ""
    halves = nn.ParameterList(torch.arange(8.0).split(4))  # one storage, and no value in common
    assert [one.own for one in Memory(owned_tensors(names_of(halves))).sharing(halves[0])] == ["0"]


def turn_upside_down(model, error=None):
    layer = model["a"]
    layer.__class__ = nn.Bilinear
    layer.new, layer.out_features = 1, 7
    del layer.bias
    layer.weight.data = torch.zeros(9, 9)
    layer.weight.requires_grad_(False)
    model["d"].weight = nn.Parameter(torch.zeros(1))
    with torch.no_grad():
        model["c"].bias.zero_()
        model["d"].bias.zero_()
    if error is not None:
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_puts_back_modules_and_the_values_that_were_named(error):
    model = tied()
    before = [
        (module, type(module), dict(vars(module)), dict(module._parameters), [*module.parameters()])
        for module in model.modules()
    ]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error), undo_on_error(model.modules(), [model["c"].bias]):
        turn_upside_down(model, error)
    for module, cls, attributes, own, parameters in before:
        assert type(module) is cls
        assert vars(module) == attributes
        assert module._parameters.keys() == own.keys()
        assert all(now is then for now, then in zip(module.parameters(), parameters, strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    written = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, values[name])}
    assert written == {"d.bias"}  # nobody said that it would be


def test_without_an_error_what_was_done_stays():
    model = tied()
    with undo_on_error(model.modules(), [model["c"].bias]):
        turn_upside_down(model)
    assert type(model["a"]) is nn.Bilinear
    assert not model["c"].bias.any()


def test_the_scaling_that_a_compiler_reads_is_put_back():
    layer = lora.Linear(4, 4, r=2)
    lora.prepare_for_swap(layer, 4)

    def fails():
        layer.scaling = 7.0
        raise KeyError

    with pytest.raises(KeyError), undo_on_error(layer.modules()):
        fails()
    assert layer.scaling == layer.lora_scale[0].item() == 0.5
