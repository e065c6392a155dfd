"""DoRA in use: dropout, what it costs, compilation, transforms, sharding."""

import pytest
import torch
import torch._dynamo.testing
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.utils.checkpoint
from conftest import KINDS, WITH_DROPOUT, make
from counting import kept_for_backward, operations
from magnitudes import base_weight, delta, dora, formula, gain, input_of, leaves, norms
from test_torch_transforms import mesh  # noqa: F401 (a fixture)
from torch import nn
from torch.func import functional_call

import lora

each_kind = pytest.mark.parametrize("kind", KINDS)
# torch's own forward-mode rules are made with torch.jit.script, which torch deprecates (by another warning in each
# release: in 2.13 a DeprecationWarning, in 2.14 a FutureWarning; so the words alone are named).
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script")


def assert_same(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ---- dropout -----------------------------------------------------------------------------------------------------


def total(layer, tensors):
    """W₀ + s · B A."""
    return base_weight(layer, tensors["weight"]) + layer.scaling * delta(layer, tensors["lora_A"], tensors["lora_B"])


def over_outputs(layer, values, x):
    shape = [1] * x.dim()
    shape[layer.lora_output_dims()[1]] = -1
    return values.view(shape)


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_dropout_is_for_the_low_rank_path_alone(kind):
    """With the mask that a layer without DoRA draws, y = g ⊙ (W₀ x + s · B A drop(x)) + b, and so are the gradients."""
    layer, x = dora(kind, lora_dropout=0.4, dtype=torch.float64), input_of(kind, torch.float64, requires_grad=True)
    plain = make(kind, lora_dropout=0.4, dtype=torch.float64)
    tensors = {name: tensor.detach() for name, tensor in leaves(layer).items()}
    plain.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "lora_magnitude"})
    g = over_outputs(layer, gain(layer, tensors["lora_magnitude"], total(layer, tensors)), x)
    b = over_outputs(layer, tensors["bias"], x)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    without = plain(x)
    assert_same(got, g * (without - b) + b)
    dy = torch.randn_like(got)
    ours = torch.autograd.grad(got, [layer.lora_A, layer.lora_B, x, layer.lora_magnitude], dy)
    theirs = torch.autograd.grad(without, [plain.lora_A, plain.lora_B, x], g * dy)
    assert_same(ours[:3], theirs)
    dm = (dy * (without - b)).movedim(layer.lora_output_dims()[1], 0).flatten(1).sum(1)
    if isinstance(layer, lora.MergedLinear):
        dm = torch.cat([part for part, on in zip(dm.split(layer.splits), layer.enable_lora, strict=True) if on])
    assert_same(ours[3], dm / norms(layer, total(layer, tensors)))
    with torch.no_grad():
        assert not torch.allclose(layer(x), got)  # another mask
        assert_same(layer.eval()(x), formula(layer, x, leaves(layer)))


def test_the_mean_over_masks_is_the_output_without_dropout():
    layer, x = dora("Linear", lora_dropout=0.5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    with torch.no_grad():
        samples = layer(x.expand(4000, 6))
        expected = layer.eval()(x)
    assert ((samples.mean(0) - expected).abs() <= 5 * samples.std(0) / 4000**0.5).all()


# ---- what it costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_it_keeps_for_backward_what_lora_does_and_its_output(fused, dropout, bias):
    splits = {"splits": (256, 128, 128), "enable_lora": (1, 0, 1)} if fused else {}
    cls, tokens, h = (lora.MergedLinear if fused else lora.Linear), 64, 16 if fused else 8
    layer = cls(256, 512, r=8, use_dora=True, lora_dropout=dropout, bias=bias, **splits)
    x = torch.randn(tokens, 256, requires_grad=True)
    excess = 512
    kept = kept_for_backward(lambda: layer(x), *layer.parameters())
    assert 0 <= kept - 4 * tokens * (256 + h + 512) <= 4 * (excess + 2 * 512) + 64  # vectors, a seed


@pytest.mark.parametrize("cls", [lora.Conv1d, lora.Conv2d])
def test_a_factored_convolution_keeps_no_weight(cls):
    layer = cls(64, 64, 3, r=4, use_dora=True, factored=True, padding=1, bias=False)
    x = torch.randn(1, 64, *[6] * len(layer.kernel_size), requires_grad=True)
    size = x[0, 0].numel()
    kept = kept_for_backward(lambda: layer(x), *layer.parameters())
    assert kept <= 4 * (size * (64 + 4 + 64) + 4 * 64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_makes_anything_of_the_weights_size(dtype, transposed):
    layer = lora.Linear(256, 512, r=4, use_dora=True, dtype=dtype, fan_in_fan_out=transposed)
    with torch.no_grad():
        layer.weight.mul_(2)  # the norm of the weight is to be taken anew
    counted = operations(layer, 8, dtype=dtype, backward=True)
    assert counted.largest <= max(512 * 8, 4 * 512)


@pytest.mark.parametrize("transposed", [False, True])
def test_nor_does_torch_inside_of_an_operation(transposed):
    """A norm in float32 of a weight in bfloat16 is of a copy, which no dispatch mode sees."""
    layer = lora.Linear(2048, 2048, r=2, use_dora=True, dtype=torch.bfloat16, fan_in_fan_out=transposed, device="meta")
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.01)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        layer(torch.ones(1, 2048, dtype=torch.bfloat16))
    assert 0 < max(event.cpu_memory_usage for event in profile.events()) < layer.weight.nbytes


def test_the_norm_takes_three_small_products():
    plain = lora.Linear(256, 512, r=4)
    layer = lora.Linear(256, 512, r=4, use_dora=True)
    layer(torch.randn(1, 256))
    ours, theirs = operations(layer, 8, backward=True), operations(plain, 8, backward=True)
    assert ours.flops - theirs.flops == 2 * (512 * 256 * 4 + 4 * 256 * 4 + 512 * 4 * 4)
    assert len(ours.names) - len(theirs.names) <= 45


# ---- compilation, transforms, autocast, checkpoints --------------------------------------------------------------


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("kind", "mode"),
    [*((kind, "train") for kind in KINDS), ("Linear", "eval"), ("MergedLinear", "served"), ("Conv2d", "served")],
)
def test_it_compiles_without_a_graph_break_once(kind, mode):
    torch._dynamo.reset()
    layer, x = dora(kind, dtype=torch.float64).train(mode == "train"), input_of(kind, torch.float64)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager" if mode == "train" else "eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(mode != "served"):
        for _ in range(3):
            assert_same(compiled(x), layer(x))
            with torch.no_grad():
                layer.lora_A.mul_(2), layer.lora_magnitude.mul_(0.5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["MergedLinear", "Conv2d factored"])
def test_compiled_gradients_are_the_formulas(kind):
    torch._dynamo.reset()
    layer, x = dora(kind, dtype=torch.float64), input_of(kind, torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted, tensors = [p for _, p in layer.lora_parameters()], leaves(layer)
    got = torch.autograd.grad(compiled(x).square().sum(), wanted)
    names = [name for name, _ in layer.lora_parameters()]
    expected = torch.autograd.grad(formula(layer, x, tensors).square().sum(), [tensors[name] for name in names])
    assert_same(got, expected)


@each_kind
@forward_mode
def test_forward_and_reverse_mode_agree(kind):
    """The norm is a constant in both."""
    layer, x = dora(kind, dtype=torch.float64), input_of(kind, torch.float64)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def function(A, B, m):
        return functional_call(layer, {**parameters, "lora_A": A, "lora_B": B, "lora_magnitude": m}, (x,))

    point = [parameters[name] for name in ("lora_A", "lora_B", "lora_magnitude")]
    tangents = [torch.randn_like(tensor) for tensor in point]
    y, got = torch.func.jvp(function, tuple(point), tuple(tangents))
    leaf = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    assert_same(y, formula(layer, x, leaf))
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(
        formula(layer, x, leaf), [leaf[n] for n in ("lora_A", "lora_B", "lora_magnitude")], dy
    )
    assert_same((got * dy).sum(), sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True)))


@each_kind
def test_many_adapters_at_once(kind):
    layers, x = [dora(kind, dtype=torch.float64) for _ in range(3)], input_of(kind, torch.float64)
    for layer in layers[1:]:
        layer.load_state_dict({**layers[0].state_dict(), **dict(layer.lora_parameters())})
    stacked = {
        name: torch.stack([layer.get_parameter(name) for layer in layers]) for name, _ in layer.lora_parameters()
    }
    got = torch.func.vmap(lambda adapter: functional_call(layers[0], adapter, (x,)))(stacked)
    for y, layer in zip(got, layers, strict=True):
        assert_same(y, formula(layer, x, leaves(layer)))


@each_kind
def test_second_derivatives_are_the_formulas(kind):
    layer, x = dora(kind, dtype=torch.float64), input_of(kind, torch.float64)
    tensors, names = leaves(layer), [name for name, _ in layer.lora_parameters()]

    def second(y, wanted):
        first = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    got = second(layer(x), [layer.get_parameter(name) for name in names])
    expected = second(formula(layer, x, tensors), [tensors[name] for name in names])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@each_kind
@pytest.mark.parametrize("bias", [True, False])
def test_autocast(kind, bias):
    layer = dora(kind, **({} if kind == "Embedding" else {"bias": bias}))
    x = input_of(kind)
    expected = formula(layer, x, leaves(layer))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(layer.lora_norms(), dora_norms_without_autocast(layer))
    assert y.dtype == (torch.float32 if kind == "Embedding" else torch.bfloat16)
    assert (y.double() - expected).abs().max() <= 2**-5 * expected.abs().max()
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for _, p in layer.lora_parameters())


def dora_norms_without_autocast(layer):
    with torch.autocast("cpu", enabled=False):
        return layer.lora_norms()


@each_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_change_nothing(kind, reentrant):
    layer = dora(kind, **({} if kind == "Embedding" else {"lora_dropout": 0.3}))
    x = input_of(kind) if kind == "Embedding" else input_of(kind, requires_grad=True)

    def gradients(run):
        layer.zero_grad()
        torch.manual_seed(5)
        run().square().sum().backward()
        return [p.grad.clone() for _, p in layer.lora_parameters()]

    expected = gradients(lambda: layer(x))
    if kind == "Embedding" and reentrant:
        return
    got = gradients(lambda: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant))
    assert all(map(torch.equal, got, expected))


@each_kind
def test_it_exports(kind):
    layer, x = dora(kind, dtype=torch.float64).eval(), input_of(kind, torch.float64)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
        for one in (layer, exported):
            one.lora_A.mul_(2), one.lora_magnitude.mul_(3)
        assert_same(exported(x), formula(layer, x, leaves(layer)))


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear", "Embedding", "Conv2d factored"])
def test_under_fsdp_it_computes_the_same_and_keeps_no_whole_weight(mesh, kind):  # noqa: F811 (the fixture)
    layer, x = dora(kind), input_of(kind)
    expected = layer(x).detach()
    model = nn.Sequential(nn.Sequential(layer))
    for module in (model[0], model):
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    for _ in range(2):
        y = model(x)
        y.square().sum().backward()
        torch.testing.assert_close(y, expected)
    assert layer.lora_magnitude.grad is not None
    assert type(layer.weight) is torch.distributed.tensor.DTensor
    assert layer._squares is None


def test_sharded_by_outputs(mesh):  # noqa: F811 (the fixture)
    layer, x = dora("Linear"), input_of("Linear")
    expected, tensor = layer(x).detach(), torch.distributed.tensor
    for name, parameter in list(layer.named_parameters()):
        placement = tensor.Replicate() if name == "lora_A" else tensor.Shard(0)
        sharded = tensor.distribute_tensor(parameter.data, mesh, [placement])
        setattr(layer, name, nn.Parameter(sharded, parameter.requires_grad))
    y = layer(tensor.distribute_tensor(x, mesh, [tensor.Replicate()]))
    torch.testing.assert_close(y.full_tensor(), expected)
    y.sum().backward()
    assert layer.lora_magnitude.grad is not None
