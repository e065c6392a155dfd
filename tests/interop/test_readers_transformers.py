"""transformers' modules that read the weights of layers in them: heads, x-vectors, attention, corrections."""

import copy

import pytest
import torch
import transformers as T
from peft_models import QUIET

import lora
from lora.models.readers import WeightReader

pytestmark = QUIET

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "tdnn_dim": (16, 16),
    "tdnn_kernel": (3, 3),
    "tdnn_dilation": (1, 2),
    "xvector_output_dim": 8,
}
LAYOUT = {
    "max_2d_position_embeddings": 16,
    "coordinate_size": 4,
    "shape_size": 8,
    "has_spatial_attention_bias": True,
    "has_relative_attention_bias": True,
    "rel_pos_bins": 8,
    "max_rel_pos": 8,
    "rel_2d_pos_bins": 8,
    "max_rel_2d_pos": 8,
    "visual_embed": False,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 8}
GEMMA = SMALL | {
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0],
    "layer_types": ["full_attention"],
}
DEBERTA = {"relative_attention": True, "max_relative_positions": 8, "position_buckets": 4}
MOBILE = {"embedding_size": 16, "intra_bottleneck_size": 32, "num_attention_heads": 2}

IDS, SOUND = torch.arange(4, 11)[None], torch.randn(1, 1000)
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
BOXES = {"input_ids": IDS, "bbox": torch.zeros(1, 7, 4, dtype=torch.long)}
IMAGE = {"pixel_values": torch.randn(1, 3, 16, 16)}

# The model, its config, what is adapted, who reads it, what goes in, and what of the output counts.
MODELS = {
    "MobileBERT's head": (
        lambda: T.MobileBertForMaskedLM(T.MobileBertConfig(**SMALL | MOBILE)),
        ["predictions.dense"], "cls.predictions", TEXT, "logits",
    ),
    "BLOOM, slow but exact": (
        lambda: T.BloomForCausalLM(
            T.BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4, pretraining_tp=2, slow_but_exact=True)
        ),
        ["dense", "dense_4h_to_h"], "transformer.h.0.mlp", TEXT, "logits",
    ),
    "Wav2Vec2's x-vector": (
        lambda: T.Wav2Vec2ForXVector(T.Wav2Vec2Config(**SPEECH)),
        ["kernel"], "tdnn.0", {"input_values": SOUND}, "logits",
    ),
    "the conformer's x-vector": (
        lambda: T.Wav2Vec2ConformerForXVector(T.Wav2Vec2ConformerConfig(**SPEECH)),
        ["kernel"], "tdnn.0", {"input_values": SOUND}, "logits",
    ),
    "WavLM": (
        lambda: T.WavLMModel(T.WavLMConfig(**SPEECH)), ["q_proj", "k_proj", "v_proj", "out_proj"],
        "encoder.layers.0.attention", {"input_values": SOUND}, "last_hidden_state",
    ),
    "SigLIP's pooling": (
        lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**VISION)),
        "all-linear", "head.attention", IMAGE, "pooler_output",
    ),
    "Gemma 3n": (
        lambda: T.Gemma3nForCausalLM(T.Gemma3nTextConfig(**GEMMA)), ["correction_coefs"],
        "model.layers.0.altup", {"input_ids": IDS}, "logits",
    ),
    "DeBERTa's relative positions": (
        lambda: T.DebertaV2ForMaskedLM(T.DebertaV2Config(**SMALL | DEBERTA, pos_att_type=["p2c", "c2p"])).double(),
        ["rel_embeddings"], "deberta.encoder", TEXT, "logits",
    ),
    "LayoutLMv3's relative positions": (
        lambda: T.LayoutLMv3Model(T.LayoutLMv3Config(**SMALL | LAYOUT)),
        ["rel_pos_bias", "rel_pos_x_bias"], "encoder", BOXES, "last_hidden_state",
    ),
}  # fmt: skip
# LayoutLMv3 reads them without gradients: nothing there learns, adapted or not.
NEVER_LEARNS = ["LayoutLMv3's relative positions"]
READ_IN_TRAINING = ["Gemma 3n"]


@pytest.mark.parametrize("name", MODELS)
def test_the_models_output_is_that_of_w(name, tmp_path):
    make, targets, reader, inputs, counts = MODELS[name]
    torch.manual_seed(0)
    base = make().train(name in READ_IN_TRAINING)
    base.config._attn_implementation = "eager"
    model = copy.deepcopy(base)
    lora.inject(model, target_modules=targets, r=2, lora_alpha=4)
    assert isinstance(model.get_submodule(reader), WeightReader)
    layers = [module for module in model.modules() if isinstance(module, lora.LoRALayer)]
    for layer in layers:
        for _, parameter in layer.lora_parameters():
            parameter.data += torch.randn_like(parameter) * 0.3

    def output(of):
        torch.manual_seed(1)  # dropout, where it trains
        return getattr(of(**inputs), counts)

    y, before, right = output(model), output(base), copy.deepcopy(base)
    right.load_state_dict(lora.merged_state_dict(model))
    torch.testing.assert_close(y, output(right), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, before, rtol=1e-6, atol=1e-7)
    if name not in NEVER_LEARNS:
        y.square().sum().backward()
        assert all(parameter.grad.any() for layer in layers for _, parameter in layer.lora_parameters())
    with lora.disabled(model):
        torch.testing.assert_close(output(model), before)
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    lora.load_adapter(base, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(output(base), y)
    lora.merge(model)
    assert not any(isinstance(module, WeightReader) for module in model.modules())
    torch.testing.assert_close(output(model), y, rtol=1e-4, atol=1e-5)
