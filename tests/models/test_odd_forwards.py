"""Forwards that get at a weight, or write to it, in unusual ways: they find W, or are told that they cannot."""

import collections

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune as prune

import lora


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.T @ x


product = Product.apply
Held = collections.namedtuple("Held", "w")


def around(function):
    def call(*args):
        return function(*args)

    return call


def one_after_the_other(x, weights):
    for w in weights:
        x = F.linear(x, w)
    return x


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def project(self, x):
        return F.linear(x, self.w)

    def forward(self, x):
        return self.project(x)

    @property
    def doubled(self):
        return self.w * 2


class Keeps(Owner):
    """It keeps a method of its, and its parameter in other places."""

    def __init__(self):
        super().__init__()
        self.tables = {"linear": self.project}, collections.OrderedDict(w=self.w), Held(self.w)
        object.__setattr__(self, "hidden", self.w)

    def forward(self, x):
        methods, ordered, held = self.tables
        return methods["linear"](x) + F.linear(x, ordered["w"] + held.w + self.hidden)


class Calls(Owner):
    def __call__(self, x):
        return F.linear(x, self.w)


def owner(forward):
    return type("Odd", (Owner,), {"forward": forward})


def parent(make, forward):
    def init(self):
        nn.Module.__init__(self)
        self.inner = make()

    return type("Parent", (nn.Module,), {"__init__": init, "forward": forward})


def weights():
    return nn.ParameterList([torch.randn(4, 4, dtype=torch.float64) for _ in range(2)])


def by_name():
    return nn.ParameterDict({"a": torch.randn(4, 4, dtype=torch.float64)})


def asks_tensor(self, x):
    return F.linear(x, self.w) if isinstance(self.w, torch.Tensor) else x * 0


def asks_parameter(self, x):
    return F.linear(x, self.w) if isinstance(self.w, nn.Parameter) else x * 0


def walks(self, x):
    for child in self.children():
        x = F.linear(x, child.w)
    return x


ODD = {
    "autograd by another name": owner(lambda self, x: product(x, self.w)),
    "__getattr__": owner(lambda self, x: F.linear(x, self.__getattr__("w"))),
    "get_parameter": owner(lambda self, x: F.linear(x, self.get_parameter("w"))),
    "state_dict": owner(lambda self, x: F.linear(x, self.state_dict(keep_vars=True)["w"])),
    "state_dict by unpacking": owner(lambda self, x: F.linear(x, self.state_dict(*(), **{"keep_vars": True})["w"])),
    "isinstance Tensor": owner(asks_tensor),
    "isinstance Parameter": owner(asks_parameter),
    "all parameters": owner(lambda self, x: one_after_the_other(x, self.parameters())),
    "vmap": owner(lambda self, x: torch.vmap(lambda row: x @ row)(self.w).T),
    "transposed by name": owner(lambda self, x: x @ torch.transpose(self.w, dim0=0, dim1=1)),
    "normalised": owner(lambda self, x: F.linear(x, F.normalize(self.w))),
    "a copy changed": owner(lambda self, x: F.linear(x, self.w.clone().mul_(2))),
    "values read": owner(lambda self, x: F.linear(x, self.w) * (1 + self.w.data[0].abs().sum())),
    "kept elsewhere": Keeps,
    "its own __call__": Calls,
    "a list": parent(weights, lambda self, x: one_after_the_other(x, self.inner)),
    "a list by index": parent(weights, lambda self, x: F.linear(F.linear(x, self.inner[1]), self.inner[-2])),
    "a dict": parent(by_name, lambda self, x: one_after_the_other(x, self.inner.values())),
    "a child's property": parent(Owner, lambda self, x: F.linear(x, self.inner.doubled)),
    "children": parent(Owner, walks),
    "a child's parameters": parent(Owner, lambda self, x: one_after_the_other(x, self.inner.parameters())),
    "around, and does not say so": parent(Owner, around(lambda self, x: F.linear(x, self.inner.w))),
    "by a dotted name": parent(Owner, lambda self, x: F.linear(x, self.get_parameter("inner.w"))),
}


@pytest.mark.parametrize("how", ODD)
def test_it_computes_and_learns_as_with_the_dense_weight(how):
    torch.manual_seed(0)
    model, expected = ODD[how](), ODD[how]()
    expected.load_state_dict(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    lora.inject(model, target_parameters=names, r=2, lora_alpha=6)
    factors = dict(model.named_parameters())
    for name, own in expected.named_parameters():
        A, B = factors[f"{name}_lora_A"], nn.init.normal_(factors[f"{name}_lora_B"])
        own.data += 3 * (B @ A).detach()
    x = torch.randn(4, 4, dtype=torch.float64)
    y, y_dense = model(x), expected(x)
    torch.testing.assert_close(y, y_dense)
    y.square().sum().backward()
    y_dense.square().sum().backward()
    for name, own in expected.named_parameters():
        A, B = factors[f"{name}_lora_A"], factors[f"{name}_lora_B"]
        torch.testing.assert_close(A.grad, 3 * B.detach().T @ own.grad)
        torch.testing.assert_close(B.grad, 3 * own.grad @ A.detach().T)


def renormalised(self, x):
    self.w.data = torch.renorm(self.w.data, 2, 0, 0.5)
    return F.linear(x, self.w)


def replaced(self, x):
    self.w = nn.Parameter(self.w * 0.5)
    return F.linear(x, self.w)


def scaled(self, x):
    with torch.no_grad():
        self.w *= 0.5
    return F.linear(x, self.w)


def zeroed(self, x):
    with torch.no_grad():
        self.w[0] = 0
    return F.linear(x, self.w)


WRITES = {
    "data =": renormalised,
    ".data.clamp_": lambda self, x: self.w.data.clamp_(-0.1, 0.1) @ x,
    ".data.zero_": lambda self, x: self.w.data[0].zero_() @ x,
    "clamp_": lambda self, x: torch.clamp_(self.w, -0.1, 0.1) @ x,
    "clamp": lambda self, x: torch.clamp(self.w, -0.1, 0.1, out=self.w) @ x,
    "an assignment": replaced,
    "__imul__": scaled,
    "[…] =": zeroed,
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_that_would_be_lost_is_an_error(how):
    model = owner(WRITES[how])()
    lora.inject(model, target_parameters=["w"], r=2)
    nn.init.normal_(model.w_lora_B)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = rf"`w` of an? \w+ must not be written to in a forward, as .*{how.replace('[', chr(92) + '[')}"
    with pytest.raises(RuntimeError, match=message):
        model(torch.randn(4, 4, dtype=torch.float64))
    after = model.state_dict()
    assert [*after] == [*before]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "compute", [torch.nn.utils.spectral_norm, lambda module, name: prune.l1_unstructured(module, name, 0.5)]
)
def test_what_a_hook_computes_the_weight_from_is_refused(compute):
    model = compute(owner(lambda self, x: F.linear(x, self.w))(), "w")
    with pytest.raises(ValueError, match=r"w_orig: \w+ reads it, and computes what the forward takes instead"):
        lora.inject(model, target_parameters=["w_orig"], r=2)
