"""Releases of torch in which tensor parallelism goes wrong are refused where it begins, and nowhere else."""

import re

import pytest
import torch
from torch.torch_version import TorchVersion

import lora.parallel


@pytest.mark.parametrize("release", ["2.7.0", "2.10.1+cu130"])
def test_tensor_parallelism_is_refused_in_words(monkeypatch, release):
    monkeypatch.setattr(torch, "__version__", TorchVersion(release))
    for name in lora.parallel.__all__:
        said = (
            f"lora.parallel.{name} needs torch 2.11 or newer, and this is torch {release}: older releases compute "
            "wrong norms of divided gradients, or restore divided layers wrongly from checkpoints."
        )
        with pytest.raises(ImportError, match=f"^{re.escape(said)}$"):
            getattr(lora.parallel, name)


@pytest.mark.parametrize("release", ["2.11.0", "2.11.0a0+1f2e", "2.11.0.dev20260110", "2.100.0", "3.0.0+cpu"])
def test_newer_releases_are_not(monkeypatch, release):
    monkeypatch.setattr(torch, "__version__", TorchVersion(release))
    assert all(callable(getattr(lora.parallel, name)) for name in lora.parallel.__all__)
