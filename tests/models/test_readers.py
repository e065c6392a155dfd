"""Modules that read the weights of layers within them, and do not call them, find W there."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import lora
from lora.models.readers import WeightReader


class Fused(nn.Module):
    """As BEiT's and EVA-02's attention: the bias is put together, and the weight read for it."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.q_bias = nn.Parameter(torch.randn(8))
        self.proj = nn.Linear(8, 8)

    def forward(self, x, scale=1.0):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.q_bias])
        q, k, v = F.linear(input=x, weight=self.qkv.weight, bias=bias).chunk(3, -1)
        return self.proj(q * k + v) * scale


class ByHelper(nn.Module):
    """The weight is read in a method that the forward calls, through a name of its own."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen = x.shape
        return self.project(x)

    def project(self, x):
        layer = self.qkv
        return x @ layer.weight.T + layer.bias


class Outer(nn.Module):
    """It reads what is two levels down, and has children that nobody reads."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"inner": nn.Linear(8, 8)})
        self.blocks = nn.ModuleList([Fused(), Fused()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.block["inner"].weight)


class Both(nn.Module):
    """It calls a layer and reads its weight."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 8)

    def forward(self, ids):
        return self.words(ids) @ self.words.weight.T


class ByType(nn.Module):
    """As T5's: it asks what its layer's weight is, and then calls the layer."""

    def __init__(self):
        super().__init__()
        self.wo, self.bias = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


class ByDevice(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x):
        return self.q(x.to(self.q.weight.device, self.q.weight.dtype))


class Parts(nn.Module):
    """As Gemma 3n's: its parent calls its methods, and never itself. And a helper is given the layer."""

    def __init__(self):
        super().__init__()
        self.coefs, self.bias = nn.Linear(8, 8), nn.Linear(8, 8)

    def predict(self, x):
        return F.linear(x, torch.clamp(self.coefs.weight, -1, 1))

    def correct(self, x):
        return self.look_up(x, self.bias)

    def look_up(self, x, layer):
        return x @ layer.weight.t()

    def init_weights(self):
        return self.coefs.weight


class OfParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = Parts()

    def forward(self, x):
        return self.parts.correct(self.parts.predict(x))


class Decoder(nn.Module):
    """As Perceiver's: it reads the weight of the layer that it is given."""

    def forward(self, h, embedding_layer):
        return h @ embedding_layer.weight.transpose(0, 1)


class Given(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs = nn.ModuleDict({"words": nn.Embedding(10, 8)})
        self.decoder = Decoder()

    def forward(self, ids):
        return self.decoder(self.inputs.words(ids).tanh(), embedding_layer=self.inputs.words)


class GivenUnpacked(Given):
    """A call with `*` loads the child as any attribute is loaded; before Python 3.11, so does one with keywords."""

    def forward(self, ids):
        return self.decoder(*(self.inputs.words(ids).tanh(), self.inputs.words))


def project(module, x):
    return F.linear(x, module.proj.weight, module.proj.bias)


class ByFunction(nn.Module):
    """A function beside it reads the weight, and is given the module."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return project(self, x)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.flatten(0, -2).T @ x.flatten(0, -2)


class Applied(nn.Module):
    """A function of autograd's, as of fused losses, takes tensors alone."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return Product.apply(x, self.proj.weight)


def replaced(function):
    """As what transformers puts around functions that kernels may stand in for."""

    @functools.wraps(function)
    def call(x, weight):
        return Product.apply(x, weight)

    return call


@replaced
def product(x, weight):
    return F.linear(x, weight)


def of_another_file(x, weight):
    return Product.apply(x, weight)


of_another_file.__module__ = "kernels"


class ToKernel(nn.Module):
    """As Mamba's mixers."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return product(x, self.proj.weight)


class ToAnotherFile(ToKernel):
    def forward(self, x):
        return of_another_file(x, self.proj.weight)


class OnTheLeft(ToKernel):
    """Square: a product with the operands exchanged has the same shape."""

    def forward(self, x):
        return self.proj.weight @ x.reshape(-1, 8)[:8]


class ByDict(ToKernel):
    def forward(self, x):
        return F.linear(x, self.proj._parameters["weight"])


class AppliedItself(nn.Linear):
    def forward(self, x):
        return Product.apply(x, self.weight)


def test_a_layer_that_applies_a_function_of_autograds_learns():
    for requires_grad in (False, True):
        model = nn.Sequential(AppliedItself(8, 8), AppliedItself(8, 8))
        lora.inject(model, target_modules="all-linear", r=2, init_lora_weights=False)
        x = X.clone().requires_grad_(requires_grad)
        y = model(x)
        torch.testing.assert_close(y, x @ model[0].lora_compute_merged().T @ model[1].lora_compute_merged().T)
        y.square().sum().backward()
        assert all(p.grad.any() for layer in model for _, p in layer.lora_parameters())


class Kernel(nn.Module):
    """As Wav2Vec2's x-vector: a linear layer's weight is a convolution's kernel."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Linear(8 * 3, 6)

    def forward(self, x):
        weight = self.kernel.weight.view(6, 3, 8).transpose(1, 2)
        return F.conv1d(x.transpose(1, 2), weight, self.kernel.bias)


def attention():
    return nn.MultiheadAttention(8, 2, batch_first=True)


def encoder(layers=None):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers) if layers else layer


class Called(nn.MultiheadAttention):
    """What reads stands in the forward of the class that it derives from."""

    def forward(self, x):
        return super().forward(x, x, x)[0] * 2


class CalledByName(Fused):
    def forward(self, x):
        return Fused.forward(self, x) * 2


X = torch.randn(2, 5, 8)
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
# For each: the module, its targets, what goes in, and what of the output counts.
READERS = {
    "fused": (Fused, "all-linear", (X,), lambda y: y),
    "by a helper": (ByHelper, "all-linear", (X,), lambda y: y),
    "far within": (Outer, "all-linear", (X,), lambda y: y),
    "called and read": (Both, ["words"], (torch.arange(5),), lambda y: y),
    "given": (Given, ["words"], (torch.arange(5),), lambda y: y),
    "given by unpacking": (GivenUnpacked, ["words"], (torch.arange(5),), lambda y: y),
    "by a function": (ByFunction, "all-linear", (X,), lambda y: y),
    "applied": (Applied, "all-linear", (X,), lambda y: y),
    "to a kernel": (ToKernel, "all-linear", (X,), lambda y: y),
    "to another file": (ToAnotherFile, "all-linear", (X,), lambda y: y),
    "on the left": (OnTheLeft, "all-linear", (X,), lambda y: y),
    "by dict": (ByDict, "all-linear", (X,), lambda y: y),
    "parts": (OfParts, "all-linear", (X,), lambda y: y),
    "kernel": (Kernel, "all-linear", (X,), lambda y: y),
    "attention": (attention, ["out_proj"], (X, X, X), lambda y: y[0]),
    "called": (lambda: Called(8, 2), ["out_proj"], (X,), lambda y: y),
    "called by name": (CalledByName, "all-linear", (X,), lambda y: y),
    "encoder layer": (encoder, "all-linear", (X,), lambda y: y),
    "encoder": (lambda: encoder(2), "all-linear", (X, None, PADDED), lambda y: y[:, :3]),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        "all-linear",
        (X, X),
        lambda y: y,
    ),
}
each_reader = pytest.mark.parametrize("reader", READERS)


def adapted(reader, **settings):
    """A module, in which every adapter has moved, what goes in, what counts of its output, and itself before."""
    make, targets, inputs, of = READERS[reader]
    torch.manual_seed(0)
    base = nn.ModuleDict({"x": make()}).double().requires_grad_(False)
    inputs = tuple(x.double() if x is not None and x.is_floating_point() else x for x in inputs)
    model = copy.deepcopy(base)
    lora.inject(model, target_modules=targets, **{"r": 2, "lora_alpha": 4, **settings})
    start, expected = of(model["x"](*inputs)), of(base["x"](*inputs))
    torch.testing.assert_close(start, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for layer in layers_of(model):
            for name, parameter in layer.lora_parameters():
                parameter.add_(torch.randn_like(parameter) * (0.1 if name == "lora_magnitude" else 0.5))
    return model, inputs, of, base


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, lora.LoRALayer)]


def by_hand(model, base):
    """The base with g (W0 + s B A) in its weights, by torch's own operations."""
    right = copy.deepcopy(base)
    for name, layer in model.named_modules():
        if isinstance(layer, lora.LoRALayer):
            update = layer.lora_scaling * layer.lora_B @ layer.lora_A
            W = layer.weight + (update.T if isinstance(layer, nn.Embedding) else update)
            if layer.use_dora:
                W = W / W.norm(dim=1, keepdim=True) * layer.lora_magnitude[:, None]
            right.get_submodule(name).weight.data = W.detach()
    return right


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's encoder makes some
@each_reader
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"merge_weights": True}], ids=str)
def test_the_output_is_that_of_w(reader, settings):
    if reader in ("called and read", "given", "given by unpacking") and "use_dora" in settings:
        settings = {}  # by_hand knows no magnitudes of embeddings; test_in_place.py does
    model, inputs, of, base = adapted(reader, **settings)
    right = by_hand(model, base)
    for training in (True, False):
        for module in (model, right, base):
            module.train(training)
        for grad in (True, False):  # without, torch's encoders take a fast path of their own
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(of(model["x"](*inputs)), of(right["x"](*inputs)), rtol=1e-9, atol=1e-9)
                with lora.disabled(model):
                    off = of(model["x"](*inputs))
                torch.testing.assert_close(off, of(base["x"](*inputs)), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(of(right["x"](*inputs)), off)


def test_attention_leaves_the_weight_of_its_output_unbuilt_and_drops_what_it_projects(monkeypatch):
    model, inputs, of, _ = adapted("attention")
    model["x"].out_proj.lora_dropout = 0.5
    monkeypatch.setattr(type(model["x"].out_proj), "lora_delta", lambda *_: pytest.fail("W was built"))
    assert not torch.allclose(of(model["x"](*inputs)), of(model["x"](*inputs)))
    of(model["x"].eval()(*inputs)).sum().backward()


@each_reader
def test_every_adapter_learns(reader):
    model, inputs, of, base = adapted(reader)
    names = [name for name, module in model.named_modules() if isinstance(module, lora.LoRALayer)]
    of(model["x"](*inputs)).square().sum().backward()
    right = by_hand(model, base)
    for name in names:
        right.get_submodule(name).weight.requires_grad_(True)
    of(right["x"](*inputs)).square().sum().backward()
    for name in names:
        layer, dW = model.get_submodule(name), right.get_submodule(name).weight.grad
        dW = dW.T if isinstance(layer, nn.Embedding) else dW
        expected = layer.lora_scaling * dW @ layer.lora_A.T
        torch.testing.assert_close(layer.lora_B.grad, expected, rtol=1e-8, atol=1e-8)
        expected = layer.lora_scaling * layer.lora_B.T @ dW
        torch.testing.assert_close(layer.lora_A.grad, expected, rtol=1e-8, atol=1e-8)


@each_reader
def test_it_is_saved_loaded_copied_merged_and_ejected(reader, tmp_path):
    model, inputs, of, base = adapted(reader)
    classes = [type(module) for module in base.modules()]
    before, y = of(base["x"](*inputs)), of(model["x"](*inputs))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(of(twin["x"](*inputs)), y)
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        next(iter(layers_of(twin))).lora_B.data.zero_()  # of its own
        assert torch.equal(of(model["x"](*inputs)), y)
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    other = copy.deepcopy(base)
    lora.load_adapter(other, tmp_path / "adapter.safetensors")
    assert torch.equal(of(other["x"](*inputs)), y)
    lora.eject(other)
    assert torch.equal(of(other["x"](*inputs)), before)
    assert [type(module) for module in other.modules()] == classes
    lora.merge(model)
    assert [type(module) for module in model.modules()] == classes
    torch.testing.assert_close(of(model["x"](*inputs)), y, rtol=1e-9, atol=1e-9)
    assert not any("lora" in name for module in model.modules() for name in vars(module))


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["fused", "far within", "parts", "attention", "on the left", "by dict"])
def test_it_is_compiled_without_a_break(reader):
    torch._dynamo.reset()
    model, inputs, of, _ = adapted(reader)
    compiled = torch.compile(model["x"], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(of(compiled(*inputs)), of(model["x"](*inputs)))


@pytest.mark.parametrize("reader", ["to a kernel", "to another file"])
def test_all_linear_leaves_out_what_kernels_are_given_where_inputs_are_dropped(reader):
    model = nn.ModuleDict({"x": READERS[reader][0](), "other": nn.Linear(8, 8)})
    report = lora.inject(model, target_modules="all-linear", r=2, lora_dropout=0.1)
    reason = "its parent may pass its weight to a kernel, which cannot drop inputs; adapt it with `lora_dropout=0`."
    assert report.left_out == {"x.proj": reason}
    assert [module.names for module in report.modules] == [("other",)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_it_is_checkpointed(use_reentrant):
    model, (x,), _, _ = adapted("fused")
    plain = model["x"](x)
    plain.sum().backward()
    expected = [parameter.grad.clone() for layer in layers_of(model) for _, parameter in layer.lora_parameters()]
    model.zero_grad()
    checkpoint(model["x"], x.clone().requires_grad_(True), use_reentrant=use_reentrant).sum().backward()
    got = [parameter.grad for layer in layers_of(model) for _, parameter in layer.lora_parameters()]
    torch.testing.assert_close(got, expected)


def test_what_a_forward_keeps_on_itself_stays():
    model, (x,), _, _ = adapted("by a helper")
    reader = model["x"]
    calls = float(reader.calls)
    reader(x)
    assert float(reader.calls) == calls + 1
    assert reader.seen == x.shape


class Counting(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Counts(nn.Module):
    """It reads a weight two levels down, of a module that it calls as well; both keep something."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([Counting()])

    def forward(self, x):
        for layer in self.inner:
            self.inner.calls = getattr(self.inner, "calls", 0) + 1
            x = F.linear(layer(x), layer.weight)
        return x


def test_what_forwards_within_keep_on_themselves_stays():
    model = nn.Sequential(Counts())
    lora.inject(model, target_modules="all-linear", r=2)
    assert isinstance(model[0], WeightReader)
    model(X)
    model(X)
    assert (model[0].inner[0].calls, model[0].inner.calls) == (2, 2)
    assert isinstance(model[0].inner[0].weight, nn.Parameter)


def test_a_layer_that_is_only_called_is_not_read():
    model, *_ = adapted("fused")
    assert model["x"].lora_reads == {"qkv": None}
    model = nn.Sequential(Fused())
    lora.inject(model, target_modules=["0.proj"], r=2)
    assert type(model[0]) is Fused


def test_only_what_reads_weights_is_touched_and_its_signature_stays():
    model, *_ = adapted("far within")
    touched = {name for name, module in model.named_modules() if isinstance(module, WeightReader)}
    assert touched == {"x", "x.blocks.0", "x.blocks.1"}
    fused = model.get_submodule("x.blocks.0")
    assert isinstance(fused, Fused)
    assert list(inspect.signature(fused.forward).parameters) == ["x", "scale"]
    assert model["x"].blocks[0].qkv.weight is dict(model.named_parameters())["x.blocks.0.qkv.weight"]


@pytest.mark.parametrize("cls", [ByDevice, ByType])
def test_who_asks_for_a_class_a_device_or_a_dtype_alone_reads_no_weight(cls):
    model = nn.Sequential(cls())
    before = model(X)
    lora.inject(model, target_modules="all-linear", r=2)
    assert type(model[0]) is cls
    assert torch.equal(model(X), before)


def test_what_no_forward_calls_finds_the_base_weight():
    model, *_ = adapted("parts")
    parts = model["x"].parts
    assert parts.init_weights() is parts.coefs.weight
    assert isinstance(parts.coefs.weight, nn.Parameter)


def test_a_second_injection_adds_to_what_is_read():
    model = nn.ModuleDict({"x": Fused(), "y": Fused()})
    lora.inject(model, target_modules=["x.qkv"], r=2)
    lora.inject(model, target_modules=["y.qkv", "x.proj"], r=2)
    for name in ("x", "y"):
        nn.init.ones_(model[name].qkv.lora_B)
        y = model[name](X)
        with lora.disabled(model):
            assert not torch.allclose(model[name](X), y)


def test_dropout_is_of_the_inputs_where_the_weight_is_multiplied_and_refused_elsewhere():
    model, (x,), _, _ = adapted("fused", lora_dropout=0.5)
    assert not torch.equal(model["x"](x), model["x"](x))
    make, targets, inputs, _ = READERS["kernel"]
    other = make()
    lora.inject(other, target_modules=targets, r=2, lora_dropout=0.5)
    with pytest.raises(RuntimeError, match=r"computes with the weight by view"):
        other(*inputs)
    other.eval()(*inputs)


def test_a_refused_injection_leaves_readers_as_they_were():
    model = nn.ModuleDict({"x": Fused(), "y": nn.Linear(4, 4)})
    model["y"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="y: its weight holds NaN"):
        lora.inject(model, target_modules="all-linear", r=2, init_lora_weights="pissa")
    assert type(model["x"]) is Fused


class Nameless(nn.Module):
    """Of its methods one has no name in its code, as that of Idefics' embedding of further words."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(x) * self.share()

    def share(self):
        return 0.5


def test_a_method_without_names_reads_nothing():
    model = nn.Sequential(Nameless())
    lora.inject(model, target_modules=["0.proj"], r=2)
    assert type(model[0]) is Nameless
