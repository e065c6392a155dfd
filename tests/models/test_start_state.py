"""State dicts of models whose adapters started from a part of their base weights: taken for the base by nobody."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import LAYERS
from test_start import IDS, Net, moved, pair
from torch import nn

import lora

RANDOM = torch.Generator().manual_seed(0)
WEIGHTS = ["tokens.weight", "qkv.weight", "conv.weight", "head.weight"]


def started(how="pissa"):
    return moved(pair(how)[1])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_the_plain_model_refuses_them_and_names_every_weight(how, strict):
    base = Net()
    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        base.load_state_dict(started(how).state_dict(), strict=strict)
    assert all(f"size mismatch for {name}: " in str(caught.value) for name in WEIGHTS)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_model_that_started_alike_loads_the_same_bits(how, assign, train, tmp_path):
    model = started(how).train(train)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = pair(how)[1].train(train)
    again.load_state_dict(torch.load(tmp_path / "state.pt"), assign=assign)
    for (name, got), expected in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(got, expected), name
    assert torch.equal(again(IDS), model(IDS))


def test_keys_are_the_pretrained_models_and_nothing_else_has_another_shape():
    model = started()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    state = model.state_dict()
    assert state.keys() == shapes.keys()
    assert [name for name, value in state.items() if value.shape != shapes[name]] == WEIGHTS
    assert all(state[name].shape == (1, *shapes[name]) for name in WEIGHTS)


def test_what_was_written_without_the_mark_still_loads():
    """State dicts of before there was one."""
    model, again = started(), pair("pissa")[1]
    again.load_state_dict({name: parameter.detach() for name, parameter in model.named_parameters()})
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize("how", [True, "gaussian", "eva", False])
def test_adapters_that_started_otherwise_refuse_them_and_stay_as_they_are(how):
    state, model = started().state_dict(), pair(how)[1]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="did not start so; load the pretrained weights, start alike") as caught:
        model.load_state_dict(state, strict=False)
    assert all(f"{name} is what a start such as PiSSA's left" in str(caught.value) for name in WEIGHTS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "bias" not in name)


def test_the_rest_of_another_weight_is_refused():
    model = started()
    with torch.no_grad():
        for name in WEIGHTS:
            model.get_parameter(name).add_(0.1)
    again = pair("pissa")[1]
    with pytest.raises(RuntimeError, match=r"qkv.weight is not what the adapter's start was taken out of"):
        again.load_state_dict(model.state_dict(), strict=False)


@pytest.mark.parametrize("undo", [lora.eject, lora.merge, lambda model: lora.initialize(model, True)])
def test_a_model_that_has_its_weights_back_writes_them_as_ever(undo):
    model, base = started(), Net()
    undo(model)
    base.load_state_dict(model.state_dict(), strict=False)
    for name in WEIGHTS:
        assert torch.equal(base.get_parameter(name), model.get_parameter(name))


def test_merged_weights_are_the_plain_models():
    model, base = started(), Net()
    base.load_state_dict(lora.merged_state_dict(model))
    torch.testing.assert_close(base(IDS), model(IDS))


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if not kind.startswith("Conv3d")])
def test_every_kind_is_told_apart(kind):
    cls, arguments, shape = LAYERS[kind]
    layer, plain = cls(**arguments, r=2), cls(**arguments)
    again = copy.deepcopy(layer)
    for one in (layer, again):
        lora.initialize(one, "pissa")
    with pytest.raises(RuntimeError, match="weight is what a start such as PiSSA's left"):
        plain.load_state_dict(layer.state_dict(), strict=False)
    moved(layer)
    again.load_state_dict(layer.state_dict())
    x = torch.randint(0, 7, shape) if cls is lora.Embedding else torch.randn(shape, generator=RANDOM)
    assert torch.equal(again(x), layer(x))


class Owner(nn.Module):
    """It keeps a matrix, or a stack of matrices, for itself."""

    def __init__(self, *shape):
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return x @ self.matrix.mT


@pytest.mark.parametrize("shape", [(8, 6), (3, 8, 6), (1, 8, 6)])
def test_a_parameter_of_an_owner_is_told_apart(shape):
    model, again, fresh, plain = (Owner(*shape) for _ in range(4))
    for one, how in ((model, "pissa"), (again, "pissa"), (fresh, True)):
        lora.inject(one, target_parameters=["matrix"], r=2, init_lora_weights=how)
    state = moved(model).state_dict()
    assert state["matrix"].shape == (1, *shape)
    with pytest.raises(RuntimeError, match="size mismatch for matrix"):
        plain.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match="matrix is what a start such as PiSSA's left"):
        fresh.load_state_dict(state)
    again.load_state_dict(state)
    x = torch.ones(2, 6)
    assert torch.equal(again(x), model(x))


# ---- for what works with state dicts in place, or with Parameters ------------------------------------------------


def test_the_parameters_themselves_have_their_own_shape():
    model = started()
    assert all(value is model.get_parameter(name) for name, value in model.state_dict(keep_vars=True).items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_dict_shares_memory_with_the_model_as_ever(tmp_path):
    model = started()
    assert all(value.data_ptr() == model.get_parameter(name).data_ptr() for name, value in model.state_dict().items())
    dcp.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    again = pair("pissa")[1]
    dcp.load(again.state_dict(), checkpoint_id=tmp_path, no_dist=True)  # in place
    assert torch.equal(again(IDS), model(IDS))
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        dcp.load(Net().state_dict(), checkpoint_id=tmp_path, no_dist=True)


def test_it_is_exported_as_ever():
    model = started().eval()
    exported = torch.export.export(model, (IDS,)).module()
    torch.testing.assert_close(exported(IDS), model(IDS))


def test_something_that_is_no_tensor_is_torchs_to_refuse():
    model = started()
    with pytest.raises(RuntimeError, match=r"expected torch\.Tensor or Tensor-like"):
        model.load_state_dict({**model.state_dict(), "qkv.weight": [1.0]})
