"""Stacks whose outputs are several in one, such as gate and up: each split has an A of its own, or no update."""

import copy

import pytest
import torch
import torch.nn.functional as F
from stacks import Stack, gradients
from torch import nn

import lora

E, IN = 3, 5
FORMS = {
    "gate and up": ((4, 4), (True, True), False),
    "uneven, one left out": ((2, 3, 3), (True, False, True), False),
    "interleaved": ((4, 4), (True, True), True),
    "interleaved, up alone": ((4, 4), (False, True), True),
}
each_form = pytest.mark.parametrize("form", FORMS)
each_way = pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])


class Experts(nn.Module):
    def __init__(self, transposed, interleaved):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(E, *((IN, 8) if transposed else (8, IN)), dtype=torch.float64))
        self.is_transposed, self.is_concatenated = transposed, not interleaved

    def forward(self, x):
        return torch.cat([x @ W if self.is_transposed else F.linear(x, W) for W in self.gate_up], -1)


def adapted(form, transposed, **settings):
    splits, enable_lora, interleaved = FORMS[form]
    base = nn.Sequential(Experts(transposed, interleaved))
    model = copy.deepcopy(base)
    words = {"splits": {"gate_up": splits}, "enable_lora": {"gate_up": enable_lora}, "r": 2, "lora_alpha": 3}
    lora.inject(model, target_parameters=["0.gate_up"], **{**words, **settings})
    return model, base


def moved(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def by_hand(model, form, use_dora=False):
    """W of each expert, a split at a time."""
    splits, enable_lora, interleaved = FORMS[form]
    experts, stacked = model[0], []
    for e in range(E):
        W = experts.gate_up[e].detach().T if experts.is_transposed else experts.gate_up[e].detach()  # (8, IN)
        rows = list(W)
        a = b = start = 0
        for g, (size, enabled) in enumerate(zip(splits, enable_lora, strict=True)):
            places = [k * len(splits) + g if interleaved else start + k for k in range(size)]
            start += size
            if not enabled:
                continue
            update = experts.gate_up_lora_B[e][b : b + size] @ experts.gate_up_lora_A[e][a : a + 2] * 1.5
            for k, place in enumerate(places):
                row = rows[place] + update[k]
                if use_dora:
                    row = row / row.norm().detach() * experts.gate_up_lora_magnitude.view(E, -1)[e, b + k]
                rows[place] = row
            a, b = a + 2, b + size
        stacked.append(torch.stack(rows).T if experts.is_transposed else torch.stack(rows))
    return torch.stack(stacked)


@each_form
@each_way
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_each_split_has_its_own(form, transposed, settings, tmp_path):
    model, base = adapted(form, transposed, **settings)
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.testing.assert_close(model(x), base(x))
    y = moved(model)(x)
    right = by_hand(model, form, settings.get("use_dora", False))
    expected = torch.func.functional_call(base, {"0.gate_up": right}, (x,))
    torch.testing.assert_close(y, expected)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for got, grad in zip(gradients(y, *wanted), gradients(expected, *wanted), strict=True):
        torch.testing.assert_close(got, grad)
    torch.testing.assert_close(lora.merged_state_dict(model)["0.gate_up"], right)
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    other = copy.deepcopy(base)
    lora.load_adapter(other, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(other(x), y)
    if not settings:  # without the model, and in PEFT's form
        adapter = lora.adapter_of(model)
        torch.testing.assert_close(adapter.delta("0.gate_up"), (right - base[0].gate_up).detach().float())
        lora.save_adapter(model, tmp_path / "peft", format="peft")
        another = copy.deepcopy(base)
        lora.load_adapter(another, tmp_path / "peft")
        torch.testing.assert_close(another(x), y)
    lora.eject(other)
    torch.testing.assert_close(other(x), base(x))


def test_what_does_not_fit_is_said():
    wrong = {
        "must be positive and add up to 8": {"splits": {"gate_up": (4, 3)}},
        "must have one entry for each of the splits": {"splits": {"gate_up": (4, 4)}, "enable_lora": {"gate_up": (1,)}},
        "enables no split": {"enable_lora": {"gate_up": (0, 0)}},
        "must be of one size, since the module has their outputs alternate": {"splits": {"gate_up": (3, 5)}},
    }
    for said, words in wrong.items():
        model = nn.Sequential(Experts(False, True))
        with pytest.raises(ValueError, match=f"0.gate_up: .*{said}"):
            lora.inject(model, target_parameters=["0.gate_up"], r=2, **words)
        assert type(model[0]) is Experts
    assert issubclass(Stack, nn.Module)
