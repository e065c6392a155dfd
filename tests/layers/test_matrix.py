"""Any combination works: {kind of layer} × {start} × {rsLoRA} × {DoRA} × {dropout} × {bias}, injected, constructed.

Each is a knob on one equation, so what goes wrong shows with two of them: every two values meet, not every six.
"""

import copy
import itertools
import math
import pickle

import pytest
import torch
from conftest import LAYERS, example
from pairwise import pairwise
from torch import nn

import lora


def own_start(layer):
    """A start that a user wrote: an update of zero."""
    nn.init.uniform_(layer.lora_A, 0.1, 0.2)
    nn.init.uniform_(layer.lora_B, 0.1, 0.2)
    nn.init.zeros_(getattr(layer, layer.lora_starts_at_zero))


EXACT = {"kaiming": True, "gaussian": "gaussian", "a function": own_start}
WRITING = {name: name for name in ("pissa", "pissa_niter_4", "olora")}
STARTS = EXACT | {"orthogonal": "orthogonal"} | WRITING
RANKS = {"Conv2d factored": 4}  # in two groups
SWITCHES = ("rslora", "dora", "dropout", "bias")


def combinations():
    """(kind, start, a boolean for each switch, whether it is constructed): every two values that may meet do."""
    every = itertools.product(LAYERS, STARTS, *[(False, True)] * (len(SWITCHES) + 1))
    for row in pairwise(row for row in every if may_be(*row)):
        kind, start, use_rslora, use_dora, dropout, bias, is_constructed = row
        fields = {"use_rslora": use_rslora, "use_dora": use_dora, "lora_dropout": 0.3 * dropout}
        id = "-".join([kind, *itertools.compress(SWITCHES, row[2:6]), start])
        yield pytest.param(kind, fields, bias, start, id=id), is_constructed


def may_be(kind, start, use_rslora, use_dora, dropout, bias, is_constructed):
    # A layer of torch's with a transposed weight can be constructed alone.
    return (kind != "Embedding" or not (dropout or bias)) and (kind != "Linear transposed" or is_constructed)


ALL = list(combinations())
INJECTED = [case for case, _ in ALL if case.values[0] != "Linear transposed"]
CONSTRUCTED = [case for case, is_constructed in ALL if is_constructed]
# One of each kind, of all starts, with each switch both ways.
COMPILED = [
    next(case for case, _ in ALL if (case.values[0], case.values[3]) == (kind, start))
    for kind, start in zip(LAYERS, itertools.cycle(STARTS))
]


def arguments_of(kind, bias):
    arguments = dict(LAYERS[kind][1], dtype=torch.float64)
    return arguments if kind == "Embedding" else arguments | {"bias": bias}


def pretrained(kind, bias):
    """The model before LoRA, in plain torch layers."""
    cls = LAYERS[kind][0]
    ours = {"splits", "enable_lora", "factored", "fan_in_fan_out"}
    arguments = {name: value for name, value in arguments_of(kind, bias).items() if name not in ours}
    return nn.Sequential(cls.lora_base_class(**arguments)).eval()


def injected(base, kind, fields, start):
    model, arguments = copy.deepcopy(base), LAYERS[kind][1]
    fused = {name: {"0": arguments[name]} for name in ("splits", "enable_lora") if name in arguments}
    fields = {**fields, **fused, "factored": arguments.get("factored", False)}
    torch.manual_seed(1)
    lora.inject(
        model, target_modules=["0"], r=RANKS.get(kind, 2), lora_alpha=3, init_lora_weights=STARTS[start], **fields
    )
    return model.eval()


def constructed(base, kind, fields, bias, start):
    arguments = dict(arguments_of(kind, bias), r=RANKS.get(kind, 2), lora_alpha=3, **fields)
    if kind == "Embedding":
        del arguments["lora_dropout"]
    model = nn.Sequential(LAYERS[kind][0](**arguments))
    state = base.state_dict()
    if arguments.get("fan_in_fan_out"):
        state["0.weight"] = state["0.weight"].T.contiguous()
    model.load_state_dict(state, strict=False)
    lora.mark_only_lora_as_trainable(model)
    torch.manual_seed(1)
    lora.initialize(model, STARTS[start])
    return model.eval()


@torch.no_grad()
def train(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.3)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def same(start):
    """How a start compares: to the bit, or where the base weight is written to rounding."""
    return (
        (lambda got, expected: torch.testing.assert_close(got, expected, rtol=0, atol=0)) if start in EXACT else close
    )


@pytest.mark.parametrize(("kind", "fields", "bias", "start"), INJECTED)
def test_injected(kind, fields, bias, start, tmp_path):
    base, x = pretrained(kind, bias), example(kind, torch.float64)
    before, model = base(x), injected(base, kind, fields, start)
    same(start)(model(x), before)
    if start in EXACT:
        same(start)(model.train()(x), before)
    assert torch.equal(model[0].weight, base[0].weight) == (start not in WRITING)
    scale = 3 / (math.sqrt(model[0].r) if fields["use_rslora"] else model[0].r)
    assert model[0].scaling == pytest.approx(scale)

    train(model)
    model.train()(x).square().sum().backward()
    for name, parameter in model[0].lora_parameters():
        assert parameter.grad.any(), name
    after = model.eval()(x)
    assert (after - before).abs().max() > 1e-3

    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(x), after)
    lora.save_adapter(model, tmp_path / "a")
    plain, again = copy.deepcopy(base), injected(base, kind, fields, start)
    for other in (plain, again):
        lora.load_adapter(other, tmp_path / "a")
        close(other.eval()(x), after)

    with lora.disabled(model):
        same(start)(model(x), before)
    merged = copy.deepcopy(model)
    lora.merge(merged)
    assert type(merged[0]) is type(base[0])
    close(merged(x), after)
    lora.eject(model)
    assert type(model[0]) is type(base[0])
    for name, tensor in base.state_dict().items():
        same(start)(model.state_dict()[name], tensor)


@pytest.mark.parametrize(("kind", "fields", "bias", "start"), CONSTRUCTED)
def test_constructed(kind, fields, bias, start):
    base, x = pretrained(kind, bias), example(kind, torch.float64)
    before, model = base(x), constructed(base, kind, fields, bias, start)
    # A transposed weight is read in another order, and summed in it.
    compare = close if kind == "Linear transposed" else same(start)
    compare(model(x), before)
    train(model)
    after = model(x)
    assert (after - before).abs().max() > 1e-3
    with torch.no_grad():
        close(model(x), after)  # from the merged weight
        close(pickle.loads(pickle.dumps(model))(x), after)
    with lora.disabled(model):
        compare(model(x), before)
    merged = copy.deepcopy(model)
    lora.merge(merged)
    close(merged(x), after)
    lora.eject(model)
    for name, tensor in base.state_dict().items():
        same(start)(model.state_dict()[name], tensor)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("kind", "fields", "bias", "start"), COMPILED)
def test_no_graph_breaks(kind, fields, bias, start):
    torch._dynamo.reset()
    base, x = pretrained(kind, bias), example(kind, torch.float64)
    model = constructed(base, kind, fields, bias, start)
    train(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x), model(x))
    compiled.train()(x).sum().backward()
    assert all(parameter.grad is not None for _, parameter in model[0].lora_parameters())


def test_what_is_compiled_is_of_every_sort():
    values = [case.values for case in COMPILED]
    assert {kind for kind, *_ in values} == set(LAYERS)
    assert {start for *_, start in values} == set(STARTS)
    switches = [(*map(bool, fields.values()), bias) for _, fields, bias, _ in values]
    assert all({False, True} == set(switch) for switch in zip(*switches, strict=True))
