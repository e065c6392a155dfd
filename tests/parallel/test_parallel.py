"""Tensor parallelism on two ranks computes what one process does, with the base model's collectives."""

import pytest
import torch
import torch.utils.checkpoint
from conftest import randomised
from releases import since
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lora
import lora.parallel
from lora.parallel.dtensor import in_model_order

SPLITS = (8, 4, 4)


class Block(nn.Module):
    """A decoder's block: fused q, k, v by 4 heads of 2 and 2 of 2, and a gated MLP with fused gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, sum(SPLITS))
        self.o = nn.Linear(8, 8)
        self.gate_up = nn.Linear(8, 24)
        self.down = nn.Linear(12, 8)

    def forward(self, x):
        width = self.qkv(x)  # (..., length, 16), or this rank's part of each split
        q, k, v = width.split([width.shape[-1] * size // sum(SPLITS) for size in SPLITS], -1)
        q, k, v = (part.unflatten(-1, (-1, 2)).transpose(-2, -3) for part in (q, k, v))  # (..., heads, length, 2)
        k, v = (part.repeat_interleave(2, -3) for part in (k, v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(heads.transpose(-2, -3).flatten(-2))
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


CONFIG = {
    "target_modules": ["embed", "qkv", "o", "gate_up", "down", "head"],
    "r": 3,
    "lora_alpha": 6,
    "splits": {"qkv": SPLITS, "gate_up": (12, 12)},
    "enable_lora": {"qkv": (True, False, True)},
}


def adapted(**changes):
    """The model with LoRA, alike on every rank."""
    torch.manual_seed(1)
    model = Model().double()
    lora.inject(model, **(CONFIG | changes))
    for layer in model.modules():
        if isinstance(layer, lora.LoRALayer):
            randomised(layer, 0.2)
    return model


def mesh():
    return init_device_mesh("cpu", (2,))


def plan(model, merged=lora.parallel.MergedColwiseParallel, col=lora.parallel.ColwiseParallel, row=None):
    row = row or lora.parallel.RowwiseParallel
    block = {"qkv": lambda: merged(SPLITS), "o": row, "gate_up": lambda: merged((12, 12)), "down": row}
    styles = {f"blocks.{n}.{name}": style() for n in range(len(model.blocks)) for name, style in block.items()}
    return styles | {"embed": row(input_layouts=Replicate()), "head": col(output_layouts=Replicate())}


def parallel(model):
    return parallelize_module(model, mesh(), plan(model))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients_of(model):
    """Gradients by name, whole, as one process has them."""
    return {
        f"{name}.{own}": in_model_order(module, own, whole(parameter.grad))
        for name, module in model.named_modules()
        for own, parameter in module._parameters.items()
        if parameter is not None and parameter.grad is not None
    }


def ids():
    return torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(3))


# ---- the model as one process has it ------------------------------------------------------------------------------


def trains_alike(changes, bias):
    alone, divided = adapted(**changes), parallel(adapted(**changes))
    if bias != "none":
        for model in (alone, divided):
            lora.mark_only_lora_as_trainable(model, bias)
    torch.testing.assert_close(divided(ids()), alone(ids()))
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (alone, divided)]
    for _ in range(3):
        for model in (alone, divided):
            model(ids()).square().mean().backward()
        expected = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.requires_grad}
        torch.testing.assert_close(gradients_of(divided), expected)
        norms = [whole(nn.utils.clip_grad_norm_(model.parameters(), 0.1)) for model in (alone, divided)]
        torch.testing.assert_close(norms[1], norms[0])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(divided(ids()), alone(ids()))


clips_exactly = since("2.12", "gradients that are divided are clipped by a factor of float32")


@clips_exactly
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_training_is_that_of_one_process(ranks, bias):
    ranks.run(trains_alike, {}, bias)


WITHOUT_EMBEDDING = {"target_modules": ["qkv", "o", "gate_up", "down", "head"]}
SETTINGS = [
    {"use_dora": True, **WITHOUT_EMBEDDING},
    {"use_rslora": True, "r": 1},
    {"freeze_A": True},
    {"splits": {"gate_up": (12, 12)}, "enable_lora": {}, "target_modules": ["gate_up", "down"]},
    {"bias": "lora_only", "r": 4, "init_lora_weights": "orthogonal"},
]


@clips_exactly
@pytest.mark.sampled(3)
@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: next(iter(changes)))
def test_training_is_that_of_one_process_with_any_setting(ranks, changes):
    ranks.run(trains_alike, changes, "none")


def serves_alike(mode):
    alone, divided = adapted(merge_weights=True).eval(), parallel(adapted(merge_weights=True).eval())
    with torch.inference_mode() if mode == "inference" else torch.no_grad():
        for step in range(3):
            torch.testing.assert_close(divided(ids()), alone(ids()))
            for model in (alone, divided):
                for name, parameter in model.named_parameters():
                    if "lora_" in name and mode != "inference":
                        parameter.mul_(1 + step / 10)
        with lora.disabled(divided), lora.disabled(alone):
            torch.testing.assert_close(divided(ids()), alone(ids()))
    assert not any(layer._merged for layer in divided.modules() if isinstance(layer, lora.LoRALayer))


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_serving_is_that_of_one_process_and_keeps_no_merged_weight(ranks, mode):
    ranks.run(serves_alike, mode)


# ---- collectives --------------------------------------------------------------------------------------------------


def collectives(model, styles):
    """How many there are in a forward pass, and in a backward pass to the input as well."""
    model = parallelize_module(model, mesh(), styles)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    with CommDebugMode() as forward:
        y = model(x)
    with CommDebugMode() as backward:
        y.sum().backward()
    return tuple({str(name): n for name, n in mode.get_comm_counts().items()} for mode in (forward, backward))


def mlp(**settings):
    """Four layers, as in two blocks' MLPs."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 8)).double()
    return model.requires_grad_(False) if not settings else (lora.inject(model, **settings), model)[1]


def counts_collectives():
    names = ["0", "1", "2", "3"]

    def styles(col, row):
        return dict(zip(names, [col(), row(), col(), row()], strict=True))

    base = collectives(mlp(), styles(ColwiseParallel, RowwiseParallel))
    settings = {"target_modules": names, "r": 2}
    ours = collectives(mlp(**settings), styles(lora.parallel.ColwiseParallel, lora.parallel.RowwiseParallel))
    torchs = collectives(mlp(**settings), styles(ColwiseParallel, RowwiseParallel))
    block = Block().double().requires_grad_(False)
    splits = {"qkv": SPLITS, "gate_up": (12, 12)}

    def merged(module):
        col, row = lora.parallel.MergedColwiseParallel, lora.parallel.RowwiseParallel
        return collectives(module, {"qkv": col(SPLITS), "o": row(), "gate_up": col((12, 12)), "down": row()})

    fused = merged(block)
    injected = Block().double()
    lora.inject(injected, target_modules=list("o"), r=2)
    with_lora = Block().double()
    lora.inject(with_lora, target_modules=["qkv", "o", "gate_up", "down"], r=2, splits=splits)
    return base, ours, torchs, fused, merged(injected), merged(with_lora)


@since("2.12", "gradients of A are added up at once")
def test_lora_needs_no_collective_that_the_base_model_does_not_need(ranks):
    base, ours, torchs, fused, partly, with_lora = ranks.run(counts_collectives)[0]
    assert ours == base
    assert sum(base[0].values()) == 2, "one for each row-parallel layer"
    assert sum(torchs[0].values()) > sum(base[0].values()), "torch's own styles need more, or this counts nothing"
    assert partly == fused == with_lora
    assert sum(fused[0].values()) == sum(fused[1].values()) == 2


def sums_gradients():
    alone, divided = adapted(), parallel(adapted())
    for model in (alone, divided):
        model(ids()).square().mean().backward()
    with CommDebugMode() as counted:
        lora.parallel.sum_gradients(divided)
    assert counted.get_total_counts() == 1
    for parameter in divided.parameters():
        assert parameter.grad is None or not any(p.is_partial() for p in parameter.grad.placements)
    expected = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.requires_grad}
    torch.testing.assert_close(gradients_of(divided), expected)
    with CommDebugMode() as counted:
        nn.utils.clip_grad_norm_(divided.parameters(), 1.0)
    return counted.get_total_counts()


def test_gradients_can_be_summed_at_once(ranks):
    assert ranks.run(sums_gradients)[0] <= 2, "only the norms themselves are added up"


def accumulates():
    alone, divided = adapted(), parallel(adapted())
    for model in (alone, divided):
        for rows in ids().split(1):
            model(rows).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.requires_grad}
    torch.testing.assert_close(gradients_of(divided), expected)


def test_gradients_accumulate(ranks):
    ranks.run(accumulates)


# ---- dropout ------------------------------------------------------------------------------------------------------


def masks(style, rank_seeds, calls=8):
    """Which of 16 features a layer's dropout keeps, as this rank sees it, call by call."""
    layer = lora.Linear(16, 32, r=16, lora_alpha=16, lora_dropout=0.5, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(16))
        layer.lora_B.copy_(torch.eye(16).repeat(2, 1))  # each half of the output is drop(x)
    model = parallelize_module(nn.Sequential(layer), mesh(), {"0": style})
    if rank_seeds:
        torch.manual_seed(100 + torch.distributed.get_rank())
    here = slice(torch.distributed.get_rank() * 8, None) if isinstance(style, RowwiseParallel) else slice(None)
    x = torch.ones(3, 16)[:, here][:, : 8 if isinstance(style, RowwiseParallel) else 16]
    return [model(x)[:, :16].detach() != 0 for _ in range(calls)]


@pytest.mark.parametrize("rank_seeds", [True, False])
def test_where_the_input_is_on_every_rank_all_drop_the_same_features(ranks, rank_seeds):
    ours, theirs = ranks.run(masks, lora.parallel.ColwiseParallel(), rank_seeds)
    assert all(map(torch.equal, ours, theirs))
    kept = torch.stack(ours)
    assert len({tuple(mask.flatten().tolist()) for mask in ours}) == len(ours), "each call has a mask of its own"
    assert 0.4 < kept.float().mean() < 0.6


@pytest.mark.parametrize("rank_seeds", [True, False])
def test_where_the_input_is_divided_each_rank_drops_features_of_its_own(ranks, rank_seeds):
    ours, theirs = ranks.run(masks, lora.parallel.RowwiseParallel(), rank_seeds)
    assert all(map(torch.equal, ours, theirs)), "the sum is on both"
    kept = torch.stack(ours)  # (calls, rows, features)
    first, second = kept[..., :8], kept[..., 8:]
    agreeing = (first == second).float().mean()
    assert 0.35 < agreeing < 0.65, "the halves' masks are independent"


def checkpointed(reentrant):
    model = parallel(adapted(lora_dropout=0.4))
    torch.manual_seed(7 + torch.distributed.get_rank())
    run = [model(ids())]
    run[0].square().mean().backward()
    before = gradients_of(model)
    model.zero_grad()
    torch.manual_seed(7 + torch.distributed.get_rank())
    x = model.embed(ids())
    for block in model.blocks:
        x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
    y = model.head(x)
    torch.rand(3)  # the generator has moved on when backward begins
    y.square().mean().backward()
    torch.testing.assert_close(y, run[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients_of(model), before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_dropout_again(ranks, reentrant):
    ranks.run(checkpointed, reentrant)
