"""`lora plan` against transformers' models: what they hold, keep and shard is what the formulas say, to the byte."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from counting import kept_for_backward
from phi3 import fused_mlp, quantizing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoConfig, AutoModelForCausalLM

import lora
import lora.parallel
from lora.planning import Rank, Training, plan
from lora.planning.decoder import decoder_of
from lora.planning.sharding import Layout
from lora.planning.terms import kept, kept_by_loss

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 130,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {"head_dim": 24},
    "qwen2": {},
    "phi3": {"num_key_value_heads": 6},
    "phi3 with groups": {},
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SEPARATE = {
    "all": "all-linear",
    "attention": ATTENTION,
    "q and v": ("q_proj", "self_attn.v_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "everything": (*ATTENTION, "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"),
}
FUSED = {
    "all": "all-linear",
    "attention": ("qkv_proj", "o_proj"),
    "q and v": ("qkv_proj",),
    "mlp": ("gate_up_proj", "mlp.down_proj"),
    "everything": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"),
}
WAYS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "LoRA-FA": {"freeze_A": True},
    "splits": {"split_fused": True},
    "splits, DoRA, frozen A": {"split_fused": True, "use_dora": True, "freeze_A": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Whatever `lora plan` does not count: the loss itself and its weight (two float32), and a label's padding for each row.
SCALARS = 64


def config_of(model, **changes):
    return {"model_type": model.split()[0].rstrip(","), **SIZES, **MODELS[model], **changes}


def built(config, training=None, device="cpu", dtype=torch.float32):
    """transformers' model of a config, adapted as the plan has it."""
    settings = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings)).to(dtype)
    if training is not None:
        inject(model, config, training)
    return model.train()


def inject(model, config, training):
    query = config["num_attention_heads"] * config.get(
        "head_dim", config["hidden_size"] // config["num_attention_heads"]
    )
    key = query * config["num_key_value_heads"] // config["num_attention_heads"]
    splits = {"qkv_proj": (query, key, key), "gate_up_proj": (config["intermediate_size"],) * 2}
    names = training.target_modules
    if training.split_fused:
        splits = {name: sizes for name, sizes in splits.items() if names == "all-linear" or name in names}
    lora.inject(
        model,
        r=training.r,
        target_modules=names,
        use_dora=training.use_dora,
        freeze_A=training.freeze_A,
        splits=splits if training.split_fused else None,
        adapter_dtype=getattr(torch, training.adapter_dtype),
    )


def all_settings():
    for model in MODELS:
        fused = model.startswith("phi3")
        for targets, names in (FUSED if fused else SEPARATE).items():
            for way, settings in WAYS.items():
                fits = (fused or "splits" not in way) and not (targets == "everything" and "tied" in model)
                if fits and (way == "LoRA" or targets == "everything"):
                    yield pytest.param(model, names, settings, id=f"{model}-{targets}-{way}")


def adapter_of(model):
    return [p for layer in model.modules() if isinstance(layer, lora.LoRALayer) for _, p in layer.lora_parameters()]


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(("model", "names", "settings"), list(all_settings()))
def test_a_models_parameters_are_counted_exactly(model, names, settings):
    config, training = config_of(model), Training(r=3, target_modules=names, **settings)
    real = built(config, training, "meta", torch.bfloat16)
    terms = plan(decoder_of(config), training, "one").terms
    adapter = adapter_of(real)
    ours = {id(parameter) for parameter in adapter}
    assert terms["base weights"] == nbytes(p for p in real.parameters() if id(p) not in ours)
    assert terms["adapters"] == nbytes(adapter)
    assert terms["gradients"] == nbytes(p for p in real.parameters() if p.requires_grad)
    planned = Rank(decoder_of(config), training, Layout()).tensors
    assert sum(t.times * t.values(Layout()) for t in planned) == sum(p.numel() for p in real.parameters())


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "lion": lambda parameters: importlib.import_module("bitsandbytes").optim.Lion32bit(parameters),
}


@pytest.mark.parametrize(
    ("name", "adapter_dtype"),
    [
        ("adamw", "float32"),
        ("adamw", "bfloat16"),
        ("sgd", "float32"),
        ("sgd-momentum", "bfloat16"),
        ("lion", "float32"),
    ],
)
def test_gradients_and_optimizer_state_of_a_step_are_counted_exactly(name, adapter_dtype):
    config = config_of("llama")
    training = Training(r=4, use_dora=True, optimizer=name, adapter_dtype=adapter_dtype, base_dtype="bfloat16")
    real = built(config, training, dtype=torch.bfloat16)
    trained = [p for p in real.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[name](trained)
    ids = torch.randint(130, (2, 5))
    real(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    terms = plan(decoder_of(config), training, "one").terms
    assert terms["gradients"] == nbytes(p.grad for p in trained)
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    assert terms["optimizer state"] == nbytes(state)


def count_kept(config, training, dtype):
    """What autograd keeps of a real step, and the tokens that it had."""
    real = built(config, training, dtype=dtype)
    if training.fused_mlp:
        fused_mlp.fuse(real)
    if training.gradient_checkpointing:
        real.activation_checkpointing_enable()
    ids = torch.randint(130, (training.batch_size, training.seq_len))
    forward = lambda: real(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
    return kept_for_backward(forward, ids, *real.parameters(), *real.buffers())


@pytest.mark.parametrize(
    ("model", "way", "base_dtype"),
    [
        ("llama", "LoRA", "float32"),
        ("llama", "LoRA", "bfloat16"),
        ("llama", "LoRA-FA", "bfloat16"),
        ("qwen2", "DoRA", "bfloat16"),
        ("mistral", "LoRA", "bfloat16"),
        ("phi3", "LoRA", "float32"),
        ("phi3 with groups", "LoRA-FA", "float32"),
        ("phi3 with groups", "splits", "bfloat16"),
        ("phi3 with groups", "splits, DoRA, frozen A", "float32"),
        ("phi3", "DoRA", "bfloat16"),
    ],
)
def test_what_autograd_keeps_of_a_step_is_counted(model, way, base_dtype):
    config = config_of(model)
    targets = FUSED if model.startswith("phi3") else SEPARATE
    for names in (targets["all"], targets["attention"], targets["everything"]):
        training = Training(r=4, target_modules=names, base_dtype=base_dtype, batch_size=2, seq_len=96, **WAYS[way])
        rank = Rank(decoder_of(config), training, Layout())
        counted = count_kept(config, training, DTYPES[base_dtype])
        assert counted == pytest.approx(kept(rank) + kept_by_loss(rank), abs=SCALARS), names


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("model", ["llama", "phi3"])
def test_what_is_kept_with_checkpointing_is_counted(model, base_dtype):
    config = config_of(model)
    training = Training(r=4, base_dtype=base_dtype, batch_size=2, seq_len=96, gradient_checkpointing=True)
    rank = Rank(decoder_of(config), training, Layout())
    rotation = 2 * rank.b * 96 * 16  # is kept by the blocks' arguments, not by autograd
    counted = count_kept(config, training, DTYPES[base_dtype])
    assert counted == pytest.approx(kept(rank) - rotation + kept_by_loss(rank), abs=SCALARS)


def test_what_a_fused_mlp_keeps_is_counted():
    config = config_of("phi3 with groups")
    training = Training(r=4, base_dtype="float32", batch_size=2, seq_len=96, fused_mlp=True)
    rank = Rank(decoder_of(config), training, Layout())
    counted = count_kept(config, training, torch.float32)
    assert counted == pytest.approx(kept(rank) + kept_by_loss(rank), abs=SCALARS)


@pytest.mark.parametrize("base_dtype", ["nf4", "int8"])
def test_quantised_weights_take_what_bitsandbytes_takes(base_dtype):
    config = config_of(
        "llama", hidden_size=128, intermediate_size=192, num_attention_heads=4
    )  # rows of whole blocks of 64
    training = Training(base_dtype=base_dtype)
    real = built(config, dtype=torch.bfloat16)
    layers = [layer for layer in real.modules() if isinstance(layer, nn.Linear) and layer is not real.lm_head]
    dense = sum(layer.weight.nbytes for layer in layers)
    quantizing.quantize(real, base_dtype, {"modules_to_save": None, "init_lora_weights": True})
    packed = [layer for layer in real.modules() if isinstance(layer, nn.Linear) and layer is not real.lm_head]
    rest = sum(p.nbytes for p in real.parameters()) - sum(layer.weight.nbytes for layer in packed)
    planned = plan(decoder_of(config), training, "one").terms["base weights"] - rest
    # Beside codes and constants bitsandbytes keeps a text for each layer, of some hundred bytes.
    assert planned == pytest.approx(quantizing.bytes_of(packed), abs=256 * len(packed))
    assert planned < 0.6 * dense


# ---- two ranks ---------------------------------------------------------------------------------------------------

PLAN = Training(r=3, use_dora=True, base_dtype="bfloat16", ranks=2, tp=2, batch_size=2, seq_len=96)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bytes_of_this_rank(tensors):
    return nbytes(map(local, tensors))


def of_this_rank(engine):
    """What one rank holds of a model after a step, by the plan's terms."""
    real = _SHARD[engine](built(config_of("llama"), PLAN, dtype=torch.bfloat16))
    trained = [p for p in real.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(130, (2, 96))
    real(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    state = [t for values in optimizer.state.values() for t in values.values()]
    return {
        "base weights": bytes_of_this_rank(p for p in real.parameters() if not p.requires_grad),
        "adapters": bytes_of_this_rank(trained),
        "gradients": bytes_of_this_rank(p.grad for p in trained),
        "optimizer state": bytes_of_this_rank(state),
    }


def kept_by_this_rank():
    """What autograd keeps of a step whose blocks are divided, and nothing else."""
    real = tensor_parallel(built(config_of("llama"), PLAN, dtype=torch.bfloat16), only="layers")
    ids = torch.randint(130, (2, 96))
    forward = lambda: real(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
    return kept_for_backward(forward, ids, *map(local, real.parameters()), *real.buffers())


def fsdp2(model):
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def tensor_parallel(model, only=""):
    words = model.tp_plan | {"model.embed_tokens": "embedding_rowwise", "lm_head": "colwise_gather_output"}
    styles = lora.parallel.plan_of(model, {name: word for name, word in words.items() if only in name})
    return parallelize_module(model, init_device_mesh("cpu", (2,)), styles)


_SHARD = {"fsdp2": fsdp2, "tp": tensor_parallel}


@pytest.mark.parametrize("engine", _SHARD)
def test_what_a_rank_holds_is_counted_exactly(engine, ranks):
    terms = plan(decoder_of(config_of("llama")), PLAN, engine).terms
    fullest, other = ranks.run(of_this_rank, engine)
    assert fullest == {name: terms[name] for name in fullest}
    assert all(other[name] <= size for name, size in fullest.items())


def test_what_a_rank_of_tensor_parallelism_keeps_is_counted(ranks):
    rank = Rank(decoder_of(config_of("llama")), PLAN, Layout(tp=2))
    for counted in ranks.run(kept_by_this_rank):
        assert counted == pytest.approx(kept(rank) + kept_by_loss(rank), abs=SCALARS)


# ---- the benchmark -----------------------------------------------------------------------------------------------


def test_the_benchmark_measures_and_writes_its_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    memory = importlib.import_module("memory")
    memory.main("--quick", "--only", "one, float32", "--out", str(tmp_path))
    written = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))
    assert list(written["results"]) == ["one, float32", "one, float32, checkpointing"]
    for result in written["results"].values():
        assert result["measured"]["own"] == result["planned"]["own"]
        assert 0.8 < result["measured"]["tensors"] / result["planned"]["total"] < 1.1
    assert (tmp_path / "memory.md").read_text(encoding="utf-8").startswith("# memory\n")
    assert str(tmp_path) not in (tmp_path / "memory.md").read_text(encoding="utf-8")
