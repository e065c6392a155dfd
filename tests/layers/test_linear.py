"""lora.Linear: the equation, its gradients, dropout, r = 0, cost, and what it refuses."""

import re

import pytest
import torch
from conftest import assert_equation, plain_twin, randomised, update
from hypothesis import given
from hypothesis import strategies as st
from pairwise import every_two
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import lora


@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    leading=st.lists(st.integers(0, 3), max_size=3),
    bias=st.booleans(),
    transposed=st.booleans(),
    training=st.booleans(),
    merge=st.booleans(),
    grad=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_it_computes_the_equation(sizes, leading, bias, transposed, training, merge, grad, dtype):
    n, m, r = sizes
    options = {"fan_in_fan_out": transposed, "merge_weights": merge, "bias": bias, "dtype": dtype}
    layer = randomised(lora.Linear(n, m, r, lora_alpha=3, **options)).train(training)
    with torch.set_grad_enabled(grad):
        assert_equation(layer, torch.randn(*leading, n, dtype=dtype))


@every_two(
    trained=[("x", "A", "B", "bias"), ("x",), ("A",), ("B",), ("A", "B"), ("x", "B"), ("x", "A")],
    transposed=[False, True],
    dropout=[0.0, 0.4],
)
def test_its_gradients_are_right_whichever_are_wanted(trained, transposed, dropout):
    layer = randomised(lora.Linear(4, 3, 2, 3, dropout, transposed, dtype=torch.float64))
    tensors = {"x": torch.randn(2, 5, 4, dtype=torch.float64), "A": layer.lora_A, "B": layer.lora_B, "bias": layer.bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)

    def function(*_):
        torch.manual_seed(1)  # the same features are dropped at every call
        return layer(tensors["x"])

    assert gradcheck(function, [tensors[name] for name in trained], nondet_tol=0)


def test_an_unfrozen_base_weight_gets_its_gradient():
    layer = randomised(lora.Linear(4, 3, 2, dtype=torch.float64))
    layer.weight.requires_grad_(True)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    twin = plain_twin(layer)
    layer(x).square().sum().backward()
    twin(x.detach()).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)


def test_double_backward_is_right():
    layer = randomised(lora.Linear(4, 3, 2, lora_dropout=0.4, dtype=torch.float64))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def function(*_):
        torch.manual_seed(1)
        return layer(x)

    assert gradgradcheck(function, [x, layer.lora_A, layer.lora_B])


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided", "sliced"])
def test_inputs_need_not_be_contiguous(layout):
    layer = randomised(lora.Linear(6, 5, 2, dtype=torch.float64))
    x = {
        "transposed": torch.randn(6, 4, 3).transpose(0, 2),
        "expanded": torch.randn(1, 6).expand(7, 6),
        "strided": torch.randn(4, 12)[:, ::2],
        "sliced": torch.randn(4, 9)[1:, 2:8],
    }[layout].double()
    assert_equation(layer, x)
    x.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(plain_twin(layer)(x).sum(), x)[0])


# ---- dropout: with W₀ = 0 and A = B = I the layer shows what it drops -------------------------------------------


def transparent(n, p):
    layer = lora.Linear(n, n, r=n, lora_alpha=n, lora_dropout=p, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(n))
        layer.lora_B.copy_(torch.eye(n))
    return layer


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_features_with_probability_p_and_scales_the_others_up(p):
    n, rows = 64, 200
    y = transparent(n, p)(torch.ones(rows, n))
    kept = y != 0
    used = 1 - 1 / y.max().item()
    assert abs(used - p) <= 1 / 512, "p may be rounded to a multiple of 1/256, as `lora_linear` says"
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - used)))
    deviation = (used * (1 - used)) ** 0.5
    assert abs(kept.float().mean().item() - (1 - used)) < 5 * deviation / (n * rows) ** 0.5
    assert (kept.float().mean(0) - (1 - used)).abs().max() < 5 * deviation / rows**0.5, "every feature alike"
    assert (kept.float().mean(1) - (1 - used)).abs().max() < 5 * deviation / n**0.5, "every row alike"


def test_dropout_of_a_large_input_is_independent_in_all_rows_and_the_same_in_backward():
    layer, x = transparent(64, 0.5), torch.ones(10_000, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert len(torch.unique(y.detach(), dim=0)) == len(y)
    assert abs(y.mean().item() - 1) < 5 / y.numel() ** 0.5, "the expectation is that without dropout, exactly"
    torch.testing.assert_close(x.grad, y.detach())


@pytest.mark.parametrize("p", [1e-4, 0.9999])
def test_dropout_so_rare_or_so_common_that_a_byte_of_noise_cannot_say_it_is_honoured(p):
    y = transparent(100, p)(torch.ones(1000, 100))
    kept = (y != 0).float().mean().item()
    torch.testing.assert_close(y.max().item(), 1 / (1 - p), rtol=1e-4, atol=0)
    assert 0 < min(kept, 1 - kept) < 1e-3


def test_dropout_in_backward_drops_what_it_dropped_in_forward():
    layer, x = transparent(16, 0.5), torch.rand(40, 16) + 1
    x.requires_grad_(True)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y != 0) * 2.0)
    torch.testing.assert_close(layer.lora_A.grad, y.detach().sum(0).expand(16, 16))
    torch.testing.assert_close(layer.lora_B.grad, y.detach().sum(0).expand(16, 16))


def test_dropout_leaves_the_base_path_alone():
    layer = lora.Linear(6, 5, r=2, lora_dropout=0.9)
    x = torch.randn(50, 6)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_dropout_follows_the_seed_and_changes_between_calls():
    layer, x = transparent(16, 0.5), torch.ones(8, 16)
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("grad", [True, False])
def test_there_is_no_dropout_in_eval(grad):
    layer = transparent(16, 0.5).eval()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(torch.ones(8, 16)), torch.ones(8, 16))


# ---- r = 0, settings, words -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False])
def test_with_r_of_zero_it_is_a_plain_trainable_linear(mode):
    layer, plain = lora.Linear(6, 5), nn.Linear(6, 5)
    plain.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(3, 6, requires_grad=True)
    assert torch.equal(layer.train(mode)(x), plain(x))
    assert all(parameter.requires_grad for parameter in layer.parameters())
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert list(layer.lora_parameters()) == []
    assert repr(layer) == repr(plain)


def test_rslora_scales_by_the_root_of_r():
    layer = randomised(lora.Linear(6, 5, r=4, lora_alpha=3, use_rslora=True, dtype=torch.float64))
    base = nn.functional.linear(x := torch.randn(2, 6, dtype=torch.float64), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x) - base, x @ torch.from_numpy(update(layer)).T * 4**0.5)


@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients"])
def test_a_changed_scaling_counts_at_once(mode):
    layer = randomised(lora.Linear(6, 5, r=2, dtype=torch.float64)).train(mode == "train")
    x = torch.randn(2, 6, dtype=torch.float64)
    with torch.set_grad_enabled(mode != "eval without gradients"):
        base, one = nn.functional.linear(x, layer.weight, layer.bias), layer(x)
        layer.scaling *= 3
        torch.testing.assert_close(layer(x) - base, 3 * (one - base))


def test_only_the_adapter_and_the_bias_train():
    layer = lora.Linear(6, 5, r=2)
    assert {name: p.requires_grad for name, p in layer.named_parameters()} == {
        "weight": False,
        "bias": True,
        "lora_A": True,
        "lora_B": True,
    }


def test_a_fresh_layer_computes_what_its_base_does():
    layer, x = lora.Linear(6, 5, r=2), torch.randn(3, 6)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_reset_parameters_starts_over_as_the_constructor_does(transposed):
    torch.manual_seed(1)
    made = lora.Linear(400, 4, r=2, fan_in_fan_out=transposed)
    layer = randomised(lora.Linear(400, 4, r=2, fan_in_fan_out=transposed))
    torch.manual_seed(1)
    nn.Linear(400, 4)  # the constructor draws for the base class first
    layer.reset_parameters()
    for name, parameter in made.named_parameters():
        assert torch.equal(layer.get_parameter(name), parameter), name


def test_it_prints_its_settings():
    layer = lora.Linear(6, 5, r=2, lora_alpha=3, lora_dropout=0.1, use_rslora=True)
    for words in (
        "Linear(in_features=6, out_features=5, bias=True",
        "r=2",
        "lora_alpha=3",
        "lora_dropout=0.1",
        "rslora",
    ):
        assert words in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": -1}, "`r` must be an integer of at least 0, got -1."),
        ({"r": 2.0}, "`r` must be an integer of at least 0, got 2.0."),
        ({"r": True}, "`r` must be an integer of at least 0, got True."),
        ({"r": "8"}, "`r` must be an integer of at least 0, got '8'."),
        ({"r": None}, "`r` must be an integer of at least 0, got None."),
        ({"lora_alpha": float("nan")}, "`lora_alpha` must be a finite number, got nan."),
        ({"lora_alpha": float("inf")}, "`lora_alpha` must be a finite number, got inf."),
        ({"lora_alpha": "16"}, "`lora_alpha` must be a finite number, got '16'."),
        ({"lora_dropout": 1.0}, "`lora_dropout` must be at least 0 and below 1, got 1.0."),
        ({"lora_dropout": -0.1}, "`lora_dropout` must be at least 0 and below 1, got -0.1."),
        ({"lora_dropout": float("nan")}, "`lora_dropout` must be at least 0 and below 1, got nan."),
        ({"lora_dropout": None}, "`lora_dropout` must be at least 0 and below 1, got None."),
    ],
)
@pytest.mark.parametrize("make", [lora.Linear, lora.MergedLinear, lambda *a, **k: lora.Conv2d(*a, 3, **k)])
def test_settings_out_of_range_raise_and_are_repeated(make, arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(6, 6, **{"r": 2, **arguments})


def test_a_misspelt_argument_raises():
    with pytest.raises(TypeError, match="lora_alhpa"):
        lora.Linear(6, 5, r=2, lora_alhpa=4)
