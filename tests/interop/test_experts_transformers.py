"""LoRA on the experts of transformers' mixtures, which are parameters of three dimensions, against dense arithmetic."""

import copy
import itertools

import pytest
import torch
from counting import Operations, kept_for_backward
from expert_models import (
    EXPERTS,
    IMPLEMENTATIONS,
    MODELS,
    dense_weights,
    experts_of,
    ids,
    make,
    randomise,
)
from pairwise import in_tiers, pairwise

import lora
from lora.layers.in_place_stack import LowRankStack

each_model = pytest.mark.parametrize("name", MODELS)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture
def nothing_dense(monkeypatch):
    def refuse(self, why=""):
        raise AssertionError(f"W was built for {why}")

    monkeypatch.setattr(LowRankStack, "dense", refuse)


def adapted(name, implementation="eager", dtype=torch.float64, **settings):
    model = make(name, implementation, dtype)
    lora.inject(model, target_parameters=EXPERTS, **{"r": 3, "lora_alpha": 6, **settings})
    return model


def logits(model, given=None):
    return model(ids() if given is None else given, use_cache=False).logits


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def in_dense(model, base):
    """The base model's logits in float64 with W of the experts in their places."""
    twin = copy.deepcopy(base).double()
    twin.set_experts_implementation("eager")
    return torch.func.functional_call(twin, dense_weights(model), (ids(),), {"use_cache": False}).logits


def gradients(y, tensors):
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(y, tensors, upstream.to(y.dtype))


@each_model
@each_implementation
def test_it_computes_with_w(name, implementation, nothing_dense):
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # which torch's own does not take
    exact = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    base, model = make(name, implementation, dtype), adapted(name, implementation, dtype)
    start = logits(base)
    torch.testing.assert_close(logits(model), start, rtol=1e-6, atol=1e-6)
    y, expected = logits(randomise(model)), in_dense(model, base)
    assert (expected - start).norm() > 0.01 * expected.norm()
    torch.testing.assert_close(y.double(), expected, **exact)
    assert len(trained(model)) == 4 * len(experts_of(model))
    for got, wanted in zip(gradients(y, trained(model)), gradients(expected, trained(model)), strict=True):
        assert wanted.any()
        room = exact["atol"] * float(wanted.abs().max() + 1)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=room)
    with lora.disabled(model):
        torch.testing.assert_close(logits(model), start, rtol=1e-6, atol=1e-6)


@each_model
@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}], ids=str
)
def test_settings_are_those_of_layers(name, settings):
    base, model = make(name), adapted(name, **settings)
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-8, atol=1e-8)
    y = logits(randomise(model))
    torch.testing.assert_close(y, in_dense(model, base), rtol=1e-8, atol=1e-8)
    lora.merge(model)
    torch.testing.assert_close(logits(model), y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "gate"), [("Mixtral", slice(0, 48)), ("GPT-OSS", slice(0, None, 2))])
def test_gate_and_up_may_have_an_a_each(name, gate):
    """GPT-OSS has their outputs alternate, and its matrices transposed."""
    words = {"splits": {"gate_up_proj": (48, 48)}, "enable_lora": {"gate_up_proj": (False, True)}}
    model, base = adapted(name, **words), make(name)
    y = logits(randomise(model))
    before = base.state_dict()
    for key, W in lora.merged_state_dict(model).items():
        if key.endswith("gate_up_proj"):
            own, was = (tensor.mT if name == "GPT-OSS" else tensor for tensor in (W, before[key]))
            moved = (own != was).any(0).any(1)
            assert not moved[gate].any()
            assert int(moved.sum()) == 48
    lora.merge(model)
    torch.testing.assert_close(logits(model), y)


@each_model
def test_it_is_saved_loaded_merged_and_ejected(name, tmp_path):
    base, model = make(name), randomise(adapted(name))
    y, start = logits(model), logits(base)
    keys = {key for key in model.state_dict() if "lora_" not in key}
    assert keys == set(base.state_dict())
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    other = copy.deepcopy(base)
    lora.load_adapter(other, tmp_path / "adapter.safetensors")
    assert torch.equal(logits(other), y)
    assert torch.equal(logits(copy.deepcopy(model)), y)
    merged = lora.merged_state_dict(model)
    assert list(merged) == list(base.state_dict())
    for key, W in dense_weights(model).items():
        torch.testing.assert_close(merged[key], W)
    lora.eject(other)
    assert torch.equal(logits(other), start)
    lora.merge(model)
    assert [type(experts) for experts in experts_of(model).values()] == [type(e) for e in experts_of(base).values()]
    torch.testing.assert_close(logits(model), y)


@each_model
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(name, use_reentrant):
    model = randomise(adapted(name)).train()
    y = logits(model)
    wanted = gradients(y, trained(model))
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    again = logits(model)
    upstream = torch.randn(again.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    again.backward(upstream)
    torch.testing.assert_close(again, y)
    for parameter, gradient in zip(trained(model), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@each_model
@pytest.mark.parametrize("implementation", ["batched_mm", pytest.param("eager", marks=pytest.mark.slow)])
def test_text_is_generated(name, implementation):
    model = randomise(adapted(name, implementation))
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    given = ids(1)
    found = model.generate(given, **settings)
    lora.merge(model)
    assert torch.equal(found, model.generate(given, **settings))


@each_model
@each_implementation
def test_a_bfloat16_base_trains_in_float32(name, implementation, nothing_dense):
    model = randomise(adapted(name, implementation, torch.bfloat16))
    assert {parameter.dtype for parameter in trained(model)} == {torch.float32}
    y = logits(model)
    y.float().square().mean().backward()
    assert all(parameter.grad.any() and parameter.grad.isfinite().all() for parameter in trained(model))
    if name != "Phi-3.5-MoE":  # whose router jumps to another expert where rounding decides
        base = make(name, dtype=torch.bfloat16)
        error = (y.double() - in_dense(model, base)).norm() / in_dense(model, base).norm()
        alike = (logits(base).double() - logits(copy.deepcopy(base).double())).norm() / logits(base).double().norm()
        assert error < 4 * alike + 2**-6


@each_implementation
@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS"])
def test_under_autocast(name, implementation, nothing_dense):
    model = randomise(adapted(name, implementation, torch.float32))
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = logits(model)
    y.float().square().mean().backward()
    assert (y - exact).norm() / exact.norm() < 0.1
    assert all(parameter.grad.any() for parameter in trained(model))


@each_implementation
@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS"])
def test_dropout(name, implementation, nothing_dense):
    model = randomise(adapted(name, implementation, torch.float32, lora_dropout=0.5), 0.1)
    exact = logits(model)
    with torch.no_grad():
        first, second = logits(model.train()), logits(model)
    assert not torch.allclose(first, exact)
    assert not torch.allclose(first, second)
    logits(model).square().mean().backward()
    assert all(parameter.grad.any() for parameter in trained(model))


def test_transformers_own_product_of_groups(nothing_dense):
    """Which it calls where torch has none, and when it compiles."""
    model = randomise(adapted("Mixtral"))
    name, experts = next(iter(experts_of(model).items()))
    x, ends = torch.randn(9, 32, dtype=torch.float64, requires_grad=True), torch.tensor([2, 2, 7, 9])
    W = vars(experts)["lora_parts"]["gate_up_proj"].lora_weight()
    y = torch.ops.transformers.grouped_mm_fallback(x, W.transpose(-2, -1), offs=ends)
    dense = dense_weights(model)[f"{name}.gate_up_proj"]
    expected = torch.cat([rows @ W.T for rows, W in zip(x.split([2, 0, 5, 2]), dense, strict=True)])
    torch.testing.assert_close(y, expected)
    wanted = [x, experts.gate_up_proj_lora_A, experts.gate_up_proj_lora_B]
    for got, right in zip(gradients(y, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(got, right)


# ---- what it costs -------------------------------------------------------------------------------------------------


def one_block(implementation, experts=32, size=64, inner=32, r=4):
    """Experts of Mixtral's, of which three tokens' worth are met; adapted, and as they were."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=size, intermediate_size=inner, num_local_experts=experts)
    config._experts_implementation = implementation
    block = torch.nn.Sequential(MixtralExperts(config))
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    base = copy.deepcopy(block).requires_grad_(False)
    lora.inject(block, target_parameters=["0.gate_up_proj", "0.down_proj"], r=r)
    x = torch.randn(16, size, requires_grad=True)
    routed = torch.tensor([[1, 5]] * 8 + [[5, 20]] * 8), torch.rand(16, 2)
    return block, base, x, routed


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_bytes_kept_are_those_of_the_tokens(implementation):
    block, base, x, routed = one_block(implementation)
    ours, theirs = (kept_for_backward(lambda m=m: m[0](x, *routed), x, *routed, *m.parameters()) for m in (block, base))
    # Of 32 tokens' products with their experts: what goes into both products, and the two h.
    assert ours - theirs <= 4 * 32 * (64 + 32 + 2 * 4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_nothing_as_large_as_the_experts_is_made(implementation):
    block, _, x, routed = one_block(implementation)
    experts = block[0]
    with Operations() as counted:
        experts(x, *routed).sum().backward()
    largest = max(p.numel() for n, p in experts.named_parameters() if "lora_" in n)
    assert counted.largest <= max(largest, 32 * 64)
    assert largest < experts.down_proj.numel() / 4
    assert experts.gate_up_proj.grad is None


# ---- compiled ------------------------------------------------------------------------------------------------------


COMPILED = [
    *itertools.product(["Mixtral", "GPT-OSS"], ["batched_mm", "grouped_mm"], [torch.float32, torch.bfloat16]),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # of transformers'
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # after a break
@pytest.mark.parametrize(("name", "implementation", "dtype"), in_tiers(COMPILED, pairwise(COMPILED)))
def test_it_is_compiled(name, implementation, dtype, nothing_dense):
    """Without a break, but where a compiler cannot: "eager" asks what the router chose, and of `torch._grouped_mm`,
    which transformers calls in bfloat16, torch's own does not ask W (torch.overrides has no private functions).
    """
    whole = (implementation, dtype) != ("grouped_mm", torch.bfloat16)
    model = randomise(adapted(name, implementation, dtype))
    torch._dynamo.reset()
    y = logits(torch.compile(model, fullgraph=whole, backend="aot_eager"))
    exact = {"rtol": 0.1, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y, logits(model), **exact)
    wanted = gradients(logits(model), trained(model))
    for got, expected in zip(gradients(y, trained(model)), wanted, strict=True):
        room = 0.1 if dtype == torch.bfloat16 else 1e-3
        assert (got - expected).norm() <= room * expected.norm()
