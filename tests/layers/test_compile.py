"""Under `torch.compile`: no graph break, and nothing is compiled again, for other sizes or for other adapters."""

import copy
from contextlib import nullcontext

import pytest
import torch
from compiled import Compiled
from conftest import KINDS, LAYERS, WITH_DROPOUT, make, randomised
from releases import through_a_compiler
from torch import nn
from torch._dynamo.utils import counters

import lora

# To a compiler, evaluating with gradients is training without dropout, and a merged weight is served by one operation.
EACH_KIND_TRAINS_AND_SOME_SERVE = [*((kind, "train") for kind in KINDS), ("Linear", "eval")]
EACH_KIND_TRAINS_AND_SOME_SERVE += [(kind, "served") for kind in ("MergedLinear", "Embedding", "Conv2d")]
# torch's own compiler imports what torch deprecates.
of_inductor = pytest.mark.filterwarnings("ignore:`torch.jit.script")
with_and_without_dora = pytest.mark.parametrize("use_dora", [False, True])


def sized(kind, batch, length, dtype=torch.float32):
    """An input of this batch and length: sizes that no other dimension has, which dynamo would take for the same."""
    _, arguments, shape = LAYERS[kind]
    if kind == "Embedding":
        return torch.randint(arguments["num_embeddings"], (batch, length))
    if kind.startswith("Conv"):
        return torch.randn(batch, shape[1], length, *shape[3:], dtype=dtype)
    return torch.randn(batch, length, shape[-1], dtype=dtype)


def model_of(kind, **arguments):
    model = nn.Sequential(make(kind, **{"lora_alpha": 3, **arguments}))
    lora.mark_only_lora_as_trainable(model)
    return model


def without_gradients(mode):
    return torch.set_grad_enabled(mode != "served")


# ---- other sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "mode"), EACH_KIND_TRAINS_AND_SOME_SERVE)
def test_other_batches_and_lengths_compile_nothing_again(kind, mode):
    model = model_of(kind).train(mode == "train")
    compiled = Compiled(model, dynamic=True)
    with without_gradients(mode):
        for batch, length in ((11, 17), (12, 17), (12, 19)):
            x = sized(kind, batch, length)
            torch.testing.assert_close(compiled(x), model(x))
    assert compiled.times == 1


@pytest.mark.parametrize(("kind", "mode"), [("MergedLinear", "train"), ("Embedding", "served"), ("Conv2d", "train")])
def test_by_default_each_size_that_changes_compiles_once_more(kind, mode):
    model = model_of(kind).train(mode == "train")
    compiled = Compiled(model)
    sizes, times = ((11, 17), (11, 19), (11, 23), (12, 23), (13, 29)), []
    with without_gradients(mode):
        for batch, length in sizes:
            x = sized(kind, batch, length)
            torch.testing.assert_close(compiled(x), model(x))
            times.append(compiled.times)
    assert times == [1, 2, 2, 3, 3]


@pytest.mark.parametrize("kind", ["MergedLinear", "Conv2d factored"])  # drawn again from a seed, and torch's own
def test_with_dropout_other_lengths_compile_nothing_again(kind):
    model = model_of(kind, lora_dropout=0.5)
    compiled, times = Compiled(model, "aot_eager", dynamic=True), []
    for length in (17, 19):
        x = sized(kind, 11, length)
        assert not torch.equal(compiled(x), compiled(x))
        compiled(x).sum().backward()
        times.append(compiled.times)
    assert model[0].lora_A.grad.any()
    assert times[0] == times[1]  # torch compiles anything with dropout a second time, when it first runs again


# ---- other adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "mode"), EACH_KIND_TRAINS_AND_SOME_SERVE)
def test_swapping_scaling_and_disabling_compile_nothing_again(kind, mode):
    use_dora = mode == "train"
    # In float64: where terms cancel, the rounding of float32 is larger than what is let pass, on some CPUs.
    wide = {"dtype": torch.float64}
    model, x = model_of(kind, use_dora=use_dora, **wide).train(mode == "train"), sized(kind, 11, 17, **wide)
    base = copy.deepcopy(model)
    lora.eject(base)
    lora.prepare_for_swap(model, 6)
    compiled = Compiled(model)
    with without_gradients(mode):
        torch.testing.assert_close(compiled(x), model(x))
        for r in (6, 2, 4):
            other = model_of(kind, r=r, lora_alpha=r + 1, use_dora=use_dora, use_rslora=r == 4, **wide)
            lora.load_adapter(model, lora.adapter_of(other), check_base=False)
            torch.testing.assert_close(compiled(x), model(x))
            with lora.disabled(model):
                torch.testing.assert_close(compiled(x), base(x))
                with lora.disabled(model):
                    torch.testing.assert_close(compiled(x), base(x))
                torch.testing.assert_close(compiled(x), base(x))
            for scaling in (0.3, 0.0):
                model[0].scaling = scaling
                torch.testing.assert_close(compiled(x), model(x))
    assert compiled.times == 1


@pytest.mark.parametrize("change", ["swap", "scaling", "disabled"])
def test_what_is_not_prepared_is_right_and_compiles_again(change):
    """What preparing is for: the test of this file that would tell if torch took numbers for inputs one day."""
    model, x = model_of("Linear"), sized("Linear", 11, 17)
    compiled = Compiled(model)
    compiled(x)
    if change == "swap":
        lora.load_adapter(model, lora.adapter_of(model_of("Linear", lora_alpha=7)), check_base=False)
    elif change == "scaling":
        model[0].scaling = 0.3
    with lora.disabled(model) if change == "disabled" else nullcontext():
        torch.testing.assert_close(compiled(x), model(x))
    assert compiled.times == 2


@pytest.mark.parametrize(("kind", "use_dora"), [("MergedLinear", True), ("Embedding", True), ("Conv2d", False)])
def test_training_and_evaluating_in_turns_compiles_each_once(kind, use_dora):
    model, x = model_of(kind, use_dora=use_dora), sized(kind, 11, 17)
    lora.prepare_for_swap(model, 4)
    if kind in WITH_DROPOUT:
        model[0].lora_dropout = 0.5
    compiled = Compiled(model)
    for training in (True, False) * 2:
        model.train(training)
        y = compiled(x)
        assert training or torch.allclose(y, model(x), atol=1e-5)
    assert compiled.times <= 2


@with_and_without_dora
def test_disabled_it_is_the_base_whatever_the_adapter_holds(use_dora):
    model, x = model_of("Linear", use_dora=use_dora), sized("Linear", 11, 17)
    base = copy.deepcopy(model)
    lora.eject(base)
    lora.prepare_for_swap(model, 4)
    compiled = Compiled(model, "aot_eager")
    with torch.no_grad():
        for _, parameter in model[0].lora_parameters():
            parameter.fill_(torch.nan)
    assert compiled(x).isnan().all()
    with lora.disabled(model):
        assert torch.equal(compiled(x), base(x))
    assert compiled.times == 1


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_eager_after_every_change(kind):
    model = model_of(kind, use_dora=True, dtype=torch.float64)
    x = sized(kind, 11, 17, torch.float64)
    x.requires_grad_(x.is_floating_point())
    lora.prepare_for_swap(model, 6)
    compiled = Compiled(model, "aot_eager")
    wanted = [p for p in (x, *model.parameters()) if p.requires_grad]
    other = model_of(kind, r=4, lora_alpha=9, use_dora=True, dtype=torch.float64)
    for change in (lambda: None, lambda: lora.load_adapter(model, lora.adapter_of(other), check_base=False)):
        change()
        got, expected = (torch.autograd.grad(f(x).square().sum(), wanted) for f in (compiled, model))
        torch.testing.assert_close(got, expected)
    assert compiled.times == 1


@with_and_without_dora
def test_a_backward_may_wait_while_the_reference_is_computed(use_dora):
    """As preference tuning does it: the policy's forward, the base's, then the backward."""
    model, x = model_of("Linear", use_dora=use_dora), sized("Linear", 11, 17)
    lora.prepare_for_swap(model, 4)
    compiled = Compiled(model, "aot_eager")
    adapter = [p for _, p in model[0].lora_parameters()]
    gradients = []
    for function in (compiled, model):
        y = function(x)
        with torch.no_grad(), lora.disabled(model):
            reference = function(x)
        gradients.append(torch.autograd.grad((y - reference).square().sum(), adapter))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert compiled.times == 2  # with gradients, and without


def test_what_trains_in_full_is_right_in_disabled_and_compiles_once_more():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5), nn.LayerNorm(5))
    base, x = copy.deepcopy(model), torch.randn(3, 6)
    lora.inject(model, target_modules=["0", "1"], r=2, modules_to_save=["2"], bias="lora_only")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) if parameter.requires_grad else 0)
    lora.prepare_for_swap(model, 4)
    compiled = Compiled(model)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
        with lora.disabled(model):
            torch.testing.assert_close(compiled(x), base(x))
    assert compiled.times == 2


def test_a_start_out_of_the_base_weight_is_right_in_a_prepared_model_too():
    model, x = model_of("Linear"), sized("Linear", 11, 17)
    lora.prepare_for_swap(model, 4)
    base = copy.deepcopy(model)
    lora.eject(base)
    compiled = Compiled(model)
    compiled(x)
    lora.initialize(model, "pissa")
    randomised(model[0])
    torch.testing.assert_close(compiled(x), model(x))
    with lora.disabled(model):
        torch.testing.assert_close(compiled(x), base(x), atol=1e-5, rtol=1e-5)


def test_an_adapter_that_waits_for_data_says_so_in_a_prepared_model_too():
    model, x = model_of("Linear"), sized("Linear", 11, 17)
    lora.prepare_for_swap(model, 4)
    lora.initialize(model, "eva")
    with pytest.raises(Exception, match=through_a_compiler(r"needs data: call `lora\.calibrate")):
        Compiled(model)(x)


@pytest.mark.parametrize(
    ("kind", "dtype", "autocast"),
    [
        ("MergedLinear", torch.bfloat16, False),
        ("Embedding", torch.float32, True),
        ("Conv2d", torch.float32, True),
        ("MergedLinear", torch.float64, True),
    ],
)
def test_dtypes_are_eagers(kind, dtype, autocast):
    model, x = model_of(kind, dtype=dtype), sized(kind, 11, 17, dtype)
    lora.prepare_for_swap(model, 4)
    compiled = Compiled(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, expected = compiled(x), model(x)
    assert got.dtype == expected.dtype
    low = torch.bfloat16 in (dtype, got.dtype) or autocast
    tolerance = {"rtol": 0.05, "atol": 0.05 * expected.abs().max().item()} if low else {}
    torch.testing.assert_close(got, expected, **tolerance)


def test_an_embeddings_gradient_is_divided_by_frequency_where_it_is_asked_for():
    model = model_of("Embedding", scale_grad_by_freq=True, padding_idx=2, dtype=torch.float64)
    lora.prepare_for_swap(model, 4)
    ids = torch.tensor([[1, 1, 2], [3, 1, 4]])
    got, expected = (
        torch.autograd.grad(f(ids).square().sum(), [model[0].lora_A, model[0].lora_B])
        for f in (Compiled(model, "aot_eager"), model)
    )
    torch.testing.assert_close(got, expected)


# ---- a model ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A small language model of many kinds of layer: embedding, fused attention, a convolution over time, an output."""

    def __init__(self, width=12, heads=2, vocabulary=20):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.over_time = nn.Conv1d(width, width, 3, padding=1)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.heads = heads

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.over_time(x.mT).mT
        return self.head(x)


def block(r=2, **settings):
    torch.manual_seed(1)
    model = Block().double()
    lora.inject(
        model,
        target_modules=["embed", "qkv", "out", "over_time", "head"],
        r=r,
        splits={"qkv": (12, 12, 12)},
        enable_lora={"qkv": (True, False, True)},
        factored=True,
        **settings,
    )
    torch.manual_seed(r)
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            randomised(module, 0.3)
    return model


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("mode", "use_dora"), [("train", True), ("served", False)])
def test_a_model_of_many_kinds_compiles_once(use_dora, mode):
    model = block(use_dora=use_dora).train(mode == "train")
    lora.prepare_for_swap(model, 6)
    compiled = Compiled(model, dynamic=True)
    with without_gradients(mode):
        for r, batch, length in ((2, 11, 17), (6, 13, 17), (1, 13, 19)):
            lora.load_adapter(model, lora.adapter_of(block(r, use_dora=use_dora)))
            ids = torch.randint(20, (batch, length))
            torch.testing.assert_close(compiled(ids), block(r, use_dora=use_dora)(ids))
            with lora.disabled(model):
                torch.testing.assert_close(compiled(ids), model(ids))
    assert compiled.times == 1


def test_it_has_one_graph_and_no_breaks_to_explain():
    torch._dynamo.reset()
    model = block()
    for _ in range(2):
        told = torch._dynamo.explain(model)(torch.randint(20, (3, 7)))
        assert (told.graph_count, told.graph_break_count) == (1, 0)
        lora.prepare_for_swap(model, 4)


@pytest.mark.slow
@of_inductor
def test_inductor_trains_and_swaps_in_reduce_overhead_mode():
    """The whole compiler, forward and backward, on a small model. On a GPU the mode makes CUDA graphs; here it runs."""
    torch._dynamo.reset()
    counters.clear()
    model, x = model_of("MergedLinear"), sized("MergedLinear", 3, 5)
    twin, adapter = copy.deepcopy(model), [p for _, p in model[0].lora_parameters()]
    lora.prepare_for_swap(model, 4)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for other in (twin, model_of("MergedLinear", r=3), model_of("MergedLinear", r=1)):
        lora.load_adapter(model, lora.adapter_of(other), check_base=False)
        got, expected = (torch.autograd.grad(function(x).square().sum(), adapter) for function in (compiled, model))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        with lora.disabled(model):
            torch.testing.assert_close(compiled(x), model(x))
    assert counters["stats"]["unique_graphs"] == 1
