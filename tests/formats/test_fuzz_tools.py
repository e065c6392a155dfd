"""Whatever names, shapes and settings a file of another tool's has: an adapter, or one AdapterError."""

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_files import is_written

import lora

ENDINGS = [
    *(".lora_down.weight", ".lora_up.weight", ".alpha", ".lora_mid.weight", ".hada_w1_a", ".dora_scale"),
    *(".lora.down.weight", "_lora.up.weight", ".lora_linear_layer.down.weight", ".network_alpha"),
    *(".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight", ".lora_B.default.weight", ".lora_embedding_A"),
    *(".lora_embedding_B", ".lora_magnitude_vector", ".lora_A", ".lora_B", ".lora_B.bias", ".weight", ""),
    *(".lora_a.weight", ".lora_b.weight", ".magnitude", ".lora_a", ".lora_b", ".m"),
]
MODULES = st.sampled_from(["a", "unet.a", "transformer.h.0", "lora_unet_a_b", "lora_te_a", "x.experts", ""])
PAIRS = [
    *((".lora_down.weight", ".lora_up.weight"), (".lora.down.weight", ".lora.up.weight"), (".lora_A", ".lora_B")),
    *((".lora_A.weight", ".lora_B.weight"), (".lora_A.default.weight", ".lora_B.default.weight")),
    *((".lora_a.weight", ".lora_b.weight"), (".lora_a", ".lora_b"), (".lora_embedding_A", ".lora_embedding_B")),
]
SHAPES = st.lists(st.integers(0, 4), max_size=5)
# Mostly what is right, so that more than the first mistake is looked at.
DTYPES = st.one_of(
    *[st.just(torch.float32)] * 3,
    st.sampled_from([*filter(is_written, (torch.bfloat16, torch.int64, torch.complex64, torch.bool))]),
)
VALUES = st.one_of(*[st.just(1.0)] * 6, st.sampled_from([0.0, float("nan"), float("inf")]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.sampled_from(["lora", "LORA", "", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["scale", "a", "rank"]), inner),
    max_leaves=6,
)
CONFIGS = st.dictionaries(
    st.sampled_from(["r", "lora_alpha", "peft_type", "lora_parameters", "fine_tune_type", "rank_pattern", "use_dora"]),
    JSON,
)


@st.composite
def tensors(draw):
    usual, dtype, found = draw(st.sampled_from([[2, 2], [2, 2, 1, 1]])), draw(DTYPES), {}
    shapes, pairs = (
        st.one_of(*[st.just(usual)] * 6, SHAPES),
        draw(st.sampled_from([PAIRS, [draw(st.sampled_from(PAIRS))]])),
    )
    for module in draw(st.lists(MODULES, min_size=1, max_size=2, unique=True)):
        endings = {
            *draw(st.sampled_from(pairs)),
            *draw(st.one_of(*[st.just(set())] * 4, st.sets(st.sampled_from(ENDINGS), max_size=1))),
        }
        for name in sorted(f"{module}{ending}" for ending in endings if module + ending):
            shape = [] if name.endswith("alpha") else draw(shapes)
            found[name] = torch.full(shape, draw(VALUES)).to(dtype)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=100, deadline=None)
@given(
    tensors=tensors(),
    file=st.sampled_from(["a.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors", "a.pt"]),
    config=st.none() | CONFIGS,
    said=st.none()
    | st.none()
    | st.none()
    | JSON
    | st.dictionaries(st.sampled_from(["unet.r", "unet.rank_pattern", "a.r", "x"]), JSON),
    lora_alpha=st.sampled_from([None, 2, 2]),
)
def test_an_adapter_or_one_error(folder, tensors, file, config, said, lora_alpha):
    for left in folder.iterdir():
        left.unlink()
    if file.endswith(".pt"):
        torch.save(tensors, folder / file)
    else:
        metadata = None if said is None else {"lora_adapter_metadata": json.dumps(said)}
        safetensors.torch.save_file(tensors, folder / file, metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    outcome = read(folder / file, lora_alpha)
    if isinstance(outcome, lora.Adapter):
        assert not list(outcome.problems())
        owners = {name.rpartition(".")[0] for name in outcome.tensors}
        assert owners == {*outcome.modules, *(name.rpartition(".")[0] for name in outcome.trained_in_full)}
    else:
        assert len(str(outcome)) < 20_000
        assert isinstance(outcome, lora.AdapterError) or lora_alpha is not None


def read(path, lora_alpha):
    """The adapter, or the error that a file may cause; another exception is none that it may."""
    try:
        return lora.read_adapter(path, lora_alpha=lora_alpha)
    except (lora.AdapterError, TypeError) as error:
        return error
