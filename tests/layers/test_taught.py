"""What computes with W of a linear layer unbuilt: parts of its outputs, and torch's attention, whatever its options."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lora

E, HEADS = 8, 2
NOTHING = dict.fromkeys(("bias_k", "bias_v", "in_proj_bias", "out_proj_bias")) | {
    "add_zero_attn": False,
    "dropout_p": 0.0,
}


def layer(inputs, outputs, **settings):
    """A layer whose adapter has moved; MergedLinear where there are splits."""
    cls = lora.MergedLinear if "splits" in settings else lora.Linear
    made = cls(inputs, outputs, r=2, lora_alpha=3, bias=False, **settings).double()
    for _, parameter in made.lora_parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return made


def dense(made):
    """W by the equation, differentiable in A and B; the norm is a constant."""
    r, start_A, start_B = made.r, 0, 0
    splits = getattr(made, "splits", (made.out_features,))
    W = []
    for rows, enabled in zip(made.weight.split(splits), getattr(made, "enable_lora", (True,)), strict=True):
        if enabled:
            A, B = made.lora_A[start_A : start_A + r], made.lora_B[start_B : start_B + len(rows)]
            rows = rows + made.lora_scaling * B @ A
            if made.use_dora:
                norm = rows.norm(dim=1, keepdim=True).detach()
                rows = rows / norm * made.lora_magnitude[start_B : start_B + len(rows), None]
            start_A, start_B = start_A + r, start_B + len(rows)
        W.append(rows)
    return torch.cat(W)


def refuse(*_):
    raise AssertionError("W was built")


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_parts_of_the_outputs_stay_unbuilt(data):
    splits = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    enabled = data.draw(st.lists(st.booleans(), min_size=len(splits), max_size=len(splits)).filter(any))
    use_dora, transposed = data.draw(st.booleans()), data.draw(st.booleans())
    made = layer(5, sum(splits), splits=splits, enable_lora=enabled, use_dora=use_dora)
    stored = lora.MergedLinear(
        5, sum(splits), r=2, lora_alpha=3, bias=False, splits=splits, enable_lora=enabled, use_dora=use_dora,
        fan_in_fan_out=transposed,
    ).double()  # fmt: skip
    stored.load_state_dict({k: v.T if k == "weight" and transposed else v for k, v in made.state_dict().items()})
    W, right = stored.lora_weight(), dense(made)
    W = W.t() if transposed else W
    if data.draw(st.booleans()):
        parts, rights = W.chunk(n := data.draw(st.integers(1, 5))), right.chunk(n)
    else:
        sizes = data.draw(st.sampled_from([splits, 3, splits[::-1]]))
        parts, rights = torch.split(W, sizes), right.split(sizes)
    assert len(parts) == len(rights)
    x, stored.lora_delta = torch.randn(3, 5).double(), refuse
    for part, expected in zip(parts, rights, strict=True):
        bias = torch.randn(len(expected)).double()
        assert part.shape == expected.shape
        assert part.numel() == expected.numel()
        torch.testing.assert_close(F.linear(x, part, bias), F.linear(x, expected, bias))
        torch.testing.assert_close(torch.matmul(x, part.T), x @ expected.T)
        for again, twice in zip(part.chunk(2), expected.chunk(2), strict=True):
            torch.testing.assert_close(F.linear(x, again), F.linear(x, twice))
    del stored.lora_delta
    for part, expected in zip(parts, rights, strict=True):
        torch.testing.assert_close(part.t().dense(), expected.T)
        torch.testing.assert_close(part + 1, expected + 1)
    torch.testing.assert_close(torch.chunk(W, 2, 1)[0], right.chunk(2, 1)[0])  # along its inputs: built


@st.composite
def calls(draw):
    """The arguments of a call of `multi_head_attention_forward`, but for the projections' weights."""
    flag = lambda name: draw(st.booleans(), label=name)  # noqa: E731
    batched, separate = flag("batched"), flag("separate")
    to, of, batch = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3)) if batched else 1
    one_kv, itself = flag("one key and value"), flag("self-attention")
    kdim, vdim = (3, 5) if separate and not one_kv else (E, E)
    of = to if itself else of

    def values(length, features):
        return torch.randn(length, batch, features).double() if batched else torch.randn(length, features).double()

    query = values(to, E)
    key = query if itself and kdim == E else values(of, kdim)
    value = key if one_kv else values(of, vdim)
    biases, bias_kv, masked = flag("biases"), flag("bias_k"), draw(st.sampled_from(["no", "bool", "float"]))
    mask_of_each, padded = flag("a mask of each head") and batched, flag("padded")
    is_causal, need_weights = flag("is_causal") and to == of and not bias_kv, flag("need_weights")
    attn_mask = padding = None
    if masked != "no" or is_causal:
        attn_mask = torch.ones(to, of, dtype=torch.bool).triu(1) if to <= of else torch.zeros(to, of, dtype=torch.bool)
        attn_mask[:, 0] = False  # something is left to attend to
        if mask_of_each and not is_causal:
            attn_mask = attn_mask.expand(batch * HEADS, to, of)
    if padded:
        padding = torch.zeros(batch, of, dtype=torch.bool)
        padding[:, 1:] = torch.rand(batch, of - 1) < 0.3
        padding = padding if batched else padding[0]
    if masked == "float":
        attn_mask, padding = (
            None if m is None else torch.zeros(m.shape).double().masked_fill(m, -torch.inf)
            for m in (attn_mask, padding)
        )
    arguments = {
        "query": query, "key": key, "value": value, "embed_dim_to_check": E, "num_heads": HEADS,
        "in_proj_bias": torch.randn(3 * E).double() if biases else None,
        "bias_k": torch.randn(1, 1, E).double() if bias_kv else None,
        "bias_v": torch.randn(1, 1, E).double() if bias_kv else None,
        "add_zero_attn": flag("add_zero_attn") and not is_causal,
        "dropout_p": draw(st.sampled_from([0.0, 0.3])),
        "out_proj_bias": torch.randn(E).double() if biases else None,
        "training": flag("training"), "key_padding_mask": padding, "need_weights": need_weights,
        "attn_mask": attn_mask, "use_separate_proj_weight": separate,
        "average_attn_weights": flag("average"), "is_causal": is_causal,
    }  # fmt: skip
    if not bias_kv and flag("static"):
        length = draw(st.integers(1, 3))
        arguments["static_k"] = torch.randn(batch * HEADS, length, E // HEADS).double()
        arguments["static_v"] = torch.randn(batch * HEADS, length, E // HEADS).double()
        arguments |= {"attn_mask": None, "key_padding_mask": None, "is_causal": False}
    return arguments, (kdim, vdim)


@given(calls(), st.data())
@settings(deadline=None, max_examples=80)
def test_attention_is_torchs_with_w(call, data):
    arguments, (kdim, vdim) = call
    use_dora = data.draw(st.booleans())
    if arguments["use_separate_proj_weight"]:
        sizes = {"q_proj_weight": (E, E), "k_proj_weight": (kdim, E), "v_proj_weight": (vdim, E)}
    else:
        sizes = {"in_proj_weight": (E, 3 * E)}
    layers = {name: layer(*size, use_dora=use_dora) for name, size in sizes.items()}
    if "in_proj_weight" in layers and data.draw(st.booleans()):
        enabled = data.draw(st.lists(st.booleans(), min_size=3, max_size=3).filter(any))
        layers["in_proj_weight"] = layer(E, 3 * E, splits=(E,) * 3, enable_lora=enabled, use_dora=use_dora)
    layers["out_proj_weight"] = layer(E, E, use_dora=use_dora)
    adapted = data.draw(st.sets(st.sampled_from([*layers]), min_size=1))
    if not {"in_proj_weight", "out_proj_weight"} & adapted:
        adapted.add("out_proj_weight")
    rights = {name: dense(made) if name in adapted else made.weight for name, made in layers.items()}
    plain = {"in_proj_weight": None} | {name: made.weight for name, made in layers.items()}
    for made in layers.values():
        made.lora_delta = refuse
    weights = plain | {name: layers[name].lora_weight() for name in adapted}
    torch.manual_seed(0)
    got = F.multi_head_attention_forward(**arguments, **weights)
    torch.manual_seed(0)
    expected = F.multi_head_attention_forward(**arguments, **(plain | rights))
    assert (got[1] is None) == (expected[1] is None) == (not arguments["need_weights"])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    trained = [p for name in sorted(adapted) for _, p in layers[name].lora_parameters()]
    some = torch.randn(got[0].shape, dtype=torch.float64)
    if not expected[0].requires_grad:  # what is adapted projects keys, say, and there are static ones
        return
    for one, other in zip(
        torch.autograd.grad(got[0], trained, some, allow_unused=True),
        torch.autograd.grad(expected[0], trained, some, allow_unused=True),
        strict=True,
    ):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_attention_complains_as_torchs():
    made, out = layer(E, 3 * E), layer(E, E)
    x = torch.randn(2, 3, E).double()
    given = {"in_proj_weight": made.lora_weight(), "out_proj_weight": out.lora_weight(), "num_heads": HEADS}
    for complaint, other in (
        ("embedding dimension of 9", {"embed_dim_to_check": 9}),
        ("Need attn_mask", {"embed_dim_to_check": E, "is_causal": True}),
        (r"key_padd.*mask", {"embed_dim_to_check": E, "key_padding_mask": torch.zeros(2, 3, dtype=torch.bool)}),
    ):
        with pytest.raises((AssertionError, RuntimeError), match=complaint):
            F.multi_head_attention_forward(x, x, x, **NOTHING, **given, **other)


def test_the_dropout_of_the_update_is_of_the_inputs_alone():
    made, out = layer(E, 3 * E, lora_dropout=0.5), layer(E, E)
    x = torch.randn(4, 1, E).double()

    def attend(W):
        return F.multi_head_attention_forward(
            x, x, x, E, HEADS, W, out_proj_weight=out.weight, **NOTHING, need_weights=False
        )[0]

    assert not torch.allclose(attend(made.lora_weight()), attend(made.lora_weight()))
    made.lora_B.data.zero_()
    assert torch.equal(attend(made.lora_weight()), attend(made.lora_weight()))
    made.eval()
    torch.testing.assert_close(attend(made.lora_weight()), attend(made.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision(dtype):
    made, out = layer(E, 3 * E).float(), layer(E, E).float()
    x = torch.randn(3, 2, E)

    def attend(x, W, out):
        return F.multi_head_attention_forward(x, x, x, E, HEADS, W, out_proj_weight=out, **NOTHING)

    exact = attend(x, dense(made), dense(out))
    with torch.autocast("cpu", dtype=dtype):
        got, like = attend(x, made.lora_weight(), out.lora_weight()), attend(x, dense(made), dense(out))
    with torch.no_grad():
        for one in (made, out):
            one.weight.data = one.weight.to(dtype)
        low = attend(x.to(dtype), made.lora_weight(), out.lora_weight())
    for one, other, third, exactly in zip(got, like, low, exact, strict=True):
        assert one.dtype == other.dtype
        assert third.dtype == dtype
        torch.testing.assert_close(one.float(), exactly, rtol=0.03, atol=0.03)
        torch.testing.assert_close(third.float(), exactly, rtol=0.03, atol=0.03)


@pytest.mark.slow
def test_attention_is_compiled_without_a_break():
    made, out = layer(E, 3 * E), layer(E, E, use_dora=True)
    x = torch.randn(3, 2, E).double()

    def attend(x):
        return F.multi_head_attention_forward(
            x, x, x, E, HEADS, made.lora_weight(), None, None, None, False, 0.0, out.lora_weight(), None, True, padding
        )[0]

    padding = torch.zeros(2, 3, dtype=torch.bool)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, attend(x))
