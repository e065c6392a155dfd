"""Models of transformers that compute with (length, batch, features), in mixed batches of a bank."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LongformerConfig,
    LongformerForSequenceClassification,
    PreTrainedModel,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import lora

SIZES = {"vocab_size": 60, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}


def xlnet() -> PreTrainedModel:
    return XLNetForSequenceClassification(XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=16))


def longformer() -> PreTrainedModel:
    return LongformerForSequenceClassification(
        LongformerConfig(**SIZES, attention_window=4, max_position_embeddings=32)
    )


@pytest.mark.parametrize(("make", "target"), [(xlnet, "layer_1"), (longformer, "query")])
def test_as_many_rows_as_tokens_may_be_either(make, target):
    torch.manual_seed(0)
    model = make().eval()
    config = lora.LoraConfig(target_modules=[target], r=2, init_lora_weights=False)
    bank = lora.bank(model, {"a": config, "b": config})
    ids = torch.randint(3, 50, (4, 4))
    said = f"{target}: the rows of the batch may be in the first dimension of this layer's input, or in the second"
    with torch.no_grad():
        with bank.rows(["a", "b", "a", None]), pytest.raises(RuntimeError, match=said):
            model(ids)
        with bank.use("a"):
            expected = model(ids).logits
        with bank.rows(["a"] * 4):
            torch.testing.assert_close(model(ids).logits, expected)
