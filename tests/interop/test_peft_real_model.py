"""The pretrained model of the example in PEFT and here: adapters go both ways, and both say the same."""

import copy

import peft
import pytest
import torch
from phi3 import fetch, pretrained

import lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers

PROMPT = "What did you do at the weekend? I went to the"


@pytest.fixture(scope="module")
def base():
    """The model in float32, the ids of a prompt, and what the model says of it."""
    model, tokenizer = pretrained.load(pretrained.SMOLLM2, fetch.default_cache_dir(), dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return model, ids, logits(model, ids)


@torch.no_grad()
def logits(model, ids):
    return model.eval()(ids).logits


@torch.no_grad()
def randomise(model):
    """A random adapter, large enough to change what the model says."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03)


def assert_says_the_same(theirs, ours, base):
    """Within float32's rounding through 30 layers, while the adapter changes much more."""
    assert (ours - base).abs().max() > 1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=4e-6 * float(ours.abs().max()))


def inject(model, **options):
    settings = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens"],
        "rank_pattern": {"o_proj": 4, "layers.0.mlp.down_proj": 12},
        "alpha_pattern": {"down_proj": 10},
        "splits": pretrained.fused_splits(model.config),
        "enable_lora": {"qkv_proj": (True, False, True)},
    }
    lora.inject(model, **settings | options)
    randomise(model)
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("format", ["peft", "portable"])
def test_peft_runs_our_adapters(base, format, use_rslora, tmp_path):
    model, ids, before = base
    model = inject(copy.deepcopy(model), use_rslora=use_rslora)
    ours = logits(model, ids)
    lora.save_adapter(model, tmp_path / "adapter", format=format)
    lora.eject(model)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert_says_the_same(logits(theirs, ids), ours, before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("split", [False, True])
def test_we_run_pefts_adapters(base, split, tmp_path):
    model, ids, before = base
    config = peft.LoraConfig(
        r=8,
        lora_alpha=12,
        target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        rank_pattern={"o_proj": 4},
        alpha_pattern={"layers.1.mlp.down_proj": 5},
        use_rslora=True,
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    randomise(theirs)
    expected = logits(theirs, ids)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(model)
    if split:
        targets, splits = config.target_modules, pretrained.fused_splits(model.config)
        lora.inject(ours, r=8, target_modules=list(targets), rank_pattern={"o_proj": 4}, splits=splits)
    lora.load_adapter(ours, tmp_path)
    assert isinstance(ours.model.layers[0].self_attn.qkv_proj, lora.layers.linear.MergedLinearLoRA) == split
    assert_says_the_same(logits(ours, ids), expected, before)
