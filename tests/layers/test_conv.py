"""lora.Conv1d, Conv2d, Conv3d: any geometry, both forms of the update, batched and not."""

import pytest
import torch
from conftest import assert_equation, plain_twin, randomised, with_float32_adapter
from counting import Operations
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck

import lora
from lora.layers import conv

CONVOLUTIONS = {1: lora.Conv1d, 2: lora.Conv2d, 3: lora.Conv3d}
TORCHS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
each_dimension = pytest.mark.parametrize("n", [1, 2, 3])
each_form = pytest.mark.parametrize("factored", [True, False])


@st.composite
def geometries(draw):
    """Arguments of a convolution in one to three dimensions, and the shape of an input that fits it."""
    n = draw(st.integers(1, 3))
    each = lambda low, high: draw(st.integers(low, high) | st.tuples(*[st.integers(low, high)] * n))  # noqa: E731
    factored, groups = draw(st.booleans()), draw(st.integers(1, 3))
    kernel = each(1, 3) if factored else draw(st.integers(1, 3))
    stride, dilation = each(1, 2), each(1, 2)
    padding = draw(st.just("valid") | st.just("same")) if draw(st.booleans()) else each(0, 2)
    assume(padding != "same" or stride in (1, (1,) * n))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    arguments = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": kernel,
        "r": draw(st.integers(0, 2)) * (groups if factored else 1),
        "factored": factored,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": mode,
    }
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    shape = (*batch, arguments["in_channels"], *(draw(st.integers(5, 6)) for _ in range(n)))
    return n, arguments, shape


@given(geometry=geometries(), training=st.booleans(), merge=st.booleans(), grad=st.booleans())
def test_it_computes_the_equation(geometry, training, merge, grad):
    n, arguments, shape = geometry
    layer = CONVOLUTIONS[n](**arguments, lora_alpha=3, merge_weights=merge, dtype=torch.float64)
    randomised(layer).train(training)
    with torch.set_grad_enabled(grad):
        assert_equation(layer, torch.randn(shape, dtype=torch.float64))


@given(geometry=geometries())
def test_its_gradients_are_those_of_the_plain_convolution(geometry):
    n, arguments, shape = geometry
    layer = randomised(CONVOLUTIONS[n](**arguments, lora_alpha=3, dtype=torch.float64))
    twin, x = plain_twin(layer), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), twin(x)
    wanted = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, wanted), torch.autograd.grad(expected, x, wanted))


@each_dimension
@each_form
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_adapters_gradients_are_right(n, factored, dropout):
    options = {"groups": 2, "padding": 1, "stride": 2, "factored": factored, "dtype": torch.float64}
    layer = randomised(CONVOLUTIONS[n](2, 4, 2, 2, 3, dropout, **options))
    x = torch.randn(1, 2, *[3] * n, dtype=torch.float64, requires_grad=True)

    def function(*_):
        torch.manual_seed(1)  # the same values are dropped at every call
        return layer(x)

    assert gradcheck(function, [x, layer.lora_A, layer.lora_B, layer.bias], nondet_tol=0, fast_mode=True)


@each_dimension
@each_form
def test_dropout_drops_values_of_the_input_and_leaves_the_base_path_alone(n, factored):
    layer = CONVOLUTIONS[n](1, 1, 1, 1, 1, 0.5, factored=factored)
    with torch.no_grad():
        layer.lora_A.fill_(1)
        layer.lora_B.fill_(1)
        x = torch.ones(4, 1, *[16] * n)
        update = layer(x) - layer.lora_base_forward(x)
    kept = update.abs() > 1e-5
    torch.testing.assert_close(update[kept], torch.full_like(update[kept], 2.0))
    assert abs(kept.float().mean().item() - 0.5) < 5 * 0.5 / kept.numel() ** 0.5


@each_form
@pytest.mark.parametrize("grad", [True, False])
def test_there_is_no_dropout_in_eval(factored, grad):
    layer = randomised(lora.Conv2d(2, 4, 3, 2, 3, 0.9, factored=factored)).eval()
    with torch.set_grad_enabled(grad):
        assert_equation(layer, torch.randn(2, 2, 5, 5))


@pytest.mark.parametrize(
    ("n", "factored", "A", "B"),
    [
        (1, False, (2, 4 * 3), (6 // 2, 2)),
        (2, False, (2 * 3, 4 * 3), (6 // 2 * 3, 2 * 3)),
        (3, False, (2 * 3, 4 * 9), (6 // 2 * 3, 2 * 3)),
        (1, True, (2, 4 // 2, 3), (6, 2 // 2, 1)),
        (2, True, (2, 4 // 2, 3, 3), (6, 2 // 2, 1, 1)),
        (3, True, (2, 4 // 2, 3, 3, 3), (6, 2 // 2, 1, 1, 1)),
    ],
)
def test_adapters_have_the_shapes_of_the_docstring(n, factored, A, B):
    layer = CONVOLUTIONS[n](4, 6, 3, r=2, groups=2, factored=factored)
    assert (tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)) == (A, B)


@each_dimension
def test_the_factored_form_is_what_peft_exchanges(n):
    base = TORCHS[n](4, 6, 3, padding=1)
    layer = CONVOLUTIONS[n](4, 6, 3, r=2, lora_alpha=3, padding=1, factored=True)
    layer.load_state_dict(base.state_dict(), strict=False)
    A, B = randomised(layer).lora_A, layer.lora_B
    down, up = TORCHS[n](4, 2, 3, padding=1, bias=False), TORCHS[n](2, 6, 1, bias=False)
    down.weight, up.weight = nn.Parameter(A.detach()), nn.Parameter(B.detach())  # as peft's lora_A, lora_B
    x = torch.randn(2, 4, *[5] * n)
    torch.testing.assert_close(layer(x), base(x) + 3 / 2 * up(down(x)))


@each_dimension
@each_form
def test_a_fresh_layer_computes_what_its_base_does(n, factored):
    layer = CONVOLUTIONS[n](4, 6, 3, r=2, factored=factored)
    x = torch.randn(2, 4, *[5] * n)
    assert torch.equal(layer(x), layer.lora_base_forward(x))
    assert layer.lora_A.any()
    assert not layer.lora_B.any()


@each_dimension
@pytest.mark.parametrize("mode", [True, False])
def test_with_r_of_zero_it_is_a_plain_trainable_convolution(n, mode):
    options = {"stride": 2, "padding": 1, "padding_mode": "reflect", "groups": 2}
    layer, plain = CONVOLUTIONS[n](4, 6, 3, **options).train(mode), TORCHS[n](4, 6, 3, **options)
    plain.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, 4, *[5] * n)
    assert torch.equal(layer(x), plain(x))
    assert all(parameter.requires_grad for parameter in layer.parameters())
    assert list(layer.lora_parameters()) == []
    assert repr(layer) == repr(plain)


@each_dimension
@pytest.mark.parametrize("r", [0, 2])
def test_its_keys_are_torchs(n, r):
    adapter = ["lora_A", "lora_B"] if r else []
    assert list(CONVOLUTIONS[n](4, 6, 3, r=r).state_dict()) == ["weight", "bias", *adapter]


@each_form
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_is_kept_and_right(factored, training):
    layer = randomised(lora.Conv2d(4, 6, 3, r=2, lora_alpha=3, factored=factored)).train(training)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_equation(layer, x)
        assert layer(x).is_contiguous(memory_format=torch.channels_last)


@each_form
def test_a_float32_adapters_update_below_the_precision_of_a_bfloat16_base_counts_in_training(factored):
    """Weights of 1 and -1 have steps of 1/128 in bfloat16; their sum is 0, and an update of 1/1024 shows."""
    layer = lora.Conv1d(1, 1, 2, r=1, factored=factored, bias=False, dtype=torch.bfloat16)
    with_float32_adapter(layer)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -1.0]))
        layer.lora_A.copy_(torch.tensor([1 / 1024, 0]).view_as(layer.lora_A))
        layer.lora_B.fill_(1)
    y = layer(torch.ones(1, 1, 2, dtype=torch.bfloat16))
    assert y.item() == 1 / 1024


@pytest.mark.parametrize(
    ("cls", "kernel_size"), [(lora.Conv2d, (3, 5)), (lora.Conv3d, (1, 3, 3)), (lora.Conv2d, (1, 3))]
)
def test_a_kernel_that_is_not_square_raises_and_names_the_way_out(cls, kernel_size):
    with pytest.raises(ValueError, match=r"`kernel_size` \(=\(.*pass `factored=True`") as error:
        cls(4, 6, kernel_size, r=2)
    assert str(kernel_size) in str(error.value)
    assert cls(4, 6, kernel_size, r=2, factored=True).lora_A.shape[2:] == kernel_size
    assert cls(4, 6, kernel_size).kernel_size == kernel_size, "nothing to refuse without a rank"


def test_a_rank_that_groups_do_not_divide_raises_and_repeats_both():
    with pytest.raises(ValueError, match=r"`r` \(=3\) must be divisible by `groups` \(=2\) when `factored=True`\."):
        lora.Conv2d(4, 6, 3, r=3, groups=2, factored=True)
    assert lora.Conv2d(4, 6, 3, r=3, groups=2).r == 3


def test_torchs_own_errors_are_torchs():
    with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
        lora.Conv2d(3, 6, 3, r=2, groups=2)


# ---- loralib's form, by filters of its own -----------------------------------------------------------------------

WIDE = {1: 11, 2: 47, 3: 47}  # more than five times as many channels as filters: 2, 9 and 9


def wide(n, out_channels=None, **settings):
    """A layer whose channels are no multiple of what its B A has in them; and an input."""
    cls, r = CONVOLUTIONS[n], 2 if n == 1 else 1
    layer = cls(5, out_channels or WIDE[n], 3, r=r, lora_alpha=3, padding=1, stride=2, **settings)
    return randomised(layer), torch.randn(2, 5, *[7] * n, dtype=layer.weight.dtype)


@each_dimension
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_of_wide_layers_it_is_computed_by_filters_and_the_gradients_are_the_same(n, dropout):
    layer, x = wide(n, dtype=torch.float64, lora_dropout=dropout)
    layer.eval() if dropout else layer.train()  # in eval with gradients it is computed in the same way
    x.requires_grad_()
    wanted = x, layer.lora_A, layer.lora_B
    plain = layer.lora_forward_with(
        x, layer.weight + layer.scaling * (layer.lora_B @ layer.lora_A).view_as(layer.weight)
    )
    dy = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, wanted, dy)
    torch.testing.assert_close(layer(x), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(layer(x), wanted, dy), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "out_channels", "by_filters"),
    [
        *((torch.float32, 45, False), (torch.float32, 46, True)),
        *((torch.bfloat16, 9, False), (torch.bfloat16, 10, True)),
    ],
)
def test_by_filters_where_there_are_few_of_them_for_the_channels(monkeypatch, dtype, out_channels, by_filters):
    layer, x = wide(2, out_channels, dtype=dtype)
    used = []
    monkeypatch.setattr(conv, "lora_conv", lambda *args: used.append(args) or torch.zeros(()))
    layer(x)
    assert bool(used) == by_filters


def test_by_filters_a_step_takes_less_arithmetic_than_a_gradient_of_the_weight():
    layer, x = wide(2, 128)
    with Operations() as forward:
        layer(x)
    assert forward.names.count("convolution") == 2
    y, kernel, filters = layer(x).numel(), layer.weight[0].numel(), 9
    assert forward.flops == 2 * (y * kernel + y // 128 * filters * kernel + y * filters)
    assert max(forward.made) < 4 * max(layer(x).numel(), layer.weight.numel()), "no second weight"


def test_by_filters_with_dropout_the_values_of_one_mask_are_dropped():
    layer, x = wide(2, dtype=torch.float64, lora_dropout=0.5)
    A, B = layer.lora_single(layer.lora_A.detach(), layer.lora_B.detach())
    outputs = {tuple((layer.train()(x) - layer.eval()(x)).flatten().tolist()) for _ in range(3)}
    assert len(outputs) == 3
    assert A.shape == (9, 5, 3, 3)
    assert B.shape == (47, 9, 1, 1)


@pytest.mark.parametrize("factored", [False, True])
def test_by_filters_it_compiles_as_one_graph_and_once_for_other_adapters(factored):
    layer, x = wide(2, factored=factored)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(nn.Sequential(layer), backend=counter, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), layer(x))
        randomised(layer)
    assert counter.frame_count == 1
