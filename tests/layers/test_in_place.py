"""Layers whose class has a forward of its own: it runs as it is, and finds W in the place of its weight."""

import copy
import itertools
import pickle
import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from counting import kept_for_backward
from hypothesis import given
from hypothesis import strategies as st
from pairwise import in_tiers

import lora


class Matmul(nn.Linear):
    """As Falcon's."""

    def forward(self, x):
        hidden = x @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Cast(nn.Linear):
    """As openai-whisper's."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class CastKernel(nn.Conv1d):
    """As openai-whisper's."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def forward(self, x):
        return self._conv_forward(x, self.weight, self.bias)


class Addmm(nn.Linear):
    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight.transpose(1, 0)).view(*x.shape[:-1], -1)


class Scaled(nn.Linear):
    def forward(self, x, scale=3.0):
        return super().forward(x) * scale


class Router(nn.Linear):
    """As Llama 4's and Phi-3.5-MoE's: a tuple comes out."""

    def forward(self, x):
        logits = F.linear(x, weight=self.weight)
        return logits.softmax(-1), logits


class Normed(nn.Linear):
    """What it computes with is made of its weight."""

    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class Stacked(nn.Linear):
    """Of the weight, twice."""

    def forward(self, x):
        return F.linear(x, torch.cat([self.weight, 2 * self.weight])) + self.bias.repeat(2)


class ByRows(nn.Linear):
    def forward(self, x):
        return torch.cat([F.linear(x, rows) for rows in self.weight.chunk(2)], -1) + self.bias


class OnTheLeft(nn.Linear):
    """Square: a product with the operands exchanged has the same shape."""

    def forward(self, x):
        return (self.weight @ x.T).T + self.bias


class ByDict(nn.Linear):
    def forward(self, x):
        return F.linear(x, self._parameters["weight"], self.bias)


class ByOrder(nn.Linear):
    def forward(self, x):
        return F.linear(x, next(self.parameters()), self.bias)


class ScaledWords(nn.Embedding):
    """As Gemma's and BART's."""

    def forward(self, ids):
        return super().forward(ids) * 5.0


class Positions(nn.Embedding):
    """As OPT's: it looks up what it is not given."""

    def forward(self, mask):
        return super().forward(mask.cumsum(-1) + 1)


class Slice(nn.Embedding):
    """As Whisper's."""

    def forward(self, ids):
        return self.weight[2 : 2 + ids.shape[-1]]


class Same(nn.Conv2d):
    """As timm's Conv2dSame."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))[..., :-1]


class Standardised(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Grouped(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, "same", groups=self.groups) * 2


def rows(shape):
    return torch.randn(*shape, 8)


def ids(shape):
    return torch.ones(*shape, dtype=torch.long)


def images(shape):
    return torch.randn(*shape, 6, 6)


# For each: how it is made, what goes into it, and whether it is computed beside W0 or with W built.
OWN = {
    "matmul": (lambda: Matmul(8, 4), lambda: rows((2, 3)), "beside"),
    "matmul without bias": (lambda: Matmul(8, 4, bias=False), lambda: rows((3,)), "beside"),
    "addmm": (lambda: Addmm(8, 4), lambda: rows((2, 3)), "beside"),
    "cast": (lambda: Cast(8, 4), lambda: rows((2, 3)), "beside"),
    "cast kernel": (lambda: CastKernel(4, 6, 3), lambda: torch.randn(2, 4, 9), "beside"),
    "scaled": (lambda: Scaled(8, 4), lambda: rows((2, 3)), "beside"),
    "router": (lambda: Router(8, 4), lambda: rows((5,)), "beside"),
    "normed": (lambda: Normed(8, 4), lambda: rows((3,)), "built"),
    "stacked": (lambda: Stacked(8, 4), lambda: rows((3,)), "built"),
    "by rows": (lambda: ByRows(8, 4), lambda: rows((3,)), "beside"),
    "on the left": (lambda: OnTheLeft(8, 8), lambda: rows((8,)), "built"),
    "by dict": (lambda: ByDict(8, 4), lambda: rows((3,)), "beside"),
    "by order": (lambda: ByOrder(8, 4), lambda: rows((3,)), "beside"),
    "scaled words": (lambda: ScaledWords(10, 6), lambda: torch.randint(10, (2, 5)), "beside"),
    "padded words": (lambda: ScaledWords(10, 6, padding_idx=3), lambda: torch.randint(10, (2, 5)), "beside"),
    "positions": (lambda: Positions(10, 6), lambda: ids((2, 5)), "beside"),
    "slice": (lambda: Slice(10, 6), lambda: ids((2, 5)), "built"),
    "same": (lambda: Same(4, 6, 3, stride=2), lambda: images((2, 4)), "beside"),
    "causal": (lambda: Causal(4, 6, 3), lambda: torch.randn(2, 4, 9), "beside"),
    "one image": (lambda: Same(4, 6, 3, stride=2), lambda: images((4,)), "beside"),
    "standardised": (lambda: Standardised(4, 6, 3, groups=2), lambda: images((2, 4)), "built"),
    "grouped": (lambda: Grouped(4, 6, 3, groups=2), lambda: images((2, 4)), "beside"),
}
SETTINGS = [
    {},
    {"use_dora": True},
    {"use_rslora": True, "factored": False},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "orthogonal"},
    {"merge_weights": True},
]
each_own = pytest.mark.parametrize("own", OWN)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def adapted(own, dtype=torch.float64, **settings):
    """A model of one layer, what goes in, and the same model before."""
    make, example, _ = OWN[own]
    torch.manual_seed(0)
    base, x = nn.Sequential(make()).to(dtype), example()
    model, x = copy.deepcopy(base), x.to(dtype) if x.is_floating_point() else x
    lora.inject(model, target_modules=["0"], **{"r": 2, "lora_alpha": 3, **settings})
    return model, x, base


def moved(model):
    """The model with other values in A, B and the magnitudes."""
    with torch.no_grad():
        for name, parameter in model[0].lora_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if name == "lora_magnitude" else 1))
        padding = getattr(model[0], "padding_idx", None)
        if padding is not None:  # A starts at zero there, and nothing moves it
            model[0].lora_A[:, padding] = 0
    return model


def by_hand(model, base):
    """The base model with g (W0 + s B A) in its weight, in torch's operations, which autograd knows."""
    layer = model[0]
    A, B, s = layer.lora_A, layer.lora_B, layer.lora_scaling
    weight = layer.weight.detach()
    if isinstance(layer, nn.Embedding):
        W = weight + s * (B @ A).T
    elif A.dim() > 2:  # a factored convolution: a matrix for each group
        blocks = zip(B.flatten(1).chunk(layer.groups), A.flatten(1).chunk(layer.groups), strict=True)
        W = weight + s * torch.cat([b @ a for b, a in blocks]).view_as(weight)
    else:
        W = weight + s * (B @ A).view_as(weight)
    if layer.use_dora:
        along = [0] if isinstance(layer, nn.Embedding) else [*range(1, weight.dim())]
        shape = [1, -1] if isinstance(layer, nn.Embedding) else [-1, *[1] * (weight.dim() - 1)]
        norm = torch.linalg.vector_norm(W, dim=along, keepdim=True).detach()
        W = W / norm * layer.lora_magnitude.view(shape)
    return lambda x: first(torch.func.functional_call(base, {"0.weight": W}, (x,)))


def gradients(y, model):
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(y, [p for _, p in model[0].lora_parameters()], upstream)


@each_own
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_computes_with_w(own, settings):
    model, x, base = adapted(own, **settings, r=4)  # even, for each group
    start = first(base(x))
    torch.testing.assert_close(first(model(x)), start, rtol=1e-12, atol=1e-12)
    with lora.disabled(model):
        torch.testing.assert_close(first(model(x)), start, rtol=1e-12, atol=1e-12)
    expected = by_hand(moved(model), base)
    y, right = first(model(x)), expected(x)
    assert not torch.allclose(right, start)
    torch.testing.assert_close(y, right, rtol=1e-10, atol=1e-10)
    for got, wanted in zip(gradients(y, model), gradients(right, model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(first(model.eval()(x)), right.detach(), rtol=1e-10, atol=1e-10)


@each_own
@pytest.mark.parametrize("use_dora", [False, True])
def test_it_is_saved_loaded_copied_merged_and_ejected(own, use_dora, tmp_path):
    model, x, base = adapted(own, use_dora=use_dora)
    before, y = first(base(x)), first(moved(model)(x))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(first(twin(x)), y)
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    other = copy.deepcopy(base)
    lora.load_adapter(other, tmp_path / "adapter.safetensors")
    assert torch.equal(first(other(x)), y)
    assert list(lora.merged_state_dict(model)) == list(base.state_dict())
    lora.eject(other)
    assert torch.equal(first(other(x)), before)
    assert type(other[0]) is type(base[0])
    lora.merge(model)
    assert type(model[0]) is type(base[0])
    torch.testing.assert_close(first(model(x)), y, rtol=1e-10, atol=1e-10)


COMPILED = [own for own in OWN if own != "by order"]  # dynamo follows no set of parameters


@pytest.mark.parametrize(
    ("own", "use_dora"),
    in_tiers(itertools.product(COMPILED, [True, False]), zip(COMPILED, itertools.cycle([True, False]), strict=False)),
)
@pytest.mark.slow
def test_it_is_compiled_without_a_break(own, use_dora):
    model, x, _ = adapted(own, torch.float32, use_dora=use_dora)
    moved(model)
    torch._dynamo.reset()
    y = first(torch.compile(model, fullgraph=True, backend="aot_eager")(x))
    torch.testing.assert_close(y, first(model(x)))
    for got, wanted in zip(gradients(y, model), gradients(first(model(x)), model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", [own for own, (_, _, how) in OWN.items() if how == "beside"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_what_is_taught_builds_no_weight(own, use_dora, monkeypatch):
    model, x, _ = adapted(own, use_dora=use_dora)

    def refuse(*_):
        raise AssertionError("W was built")

    monkeypatch.setattr(type(model[0]), "lora_delta", refuse)
    first(model(x)).sum().backward()


@pytest.mark.parametrize("own", [own for own, (_, _, how) in OWN.items() if how == "built"])
def test_dropout_is_refused_where_w_is_built_in_training(own):
    if "slice" in own:
        return  # embeddings have none
    model, x, _ = adapted(own, lora_dropout=0.5)
    with pytest.raises(RuntimeError, match=r"`lora_dropout` \(=0.5\) must be 0 for the weight of an? \w+: the forward"):
        model(x)
    model.eval()(x)


@pytest.mark.parametrize("own", ["matmul", "scaled", "same", "grouped"])
def test_dropout_is_of_the_inputs_of_the_update_alone(own):
    model, x, base = adapted(own, lora_dropout=0.5)
    moved(model)
    layer = model[0]
    with torch.no_grad():
        exact, some = first(model.eval()(x)), [first(model.train()(x)) for _ in range(400)]
        spread = torch.stack(some).std(0)
        torch.testing.assert_close(torch.stack(some).mean(0), exact, rtol=0, atol=6 * float(spread.max()) / 20)
        assert float(spread.max()) > 0.1
        layer.lora_scaling = 0.0
        assert torch.equal(first(model(x)), first(base(x)))


def test_no_more_is_kept_for_backward_than_by_the_plain_layer():
    x = torch.randn(64, 256, requires_grad=True)
    kept = {}
    for cls in (nn.Linear, Matmul, Scaled):
        model = nn.Sequential(cls(256, 256))
        lora.inject(model, target_modules=["0"], r=4)
        kept[cls] = kept_for_backward(lambda model=model: model(x), x, *model.parameters())
    assert kept[Matmul] == kept[nn.Linear]
    assert kept[Scaled] == kept[nn.Linear]


def test_the_weight_is_the_base_parameter_outside_of_forwards():
    model, x, base = adapted("matmul")
    layer = model[0]
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    model(x)
    assert layer.weight is weight
    assert torch.equal(weight, base[0].weight)
    assert [*model.state_dict()] == ["0.weight", "0.bias", "0.lora_A", "0.lora_B"]


def test_max_norm_is_refused_where_nobody_knows_what_it_bounds():
    model = nn.Sequential(ScaledWords(10, 6, max_norm=1.0))
    with pytest.raises(ValueError, match="0: has a forward of its own, and nobody knows what its `max_norm` bounds"):
        lora.inject(model, target_modules=["0"], r=2)
    assert type(model[0]) is ScaledWords


OPERATORS = {
    "compared": lambda x, W: x @ torch.where((W > 0) & (W <= 2) | (W == 0), W, 0.5 * W),
    "negated": lambda x, W: x @ torch.where((W < 0) | (W >= 2) & (W != 0), -W, W),
    "absolute": lambda x, W: x @ abs(W),
    "power": lambda x, W: x @ 2**W + x @ W**2,
    "remainder": lambda x, W: x @ (W % 0.3) + x @ (1 / W),
    "floor": lambda x, W: x @ W + ((W // 0.3).detach() + (5.0 // W).detach()).sum(),
    "by keywords": lambda x, W: torch.matmul(input=x, other=W) + torch.mm(input=x, mat2=W) + torch.mm(x, mat2=W),
    "addmm by keywords": lambda x, W: torch.addmm(input=x[0], mat1=x, mat2=W) + torch.addmm(x[0], x, W, beta=2),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_are_those_of_w(operator):
    compute = OPERATORS[operator]

    class Computes(nn.Linear):
        def forward(self, x):
            return compute(x, self.weight)

    x = torch.randn(4, 4, dtype=torch.float64)
    model = nn.Sequential(Computes(4, 4)).double()
    lora.inject(model, target_modules=["0"], r=2)
    layer = moved(model)[0]
    y, right = model(x), compute(x, layer.weight.detach() + layer.scaling * layer.lora_B @ layer.lora_A)
    torch.testing.assert_close(y, right)
    for got, wanted in zip(gradients(y, model), gradients(right, model), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_product_goes_where_the_forward_wants_it():
    class Into(nn.Linear):
        def forward(self, x):
            return torch.mm(x, self.weight, out=torch.empty(3, 4, dtype=x.dtype))

    x = torch.randn(3, 4, dtype=torch.float64)
    model = nn.Sequential(Into(4, 4)).double()
    lora.inject(model, target_modules=["0"], r=2)
    with torch.no_grad():
        torch.testing.assert_close(moved(model)(x), x @ model[0].lora_compute_merged())


class Counting(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen += len(x)
        self.last = x.shape
        return super().forward(x)


def test_what_the_forward_keeps_on_itself_stays():
    model, x = nn.Sequential(Counting(8, 4)), torch.randn(3, 8)
    lora.inject(model, target_modules=["0"], r=2)
    model(x)
    model(x)
    assert (model[0].calls, float(model[0].seen), model[0].last) == (2, 6, x.shape)


class Writes(nn.Linear):
    def forward(self, x):
        self.weight.clamp_(-1, 1)
        return super().forward(x)


def test_a_forward_that_writes_to_its_weight_is_an_error():
    model = nn.Sequential(Writes(8, 4))
    lora.inject(model, target_modules=["0"], r=2)
    with pytest.raises(RuntimeError, match=r"of a Writes must not be written to in a forward, as `.clamp_` does"):
        model(torch.randn(3, 8))


def test_threads_compute_with_it_at_once():
    model, x, _ = adapted("scaled")
    expected = moved(model)(x)
    waiting, wrong = threading.Barrier(4), []

    def serve():
        waiting.wait()
        for _ in range(200):
            if not torch.equal(model(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize("own", ["matmul", "normed", "scaled words", "same"])
def test_in_bfloat16_it_is_as_exact_as_w_rounded_once(own):
    exact, x, _ = adapted(own)
    moved(exact)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    with torch.no_grad():
        exact.load_state_dict(model.state_dict())  # the values that bfloat16 holds
        x_ = x.to(torch.bfloat16) if x.is_floating_point() else x
        right = first(exact(x_.double() if x.is_floating_point() else x))
        error = (first(model(x_)).double() - right).norm() / right.norm()
    assert error < 2**-7


@given(
    out=st.integers(1, 6),
    size=st.integers(1, 6),
    leading=st.lists(st.integers(0, 3), min_size=1, max_size=2),
    splits=st.booleans(),
    dora=st.booleans(),
)
def test_any_shape(out, size, leading, splits, dora):
    base = nn.Sequential(Scaled(size, out + 1)).double()
    model = copy.deepcopy(base)
    settings = {"splits": {"0": (out, 1)}, "enable_lora": {"0": (True, False)}} if splits else {}
    lora.inject(model, target_modules=["0"], r=2, use_dora=dora, **settings)
    moved(model)
    W = model[0].lora_compute_merged()
    x = torch.randn(*leading, size, dtype=torch.float64)
    right = torch.func.functional_call(base, {"0.weight": W}, (x,))
    torch.testing.assert_close(model(x), right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cast", ["to", "type", "type_as", "float", "type by name"])
def test_a_weight_in_another_dtype_is_not_built(cast, monkeypatch):
    class Casts(nn.Linear):
        def forward(self, x):
            if cast == "type by name":
                return F.linear(x.type(self.weight.type()).type(x.type()), self.weight.type(x.type()))
            given = {"to": (x.dtype,), "type": (x.dtype,), "type_as": (x,), "float": ()}[cast]
            return F.linear(x, getattr(self.weight, cast)(*given))

    x = torch.randn(3, 8).bfloat16().float()
    model = nn.Sequential(Casts(8, 4, bias=False)).bfloat16()
    lora.inject(model, target_modules=["0"], r=2, lora_dropout=0.1)
    layer = moved(model)[0]
    W = layer.weight.float() + layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(model.eval()(x), x @ W.T)
    monkeypatch.setattr(type(layer), "lora_delta", None)
    y = model.train()(x)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert layer.lora_A.grad.any()


def test_data_starts_are_refused():
    model = nn.Sequential(Matmul(8, 4))
    lora.inject(model, target_modules=["0"], r=2, init_lora_weights="eva")
    with pytest.raises(ValueError, match="0: has a forward of its own, in which nobody sees"):
        lora.calibrate(model, [torch.randn(9, 8)])


def test_a_fused_function_of_several_layers_does_not_know_it():
    model, _, _ = adapted("scaled")
    with pytest.raises(ValueError, match="a Scaled has a forward of its own, which `lora_linear` does not know"):
        model[0].lora_adapted()


@pytest.mark.slow
def test_a_prepared_layer_computes_the_same_when_compiled():
    model, x, _ = adapted("scaled", torch.float32)
    expected = moved(model)(x)
    lora.prepare_for_swap(model, 4)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
