"""A compiled model with a bank: right for whatever adapters the rows have, in one graph that is made once."""

import copy

import pytest
import torch
from compiled import Compiled
from conftest import KINDS, LAYERS
from releases import through_a_compiler
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora

LINEARS = ["0", "2"]


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


def test_rows_names_and_adapters_of_one_layer_come_and_go_in_two_graphs():
    base = nn.Sequential(nn.Linear(8, 6)).double()
    model, bank = banked(base, {"a": config(2, ["0"]), "b": config(3, ["0"])}, room=2, max_r=3)
    compiled, x = Compiled(model), torch.randn(3, 2, 8, dtype=torch.float64)
    check(base, bank, compiled, x, ["a", "b", None])
    check(base, bank, compiled, x, ["b", "b", "b"])
    check(base, bank, compiled, x, "a")
    check(base, bank, compiled, x, None)
    bank["c"] = config(1, ["0"])
    del bank["a"]
    with pytest.raises(ValueError, match=r"`max_r` .=3. must be at least its rank, 4"):
        bank["d"] = config(4, ["0"])
    check(base, bank, compiled, x, ["b", None, "c"])
    check(base, bank, compiled, x, "c")
    spares = [spare for spares in model[0].lora_slots.spares.values() for spare in spares]
    assert spares
    assert all(parameter.grad is None for spare in spares for parameter in spare.parameters())
    assert compiled.times == 2  # one for all rows, one for each row its own


@pytest.mark.slow
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
    assert compiled.times == 2
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
    names = ["a", None, "b", "b", "a", "b"]
    check(base, bank, Compiled(model), x.view(6, 1, 8), names)
    for given, tokens, how in (  # flattened; packed into one row; all of them, row by row
        ([names[:3], names[3:]], x.view(6, 8), {"per": "token"}),
        (names, x.view(1, 6, 8), {"per": "token"}),
        (names[:3], x.view(6, 8), {"flattened": True}),
    ):
        with bank.rows(given, **how):
            torch.testing.assert_close(Compiled(model)(tokens), model(tokens))


@pytest.mark.sampled(1)
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
def test_what_is_not_finite_stays_with_its_row_and_its_adapter(per):
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


# ---- training ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_adapter_without_rows_does_not_move_and_others_train_as_if_alone():
    base = base_model()
    adapters = {"a": lora.LoraConfig(target_modules=LINEARS, r=2), "b": lora.LoraConfig(target_modules=LINEARS, r=3)}
    model, bank = banked(base, adapters, room=2, max_r=4)
    start = {name: copy.deepcopy(bank[name]) for name in bank}
    compiled = Compiled(model, dynamic=True)
    optimizers = [torch.optim.AdamW(bank.parameters(name), lr=0.05, weight_decay=0.5) for name in bank]
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    names = [["a", "a", None], ["a", "b", "a"], ["a", None, "a"]]
    for each in names:
        with bank.rows(each):
            compiled(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert compiled.times == 1
    for name in "ab":
        plain = copy.deepcopy(base).requires_grad_(False)
        lora.load_adapter(plain, start[name])
        optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.05, weight_decay=0.5)
        for each in names:
            own = [n for n, owner in enumerate(each) if owner == name]
            if own:
                plain(x[own]).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        expected = lora.adapter_of(plain)
        assert bank[name].modules["0"]["r"] == expected.modules["0"]["r"]
        # Adam divides by the root of a square, which makes more of the rounding: 1e-8 beside gradients near zero.
        torch.testing.assert_close(
            {key: value.detach() for key, value in bank[name].tensors.items()},
            {key: value.detach() for key, value in expected.tensors.items()},
            rtol=1e-6,
            atol=1e-8,
        )


@pytest.mark.parametrize("per", ["row", pytest.param("token", marks=pytest.mark.slow)])
def test_each_row_is_dropped_with_its_adapters_probability(per):
    base = nn.Sequential(nn.Linear(64, 64, bias=False)).double()
    model, bank = banked(base, {"a": config(64, ["0"], lora_dropout=0.5), "b": config(64, ["0"])}, room=2, max_r=64)
    with torch.no_grad():
        model[0].weight.zero_()
        for name in bank:
            for parameter in bank.parameters(name):
                parameter.copy_(torch.eye(64))
    compiled, names = Compiled(model), ["a", "b", None, "a"]
    with bank.rows(names if per == "row" else [[name] * 50 for name in names], per=per):
        s = 129 / 64
        y = compiled(torch.ones(4, 50, 64, dtype=torch.float64)) / s
        dropped = y[[0, 3]]
        assert {*dropped.flatten().tolist()} == {0.0, 2.0}  # 6,400 of them: six standard deviations are 0.0375
        assert dropped.mean().item() == pytest.approx(1, abs=0.0375 * 2)
        assert not torch.equal(*dropped)
        assert bool((y[1] == 1).all())
        assert bool((y[2] == 0).all())
        model.eval()
        assert bool((compiled(torch.ones(4, 50, 64, dtype=torch.float64))[[0, 1, 3]] / s == 1).all())
    assert compiled.times == 2  # training, evaluating


# ---- blocks -----------------------------------------------------------------------------------------------------


def test_blocks_within_blocks_and_what_is_told_to_a_compiled_model():
    base = base_model()
    model, bank = banked(base, {"a": config(2), "b": config(3)}, room=2, max_r=4)
    compiled, x = Compiled(model), torch.randn(2, 3, 8, dtype=torch.float64)
    with bank.use("a"):
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected)
        with bank.use("b"):
            torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x), expected)
        bank["a"] = config(4)  # within the block
        assert not torch.allclose(compiled(x), expected)
        torch.testing.assert_close(compiled(x), model(x))
        with torch.no_grad():
            for parameter in bank.parameters("a"):
                parameter.mul_(2)
        torch.testing.assert_close(compiled(x), model(x))
        bank.load("a", copy.deepcopy(bank["a"]))
        torch.testing.assert_close(compiled(x), model(x))
    model[0].scaling = 0.5
    with bank.use("a"):
        torch.testing.assert_close(compiled(x), model(x))
    assert compiled.times == 1
    with pytest.raises(RuntimeError, match="no adapter is chosen"):
        compiled(x)


@pytest.mark.slow
def test_lora_disabled_copies_and_what_is_left_when_the_bank_is_taken_out():
    base = base_model()
    model, bank = banked(base, {"a": config(2), "b": config(3)}, room=2, max_r=4)
    compiled, x = Compiled(model), torch.randn(2, 3, 8, dtype=torch.float64)
    with bank.use("a"):
        expected = compiled(x)
        with lora.disabled(model):
            torch.testing.assert_close(compiled(x), base(x))
        torch.testing.assert_close(compiled(x), expected)
    twin = copy.deepcopy(model)
    others = lora.bank(twin)
    with torch.no_grad():
        others.parameters("a")[0].zero_()
    with others.use("a"), bank.use("a"):
        torch.testing.assert_close(Compiled(twin)(x), twin(x))
        torch.testing.assert_close(compiled(x), expected)
    bank.keep("b")
    torch.testing.assert_close(compiled(x), model(x))
    assert lora.adapter_of(model).modules["0"]["r"] == 3


@pytest.mark.slow
def test_blocks_of_a_model_that_are_compiled_one_by_one_share_their_graphs():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(12))).double()
    bank = lora.bank(model, {"a": config(2, "all-linear"), "b": config(3, "all-linear")}, room=2, max_r=4)
    blocks = {"rows": lambda: bank.rows(["a", None, "b"]), "all": lambda: bank.use("b")}
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    expected = {}
    for name, block in blocks.items():
        with block():
            expected[name] = model(x)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for module in model:
        module.compile(fullgraph=True, backend=counter)
    for name, block in blocks.items():
        with block():
            torch.testing.assert_close(model(x), expected[name])
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler asks for it, where a graph breaks
def test_attention_in_a_bank_is_computed_as_it_is_beside_what_is_compiled():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.up = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 6)

        def forward(self, x):
            return self.up(self.attention(x, x, x)[0])

    torch.manual_seed(0)
    model = Block()
    settings = config(2, ["up"], target_parameters=["attention.in_proj_weight"])
    bank = lora.bank(model, {"a": settings, "b": settings}, room=2, max_r=2)
    x = torch.randn(3, 4, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for block in (lambda: bank.use("b"), lambda: bank.rows(["b", None, "a"])):
        with block():
            torch.testing.assert_close(compiled(x), model(x))
    said = through_a_compiler("cannot be compiled with a bank")
    with bank.use("a"), pytest.raises(torch._dynamo.exc.Unsupported, match=said):
        Compiled(model)(x)


def test_rows_that_are_not_the_batch_are_named():
    model, bank = banked(base_model(), {"a": config(2)}, room=2, max_r=4)
    said = through_a_compiler("0: the input of this layer has not")
    with bank.rows(["a"] * 3), pytest.raises(torch._dynamo.exc.Unsupported, match=said):
        Compiled(model)(torch.randn(2, 8, dtype=torch.float64))


# ---- room -------------------------------------------------------------------------------------------------------


def test_adapters_and_their_files_have_ranks_of_their_own_in_a_bank_with_room(tmp_path):
    base = base_model()
    model, bank = banked(base, {"a": config(2), "b": config(3, use_dora=True)}, room=2, max_r=4)
    assert [tuple(p.shape) for p in bank.parameters("a")] == [(4, 8), (12, 4), (4, 12), (6, 4)]
    assert [bank[name].modules["2"]["r"] for name in bank] == [2, 3]
    bank.save("b", tmp_path / "b.safetensors")
    plain = copy.deepcopy(base)
    lora.load_adapter(plain, tmp_path / "b.safetensors")
    assert tuple(plain[0].lora_A.shape) == (3, 8)
    x = torch.randn(2, 8, dtype=torch.float64)
    with bank.use("b"):
        torch.testing.assert_close(model(x), plain(x))
    other = copy.deepcopy(base)
    lora.inject(other, config(4))
    bank.load("a", lora.adapter_of(other))
    assert bank["a"].modules["0"]["r"] == 4
    with bank.use("a"):
        torch.testing.assert_close(model(x), other(x))
    del bank["b"], bank["a"]
    assert isinstance(model[0], lora.LoRALayer)  # a compiled model is to find it
    with bank.use(None):
        torch.testing.assert_close(model(x), base(x))
    bank.keep(None)
    assert type(model[0]) is nn.Linear


def test_what_has_no_room_is_refused_whole():
    model = base_model()
    for room in ({"room": 2}, {"max_r": 2}, {"room": 0, "max_r": 2}, {"room": 2, "max_r": True}):
        with pytest.raises(ValueError, match=r"bank: nothing was changed.*\n.*must be an integer of at least 1"):
            lora.bank(model, {"a": config(2)}, **room)
    with pytest.raises(ValueError, match=r"a: 0: `max_r` .=2. must be at least its rank, 3"):
        lora.bank(model, {"a": config(3), "b": config(1)}, room=2, max_r=2)
    assert type(model[0]) is nn.Linear
    bank = lora.bank(model, {"a": config(2)}, room=2, max_r=2)
    assert lora.bank(model, room=2, max_r=2) == bank
    with pytest.raises(ValueError, match="made with `room` 2 and `max_r` 2, and not with 3 and 2"):
        lora.bank(model, room=3, max_r=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_in_bfloat16():
    base = base_model().to(torch.bfloat16)
    model, bank = banked(base, {"a": config(2, use_dora=True), "b": config(3)}, room=2, max_r=4)
    compiled = Compiled(model, backend="inductor")
    x = torch.randn(4, 5, 8, dtype=torch.bfloat16)
    for names in (["a", None, "b", "a"], ["b", "b", "a", None]):
        with bank.rows(names):
            y = compiled(x)
            y.float().square().sum().backward()
        for name in bank:
            assert all(parameter.grad.isfinite().all() for parameter in bank.parameters(name))
        exact = copy.deepcopy(model).double()
        with lora.bank(exact).rows(names):
            # Two layers of sums that are rounded to 8 bits each.
            torch.testing.assert_close(y.double(), exact(x.double()), rtol=0.03, atol=0.03)
    assert compiled.times == 1
