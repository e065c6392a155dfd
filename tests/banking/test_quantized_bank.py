"""Mixed batches on quantised bases: each row as its adapter alone makes it."""

import bitsandbytes as bnb
import pytest
import torch
import torch.nn as nn
import torchao.quantization as ao
from banks import Net, alone, assert_close, assert_each_as_alone, banked
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

CONFIGS = {"a": {}, "b": {"use_dora": True}, "c": {"r": 4, "lora_alpha": 3}}


def of_bitsandbytes(base: nn.Linear, cls: type[nn.Module], **settings: object) -> nn.Module:
    layer = cls(base.in_features, base.out_features, **settings)
    layer.load_state_dict(base.state_dict())
    return layer.to("cpu")  # here it is quantised


def of_torchao(base: nn.Linear) -> nn.Module:
    ao.quantize_(base, ao.Int8WeightOnlyConfig())
    del base.extra_repr  # which keeps the layer from being copied
    return base


def nf4(base: nn.Linear) -> nn.Module:
    base.weight = nn.Parameter(to_nf4(base.weight.detach(), 64, 64), requires_grad=False)
    return base


BASES = {
    "bitsandbytes nf4": lambda base: of_bitsandbytes(base, bnb.nn.Linear4bit, quant_type="nf4"),
    "bitsandbytes int8": lambda base: of_bitsandbytes(base, bnb.nn.Linear8bitLt, has_fp16_weights=False),
    "torchao int8": of_torchao,
    "torchao nf4": nf4,
}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # inputs are cast to float16
@pytest.mark.parametrize("name", BASES)
def test_each_row_and_adapter_is_as_alone(name: str) -> None:
    torch.manual_seed(0)
    base = Net(BASES[name](nn.Linear(128, 128))).requires_grad_(False)
    model, bank = banked(base, CONFIGS)
    x = torch.randn(8, 3, 128)
    # bitsandbytes computes with int8 in float16.
    eps = torch.finfo(torch.float16 if name == "bitsandbytes int8" else torch.float32).eps
    assert_each_as_alone(base, model, bank, x, rtol=32 * eps)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # inputs are cast to float16
@pytest.mark.parametrize("name", BASES)
def test_an_adapter_drops_what_it_drops_alone(name: str) -> None:
    torch.manual_seed(0)
    base = Net(BASES[name](nn.Linear(128, 128))).requires_grad_(False)
    model, bank = banked(base, {"a": {"lora_dropout": 0.3}, "b": {"lora_dropout": 0.5}})
    x, rows = torch.randn(6, 3, 128), ["a", "b", None, "a", "b", "a"]
    for own in "ab":
        bank.seed(own, 5)
    with bank.rows(rows):
        y = model.train()(x)
    for own in "ab":
        at = [row for row, its in enumerate(rows) if its == own]
        other = alone(base, bank, own).train()
        torch.manual_seed(5)
        assert_close(y[at], other(x[at]), 1e-2 if name == "bitsandbytes int8" else 1e-5)
