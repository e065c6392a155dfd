"""float16 ends at 65,504: a large scaling meets B, which is small, and not what is large; forward and backward."""

import copy

import pytest
import torch
from torch import nn

import lora
from lora.functional import lora_embedding

SCALING = 10_000.0
KINDS = {
    "linear": (nn.Linear(64, 48), {}),
    "merged": (nn.Linear(64, 48), {"splits": {"0": (16, 16, 16)}, "enable_lora": {"0": (True, False, True)}}),
    "conv, factored": (nn.Conv2d(6, 8, 3), {}),
    "conv, grouped": (nn.Conv2d(6, 8, 3, groups=2), {}),
    "conv, of loralib": (nn.Conv2d(6, 8, 3), {"factored": False}),
    "embedding": (nn.Embedding(32, 64), {}),
}
WAYS = ["fused", "without the fused function", "no gradient", "trainable base", "autocast"]


def layer_of(kind, adapter_dtype, dtype=torch.float16):
    torch.manual_seed(0)
    base, settings = KINDS[kind]
    model = nn.Sequential(copy.deepcopy(base)).to(dtype)
    lora.inject(model, target_modules=["0"], r=4, lora_alpha=4 * SCALING, adapter_dtype=adapter_dtype, **settings)
    return model[0]


def input_of(kind):
    if kind == "embedding":
        return torch.arange(32).view(4, 8)
    return (20 * torch.randn(4, 6, 8, 8) if kind.startswith("conv") else 20 * torch.randn(32, 64)).half()


def run(layer, x, way, exact=False):
    """The output, and the gradients of A and B; `exact` ones by float64."""
    size = 30 if layer.lora_A.dtype != torch.float16 else 1e-3  # a loss that was scaled, where gradients can be large
    if exact:
        layer, x, way = (
            layer.double(),
            x.double() if x.is_floating_point() else x,
            "no gradient" * (way == "no gradient"),
        )
    if way == "no gradient":
        with torch.no_grad():
            return (layer(x),)
    if way == "autocast":
        layer.weight.data = layer.weight.data.float()
        if layer._parameters.get("bias") is not None:
            layer.bias.data = layer.bias.data.float()
        with torch.autocast(
            "cpu",
            torch.float16,
        ):
            y = layer(x.float() if x.dtype == torch.float16 else x)
    elif way == "without the fused function":
        y = lora.LoRALayer.lora_forward(layer, x)
    else:
        layer.weight.requires_grad_(way == "trainable base")
        y = layer(x)
    dy = size * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y, *torch.autograd.grad(y, (layer.lora_A, layer.lora_B), dy.to(y.dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_at_its_start_changes_nothing_and_learns(kind, way):
    layer, x = layer_of(kind, None), input_of(kind)
    y, *gradients = run(layer, x, way)
    base = layer.lora_base_forward(x.float() if way == "autocast" and x.is_floating_point() else x)
    assert (y.float() - base.float()).abs().max() <= 2e-3 * base.float().abs().max()
    if gradients:
        dA, dB = gradients[::-1] if kind == "embedding" else gradients
        assert not dA.any()  # not NaN, either: B is zero (of embeddings, A)
        assert not dB.isnan().any()
        assert dB.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16], ids=str)
def test_it_is_the_equation(kind, adapter_dtype, way):
    layer, x = layer_of(kind, adapter_dtype), input_of(kind)
    with torch.no_grad():
        layer.lora_A.normal_(std=0.1), layer.lora_B.normal_(std=3e-5)
    expected = run(copy.deepcopy(layer), x, way, exact=True)
    got = run(layer, x, way)
    for value, wanted in zip(got, expected, strict=True):
        assert (value.double() - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_scale_what_is_added_and_what_comes_back(dtype):
    x, W, A, B = (torch.randn(n, m, dtype=dtype) for n, m in ((5, 6), (7, 6), (2, 6), (7, 2)))
    y = lora.functional.lora_linear(x, W, None, A.requires_grad_(), B.requires_grad_(), 3.0)
    h = torch.mm(x, A.T)
    assert torch.equal(y, torch.mm(x, W.T).addmm_(h, B.T, alpha=3.0))
    dy = torch.randn_like(y)
    dA, dB = torch.autograd.grad(y, (A, B), dy)
    x_, h_, dy_, B_ = (tensor.detach().double() for tensor in (x, h, dy, B))
    for got, left, right in ((dB, 3 * dy_, h_), (dA, 3 * dy_ @ B_, x_)):
        assert got.dtype == dtype
        error, size = (got.double() - left.T @ right).abs(), left.abs().T @ right.abs()
        # Each sum has up to 7 terms, and dh is rounded before it is multiplied: at most 8 roundings.
        assert (error <= 8 * torch.finfo(dtype).eps * size).all()


def test_the_function_for_embeddings():
    ids, B = torch.arange(3), torch.full((4, 2), 1e-5, dtype=torch.float16, requires_grad=True)
    A = torch.full((2, 3), 30.0, dtype=torch.float16, requires_grad=True)
    y = lora_embedding(ids, torch.zeros(3, 4, dtype=torch.float16), A, B, 5e4)
    dA, dB = torch.autograd.grad(y, (A, B), torch.full_like(y, 0.01))
    for got, wanted in ((y, 30.0), (dA, 0.02), (dB, 3 * 30 * 500)):
        torch.testing.assert_close(got.float(), torch.full_like(got, wanted, dtype=torch.float32), rtol=0.02, atol=0)
