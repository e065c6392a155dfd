"""What older releases of torch cannot do: a test of it names the first that can, and says what those before do."""

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def before(release: str) -> bool:
    """Whether this torch is older than a release, such as "2.9"."""
    return tuple(map(int, release.split("."))) > TORCH


def since(release: str, why: str) -> pytest.MarkDecorator:
    """Leave a test out with the releases before this one, of which `why` says what they cannot do."""
    return pytest.mark.skipif(before(release), reason=f"before torch {release}, {why}")


def through_a_compiler(words: str) -> str:
    """What to look for in a compiler's error for these words in ours: before torch 2.9 it repeats none of them."""
    return "Observed exception" if before("2.9") else words
