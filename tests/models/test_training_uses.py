"""How people train: what torch offers around a model, it offers around one with LoRA layers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, LAYERS, WITH_DROPOUT, assert_equation, example, make, plain_twin, randomised
from magnitudes import dora, input_of
from pairwise import every_two
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import lora

each_kind = pytest.mark.parametrize("kind", KINDS)
ADAPTER = ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]


def small(dtype=torch.float64, **options):
    """Two linear layers with LoRA: names in `ADAPTER` train."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    lora.inject(model, target_modules=["0", "2"], r=2, lora_alpha=3, **options)
    for layer in (model[0], model[2]):
        randomised(layer, 0.5)
    return model


def values(model, dtype=torch.float64):
    """The model's parameters, as leaves of their own; those in `ADAPTER` train."""
    return {n: p.detach().to(dtype, copy=True).requires_grad_(n in ADAPTER) for n, p in model.named_parameters()}


def plain(p, x):
    """The same model, as the equation reads: W = W₀ + 3 / 2 · B A."""
    one, two = (p[f"{n}.weight"] + 1.5 * p[f"{n}.lora_B"] @ p[f"{n}.lora_A"] for n in (0, 2))
    return F.linear(torch.tanh(F.linear(x, one, p["0.bias"])), two, p["2.bias"])


def batch(n=12, dtype=torch.float64):
    return torch.randn(n, 6, dtype=dtype), torch.randn(n, 3, dtype=dtype)


def adapter(model):
    return [model.get_parameter(name) for name in ADAPTER]


# ---- optimizers, accumulation, scaling ---------------------------------------------------------------------------

OPTIMIZERS = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}])
def test_every_form_of_an_optimizer_trains_it_as_the_plain_way(optimizer, how):
    model = small()
    twin = values(model)
    theirs = [twin[name] for name in ADAPTER]
    steps = OPTIMIZERS[optimizer](adapter(model), lr=0.1, **how), OPTIMIZERS[optimizer](theirs, lr=0.1)
    for _ in range(5):
        x, target = batch()
        for step, function in zip(steps, (model, lambda x: plain(twin, x)), strict=True):
            step.zero_grad()
            F.mse_loss(function(x), target).backward()
            step.step()
    torch.testing.assert_close(adapter(model), theirs, rtol=1e-9, atol=1e-9)


def test_accumulated_gradients_are_those_of_the_big_batch_and_their_norm_is_clipped():
    model, (x, target) = small(), batch()
    for x_part, target_part in zip(x.chunk(4), target.chunk(4), strict=True):
        (F.mse_loss(model(x_part), target_part) / 4).backward()
    twin = values(model)
    expected = torch.autograd.grad(F.mse_loss(plain(twin, x), target), [twin[name] for name in ADAPTER])
    torch.testing.assert_close([p.grad for p in adapter(model)], list(expected))
    norm = math.sqrt(sum(g.square().sum().item() for g in expected))
    assert nn.utils.clip_grad_norm_(model.parameters(), norm / 4).item() == pytest.approx(norm)
    torch.testing.assert_close([p.grad for p in adapter(model)], [g / 4 for g in expected], rtol=1e-4, atol=0)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in ADAPTER)


def test_with_a_gradient_scaler_in_float16_steps_that_overflow_are_skipped_and_others_are_right():
    model = small(torch.float32)
    twin, start = values(model), [p.detach().clone() for p in adapter(model)]
    theirs = [twin[name] for name in ADAPTER]
    ours, plain_step = torch.optim.SGD(adapter(model), lr=0.1), torch.optim.SGD(theirs, lr=0.1)
    scaler, skipped, (x, target) = torch.amp.GradScaler("cpu", init_scale=2.0**20), 0, batch(dtype=torch.float32)
    for _ in range(12):
        ours.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.mse_loss(model(x), target.half())
        scaler.scale(loss).backward()
        scaler.unscale_(ours)
        norm = nn.utils.clip_grad_norm_(adapter(model), 0.5)
        scaler.step(ours)
        scaler.update()
        if not norm.isfinite():
            skipped += 1
            assert all(map(torch.equal, adapter(model), start))
            continue
        plain_step.zero_grad()
        F.mse_loss(plain(twin, x.double()), target.double()).backward()
        nn.utils.clip_grad_norm_(theirs, 0.5)
        plain_step.step()
    assert 0 < skipped < 8
    for one, other, first in zip(adapter(model), theirs, start, strict=True):
        assert (one - other).norm() <= 2**-7 * (other - first).norm()


# ---- modes of torch ----------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # with NaN
    yield
    torch.use_deterministic_algorithms(False)


@each_kind
@pytest.mark.parametrize("use_dora", [False, True])
def test_deterministic_algorithms_suffice(kind, use_dora, deterministic):
    options = {"lora_dropout": 0.5} if kind in WITH_DROPOUT else {}
    layer, x, results = make(kind, use_dora=use_dora, **options), example(kind), []
    for _ in range(2):
        torch.manual_seed(3)
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [p for _, p in layer.lora_parameters()])])
    assert all(map(torch.equal, *results))
    assert all(tensor.isfinite().all() for tensor in results[0])
    with torch.no_grad():
        served = layer.eval()(x)
        model = nn.Sequential(layer)
        lora.merge(model)
        torch.testing.assert_close(model(x), served)
    if not use_dora:
        assert_equation(make(kind), x)


@pytest.mark.parametrize("how", [{}, {"scale_grad_by_freq": True}, {"sparse": True}, {"padding_idx": 1}])
def test_an_embeddings_gradients_are_right_with_deterministic_algorithms(how, deterministic):
    layer, ids = make("Embedding", **how), torch.tensor([[1, 1, 2], [1, 6, 2]])
    twin = nn.Embedding(7, 2, **how)
    twin.weight = nn.Parameter(layer.lora_A.detach().T.clone())
    layer(ids).sum().backward()
    (layer.scaling * F.linear(twin(ids), layer.lora_B.detach())).sum().backward()
    got, expected = (g.to_dense() if g.is_sparse else g for g in (layer.lora_A.grad, twin.weight.grad))
    torch.testing.assert_close(got, expected.T)


@each_kind
@pytest.mark.parametrize("how", ["context", "default"])
def test_a_default_device_is_for_new_layers_and_not_for_those_that_are_adapted(kind, how):
    base, x = plain_twin(make(kind, r=0)), example(kind, torch.float64)
    expected = base(x)
    if how == "default":
        torch.set_default_device("meta")
    try:
        with torch.device("meta"):
            made = LAYERS[kind][0](**LAYERS[kind][1], r=2)
            lora.inject(base, target_modules=[""], r=2)
            y = base(x)
    finally:
        torch.set_default_device(None)
    assert {p.device.type for p in made.parameters()} == {"meta"}
    assert {p.device.type for p in base.parameters()} == {"cpu"}
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert base.lora_B.grad is not None


@each_kind
def test_skipping_initialisation_leaves_a_layer_that_can_be_reset_or_loaded(kind):
    cls, arguments, _ = LAYERS[kind]
    layer, other, x = nn.utils.skip_init(cls, **arguments, r=2), cls(**arguments, r=2), example(kind)
    layer.reset_parameters()
    torch.testing.assert_close(layer(x), layer.lora_base_forward(x))  # one factor is zero
    layer.load_state_dict(randomised(other).state_dict())
    torch.testing.assert_close(layer(x), other(x))


@each_kind
def test_anomaly_detection_finds_nothing_wrong_and_finds_what_is(kind):
    layer, x = make(kind), example(kind)
    with torch.autograd.set_detect_anomaly(True):
        layer(x).square().sum().backward()
        wrong = (layer(x) * float("nan")).sum()
        with pytest.warns(UserWarning, match="Error detected"), pytest.raises(RuntimeError, match="nan values"):
            wrong.backward()
    assert layer.lora_A.grad.isfinite().all()


# ---- copies and wrappers -----------------------------------------------------------------------------------------


def test_the_moving_average_of_a_model_is_that_of_its_adapter():
    model, (x, _) = small(), batch()
    averaged, expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), values(model)
    averaged.update_parameters(model)  # the first is a copy
    for _ in range(3):
        for layer in (model[0], model[2]):
            randomised(layer)
        averaged.update_parameters(model)
        for name in ADAPTER:
            expected[name] = 0.9 * expected[name].detach() + 0.1 * model.get_parameter(name).detach()
    torch.testing.assert_close(averaged(x), plain(expected, x))


def test_parameters_to_a_vector_and_back_is_the_adapter():
    model, other, (x, _) = small(), small(), batch()
    vector = nn.utils.parameters_to_vector(adapter(model))
    assert vector.numel() == sum(p.numel() for p in adapter(model))
    other.load_state_dict({n: p for n, p in model.state_dict().items() if n not in ADAPTER}, strict=False)
    with torch.no_grad():
        nn.utils.vector_to_parameters(vector, adapter(other))
    torch.testing.assert_close(other(x), plain(values(model), x))


def test_a_copy_is_a_reference_that_training_does_not_move():
    model, (x, target) = small(), batch()
    reference = copy.deepcopy(model).requires_grad_(False)
    before = plain(values(model), x)
    step = torch.optim.SGD(adapter(model), lr=0.1)
    F.mse_loss(model(x), target).backward()
    step.step()
    torch.testing.assert_close(reference(x), before.detach())
    assert not torch.allclose(model(x), before)


def test_data_parallel_passes_through_without_a_gpu():
    model, (x, _) = small(), batch()
    wrapped = nn.DataParallel(model)
    wrapped(x).square().sum().backward()
    twin = values(model)
    expected = torch.autograd.grad(plain(twin, x).square().sum(), [twin[name] for name in ADAPTER])
    torch.testing.assert_close([p.grad for p in adapter(model)], list(expected))


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_gradients_for_each_sample_are_those_of_a_loop(kind):
    layer, x = make(kind, dtype=torch.float64), example(kind, torch.float64)
    weights = {name: p.detach() for name, p in layer.lora_parameters()}

    def loss(weights, one):
        return functional_call(layer, weights, (one[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for n, one in enumerate(x):
        expected = torch.autograd.grad(plain_free(layer, one[None]).square().sum(), [layer.lora_A, layer.lora_B])
        torch.testing.assert_close([got["lora_A"][n], got["lora_B"][n]], list(expected))


def plain_free(layer, x):
    """The layer's output in operations that autograd knows."""
    return layer.lora_base_forward(x) + layer.scaling * layer.lora_product(x, layer.lora_A, layer.lora_B)


def test_the_jacobian_by_the_adapter_is_the_plain_models():
    model, (x, _) = small(), batch(2)
    twin = values(model)
    given = {name: twin[name].detach() for name in ADAPTER}
    got = torch.func.jacrev(lambda p: functional_call(model, p, (x,)))(given)
    expected = torch.func.jacrev(lambda p: plain({**twin, **p}, x))(given)
    torch.testing.assert_close(got, expected)


# ---- nothing waits for a device ----------------------------------------------------------------------------------


@every_two(kind=KINDS, use_dora=[False, True], mode=["train", "dropout", "eval", "served"])
def test_neither_forward_nor_backward_reads_a_value(kind, use_dora, mode):
    """On the meta device, where there are none to read; a CUDA graph could be captured of it."""
    options = {"lora_dropout": 0.5} if mode == "dropout" and kind in WITH_DROPOUT else {}
    layer, x = (dora if use_dora else make)(kind, **options).to("meta"), input_of(kind).to("meta")
    layer.train(mode in ("train", "dropout"))
    with torch.set_grad_enabled(mode != "served"):
        y = layer(x)
    assert y.is_meta
    if mode != "served":
        y.square().sum().backward()
        assert all(p.grad.is_meta for _, p in layer.lora_parameters())


class Reads(TorchDispatchMode):
    """Counts operations that make a number of a tensor, for which a device would have to be waited."""

    NAMES = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        self.found += [name] * (name in self.NAMES)
        return function(*args, **kwargs or {})


# Kinds whose dropout is drawn again from a seed; the others use torch's own.
SEEDED = ("Linear", "Linear transposed", "MergedLinear", "Conv1d factored", "Conv3d factored")


@pytest.mark.parametrize(("kind", "dropout"), [(kind, 0.0) for kind in KINDS] + [(kind, 0.5) for kind in WITH_DROPOUT])
def test_the_fused_functions_read_no_value_but_the_seed_of_dropout(kind, dropout):
    """The seed is drawn on the CPU; while a CUDA stream is being captured, dropout is torch's own."""
    layer, x = make(kind, **({"lora_dropout": dropout} if dropout else {})), example(kind)
    with Reads() as reads:
        layer(x).square().sum().backward()
    assert reads.found == ["_local_scalar_dense"] * (dropout > 0 and kind in SEEDED)
