"""Tensor parallelism: kinds of layers, state dicts and files, and what is refused."""

import copy

import pytest
import torch
from conftest import randomised
from releases import since
from test_parallel import SPLITS, WITHOUT_EMBEDDING, Block, adapted, gradients_of, ids, mesh, parallel, plan, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import lora
import lora.parallel

STYLES = {"colwise": lora.parallel.ColwiseParallel, "rowwise": lora.parallel.RowwiseParallel}
LAYERS = {
    "linear": (lambda **k: lora.Linear(6, 10, r=3, **k), lambda: torch.randn(2, 4, 6)),
    "odd sizes": (lambda **k: lora.Linear(5, 7, r=3, **k), lambda: torch.randn(2, 5)),
    "fewer outputs than ranks": (lambda **k: lora.Linear(4, 1, r=2, **k), lambda: torch.randn(2, 4)),
    "without bias": (lambda **k: lora.Linear(6, 10, r=3, bias=False, **k), lambda: torch.randn(6)),
    "transposed": (lambda **k: lora.Linear(6, 10, r=3, fan_in_fan_out=True, **k), lambda: torch.randn(3, 6)),
    "dora": (lambda **k: lora.Linear(6, 10, r=3, use_dora=True, **k), lambda: torch.randn(3, 6)),
    "embedding": (lambda **k: lora.Embedding(11, 6, r=3, padding_idx=9, **k), lambda: torch.randint(11, (4, 5))),
    "embedding without rows": (lambda **k: lora.Embedding(1, 6, r=3, **k), lambda: torch.zeros(4, dtype=torch.int64)),
}


def is_that_of_one_process(kind, style):
    make, example = LAYERS[kind]
    torch.manual_seed(5)
    layer = randomised(make(dtype=torch.float64), 0.5)
    other = randomised(make(dtype=torch.float64), 0.5)
    other.load_state_dict(layer.state_dict())
    x = example()
    x = x.double() if x.is_floating_point() else x
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    divided = parallelize_module(nn.Sequential(other), mesh(), {"0": STYLES[style](**layouts)})
    for model, x in zip((layer, divided), inputs, strict=True):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 1 or parameter.shape[0] == 3 or parameter.shape[1:] == (3,))
        model(x).square().sum().backward()
    torch.testing.assert_close(divided(inputs[0]), layer(inputs[0]))
    if inputs[0].is_floating_point():
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    expected = {f"0.{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients_of(divided), expected)
    assert len(expected) >= 1
    with torch.no_grad(), lora.disabled(divided), lora.disabled(layer):
        torch.testing.assert_close(divided(inputs[0]), layer(inputs[0]))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_divided_layer_is_that_of_one_process(ranks, kind, style):
    ranks.run(is_that_of_one_process, kind, style)


def start_sees_a_whole_layer():
    seen = []

    def start(layer):
        seen.append((type(layer), layer.forward(torch.ones(6)), layer.lora_A.shape))
        nn.init.ones_(layer.lora_A)
        nn.init.normal_(layer.lora_B)

    layer = lora.Linear(6, 10, r=3, use_dora=True, init_lora_weights=start)
    one = copy.deepcopy(layer)
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(nn.Sequential(layer), both["tp"], {"0": lora.parallel.ColwiseParallel()})
    fully_shard(layer, mesh=both["dp"])
    seen.clear()
    layer.lora_start_adapter()
    assert [(cls, shape) for cls, _, shape in seen] == [(lora.Linear, (3, 6))]
    torch.testing.assert_close(seen[0][1], one(torch.ones(6)))
    assert torch.equal(whole(layer.lora_A), torch.ones(3, 6))
    return whole(layer.lora_B).detach()


def test_a_start_of_a_users_own_sees_a_whole_layer(ranks):
    first, second = ranks.run(start_sees_a_whole_layer)
    assert torch.equal(first, second)


def places():
    from torch.distributed.tensor import Partial

    model = parallel(adapted(use_dora=True, **WITHOUT_EMBEDDING))
    seen = {name: (p.placements[0], p.to_local().shape) for name, p in model.blocks[0].named_parameters()}
    model(ids()).sum().backward()
    block = model.blocks[0]
    gradients = block.qkv.lora_A.grad.placements, block.o.lora_B.grad.placements, block.qkv.lora_B.grad.placements
    assert gradients == ((Partial(),), (Partial(),), (Shard(0),))
    return {name: (str(placement), tuple(shape)) for name, (placement, shape) in seen.items()}


@since("2.12", "gradients of A are added up at once")
def test_the_adapter_is_divided_as_the_base_is(ranks):
    seen = ranks.run(places)[0]
    shard, everywhere = "S({})".format, "R"
    assert seen["qkv.weight"] == (shard(0), (8, 8))
    assert seen["qkv.lora_A"] == (everywhere, (6, 8))
    assert seen["qkv.lora_B"] == (shard(0), (6, 3)), "4 rows of q and 2 of v"
    assert seen["qkv.lora_magnitude"] == (shard(0), (6,))
    assert seen["o.weight"] == (shard(1), (8, 4))
    assert seen["o.lora_A"] == (shard(1), (3, 4))
    assert seen["o.lora_B"] == (everywhere, (8, 3))
    assert seen["o.bias"] == (everywhere, (8,))


def plain_layers_are_torchs():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), lora.Linear(6, 4), nn.Linear(4, sum(SPLITS))).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = model(x)
    styles = {"0": lora.parallel.ColwiseParallel(), "1": lora.parallel.RowwiseParallel()}
    styles["2"] = lora.parallel.MergedColwiseParallel(SPLITS, output_layouts=Replicate())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = parallelize_module(model, mesh(), styles)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close({name: whole(tensor) for name, tensor in model.state_dict().items()}, state)


def test_layers_without_lora_are_divided_as_torch_does(ranks):
    ranks.run(plain_layers_are_torchs)


def single_update_of_a_fused_layer():
    torch.manual_seed(5)
    layer = randomised(lora.Linear(8, sum(SPLITS), r=3, dtype=torch.float64), 0.5)
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = layer(x)
    layout = {"output_layouts": Replicate(), "use_local_output": False}
    style = lora.parallel.MergedColwiseParallel(SPLITS, **layout)
    model = parallelize_module(nn.Sequential(layer), mesh(), {"0": style})
    torch.testing.assert_close(model(x).to_local(), expected)


def test_a_fused_layer_may_have_one_update_for_all(ranks):
    ranks.run(single_update_of_a_fused_layer)


def along_the_sequence():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)).double()
    lora.inject(model, target_modules=["0", "1"], r=3)
    for layer in model:
        randomised(layer, 0.3)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    expected = model(x)
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    col = lora.parallel.ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
    row = lora.parallel.RowwiseParallel(output_layouts=Shard(1))
    parallelize_module(model, mesh(), {"0": col, "1": row})
    y = model(x.chunk(2, 1)[torch.distributed.get_rank()])
    torch.testing.assert_close(y, expected.chunk(2, 1)[torch.distributed.get_rank()])
    y.square().sum().backward()
    torch.testing.assert_close(gradients_of(model), gradients)


def test_the_sequence_may_be_divided_between_layers(ranks):
    ranks.run(along_the_sequence)


def keeps_its_adapter():
    model = parallel(adapted(**WITHOUT_EMBEDDING))
    expected = model(ids())
    for take_out in (lora.eject, lora.merge):
        with pytest.raises(ValueError, match=r"blocks.0.qkv: .*\n.*blocks.0.o: "):
            take_out(model)
    torch.testing.assert_close(model(ids()), expected, rtol=0, atol=0)


def test_eject_and_merge_are_for_whole_models(ranks):
    ranks.run(keeps_its_adapter)


# ---- state dicts and files ----------------------------------------------------------------------------------------


def states_are_those_of_one_process(folder):
    alone, divided = adapted(bias="all", use_dora=True, **WITHOUT_EMBEDDING), None
    divided = parallel(adapted(bias="all", use_dora=True, **WITHOUT_EMBEDDING))
    expected = alone.state_dict()
    torch.testing.assert_close({name: whole(tensor) for name, tensor in divided.state_dict().items()}, expected)
    adapters = [lora.lora_state_dict(model, bias="all") for model in (divided, alone)]
    torch.testing.assert_close(*({name: whole(tensor) for name, tensor in state.items()} for state in adapters))
    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    torch.testing.assert_close(dict(get_model_state_dict(divided, options=options)), dict(expected))
    with torch.no_grad():
        for model in (alone, divided):
            for parameter in model.parameters():
                parameter.mul_(2)
    changed = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    blank = parallel(adapted(bias="all", use_dora=True, **WITHOUT_EMBEDDING))
    blank.load_state_dict(divided.state_dict())
    torch.testing.assert_close(blank(ids()), alone(ids()))
    blank = parallel(adapted(bias="all", use_dora=True, **WITHOUT_EMBEDDING))
    set_model_state_dict(blank, changed, options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(blank(ids()), alone(ids()))

    path, ours = f"{folder}/divided.safetensors", f"{folder}/alone-{torch.distributed.get_rank()}.safetensors"
    lora.save_adapter(divided, path)
    lora.save_adapter(alone, ours)
    theirs, ours = lora.read_adapter(path), lora.read_adapter(ours)
    torch.testing.assert_close(theirs.tensors, ours.tensors, rtol=0, atol=0)
    assert theirs.modules == ours.modules
    blank = parallel(adapted(bias="all", use_dora=True, **WITHOUT_EMBEDDING))
    lora.load_adapter(blank, path, check_base=False)
    with torch.no_grad():
        for name, parameter in blank.named_parameters():
            if name.endswith(
                ("qkv.weight", "gate_up.weight", "o.weight", "down.weight", "head.weight", "embed.weight")
            ):
                parameter.mul_(2)
    torch.testing.assert_close(blank(ids()), alone(ids()))


def test_state_dicts_and_files_are_those_of_one_process(ranks, tmp_path):
    ranks.run(states_are_those_of_one_process, str(tmp_path))


def compiles():
    torch._dynamo.reset()
    model = parallel(adapted(use_dora=True, **WITHOUT_EMBEDDING))
    block = model.blocks[0]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    gradients = []
    for run in (compiled, block):
        run(x).square().sum().backward()
        gradients.append(gradients_of(block))
        block.zero_grad()
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_a_divided_block_compiles_without_a_graph_break(ranks):
    ranks.run(compiles)


# ---- refusals -----------------------------------------------------------------------------------------------------


def refuses():
    def error(module, style, on=None):
        with pytest.raises(ValueError, match=r"\S") as caught:
            parallelize_module(nn.Sequential(module), on or mesh(), {"0": style})
        return str(caught.value)

    col, row, merged = lora.parallel.ColwiseParallel, lora.parallel.RowwiseParallel, lora.parallel.MergedColwiseParallel
    started = nn.Sequential(nn.Linear(4, 4))
    lora.inject(started, target_modules=["0"], r=2, init_lora_weights="pissa")
    sharded = lora.Linear(4, 4, r=2)
    fully_shard(sharded, mesh=mesh())
    qkv = {"splits": SPLITS, "enable_lora": True, "r": 2}
    with pytest.raises(ValueError, match=r"`use_local_output=False` needs `output_layouts=Replicate\(\)`"):
        merged(use_local_output=False)
    before = lora.MergedLinear(8, 16, **{**qkv, "splits": (7, 5, 4)})
    kept = before.weight
    odd = error(before, merged())
    assert before.weight is kept, "left as it was"
    assert not hasattr(before, "divided_splits")
    return {
        "merged": error(lora.MergedLinear(8, 16, **qkv), col()),
        "conv": error(lora.Conv2d(4, 4, 3, r=2), col()),
        "started": error(started[0], row()),
        "sharded": error(sharded, col()),
        "dora": error(lora.Embedding(6, 4, r=2, use_dora=True), row()),
        "odd": odd,
        "unknown": error(lora.Linear(8, 16, r=2), merged()),
        "wrong": error(lora.Linear(8, 16, r=2), merged((8, 4))),
        "other": error(lora.MergedLinear(8, 16, **qkv), merged((4, 4, 8))),
        "embedding": error(nn.Embedding(8, 16), merged((8, 8))),
    }


def test_what_cannot_be_divided_is_refused(ranks):
    told = ranks.run(refuses)[0]
    assert told["merged"] == "a MergedLinear is divided split by split: use `lora.parallel.MergedColwiseParallel`."
    assert "linear layers and embeddings can be" in told["conv"]
    assert "it starts from its base weight or from data (`init_lora_weights='pissa'`)" in told["started"]
    assert "it is sharded already; tensor parallelism comes first, then `fully_shard`" in told["sharded"]
    assert "`use_dora` where the vocabulary is divided" in told["dora"]
    assert told["odd"] == "each of the `splits` (=(7, 5, 4)) must be divisible by the number of ranks (=2)."
    assert told["unknown"] == "a Linear does not say how it is split; give `splits`."
    assert told["wrong"] == "`splits` (=(8, 4)) must add up to `out_features` (=16)."
    assert told["other"] == "`splits` (=(4, 4, 8)) disagrees with the layer's own splits (=(8, 4, 4))."
    assert told["embedding"] == "`MergedColwiseParallel` is for linear layers, not for an Embedding."


def test_a_plan_in_words_becomes_styles():
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()]), "head": nn.Linear(8, 11)})
    lora.inject(model, target_modules=["qkv", "o"], r=2, splits={"qkv": SPLITS})
    words = {"blocks.*.qkv": "colwise_gather_output", "blocks.*.o": "rowwise_split_input", "head": "colwise"}
    styles = lora.parallel.plan_of(model, words)
    assert sorted(styles) == ["blocks.0.o", "blocks.0.qkv", "blocks.1.o", "blocks.1.qkv", "head"]
    assert type(styles["blocks.1.qkv"]) is lora.parallel.MergedColwiseParallel
    assert styles["blocks.1.qkv"].output_layouts == (Replicate(),)
    assert styles["blocks.0.o"].input_layouts == (Replicate(),)
    assert type(styles["head"]) is lora.parallel.ColwiseParallel
    with pytest.raises(ValueError, match="there is no plan for this ModuleDict"):
        lora.parallel.plan_of(model)
    with pytest.raises(ValueError, match=r"(?s)blocks\.\*\.x: matches no module.*no style is called 'diagonal'"):
        lora.parallel.plan_of(model, {"blocks.*.x": "colwise", "head": "diagonal"})


def test_the_plan_of_the_tests_divides_every_layer():
    model = adapted()
    adapted_names = {name for name, module in model.named_modules() if isinstance(module, lora.LoRALayer)}
    assert set(plan(model)) == adapted_names
