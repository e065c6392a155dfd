"""Adapters of sharded models: files are what one process writes, and go to all ranks; errors reach all ranks, too."""

import contextlib
import copy
import json
import re

import pytest
import safetensors
import torch
import torch.distributed as dist
from conftest import KINDS, make
from safetensors.torch import load_file
from sharding import FIELDS, adapted, assert_same, shard, twins, whole
from torch import nn
from torch.distributed.tensor import DTensor
from toy_model import IDS, Model

import lora

PARTS = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "in full": {"bias": "all", "modules_to_save": ["norm"]},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 3},
    "PiSSA": {"init_lora_weights": "pissa"},
}


def content(path):
    """All that is in a file but for the order of its metadata, which safetensors leaves to chance."""
    with safetensors.safe_open(path, framework="pt") as file:
        about = {**file.metadata(), "lora": json.loads(file.metadata()["lora"])}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    return about, {name: (t.dtype, t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


def first():
    return dist.get_rank() == 0


# ---- saving ------------------------------------------------------------------------------------------------------


def _save(folder, fields):
    model, one = twins(**fields)
    shard(model)
    model(IDS)  # leaves the root's parameters whole
    lora.save_adapter(model, folder / "two")
    assert (folder / "two").exists(), "every rank returns when it is written"
    if first():
        lora.save_adapter(one, folder / "one")  # by a rank alone, which waits for nobody
    adapter = lora.adapter_of(model)
    assert {type(tensor) for tensor in adapter.tensors.values()} <= {torch.Tensor, nn.Parameter}
    expected = lora.adapter_of(one)
    assert adapter.modules == expected.modules
    assert all(torch.equal(adapter.tensors[name], expected.tensors[name]) for name in expected.tensors)
    for name in ("lora_A", "lora_B"):
        assert type(getattr(model.embed, name)) is DTensor


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fields", PARTS.values(), ids=PARTS)
def test_two_ranks_write_the_file_that_one_process_writes(ranks, tmp_path, fields):
    ranks.run(_save, tmp_path, fields)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def _save_kind(folder, kind, dtype):
    model = nn.Sequential(nn.Sequential(make(kind, dtype=dtype)))
    if first():
        lora.save_adapter(model, folder / "one")
    lora.save_adapter(shard(model), folder / "two")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_as_by_one_process_and_knows_its_base(ranks, tmp_path, kind, dtype):
    ranks.run(_save_kind, tmp_path, kind, dtype)
    one, two = content(tmp_path / "one")[0]["lora"], content(tmp_path / "two")[0]["lora"]
    assert one == two
    assert len(one["modules"]["0.0"]["base"]["sample"]) == 16


def _save_peft(folder):
    model, one = twins(splits={}, enable_lora={})
    if first():
        lora.save_adapter(one, folder / "one", format="peft")
    lora.save_adapter(shard(model), folder / "two", format="peft")


def test_a_sharded_model_is_saved_for_peft(ranks, tmp_path):
    ranks.run(_save_peft, tmp_path)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def _renormed(folder):
    layer = lora.Embedding(9, 4, r=2, max_norm=0.5)
    one = copy.deepcopy(layer)
    assert lora.adapter_of(shard(nn.Sequential(layer))).modules["0"] == lora.adapter_of(nn.Sequential(one)).modules["0"]


def test_an_embedding_with_max_norm_is_known_as_it_computes(ranks, tmp_path):
    ranks.run(_renormed, tmp_path)


# ---- loading -----------------------------------------------------------------------------------------------------


def another(**fields):
    """The same base, with an adapter that is not the saved one."""
    torch.manual_seed(0)
    model = Model().double()
    torch.manual_seed(7)
    return adapted(model, **fields)


def _load(folder, fields, reshard):
    torch.manual_seed(0)
    model, one = twins(**fields)
    lora.save_adapter(shard(model), folder / "two")
    other = shard(another(**fields), reshard_after_forward=reshard)
    other(IDS)
    lora.load_adapter(other, folder / "two" if first() else folder / "not there")
    assert_same(other, one, rtol=0, atol=0)
    assert torch.equal(other(IDS), one(IDS))
    plain = another(**fields) if "init_lora_weights" in fields else base()
    if first():
        lora.load_adapter(plain, folder / "two")  # one process checks the base that two have sampled
        torch.testing.assert_close(plain(IDS), one(IDS))


def base():
    torch.manual_seed(0)
    return Model().double()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("fields", PARTS.values(), ids=PARTS)
def test_what_the_first_rank_reads_is_loaded_by_all(ranks, tmp_path, fields, reshard):
    ranks.run(_load, tmp_path, fields, reshard)


def _load_kind(folder, kind):
    torch.manual_seed(0)
    layer = make(kind)
    one = nn.Sequential(nn.Sequential(layer))
    other = copy.deepcopy(one)
    for _, parameter in other[0][0].lora_parameters():
        nn.init.ones_(parameter)
    shard(other)
    lora.load_adapter(other, lora.adapter_of(one))
    assert_same(other, one, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_over_an_adapter(ranks, tmp_path, kind):
    ranks.run(_load_kind, tmp_path, kind)


def _twice():
    torch.manual_seed(0)
    one = another()
    adapter = lora.adapter_of(one)
    before = {name: (id(tensor), tensor.detach().clone()) for name, tensor in adapter.tensors.items()}
    one = copy.deepcopy(one)
    for seed in range(2):
        torch.manual_seed(seed)
        model = shard(adapted(base()))
        for _ in range(2):
            lora.load_adapter(model, adapter)
            assert_same(model, one, rtol=0, atol=0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1 if parameter.requires_grad else 0)
    assert all(id(adapter.tensors[name]) == identity for name, (identity, _) in before.items())
    assert all(torch.equal(adapter.tensors[name], value) for name, (_, value) in before.items())


def test_an_adapter_is_loaded_again_and_again_and_stays_as_it_is(ranks):
    ranks.run(_twice)


def _load_peft(folder):
    torch.manual_seed(0)
    fields = {"target_modules": ["q_proj", "v_proj"], "splits": {}, "enable_lora": {}}
    _, one = twins(**fields)
    if first():
        lora.save_adapter(one, folder / "peft", format="peft")
    model = shard(adapted(base(), **{**fields, "splits": {"q_proj": (4, 4)}}))  # takes the form of the model's layers
    lora.load_adapter(model, folder / "peft")
    torch.testing.assert_close(model(IDS), one(IDS))


def test_an_adapter_of_peft_takes_the_form_of_a_sharded_model(ranks, tmp_path):
    ranks.run(_load_peft, tmp_path)


# ---- errors, on all ranks alike ----------------------------------------------------------------------------------


@contextlib.contextmanager
def refused(model, error, *messages):
    """The error on every rank, the model as it was, and the ranks in step."""
    before = {name: (p, whole(p).clone()) for name, p in model.named_parameters()}
    with pytest.raises(error) as caught:
        yield
    for message in messages:
        assert message in str(caught.value)
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, (type(caught.value), str(caught.value)))
    assert len(set(told)) == 1
    assert all(before[name][0] is p and torch.equal(before[name][1], whole(p)) for name, p in model.named_parameters())


def _save_refused(folder):
    model = shard(adapted())
    with refused(model, FileNotFoundError, "there is no folder"):
        lora.save_adapter(model, folder / "no folder" / "adapter")
    with refused(model, ValueError, "`format` must be one of"):
        lora.save_adapter(model, folder / "adapter", format="gguf")
    with torch.no_grad():
        model.head.lora_A.mul_(torch.nan)
        model.embed.lora_B.mul_(torch.inf)
    with pytest.raises(lora.AdapterError) as caught:
        lora.save_adapter(model, folder / "adapter")
    assert re.search(r"embed\.lora_B holds NaN or infinity\.(.|\n)*head\.lora_A holds NaN", str(caught.value))
    with torch.no_grad():
        for parameter in (model.head.lora_A, model.embed.lora_B):
            parameter.copy_(torch.zeros_like(parameter))
    lora.save_adapter(model, folder / "adapter")


def test_an_error_in_saving_is_raised_by_all_ranks_and_leaves_no_file(ranks, tmp_path):
    ranks.run(_save_refused, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def _load_refused(folder):
    model, one = twins()
    shard(model)
    with refused(model, FileNotFoundError, "there is no file"):
        lora.load_adapter(model, folder / "nothing")
    with refused(model, TypeError, "`lora_alpha` is for files that do not say it"):
        lora.load_adapter(model, lora.adapter_of(one), lora_alpha=2)
    (folder / f"{dist.get_rank()}").write_text("no adapter" * 10)
    with refused(model, lora.AdapterError, "0 is not"):
        lora.load_adapter(model, folder / f"{dist.get_rank()}")
    adapter = lora.adapter_of(one)
    del adapter.tensors["head.lora_A"], adapter.tensors["layers.0.attn.q_proj.lora_B"]
    with refused(model, lora.AdapterError, "head.lora_A is missing", "layers.0.attn.q_proj.lora_B is missing"):
        lora.load_adapter(model, adapter)
    smaller = adapted(target_modules=["q_proj", "v_proj"], r=2)
    offenders = "head: has LoRA in the model", "q_proj.lora_A must have the shape (2, 8), got (4, 8)"
    with refused(model, lora.AdapterError, *offenders):
        lora.load_adapter(model, lora.adapter_of(smaller))


def test_an_error_in_loading_is_raised_by_all_ranks_and_leaves_the_model(ranks, tmp_path):
    ranks.run(_load_refused, tmp_path)


def _another_base(folder):
    torch.manual_seed(3)
    other = shard(adapted(target_modules=["q_proj", "embed"], splits={}, enable_lora={}))
    torch.manual_seed(0)
    one = adapted(target_modules=["q_proj", "embed"], splits={}, enable_lora={})
    differs = "the base weight is not the one that the adapter was trained on"
    names = ("embed", "layers.0.attn.q_proj", "layers.1.attn.q_proj")
    with refused(other, lora.AdapterError, *(f"{name}: {differs}" for name in names)):
        lora.load_adapter(other, lora.adapter_of(one))
    lora.load_adapter(other, lora.adapter_of(one), check_base=False)


def test_another_base_is_noticed_by_all_ranks(ranks, tmp_path):
    ranks.run(_another_base, tmp_path)


def _plain_sharded(folder):
    adapter = lora.adapter_of(adapted())
    model = shard(Model().double())
    late = "is sharded; an adapter added now would not be, and each rank would train its own. Inject, then shard."
    names = [f"layers.{n}.{part}" for n in range(2) for part in ("attn.q_proj", "attn.v_proj", "mlp.up_proj")]
    offenders = [f"{name}: {late}" for name in (*names, "embed", "head")]
    with refused(model, lora.AdapterError, *offenders):
        lora.load_adapter(model, adapter, check_base=False)
    with refused(model, ValueError, *offenders):
        lora.inject(model, **FIELDS)
    model(IDS)  # leaves the root's parameters whole: plain ones
    with pytest.raises(ValueError, match=re.escape(offenders[-1])) as caught:
        lora.inject(model, **FIELDS)
    assert all(offender in str(caught.value) for offender in offenders)


def test_a_model_that_is_sharded_already_takes_no_adapter(ranks, tmp_path):
    ranks.run(_plain_sharded, tmp_path)
