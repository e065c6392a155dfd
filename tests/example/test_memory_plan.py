"""examples/memory_plan.py: what transformers' models hold and keep is what its formulas say; its errors; its page."""

import importlib
import itertools
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import memory_plan
import pytest
import torch
from counting import kept_for_backward
from decoders import decoder_of
from memory_plan import CHUNKS, ENGINES, Training, kept, kept_by_loss, plan, rows_at_a_time, tensors, total
from phi3 import fused_mlp, quantizing
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

import lora
from lora.functional import cross_entropy, linear_cross_entropy

ROOT = Path(__file__).parents[2]
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
# What is not planned: the loss itself and its weight (two float32), and a label's padding for each row.
SCALARS = 64
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


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
    terms = plan(decoder_of(config), training, "one process")
    adapter = adapter_of(real)
    ours = {id(parameter) for parameter in adapter}
    assert terms["base weights"] == nbytes(p for p in real.parameters() if id(p) not in ours)
    assert terms["adapters"] == nbytes(adapter)
    assert terms["gradients"] == nbytes(p for p in real.parameters() if p.requires_grad)
    planned = tensors(decoder_of(config), training)
    assert sum(t.times * t.values() for t in planned) == sum(p.numel() for p in real.parameters())


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw8bit": lambda parameters: importlib.import_module("bitsandbytes").optim.AdamW8bit(parameters),
    "lion": lambda parameters: importlib.import_module("bitsandbytes").optim.Lion32bit(parameters),
}


@pytest.mark.parametrize(
    ("name", "adapter_dtype", "r"),
    [
        ("adamw", "float32", 4),
        ("adamw", "bfloat16", 4),
        ("adamw8bit", "float32", 64),  # some tensors below 4,096 values, some above
        ("sgd", "float32", 4),
        ("sgd-momentum", "bfloat16", 4),
        ("lion", "float32", 4),
    ],
)
def test_gradients_and_optimizer_state_of_a_step_are_counted_exactly(name, adapter_dtype, r):
    config = config_of("llama")
    training = Training(r=r, use_dora=True, optimizer=name, adapter_dtype=adapter_dtype, base_dtype="bfloat16")
    real = built(config, training, dtype=torch.bfloat16)
    trained = [p for p in real.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[name](trained)
    ids = torch.randint(130, (2, 5))
    real(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    terms = plan(decoder_of(config), training, "one process")
    assert terms["gradients"] == nbytes(p.grad for p in trained)
    states = [item for values in optimizer.state.values() for item in values.items()]
    # (bitsandbytes' two tables of 256 values are one for all tensors.)
    state = [t for what, t in states if isinstance(t, torch.Tensor) and not what.startswith("qmap")]
    assert terms["optimizer state"] == nbytes(state)


def planned_to_be_kept(config, training):
    decoder = decoder_of(config)
    return kept(decoder, training) + kept_by_loss(decoder, training)


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
        counted = count_kept(config, training, DTYPES[base_dtype])
        assert counted == pytest.approx(planned_to_be_kept(config, training), abs=SCALARS), names


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("model", ["llama", "phi3"])
def test_what_is_kept_with_checkpointing_is_counted(model, base_dtype):
    config = config_of(model)
    training = Training(r=4, base_dtype=base_dtype, batch_size=2, seq_len=96, gradient_checkpointing=True)
    rotation = 2 * training.b * 96 * 16  # is kept by the blocks' arguments, not by autograd
    counted = count_kept(config, training, DTYPES[base_dtype])
    assert counted == pytest.approx(planned_to_be_kept(config, training) - rotation, abs=SCALARS)


def test_what_a_fused_mlp_keeps_is_counted():
    config = config_of("phi3 with groups")
    training = Training(r=4, base_dtype="float32", batch_size=2, seq_len=96, fused_mlp=True)
    counted = count_kept(config, training, torch.float32)
    assert counted == pytest.approx(planned_to_be_kept(config, training), abs=SCALARS)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("model", "base_dtype"), [("llama", "float32"), ("phi3", "bfloat16")])
def test_what_a_loss_in_chunks_keeps_is_counted(model, base_dtype, checkpointing):
    config = config_of(model)
    shape = {"batch_size": 2, "seq_len": 96, "gradient_checkpointing": checkpointing}
    training = Training(r=4, base_dtype=base_dtype, loss_in_chunks=True, **shape)
    real = built(config, training, dtype=DTYPES[base_dtype])
    if checkpointing:
        real.activation_checkpointing_enable()
    ids = torch.randint(130, (2, 96))

    def forward():
        hidden = real.model(input_ids=ids, use_cache=False).last_hidden_state
        return linear_cross_entropy(hidden, real.lm_head.weight, ids, reduction="sum")

    # The labels are the ids, which are not counted.
    rest = 8 * 2 * 96 + (2 * training.b * 96 * 16 if checkpointing else 0)
    counted = kept_for_backward(forward, ids, *real.parameters(), *real.buffers())
    assert counted == pytest.approx(planned_to_be_kept(config, training) - rest, abs=SCALARS)


@pytest.mark.parametrize("device", CHUNKS)
def test_a_chunk_has_as_many_rows_as_the_function_takes(device):
    there = torch.device({"gpu": "cuda"}.get(device, device))
    for tokens, vocabulary in itertools.product((1, 255, 256, 4096, 100_000), (130, 32064, 49152, 10**8)):
        assert rows_at_a_time(tokens, vocabulary, device) == cross_entropy._step(tokens, vocabulary, there)


def test_in_chunks_the_loss_takes_no_more_than_one_of_them():
    large = LLAMA | {"vocab_size": 200_000}
    for dtype, each in (("float32", 4), ("bfloat16", 6)):
        training = Training(base_dtype=dtype, seq_len=4096, loss_in_chunks=True, gradient_checkpointing=True)
        terms = plan(decoder_of(large), training, "one process")
        b, rows = training.b, 164  # of 25 chunks
        assert terms["logits and loss"] == 4096 * (2 * b * 64 + 20) + each * 200_000 * rows
        assert total(terms) < total(plan(decoder_of(large), replace(training, loss_in_chunks=False), "one process"))


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
    planned = plan(decoder_of(config), training, "one process")["base weights"] - rest
    # Beside codes and constants bitsandbytes keeps a text for each layer, of some hundred bytes.
    assert planned == pytest.approx(quantizing.bytes_of(packed), abs=256 * len(packed))
    assert planned < 0.6 * dense


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", ["nf4", "int8"])
def test_what_is_kept_over_quantised_weights_is_counted(base_dtype, adapter_dtype, dropout):
    config = config_of("llama", hidden_size=128, intermediate_size=192, num_attention_heads=4)
    training = Training(r=4, base_dtype=base_dtype, adapter_dtype=adapter_dtype, batch_size=2, seq_len=96)
    real = built(config, dtype=torch.bfloat16)
    quantizing.quantize(real, base_dtype, {"modules_to_save": None, "init_lora_weights": True})
    inject(real, config, training)
    for layer in real.modules():
        if isinstance(layer, lora.LoRALayer):
            layer.lora_dropout = dropout  # which keeps nothing
    constants = []
    for layer in real.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None:
            constants += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    ids = torch.randint(130, (2, 96))
    forward = lambda: real(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
    counted = kept_for_backward(forward, ids, *real.parameters(), *real.buffers(), *constants)
    assert counted == pytest.approx(planned_to_be_kept(config, training), abs=SCALARS)


# ---- two ranks ---------------------------------------------------------------------------------------------------

PLAN = Training(r=3, use_dora=True, base_dtype="bfloat16", ranks=2, batch_size=2, seq_len=96)


def of_this_rank():
    """What one rank of FSDP2 holds of a model after a step, by the plan's terms."""
    real = built(config_of("llama"), PLAN, dtype=torch.bfloat16)
    for block in real.model.layers:
        fully_shard(block)
    fully_shard(real)
    trained = [p for p in real.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(130, (2, 96))
    real(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    held = {
        "base weights": [p for p in real.parameters() if not p.requires_grad],
        "adapters": trained,
        "gradients": [p.grad for p in trained],
        "optimizer state": [t for values in optimizer.state.values() for t in values.values()],
    }
    return {
        name: nbytes(t.to_local() if isinstance(t, DTensor) else t for t in tensors) for name, tensors in held.items()
    }


def test_what_a_rank_of_fsdp2_holds_is_counted_exactly(ranks):
    fullest, other = ranks.run(of_this_rank)
    assert fullest | {"DDP's buckets": 0} == plan(decoder_of(config_of("llama")), PLAN, "FSDP2")
    assert all(other[name] <= size for name, size in fullest.items())


def buckets_of_this_rank():
    """What DDP's buckets take."""
    model = nn.parallel.DistributedDataParallel(built(config_of("llama"), PLAN, dtype=torch.bfloat16))
    ids = torch.randint(130, (2, 96))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return sum(int(size) for size in model._get_ddp_logging_data()["bucket_sizes"].split(","))


def test_ddps_buckets_are_counted_exactly(ranks):
    terms = plan(decoder_of(config_of("llama")), PLAN, "DDP")
    assert ranks.run(buckets_of_this_rank) == [terms["DDP's buckets"]] * 2
    alone = plan(decoder_of(config_of("llama")), PLAN, "one process")
    assert terms == alone | {"DDP's buckets": alone["gradients"]}


# ---- by hand -----------------------------------------------------------------------------------------------------


def test_over_ranks_that_rows_do_not_divide_the_fullest_is_planned():
    """r = 5 over 3 shards: the fullest rank has 2 of A's rows; of the output of 32 rows it has 11."""
    terms = plan(decoder_of(LLAMA), Training(r=5, target_modules=("k_proj",), ranks=3), "FSDP2")
    assert terms["adapters"] == terms["gradients"] == 3 * 4 * (2 * 64 + 11 * 5)
    assert terms["optimizer state"] == 2 * terms["gradients"] + 3 * 2 * 4


def test_the_peak_has_the_larger_of_loss_and_a_blocks_backward():
    for checkpointing, smaller in ((False, "backward of a block"), (True, "logits and loss")):
        training = Training(r=4, gradient_checkpointing=checkpointing, batch_size=2, seq_len=10, base_dtype="float32")
        terms = plan(decoder_of(LLAMA | {"vocab_size": 200}), training, "one process")
        # norms, their outputs, h, queries, keys and values, output and log-sum-exp, the MLP
        block = 2 * (4 * 64 + 4) + 2 * 4 * 64 + 7 * 4 * 4 + 4 * (64 + 32 + 32) + 4 * 64 + 4 * 4 + 4 * 4 * 96
        assert terms["logits and loss"] == 20 * (12 * 200 + 8)
        assert terms["backward of a block"] == 20 * (block * checkpointing + 2 * 4 * 96 + 3 * 4 * 64)
        assert total(terms) == sum(terms.values()) - terms[smaller]


def test_of_quantised_weights_the_largest_is_dense_for_a_moment():
    dense, packed = (plan(decoder_of(LLAMA), Training(base_dtype=d), "one process") for d in ("bfloat16", "nf4"))
    assert packed["backward of a block"] - dense["backward of a block"] == 2 * 96 * 64
    assert "base weights" not in plan(decoder_of(LLAMA), Training(base_dtype="nf4", ranks=2), "FSDP2")


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the script for a Llama's config with changes: exit code, stdout and stderr."""

    def run(*options, **changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({name: value for name, value in {**LLAMA, **changes}.items() if value is not ...}))
        return memory_plan.main([str(path), *map(str, options)]), *capsys.readouterr()

    return run


def test_what_fits_is_said(run):
    large = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    peak = {engine: total(plan(decoder_of(LLAMA | large), Training(ranks=8), engine)) / 2**30 for engine in ENGINES}
    assert peak["FSDP2"] < peak["one process"] < peak["DDP"]
    options = ["--ranks", 8, "--memory"]
    code, out, _ = run(*options, 80, **large)
    assert code == 0
    assert out.splitlines()[-3:] == [
        "one process fits in 80 GiB",
        "DDP fits in 80 GiB",
        "FSDP2 is not known to fit in 80 GiB",
    ]
    between = (peak["one process"] + peak["DDP"]) / 2
    code, out, _ = run(*options, between, **large)
    assert code == 0
    assert "one process fits in" in out
    assert "DDP does not fit in" in out
    code, out, _ = run(*options, 1, **large)
    assert code == 1
    assert out.count("does not fit in 1 GiB") == 3
    assert "≥ " in out


def test_every_setting_has_an_option(run, monkeypatch):
    seen = []
    monkeypatch.setattr(memory_plan, "plan", lambda decoder, training, engine: seen.append(training) or {})
    monkeypatch.setattr(memory_plan, "table", lambda plans: "")
    wanted = {
        "r": 3,
        "target_modules": ("qkv_proj", "gate_up_proj", "down_proj"),
        "use_dora": True,
        "freeze_A": True,
        "split_fused": True,
        "base_dtype": "nf4",
        "adapter_dtype": "bfloat16",
        "optimizer": "lion",
        "batch_size": 5,
        "seq_len": 7,
        "gradient_checkpointing": True,
        "fused_mlp": True,
        "loss_in_chunks": True,
        "device": "cpu",
        "ranks": 4,
    }
    options = []
    for name, value in wanted.items():
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        options += [f"--{name.replace('_', '-')}", *values]
    assert run(*options, model_type="phi3")[0] == 0
    assert seen[-1] == Training(**wanted)
    for options in ([], ["--target-modules", "all-linear"]):
        assert run(*options)[0] == 0
        assert seen[-1] == Training()


def test_a_config_of_another_model_is_refused_with_every_field_that_is_wrong(run):
    changes = {"hidden_size": ..., "num_hidden_layers": 0, "vocab_size": "many", "head_dim": 1.5}
    code, out, err = run(model_type="gpt2", **changes)
    assert (code, out) == (2, "")
    for said in (
        "config.json:\n",
        "`model_type` must be one of 'llama', 'mistral', 'phi3', 'qwen2', got 'gpt2'.",
        "`hidden_size` must be a positive integer, got None.",
        "`num_hidden_layers` must be a positive integer, got 0.",
        "`vocab_size` must be a positive integer, got 'many'.",
        "`head_dim` must be a positive integer, got 1.5.",
    ):
        assert said in err
    assert err.count("\n  - ") == 5


def test_heads_that_do_not_divide_are_refused(run):
    code, _, err = run(num_attention_heads=5, num_key_value_heads=3)
    assert code == 2
    assert "`num_attention_heads` (=5) must be divisible by `num_key_value_heads` (=3)." in err
    assert "without `head_dim`, `hidden_size` (=64) must be divisible by `num_attention_heads` (=5)." in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1]", "must hold a JSON object, a model's config, got a list"),
        (b"{", "must be a model's config.json: "),
        (b"\xff", "must be a model's config.json: "),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_config_is_refused(content, said, tmp_path, capsys):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    assert memory_plan.main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert str(path) in err
    assert said in err


def test_settings_that_cannot_be_are_refused_all_at_once(run):
    code, _, err = run("--r", 0, "--seq-len", -1, "--ranks", 0)
    assert code == 2
    for name, value in (("r", 0), ("seq_len", -1), ("ranks", 0)):
        assert f"`{name}` must be at least 1, got {value}." in err
    with pytest.raises(
        ValueError, match=r"(?s)`base_dtype` must be one of float32, .*`optimizer` must be one of adamw"
    ):
        Training(base_dtype="float8", optimizer="adagrad")

    options = ["--target-modules", "q_prj", "up_proj", "qkv_proj", "--split-fused", "--fused-mlp", "--use-dora"]
    code, _, err = run(*options, "--base-dtype", "nf4")
    assert code == 2
    for said in (
        "`target_modules` 'q_prj' matches no layer of a llama, which has embed_tokens, q_proj, k_proj, v_proj, o_proj, "
        "gate_proj, up_proj, down_proj, lm_head.",
        "`target_modules` 'qkv_proj' matches no layer",
        "`split_fused` is for fused projections, which a llama does not have.",
        "`fused_mlp` is for an MLP that has gate and up in one layer; a llama has not.",
        "`fused_mlp` is for an MLP that has no magnitudes; leave out either it or `use_dora`.",
        "`fused_mlp` is for an MLP that has dense weights, not nf4.",
    ):
        assert said in err
    code, _, err = run("--target-modules", "q_proj", "lm_head", "--loss-in-chunks")
    assert code == 2
    assert "`loss_in_chunks` is for a head that is not adapted; leave out either it or lm_head." in err
    code, _, err = run("--target-modules", "qkv_proj", "--fused-mlp", model_type="phi3")
    assert code == 2
    assert err == "error: plan:\n  - `fused_mlp` is for an MLP that is adapted in gate_up_proj and down_proj.\n"


# ---- the page ----------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
SHOWN = re.findall(
    r"^```console\n\$ python \.\./examples/memory_plan\.py (.*?)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL
)


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_page_shows_what_the_script_prints(command, output, capsys, monkeypatch):
    monkeypatch.chdir(ROOT / "docs")
    memory_plan.main(shlex.split(command))
    out, err = capsys.readouterr()
    assert not err
    assert out == output


def test_the_page_shows_both_models():
    assert {command.split()[0] for command, _ in SHOWN} == {"configs/phi-3-mini.json", "configs/llama-3-70b.json"}


@pytest.mark.parametrize("name", ["phi-3-mini", "llama-3-70b"])
def test_the_pages_arithmetic_is_what_the_script_says(name):
    """Each line is computed, and is to the byte what the script says of that term, and what the page says it is."""
    section = PAGE.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0]
    lines = re.findall(r"^\| ([^|]+) \| `([^`|]+)` \| ([\d.]+) \|$", section, re.MULTILINE)
    assert len(lines) == 11
    config = json.loads((ROOT / "docs" / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    training = Training(seq_len=4096, gradient_checkpointing=True, ranks=8)
    plans = {engine: plan(decoder_of(config), training, engine) for engine in ENGINES}
    for what, arithmetic, result in lines:
        engine, _, term = what.rpartition(": ")
        computed = eval(arithmetic.replace("·", "*"), {})
        assert computed == plans[engine or "one process"][term], what
        assert f"{computed / 2**30:.3f}" == result, what


# ---- the benchmark -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_measures_and_writes_its_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    memory = importlib.import_module("memory")
    memory.main("--quick", "--only", "one, float32", "--out", str(tmp_path))
    written = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))
    names = ["one, float32", "one, float32, checkpointing"]
    assert list(written["results"]) == [name + chunks for name in names for chunks in ("", ", in chunks")]
    for result in written["results"].values():
        assert result["measured"]["own"] == result["planned"]["own"]
        assert 0.8 < result["measured"]["tensors"] / result["planned"]["total"] < 1.1
    at_loss = written["results"]["one, float32"]  # where there are no gradients yet
    gradients = at_loss["planned"]["terms"]["gradients"]
    assert at_loss["planned"]["total"] - gradients == pytest.approx(at_loss["measured"]["tensors"], abs=1024)
    assert (tmp_path / "memory.md").read_text(encoding="utf-8").startswith("# memory\n")
    assert str(tmp_path) not in (tmp_path / "memory.md").read_text(encoding="utf-8")
