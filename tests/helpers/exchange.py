"""What the tests of exchange formats share: layers of any kind, oracles from numpy, and folders as PEFT's."""

import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import randomised, update
from hypothesis import strategies as st
from torch import nn
from toy_model import snapshot

import lora

PREFIX = "base_model.model."
FORMATS = ["lora", "peft", "portable"]
sizes = st.integers(1, 6)


def values(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def model_of(*layers):
    """A model of these layers, of which nothing but the adapters trains."""
    model = nn.Sequential(*layers)
    lora.mark_only_lora_as_trainable(model)
    return model


def alone(layer):
    """The adapter of one layer, which is module `0` of its model."""
    return lora.adapter_of(model_of(layer))


def float64(tensor):
    return tensor.detach().double().numpy()


@st.composite
def layers(draw, kinds=("Linear", "MergedLinear", "Embedding", "Conv", "ConvFactored"), dtype=torch.float64):
    """A LoRA layer of any kind, form and size, with random A and B."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(kinds))
    r, more = draw(st.integers(1, 3)), {"dtype": dtype}
    more |= {"lora_alpha": draw(st.sampled_from([1, 2.5, 16])), "use_rslora": draw(st.booleans())}
    if kind == "Linear":
        transposed = draw(st.booleans())
        return randomised(lora.Linear(draw(sizes), draw(sizes), r=r, fan_in_fan_out=transposed, **more))
    if kind == "MergedLinear":
        splits = draw(st.lists(sizes, min_size=1, max_size=4))
        mask = draw(st.lists(st.booleans(), min_size=len(splits), max_size=len(splits)).filter(any))
        more |= {"fan_in_fan_out": draw(st.booleans()), "enable_lora": mask, "splits": splits}
        return randomised(lora.MergedLinear(draw(sizes), sum(splits), r=r, **more))
    if kind == "Embedding":
        return randomised(lora.Embedding(draw(sizes), draw(sizes), r=r, **more))
    n, groups, factored = draw(st.integers(1, 3)), draw(st.integers(1, 3)), kind == "ConvFactored"
    kernel = draw(st.tuples(*[st.integers(1, 3)] * n)) if factored else (draw(st.integers(1, 3)),) * n
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    cls = [lora.Conv1d, lora.Conv2d, lora.Conv3d][n - 1]
    r = r * groups if factored else r
    return randomised(cls(*channels, kernel, r=r, groups=groups, factored=factored, **more))


def scaling(settings):
    root = math.sqrt(settings["r"]) if settings["use_rslora"] else settings["r"]
    return settings["lora_alpha"] / root


def true_update(layer):
    """s · B A by numpy, for rsLoRA as well."""
    return update(layer) * (math.sqrt(layer.r) if layer.use_rslora else 1)


def single_update(settings, A, B):
    """s · B A of a single pair: two matrices, or a convolution with r filters and one with a kernel of 1."""
    A, B, base = float64(A), float64(B), settings["base"]
    if base["kind"] == "conv":
        groups, r, out = base["groups"], len(A), len(B)
        delta = np.zeros((out, *A.shape[1:]))
        for o in range(out):
            for j in range(r // groups):
                delta[o] += B[(o, j, *[0] * (A.ndim - 2))] * A[o // (out // groups) * (r // groups) + j]
    else:
        delta = B @ A
        delta = delta.T if base["kind"] == "embedding" or base.get("fan_in_fan_out") else delta
    return scaling(settings) * delta


def close(got, expected, eps=1e-12):
    np.testing.assert_allclose(got, expected, rtol=eps, atol=eps * max(1, np.abs(expected).max()))


def refused(call, *messages):
    with pytest.raises(lora.AdapterError) as caught:
        call()
    for message in messages:
        assert message in str(caught.value)
    return str(caught.value)


def refuses(path, *messages, model=None, error=lora.AdapterError):
    """Both reading it alone and loading it raise one error that says all of this, and the model is as it was."""
    model = nn.Sequential(nn.Linear(4, 3)) if model is None else model
    before = snapshot(model)
    with pytest.raises(error) as caught:
        lora.load_adapter(model, path)
    assert snapshot(model) == before
    for message in messages:
        assert message in str(caught.value)
    return str(caught.value)


def peft_files(path):
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    return config, safetensors.torch.load_file(path / "adapter_model.safetensors")


def write_peft(path, tensors, **config):
    path.mkdir(exist_ok=True)
    tensors = {f"{PREFIX}{name}": tensor.clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}
    (path / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    return path


def flat(path, **tensors):
    safetensors.torch.save_file({name.replace("_0_", "0."): value for name, value in tensors.items()}, path)
    return path
