"""DoRA's equation kind by kind, as it reads: in torch.float64, every sum built, with autograd's own gradients."""

import functools
import math

import torch
import torch.nn.functional as F
from conftest import STORED, example, make
from torch import Tensor

import lora

# Further forms of layers: the name in conftest's LAYERS, and arguments.
FORMS = {name: (name, {}) for name in STORED} | {
    "Linear without a bias": ("Linear", {"bias": False}),
    "MergedLinear with all splits": ("MergedLinear", {"enable_lora": (True, True, True)}),
    "MergedLinear with one split": ("MergedLinear", {"enable_lora": (False, True, False)}),
    "MergedLinear transposed": ("MergedLinear", {"fan_in_fan_out": True}),
    "Embedding with padding": ("Embedding", {"padding_idx": 2}),
    "Embedding with max_norm": ("Embedding", {"max_norm": 1.0}),
    "Embedding with both": ("Embedding", {"padding_idx": -1, "max_norm": 2.0, "norm_type": 1.0}),
    "Conv2d in one group": ("Conv2d", {"groups": 1, "stride": 2, "padding": 1}),
    "Conv2d factored, one group": ("Conv2d factored", {"groups": 1, "stride": 2, "padding": 1}),
    "Conv2d factored, circular": ("Conv2d factored", {"padding": 1, "padding_mode": "circular"}),
    "Conv2d factored, uneven kernel": ("Conv2d factored", {"kernel_size": (1, 3), "padding": "same"}),
}


def dora(form: str, **arguments) -> lora.LoRALayer:
    """A layer of this form with DoRA; A, B and magnitudes are random."""
    kind, own = FORMS[form]
    return make(kind, **own, **{"use_dora": True, **arguments})


def input_of(form: str, dtype: torch.dtype = torch.float32, **options) -> Tensor:
    return example(FORMS[form][0], dtype, **options)


def leaves(layer: lora.LoRALayer) -> dict[str, Tensor]:
    """The layer's parameters in float64, as leaves of their own."""
    return {
        name: parameter.detach().double().clone().requires_grad_(parameter.requires_grad)
        for name, parameter in layer.named_parameters()
    }


def enabled(layer: lora.MergedLinear) -> list[int]:
    """The sizes of the splits that are adapted."""
    return [size for size, on in zip(layer.splits, layer.enable_lora, strict=True) if on]


def delta(layer: lora.LoRALayer, A: Tensor, B: Tensor) -> Tensor:
    """B A in the shape of the weight."""
    if isinstance(layer, lora.MergedLinear):
        As, Bs = iter(A.split(layer.r)), iter(B.split(enabled(layer)))
        every = zip(layer.splits, layer.enable_lora, strict=True)
        dense = torch.cat([next(Bs) @ next(As) if on else A.new_zeros(n, A.shape[1]) for n, on in every])
    elif getattr(layer, "factored", False):
        As, Bs = A.chunk(layer.groups), B.flatten(1).chunk(layer.groups)
        dense = torch.cat([torch.tensordot(b, a, 1) for a, b in zip(As, Bs, strict=True)])
    elif hasattr(layer, "factored"):
        dense = (B @ A).reshape(layer.weight.shape)
    else:
        dense = B @ A
    return dense.T if _across(layer) else dense


def base_function(layer: lora.LoRALayer):
    """The base layer as a function of x and a weight, without its bias."""
    if isinstance(layer, torch.nn.Linear):
        return lambda x, W: F.linear(x, W.T if layer.fan_in_fan_out else W)
    if isinstance(layer, torch.nn.Embedding):
        return lambda x, W: F.embedding(x, W, layer.padding_idx)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    convolve = functools.partial(convolve, stride=layer.stride, dilation=layer.dilation, groups=layer.groups)
    if layer.padding_mode == "zeros":
        return lambda x, W: convolve(x, W, padding=layer.padding)
    around = [n for size in reversed(layer.padding) for n in (size, size)]
    return lambda x, W: convolve(F.pad(x, around, mode=layer.padding_mode), W)


def low_rank(layer: lora.LoRALayer, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """B A x."""
    if isinstance(layer, torch.nn.Embedding):  # A's column for the padding gets no gradient, B does
        return F.embedding(x, A.T, layer.padding_idx) @ B.T
    return base_function(layer)(x, delta(layer, A, B))


def base_weight(layer: lora.LoRALayer, W: Tensor) -> Tensor:
    """W₀ as the base layer computes with it."""
    if getattr(layer, "max_norm", None) is None:
        return W
    sizes = W.norm(p=layer.norm_type, dim=1, keepdim=True)
    return W * (layer.max_norm / (sizes + 1e-7)).clamp(max=1)


def by_rows(layer: lora.LoRALayer, W: Tensor) -> Tensor:
    """(outputs, all else)."""
    return (W.T if _across(layer) else W).flatten(1)


def _across(layer: lora.LoRALayer) -> bool:
    """Whether the weight's last dimension counts the outputs."""
    return isinstance(layer, lora.Embedding) or getattr(layer, "fan_in_fan_out", False)


def norms(layer: lora.LoRALayer, W: Tensor) -> Tensor:
    """Of the outputs that have a magnitude."""
    every = by_rows(layer, W).norm(dim=1)
    if not isinstance(layer, lora.MergedLinear):
        return every
    parts = zip(every.split(layer.splits), layer.enable_lora, strict=True)
    return torch.cat([part for part, on in parts if on])


def gain(layer: lora.LoRALayer, m: Tensor, W: Tensor) -> Tensor:
    """g = m / ‖W‖ of all outputs, the norm detached; 1 for splits that are not adapted."""
    g = m / norms(layer, W).detach()
    if not isinstance(layer, lora.MergedLinear):
        return g
    parts, every = iter(g.split(enabled(layer))), zip(layer.splits, layer.enable_lora, strict=True)
    return torch.cat([next(parts) if on else g.new_ones(n) for n, on in every])


def formula(layer: lora.LoRALayer, x: Tensor, tensors: dict[str, Tensor], drop=lambda x: x) -> Tensor:
    """y = g ⊙ (W₀ x + s · B A drop(x)) + b, from the layer's parameters in float64."""
    x = x.double() if x.is_floating_point() else x
    W, A, B = base_weight(layer, tensors["weight"]), tensors["lora_A"], tensors["lora_B"]
    g = gain(layer, tensors["lora_magnitude"], W + layer.scaling * delta(layer, A, B))
    per_output = [-1] + [1] * (x.dim() - 2) if hasattr(layer, "factored") else [-1]
    y = g.view(per_output) * (base_function(layer)(x, W) + layer.scaling * low_rank(layer, drop(x), A, B))
    return y if tensors.get("bias") is None else y + tensors["bias"].view(per_output)


def merged(layer: lora.LoRALayer) -> Tensor:
    """W = g ⊙ (W₀ + s · B A), in float64."""
    tensors = {name: tensor.detach() for name, tensor in leaves(layer).items()}
    W = base_weight(layer, tensors["weight"]) + layer.scaling * delta(layer, tensors["lora_A"], tensors["lora_B"])
    g = gain(layer, tensors["lora_magnitude"], W)
    return W * (g if _across(layer) else g.view(-1, *[1] * (W.dim() - 1)))


def assert_formula(layer, x, terms=64):
    """Output and gradients of the layer are the formula's, to the rounding of sums of so many terms."""
    tensors = leaves(layer)
    wide = x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
    expected, got = formula(layer, wide, tensors), layer(x)
    assert got.dtype == layer.weight.dtype
    dy = torch.randn(got.shape, dtype=got.dtype)
    trained = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    theirs = [tensors[name] for name in trained] + [wide] * x.requires_grad
    ours = [layer.get_parameter(name) for name in trained] + [x] * x.requires_grad
    pairs = [
        ("output", got, expected),
        *zip(
            [*trained, "x"],
            torch.autograd.grad(got, ours, dy),
            torch.autograd.grad(expected, theirs, dy.double()),
            strict=False,
        ),
    ]
    tolerance = math.sqrt(terms) * 8 * torch.finfo(got.dtype).eps
    for name, value, right in pairs:
        scale = max(1.0, right.abs().max().item())
        assert (value.double() - right).abs().max() <= tolerance * scale, name
