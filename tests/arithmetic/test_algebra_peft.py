"""combine against PEFT's add_weighted_adapter, on adapters that PEFT wrote."""

import pytest
import torch
import torch.nn as nn
from peft import LoraConfig, get_peft_model

import lora
from lora.arithmetic import combine


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.conv = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Conv1d(4, 6, 3)

    def forward(self, ids, x):
        return self.up(self.embed(ids)), self.conv(x)


@pytest.mark.parametrize("weights", [(0.5, 2.0), (1.0, -0.7)], ids=str)
@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_a_sum_of_adapters_is_pefts(method, weights, tmp_path):
    targets = ["embed", "up", "conv"] if method == "cat" else ["embed", "up"]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(Net().double(), config, adapter_name="one", autocast_adapter_dtype=False)
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=5, target_modules=targets, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data)
    model.add_weighted_adapter(["one", "two"], list(weights), "sum", method, svd_rank=2 if method == "svd" else None)
    model.save_pretrained(tmp_path)
    adapters = [lora.read_adapter(tmp_path / name) for name in ("one", "two")]
    result = combine(list(zip(adapters, weights, strict=True)), method)
    assert set(result.modules) == set(targets)
    for name in targets:
        theirs = model.base_model.model.get_submodule(name).get_delta_weight("sum")
        # PEFT's weights are float32.
        torch.testing.assert_close(result.delta(name, torch.float64), theirs.double(), rtol=1e-5, atol=1e-5)
