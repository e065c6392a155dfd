"""W in the place of a stack of matrices: what a forward does with it is computed beside W₀, and is what W gives."""

import pytest
import torch
import torch.nn.functional as F
from counting import Operations, kept_for_backward
from hypothesis import given
from hypothesis import strategies as st
from releases import before, since
from stacks import by_hand, gradients, stack

import lora
from lora.layers.in_place_stack import LowRankStack

E, ROWS, COLUMNS = 5, 6, 4
IDS = torch.tensor([3, 0, 3, 1])

# Of a stack (5, 6, 4): with x (3, 6) or (..., 6), and z (3, 4) or (..., 4).
BESIDE = {
    "linear": lambda W, x, z: F.linear(z, W[2]),
    "linear with bias": lambda W, x, z: F.linear(z, W[torch.tensor(4)], x[0]),
    "negative": lambda W, x, z: F.linear(z, weight=W[-1]),
    "a vector": lambda W, x, z: F.linear(z[0], W[0]),
    "matmul": lambda W, x, z: x @ W[1],
    "matmul T": lambda W, x, z: z @ W[1].T,
    "matmul t": lambda W, x, z: z.matmul(W[1].t()),
    "mm": lambda W, x, z: torch.mm(x, W[0]),
    "mm by name": lambda W, x, z: torch.mm(input=x, mat2=W[0]),
    "mm left": lambda W, x, z: torch.mm(W[0], z.T),
    "left": lambda W, x, z: W[0] @ z.T,
    "addmm": lambda W, x, z: torch.addmm(z, x, W[0]),
    "all": lambda W, x, z: torch.bmm(x.expand(E, 3, ROWS), W),
    "all, turned": lambda W, x, z: torch.bmm(z.expand(E, 3, COLUMNS), W.transpose(1, 2)),
    "all, mT": lambda W, x, z: z.expand(E, 3, COLUMNS) @ W.mT,
    "all, swapped": lambda W, x, z: z.expand(E, 3, COLUMNS) @ torch.swapaxes(W, -1, -2),
    "all, permuted": lambda W, x, z: torch.bmm(z.expand(E, 3, COLUMNS), W.permute(0, 2, 1)),
    "all, broadcast": lambda W, x, z: torch.matmul(x, W),
    "all, wider": lambda W, x, z: torch.matmul(x.expand(2, 1, 3, ROWS), W),
    "all, baddbmm": lambda W, x, z: torch.baddbmm(z.expand(E, 3, COLUMNS), x.expand(E, 3, ROWS), W),
    "all, left": lambda W, x, z: torch.matmul(W, z.T),
    "ids": lambda W, x, z: torch.bmm(x[:1].expand(4, 1, ROWS), W[IDS]).squeeze(1),
    "ids, left": lambda W, x, z: torch.bmm(W[IDS], z[:1].expand(4, COLUMNS).unsqueeze(-1)).squeeze(-1),
    "ids, left, added": lambda W, x, z: torch.baddbmm(x[:1, :, None], W[IDS], z[:1].expand(4, COLUMNS).unsqueeze(-1)),
    "ids of two dimensions": lambda W, x, z: torch.matmul(x, W[IDS.view(2, 2)]),
    "selected": lambda W, x, z: torch.bmm(x.expand(4, 3, ROWS), W.index_select(0, IDS)),
    "a slice": lambda W, x, z: torch.bmm(x.expand(2, 3, ROWS), W[1:3]),
    "a mask": lambda W, x, z: torch.bmm(x.expand(2, 3, ROWS), W[torch.tensor([True, False, False, True, False])]),
    "a slice, then one": lambda W, x, z: x @ W[1:3][1],
    "one by one": lambda W, x, z: torch.cat([x @ matrix for matrix in W]),
    "unbound": lambda W, x, z: torch.cat([x @ matrix for matrix in torch.unbind(W)]),
    "chunks of rows": lambda W, x, z: torch.cat([F.linear(z, part) for part in W[2].chunk(2)], -1),
    "chunks of all rows": lambda W, x, z: torch.cat([z @ part.mT for part in W.chunk(2, dim=1)], -1),
    "splits of columns": lambda W, x, z: torch.cat([x @ part for part in torch.split(W, [1, 3], dim=-1)], -1),
    "experts in parts": lambda W, x, z: torch.cat([x @ part for part in W.split(2)]),
    "narrow": lambda W, x, z: x @ W.narrow(2, 1, 2),
    "every other column": lambda W, x, z: x @ W[..., ::2],
    "every other row of one": lambda W, x, z: F.linear(z, W[3, 1::2]),
    "to": lambda W, x, z: x @ W.to(x.dtype)[2],
    "contiguous": lambda W, x, z: x @ W[2].contiguous(),
    "by shape": lambda W, x, z: x @ W[W.shape[0] - W.size(-1)] + len(W) + W.dim(),
}
BUILT = {
    "normed": lambda W, x, z: x @ (W[1] / W[1].norm()),
    "einsum": lambda W, x, z: torch.einsum("nr,erc->enc", x, W),
    "flat": lambda W, x, z: x @ W.permute(1, 0, 2).reshape(ROWS, -1),
    "first and third": lambda W, x, z: torch.matmul(z.new_ones(E), W.transpose(0, 1)),
    "columns by ids": lambda W, x, z: x @ W[:, :, torch.tensor([0, 2])],
    "a mask of all": lambda W, x, z: torch.where(W[0] > 0, W[0], 0) * z[0],
    "a vector of it": lambda W, x, z: z * W[1, 2],
    "stacked": lambda W, x, z: x @ torch.cat([W[0], W[1]], -1),
    "times a vector": lambda W, x, z: torch.matmul(W, z[0]),
    "scaled addmm": lambda W, x, z: torch.addmm(z, x, W[0], alpha=2.0),
}
each_form = pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])


def inputs(dtype=torch.float64):
    x, z = torch.randn(3, ROWS, dtype=dtype), torch.randn(3, COLUMNS, dtype=dtype)
    return x.requires_grad_(), z.requires_grad_()


@pytest.fixture
def nothing_dense(monkeypatch):
    def refuse(self, why=""):
        raise AssertionError(f"W was built for {why}")

    monkeypatch.setattr(LowRankStack, "dense", refuse)


@pytest.mark.sampled(84)
@each_form
@pytest.mark.parametrize("use_dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("name", BESIDE)
def test_what_is_taught_is_computed_beside(name, use_dora, transposed, nothing_dense):
    check(BESIDE[name], use_dora, transposed)


@pytest.mark.sampled(15)
@each_form
@pytest.mark.parametrize("use_dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("name", BUILT)
def test_for_anything_else_w_is_built(name, use_dora, transposed):
    check(BUILT[name], use_dora, transposed)
    with pytest.raises(RuntimeError, match=r"`lora_dropout` \(=0.5\) must be 0 for the weight of a Computes: "):
        stack(E, ROWS, COLUMNS, transposed=transposed, lora_dropout=0.5)(lambda W: BUILT[name](W, *inputs()))


def check(function, use_dora, transposed):
    model = stack(E, ROWS, COLUMNS, transposed=transposed, use_dora=use_dora)
    x, z = inputs()
    y, right = model(lambda W: function(W, x, z)), function(by_hand(model[0]), x, z)
    torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
    wanted = [p for _, p in model[0].lora_parameters()]
    wanted += [
        t for t in (x, z) if torch.autograd.grad(right.sum(), t, allow_unused=True, retain_graph=True)[0] is not None
    ]
    for got, expected in zip(gradients(y, *wanted), gradients(right, *wanted), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert model[0].weight.grad is None
    with torch.no_grad():
        torch.testing.assert_close(model(lambda W: function(W, x, z)), right, rtol=1e-12, atol=1e-12)


# ---- products of groups --------------------------------------------------------------------------------------------

GROUPED = [getattr(owner, name) for owner, name in ((torch, "_grouped_mm"), (F, "grouped_mm")) if hasattr(owner, name)]
GROUPED = [] if before("2.9") else GROUPED  # they ran on no CPU
on_a_cpu = since("2.9", "products of groups run on no CPU")
each_grouped = pytest.mark.parametrize("grouped", GROUPED, ids=lambda function: function.__name__)
ENDS = torch.tensor([2, 2, 7, 8, 8], dtype=torch.int32)  # of five experts two have no row


def one_by_one(x, W):
    starts = [0, *ENDS.tolist()]
    return torch.cat([x[start:end] @ matrix for start, end, matrix in zip(starts, starts[1:], W, strict=False)])


@each_grouped
@each_form
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("settings", [{}, {"r": 3}, {"use_dora": True}], ids=str)
def test_products_of_groups(settings, turned, transposed, grouped, nothing_dense):
    model = stack(E, 8, 16, transposed=transposed, dtype=torch.float32, **settings)
    x = torch.randn(8, 16 if turned else 8, requires_grad=True)

    def of(W):
        return W.transpose(-2, -1) if turned else W

    y = model(lambda W: grouped(x, of(W), offs=ENDS))
    right = one_by_one(x.double(), of(by_hand(model[0])))
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    wanted = [x, *(p for _, p in model[0].lora_parameters())]
    for got, expected in zip(gradients(y, *wanted), gradients(right, *wanted), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@each_grouped
def test_in_bfloat16_with_a_float32_adapter(grouped, nothing_dense):
    model = stack(E, 8, 16, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    x = torch.randn(8, 16, dtype=torch.bfloat16)
    y = model(lambda W: grouped(x, W.mT, offs=ENDS))
    right = one_by_one(x.double(), by_hand(model[0]).mT)
    assert (y.double() - right).norm() / right.norm() < 2**-7
    (got,), (expected,) = gradients(y, model[0].lora_A), gradients(right, model[0].lora_A)
    assert got.dtype == torch.float32
    assert (got - expected).norm() / expected.norm() < 2**-6


@each_grouped
def test_what_a_product_of_groups_is_not_taught_w_is_built_for(grouped):
    model = stack(E, 8, 16, dtype=torch.float32)
    x = torch.randn(E, 3, 8)
    torch.testing.assert_close(model(lambda W: grouped(x, W)), torch.bmm(x, by_hand(model[0], torch.float32)))


# ---- what it costs -------------------------------------------------------------------------------------------------


@on_a_cpu
def test_bytes_kept_and_made_are_those_of_the_tokens():
    """Of 64 experts two are met: neither by name, nor by groups, is anything as large as a stack kept or made."""
    experts, out, size, r, n = 64, 64, 48, 4, 10
    model = stack(experts, out, size, r=r, dtype=torch.float32)
    layer = model[0]
    x = torch.randn(n, size, requires_grad=True)
    ends = torch.tensor([0] * 5 + [4] * 20 + [n] * 39, dtype=torch.int32)

    def by_number(W):
        return torch.cat([F.linear(x[:4], W[torch.tensor(5)]), F.linear(x[4:], W[torch.tensor(25)])])

    def by_groups(W):
        return torch._grouped_mm(x, W.transpose(-2, -1), offs=ends)

    for function in (by_number, by_groups):
        kept = kept_for_backward(lambda function=function: model(function), x, *model.parameters())
        assert kept <= 4 * n * (r + size + 4 * out)  # h, and slices of x
        with Operations() as counted:
            model(function).sum().backward()
        assert counted.largest <= max(layer.lora_A.numel(), layer.lora_B.numel())  # their gradients, once
        adapters = 4 * (layer.lora_A.numel() + layer.lora_B.numel())
        assert sum(counted.made) <= 2 * adapters + 40 * n * (size + out + r)
        assert layer.weight.grad is None


def test_one_by_one_a_gradient_of_all_is_put_together_once():
    """For each expert that is indexed, torch would make a gradient of the size of all experts' A."""
    experts, r, size = 32, 4, 32
    model = stack(experts, size, size, r=r, dtype=torch.float32)
    x = torch.randn(2, size)
    with Operations() as counted:
        model(lambda W: sum(F.linear(x, W[e]).sum() for e in range(experts))).backward()
    whole = 4 * experts * r * size
    assert sum(made for made in counted.made if made >= whole) <= 4 * whole  # two, and what copies the counter causes


@on_a_cpu
@each_form
def test_dropout_is_of_the_inputs_of_the_update_alone(transposed, nothing_dense):
    model = stack(E, 8, 8, transposed=transposed, lora_dropout=0.5, dtype=torch.float32)
    W, x = by_hand(model[0], torch.float32), torch.randn(8, 8)
    ids = torch.tensor([0, 1, 4, 4])
    functions = {
        "one": lambda W: x @ W[1],
        "groups": lambda W: torch._grouped_mm(x, W, offs=ENDS),
        "ids": lambda W: torch.bmm(W[ids], x[:4].unsqueeze(-1)),
    }
    for name, function in functions.items():
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(function), function(W), rtol=1e-5, atol=1e-5)
            some = torch.stack([model.train()(function) for _ in range(400)])
            spread = float(some.std(0).max())
            assert spread > 0.1, name
            torch.testing.assert_close(some.mean(0), function(W), rtol=0, atol=6 * spread / 20)
            model[0].lora_scaling, kept = 0.0, model[0].lora_scaling
            torch.testing.assert_close(model(function), function(model[0].weight), rtol=1e-6, atol=1e-6)
            model[0].lora_scaling = kept


@on_a_cpu
def test_dropout_is_the_same_in_backward(nothing_dense):
    """As the derivative of what was computed, for the numbers that were drawn."""
    model = stack(E, 8, 16, lora_dropout=0.25, dtype=torch.float32)
    x = torch.randn(8, 16, requires_grad=True)

    def computed(seed=3):
        torch.manual_seed(seed)
        return model(lambda W: torch._grouped_mm(x, W.mT, offs=ENDS))

    parameters = [x, model[0].lora_A, model[0].lora_B]
    found = gradients(computed(), *parameters)
    upstream = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    for parameter, gradient in zip(parameters, found, strict=True):
        direction = torch.randn_like(parameter)
        with torch.no_grad():  # linear in each of them: a difference is exact
            y = computed()
            parameter.add_(direction)
            moved = computed()
            parameter.sub_(direction)
        torch.testing.assert_close(((moved - y) * upstream).sum(), (gradient * direction).sum(), rtol=1e-3, atol=1e-3)


@given(
    experts=st.integers(1, 4),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    leading=st.lists(st.integers(0, 3), max_size=2),
    transposed=st.booleans(),
    use_dora=st.booleans(),
)
def test_any_shape(experts, rows, columns, leading, transposed, use_dora):
    model = stack(experts, rows, columns, transposed=transposed, use_dora=use_dora, r=1)
    W = by_hand(model[0])
    x = torch.randn(*leading, experts, 2, rows, dtype=torch.float64)
    torch.testing.assert_close(model(lambda W: x @ W), x @ W, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(lambda W: W.mT @ x.mT), W.mT @ x.mT, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(lambda W: x @ W[0]), x @ W[0], rtol=1e-9, atol=1e-9)


def test_under_autocast_products_are_in_its_dtype(nothing_dense):
    model = stack(E, 8, 16, dtype=torch.float32)
    x = torch.randn(4, 16)
    functions = [lambda W: F.linear(x, W[1]), lambda W: torch.bmm(W[IDS], x.unsqueeze(-1)), lambda W: x @ W.mT]
    for function in functions:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(function)
        right = function(by_hand(model[0], torch.float32))
        assert y.dtype == torch.bfloat16
        assert (y - right).norm() / right.norm() < 2**-6
        y.float().sum().backward()
        assert model[0].lora_A.grad.dtype == torch.float32


def test_it_says_what_it_is():
    value = stack(E, ROWS, COLUMNS, dtype=torch.float32)[0].lora_weight()
    assert isinstance(value, LowRankStack)
    assert (value.shape, value.mT.shape, value[0].shape) == ((E, ROWS, COLUMNS), (E, COLUMNS, ROWS), (ROWS, COLUMNS))
    assert (value.dtype, value.ndim, len(value), value.data_ptr()) == (torch.float32, 3, E, 0)
    with pytest.raises(IndexError):
        value[E]
    with pytest.raises(RuntimeError, match="the weight of a Computes must not be written to in a forward"):
        value.clamp_(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "ids", "ids, left", "linear", "chunks of all rows", "every other column"])
def test_it_is_compiled_without_a_break(name):
    model = stack(E, ROWS, COLUMNS, dtype=torch.float32)
    x, z = inputs(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, z: model(lambda W: BESIDE[name](W, x, z)), fullgraph=True, backend="aot_eager")
    y, right = compiled(x, z), BESIDE[name](by_hand(model[0], torch.float32), x, z)
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)
    wanted = [model[0].lora_A, model[0].lora_B]
    for got, expected in zip(gradients(y, *wanted), gradients(right, *wanted), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_lora_may_be_off():
    model = stack(E, ROWS, COLUMNS)
    with lora.disabled(model):
        assert model(lambda W: W) is model[0].weight
