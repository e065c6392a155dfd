"""A compiled model with a bank: right for whatever adapters the rows have, in one graph that is made once."""

import copy

import pytest
import torch
from conftest import KINDS, LAYERS
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import lora

LINEARS = ["0", "2"]


class Compiled:
    """A model that is compiled in one graph, and how often it was. (`eager` runs what was traced as it is.)"""

    def __init__(self, model, backend="eager", **options):
        torch._dynamo.reset()
        counters.clear()
        self.counter = CompileCounterWithBackend(backend)
        self.function = torch.compile(model, fullgraph=True, backend=self.counter, **options)

    def __call__(self, *inputs):
        return self.function(*inputs)

    @property
    def times(self):
        assert not counters["graph_break"]
        return self.counter.frame_count


def base_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6)).double()


def config(r, modules=LINEARS, **settings):
    return lora.LoraConfig(target_modules=modules, r=r, lora_alpha=2 * r + 1, init_lora_weights=False, **settings)


def alone(base, adapter, x):
    """What a plain model with one adapter makes of some rows: its output, and its gradients of the sum of squares."""
    model = copy.deepcopy(base).requires_grad_(False)
    if adapter is not None:
        lora.load_adapter(model, adapter)
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return y.detach(), torch.autograd.grad(y.square().sum(), trained) if trained else []


def check(base, bank, compiled, x, names, **how):
    """Output and gradients of a compiled model, against plain models with one adapter each."""
    for name in bank:
        for parameter in bank.parameters(name):
            parameter.grad = None
    with bank.rows(names, **how) if isinstance(names, list) else bank.use(names):
        y = compiled(x)
    y.square().sum().backward()
    n, tokens, _ = x.shape
    rows = names if isinstance(names, list) else [names] * n
    owners = [owner for row in rows for owner in (row if isinstance(row, list) else [row] * tokens)]
    for name in (*bank, None):
        own = torch.tensor([owner == name for owner in owners])
        parameters = [] if name is None else bank.parameters(name)
        if not own.any():
            assert all(parameter.grad is None for parameter in parameters), f"{name} has no rows"
            continue
        expected, grads = alone(base, None if name is None else bank[name], x.flatten(0, 1)[own])
        torch.testing.assert_close(y.detach().flatten(0, 1)[own], expected)
        for parameter, grad in zip(parameters, grads, strict=True):
            own_part = parameter.grad[tuple(map(slice, grad.shape))]
            torch.testing.assert_close(own_part, grad)
            assert parameter.grad.count_nonzero() == own_part.count_nonzero(), "what is zero stays zero"


def banked(base, adapters, **room):
    model = copy.deepcopy(base)
    return model, lora.bank(model, adapters, **room)


def test_within_its_room_nothing_is_compiled_again_for_other_rows_names_and_adapters():
    base = base_model()
    adapters = {"a": config(2, use_dora=True), "b": config(3, use_rslora=True), "c": config(1, ["2"])}
    model, bank = banked(base, adapters, room=3, max_r=4)
    compiled = Compiled(model, dynamic=True)
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    for names in (["a", "b", None, "c", "a", "b"], ["c"] * 6, [None] * 6, ["b", "a", "a", None, None, "a"]):
        check(base, bank, compiled, x, names)
    assert compiled.times == 1
    check(base, bank, compiled, x[:4], ["a", "b", None, "c"])
    assert compiled.times == 1
    for name in ("b", "a", None, "c"):
        check(base, bank, compiled, x, name)
    assert compiled.times == 2  # one for all rows, one for each row its own
    bank["d"] = config(4)
    check(base, bank, compiled, x, ["d", "a", "d", None, "b", "b"])
    check(base, bank, compiled, x, "d")
    del bank["a"]
    bank["b"] = config(2, ["0"])
    check(base, bank, compiled, x, ["d", "c", "b", None, "b", "b"])
    for name in [*bank]:
        del bank[name]
    bank["e"] = config(2)
    check(base, bank, compiled, x, ["e", None] * 3)
    check(base, bank, compiled, x, "e")
    assert compiled.times == 2


@pytest.mark.slow
def test_more_adapters_in_a_batch_than_there_is_room_for_are_compiled_once_more():
    base = base_model()
    model, bank = banked(base, {name: config(r) for r, name in enumerate("abc", 1)}, room=2, max_r=3)
    compiled = Compiled(model, dynamic=True)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    check(base, bank, compiled, x, ["a", "b", "b"])
    check(base, bank, compiled, x, ["c", "b", "a"])
    assert compiled.times == 2
    check(base, bank, compiled, x, ["c", "a", "a"])
    check(base, bank, compiled, x, ["b", "c", "a"])
    assert compiled.times == 2


@pytest.mark.slow
def test_without_room_other_rows_and_names_compile_nothing_again_and_other_adapters_do():
    base = base_model()
    model, bank = banked(base, {"a": config(2), "b": config(3, use_dora=True), "c": config(1, ["2"])})
    compiled = Compiled(model, dynamic=True)
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    for names in (["a", "b", None, "c"], ["c"] * 4, [None, "a", "b", "b"]):
        check(base, bank, compiled, x, names)
    assert compiled.times == 1
    for name in ("a", "c", None):
        check(base, bank, compiled, x, name)
    assert compiled.times == 2
    bank["d"] = config(5)
    check(base, bank, compiled, x, ["d", "b", None, "c"])
    assert compiled.times == 3


@pytest.mark.slow
@pytest.mark.parametrize("room", [{}, {"room": 2, "max_r": 3}], ids=["as it is", "room"])
def test_each_token_may_have_an_adapter_of_its_own(room):
    base = base_model()
    model, bank = banked(base, {"a": config(2), "b": config(3, use_dora=True)}, **room)
    compiled = Compiled(model, dynamic=True)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    check(base, bank, compiled, x, [["a", "b", None], ["b", "b", "a"]], per="token")
    check(base, bank, compiled, x, [["a", "a", "a"], [None, None, "a"]], per="token")
    assert compiled.times == 1
    names = ["a", None, "b", "b", "a", "b"]  # of tokens that a model has flattened
    check(base, bank, Compiled(model), x.view(6, 1, 8), names)
    with bank.rows(["a", None, "b"], flattened=True):
        torch.testing.assert_close(Compiled(model)(x.view(6, 8)), model(x.view(6, 8)))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "Conv2d factored"])
def test_every_kind_of_layer_is_compiled_with_its_rows_adapters(kind, use_dora):
    cls, arguments, shape = LAYERS[kind]
    plain = {name: value for name, value in arguments.items() if name not in ("factored", "splits", "enable_lora")}
    own = {name: value for name, value in arguments.items() if name in ("factored", "splits", "enable_lora")}
    base = nn.Sequential(getattr(nn, cls.__name__.replace("Merged", ""))(**plain, dtype=torch.float64))
    own = {name: value if name == "factored" else {"0": value} for name, value in own.items()}
    settings = {**own, "use_dora": use_dora}
    model, bank = banked(base, {"a": config(2, ["0"], **settings), "b": config(4, ["0"], **own)}, room=2, max_r=4)
    x = torch.randint(7, (4, 3)) if kind == "Embedding" else torch.randn(4, *shape[1:], dtype=torch.float64)
    compiled, names = Compiled(model), ["b", "a", None, "b"]
    with bank.rows(names):
        y = compiled(x)
    assert compiled.times == 1
    y.square().sum().backward()
    for name in (None, "a", "b"):
        rows = [n for n, each in enumerate(names) if each == name]
        expected, grads = alone(base, None if name is None else bank[name], x[rows])
        torch.testing.assert_close(y.detach()[rows], expected)
        for parameter, grad in zip(bank.parameters(name) if name else (), grads, strict=True):
            if parameter.shape == grad.shape:  # the others have room
                torch.testing.assert_close(parameter.grad, grad)
        if name:
            with bank.use(name):
                torch.testing.assert_close(compiled(x[rows]).detach(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("per", ["row", "token"])
def test_what_is_not_finite_stays_with_its_row_and_its_adapter():
    base = base_model()
    model, bank = banked(base, {"a": config(2, use_dora=True), "b": config(3, use_dora=True)}, room=3, max_r=4)
    with torch.no_grad():
        bank.parameters("b")[0].fill_(float("nan"))
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    x[2] = float("inf")  # of the row without an adapter
    x.requires_grad_()
    names = ["a", "b", None]
    with bank.rows(names if per == "row" else [[name] * 2 for name in names], per=per):
        y = Compiled(model, backend="aot_eager")(x)
    y.square().sum().backward()
    assert y[1].isnan().all()
    torch.testing.assert_close(y.detach()[2], base(x.detach()[2]).detach(), equal_nan=True)
    expected, grads = alone(base, bank["a"], x.detach()[:1])
    torch.testing.assert_close(y.detach()[:1], expected)
    assert x.grad[0].isfinite().all()
    for parameter, grad in zip(bank.parameters("a"), grads, strict=True):
        torch.testing.assert_close(parameter.grad[tuple(map(slice, grad.shape))], grad)
