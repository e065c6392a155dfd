"""What older releases of torch cannot do: its tests name the first release that can, and say why others cannot."""

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def before(release: str) -> bool:
    """Whether this torch is older than a release, such as "2.9"."""
    return tuple(map(int, release.split("."))) > TORCH


def since(release: str, why: str) -> pytest.MarkDecorator:
    """Leave a test out with older releases; `why` says what goes wrong there."""
    return pytest.mark.skipif(before(release), reason=f"before torch {release}, {why}")


def through_a_compiler(words: str) -> str:
    """What to look for in a compiler's error for these words in ours: before torch 2.9 it repeats none of them."""
    return "Observed exception" if before("2.9") else words
