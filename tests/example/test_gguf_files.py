"""examples/phi3/gguf_files.py: what llama.cpp reads in the files is the update, by numpy in float64; and refusals."""

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from phi3 import pretrained, tiny
from phi3.errors import UserError
from phi3.gguf_files import export_base, export_gguf, tensor_name

import lora

NAMES = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def block_diagonal(layer: lora.LoRALayer) -> np.ndarray:
    """s · B A of a linear layer, merged or not, in float64."""
    A, B = (tensor.detach().double().numpy() for tensor in (layer.lora_A, layer.lora_B))
    if not isinstance(layer, lora.MergedLinear):
        return layer.scaling * B @ A
    delta, row, b, a = np.zeros((layer.out_features, layer.in_features)), 0, 0, 0
    for size, enabled in zip(layer.splits, layer.enable_lora, strict=True):
        if enabled:
            delta[row : row + size] = layer.scaling * B[b : b + size] @ A[a : a + layer.r]
            b, a = b + size, a + layer.r
        row += size
    return delta


def adapted(**options) -> torch.nn.Module:
    """The tiny Phi-3 with random adapters on all its projections."""
    model = tiny.model()
    splits = pretrained.fused_splits(model.config)
    lora.inject(model, target_modules=list(NAMES), splits=splits, **options)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


def written(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """A file's metadata, and its tensors by name."""
    reader = gguf.GGUFReader(path)
    return (
        {key: field.contents() for key, field in reader.fields.items()},
        {tensor.name: tensor.data for tensor in reader.tensors},
    )


@given(
    r=st.integers(1, 5),
    other_r=st.integers(1, 9),
    lora_alpha=st.sampled_from([-3, 0, 0.5, 8, 1e4]),
    use_rslora=st.booleans(),
    enable_lora=st.sampled_from([[True, True, True], [True, False, True], [False, False, True]]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_llama_cpps_arithmetic_gives_the_update(
    tmp_path_factory, r, other_r, lora_alpha, use_rslora, enable_lora, dtype
):
    patterns = {"rank_pattern": {"o_proj": other_r, r"1\..*gate_up_proj": other_r}, "alpha_pattern": {"down_proj": 7}}
    settings = {"enable_lora": {"qkv_proj": enable_lora}, "adapter_dtype": dtype, **patterns}
    model = adapted(r=r, lora_alpha=lora_alpha, use_rslora=use_rslora, **settings)
    path = export_gguf(lora.adapter_of(model), tmp_path_factory.mktemp("adapter") / "adapter.gguf")
    about, tensors = written(path)
    alpha = about["adapter.lora.alpha"]
    assert alpha > 0
    for n, block in enumerate(model.model.layers):
        for module, name in NAMES.items():
            A, B = (tensors.pop(f"blk.{n}.{name}.weight.lora_{part}") for part in "ab")
            assert A.dtype == B.dtype == np.float32
            assert len(A) == B.shape[1]
            layer = block.get_submodule(module)
            expected, got = block_diagonal(layer), B.astype(np.float64) @ A.astype(np.float64) * alpha / len(A)
            # Only B is rounded, and A where it is float64: each product of the sum by 2⁻²³ at most.
            products = np.abs(B).astype(np.float64) @ np.abs(A).astype(np.float64) * alpha / len(A)
            assert (np.abs(got - expected) <= 2.0**-22 * products + 1e-30).all()
    assert not tensors


def test_what_the_file_says_of_itself(tmp_path):
    path = export_gguf(lora.adapter_of(adapted(r=2)), tmp_path / "adapter.gguf")
    about, tensors = written(path)
    assert about["general.architecture"] == "phi3"
    assert about["general.type"] == "adapter"
    assert about["adapter.type"] == "lora"
    assert about["adapter.lora.alpha"] == 6  # q, k and v together
    assert tensors["blk.0.attn_qkv.weight.lora_a"].shape == (6, 48)
    assert tensors["blk.1.ffn_up.weight.lora_b"].shape == (128, 4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter.gguf"]


def test_the_adapter_stays_as_it_is(tmp_path):
    adapter = lora.adapter_of(adapted(r=2, use_rslora=True))
    before = {name: tensor.detach().clone() for name, tensor in adapter.tensors.items()}
    export_gguf(adapter, tmp_path / "adapter.gguf")
    assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in before.items())


def test_names_are_those_of_the_gguf_package():
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, 12)
    modules = [name for name, module in tiny.model(layers=12).named_modules() if hasattr(module, "weight")]
    assert len(modules) == 12 * 6 + 3
    for name in modules:
        assert tensor_name(name) == theirs.get_name(name)


@pytest.mark.parametrize("name", ["model", "model.layers.0", "model.layers.x.mlp.down_proj", "h.0.mlp.down_proj"])
def test_other_modules_have_no_name(name):
    assert tensor_name(name) is None


def refusal(adapter: lora.Adapter, folder: Path) -> str:
    (folder / "adapter.gguf").write_text("an older file")
    with pytest.raises(UserError) as error:
        export_gguf(adapter, folder / "adapter.gguf")
    assert [entry.read_text() for entry in folder.iterdir()] == ["an older file"]
    return str(error.value)


def test_all_that_has_no_place_is_listed(tmp_path):
    model = adapted(r=2, modules_to_save=["lm_head"])
    lora.inject(model, target_modules=["embed_tokens"], r=2)
    model.model.layers[1].mlp.extra = lora.Linear(4, 4, r=1, bias=False)
    adapter = lora.adapter_of(model)
    module = adapter.modules["model.layers.0.mlp.down_proj"]
    adapter.modules["model.layers.0.mlp.down_proj"] = dataclasses.replace(module, use_dora=True)
    adapter.tensors["model.layers.0.mlp.down_proj.lora_magnitude"] = torch.ones(64)
    with torch.no_grad():
        adapter.tensors["model.layers.1.mlp.down_proj.lora_A"][0, 0] = torch.nan
    del adapter.tensors["model.layers.0.self_attn.o_proj.lora_B"]
    said = refusal(adapter, tmp_path)
    for line in (
        "lm_head.weight trains in full: a LoRA file has no place for it.",
        "model.embed_tokens: llama.cpp adapts linear layers, and this is of the kind 'embedding'.",
        "model.layers.1.mlp.extra: llama.cpp has no name for it in a Phi-3.",
        "model.layers.0.mlp.down_proj: llama.cpp knows no DoRA; merge the adapter instead.",
        "model.layers.1.mlp.down_proj.lora_A holds NaN or infinity.",
        "model.layers.0.self_attn.o_proj.lora_B is missing.",
    ):
        assert f"\n  - {line}" in said
    assert said.count("\n") == 6, said


def test_shapes_that_do_not_fit(tmp_path):
    adapter = lora.adapter_of(adapted(r=2))
    for n in range(2):
        name = f"model.layers.{n}.mlp.down_proj"
        adapter.modules[name] = dataclasses.replace(adapter.modules[name], r=3)
    said = refusal(adapter, tmp_path)
    assert said.count("lora_A must have the shape (3, 64), got (2, 64)") == 2


def test_what_float32_cannot_hold(tmp_path):
    adapter = lora.adapter_of(adapted(r=2, lora_alpha=6e38))
    adapter = dataclasses.replace(adapter, tensors={name: 100 + t for name, t in adapter.tensors.items()})
    assert refusal(adapter, tmp_path).count("lora_b is too large for float32") == 8


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        export_gguf(lora.adapter_of(adapted(r=2)), tmp_path / "none" / "adapter.gguf")


def vocabulary(path: Path, tokens: int = len(tiny.SPECIAL) + 256) -> Path:
    """A GGUF file with this many tokens, as llama.cpp's vocabularies are."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {n}" for n in range(tokens)])
    writer.add_token_types([1] * tokens)
    writer.add_chat_template("{{ messages }} 你好")
    writer.add_bos_token_id(1)
    writer.add_block_count(77)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


# How far a value may be from what it was, as a part of itself and of the largest one.
@pytest.mark.parametrize(
    ("dtype", "of_itself", "of_largest"),
    [("f32", 0, 0), ("f16", 2.0**-11, 2.0**-20), ("bf16", 2.0**-8, 0), ("q8_0", 0, 2.0**-7)],
)
def test_the_base_holds_the_weights_and_the_vocabulary(tmp_path, dtype, of_itself, of_largest):
    model = tiny.model(heads=8, key_value_heads=4)
    words = vocabulary(tmp_path / "words.gguf")
    reader = gguf.GGUFReader(export_base(model, words, tmp_path / "base.gguf", dtype))
    weights = {tensor_name(key.removesuffix(".weight")): tensor for key, tensor in model.state_dict().items()}
    assert {tensor.name for tensor in reader.tensors} == {f"{name}.weight" for name in weights}
    for tensor in reader.tensors:
        expected = weights[tensor.name.removesuffix(".weight")].numpy()
        vector = expected.ndim == 1
        assert tensor.tensor_type.name == ("F32" if vector else dtype.upper())
        got = gguf.dequantize(tensor.data, tensor.tensor_type)
        size = np.abs(expected)
        bound = 0 if vector else of_itself * size + of_largest * size.max()
        assert (np.abs(got - expected) <= bound).all()
    about = {key: field.contents() for key, field in reader.fields.items()}
    assert about["tokenizer.ggml.tokens"][-1] == f"token {len(tiny.SPECIAL) + 255}"
    assert about["tokenizer.chat_template"] == "{{ messages }} 你好"
    assert about["tokenizer.ggml.bos_token_id"] == 1
    assert about["phi3.block_count"] == 2
    assert about["phi3.attention.head_count"] == 8
    assert about["phi3.attention.head_count_kv"] == 4
    assert about["phi3.rope.dimension_count"] == 8
    assert "llama.block_count" not in about


def test_a_base_with_adapters_is_written_without_them(tmp_path):
    words = vocabulary(tmp_path / "words.gguf")
    plain = export_base(tiny.model(), words, tmp_path / "plain.gguf")
    model = tiny.model()
    lora.inject(model, target_modules=["o_proj"], r=2)
    assert export_base(model, words, tmp_path / "adapted.gguf").read_bytes() == plain.read_bytes()


def test_a_base_that_cannot_be_written(tmp_path):
    model = tiny.model()
    model.config.rope_parameters["rope_type"] = "longrope"
    model.model.norm.bias = torch.nn.Parameter(torch.zeros(48))
    with pytest.raises(UserError) as error:
        export_base(model, vocabulary(tmp_path / "words.gguf", 99), tmp_path / "base.gguf")
    said = str(error.value)
    assert "its rope is of the type 'longrope'" in said
    assert "it has 263 tokens, and the vocabulary 99" in said
    assert "llama.cpp has no name for model.norm.bias in a Phi-3" in said
    assert not (tmp_path / "base.gguf").exists()
