"""DESIGN's seven invariants, for every kind of layer, and the merged weight that is a cache."""

import copy
import io
import re
import weakref
from contextlib import nullcontext

import pytest
import torch
from conftest import DTYPES, KINDS, STORED, WITH_DROPOUT, assert_equation, example, make, plain_twin, randomised
from counting import Operations
from pairwise import every_two
from torch import nn

import lora

each_kind = pytest.mark.parametrize("kind", KINDS)
BASES = {"Linear": nn.Linear, "MergedLinear": nn.Linear, "Embedding": nn.Embedding}
BASES |= {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d}


def bits(tensor):
    """What a tensor holds, to the bit: zeros with another sign are another thing."""
    return tensor.detach().contiguous().view(torch.uint8).clone()


def served(layer, x):
    """The output in eval() without gradients, where the merged weight serves it."""
    layer.eval()
    with torch.no_grad():
        return layer(x)


# ---- 1. the base weight is never written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.bfloat16) for kind in KINDS), *(("Linear", dtype) for dtype in DTYPES if dtype != torch.bfloat16)],
)
def test_a_thousand_toggles_while_a_and_b_move_leave_the_base_bit_identical(kind, dtype):
    layer, x = make(kind, dtype=dtype), example(kind, dtype)
    before, address, (A, B) = bits(layer.weight), layer.weight.data_ptr(), (layer.lora_A, layer.lora_B)
    with torch.no_grad():
        for step in range(1000):
            layer.train(step % 2 == 0)
            A.mul_(-0.99)
            B.add_(0.01)
            if step % 100 < 2:  # a forward pass in each of the modes
                layer(x)
    assert torch.equal(bits(layer.weight), before)
    assert layer.weight.data_ptr() == address


@each_kind
def test_neither_forward_nor_backward_nor_disabling_writes_the_base(kind):
    layer, x = make(kind), example(kind)
    before, version = bits(layer.weight), layer.weight._version
    for training in (True, False):
        layer.train(training)(x).sum().backward()
        with torch.no_grad():
            layer(x)
        with lora.disabled(layer):
            layer(x)
    assert torch.equal(bits(layer.weight), before)
    assert layer.weight._version == version


@each_kind
@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_no_state(kind, training):
    layer, x = make(kind).train(training), example(kind)
    state = {key: (id(value), value._version, bits(value)) for key, value in layer.state_dict(keep_vars=True).items()}
    layer(x)
    after = {key: (id(value), value._version, bits(value)) for key, value in layer.state_dict(keep_vars=True).items()}
    for key in state:
        assert after[key][:2] == state[key][:2], key
        assert torch.equal(after[key][2], state[key][2]), key
    assert layer.training == training
    assert all(parameter.grad is None for parameter in layer.parameters())


# ---- 2. load(save(model)) is the same function ------------------------------------------------------------------


@each_kind
def test_the_state_dict_of_eval_holds_the_base_weight(kind):
    layer, x = make(kind), example(kind)
    before = bits(layer.weight)
    served(layer, x)
    assert torch.equal(bits(layer.state_dict()["weight"]), before)


@every_two(kind=KINDS, saved_in=["train", "eval", "served", "disabled"], loaded_in=["train", "eval", "served"])
def test_what_is_saved_in_any_mode_loads_in_any_mode_as_the_same_function(kind, saved_in, loaded_in):
    layer, fresh, x = make(kind), make(kind), example(kind)
    expected = layer(x).detach()
    for one, mode in ((layer, saved_in), (fresh, loaded_in)):
        one.train(mode == "train")
        if mode == "served":
            served(one, x)
    file = io.BytesIO()
    with lora.disabled(layer) if saved_in == "disabled" else nullcontext():
        torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file), strict=True)
    for output in (fresh(x), served(fresh, x), fresh.train()(x)):
        torch.testing.assert_close(output, expected)


# ---- 3. the keys are the pretrained model's, 4. a layer is its base, 5. and is adapted in place -----------------


@every_two(kind=KINDS, r=[0, 2], training=[True, False])
def test_its_keys_are_the_bases_and_lora_a_and_lora_b_and_there_are_no_children(kind, r, training):
    layer = make(kind, r=r, **({"lora_dropout": 0.1} if kind in WITH_DROPOUT else {})).train(training)
    base = ["weight"] if kind == "Embedding" else ["weight", "bias"]
    assert list(layer.state_dict()) == base + (["lora_A", "lora_B"] if r else [])
    assert list(layer.children()) == []
    assert list(layer.buffers()) == []


@each_kind
@pytest.mark.parametrize("r", [0, 2])
def test_a_layer_is_an_instance_of_its_base_class_and_a_lora_layer(kind, r):
    layer = make(kind, r=r)
    assert isinstance(layer, BASES[kind.split()[0]])
    assert isinstance(layer, lora.LoRALayer)


@each_kind
def test_a_model_is_adapted_in_place_and_given_back(kind):
    plain = plain_twin(make(kind, r=0))
    model, x = nn.Sequential(plain).eval(), example(kind, torch.float64)
    weight, calls, expected = plain.weight, [], model(x)
    plain.register_forward_hook(lambda *_: calls.append(1))
    lora.inject(model, target_modules=["0"], r=2)
    assert model[0] is plain
    assert isinstance(plain, lora.LoRALayer)
    assert (plain.weight is weight, plain.training, plain.weight.dtype) == (True, False, torch.float64)
    torch.testing.assert_close(model(x), expected)
    randomised(plain)
    assert not torch.allclose(model(x), expected)
    with lora.disabled(model):
        assert torch.equal(model(x), expected)
    lora.eject(model)
    assert torch.equal(model(x), expected)
    assert len(calls) == 4
    assert type(plain) is BASES[kind.split()[0]]


# ---- 6. nothing is a silent no-op -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_everything_that_would_do_nothing_is_in_one_error_and_nothing_is_done():
    model = nn.ModuleDict({"attention": nn.ModuleDict({"out_proj": nn.Linear(4, 0)})})
    model.update({"up": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    with pytest.raises(ValueError, match="nothing was changed") as error:
        lora.inject(model, target_modules=["up", "dwn", "out_proj", "norm"], exclude_modules=["head"], r=2)
    for offender in ("'dwn'", "attention.out_proj", "norm", "'head'"):
        assert re.search(offender, str(error.value)), offender
    assert type(model["up"]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


@each_kind
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_state_dict_that_does_not_fit_raises(kind, change):
    layer = make(kind)
    state = dict(layer.state_dict())
    if change == "missing":
        del state["lora_A"]
    elif change == "unexpected":
        state["lora_C"] = torch.ones(1)
    else:
        state["lora_A"] = torch.ones(1, 1)
    with pytest.raises(RuntimeError, match="lora_C" if change == "unexpected" else "lora_A"):
        layer.load_state_dict(state, strict=True)


# ---- 7. the fast path equals the plain path ---------------------------------------------------------------------


@every_two(kind=STORED, dtype=DTYPES, mode=["train", "eval", "served"])
def test_every_path_computes_the_equation_in_every_dtype(kind, dtype, mode):
    layer, x = make(kind, dtype=dtype).train(mode == "train"), example(kind, dtype)
    with torch.set_grad_enabled(mode != "served"):
        assert_equation(layer, x)


@each_kind
def test_the_plain_path_gives_the_same_gradients(kind):
    layer, x = make(kind, dtype=torch.float64), example(kind, torch.float64)
    got = torch.autograd.grad(layer(x).square().sum(), [layer.lora_A, layer.lora_B])
    plain = lora.LoRALayer.lora_forward(layer, x)
    torch.testing.assert_close(got, torch.autograd.grad(plain.square().sum(), [layer.lora_A, layer.lora_B]))


# ---- the merged weight is a cache -------------------------------------------------------------------------------

CHANGES = {
    "A in place": lambda layer: layer.lora_A.mul_(2),
    "B in place": lambda layer: layer.lora_B.mul_(2),
    "W in place": lambda layer: layer.weight.mul_(2),
    "one value of W in place": lambda layer: layer.weight.view(-1)[1].add_(1),
    "A through .data": lambda layer: layer.lora_A.data.mul_(2),
    "one value of A through .data": lambda layer: layer.lora_A.data.view(-1)[-1].add_(1),
    "B through .data": lambda layer: layer.lora_B.data.mul_(2),
    "W through .data": lambda layer: layer.weight.data.mul_(2),
    "A's .data": lambda layer: setattr(layer.lora_A, "data", layer.lora_A.data * 2),
    "W's .data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "A replaced": lambda layer: setattr(layer, "lora_A", nn.Parameter(layer.lora_A * 2)),
    "W replaced": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2, False)),
    "A by numpy": lambda layer: layer.lora_A.detach().numpy().fill(1),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
    "load_state_dict by assignment": lambda layer: layer.load_state_dict(
        {k: v * 2 for k, v in layer.state_dict().items()}, assign=True
    ),
    "optimizer": lambda layer: _step(layer),
    "reset": lambda layer: (layer.reset_lora_parameters(), randomised(layer)),
}


def _step(layer):
    for parameter in (layer.lora_A, layer.lora_B):
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.5, fused=True).step()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("Linear", change) for change in CHANGES),
        *(
            (kind, change)
            for kind in ("Linear transposed", "MergedLinear", "Embedding", "Conv2d factored")
            for change in ("A in place", "B in place", "W in place", "W replaced")
        ),
    ],
)
def test_in_eval_a_change_counts_at_the_next_call(kind, change):
    layer, x = make(kind), example(kind)
    before = served(layer, x)
    with torch.no_grad():
        CHANGES[change](layer)
    after = served(layer, x)
    assert not torch.allclose(after, before)
    assert_equation(layer, x)


@each_kind
def test_the_merged_weight_is_computed_once_and_kept(kind):
    layer, x = make(kind), example(kind)
    served(layer, x)
    first = layer.lora_merged_weight()
    served(layer, x)
    assert layer.lora_merged_weight() is first
    assert first is not layer.weight
    assert not first.requires_grad


@each_kind
def test_served_from_it_a_layer_computes_no_more_than_its_base(kind):
    layer, x = make(kind), example(kind)
    served(layer, x)
    with Operations() as ours:
        served(layer, x)
    with Operations() as theirs, torch.no_grad():
        layer.lora_base_forward(x)
    with Operations() as trained:
        layer(x)
    assert ours.flops == theirs.flops < trained.flops


@pytest.mark.parametrize("change", [lambda layer: layer.train(), lambda layer: layer.double()])
def test_train_and_a_change_of_dtype_drop_the_merged_weight_and_eval_alone_computes_none(change):
    layer, x = make("Linear"), example("Linear")
    served(layer, x)
    kept = weakref.ref(layer.lora_merged_weight())
    change(layer)
    assert kept() is None
    layer.eval()
    assert layer._merged is None


def test_without_merge_weights_no_merged_weight_is_kept():
    layer, x = make("Linear", merge_weights=False), example("Linear")
    served(layer, x)
    assert layer._merged is None
    assert_equation(layer, x)


@pytest.mark.parametrize("kind", STORED)
def test_the_merged_weight_is_rounded_once_from_a_sum_in_float32(kind):
    layer = make(kind, dtype=torch.bfloat16, r=4)
    served(layer, example(kind, torch.bfloat16))
    exact = plain_twin(layer).weight
    exact = exact.T if kind == "Linear transposed" else exact
    torch.testing.assert_close(layer.lora_merged_weight(), exact.bfloat16(), rtol=0, atol=0)


@each_kind
def test_a_copy_of_a_served_layer_follows_its_own_adapter(kind):
    layer, x = make(kind), example(kind)
    before = served(layer, x)
    other = randomised(copy.deepcopy(layer))
    assert not torch.allclose(served(other, x), before)
    assert torch.equal(served(layer, x), before)


@each_kind
def test_train_and_eval_return_the_layer(kind):
    layer = make(kind)
    assert layer.train() is layer
    assert layer.eval() is layer
    assert layer.train(False) is layer
