"""Recurrent layers, by their names: all of their matrices are W, though they keep them in a list of their own."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from owners import adapted, adapters, assert_close, assert_is_w, by_hand, moved
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import lora

X = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))


def sequence(y):
    """What comes out at each step, and the last states."""
    steps, states = y
    return torch.cat([each.flatten() for each in (steps, *(states if isinstance(states, tuple) else (states,)))])


class Packed(nn.Module):
    """Sequences of several lengths."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)

    def forward(self, x):
        packed = pack_padded_sequence(x, torch.tensor([2, 3, 1, 3]), batch_first=True, enforce_sorted=False)
        return self.lstm(packed)[0].data


class Decoder(nn.Module):
    """Cells, step by step."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell(6, 5)

    def forward(self, x):
        state, seen = None, []
        for step in x:
            state = self.cell(step, state)
            seen.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(seen)


# For each: how it is made, what is named, what goes in, what of the output counts.
RECURRENT = {
    "LSTM": (lambda: nn.LSTM(6, 5, num_layers=2, bidirectional=True), ["x"], (X,), sequence),
    "LSTM with projections": (lambda: nn.LSTM(6, 5, proj_size=2, bias=False), ["x"], (X,), sequence),
    "GRU": (lambda: nn.GRU(6, 5, num_layers=2, batch_first=True), ["x"], (X, torch.randn(2, 4, 5)), sequence),
    "RNN": (lambda: nn.RNN(6, 5, bidirectional=True), ["x"], (X[0],), sequence),
    "packed": (Packed, ["lstm"], (X,), lambda y: y),
    **{
        cell.__name__: (lambda cell=cell: Decoder(cell), ["cell"], (X,), lambda y: y)
        for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    },
}
each = pytest.mark.parametrize("name", RECURRENT)
# torch says so of the plain layer, too.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


@each
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"merge_weights": True}], ids=str)
def test_the_output_is_that_of_w(name, options):
    _, _, _, of = RECURRENT[name]
    assert_is_w(*adapted(*RECURRENT[name], **options), of)


@each
def test_every_matrix_learns_as_by_hand(name):
    _, _, _, of = RECURRENT[name]
    model, inputs, base = adapted(*RECURRENT[name])
    assert {*adapters(model)} == {key for key, weight in base.named_parameters() if weight.dim() == 2}
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(of(by_hand(model, base)(*inputs)).sin().sum(), parameters)
    of(model["x"](*inputs)).sin().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert_close(parameter.grad, gradient)
    assert not lora.check(model).idle


@each
def test_it_is_saved_loaded_copied_merged_and_ejected(name, tmp_path):
    _, targets, _, of = RECURRENT[name]
    model, inputs, base = adapted(*RECURRENT[name])
    before, y = of(base["x"](*inputs)), of(model["x"](*inputs))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(of(twin["x"](*inputs)), y)
        moved(twin)  # of its own
        assert not torch.allclose(of(twin["x"](*inputs)), y)
        assert torch.equal(of(model["x"](*inputs)), y)
    keys = [key for key in model.state_dict() if "lora_" not in key]
    assert keys == [*base.state_dict()]
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    other, anew = copy.deepcopy(base), copy.deepcopy(base)
    lora.load_adapter(other, tmp_path / "adapter.safetensors")
    assert torch.equal(of(other["x"](*inputs)), y)
    lora.inject(anew, target_modules=targets, r=2, lora_alpha=4)
    anew.load_state_dict(model.state_dict())
    assert torch.equal(of(anew["x"](*inputs)), y)
    merged, right = lora.merged_state_dict(model), copy.deepcopy(base)
    assert [*merged] == keys
    right.load_state_dict(merged)
    assert_close(of(right["x"](*inputs)), y)
    lora.eject(other)
    assert torch.equal(of(other["x"](*inputs)), before)
    lora.merge(model)
    for plain in (other, model):
        assert [type(module) for module in plain.modules()] == [type(module) for module in base.modules()]
        assert [*plain.state_dict()] == keys
    assert_close(of(model["x"](*inputs)), y)


@each
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(name, use_reentrant):
    _, _, _, of = RECURRENT[name]
    model, inputs, _ = adapted(*RECURRENT[name])
    inputs = tuple(x.requires_grad_() for x in inputs)  # which the reentrant kind needs
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(of(model["x"](*inputs)).sin().sum(), parameters)
    y = checkpoint(lambda *inputs: of(model["x"](*inputs)), *inputs, use_reentrant=use_reentrant)
    y.sin().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_starts_that_read_the_weights(how):
    model, inputs, base = adapted(*RECURRENT["LSTM"], init_lora_weights=how)  # which sees that it starts as it was
    lora.eject(model)
    assert_close(sequence(model["x"](*inputs)), sequence(base["x"](*inputs)))


@given(st.data())
@settings(deadline=None, max_examples=25)
def test_any_of_its_matrices_may_be_adapted_whatever_its_options(data):
    kind = data.draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    options = {name: data.draw(st.booleans(), label=name) for name in ("bias", "batch_first", "bidirectional")}
    options["num_layers"] = data.draw(st.integers(1, 3))
    if kind is nn.LSTM:
        options["proj_size"] = data.draw(st.integers(0, 3))
    base = nn.ModuleDict({"x": kind(6, 4, **options)}).double().requires_grad_(False)
    matrices = [name for name, weight in base.named_parameters() if weight.dim() == 2]
    some = data.draw(st.lists(st.sampled_from(matrices), min_size=1, unique=True))
    model = copy.deepcopy(base)
    lora.inject(model, target_parameters=some, r=2, lora_alpha=4)
    moved(model)
    assert {*adapters(model)} == {*some}
    x = X.double()
    y = sequence(model["x"](x))
    assert_close(y, sequence(by_hand(model, base)(x)))
    y.sum().backward()
    assert not lora.check(model).idle


def test_what_it_keeps_in_its_list_stays_its_own():
    model, (x,), _ = adapted(*RECURRENT["LSTM"])
    lstm = model["x"]
    y = sequence(lstm(x))
    for change in (lstm.flatten_parameters, lambda: None, lambda: model.float().double()):
        change()
        assert_close(sequence(lstm(x)), y, 1e-5)
        own = dict(lstm.named_parameters())
        for name, kept, seen in zip(lstm._flat_weights_names, lstm._flat_weights, lstm._flat_weight_refs, strict=True):
            assert kept is own[name] is seen()


def test_dropout_is_refused_before_anything_is_changed():
    model = nn.ModuleDict({"lstm": nn.LSTM(6, 5), "cell": nn.GRUCell(6, 5), "head": nn.Linear(5, 2)})
    said = r"lstm.weight_ih_l0: `lora_dropout` \(=0.1\) must be 0 for a weight of an? LSTM"
    with pytest.raises(ValueError, match=said) as e:
        lora.inject(model, target_modules=["lstm", "cell", "head"], lora_dropout=0.1)
    for name in ("lstm.weight_hh_l0", "cell.weight_ih", "cell.weight_hh"):
        assert f"- {name}: `lora_dropout`" in str(e.value)
    assert "- head" not in str(e.value)
    assert not adapters(model)
    assert [type(module) for module in model.children()] == [nn.LSTM, nn.GRUCell, nn.Linear]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # a compiler's own look
def test_what_torch_does_not_compile_breaks_the_graph_and_is_right():
    model, (x,), _ = adapted(*RECURRENT["LSTM"])
    assert_close(sequence(torch.compile(model["x"], backend="eager")(x)), sequence(model["x"](x)))
    with pytest.raises(Exception, match="RNN, GRU, or LSTM"):
        torch.compile(nn.LSTM(6, 5), backend="eager", fullgraph=True)(X)


class Held(nn.Module):
    """Reads its parameters from a list, a tuple and a dict, where no name of theirs stands."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
        self.held = [self.first, {"within": (self.second, "second")}]

    def forward(self, x):
        return x @ self.held[0] @ self.held[1]["within"][0]


def test_parameters_that_are_read_from_where_else_a_module_holds_them_are_w():
    model = nn.ModuleDict({"x": Held()}).double()
    base = copy.deepcopy(model)
    lora.inject(model, target_parameters=["first", "second"], r=2, lora_alpha=4)
    moved(model)
    x, held = X.double(), model["x"]
    y = held(x)
    first = held.first + 2 * held.first_lora_B @ held.first_lora_A
    assert_close(y, x @ first @ (held.second + 2 * held.second_lora_B @ held.second_lora_A))
    y.sum().backward()
    assert not lora.check(model).idle
    assert held.held[0] is held.first
    assert held.held[1]["within"][0] is held.second
    assert_close(base["x"](x), x @ held.first @ held.second)


class Elsewhere(nn.Module):
    """Another module holds the parameter, which nobody can see."""

    def __init__(self):
        super().__init__()
        self.first, self.other = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 6)
        hidden = self.first
        self.read = lambda: hidden

    def forward(self, x):
        return self.other(x @ self.read())


def test_a_parameter_that_is_read_where_nobody_sees_it_is_named_after_a_step():
    model = nn.ModuleDict({"x": Elsewhere()})
    lora.inject(model, target_modules=["other"], target_parameters=["first"], r=2)
    model["x"](X).sum().backward()
    assert [*lora.check(model).idle] == ["x.first"]
