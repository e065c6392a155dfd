"""What all tests share: the hypothesis profile, a fixed seed, layers of every kind, and an oracle from numpy."""

import gc
import math
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: the tests run side by side

import hypothesis
import numpy as np
import pytest
import torch
from ranks import Ranks
from releases import before
from torch import Tensor, nn

import lora

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("ci")
torch.set_num_threads(1)

# Tensor parallelism, which lora.parallel refuses before torch 2.11; and what asks for all public names.
DIVIDED = ["parallel/test_parallel*.py", "test_docs.py"]
collect_ignore_glob = DIVIDED if before("2.11") else []

# One layer of each class and form: (class, arguments, shape of an input). Embeddings take ids.
LAYERS = {
    "Linear": (lora.Linear, {"in_features": 6, "out_features": 5}, (2, 3, 6)),
    "Linear transposed": (lora.Linear, {"in_features": 6, "out_features": 5, "fan_in_fan_out": True}, (2, 3, 6)),
    "MergedLinear": (
        lora.MergedLinear,
        {"in_features": 6, "out_features": 9, "splits": (4, 3, 2), "enable_lora": (True, False, True)},
        (2, 3, 6),
    ),
    "Embedding": (lora.Embedding, {"num_embeddings": 7, "embedding_dim": 5}, (3, 4)),
    "Conv1d": (lora.Conv1d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3}, (2, 4, 7)),
    "Conv2d": (lora.Conv2d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2}, (2, 4, 5, 6)),
    "Conv3d": (lora.Conv3d, {"in_channels": 2, "out_channels": 3, "kernel_size": 2}, (2, 2, 3, 4, 3)),
}
LAYERS |= {
    f"{name} factored": (cls, {**arguments, "factored": True}, shape)
    for name, (cls, arguments, shape) in LAYERS.items()
    if name.startswith("Conv")
}
# One of each mechanism: a dense update, one in slices, a table that is looked up, a convolution's update as loralib
# makes it, and as two convolutions. Other layers are one of these in other dimensions: test_conv.py and test_matrix.py
# have them all.
KINDS = ["Linear", "MergedLinear", "Embedding", "Conv2d", "Conv1d factored"]
# And for what reads or writes weights: one that is stored the other way round, and one whose rank is shared by groups.
STORED = [*KINDS, "Linear transposed", "Conv2d factored"]
WITH_DROPOUT = [name for name in KINDS if name != "Embedding"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N", help="of all tests, run each N-th")
    parser.addoption("--slow-part", default="0/1", metavar="K/N", help="of slow tests, run the K-th of N parts")


@pytest.hookimpl(tryfirst=True)  # before `-m` is asked which tests to leave out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if before("2.11"):
        items[:] = [item for item in items if item.path.name != "tensor_parallel.py"]  # doctests
    mark_sampled(items)
    mark_parts(items, *map(int, config.getoption("slow_part").split("/")))
    items[:] = items[:: config.getoption("every")]


def pytest_collection_finish() -> None:
    """Exempt what is there from garbage collection: it is slow to scan all modules and tests again and again."""
    gc.freeze()


def mark_sampled(items: list[pytest.Item]) -> None:
    """Of a test that is marked `sampled(n)`, n cases are run by default, evenly spread: all others are slow.

    With `sampled(n, others="exhaustive")` the others are that.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for found in cases.values():
        mark = found[0].get_closest_marker("sampled")
        (n,), others = mark.args, getattr(pytest.mark, mark.kwargs.get("others", "slow"))
        for i, item in enumerate(found):
            if i * n % len(found) >= n:
                item.add_marker(others)


def mark_parts(items: list[pytest.Item], part: int, parts: int) -> None:
    """Divide the slow tests into so many parts, one test after the other: those of other parts become exhaustive."""
    slow = [item for item in items if item.get_closest_marker("slow") and not item.get_closest_marker("exhaustive")]
    for i, item in enumerate(slow):
        if i % parts != part:
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Each test starts from one seed, and leaves no mode of torch's behind for the next."""
    torch.manual_seed(0)
    yield
    left = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    torch.set_grad_enabled(True)
    assert left == (True, False, False)


@pytest.fixture(scope="session")
def ranks():
    """Two ranks of a process group, kept for the whole test run."""
    ranks = Ranks()
    yield ranks
    ranks.stop()


def make(kind: str, **arguments) -> lora.LoRALayer:
    """A layer of this kind, its A and B both random, so that the update is not zero."""
    cls, defaults, _ = LAYERS[kind]
    return randomised(cls(**{"r": 2, "lora_alpha": 3, **defaults, **arguments}))


def example(kind: str, dtype: torch.dtype = torch.float32, **options) -> Tensor:
    """An input for a layer of this kind."""
    _, arguments, shape = LAYERS[kind]
    if kind == "Embedding":
        return torch.randint(arguments["num_embeddings"], shape)
    return torch.randn(shape, dtype=dtype, **options)


@torch.no_grad()
def randomised(layer: lora.LoRALayer, std: float = 1.0) -> lora.LoRALayer:
    """The layer, with new random values in A and B."""
    for _, parameter in layer.lora_parameters():
        parameter.copy_(torch.randn(parameter.shape) * std)
    return layer


def with_float32_adapter(layer: lora.LoRALayer) -> lora.LoRALayer:
    """The layer, its A and B in float32, whatever the base weight is in."""
    layer.lora_A, layer.lora_B = nn.Parameter(layer.lora_A.float()), nn.Parameter(layer.lora_B.float())
    return layer


def update(layer: lora.LoRALayer) -> np.ndarray:
    """lora_alpha / r · B A in the shape of the base weight, by numpy in float64."""
    A, B = layer.lora_A.detach().double().numpy(), layer.lora_B.detach().double().numpy()
    if isinstance(layer, lora.MergedLinear):
        delta, a, b, row = np.zeros((layer.out_features, layer.in_features)), 0, 0, 0
        for size, enabled in zip(layer.splits, layer.enable_lora, strict=True):
            if enabled:
                delta[row : row + size] = B[b : b + size] @ A[a : a + layer.r]
                a, b = a + layer.r, b + size
            row += size
    elif getattr(layer, "factored", False):
        delta, per_group, ranks = np.zeros(layer.weight.shape), len(B) // layer.groups, layer.r // layer.groups
        for o in range(len(B)):
            start = o // per_group * ranks
            delta[o] = np.tensordot(B[o].reshape(ranks), A[start : start + ranks], axes=1)
    elif hasattr(layer, "factored"):
        delta = np.reshape(B @ A, layer.weight.shape)
    else:
        delta = B @ A
    if isinstance(layer, lora.Embedding) or getattr(layer, "fan_in_fan_out", False):
        delta = delta.T
    return layer.lora_alpha / layer.r * delta


def plain_twin(layer: lora.LoRALayer) -> nn.Module:
    """A torch layer in float64 that has W₀ + lora_alpha / r · B A for its weight."""
    weight = layer.weight.detach().double() + (torch.from_numpy(update(layer)) if layer.r else 0)
    if isinstance(layer, nn.Linear):
        twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
        weight = weight.T if layer.fan_in_fan_out else weight
    elif isinstance(layer, nn.Embedding):
        twin = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, dtype=torch.float64)
    else:
        cls = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(layer.kernel_size)]
        geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
        bias = layer.bias is not None
        twin = cls(layer.in_channels, layer.out_channels, layer.kernel_size, bias=bias, dtype=torch.float64, **geometry)
    twin.weight = nn.Parameter(weight)
    if getattr(layer, "bias", None) is not None:
        twin.bias = nn.Parameter(layer.bias.detach().double())
    return twin


def assert_equation(layer: lora.LoRALayer, x: Tensor, terms: int = 64) -> None:
    """The layer computes what its plain twin does; sums of at most `terms` products differ by rounding only."""
    expected = plain_twin(layer)(x.double() if x.is_floating_point() else x)
    got = layer(x)
    assert got.dtype == layer.weight.dtype
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    tolerance = math.sqrt(terms) * 4 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * scale)
