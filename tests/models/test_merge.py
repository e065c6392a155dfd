"""merge and merged_state_dict: float32 arithmetic rounded once, plain layers after, and nothing corrupted."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import DTYPES, LAYERS, STORED, example, make, randomised, update
from toy_model import IDS, Model, snapshot

import lora
from lora.layers import registry
from lora.layers.linear import LinearLoRA


def exact(layer):
    """W₀ + s · B A in float64, as the layer stores its weight."""
    return layer.weight.detach().double().numpy() + update(layer)


def half_ulp(values, dtype):
    """Half the distance between neighbours of `dtype` around float64 values, subnormal ones included."""
    info = torch.finfo(dtype)
    return 0.5 * info.eps * 2.0 ** np.floor(np.log2(np.maximum(np.abs(values), info.smallest_normal)))


def as_stored(layer, weight):
    """What is kept as (in, out) while there is LoRA is (out, in) in the plain layer."""
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight


# Rounding is worst in bfloat16, and in other dtypes it does not depend on the kind.
IN_ITS_DTYPE = [(kind, torch.bfloat16) for kind in STORED]
IN_ITS_DTYPE += [("Linear", dtype) for dtype in DTYPES if dtype != torch.bfloat16]

# ---- the weight ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), IN_ITS_DTYPE)
def test_the_merged_weight_is_the_equation_rounded_once(kind, dtype):
    layer = make(kind, dtype=dtype)
    expected, model = as_stored(layer, exact(layer)), nn.Sequential(layer)
    lora.merge(model)
    arithmetic = 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * np.abs(expected).max()
    error = np.abs(model[0].weight.detach().double().numpy() - expected)
    assert (error <= half_ulp(expected, dtype) + arithmetic).all()
    assert model[0].weight.dtype == dtype


@pytest.mark.parametrize("kind", STORED)
def test_a_merged_layer_is_a_plain_one(kind):
    layer = make(kind)
    base, parameter = type(layer).lora_base_class, layer.weight
    model = nn.Sequential(layer)
    lora.merge(model)
    arguments = LAYERS[kind][1]
    assert type(model[0]) is base
    assert model[0] is layer
    assert (model[0].weight is parameter) or kind == "Linear transposed"  # that one is stored anew
    ours = ("fan_in_fan_out", "splits", "enable_lora", "factored")
    keys = set(base(**{key: value for key, value in arguments.items() if key not in ours}).__dict__)
    assert set(layer.__dict__) == keys
    assert set(model.state_dict()) <= {"0.weight", "0.bias"}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", STORED)
def test_merging_keeps_the_function(kind, training):
    model = nn.Sequential(make(kind, dtype=torch.float64)).train(training)
    x = example(kind, torch.float64)
    before = model(x)
    lora.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert model[0].training is training


@pytest.mark.parametrize("kind", STORED)
def test_scaling_that_was_changed_by_hand_counts(kind):
    layer = make(kind, dtype=torch.float64)
    layer.scaling = -7.5
    expected = layer.weight.detach().numpy() + update(layer) / (3 / 2) * -7.5
    weight = lora.merged_state_dict(layer)["weight"].numpy()
    np.testing.assert_allclose(weight, expected)


def test_an_embedding_with_max_norm_computes_the_same_after():
    layer = lora.Embedding(7, 5, r=2, max_norm=0.5, dtype=torch.float64)
    randomised(layer)
    ids = torch.arange(7)
    rows = layer.weight.detach()
    rows = rows * (0.5 / rows.norm(dim=-1, keepdim=True)).clamp(max=1)
    expected = rows + (layer.lora_A.T @ layer.lora_B.T) / 2
    lora.merge(nn.Sequential(layer))
    torch.testing.assert_close(layer(ids), expected, rtol=1e-6, atol=1e-6)


def test_layers_in_low_precision_with_adapters_in_float32_are_merged_in_float32():
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    lora.inject(model, target_modules=["0"], r=4)
    randomised(model[0], std=0.1)
    expected = exact(model[0])
    lora.merge(model)
    error = np.abs(model[0].weight.detach().double().numpy() - expected)
    assert (error <= half_ulp(expected, torch.bfloat16) + 1e-6).all()


def test_biases_and_modules_that_trained_keep_what_they_learnt():
    model = Model()
    lora.inject(model, target_modules=["q_proj"], bias="all", modules_to_save=["head"])
    nn.init.ones_(model.head.weight)
    nn.init.ones_(model.layers[0].norm.bias)
    lora.merge(model)
    assert bool((model.head.weight == 1).all())
    assert bool((model.layers[0].norm.bias == 1).all())
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == {
        name: set(m.__dict__) for name, m in Model().named_modules()
    }


def test_a_layer_without_rank_becomes_plain_and_loses_nothing():
    model = nn.Sequential(lora.Linear(4, 4))
    report = lora.merge(model)
    assert type(model[0]) is nn.Linear
    assert report.lost == 0


# ---- what rounding loses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.bfloat16, 0.28, 0.36), (torch.float32, 0, 1e-4)], ids=str)
def test_the_report_says_how_much_of_the_update_rounding_lost(dtype, low, high):
    model = nn.Sequential(nn.Linear(256, 256, bias=False, dtype=dtype))
    nn.init.normal_(model[0].weight)
    lora.inject(model, target_modules=["0"], r=4)
    randomised(model[0])
    model[0].scaling = float(1 / 200 / update(model[0]).std() * model[0].scaling)
    before = model[0].weight.detach().double()
    delta = model[0].scaling * model[0].lora_B.detach().double() @ model[0].lora_A.detach().double()
    report = lora.merge(model)
    lost = float((model[0].weight.double() - before - delta).norm() / delta.norm())
    assert report.lost == pytest.approx(lost, rel=0.02, abs=1e-5)
    assert low <= report.lost < high


def test_the_report_prints_as_a_table_and_its_loss_is_the_largest():
    model = nn.ModuleDict({"small": nn.Linear(2, 2, dtype=torch.bfloat16), "none": nn.Linear(2, 2)})
    nn.init.ones_(model["small"].weight)
    lora.inject(model, target_modules=["small", "none"], r=1, lora_alpha=1)
    nn.init.ones_(model["small"].lora_A)
    nn.init.constant_(model["small"].lora_B, 2**-7 + 2**-9)  # neighbours of 1 are 2⁻⁷ apart: a fifth is lost
    report = lora.merge(model)
    assert str(report) == (
        "module  dtype     update lost to rounding\n"
        "small   bfloat16  20.00 %\n"
        "none    float32   0.00 %"
    )  # fmt: skip
    assert report.lost == pytest.approx(0.2)


# ---- what is refused -------------------------------------------------------------------------------------------


def refuses(model, *messages, functions=(lora.merge,)):
    before = snapshot(model)
    for function in functions:
        with pytest.raises(ValueError, match=rf"^{function.__name__}: ") as caught:
            function(model)
        assert snapshot(model) == before
        for message in messages:
            assert message in str(caught.value)


def tied_parameter():
    return Model(tied=True), "head"


def tied_storage():
    model = Model()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    return model, "head"


def tied_view():
    model = Model()
    model.layers[0].norm.weight = nn.Parameter(model.embed.weight.detach()[3])
    return model, "layers.0.norm"


@pytest.mark.parametrize("tie", [tied_parameter, tied_storage, tied_view])
def test_a_weight_that_is_tied_to_another_is_not_written(tie):
    model, other = tie()
    lora.inject(model, target_modules=["embed", "q_proj"])
    refuses(model, f"embed: its weight is tied to that of {other}, which would change too")


def test_two_adapted_layers_with_one_weight_are_both_named():
    model = Model(tied=True)
    lora.inject(model, target_modules=["embed", "head"])
    refuses(model, "embed: its weight is tied to that of head", "head: its weight is tied to that of embed")


def test_a_layer_under_two_names_is_not_tied_and_merged_once():
    layer = make("Linear", dtype=torch.float64)
    model, expected = nn.ModuleDict({"a": layer, "b": layer}), exact(layer)
    assert [row.name for row in lora.merge(model).modules] == ["a"]
    np.testing.assert_allclose(model["b"].weight.detach(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "lora_A", "lora_B"])
def test_what_is_not_finite_is_refused(where, value):
    model = nn.Sequential(make("Linear"), make("Linear", in_features=5))
    nn.init.constant_(getattr(model[1], where), value)
    message = "1: the merged weight would not be finite in torch.float32."
    refuses(model, message, functions=(lora.merge, lora.merged_state_dict))


@pytest.mark.parametrize("scaling", [3e38, -3e38])
def test_a_scaling_that_makes_an_infinity_is_refused(scaling):
    model = nn.Sequential(make("Linear"), make("Linear", in_features=5))
    model[1].scaling = scaling  # what is not finite itself is refused there
    nn.init.constant_(model[1].lora_A, 10)
    nn.init.constant_(model[1].lora_B, 10)
    message = "1: the merged weight would not be finite in torch.float32."
    refuses(model, message, functions=(lora.merge, lora.merged_state_dict))


def test_what_overflows_in_float16_is_refused():
    model = nn.Sequential(make("Linear"), make("Linear", in_features=5, dtype=torch.float16))
    nn.init.constant_(model[1].lora_A, 250)
    nn.init.constant_(model[1].lora_B, 250)
    message = "1: the merged weight would not be finite in torch.float16."
    refuses(model, message, functions=(lora.merge, lora.merged_state_dict))


def test_one_error_lists_every_layer():
    model = Model(tied=True)
    lora.inject(model, target_modules=["embed", "q_proj"])
    nn.init.constant_(model.layers[1].attn["q_proj"].lora_A, float("nan"))
    refuses(model, "embed: its weight is tied", "layers.1.attn.q_proj: the merged weight would not be finite")


@pytest.mark.parametrize("function", [lora.merge, lora.merged_state_dict, lora.eject])
def test_a_model_without_lora_is_refused(function):
    with pytest.raises(ValueError, match=r"there is no LoRA layer in this Model; `lora\.inject` puts"):
        function(Model())


def test_shapes_that_do_not_fit_are_refused_before_anything_is_written():
    model = nn.ModuleDict(
        {
            "first": lora.Linear(4, 4, r=2),
            "weight": lora.Linear(4, 6, r=2),
            "A": lora.Linear(4, 6, r=2),
            "embed": lora.Embedding(5, 4, r=2),
            "conv": lora.Conv2d(4, 4, 3, r=2),
            "m": lora.Linear(4, 6, r=2, use_dora=True),
        }
    )
    for layer in model.values():
        randomised(layer)
    model["weight"].weight.data = torch.zeros(7, 4)
    model["A"].lora_A.data = torch.zeros(2, 5)
    model["embed"].weight.data = torch.zeros(6, 4)
    model["conv"].lora_B.data = torch.zeros(15, 6)
    model["m"].lora_magnitude.data = torch.zeros(5)
    refuses(
        model,
        "  - weight: lora_A (2, 4), lora_B (6, 2) do not fit the weight (7, 4)",
        "  - A: lora_A (2, 5), lora_B (6, 2) do not fit the weight (6, 4)",
        "  - embed: lora_A (2, 5), lora_B (4, 2) do not fit the weight (6, 4)",
        "  - conv: lora_A (6, 12), lora_B (15, 6) do not fit the weight (4, 4, 3, 3)",
        "  - m: lora_A (2, 4), lora_B (6, 2), lora_magnitude (5,) do not fit the weight (6, 4)",
    )


class FragileLoRA(LinearLoRA):
    def lora_merge(self):
        raise MemoryError


def test_the_function_is_kept_when_memory_ends_half_way(monkeypatch):
    monkeypatch.setattr(registry, "_kinds", dict(registry._kinds))
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    fragile = type("Fragile", (nn.Linear,), {})
    lora.register(fragile, FragileLoRA)
    model = nn.Sequential(nn.Linear(4, 4), fragile(4, 4))
    lora.inject(model, target_modules=["0", "1"])
    randomised(model[0])
    x = torch.randn(2, 4)
    before = model(x)
    with pytest.raises(MemoryError):
        lora.merge(model)
    torch.testing.assert_close(model(x), before)


# ---- the state dict --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), IN_ITS_DTYPE)
def test_the_merged_state_dict_is_the_state_dict_after_merging_in_the_layout_of_before(kind, dtype):
    layer = make(kind, dtype=dtype)
    model, transposed = nn.Sequential(layer), getattr(layer, "fan_in_fan_out", False)
    before = snapshot(model)
    state = lora.merged_state_dict(model)
    assert snapshot(model) == before
    lora.merge(model)
    after = model.state_dict()
    assert list(state) == list(after)
    assert torch.equal(state.pop("0.weight"), after["0.weight"].T if transposed else after["0.weight"])
    assert all(torch.equal(value, after[name]) for name, value in state.items())


@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_state_dict_loads_strictly_into_a_plain_model(tied):
    model = Model(tied).double()
    lora.inject(model, target_modules=".*(embed|head|_proj)", modules_to_save=["layers.0.norm"], bias="all")
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            randomised(module, std=0.2)
    plain = Model().double()
    plain.load_state_dict(lora.merged_state_dict(model), strict=True)
    torch.testing.assert_close(plain(IDS), model(IDS))


def test_the_merged_state_dict_names_a_shared_layer_twice():
    layer = make("Linear", dtype=torch.float64)
    state = lora.merged_state_dict(nn.ModuleDict({"a": layer, "b": layer}))
    assert sorted(state) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    for name in ("a.weight", "b.weight"):
        np.testing.assert_allclose(state[name], exact(layer))


def test_the_merged_state_dict_refuses_what_a_state_dict_cannot_say():
    model = nn.Sequential(lora.Embedding(7, 5, r=2, max_norm=0.5))
    refuses(model, "0: a state dict cannot say that `max_norm` does not", functions=(lora.merged_state_dict,))
