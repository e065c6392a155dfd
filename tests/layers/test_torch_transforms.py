"""Compilation, function transforms and unusual uses of autograd, for every kind of layer."""

import copy

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from conftest import KINDS, WITH_DROPOUT, assert_equation, example, make
from pairwise import every_two
from torch import nn
from torch.func import functional_call

each_kind = pytest.mark.parametrize("kind", KINDS)
LINEAR = ["Linear", "Linear transposed", "MergedLinear"]
# torch's own forward-mode rules are made with torch.jit.script, which torch deprecates (by another warning in each
# release: in 2.13 a DeprecationWarning, in 2.14 a FutureWarning; so the words alone are named).
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script")


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*((kind, "train") for kind in KINDS), ("Linear", "eval"), ("MergedLinear", "served"), ("Conv2d", "served")],
)
def test_it_compiles_without_a_graph_break(kind, mode):
    torch._dynamo.reset()
    layer, x = make(kind).train(mode == "train"), example(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(mode != "served"):
        torch.testing.assert_close(compiled(x), layer(x))
        with torch.no_grad():
            layer.lora_A.mul_(2)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", [*LINEAR, "Conv2d factored"])
def test_its_compiled_gradients_are_the_same(kind):
    torch._dynamo.reset()
    layer, x = make(kind), example(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(x).square().sum(), [layer.lora_A, layer.lora_B]) for f in (compiled, layer))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_dropout_compiles_without_a_graph_break(kind):
    torch._dynamo.reset()
    layer, x = make(kind, lora_dropout=0.5), example(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x), compiled(x))
    compiled(x).sum().backward()
    assert layer.lora_A.grad is not None


def stacked_adapters(kind, count=3):
    layers = [make(kind) for _ in range(count)]
    for layer in layers[1:]:
        layer.load_state_dict({**layers[0].state_dict(), "lora_A": layer.lora_A, "lora_B": layer.lora_B})
    adapters = [{name: p.detach() for name, p in layer.lora_parameters()} for layer in layers]
    return layers, {name: torch.stack([adapter[name] for adapter in adapters]) for name in ("lora_A", "lora_B")}


@each_kind
@pytest.mark.parametrize("mode", ["train", "eval", "served"])
def test_vmap_runs_many_adapters_over_one_base(kind, mode):
    layers, adapters = stacked_adapters(kind)
    layer, x = layers[0].train(mode == "train"), example(kind)
    with torch.set_grad_enabled(mode != "served"):
        got = torch.func.vmap(lambda adapter: functional_call(layer, adapter, x))(adapters)
    torch.testing.assert_close(got, torch.stack([one(x) for one in layers]))


@each_kind
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_func_grad_is_autograds(kind, mode):
    layer, x = make(kind, dtype=torch.float64).train(mode == "train"), example(kind, torch.float64)
    adapter = {name: parameter.detach() for name, parameter in layer.lora_parameters()}
    got = torch.func.grad(lambda adapter: functional_call(layer, adapter, x).square().sum())(adapter)
    expected = torch.autograd.grad(layer(x).square().sum(), [layer.lora_A, layer.lora_B])
    torch.testing.assert_close(got, dict(zip(("lora_A", "lora_B"), expected, strict=True)))


@each_kind
@pytest.mark.parametrize("mode", ["train", "served"])
def test_functional_call_uses_the_given_tensors_and_leaves_no_trace(kind, mode):
    layer, other, x = make(kind).train(mode == "train"), make(kind), example(kind)
    with torch.set_grad_enabled(mode != "served"):
        before = layer(x)
        torch.testing.assert_close(functional_call(layer, dict(other.named_parameters()), x), other(x))
        assert torch.equal(layer(x), before)


@forward_mode
@every_two(kind=KINDS, mode=["train", "eval"], how=["dual numbers", "func.jvp"])
def test_forward_mode_differentiation_is_right(kind, mode, how):
    layer, x = make(kind, dtype=torch.float64).train(mode == "train"), example(kind, torch.float64)
    A, tangent = layer.lora_A.detach(), torch.randn_like(layer.lora_A)
    moved = copy.deepcopy(layer)
    with torch.no_grad():
        moved.lora_A.add_(tangent)
        expected = moved(x) - layer(x)  # the layer is linear in A
        function = lambda A: functional_call(layer, {"lora_A": A}, x)  # noqa: E731
        if how == "func.jvp":
            got = torch.func.jvp(function, (A,), (tangent,))[1]
        else:
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(A, tangent)
                got = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
    torch.testing.assert_close(got, expected)


# ---- uses of autograd -------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("training", [True, False])
def test_its_output_may_be_changed_in_place(kind, training):
    layer, x = make(kind).train(training), example(kind)
    expected = torch.autograd.grad((layer(x) + 1).relu().sum(), [layer.lora_A, layer.lora_B])
    y = layer(x)
    y += 1
    y = nn.functional.relu(y, inplace=True)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), [layer.lora_A, layer.lora_B]), expected)


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("leading", [(), (4,), (2, 1, 3)])
def test_a_linear_output_of_any_dimension_may_be_changed_in_place(kind, leading):
    layer, x = make(kind), torch.randn(*leading, 6)
    expected = torch.autograd.grad((2 * layer(x)).square().sum(), layer.lora_A)
    torch.testing.assert_close(torch.autograd.grad(layer(x).mul_(2).square().sum(), layer.lora_A), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_runs_again_over_a_graph_that_is_kept(kind):
    layer, x = make(kind), example(kind)
    loss = layer(x).square().sum()
    first = torch.autograd.grad(loss, [layer.lora_A, layer.lora_B], retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(loss, [layer.lora_A, layer.lora_B]), first))


@pytest.mark.parametrize("kind", WITH_DROPOUT)
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_many_gradients_at_once_are_those_one_by_one(kind, how):
    layer, x = make(kind), example(kind, requires_grad=True)
    y, inputs = layer(x), (x, layer.lora_A, layer.lora_B)
    wanted = torch.randn(3, *y.shape)
    if how == "is_grads_batched":
        got = torch.autograd.grad(y, inputs, wanted, is_grads_batched=True, retain_graph=True)
    else:
        got = torch.func.vmap(lambda one: torch.autograd.grad(y, inputs, one, retain_graph=True))(wanted)
    one_by_one = [torch.autograd.grad(y, inputs, one, retain_graph=True) for one in wanted]
    expected = tuple(map(torch.stack, zip(*one_by_one, strict=True)))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_a_penalty_on_the_inputs_gradient_trains_the_adapter(kind):
    layer, x = make(kind, dtype=torch.float64), example(kind, torch.float64, requires_grad=True)
    penalties = []
    for output in (layer(x), layer.lora_base_forward(x) + layer.scaling * layer.lora_update(x)):
        gradient = torch.autograd.grad(output.square().sum(), x, create_graph=True)[0]
        penalties.append(torch.autograd.grad(gradient.square().sum(), [layer.lora_A, layer.lora_B]))
    torch.testing.assert_close(penalties[0], penalties[1])


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_saved_tensors_may_be_kept_elsewhere(kind):
    layer, x = make(kind), example(kind, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.lora_A, layer.lora_B])
    with torch.autograd.graph.save_on_cpu():
        loss = layer(x).square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, [x, layer.lora_A, layer.lora_B]), expected)


# ---- subclasses of tensors --------------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A subclass as sharded and quantised tensors are: operations on it must go through it."""


@pytest.mark.parametrize("kind", WITH_DROPOUT)
@pytest.mark.parametrize("mode", ["train", "eval", "served"])
def test_an_input_of_a_subclass_of_tensor_gives_an_output_of_it(kind, mode):
    layer, x = make(kind).train(mode == "train"), example(kind)
    with torch.set_grad_enabled(mode != "served"):
        y = layer(x.as_subclass(Tagged))
        assert type(y) is Tagged
        torch.testing.assert_close(y.as_subclass(torch.Tensor), layer(x))


@each_kind
@pytest.mark.parametrize("mode", ["train", "eval", "served"])
def test_a_weight_of_a_subclass_of_tensor_is_never_merged(kind, mode):
    layer, x = make(kind).train(mode == "train"), example(kind)
    expected = layer(x).detach()
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Tagged), requires_grad=False)
    with torch.set_grad_enabled(mode != "served"):
        y = layer(x)
    assert type(y) is Tagged
    assert layer._merged is None
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)


@pytest.fixture
def mesh(tmp_path):
    """A mesh of one process, which is enough for torch to shard."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_under_fsdp_it_computes_the_same_and_keeps_no_merged_weight(mesh):
    layer, x = make("Linear"), example("Linear")
    expected = layer(x).detach()
    model = nn.Sequential(nn.Sequential(layer))
    for module in (model[0], model):
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    loss = model(x).square().sum()
    loss.backward()
    assert layer.lora_A.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)
    assert type(layer.weight) is torch.distributed.tensor.DTensor
    assert layer._merged is None


def test_nested_jagged_inputs_run_through_the_plain_path():
    layer = make("Linear")
    pieces = [torch.randn(2, 6), torch.randn(3, 6)]
    jagged = torch.nested.nested_tensor(pieces, layout=torch.jagged)
    torch.testing.assert_close(layer(jagged).values(), layer(torch.cat(pieces)))


@pytest.mark.parametrize("kind", KINDS)
def test_it_exports(kind):
    layer, x = make(kind).eval(), example(kind)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
        layer.lora_A.mul_(2)
        exported.lora_A.mul_(2)
        torch.testing.assert_close(exported(x), layer(x))
        assert_equation(layer, x)


@forward_mode
def test_transforms_of_the_input_compute_with_the_merged_weight():
    layer, x = make("Linear").double().eval(), torch.randn(4, 6, dtype=torch.float64)
    W, b = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A, layer.bias
    with torch.no_grad():
        for _ in range(2):  # before the merged weight is there, and after
            torch.testing.assert_close(torch.func.vmap(layer)(x), x @ W.T + b)
            y, dy = torch.func.jvp(layer, (x,), (x + 1,))
            torch.testing.assert_close((y, dy), (x @ W.T + b, (x + 1) @ W.T))
            torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), W)
            layer(x)
