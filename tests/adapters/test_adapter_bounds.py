"""Adapters whose numbers ask for too much, and what an Adapter is as an object."""

import math
import pickle

import pytest
import torch
from torch import nn

import lora

ABOUT = {"r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "use_rslora": False, "scaling": 1}


def linear(**changes):
    base = {"kind": "linear", "shape": [2, 3], **changes.pop("base", {})}
    settings = {**ABOUT, "base": base, **changes}
    return lora.Adapter({"up": settings}, {"up.lora_A": torch.ones(1, 3), "up.lora_B": torch.ones(2, 1)})


def test_a_scaling_that_is_a_large_integer_scales(tmp_path):
    adapter = linear(scaling=10**20)
    assert adapter.delta("up").tolist() == torch.full((2, 3), 1e20).tolist()
    model = nn.ModuleDict({"up": nn.Linear(3, 2, bias=False)})
    lora.load_adapter(model, adapter)
    assert torch.isfinite(model["up"](torch.ones(3))).all()
    assert lora.scale(linear(), 10**30).delta("up")[0, 0].item() == pytest.approx(1e30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {"groups": 3}}, "`groups` are for convolutions, got 3 for 'linear'."),
        ({"base": {"fan_in_fan_out": "no"}}, "`fan_in_fan_out` must be true, false or unknown, got 'no'."),
        ({"factored": "yes"}, "`factored` must be true or false, got 'yes'."),
    ],
)
def test_settings_of_another_type_are_refused(changes, message, tmp_path):
    with pytest.raises(lora.AdapterError) as caught:
        lora.write_adapter(linear(**changes), tmp_path / "adapter")
    assert f"up: {message}" in str(caught.value)


def test_a_portable_form_beyond_all_measure_is_refused_before_it_is_made(tmp_path):
    modules, tensors = {}, {}
    for groups in (97, 89, 83, 79, 73):
        base = {"kind": "conv", "shape": [groups, 1, 1], "groups": groups}
        modules[f"c{groups}"] = {**ABOUT, "r": groups, "factored": True, "base": base}
        tensors |= {f"c{groups}.lora_A": torch.ones(groups, 1, 1), f"c{groups}.lora_B": torch.ones(groups, 1, 1)}
    rank = math.prod((97, 89, 83, 79, 73))
    with pytest.raises(
        lora.AdapterError,
        match=rf"it would have \d+ values, at rank {rank}, and has \d+: more than 64 times as many are not made",
    ):
        lora.write_adapter(lora.Adapter(modules, tensors), tmp_path / "out", "portable")


def test_a_factored_form_beyond_all_measure_is_refused_before_it_is_made(tmp_path):
    settings = {**ABOUT, "factored": False, "base": {"kind": "conv", "shape": [1, 1, 400, 400], "groups": 1}}
    tensors = {"c.lora_A": torch.ones(400, 400), "c.lora_B": torch.ones(400, 400)}
    with pytest.raises(lora.AdapterError, match="it would have 25600160000 values, and has 320000: more than 64 times"):
        lora.write_adapter(lora.Adapter({"c": settings}, tensors), tmp_path / "out", "peft")


def test_an_adapter_is_an_object_with_an_identity_and_a_short_name():
    one, other = linear(), linear()
    assert one == one
    assert one != other
    assert len({one, other}) == 2
    assert repr(one) == "Adapter(modules=1, parameters=5, format='lora')"
    assert pickle.loads(pickle.dumps(one)).delta("up").equal(one.delta("up"))


@pytest.mark.parametrize("seed", [2**70, "x", 1.5, True])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ValueError, match="`seed` must be an integer"):
        lora.combine([(linear(), 1.0)], "dare", r=1, seed=seed)


def test_a_file_of_old_torch_is_refused_with_what_to_do(tmp_path):
    torch.save({"up.lora_A": torch.ones(1, 3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(lora.AdapterError, match="write it again with"):
        lora.read_adapter(tmp_path / "old.bin", lora_alpha=1)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, -0.25)])
def test_a_sum_with_a_single_pair_fits_a_merged_layer_where_that_is_exact(weights, tmp_path):
    model = nn.ModuleDict({"qkv": nn.Linear(6, 12, bias=False)})
    lora.inject(model, target_modules=["qkv"], r=2, splits={"qkv": (4, 4, 4)})
    nn.init.normal_(model["qkv"].lora_B)
    ours = lora.adapter_of(model)
    lora.write_adapter(ours, tmp_path / "theirs", "peft")
    both = lora.combine([(ours, weights[0]), (lora.read_adapter(tmp_path / "theirs"), weights[1])], "svd", r=6)
    expected = sum(weights) * ours.delta("qkv", torch.float64)
    plain = nn.ModuleDict({"qkv": nn.Linear(6, 12, bias=False)})
    lora.load_adapter(plain, both, check_base=False)
    layer = plain["qkv"]
    update = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(update.detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [0x380, 0x280, 0x580])
def test_a_header_whose_length_looks_like_a_pickle_is_a_header(length, tmp_path):
    adapter = linear()
    for padding in range(8, 1500, 8):
        adapter = linear(base={"note": "x" * padding})
        lora.write_adapter(adapter, tmp_path / "adapter")
        if (tmp_path / "adapter").read_bytes()[:2] == length.to_bytes(2, "little"):
            break
    else:
        pytest.fail("no header of that length was made")
    assert lora.read_adapter(tmp_path / "adapter").delta("up").equal(adapter.delta("up"))
