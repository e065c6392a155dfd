"""What "all-linear" adapts, what it leaves out and why, and what of a model it does not reach."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations

import lora

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")


class TopKRouter(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        return logits.topk(1, -1)


class Experts(nn.Module):
    """As in transformers 5: a mixture's matrices are stacked in Parameters of their own."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 8))
        self.scale = nn.Parameter(torch.ones(1, 1, 8))

    def forward(self, x):
        return x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.router, self.experts = nn.Linear(8, 8), TopKRouter(8, 3), Experts()
        self.empty, self.mixer = nn.Linear(8, 0), nn.Linear(8, 8)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)


def model_of():
    return nn.ModuleDict({"words": nn.Embedding(9, 8), "layers": nn.ModuleList([Block(), Block()])})


def test_a_layer_that_cannot_be_adapted_is_left_out_and_the_report_says_why():
    report = lora.inject(model_of(), target_modules="all-linear", r=2)
    adapted = ["layers.0.up", "layers.0.mixer", "layers.1.up", "layers.1.mixer"]
    assert [module.names[0] for module in report.modules] == adapted
    reasons = {
        "router": "is a router, which decides where tokens go; name it in `target_modules` to adapt it.",
        "empty": "has a weight of the shape (0, 8), in which there is nothing to adapt.",
        "normed": "its `weight` is computed (by a parametrization, or pruning)",
    }
    assert list(report.left_out) == [f"layers.{i}.{name}" for i in (0, 1) for name in reasons]
    for name, reason in report.left_out.items():
        assert reason.startswith(reasons[name.split(".", 2)[2]])
        assert f"left out: {name} {reason}" in str(report)


def test_what_is_in_no_linear_layer_is_named_with_its_share():
    model = model_of()
    report = lora.inject(model, target_modules="all-linear", r=2)
    sizes = {"experts.gate_up_proj": 144, "experts.down_proj": 96, "normed.parametrizations.weight.original1": 64}
    expected = {f"layers.{i}.{name}": size for i in (0, 1) for name, size in sizes.items()}
    assert report.unreached == expected
    share = 100 * 2 * sum(sizes.values()) / sum(p.numel() for p in model.parameters())
    line = str(report).splitlines()[-2]
    assert line.startswith(f"not in a linear layer, and so not reached: {share:.1f} % of the parameters, in ")
    assert "layers.*.experts.gate_up_proj (2), layers.*.experts.down_proj (2)" in line


def test_names_get_what_all_linear_leaves_out_or_an_error():
    model = model_of()
    report = lora.inject(model, target_modules=["router", "up"], r=2)
    assert [module.names[0] for module in report.modules] == [
        f"layers.{i}.{n}" for i in (0, 1) for n in ("up", "router")
    ]
    assert not report.left_out
    assert not report.unreached
    for name, reason in {"empty": "nothing to adapt", "normed": "is computed"}.items():
        with pytest.raises(ValueError, match=rf"layers\.0\..*{name}: .*{reason}"):
            lora.inject(model_of(), target_modules=[name, "up"], r=2)


def test_a_model_of_nothing_but_such_layers_is_refused():
    model = nn.Sequential(nn.Linear(4, 0))
    with pytest.raises(ValueError, match=r"0: has a weight of the shape \(0, 4\), in which there is nothing to adapt"):
        lora.inject(model, target_modules="all-linear", r=2)
    assert type(model[0]) is nn.Linear


def test_mistakes_are_errors_with_all_linear_too():
    adapted = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora.inject(adapted, target_modules=["0"], r=2)
    with pytest.raises(ValueError, match="0: has LoRA already"):
        lora.inject(adapted, target_modules="all-linear", r=2)
    with pytest.raises(ValueError, match="0: is lazy"):
        lora.inject(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), target_modules="all-linear", r=2)


def test_what_is_excluded_or_trains_in_full_is_not_told_of():
    model = nn.ModuleDict({"x": nn.Linear(4, 4), "y": nn.Linear(4, 0), "lstm": nn.LSTM(4, 4), "gru": nn.GRU(4, 4)})
    fields = {"exclude_modules": ["y"], "modules_to_save": ["lstm"]}
    report = lora.inject(model, target_modules="all-linear", r=2, **fields)
    assert not report.left_out
    assert list(report.unreached) == ["gru.weight_ih_l0", "gru.weight_hh_l0"]
    assert F.linear(torch.ones(4), model["x"].weight).shape == (4,)


class Speaker(nn.Module):
    """A model within a model, which knows its output, as BLIP's decoder of text."""

    def __init__(self):
        super().__init__()
        self.words, self.up, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        self.head.weight = self.words.weight

    def get_output_embeddings(self):
        return self.head


def test_the_output_embedding_of_a_model_within_is_one():
    model = nn.ModuleDict({"sight": nn.Linear(8, 8), "speech": Speaker()})
    report = lora.inject(model, target_modules="all-linear", r=2)
    assert [module.names[0] for module in report.modules] == ["sight", "speech.up"]
    lora.merge(model)
