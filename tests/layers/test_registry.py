"""register: kinds of a user's own, subclasses of known layers, and the classes that are made for them."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from pairwise import every_two

import lora
from lora.layers import registry
from lora.layers.linear import LinearLoRA


class Scorer(nn.Module):
    """A layer of another's making: its weight is (n, 1), and it knows no bias."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, 1))

    def forward(self, x):
        return (x @ self.weight).squeeze(-1)


class ScorerLoRA(lora.LoRALayer):
    """The five functions that the documentation asks for."""

    @classmethod
    def lora_shapes(cls, base, r, **settings):
        return (r, base.weight.shape[0]), (1, r)

    def lora_down(self, x, A):
        return x @ A.T

    def lora_up(self, h, B):
        return (h @ B.T).squeeze(-1)

    def lora_delta(self, A, B):
        return (B @ A).T

    def lora_forward_with(self, input, weight):
        return (input @ weight).squeeze(-1)


class Doubled(nn.Linear):
    """A subclass with a forward of its own: to compute W x + b in its place would be wrong."""

    def forward(self, x):
        return 2 * super().forward(x)


class Labelled(nn.Linear):
    """A subclass with nn.Linear's forward."""

    label = "a label"


class Quantised(nn.Linear):
    """Its weight is a buffer of integers."""

    def __init__(self, *args):
        super().__init__(*args)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", (100 * weight).round().to(torch.int8))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) / 100, self.bias)


@pytest.fixture(autouse=True)
def own_kinds(monkeypatch):
    """Kinds that a test registers are forgotten after it."""
    monkeypatch.setattr(registry, "_kinds", dict(registry._kinds))
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    lora.register(Scorer, ScorerLoRA)


def randomised(model):
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            nn.init.normal_(module.lora_A)
            nn.init.normal_(module.lora_B)
    return model


def scorer():
    model = nn.Sequential(Scorer(6))
    lora.inject(model, target_modules=["0"], r=2, lora_alpha=3)
    return randomised(model)


def injected(layer, **fields):
    model = nn.Sequential(layer)
    lora.inject(model, target_modules=["0"], **{"r": 2, "lora_alpha": 3, **fields})
    return randomised(model)


# ---- a kind of one's own ---------------------------------------------------------------------------------------


def test_a_kind_of_ones_own_computes_its_equation():
    model, x = scorer(), torch.randn(5, 6)
    layer = model[0]
    expected = x @ (layer.weight + 3 / 2 * (layer.lora_B @ layer.lora_A).T)
    torch.testing.assert_close(model(x), expected.squeeze(-1))
    assert isinstance(layer, Scorer)


def test_a_kind_of_ones_own_serves_eval_from_a_merged_weight():
    model, x = injected(Scorer(6), merge_weights=True), torch.randn(5, 6)
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)


def test_a_kind_of_ones_own_can_be_merged():
    model, x = scorer(), torch.randn(5, 6)
    expected = model(x)
    lora.merge(model)
    assert type(model[0]) is Scorer
    torch.testing.assert_close(model(x), expected)


def test_a_kind_of_ones_own_can_be_ejected():
    model, x = nn.Sequential(Scorer(6)), torch.randn(5, 6)
    expected, keys = model(x), set(model[0].__dict__)
    lora.inject(model, target_modules=["0"])
    lora.eject(randomised(model))
    assert type(model[0]) is Scorer
    assert set(model[0].__dict__) == keys
    assert torch.equal(model(x), expected)


def test_a_kind_of_ones_own_is_saved_and_loaded(tmp_path):
    model, x = scorer(), torch.randn(5, 6)
    lora.save_adapter(model, tmp_path / "a")
    plain = nn.Sequential(Scorer(6))
    plain.load_state_dict(model.state_dict(), strict=False)
    lora.load_adapter(plain, tmp_path / "a")
    assert torch.equal(plain(x), model(x))


def test_a_kind_is_found_by_the_name_of_a_class_that_was_never_imported():
    base = type("Scorer", (Scorer,), {"__module__": "some_package.layers", "__qualname__": "Outer.Scorer"})
    lora.register("some_package.layers.Outer.Scorer", LinearLoRA)
    assert registry.kind_for(base) is LinearLoRA
    assert registry.kind_for(Scorer) is ScorerLoRA


def test_the_nearest_registered_class_decides():
    lora.register(Labelled, type("LabelledLoRA", (LinearLoRA,), {}))
    assert registry.kind_for(type("Sub", (Labelled,), {})).__name__ == "LabelledLoRA"
    assert registry.kind_for(nn.Linear) is LinearLoRA


def test_the_last_registration_counts():
    other = type("Other", (ScorerLoRA,), {})
    lora.register(Scorer, other)
    assert isinstance(scorer()[0], other)


@pytest.mark.parametrize("kind", [Scorer, lora.Linear, object, LinearLoRA(), None, "LinearLoRA"], ids=repr)
def test_what_is_no_mixin_is_not_registered(kind):
    with pytest.raises(TypeError, match=r"`kind` must be a mixin class that derives from lora\.LoRALayer, got"):
        lora.register(Scorer, kind)


@pytest.mark.parametrize("base", [object, None, Scorer(2), int], ids=repr)
def test_what_is_no_class_of_layer_is_not_registered(base):
    with pytest.raises(TypeError, match=r"`base` must be a subclass of nn\.Module or the full name of one, got"):
        lora.register(base, ScorerLoRA)


@pytest.mark.parametrize("missing", ["lora_shapes", "lora_down", "lora_up"])
def test_a_kind_that_says_too_little_says_what_is_missing(missing):
    namespace = {name: value for name, value in vars(ScorerLoRA).items() if name != missing}
    lora.register(Scorer, type("Half", (lora.LoRALayer,), namespace))
    with pytest.raises(NotImplementedError, match=f"must define {missing}"):
        scorer()(torch.ones(2, 6))


@pytest.mark.parametrize("name", ["lora_down", "lora_up", "lora_delta", "lora_forward_with", "lora_output_dims"])
def test_what_a_kind_must_define_is_called_so(name):
    method = getattr(lora.LoRALayer, name)
    arguments = [None] * (len(inspect.signature(method).parameters) - 1)
    with pytest.raises(NotImplementedError, match=f"LoRALayer must define {name}$"):
        method(lora.LoRALayer(), *arguments)


def test_a_class_that_a_user_writes_does_not_change_what_inject_makes():
    type("Mine", (LinearLoRA, nn.Linear), {})
    assert type(injected(nn.Linear(4, 4))[0]) is lora.Linear


# ---- subclasses of layers that are known -----------------------------------------------------------------------


def test_a_subclass_with_its_own_forward_keeps_it_and_finds_w_in_the_place_of_its_weight():
    layer, x = Doubled(6, 4), torch.randn(5, 6)
    base = layer(x)
    model = injected(layer, merge_weights=True).eval()
    with torch.no_grad():
        update = 2 * x @ layer.lora_A.T @ layer.lora_B.T * 3 / 2
        torch.testing.assert_close(model(x), base + update)
    assert not layer.lora_dense


def test_a_subclass_with_its_own_forward_is_merged_to_itself():
    model, x = injected(Doubled(6, 4)), torch.randn(5, 6)
    expected, state = model(x), lora.merged_state_dict(model)
    lora.merge(model)
    assert type(model[0]) is Doubled
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(state["0.weight"], model[0].weight)


def test_a_class_that_is_registered_after_it_was_adapted_is_adapted_as_registered():
    class Mine(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class MineLoRA(LinearLoRA):
        pass

    first, second = injected(Mine(6, 4)), nn.Sequential(Mine(6, 4))
    lora.register(Mine, MineLoRA)
    lora.inject(second, target_modules=["0"], r=2)
    assert isinstance(second[0], MineLoRA)
    assert second[0].lora_dense
    for model in (first, second):  # the one that was there before goes on as it was
        expected = model(torch.ones(6))
        lora.merge(model)
        torch.testing.assert_close(model(torch.ones(6)), expected)
        assert type(model[0]) is Mine


def test_a_subclass_without_its_own_forward_is_merged_to_itself():
    model, x = injected(Labelled(6, 4)), torch.randn(5, 6)
    expected = model(x)
    lora.merge(model)
    assert type(model[0]) is Labelled
    torch.testing.assert_close(model(x), expected)


def test_a_quantised_subclass_keeps_its_buffer_and_trains_its_adapter():
    layer, x = Quantised(6, 4), torch.randn(5, 6)
    base = layer(x)
    model = nn.Sequential(layer)
    report = lora.inject(model, target_modules=["0"], r=2)
    assert torch.equal(model(x), base)
    model(x).sum().backward()
    assert layer.lora_B.grad is not None
    assert report.trainable == 2 * (6 + 4)
    assert layer.lora_A.dtype == torch.float32


def test_a_quantised_subclass_is_not_merged():
    model = injected(Quantised(6, 4))
    for function in (lora.merge, lora.merged_state_dict):
        with pytest.raises(ValueError, match=r"0: a Tensor in a Quantised is neither dense nor packed in"):
            function(model)


def test_a_subclass_made_for_a_merged_linear_is_one_too():
    model = injected(Labelled(6, 4), splits={"0": (3, 1)})
    assert type(model[0]).__name__ == "Labelled"
    assert model[0].lora_A.shape == (4, 6)


# ---- the classes that are made ---------------------------------------------------------------------------------


def test_two_layers_of_one_class_become_one_class():
    assert type(injected(Labelled(6, 4))[0]) is type(injected(Labelled(3, 2))[0])
    assert type(injected(nn.Linear(6, 4))[0]) is lora.Linear


def test_a_made_class_is_named_like_its_base():
    cls = type(injected(Labelled(6, 4))[0])
    assert (cls.__name__, cls.__module__) == ("Labelled", __name__)
    assert issubclass(cls, Labelled)
    assert issubclass(cls, lora.LoRALayer)


def test_a_made_class_prints_its_base_and_its_adapter():
    assert repr(injected(Labelled(6, 4), lora_dropout=0.1)[0]) == (
        "Labelled(in_features=6, out_features=4, bias=True, r=2, lora_alpha=3, lora_dropout=0.1)"
    )
    assert repr(scorer()[0]) == "Scorer(r=2, lora_alpha=3)"


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": through_torch,
    **{
        f"pickle {protocol}": lambda m, protocol=protocol: pickle.loads(pickle.dumps(m, protocol))
        for protocol in (2, 3, 4, 5)
    },
}


@every_two(
    copied=COPIES, make=[lambda: Labelled(6, 4), lambda: Doubled(6, 4), lambda: Scorer(6)], training=[True, False]
)
def test_a_layer_of_a_made_class_survives_copying(copied, make, training):
    model, x = injected(make(), merge_weights=True).train(training), torch.randn(5, 6)
    with torch.no_grad():
        expected = model(x)
        twin = copied(model)
        assert torch.equal(twin(x), expected)
        assert type(twin[0]) is type(model[0])
        assert twin[0].scaling == 3 / 2
        nn.init.zeros_(twin[0].lora_B)
        assert torch.equal(model(x), expected)


class Scaled(nn.Linear):
    def forward(self, input, scale=1.0, *, shift=0.0):
        return super().forward(input) * scale + shift


@pytest.mark.parametrize("training", [True, False])
def test_further_arguments_of_a_subclass_go_to_its_own_forward(training):
    layer, x = Scaled(6, 4), torch.randn(5, 6)
    base = layer(x, 2.0, shift=1.0)
    injected(layer, merge_weights=True).train(training)
    update = 2 * x @ layer.lora_A.T @ layer.lora_B.T * 3 / 2
    torch.testing.assert_close(layer(x, 2.0, shift=1.0), base + update)


@pytest.mark.parametrize(
    "own",
    [
        {"lora_down": lambda self, x, A: 2 * F.linear(x, A)},
        {"lora_up": lambda self, h, B: 2 * F.linear(h, B)},
        {"lora_update": lambda self, x, scaling: 2 * LinearLoRA.lora_update(self, x, scaling)},
        {"lora_product": lambda self, x, A, B: 2 * F.linear(F.linear(x, A), B)},
        {"lora_drop": lambda self, x: 2 * x},
    ],
    ids=lambda own: next(iter(own)),
)
def test_a_kind_that_computes_the_update_in_a_way_of_its_own(own):
    """Of a class, and of what derives from it with a forward of its own."""
    plain = type("Plain", (nn.Linear,), {})
    lora.register(plain, type("OwnLoRA", (LinearLoRA,), own))
    base = nn.Sequential(type("QuantisedPlain", (Quantised, plain), {})(6, 4))
    model = copy.deepcopy(base)
    lora.inject(model, target_modules=["0"], r=2)
    randomised(model)
    x = torch.randn(3, 6)
    update = model[0].scaling * x @ model[0].lora_A.T @ model[0].lora_B.T
    torch.testing.assert_close(model(x), base(x) + 2 * update)
