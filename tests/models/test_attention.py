"""nn.MultiheadAttention, by its name: all that it projects with is W, whoever calls it or reads its weights."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn as nn
from counting import kept_for_backward
from owners import adapted, adapters, assert_close, assert_is_w, by_hand, moved
from pairwise import in_tiers
from torch.utils.checkpoint import checkpoint

import lora
from lora.models.model import lora_layers

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5).double()


class ClipBlock(nn.Module):
    """As CLIP's and open_clip's towers: attention of (length, batch, width) without its weights, and an MLP."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.ln_1, self.ln_2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=CAUSAL[: len(x), : len(x)].to(x.dtype))[0]
        return x + self.mlp(self.ln_2(x))


class ClipTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.resblocks = nn.ModuleList([ClipBlock(), ClipBlock()])

    def forward(self, x):
        x = x.permute(1, 0, 2)
        for block in self.resblocks:
            x = block(x)
        return x.permute(1, 0, 2)


class VitBlock(nn.Module):
    """As torchvision's encoder."""

    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm(8)
        self.self_attention = nn.MultiheadAttention(8, 2, dropout=0.0, batch_first=True)

    def forward(self, x):
        y = self.ln(x)
        return x + self.self_attention(y, y, y, need_weights=False)[0]


class Crossed(nn.Module):
    """With keys and values of other widths, and a bias of each."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True, batch_first=True)

    def forward(self, x):
        return self.attn(x, x[..., :6], x[..., :4], key_padding_mask=PADDED)[0]


def encoder(layers=None, **settings):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, layers) if layers else layer


# For each: how it is made, what is named, what goes in, what of the output counts.
ATTENTIVE = {
    "itself": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), ["x"], (X, X, X), lambda y: y[0]),
    "other keys": (
        lambda: nn.MultiheadAttention(8, 2, bias=False, add_zero_attn=True),
        ["x"],
        (X, X.flip(1), X),
        lambda y: y[0],
    ),
    "crossed": (Crossed, ["attn"], (X,), lambda y: y),
    "clip": (ClipTower, ["attn"], (X,), lambda y: y),
    "vit": (VitBlock, ["self_attention"], (X,), lambda y: y),
    "encoder layer": (encoder, ["self_attn"], (X,), lambda y: y),
    "encoder layer, norm first": (lambda: encoder(norm_first=True), ["self_attn", "linear1"], (X,), lambda y: y),
    "encoder": (lambda: encoder(2), ["self_attn"], (X, None, PADDED), lambda y: y[:, :3]),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        ["self_attn", "multihead_attn"],
        (X, X),
        lambda y: y,
    ),
    "transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True),
        r".*attn",
        (X, X),
        lambda y: y,
    ),
}
each = pytest.mark.parametrize("name", ATTENTIVE)
nested = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
# In all of them, and how it is scaled in one.
SETTINGS = [(name, settings) for name in ATTENTIVE for settings in ({}, {"use_dora": True}, {"merge_weights": True})]
SETTINGS.append(("itself", {"use_rslora": True}))


def scaling(settings):
    return 4 / 2**0.5 if settings.get("use_rslora") else 2.0


@nested
@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_the_output_is_that_of_w(name, settings):
    _, _, _, of = ATTENTIVE[name]
    assert_is_w(*adapted(*ATTENTIVE[name], **settings), of, scaling(settings))


@each
def test_every_adapter_learns_as_by_hand(name):
    _, _, _, of = ATTENTIVE[name]
    model, inputs, base = adapted(*ATTENTIVE[name])
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 2 * len(adapters(model))
    some = torch.randn_like(of(base["x"](*inputs)))
    expected = torch.autograd.grad(of(by_hand(model, base)(*inputs)), parameters, some)
    got = torch.autograd.grad(of(model["x"](*inputs)), parameters, some)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, 1e-8)
    of(model["x"](*inputs)).mul(some).sum().backward()
    assert not lora.check(model).idle


@nested
@each
def test_it_is_saved_loaded_copied_merged_and_ejected(name, tmp_path):
    _, targets, _, of = ATTENTIVE[name]
    for settings in ({}, {"use_dora": True}):
        model, inputs, base = adapted(*ATTENTIVE[name], **settings)
        before, y = of(base["x"](*inputs)), of(model["x"](*inputs))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(of(twin["x"](*inputs)), y)
            assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
            moved(twin)  # of its own
            assert torch.equal(of(model["x"](*inputs)), y)
        keys = [key for key in model.state_dict() if "lora_" not in key]
        assert keys == [*base.state_dict()]
        lora.save_adapter(model, tmp_path / "adapter.safetensors")
        other = copy.deepcopy(base)
        lora.load_adapter(other, tmp_path / "adapter.safetensors")
        assert torch.equal(of(other["x"](*inputs)), y)
        merged, right = lora.merged_state_dict(model), copy.deepcopy(base)
        assert [*merged] == keys
        right.load_state_dict(merged)
        assert_close(of(right["x"](*inputs)), y)
        anew = copy.deepcopy(base)
        lora.inject(anew, target_modules=targets, r=2, lora_alpha=4, **settings)
        anew.load_state_dict(model.state_dict())
        assert torch.equal(of(anew["x"](*inputs)), y)
        classes = [type(module) for module in base.modules()]
        lora.eject(other)
        assert [type(module) for module in other.modules()] == classes
        assert [*other.state_dict()] == keys
        assert torch.equal(of(other["x"](*inputs)), before)
        lora.merge(model)
        assert [type(module) for module in model.modules()] == classes
        assert_close(of(model["x"](*inputs)), y)


@pytest.mark.parametrize("enabled", [(True, True, True), (True, False, True), (False, True, False)])
@pytest.mark.parametrize("use_dora", [False, True])
def test_query_key_and_value_may_each_have_an_a_of_their_own_or_none(enabled, use_dora):
    model = nn.ModuleDict({"x": nn.MultiheadAttention(8, 2, batch_first=True)}).double().requires_grad_(False)
    base, x = copy.deepcopy(model), X.double()
    only = {"exclude_modules": ["out_proj"], "splits": {"in_proj_weight": (8, 8, 8)}}
    lora.inject(model, target_modules=["x"], r=2, lora_alpha=4, enable_lora={"x.in_proj_weight": enabled}, **only)
    attention = moved(model)["x"]
    assert attention.in_proj_weight_lora_A.shape == (2 * sum(enabled), 8)
    assert attention.in_proj_weight_lora_B.shape == (8 * sum(enabled), 2)
    for inputs in ((x, x, x), (x, x.flip(0), x.flip(1))):
        right = by_hand(model, base, splits=(8, 8, 8), enabled=enabled)
        got, expected = (of(*inputs)[0] for of in (attention, right))
        assert_close(got, expected)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for one, other in zip(*(torch.autograd.grad(y.sin().sum(), parameters) for y in (got, expected)), strict=True):
            assert_close(one, other)


def test_no_weight_is_built_in_training_and_dropout_is_of_what_is_projected(monkeypatch):
    for name in ("itself", "other keys", "crossed", "clip", "encoder layer", "decoder"):
        _, _, _, of = ATTENTIVE[name]
        model, inputs, _ = adapted(*ATTENTIVE[name], use_dora=name == "clip")
        layers = lora_layers(model, "the test")
        with monkeypatch.context() as patch:
            for cls in {*map(type, layers)}:
                patch.setattr(cls, "lora_delta", lambda *_: pytest.fail("W was built"))
            of(model["x"](*inputs)).sum().backward()
        for layer in layers:
            layer.lora_dropout = 0.5
        assert not torch.allclose(of(model["x"](*inputs)), of(model["x"](*inputs)))
        model.eval()
        assert torch.equal(of(model["x"](*inputs)), of(model["x"](*inputs)))


def test_nothing_of_the_size_of_a_weight_is_kept_for_backward():
    model = nn.Sequential(nn.MultiheadAttention(128, 4, batch_first=True))
    lora.inject(model, target_modules=["0"], r=2)
    x = torch.randn(1, 3, 128)
    kept = kept_for_backward(lambda: model[0](x, x, x, need_weights=False), *model.parameters())
    assert kept < 20 * x.nbytes < 128 * 128 * 4


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["itself", "crossed", "encoder layer"])
def test_checkpointing_changes_nothing(name, use_reentrant):
    _, _, _, of = ATTENTIVE[name]
    model, inputs, _ = adapted(*ATTENTIVE[name])
    inputs = tuple(x.requires_grad_() for x in inputs)  # which the reentrant kind needs
    parameters = [p for p in model.parameters() if p.requires_grad]
    y = of(model["x"](*inputs))
    expected = torch.autograd.grad(y.sin().sum(), parameters)
    again = of(checkpoint(model["x"], *inputs, use_reentrant=use_reentrant))
    assert_close(again, y)
    again.sin().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert_close(parameter.grad, gradient)


COMPILED = ["itself", "other keys", "crossed", "clip", "vit", "encoder layer"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "use_dora"),
    in_tiers(itertools.product(COMPILED, [True, False]), zip(COMPILED, itertools.cycle([True, False]), strict=False)),
)
def test_it_is_compiled_without_a_break(name, use_dora):
    _, _, _, of = ATTENTIVE[name]
    model, inputs, _ = adapted(*ATTENTIVE[name], use_dora=use_dora)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: model["x"](*inputs), fullgraph=True, backend="aot_eager")
    parameters = [p for p in model.parameters() if p.requires_grad]
    got, expected = of(compiled(*inputs)), of(model["x"](*inputs))
    assert_close(got, expected)
    for one, other in zip(*(torch.autograd.grad(y.sin().sum(), parameters) for y in (got, expected)), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal"])
def test_starts_that_read_the_weights(how):
    for name in ("itself", "crossed"):
        _, _, _, of = ATTENTIVE[name]
        model, inputs, base = adapted(*ATTENTIVE[name], init_lora_weights=how)  # which sees that it starts as it was
        assert not torch.allclose(of(model["x"](*inputs)), of(base["x"](*inputs)))
        with lora.disabled(model):
            assert_close(of(model["x"](*inputs)), of(base["x"](*inputs)))
        lora.eject(model)
        assert_close(of(model["x"](*inputs)), of(base["x"](*inputs)))


class AttentionPool(nn.Module):
    """As CLIP's ResNet pools: torch's function is given the weights of layers that nobody calls."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        x = torch.cat([x.mean(0, keepdim=True), x])
        y, _ = nn.functional.multi_head_attention_forward(
            x[:1], x, x, 8, 2, None, torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            None, None, False, 0.0, self.c_proj.weight, self.c_proj.bias, training=self.training, need_weights=False,
            use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return y.squeeze(0)


def test_the_layers_whose_weights_torchs_function_is_given_learn(monkeypatch):
    model, (x,), base = adapted(AttentionPool, "all-linear", (X.permute(1, 0, 2),), lambda y: y)
    assert len(adapters(model)) == 4
    assert_close(model["x"](x), by_hand(model, base)(x))
    monkeypatch.setattr(type(model["x"].q_proj), "lora_delta", lambda *_: pytest.fail("W was built"))
    model["x"](x).sin().sum().backward()
    assert not lora.check(model).idle


def test_the_report_and_the_repr_say_what_is_adapted():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "l": nn.Linear(8, 8)})
    report = lora.inject(copy.deepcopy(model), target_modules="all-linear", r=2)
    assert [row.names[0] for row in report.modules] == ["a.out_proj", "l"]
    assert report.unreached == {"a.in_proj_weight": 24 * 8}
    report = lora.inject(model, target_modules=["a"], r=2)
    assert [(row.names[0], row.shape, row.parameters) for row in report.modules] == [
        ("a.in_proj_weight", (24, 8), 2 * (24 + 8)),
        ("a.out_proj", (8, 8), 2 * (8 + 8)),
    ]
    assert "in_proj_weight: r=2, lora_alpha=8" in repr(model)


def test_settings_by_the_name_of_the_module_are_for_all_that_it_keeps():
    def ranks(**settings):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2, kdim=4)})
        report = lora.inject(model, target_modules=["a", "b"], r=2, lora_alpha=2, **settings)
        return {row.names[0]: (row.r, row.scaling) for row in report.modules}

    names = ["a.in_proj_weight", "a.out_proj", *(f"b.{own}" for own in ("q_proj_weight", "k_proj_weight"))]
    names += ["b.v_proj_weight", "b.out_proj"]
    of_a = {name: (3, 4.0) if name.startswith("a.") else (2, 1.0) for name in names}
    assert ranks(rank_pattern={"a": 3}, alpha_pattern={"a": 12}) == of_a
    assert ranks(rank_pattern={"out_proj": 4, "a": 3})["a.out_proj"] == (4, 0.5)
    assert ranks(rank_pattern={"k_proj_weight": 4})["b.k_proj_weight"] == (4, 0.5)
    with pytest.raises(ValueError, match="`rank_pattern` 'c' matches no adapted module"):
        ranks(rank_pattern={"c": 3})


def test_what_is_wrong_is_said_at_once_and_leaves_the_model_as_it_was():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2)})
    model["b"].in_proj_weight = model["a"].in_proj_weight
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"a.in_proj_weight: is tied to b.in_proj_weight.*\n.*b.in_proj_weight: is"):
        lora.inject(model, target_modules=["a", "b"], r=2)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not adapters(model)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    lora.inject(model, target_modules=["a"], r=2)
    with pytest.raises(ValueError, match=r"a.in_proj_weight: has LoRA already.*\n.*a.out_proj: has LoRA already"):
        lora.inject(model, target_modules=["a"], r=2)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"a.in_proj_weight: `splits` .*must .*add up to `out_features` \(=24\)"):
        lora.inject(model, target_modules=["a"], splits={"in_proj_weight": (8, 8)})


def test_what_is_computed_is_not_passed_over():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.LSTM(8, 4), "c": nn.Linear(8, 8)})
    nn.utils.parametrizations.weight_norm(model["a"], "in_proj_weight")
    nn.utils.parametrizations.orthogonal(model["b"], "weight_hh_l0")
    with pytest.raises(ValueError, match=r"a.in_proj_weight: is computed .*\n.*b.weight_hh_l0: is computed") as e:
        lora.inject(model, target_modules=["a", "b", "c"], r=2)
    assert str(e.value).count("\n") == 2
    lora.inject(model, target_modules=["c"], r=2)


class Placed(nn.MultiheadAttention):
    """With a matrix that it does not project with, and a layer of its own."""

    def __init__(self):
        super().__init__(8, 2, batch_first=True)
        self.places, self.gate = nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.places
        return super().forward(x, x, x)[0] * self.gate(x).sigmoid()


def test_what_a_subclass_keeps_beside_is_left_alone():
    model, (x,), base = adapted(Placed, ["x"], (X,), lambda y: y)
    assert {*adapters(model)} == {"x.in_proj_weight", "x.out_proj.weight"}
    assert_close(model["x"](x), by_hand(model, base)(x))


def test_what_is_excluded_is_left_alone():
    def names(**settings):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2)})
        model["b"].in_proj_weight = model["b"].v_proj_weight = nn.Parameter(torch.randn(24, 8))  # which b cannot have
        return [row.names[0] for row in lora.inject(model, r=2, **settings).modules]

    assert names(target_modules=["a", "b"], exclude_modules=["b"]) == ["a.in_proj_weight", "a.out_proj"]
    assert names(target_modules=["a"], exclude_modules=["out_proj"]) == ["a.in_proj_weight"]
    assert names(target_modules=["a"], exclude_modules=r".*in_proj_weight") == ["a.out_proj"]
    once = names(target_modules=["a"], target_parameters=["a.in_proj_weight", "a.out_proj.weight"])
    assert once == ["a.in_proj_weight", "a.out_proj"]
    with pytest.raises(ValueError, match="leave no module to adapt"):
        names(target_parameters=["a.in_proj_weight"], exclude_modules=["a"])


def test_the_bias_of_the_keys_is_a_parameter_that_can_be_named():
    model = nn.ModuleDict({"x": nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)}).double()
    base = copy.deepcopy(model)
    lora.inject(model, target_parameters=["bias_k"], r=2, lora_alpha=4)
    attention, x = moved(model)["x"], X.double()
    base["x"].bias_k.data += (2 * attention.bias_k_lora_B @ attention.bias_k_lora_A).detach()
    assert_close(attention(x, x, x)[0], base["x"](x, x, x)[0])
    attention(x, x, x)[0].sin().sum().backward()
    assert not lora.check(model).idle


def test_torchs_transforms_and_twice_differentiating():
    model, (x, _, _), base = adapted(*ATTENTIVE["itself"])
    attention, right = model["x"], by_hand(model, base)
    expected = right(x, x, x)[0]
    one = torch.func.vmap(lambda x: attention(x[None], x[None], x[None])[0][0])
    assert_close(one(x), expected)
    exported = torch.export.export(attention, (x, x, x), strict=False).module()
    assert_close(exported(x, x, x)[0], expected)
    some = x[:1, :2].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: attention(x, x, x)[0], (some,))
