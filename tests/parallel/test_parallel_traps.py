"""What goes wrong with tensor parallelism and other wrappers unless somebody looks: it is right, or an error."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import randomised
from test_parallel import SPLITS, WITHOUT_EMBEDDING, adapted, gradients_of, ids, mesh, parallel, plan, whole
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lora
import lora.parallel


def layouts_that_were_not_announced():
    torch.manual_seed(5)
    layer = randomised(lora.Linear(8, 12, r=3, dtype=torch.float64), 0.5)
    x, on = torch.randn(2, 4, 8, dtype=torch.float64), mesh()
    expected = layer(x).detach()
    col = lora.parallel.ColwiseParallel(use_local_output=False)
    model = parallelize_module(nn.Sequential(layer), on, {"0": col})
    for given in (
        DTensor.from_local(x / 2, on, [Partial()], run_check=False),
        *(distribute_tensor(x, on, [Shard(dim)]) for dim in range(3)),
    ):
        torch.testing.assert_close(model(given).full_tensor(), expected)
    other = randomised(lora.Linear(8, 12, r=3, dtype=torch.float64), 0.5)
    expected = other(x).detach()
    model = parallelize_module(nn.Sequential(other), on, {"0": lora.parallel.RowwiseParallel()})
    torch.testing.assert_close(model(distribute_tensor(x, on, [Shard(0)])), expected)


def test_an_input_that_is_laid_out_otherwise_is_right_all_the_same(ranks):
    ranks.run(layouts_that_were_not_announced)


class Doubled(lora.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def forwards_of_their_own():
    torch.manual_seed(5)
    model = nn.Sequential(*(randomised(Doubled(8, 8, r=2, dtype=torch.float64), 0.5) for _ in range(2)))
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = model(x).detach()
    parallelize_module(model, mesh(), {"0": lora.parallel.ColwiseParallel(), "1": lora.parallel.RowwiseParallel()})
    torch.testing.assert_close(model(x), expected)


def test_a_forward_of_a_users_class_is_kept(ranks):
    ranks.run(forwards_of_their_own)


def starts_apart():
    torch.manual_seed(dist.get_rank())
    layer = lora.Linear(8, 12, r=3)
    parallelize_module(nn.Sequential(layer), mesh(), {"0": lora.parallel.ColwiseParallel()}, src_data_rank=None)
    return layer.lora_A.to_local().detach()


def test_adapters_that_started_apart_are_those_of_the_first_rank(ranks):
    ours, theirs = ranks.run(starts_apart)
    assert torch.equal(ours, theirs)


def goes_on_from_a_checkpoint(folder):
    model = parallel(adapted(**WITHOUT_EMBEDDING))
    expected = model(ids())
    dcp.save({"adapter": lora.lora_state_dict(model)}, checkpoint_id=folder)
    other = parallel(adapted(**WITHOUT_EMBEDDING))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + parameter.requires_grad)
    state = {"adapter": lora.lora_state_dict(other)}
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state["adapter"], strict=False)
    torch.testing.assert_close(other(ids()), expected)


def test_torchs_checkpoints_hold_divided_fused_layers(ranks, tmp_path):
    ranks.run(goes_on_from_a_checkpoint, str(tmp_path))


def clips_all():
    alone, divided = adapted(), adapted()
    styles = plan(divided)
    del styles["blocks.0.qkv"], styles["blocks.0.o"]  # these are on every rank
    parallelize_module(divided, mesh(), styles)
    for model in (alone, divided):
        model(ids()).square().mean().backward()
    expected = nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    torch.testing.assert_close(lora.parallel.clip_grad_norm_(divided, 0.1), expected)
    gradients = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    torch.testing.assert_close(gradients_of(divided), gradients)
    divided.zero_grad()
    assert lora.parallel.clip_grad_norm_(divided, 0.1) == 0


def test_gradients_are_clipped_over_divided_and_whole_layers(ranks):
    ranks.run(clips_all)


def torchs_own_style():
    layer = lora.Linear(8, 12, r=3, lora_dropout=0.5)
    model = parallelize_module(nn.Sequential(layer), mesh(), {"0": ColwiseParallel()})
    with pytest.raises(RuntimeError, match=r"would differ between ranks; use those of `lora\.parallel`"):
        model(torch.ones(2, 8))
    layer.lora_dropout = 0.0
    model(torch.ones(2, 8))
    layer.lora_dropout = 0.5
    model.eval()(torch.ones(2, 8))


def test_dropout_under_torchs_own_styles_is_refused(ranks):
    ranks.run(torchs_own_style)


def one_rank_has_another_base(folder):
    model = nn.Sequential(lora.Linear(8, 8, r=2), lora.Linear(8, 8, r=2))
    style = lora.parallel.ColwiseParallel(output_layouts=None)
    parallelize_module(model, mesh(), {"0": style})
    lora.save_adapter(model, f"{folder}/adapter.safetensors")
    with torch.no_grad():
        model[1].weight.mul_(1 + dist.get_rank())
    with pytest.raises(lora.AdapterError, match="1: the base weight is not the one"):
        lora.load_adapter(model, f"{folder}/adapter.safetensors")


def test_what_one_rank_finds_wrong_is_an_error_on_all(ranks, tmp_path):
    ranks.run(one_rank_has_another_base, str(tmp_path))


def serves(folder):
    model = parallel(adapted(**WITHOUT_EMBEDDING))
    path = f"{folder}/adapter.safetensors"
    with torch.inference_mode():
        lora.save_adapter(model, path)
        lora.load_adapter(model, path)
        assert lora.adapter_of(model).modules.keys() == lora.read_adapter(path).modules.keys()
        assert len(lora.lora_state_dict(model)) == 2 * len(lora.read_adapter(path).modules)
    model(ids()).sum().backward()


def test_files_are_written_and_read_in_inference_mode_too(ranks, tmp_path):
    ranks.run(serves, str(tmp_path))


def gathers():
    from torch.distributed.tensor.debug import CommDebugMode

    layer = lora.MergedLinear(8, sum(SPLITS), r=2, splits=SPLITS, enable_lora=True)
    model = parallelize_module(nn.Sequential(layer), mesh(), {"0": lora.parallel.MergedColwiseParallel()})
    with CommDebugMode() as counted:
        state = lora.lora_state_dict(model)
    assert sorted(state) == ["0.lora_A", "0.lora_B"]
    return counted.get_total_counts()


def test_an_adapters_state_dict_gathers_no_base_weight(ranks):
    assert ranks.run(gathers)[0] == 1, "B, whose rows are put in order"


def flattened(folder):
    model = nn.Sequential(nn.Linear(8, 8))
    wrapper = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the model is wrapped in FullyShardedDataParallel, .* `fully_shard`"):
        lora.inject(wrapper, target_modules=["0"], r=2)
    model = nn.Sequential(lora.Linear(8, 8, r=2))
    wrapper = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    other = lora.adapter_of(nn.Sequential(lora.Linear(8, 8, r=2)))
    for call, what in ((lora.save_adapter, f"{folder}/adapter.safetensors"), (lora.load_adapter, other)):
        with pytest.raises(lora.AdapterError, match=r"the model is wrapped in FullyShardedDataParallel"):
            call(wrapper, what)


def test_torchs_first_fully_sharded_data_parallel_is_refused(ranks, tmp_path):
    ranks.run(flattened, str(tmp_path))


def test_a_plan_leaves_alone_what_every_rank_has_whole_unless_it_trains():
    model = nn.ModuleDict({"norm": nn.LayerNorm(8), "up": nn.Linear(8, 8)})
    lora.inject(model, target_modules=["up"], r=2)
    words = {"norm": "replicated_with_grad_allreduce", "up": "colwise"}
    assert list(lora.parallel.plan_of(model, words)) == ["up"]
    model["norm"].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="norm: is 'replicated_with_grad_allreduce', and norm trains"):
        lora.parallel.plan_of(model, words)


def test_a_plan_refuses_tied_weights_that_train():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 8), "head": nn.Linear(8, 5, bias=False), "up": nn.Linear(8, 8)})
    model["head"].weight = model["embed"].weight
    lora.inject(model, target_modules=["up"], r=2)
    words = {"head": "colwise_gather_output", "up": "colwise"}
    assert sorted(lora.parallel.plan_of(model, words)) == ["head", "up"]
    model["head"].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"embed\.weight and head\.weight are one tied, trainable"):
        lora.parallel.plan_of(model, words)


def test_a_plan_knows_modules_behind_wrappers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.ModuleDict({"block": checkpoint_wrapper(nn.ModuleDict({"up": nn.Linear(8, 8)}))})
    styles = lora.parallel.plan_of(model, {"block.up": "colwise"})
    assert list(styles) == ["block._checkpoint_wrapped_module.up"]
    assert whole(model.get_submodule(next(iter(styles))).weight) is not None


def sparse():
    layer = lora.Embedding(6, 4, r=2, sparse=True)
    with pytest.raises(ValueError, match="`sparse` gradients are not divided"):
        parallelize_module(nn.Sequential(layer), mesh(), {"0": lora.parallel.RowwiseParallel()})


def test_sparse_gradients_are_refused(ranks):
    ranks.run(sparse)
