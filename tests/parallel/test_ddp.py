"""DistributedDataParallel around LoRA: two ranks train as one process does on the whole batch."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from conftest import KINDS, LAYERS, make, randomised
from releases import since
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import lora

DORA = [name for name in KINDS if "factored" not in name and "Conv3d" not in name]
# Two ways of summing up float64, and what AdamW makes of that where a gradient is next to nothing.
ROUNDING = {"rtol": 1e-9, "atol": 1e-10}


def plainly(block, x):
    return block(x)


class Net(nn.Module):
    """A small model with a head that may train in full, in float64, and some way to call its blocks."""

    def __init__(self, how=plainly):
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(11, 6, dtype=torch.float64)
        self.blocks = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.head = nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + self.how(lambda x, block=block: torch.tanh(block(x)), x)
        return self.head(self.norm(x))


SETTINGS = {"target_modules": ["embed", r"blocks.0", "blocks.1", "blocks.2"], "r": 2, "lora_alpha": 4}


def adapted(how=plainly, **settings):
    """The same model in every rank, its adapters not zero."""
    torch.manual_seed(1)
    model = Net(how)
    lora.inject(model, **{**SETTINGS, **settings})
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            randomised(module, 0.3)
    return model


def batches_of(count, size=4):
    """Batches for both ranks together."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(11, (size, 3), generator=generator) for _ in range(count)]


def share(batch):
    """This rank's part of a batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def train(model, batches, part, accumulate=1):
    """Steps of AdamW; the gradients of the first one."""
    trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, first = torch.optim.AdamW(trained.values(), lr=0.02), None
    for number, batch in enumerate(batches):
        last = number % accumulate == accumulate - 1
        with model.no_sync() if not last and isinstance(model, DDP) else nullcontext():
            model(part(batch)).square().mean().backward()
        if last:
            first = first or {name: p.grad.to_dense().clone() for name, p in trained.items() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
    return first


def assert_trains_like_one_process(model, batches, accumulate=1, twin=None, **options):
    """The wrapped model's gradients and weights after some steps are those of one process with the whole batches."""
    alone = twin or copy.deepcopy(model)
    expected = train(alone, batches, lambda batch: batch, accumulate)
    got = train(DDP(model, **options), batches, share, accumulate)
    assert any(gradient.any() for gradient in expected.values())
    torch.testing.assert_close(got, expected, **ROUNDING)
    torch.testing.assert_close(dict(model.named_parameters()), dict(alone.named_parameters()), **ROUNDING)


# ---- training ---------------------------------------------------------------------------------------------------


def each_kind_trains(kind, use_dora):
    _, arguments, shape = LAYERS[kind]
    layer = make(kind, dtype=torch.float64, use_dora=use_dora)
    lora.mark_only_lora_as_trainable(layer)
    generator = torch.Generator().manual_seed(2)
    shape = (4, *shape[1:])
    batches = [
        torch.randint(arguments["num_embeddings"], shape, generator=generator)
        if kind == "Embedding"
        else torch.randn(shape, generator=generator, dtype=torch.float64)
        for _ in range(3)
    ]
    assert_trains_like_one_process(layer, batches)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kind", "use_dora"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in DORA)])
def test_a_layer_of_each_kind_trains_as_in_one_process(ranks, kind, use_dora):
    ranks.run(each_kind_trains, kind, use_dora)


def settings_train(settings, options):
    assert_trains_like_one_process(adapted(**settings), batches_of(4), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"bucket_cap_mb": 0.0001},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"freeze_A": True},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"use_dora": True},
        {"modules_to_save": ["head", "norm"]},
    ],
    ids=str,
)
def test_a_model_trains_as_in_one_process(ranks, settings, options):
    ranks.run(settings_train, settings, options)


def accumulation_trains(options):
    assert_trains_like_one_process(adapted(), batches_of(6), accumulate=3, **options)


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=str)
def test_gradients_accumulate_without_synchronisation_and_are_synchronised_then(ranks, options):
    ranks.run(accumulation_trains, options)


def checkpointed_trains(reentrant, options):
    def how(block, x):
        return checkpoint(block, x, use_reentrant=reentrant)

    model, twin = adapted(how), adapted()
    assert_trains_like_one_process(model, batches_of(3), twin=twin, **options)


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(ranks, reentrant, options):
    ranks.run(checkpointed_trains, reentrant, options)


def sparse_trains():
    layer = make("Embedding", dtype=torch.float64, sparse=True)
    lora.mark_only_lora_as_trainable(layer, freeze_A=False)
    layer.lora_B.requires_grad_(False)
    ids = batches_of(1)[0] % 7
    alone = copy.deepcopy(layer)
    alone(ids).square().mean().backward()
    wrapped = DDP(layer)
    wrapped(share(ids)).square().mean().backward()
    return layer.lora_A.grad.is_sparse, torch.allclose(layer.lora_A.grad.to_dense(), alone.lora_A.grad.to_dense())


@since("2.12", "torch warns of sparse tensors that are not checked even if that is asked for")
def test_sparse_gradients_of_an_embedding_are_synchronised(ranks):
    assert ranks.run(sparse_trains) == [(True, True)] * 2


def reentrant_sees_what_is_unsynchronised():
    def how(block, x):  # none of the LoRA layers is called outside of it
        return checkpoint(block, x if x.requires_grad else x.detach().requires_grad_(), use_reentrant=True)

    model = adapted(how, target_modules=["blocks.0", "blocks.1", "blocks.2"])
    wrapped = DDP(model)
    model.blocks[1].lora_A = nn.Parameter(model.blocks[1].lora_A.detach().clone())
    with pytest.raises(RuntimeError, match=r"blocks\.1\.lora_A: was put in after"):
        wrapped(share(batches_of(1)[0]))


def test_a_layer_that_runs_without_gradients_first_is_looked_at_then(ranks):
    ranks.run(reentrant_sees_what_is_unsynchronised)


# ---- what each rank has, and what it shares ---------------------------------------------------------------------


def adapters_agree():
    torch.manual_seed(dist.get_rank())
    model = Net()
    model.load_state_dict(adapted(r=1).state_dict(), strict=False)  # one base
    lora.inject(model, **SETTINGS, use_dora=True)
    for block in model.blocks:
        randomised(block)
    wrapped = DDP(model)
    train(wrapped, batches_of(2), share)
    return lora.lora_state_dict(model)


def test_adapters_that_start_apart_are_the_first_ranks_and_stay_together(ranks):
    first, second = ranks.run(adapters_agree)
    assert len(first) == 4 * 3
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def masks_of(seed):
    """What of ones passes the dropout of a wrapped layer, and the gradients of A."""
    layer = lora.Linear(16, 16, r=16, lora_alpha=16, lora_dropout=0.5, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.zero_(), layer.lora_A.copy_(torch.eye(16)), layer.lora_B.copy_(torch.eye(16))
    wrapped = DDP(layer)
    torch.manual_seed(seed + dist.get_rank())
    y = wrapped(torch.ones(2, 16, dtype=torch.float64))
    y.sum().backward()
    return y.detach(), layer.lora_A.grad


def test_seeds_of_their_own_give_ranks_dropout_masks_of_their_own(ranks):
    (first, A_grad), (second, A_grad_too) = ranks.run(masks_of, 5)
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(first, second)
    # y = drop(x), so that each row of A's gradient is the mean over the ranks of the sum of the masked inputs.
    torch.testing.assert_close(A_grad, ((first + second).sum(0) / 2).expand(16, 16), **ROUNDING)
    assert torch.equal(A_grad, A_grad_too)


def is_saved_and_loaded(folder):
    wrapped = DDP(adapted(bias="lora_only", modules_to_save=["head"]))
    train(wrapped, batches_of(2), share)
    path = f"{folder}/adapter.safetensors"
    if dist.get_rank() == 0:
        lora.save_adapter(wrapped, path)
    dist.barrier()
    x = batches_of(1)[0]
    expected = wrapped(x).detach()
    plain = Net()
    torch.manual_seed(1)
    plain.load_state_dict(Net().state_dict())
    lora.load_adapter(plain, path)
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=0)

    compiled = torch.compile(wrapped, backend="eager")  # `accelerate` compiles what it has wrapped
    again = f"{folder}/adapter{dist.get_rank()}.safetensors"
    lora.save_adapter(compiled, again)
    theirs, ours = lora.read_adapter(again), lora.read_adapter(path)
    assert (theirs.modules, theirs.modules_to_save) == (ours.modules, ours.modules_to_save)
    torch.testing.assert_close(theirs.tensors, ours.tensors, rtol=0, atol=0)
    lora.load_adapter(compiled, path)

    other = adapted(bias="lora_only", modules_to_save=["head"])
    wrapped = DDP(other)
    lora.load_adapter(wrapped, path)
    torch.testing.assert_close(wrapped(x), expected, rtol=0, atol=0)
    twin = copy.deepcopy(other)
    assert train(wrapped, batches_of(2), share).keys() == train(twin, batches_of(2), lambda batch: batch).keys()
    torch.testing.assert_close(dict(other.named_parameters()), dict(twin.named_parameters()), **ROUNDING)


def test_an_adapter_is_saved_by_one_rank_and_loaded_by_all_wrapped_or_not(ranks, tmp_path):
    ranks.run(is_saved_and_loaded, str(tmp_path))
