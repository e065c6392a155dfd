"""Models of transformers' that read and write text."""

from __future__ import annotations

from typing import Any

import torch

from zoo.rows import DEAD, REFUSED, REWRITTEN, Row, ids, in_peft, of, words, words_twice

ENCODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DECODER = ENCODER | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
BOTH: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
GPT: dict[str, Any] = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
STACKS = {"settings": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_expand": 2, "mamba_chunk_size": 4}
BOXES = {"max_2d_position_embeddings": 16}
LAYOUT = BOXES | {
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
MOBILE = {"embedding_size": 16, "intra_bottleneck_size": 32, "num_attention_heads": 2}
GEMMA_3N = {
    "num_hidden_layers": 1,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "head_dim": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0],
    "layer_types": ["full_attention"],
}
GEMMA_4 = {
    "head_dim": 8,
    "global_head_dim": 8,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}


RESCALED = dict.fromkeys(
    ("starts", "computes", "learns", "saves", "goes_to_peft", "comes_from_peft", "generates"),
    "eval() divides weights in place, which is an error that says how it is switched off; in PEFT only W₀ is divided",
)
SINGLE = {"dtype": torch.float32}  # torch multiplies groups of experts in no float64


RWKV = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "context_length": 32}


def without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def decoder(family: str, /, **settings: Any) -> Row:
    """A family's model of the next word."""
    return of(f"{family}ForCausalLM", words, **DECODER | settings)


def encoder(family: str, /, **settings: Any) -> Row:
    """A family's model of masked words."""
    return of(f"{family}ForMaskedLM", words, **ENCODER | settings)


def both(name: str, /, **settings: Any) -> Row:
    return of(name, words_twice, **BOTH | settings)


def many_words() -> dict[str, torch.Tensor]:
    """So many that each expert gets some."""
    return {"input_ids": ids(6, 16), "decoder_input_ids": ids(6, 16)}


def with_global_words() -> dict[str, torch.Tensor]:
    return words() | {"global_attention_mask": torch.tensor([[1, 0, 0, 0, 1, 0]] * 2)}


POOLER = r".*\.pooler(\.dense)?"  # of the first word, for a head that this model has not


def boxes() -> dict[str, torch.Tensor]:
    return words() | {"bbox": torch.zeros(2, 6, 4, dtype=torch.long)}


ROWS = {
    "Llama": decoder("Llama"),
    "Mistral": decoder("Mistral", sliding_window=4),
    "Qwen2": decoder("Qwen2"),
    "Qwen3": decoder("Qwen3", head_dim=8),
    "Gemma": decoder("Gemma", head_dim=8),
    "Gemma 2": decoder("Gemma2", head_dim=8),
    "Gemma 3": of("Gemma3ForCausalLM", words, "Gemma3TextConfig", **DECODER, head_dim=8),
    "Gemma 3n": of(
        "Gemma3nForCausalLM", words, "Gemma3nTextConfig", train=True, faults=in_peft(DEAD), **DECODER | GEMMA_3N
    ),
    "Gemma 4": of("Gemma4ForCausalLM", words, "Gemma4TextConfig", **DECODER | GEMMA_4),
    "Phi": decoder("Phi"),
    "Phi-3": decoder("Phi3"),
    "Cohere": decoder("Cohere"),
    "Cohere 2": decoder("Cohere2"),
    "StableLM": decoder("StableLm"),
    "OLMo": decoder("Olmo"),
    "OLMo 2": decoder("Olmo2"),
    "StarCoder 2": decoder("Starcoder2"),
    "Granite": decoder("Granite"),
    "Nemotron": decoder("Nemotron"),
    "GLM": decoder("Glm", head_dim=8),
    "GLM-4": decoder("Glm4", head_dim=8),
    "Helium": decoder("Helium", head_dim=8),
    "Persimmon": decoder("Persimmon"),
    "EXAONE 4": decoder("Exaone4"),
    "SmolLM 3": decoder("SmolLM3"),
    "ERNIE 4.5": decoder("Ernie4_5", head_dim=8),
    "LFM 2": decoder("Lfm2"),
    "BitNet": decoder("BitNet"),
    "DiffLlama": decoder("DiffLlama"),
    "Doge": decoder("Doge"),
    "Apertus": decoder("Apertus"),
    "Falcon": decoder("Falcon"),
    "GPT-2": of("GPT2LMHeadModel", words, **GPT),
    "GPT-Neo": of(
        "GPTNeoForCausalLM",
        words,
        **without(DECODER, "num_hidden_layers", "num_attention_heads"),
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    ),
    "GPT-NeoX": decoder("GPTNeoX"),
    "GPT-J": of("GPTJForCausalLM", words, **GPT, rotary_dim=4),
    "GPT BigCode": of("GPTBigCodeForCausalLM", words, **GPT),
    "CodeGen": of("CodeGenForCausalLM", words, **GPT, rotary_dim=4),
    "BLOOM": of("BloomForCausalLM", words, vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "BLOOM, slow but exact": of(
        "BloomForCausalLM",
        words,
        faults=in_peft(DEAD),
        vocab_size=64,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        pretraining_tp=2,
        slow_but_exact=True,
    ),
    "MPT": of("MptForCausalLM", words, vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=32),
    "OPT": decoder("OPT", ffn_dim=48, word_embed_proj_dim=16),
    "XGLM": of(
        "XGLMForCausalLM",
        words,
        **SINGLE,
        vocab_size=64,
        d_model=32,
        ffn_dim=48,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=32,
    ),
    "BioGPT": decoder("BioGpt"),
    "XLNet": of("XLNetLMHeadModel", words, **SINGLE, vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "XLM": of(
        "XLMWithLMHeadModel", words, vocab_size=64, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=32
    ),
    # Mixtures of experts.
    "Mixtral": decoder("Mixtral", **SINGLE, **STACKS, num_local_experts=4),
    "Qwen2-MoE": decoder("Qwen2Moe", **SINGLE, **STACKS, **EXPERTS, shared_expert_intermediate_size=16),
    "Qwen3-MoE": decoder("Qwen3Moe", **SINGLE, **STACKS, **EXPERTS, head_dim=8),
    "Qwen3-Next": decoder(
        "Qwen3Next",
        **SINGLE,
        **STACKS,
        faults=in_peft(REWRITTEN),
        **EXPERTS,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        shared_expert_intermediate_size=16,
    ),
    "Phi-3.5-MoE": decoder("Phimoe", **SINGLE, **STACKS, num_local_experts=4),
    "GPT-OSS": decoder("GptOss", **SINGLE, **STACKS, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "OLMoE": decoder("Olmoe", **SINGLE, **STACKS, num_experts=4, num_experts_per_tok=2),
    "DeepSeek-V2": decoder(
        "DeepseekV2",
        **SINGLE,
        faults=in_peft(REWRITTEN),
        **LATENT,
        **ROUTED,
        first_k_dense_replace=1,
        num_key_value_heads=4,
    ),
    "DeepSeek-V3": decoder(
        "DeepseekV3",
        **SINGLE,
        **STACKS,
        faults=in_peft(REWRITTEN),
        **LATENT,
        **ROUTED,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_key_value_heads=4,
    ),
    "DeepSeek-V4": decoder(
        "DeepseekV4",
        **SINGLE,
        faults=in_peft(REWRITTEN),
        **ROUTED,
        q_lora_rank=8,
        head_dim=8,
        qk_rope_head_dim=4,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=8,
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 2},
    ),
    "Llama 4": of(
        "Llama4ForCausalLM",
        words,
        "Llama4TextConfig",
        **STACKS,
        **DECODER,
        intermediate_size_mlp=48,
        head_dim=8,
        num_local_experts=4,
        attn_implementation="eager",
    ),
    "DBRX": of(
        "DbrxForCausalLM",
        words,
        vocab_size=64,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=32,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "JetMoE": decoder("JetMoe", kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
    "LongCat-Flash": of(
        "LongcatFlashForCausalLM",
        words,
        faults=in_peft(REWRITTEN),
        **without(DECODER, "num_hidden_layers", "num_key_value_heads"),
        **LATENT,
        num_layers=1,
        ffn_hidden_size=48,
        head_dim=4,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        expert_ffn_hidden_size=16,
    ),
    "MiniMax": decoder("MiniMax", **SINGLE, **STACKS, num_local_experts=4, head_dim=8),
    # State spaces, and what has some.
    "Mamba": of(
        "MambaForCausalLM",
        words,
        faults=in_peft(REFUSED),
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
    ),
    "Mamba 2": of(
        "Mamba2ForCausalLM",
        words,
        faults=in_peft(REFUSED),
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=4,
        n_groups=2,
        chunk_size=4,
    ),
    "Falcon Mamba": of(
        "FalconMambaForCausalLM",
        words,
        faults=in_peft(REFUSED),
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
    ),
    "Falcon H1": decoder(
        "FalconH1",
        faults=in_peft(REFUSED),
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=4,
        mamba_chunk_size=4,
    ),
    "Jamba": decoder(
        "Jamba",
        faults=in_peft(DEAD),
        **SINGLE,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        mamba_d_state=4,
        use_mamba_kernels=False,
    ),
    "Bamba": decoder("Bamba", **MAMBA, attn_layer_indices=[1]),
    "Granite MoE Hybrid": decoder(
        "GraniteMoeHybrid",
        **SINGLE,
        **MAMBA,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        shared_intermediate_size=16,
    ),
    "Zamba": decoder(
        "Zamba",
        num_hidden_layers=3,
        layers_block_type=None,
        attn_layer_period=3,
        attn_layer_offset=1,
        mamba_d_state=4,
        n_mamba_heads=2,
        use_mamba_kernels=False,
        attention_hidden_size=64,
        attention_head_dim=16,
    ),
    "Zamba 2": decoder(
        "Zamba2",
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=4,
        mamba_ngroups=1,
        n_mamba_heads=8,
        mamba_headdim=8,
        mamba_expand=2,
        chunk_size=4,
        use_mem_rope=False,
        adapter_rank=4,
    ),
    "Nemotron-H": decoder(
        "NemotronH",
        faults=in_peft(REFUSED),
        **SINGLE,
        num_hidden_layers=3,
        layers_block_type=["mamba", "moe", "attention"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=1,
        head_dim=8,
        chunk_size=4,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        num_experts_per_tok=2,
    ),
    "RecurrentGemma": decoder("RecurrentGemma", num_hidden_layers=3, lru_width=32, attention_window_size=8),
    "RWKV": of("RwkvForCausalLM", words, **RWKV, rescale_every=0, use_cache=False),
    "RWKV, rescaled": of("RwkvForCausalLM", words, **RWKV, rescale_every=2, faults=RESCALED),
    # Encoders and decoders.
    "T5": of("T5ForConditionalGeneration", words_twice, **T5),
    "mT5": of("MT5ForConditionalGeneration", words_twice, **T5),
    "LongT5": of("LongT5ForConditionalGeneration", words_twice, **T5, local_radius=3),
    "Switch Transformers": of(
        "SwitchTransformersForConditionalGeneration",
        many_words,
        **T5,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_experts=4,
        expert_capacity=64,
    ),
    "BART": both("BartForConditionalGeneration", scale_embedding=True),
    "mBART": both("MBartForConditionalGeneration", scale_embedding=True),
    "M2M100": both("M2M100ForConditionalGeneration", scale_embedding=True),
    "Marian": both("MarianMTModel", decoder_vocab_size=64),
    "Pegasus": both("PegasusForConditionalGeneration"),
    "Blenderbot": both("BlenderbotForConditionalGeneration"),
    "LED": of(
        "LEDForConditionalGeneration",
        lambda: with_global_words() | {"decoder_input_ids": ids(2, 4)},
        **without(BOTH, "max_position_embeddings"),
        max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32,
        attention_window=4,
    ),
    "NLLB-MoE": of(
        "NllbMoeForConditionalGeneration",
        many_words,
        **BOTH,
        num_experts=2,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        expert_capacity=64,
    ),
    "ProphetNet": of(
        "ProphetNetForConditionalGeneration",
        words_twice,
        vocab_size=64,
        hidden_size=32,
        encoder_ffn_dim=48,
        num_encoder_layers=1,
        num_encoder_attention_heads=4,
        decoder_ffn_dim=48,
        num_decoder_layers=1,
        num_decoder_attention_heads=4,
        max_position_embeddings=32,
    ),
    # Encoders.
    "BERT": encoder("Bert"),
    "RoBERTa": encoder("Roberta"),
    "ALBERT": encoder("Albert", embedding_size=16),
    "ELECTRA": encoder("Electra", embedding_size=16),
    "DistilBERT": of(
        "DistilBertForMaskedLM",
        words,
        vocab_size=64,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=32,
    ),
    "DeBERTa": encoder("Deberta", relative_attention=True, max_relative_positions=8, pos_att_type=["p2c", "c2p"]),
    "DeBERTa-v2": encoder(
        "DebertaV2",
        relative_attention=True,
        position_buckets=4,
        max_relative_positions=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
    ),
    "MobileBERT": encoder("MobileBert", faults=in_peft(DEAD), **MOBILE),
    "ModernBERT": encoder("ModernBert", bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    "FNet": of("FNetForMaskedLM", words, unused=POOLER, **without(ENCODER, "num_attention_heads")),
    "Longformer": of("LongformerForMaskedLM", with_global_words, **ENCODER, attention_window=4),
    "BigBird": encoder("BigBird", unused=POOLER, attention_type="original_full"),
    "ConvBERT": encoder("ConvBert", embedding_size=32, conv_kernel_size=3),
    "SqueezeBERT": encoder(
        "SqueezeBert",
        unused=POOLER,
        embedding_size=32,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        post_attention_groups=1,
        intermediate_groups=2,
        output_groups=2,
    ),
    "Funnel": of(
        "FunnelForMaskedLM",
        words,
        vocab_size=64,
        block_sizes=[1, 1],
        num_decoder_layers=1,
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=48,
    ),
    "CANINE": of(
        "CanineModel",
        lambda: {"input_ids": ids(2, 8)},
        **SINGLE,
        **without(ENCODER, "vocab_size"),
        num_hash_buckets=16,
        local_transformer_stride=2,
        downsampling_rate=2,
    ),
    "ESM": encoder(
        "Esm",
        unused=r"esm\.contact_head\.regression",
        position_embedding_type="rotary",
        mask_token_id=4,
        emb_layer_norm_before=True,
        token_dropout=True,
    ),
    "Nyströmformer": encoder("Nystromformer", num_landmarks=3, segment_means_seq_len=6, conv_kernel_size=3),
    "RoFormer": encoder("RoFormer"),
    "MPNet": encoder("MPNet"),
    "I-BERT": encoder("IBert", quant_mode=False),
    "X-MOD": encoder("Xmod", languages=["en_XX"], default_language="en_XX"),
    "LayoutLM": of("LayoutLMForMaskedLM", boxes, unused=POOLER, **ENCODER | BOXES),
    "LayoutLMv3": of("LayoutLMv3Model", boxes, unused=r"encoder\.rel_pos\w*", faults=in_peft(DEAD), **ENCODER | LAYOUT),
    "TAPAS": of("TapasModel", words, **ENCODER, type_vocab_sizes=[3, 8, 8, 2, 8, 8, 4]),
    "Perceiver": of(
        "PerceiverForMaskedLM",
        lambda: {"inputs": ids(2, 6)},
        num_latents=4,
        d_latents=16,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        vocab_size=64,
        max_position_embeddings=6,
    ),
}
