"""`lora.merge(model, batches)`: weights in half precision are rounded for their inputs, whole or not at all."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import randomised, update
from toy_model import IDS, Model, snapshot

import lora
from lora.models import keeping

HALVES = [torch.bfloat16, torch.float16]
MADE = {
    "Linear": lambda **s: lora.Linear(40, 24, r=4, **s),
    "transposed": lambda **s: lora.Linear(40, 24, r=4, fan_in_fan_out=True, **s),
    "splits": lambda **s: lora.MergedLinear(40, 24, r=4, splits=(12, 4, 8), enable_lora=(True, False, True), **s),
    "DoRA": lambda **s: lora.Linear(40, 24, r=4, use_dora=True, **s),
}


def batches(features=40, n=3, dtype=torch.bfloat16):
    """Inputs that go along with each other, as those of a model's layers do."""
    mixing = torch.randn(features, features) * torch.linspace(0.05, 1, features) ** 2
    return [(torch.randn(2, 150, features) @ mixing.T + 0.2).to(dtype) for _ in range(n)]


def rows(seen):
    return np.concatenate([x.double().flatten(0, -2).numpy() for x in seen])


def made(kind, dtype):
    """A model of one layer with a small update, and (W₀, W) in float64, (out, in)."""
    layer = MADE[kind](dtype=dtype)
    if kind == "DoRA":
        layer.reset_magnitude()
        with torch.no_grad():
            layer.lora_magnitude.mul_(1.003)
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor.copy_(torch.randn(factor.shape) * 0.02)
    base = layer.weight.detach().double().numpy()
    W = base + update(layer)
    if layer.fan_in_fan_out:
        base, W = base.T, W.T
    if kind == "DoRA":
        W = W * (layer.lora_magnitude.detach().double().numpy() / np.linalg.norm(W, axis=1))[:, None]
    return nn.Sequential(layer), base, W


def share(error, change, x):
    return math.sqrt(((error @ x.T) ** 2).sum() / ((change @ x.T) ** 2).sum())


# ---- what is kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", MADE)
def test_a_merge_for_its_inputs_loses_less_and_says_how_much(kind, dtype):
    model, base, W = made(kind, dtype)
    seen = batches(dtype=dtype)
    x, nearest = rows(seen), torch.from_numpy(W).to(dtype).double().numpy()
    (row,) = lora.merge(model, seen).modules
    merged = model[0].weight.detach().double().numpy()
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype == dtype
    lost = share(merged - W, W - base, x)
    assert lost < 0.75 * share(nearest - W, W - base, x)
    assert row.lost_on_inputs == pytest.approx(lost, rel=0.02)
    assert row.nearest_on_inputs == pytest.approx(share(nearest - W, W - base, x), rel=0.02)
    assert row.lost == pytest.approx(np.linalg.norm(merged - W) / np.linalg.norm(W - base), rel=0.02)


def test_rows_that_have_no_update_stay_to_the_bit():
    model, base, _ = made("splits", torch.bfloat16)
    lora.merge(model, batches())
    assert np.array_equal(model[0].weight[12:16].detach().double().numpy(), base[12:16])


@pytest.mark.parametrize("kind", MADE)
def test_the_merged_state_dict_is_that_of_the_merged_model(kind):
    model, _, _ = made(kind, torch.bfloat16)
    seen, before = batches(), snapshot(model)
    state = lora.merged_state_dict(model, seen)
    assert snapshot(model) == before
    lora.merge(model, seen)
    after = model.state_dict()
    assert list(state) == list(after)
    merged = state["0.weight"].T if kind == "transposed" else state["0.weight"]
    assert torch.equal(merged, after["0.weight"])


def test_weights_that_were_rounded_in_inference_mode_can_be_trained():
    model, _, _ = made("Linear", torch.bfloat16)
    seen = batches()
    with torch.inference_mode():
        state = lora.merged_state_dict(model, seen)
        lora.merge(model, seen)
    assert not state["0.weight"].is_inference()
    assert not model[0].weight.is_inference()
    assert torch.equal(model[0].weight, state["0.weight"])


def test_a_whole_model_computes_what_it_did_to_less():
    """Against the exact W in float64, on inputs of which the merge has seen none."""
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(40, 64, bias=False), nn.Tanh(), nn.Linear(64, 12, bias=False)).bfloat16()
    lora.inject(base, target_modules=["0", "2"], r=4, adapter_dtype=torch.float32)
    for layer in (base[0], base[2]):
        randomised(layer, 0.03)
    exact = copy.deepcopy(base).double()
    *seen, other = batches(n=9)
    errors = []
    for given in (None, seen):
        model = copy.deepcopy(base)
        lora.merge(model, given)
        errors.append(float((model.double()(other.double()) - exact(other.double())).detach().norm()))
    assert errors[1] < 0.75 * errors[0]


def test_the_report_prints_both():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, dtype=torch.bfloat16), "b": nn.Linear(2, 2)})
    nn.init.ones_(model["a"].weight)
    lora.inject(model, target_modules=["a", "b"], r=1, lora_alpha=1)
    nn.init.ones_(model["a"].lora_A)
    nn.init.constant_(model["a"].lora_B, 2**-7 + 2**-9)  # neighbours of 1 are 2⁻⁷ apart: a fifth is lost
    report = lora.merge(model, [torch.eye(2)], step=lambda model, x: model["a"](x.bfloat16()))
    assert str(report) == (
        "module  dtype     update lost to rounding  on its inputs  if rounded to nearest\n"
        "a       bfloat16  20.00 %                  20.00 %        20.00 %\n"
        "b       float32   0.00 %                   -              -"
    )


# ---- what is rounded to nearest --------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """A forward of its own: what the weight is multiplied by is not the layer's input."""

    def forward(self, x):
        return F.linear(x.roll(1, -1) * torch.arange(8).to(x), self.weight, self.bias)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(x, self.proj.weight, self.proj.bias)


class Others(nn.Module):
    """Everything that is no linear layer which is called."""

    def __init__(self):
        super().__init__()
        self.embed, self.own, self.reader = nn.Embedding(10, 8), Scaled(8, 8), Reader()
        self.conv, self.matrix = nn.Conv1d(8, 8, 3, padding=1), nn.Parameter(torch.randn(8, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids):
        x = self.conv(self.reader(self.own(self.embed(ids))).mT).mT
        return self.attention(x, x, x, need_weights=False)[0] @ self.matrix


def test_other_kinds_are_rounded_to_nearest():
    model = Others().bfloat16()
    names = ["embed", "own", "proj", "conv", "attention"]
    lora.inject(model, target_modules=names, target_parameters=["matrix"], r=2, adapter_dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    twin = copy.deepcopy(model)
    report = lora.merge(model, [IDS])
    assert len(report.modules) == 7
    assert all(row.lost_on_inputs is None for row in report.modules)
    lora.merge(twin)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("function", [lora.merge, lora.merged_state_dict])
def test_wide_weights_need_no_batches_and_run_none(function):
    def never(model, batch):
        raise AssertionError("nothing is to be seen")

    model = nn.Sequential(randomised(lora.Linear(4, 4, r=2)), randomised(lora.Linear(4, 4, r=2, dtype=torch.float64)))
    twin = copy.deepcopy(model)
    function(model, [1, 2], step=never)
    function(twin)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


def test_an_update_of_nothing_loses_nothing():
    model = nn.Sequential(lora.Linear(40, 6, r=2, dtype=torch.bfloat16))
    before = model[0].weight.detach().clone()
    (row,) = lora.merge(model, batches()).modules
    assert (row.lost, row.lost_on_inputs, row.nearest_on_inputs) == (0, 0, 0)
    assert torch.equal(model[0].weight, before)


# ---- what is seen ----------------------------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = made("Linear", torch.bfloat16)[0][0]

    def forward(self, x, attention_mask=None):
        return self.layer(x)


def test_positions_that_a_mask_leaves_out_do_not_count():
    (x,), model = batches(n=1), Masked()
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, 40:] = 0
    junk = torch.where(mask[..., None].bool(), x, 1000 * torch.randn(x.shape).bfloat16())
    whole = [x[:1], x[1:, :40]]
    expected = lora.merged_state_dict(copy.deepcopy(model), whole)
    got = lora.merged_state_dict(model, [{"x": junk, "attention_mask": mask}])
    assert torch.equal(got["layer.weight"], expected["layer.weight"])


def test_the_model_runs_as_it_will_serve_and_has_its_modes_and_statistics_after():
    model = nn.Sequential(nn.BatchNorm1d(40), nn.Dropout(0.5), made("Linear", torch.bfloat16)[0][0], nn.Dropout(0.5))
    model.bfloat16()
    model[2].merge_weights = True
    model.train()
    model[3].eval()
    seen = [x.flatten(0, 1) for x in batches()]
    served = copy.deepcopy(model).eval()
    expected = lora.merged_state_dict(served, seen)["2.weight"]
    before = snapshot(model)
    assert torch.equal(lora.merged_state_dict(model, seen)["2.weight"], expected)
    assert snapshot(model) == before
    assert model[2]._merged is None  # the weight that `eval()` serves from is no longer than that
    lora.merge(model, seen)
    assert [module.training for module in model] == [True, True, True, False]
    assert torch.equal(model[2].weight, expected)
    assert not model[0].num_batches_tracked


@pytest.mark.parametrize("room", [0, 4 * (40**2 + 24**2), 2**30])
def test_sums_over_inputs_take_no_more_room_than_there_is(room, monkeypatch):
    monkeypatch.setattr(keeping, "_ROOM", room)
    monkeypatch.setattr(keeping, "_bytes", lambda tensor: 0)
    model = nn.Sequential(
        made("Linear", torch.bfloat16)[0][0], nn.Linear(24, 24).bfloat16(), nn.Linear(24, 7).bfloat16()
    )
    lora.inject(model, target_modules=["1", "2"], r=2)
    seen, groups, observe = batches(), [], keeping._observe

    def noted(model, group, *more):
        groups.append(len(group))
        return observe(model, group, *more)

    monkeypatch.setattr(keeping, "_observe", noted)
    state = lora.merged_state_dict(model, iter(seen))  # once through, an iterator is empty
    assert groups == {0: [1, 1, 1], 2**30: [3]}.get(room, [2, 1])
    monkeypatch.setattr(keeping, "_ROOM", 2**30)
    expected = lora.merged_state_dict(model, seen)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


# ---- what is refused -------------------------------------------------------------------------------------------


def hooks_of(module):
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_pre_hooks_with_kwargs)


def adapted():
    model = Model().bfloat16()
    lora.inject(model, target_modules=["q_proj", "up_proj", "head"], r=2)
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            randomised(module, 0.1)
    return model


def refused(model, given, *words, **options):
    before = snapshot(model), [*map(hooks_of, model.modules())]
    for function, heading in [(lora.merge, "nothing was changed"), (lora.merged_state_dict, "nothing was returned")]:
        with pytest.raises(ValueError, match=f"^{function.__name__}: {heading}") as caught:
            function(model, given, **options)
        assert (snapshot(model), [*map(hooks_of, model.modules())]) == before
        assert all(word in str(caught.value) for word in words), str(caught.value)
    return str(caught.value)


def test_layers_that_no_batch_reached_are_all_named(monkeypatch):
    # A pass over the batches for each layer, and all that is wrong in one error.
    monkeypatch.setattr(keeping, "_ROOM", 0)
    monkeypatch.setattr(keeping, "_bytes", lambda tensor: 0)

    def part(model, batch):
        return model.layers[0](model.embed(batch))

    names = ["layers.1.attn.q_proj", "layers.1.mlp.up_proj", "head"]
    message = refused(adapted(), [IDS], *(f"{name}: no batch reached it." for name in names), step=part)
    assert message.count("\n") == 3


def test_inputs_that_are_not_finite_are_refused():
    model = adapted()
    model.layers[1].norm.weight.data[3] = math.nan
    message = refused(model, [IDS], "layers.1.mlp.up_proj: its inputs are not finite.", "head: its inputs are not")
    assert message.count("\n") == 2


@pytest.mark.parametrize("empty", [[], iter(())])
def test_there_must_be_a_batch(empty):
    refused(adapted(), empty, "there must be at least one batch, and `batches` is empty.")


def test_what_is_no_batches_and_no_step_is_refused_at_once():
    refused(adapted(), IDS, "`batches` must be an iterable", "`step` must be a function", step=3)


def test_a_step_that_fails_leaves_the_model_as_it_was():
    model = adapted()
    before = snapshot(model)

    def fails(model, batch):
        model(batch)
        raise KeyError("mine")

    for function in (lora.merge, lora.merged_state_dict):
        with pytest.raises(KeyError, match="mine"):
            function(model, [IDS], step=fails)
        assert snapshot(model) == before
        assert not sum(map(hooks_of, model.modules()))


def test_a_model_that_is_disabled_has_no_inputs_to_round_for():
    model = adapted()
    with lora.disabled(model), pytest.raises(ValueError, match="disabled"):
        lora.merged_state_dict(model, [IDS])
