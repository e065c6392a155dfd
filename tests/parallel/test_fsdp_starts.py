"""Sharded models that begin: on the meta device, with new adapters; and what is refused once a model is sharded."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import KINDS, make
from sharding import FIELDS, adapted, assert_same, shard, twins, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from toy_model import IDS, Model

import lora

FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)


def base():
    torch.manual_seed(0)
    return Model().double()


def on_meta(**fields):
    """A model that never was whole: sharded on the meta device, and then filled with what the first rank has."""
    with torch.device("meta"):
        model = Model().double()
        lora.inject(model, **{**FIELDS, **fields})
    shard(model).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)  # what `to_empty` gives may be anything
    pretrained = base().state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(model, pretrained, options=FROM_FIRST)
    return model


@torch.no_grad()
def by_norm(layer):
    """A start of a user's own, which reads the base weight."""
    layer.lora_A.fill_(layer.weight.norm())
    layer.lora_B.normal_()


WAYS = {"True": True, "gaussian": "gaussian", "orthogonal": "orthogonal", "False": False, "a function": by_norm}


def _fresh(how, use_dora):
    fields = {"r": 2, "use_dora": use_dora}
    one = adapted(base(), **fields)
    torch.manual_seed(5)
    lora.initialize(one, how)
    model = on_meta(**fields)
    torch.manual_seed(5 + dist.get_rank())
    lora.initialize(model, how)
    assert all(type(p) is DTensor for p in model.parameters())
    assert_same(model, one, rtol=0, atol=0)
    assert torch.equal(model(IDS), one(IDS))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "DoRA"])
@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_new_adapters_on_a_model_that_was_never_whole_start_as_in_one_process(ranks, how, use_dora):
    ranks.run(_fresh, how, use_dora)


def _loaded(folder, use_dora):
    one = adapted(base(), use_dora=use_dora)
    if dist.get_rank() == 0:
        lora.save_adapter(one, folder / "adapter")
    model = on_meta(use_dora=use_dora, lora_alpha=5, use_rslora=True)
    lora.load_adapter(model, folder / "adapter")
    assert torch.equal(model(IDS), one(IDS))


@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "DoRA"])
def test_an_adapter_is_loaded_into_a_model_that_was_never_whole(ranks, tmp_path, use_dora):
    ranks.run(_loaded, tmp_path, use_dora)


def _reset(kind):
    torch.manual_seed(0)
    layer = make(kind, use_dora="factored" not in kind)
    one = copy.deepcopy(layer)
    shard(nn.Sequential(layer))
    torch.manual_seed(1)
    one.lora_start_adapter()
    torch.manual_seed(1 + dist.get_rank())
    layer.lora_start_adapter()
    assert_same(layer, one, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_starts_as_in_one_process(ranks, kind):
    ranks.run(_reset, kind)


def _given_back():
    model = base()
    lora.inject(model, **{**FIELDS, "splits": {}, "enable_lora": {}}, init_lora_weights="pissa")
    shard(model)
    with lora.disabled(model):
        torch.testing.assert_close(model(IDS), base()(IDS))
    with pytest.raises(RuntimeError, match=r"(?s)embed\.weight is not what.*v_proj\.weight is not what"):
        model.load_state_dict(shard(base()).state_dict(), strict=False)
    torch.testing.assert_close(model(IDS), base()(IDS))
    lora.initialize(model, True)
    expected = dict(base().named_parameters())
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(whole(parameter), expected[name])


def test_a_start_from_the_base_weight_outlives_sharding(ranks):
    ranks.run(_given_back)


def _state_of_what_is_left(folder):
    fields = {**FIELDS, "splits": {}, "enable_lora": {}, "init_lora_weights": "pissa"}
    one, model, again, fresh = base(), base(), base(), base()
    for each in (one, model, again):
        lora.inject(each, **fields)
    with torch.no_grad():
        for each in (one, model):
            each.head.lora_A.add_(1)
    shard(model), shard(again), shard(fresh)
    expected = one(IDS)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        torch.testing.assert_close(state, dict(one.state_dict()), rtol=0, atol=0)
    set_model_state_dict(again, dict(model.state_dict()))
    assert_same(again, one)
    with torch.no_grad():
        again.head.lora_A.zero_()
    set_model_state_dict(again, dict(one.state_dict()), options=StateDictOptions(full_state_dict=True))
    assert_same(again, one)  # torch has sharded its first dimension, of 1
    assert all(
        got.placements == had.placements for got, had in zip(again.parameters(), model.parameters(), strict=True)
    )
    assert torch.equal(again(IDS), expected)
    dcp.save(model.state_dict(), checkpoint_id=folder)
    with torch.no_grad():
        again.head.lora_A.zero_()
    dcp.load(again.state_dict(), checkpoint_id=folder)
    assert torch.equal(again(IDS), expected)
    lora.initialize(again, True)
    with pytest.raises(RuntimeError, match="is what a start such as PiSSA's left"):
        again.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        fresh.load_state_dict(model.state_dict(), strict=False)


def test_what_a_start_has_left_is_told_apart_when_it_is_sharded(ranks, tmp_path):
    ranks.run(_state_of_what_is_left, tmp_path)


# ---- what torch's own loading does not notice --------------------------------------------------------------------


def _missing_key():
    one = adapted(base())
    with torch.no_grad():
        one.head.lora_A.add_(1)
    state = dict(one.state_dict())
    del state["head.lora_A"], state["embed.lora_B"]
    keys = set(state)
    model = shard(adapted(base()))
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=True))
    assert set(state) > keys, "torch has filled it up with what the model had"
    assert not torch.equal(whole(model.head.lora_A), one.head.lora_A)
    adapter = lora.adapter_of(one)
    for name in ("head.lora_A", "embed.lora_B"):
        del adapter.tensors[name]
    keys = set(adapter.tensors)
    with pytest.raises(lora.AdapterError, match=r"(?s)embed\.lora_B is missing.*head\.lora_A is missing"):
        lora.load_adapter(model, adapter)
    assert set(adapter.tensors) == keys


def test_a_missing_key_is_noticed_which_torch_does_not(ranks):
    ranks.run(_missing_key)


# ---- what one process does --------------------------------------------------------------------------------------


def _refused(call, fields, message):
    model, one = twins(**fields)
    shard(model)
    with pytest.raises(ValueError, match=message) as caught:
        call(model)
    names = [name for name, module in one.named_modules() if isinstance(module, lora.LoRALayer)]
    if "trains in full" not in message:
        assert all(f"{name}: is sharded; " in str(caught.value) for name in names)
    torch.testing.assert_close(model.eval()(IDS), one.eval()(IDS))
    assert_same(model, one, rtol=0, atol=0)


def pissa(model):
    lora.initialize(model, "pissa")


def calibrated(model):
    lora.calibrate(model, [IDS])


def disabled(model):
    with lora.disabled(model):
        raise AssertionError("it would compute with what has trained")


LINEAR = {"target_modules": ["q_proj", "v_proj", "head"], "splits": {}, "enable_lora": {}}
REFUSED = {
    "merge": (lora.merge, {}, "save the adapter .*, and merge that in one process"),
    "merged_state_dict": (lora.merged_state_dict, {}, "save the adapter .*, and merge that in one process"),
    "eject": (lora.eject, {}, "load the pretrained weights into a model of its own"),
    "pissa": (pissa, {"splits": {}, "enable_lora": {}}, "start it so before the model is sharded"),
    "eva": (calibrated, {**LINEAR, "init_lora_weights": "eva"}, "calibrate it before the model is sharded"),
    "corda": (calibrated, {**LINEAR, "init_lora_weights": "corda"}, "start it so before the model is sharded"),
    "disabled": (disabled, {"modules_to_save": ["norm"]}, r"layers\.0\.norm\.weight: trains in full and is sharded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_whole_weights_says_what_to_do_instead(ranks, case):
    ranks.run(_refused, *REFUSED[case])
