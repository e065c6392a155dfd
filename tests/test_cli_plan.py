"""`plan`: memory by hand, errors that name every offender, and a page that says what the command says."""

import json
import re
import shlex
from pathlib import Path

import pytest
from cli_model import run

from lora.cli.plan import size
from lora.planning import Training, plan
from lora.planning.decoder import decoder_of

DOCS = Path(__file__).resolve().parents[1] / "docs"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
LLAMA = {"model_type": "llama", **SIZES}
PHI3 = {"model_type": "phi3", **SIZES}
# Of the Llama: (outputs, inputs, whether tensor parallelism shards outputs) of each layer of a block.
LAYERS = [
    (64, 64, True),
    (32, 64, True),
    (32, 64, True),
    (64, 64, False),
    (96, 64, True),
    (96, 64, True),
    (64, 96, False),
]
SHARDED = {"one": (1, 1), "ddp": (1, 1), "fsdp2": (3, 1), "tp": (1, 2), "fsdp2-tp": (3, 2)}


@pytest.fixture
def config(tmp_path):
    """Writes a config, a Llama's with changes, and gives its path."""

    def write(base=LLAMA, **changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({name: value for name, value in {**base, **changes}.items() if value is not ...}))
        return path

    return write


def planned(capsys, *arguments):
    code, out, err = run(capsys, "plan", *arguments, "--json")
    assert not err
    found = json.loads(out)
    return code, found, {made["engine"]: made for made in found["engines"]}


def rows(count, shards):
    return (count + shards - 1) // shards


@pytest.mark.parametrize("engine", SHARDED)
def test_parameters_are_what_a_hand_adds_up(engine, config, capsys):
    """r = 5 over 3 shards: the fullest rank has 2 of A's rows."""
    _, _, engines = planned(capsys, config(), "--r", 5, "--ranks", 3, "--tp", 2, "--batch-size", 1, "--seq-len", 7)
    shards, tp = SHARDED[engine]
    base = 2 * rows(100 // tp, shards) * 64 + 7 * rows(64, shards)  # embedding and head, norms
    adapters, tensors = 0, 0
    for outputs, inputs, by_outputs in LAYERS:
        out, into = (outputs // tp, inputs) if by_outputs else (outputs, inputs // tp)
        base += 3 * rows(out, shards) * into
        adapters += 3 * (rows(5, shards) * into + rows(out, shards) * 5)
        tensors += 3 * 2
    found = engines[engine]["bytes"]
    assert found["base weights"] == 2 * base
    assert found["adapters"] == found["gradients"] == 4 * adapters
    assert found["optimizer state"] == 2 * 4 * adapters + 4 * tensors
    assert found["DDP's buckets"] == (4 * adapters if engine == "ddp" else 0)
    assert engines[engine]["processes"] == {"one": 1, "ddp": 3, "fsdp2": 3, "tp": 2, "fsdp2-tp": 6}[engine]


def test_fsdp2_makes_two_blocks_whole_and_what_is_outside_of_them(config, capsys):
    _, _, engines = planned(capsys, config(), "--r", 5, "--ranks", 3, "--tp", 2)
    for engine, tp in (("fsdp2", 1), ("fsdp2-tp", 2)):
        weights, adapters = 2 * 64, 0
        for outputs, inputs, by_outputs in LAYERS:
            weights += outputs * inputs // tp
            adapters += 5 * ((outputs // tp + inputs) if by_outputs else (outputs + inputs // tp))
        outside = 2 * 100 // tp * 64 + 64
        whole = 2 * outside + 2 * (2 * weights + 4 * adapters) + 2 * 4 * adapters
        assert engines[engine]["bytes"]["FSDP2's whole weights"] == whole
    assert engines["tp"]["bytes"]["FSDP2's whole weights"] == 0


def activations(d, q, k, m, heads, b, r, *, tp=1):
    """What a block of a Llama keeps for each token: norms, their outputs, h, queries, keys, values, output, the MLP."""
    attention = (b * (q + k + k + q) + 4 * heads) // tp
    return 2 * (4 * d + 4) + 2 * b * d + 7 * b * r + attention + 4 * b * m // tp


@pytest.mark.parametrize("tp", [1, 2])
def test_activations_and_logits_are_what_a_hand_adds_up(tp, config, capsys):
    options = ["--r", 4, "--batch-size", 2, "--seq-len", 10, "--base-dtype", "float32", "--tp", 2]
    tokens, b = 2 * 10, 4
    block = tokens * activations(64, 64, 32, 96, 4, b, 4, tp=tp)
    last, rotation = tokens * (4 * 64 + 4), 2 * b * 10 * 16
    engine = "tp" if tp > 1 else "one"
    work = tokens * (2 * b * 96 // tp + 3 * b * 64)

    found = planned(capsys, config(), *options)[2][engine]["bytes"]
    assert found["activations"] == 3 * block - last + rotation + last  # nothing trains before the first norm
    assert found["logits and loss"] == tokens * (12 * 100 + 8)
    assert found["backward of a block"] == work

    found = planned(capsys, config(), *options, "--gradient-checkpointing", "--loss-parallel")[2][engine]["bytes"]
    assert found["activations"] == 3 * tokens * b * 64 + rotation + last
    assert found["logits and loss"] == tokens * (12 * 100 // tp + 8)
    assert found["backward of a block"] == block + work


def test_what_comes_one_after_the_other_is_not_added_up(config, capsys):
    for options, late in (([], "logits and loss"), (["--gradient-checkpointing"], "backward of a block")):
        _, _, engines = planned(capsys, config(), "--seq-len", 4096, *options)
        found, other = engines["one"]["bytes"], {"logits and loss", "backward of a block"} - {late}
        assert engines["one"]["total"] == sum(found.values()) - found[other.pop()]


@pytest.mark.parametrize(
    ("options", "dearer"),
    [
        (["--use-dora"], True),
        (["--freeze-A"], False),
        (["--adapter-dtype", "bfloat16"], False),
        (["--optimizer", "sgd"], False),
        (["--base-dtype", "float32"], True),
        (["--r", "32"], True),
        (["--target-modules", "q_proj", "mlp.up_proj"], False),
        (["--target-modules", "all-linear", "--gradient-checkpointing"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_settings_that_save_memory_do_and_others_do_not(options, dearer, config, capsys):
    total = planned(capsys, config())[2]["one"]["total"]
    changed = planned(capsys, config(), *options)[2]["one"]["total"]
    assert (changed > total) is dearer
    assert changed != total


def test_a_fused_mlp_keeps_neither_the_activation_nor_the_product(config, capsys):
    options = ["--batch-size", 2, "--seq-len", 10]
    plain = planned(capsys, config(PHI3), *options)[2]["one"]["bytes"]["activations"]
    fused = planned(capsys, config(PHI3), *options, "--fused-mlp")[2]["one"]["bytes"]["activations"]
    assert plain - fused == 3 * 20 * 2 * (2 * 96)


def test_an_update_for_each_split_has_an_A_of_its_own(config, capsys):
    one = planned(capsys, config(PHI3), "--r", 4)[1]["parameters"]["adapters"]
    split = planned(capsys, config(PHI3), "--r", 4, "--split-fused")[1]["parameters"]["adapters"]
    assert split - one == 3 * 4 * 64 * (2 + 1)


def test_only_engines_with_enough_ranks_are_shown(config, capsys):
    assert list(planned(capsys, config())[2]) == ["one"]
    assert list(planned(capsys, config(), "--ranks", 2)[2]) == ["one", "ddp", "fsdp2"]
    assert list(planned(capsys, config(), "--tp", 2)[2]) == ["one", "tp"]
    assert list(planned(capsys, config(), "--tp", 2, "--ranks", 2)[2]) == list(SHARDED)
    assert list(planned(capsys, config(), "--tp", 2, "--engine", "tp")[2]) == ["tp"]


def test_the_first_engine_that_fits_is_named(config, capsys):
    path, options = config(num_hidden_layers=40), ["--seq-len", 8, "--ranks", 2, "--tp", 2]
    totals = {name: made["total"] for name, made in planned(capsys, path, *options)[2].items()}
    assert totals["fsdp2-tp"] < totals["fsdp2"] < totals["one"] < totals["ddp"]
    for memory, fits in ((totals["ddp"], "one"), (totals["one"] - 1, "fsdp2"), (totals["fsdp2-tp"], "fsdp2-tp")):
        code, found, _ = planned(capsys, path, *options, "--memory", memory)
        assert (code, found["fits"]) == (0, fits)
    code, out, _ = run(capsys, "plan", path, *options, "--memory", totals["one"] - 1)
    assert code == 0
    assert re.search(r"^the first that fits in [\d.]+ MiB: FSDP2 over 2, with [\d.]+ MiB on each rank$", out, re.M)

    code, found, _ = planned(capsys, path, *options, "--memory", totals["fsdp2-tp"] - 1)
    assert (code, found["fits"]) == (1, None)
    code, out, _ = run(capsys, "plan", path, *options, "--memory", totals["fsdp2-tp"] - 1)
    assert code == 1
    assert "none fits in" in out
    assert "the least is FSDP2 2 × TP 2" in out
    assert out.splitlines()[-1] == (
        "less is taken with more ranks, a shorter --seq-len, --gradient-checkpointing, --base-dtype nf4"
    )
    _, out, _ = run(capsys, "plan", path, "--memory", 1, "--base-dtype", "nf4", "--gradient-checkpointing")
    assert out.splitlines()[-1] == "less is taken with more ranks, a shorter --seq-len"


def test_sizes_are_read_with_their_units():
    read = {text: size(text) for text in ("24GiB", "24GB", "24 g", "1.5MiB", "2TiB", "7kb", "512", "3B")}
    assert list(read.values()) == [24 * 2**30, 24 * 10**9, 24 * 2**30, 3 * 2**19, 2**41, 7000, 512, 3]


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "24 apples", "1e9", "1.2.3G"])
def test_other_sizes_are_refused(text, config, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(capsys, "plan", config(), f"--memory={text}")
    assert stopped.value.code == 2
    assert "must be a size such as 24GiB, 24GB or 500MiB" in capsys.readouterr().err


def test_an_engine_that_cannot_shard_a_model_says_why_and_the_others_plan(config, capsys):
    path = config(num_attention_heads=9, num_key_value_heads=3, head_dim=8, vocab_size=101)
    _, _, engines = planned(capsys, path, "--tp", 2)
    assert engines["tp"]["problems"] == [
        "`num_attention_heads` (=9) must be divisible by `tp` (=2).",
        "`num_key_value_heads` (=3) must be divisible by `tp` (=2).",
        "`vocab_size` (=101) must be divisible by `tp` (=2).",
    ]
    assert (engines["tp"]["total"], engines["one"]["problems"]) == (None, [])
    code, out, _ = run(capsys, "plan", path, "--tp", 2)
    assert code == 0
    assert "TP 2: `vocab_size` (=101) must be divisible by `tp` (=2)." in out
    code, out, err = run(capsys, "plan", path, "--tp", 2, "--engine", "tp")
    assert (code, out) == (2, "")
    assert err.count("must be divisible by `tp` (=2)") == 3


def test_how_quantised_weights_are_sharded_is_not_known(config, capsys):
    _, _, engines = planned(capsys, config(), "--base-dtype", "nf4", "--ranks", 2, "--tp", 2)
    problem = "how nf4 weights are sharded is not known."
    assert {name for name, made in engines.items() if made["problems"] == [problem]} == {"fsdp2", "tp", "fsdp2-tp"}


def test_a_config_of_another_model_is_refused_with_every_field_that_is_wrong(config, capsys):
    path = config(model_type="gpt2", hidden_size=..., num_hidden_layers=0, vocab_size="many", head_dim=1.5)
    code, out, err = run(capsys, "plan", path)
    assert (code, out) == (2, "")
    for said in (
        "`model_type` must be one of 'llama', 'mistral', 'phi3', 'qwen2', got 'gpt2'.",
        "`hidden_size` must be a positive integer, got None.",
        "`num_hidden_layers` must be a positive integer, got 0.",
        "`vocab_size` must be a positive integer, got 'many'.",
        "`head_dim` must be a positive integer, got 1.5.",
    ):
        assert said in err
    assert err.count("\n  - ") == 5


def test_heads_that_do_not_divide_are_refused(config, capsys):
    code, _, err = run(capsys, "plan", config(num_attention_heads=5, num_key_value_heads=3))
    assert code == 2
    assert "`num_attention_heads` (=5) must be divisible by `num_key_value_heads` (=3)." in err
    assert "`hidden_size` (=64) must be divisible by `num_attention_heads` (=5), or `head_dim` be given." in err


@pytest.mark.parametrize(
    ("content", "said"),
    [("[1]", "must hold a JSON object, a model's config, got a list"), ("{", "must be a model's config.json: ")],
)
def test_a_file_that_is_no_config_is_refused(content, said, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(content)
    code, out, err = run(capsys, "plan", path)
    assert (code, out) == (2, "")
    assert said in err


def test_settings_that_cannot_be_are_refused_all_at_once(config, capsys):
    code, _, err = run(capsys, "plan", config(), "--r", 0, "--seq-len", -1, "--ranks", 0)
    assert code == 2
    for name, value in (("r", 0), ("seq_len", -1), ("ranks", 0)):
        assert f"`{name}` must be at least 1, got {value}." in err

    options = ["--target-modules", "q_prj", "up_proj", "qkv_proj", "--split-fused", "--fused-mlp", "--use-dora"]
    code, _, err = run(capsys, "plan", config(), *options, "--base-dtype", "nf4")
    assert code == 2
    for said in (
        "`target_modules` 'q_prj' matches no layer of a llama (did you mean 'q_proj'",
        "`target_modules` 'qkv_proj' matches no layer",
        "`split_fused` is for fused projections, which a llama has not.",
        "`fused_mlp` is for an MLP that has gate and up in one layer, which a llama has not.",
        "`fused_mlp` is for an MLP that has no magnitudes; leave out either it or `use_dora`.",
        "`fused_mlp` is for an MLP that has dense weights, not nf4.",
    ):
        assert said in err
    code, _, err = run(capsys, "plan", config(PHI3), "--target-modules", "qkv_proj", "--fused-mlp")
    assert code == 2
    assert "`fused_mlp` is for an MLP that is adapted in gate_up_proj and down_proj." in err


def test_choices_of_a_library_user_are_checked_too():
    with pytest.raises(
        ValueError, match=r"(?s)`base_dtype` must be one of float32, .*`optimizer` must be one of adamw, "
    ):
        Training(base_dtype="float8", optimizer="adagrad")
    with pytest.raises(ValueError, match="'q' matches no layer"):
        plan(decoder_of(LLAMA), Training(target_modules=("q",)), "one")


def test_help_has_every_formula(capsys):
    with pytest.raises(SystemExit):
        run(capsys, "plan", "--help")
    out = capsys.readouterr().out
    for formula in ("T·V·(4 log-softmax + 8 its gradients)", "2·b·m/t", "2 · a, and 4 for each tensor", "⌈rows/N⌉"):
        assert formula in out


# ---- the page ----------------------------------------------------------------------------------------------------

PAGE = (DOCS / "memory.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^```console\n\$ lora (plan .*?)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_page_shows_what_the_command_prints(command, output, capsys, monkeypatch):
    monkeypatch.chdir(DOCS)
    _, out, err = run(capsys, *shlex.split(command))
    assert not err
    assert [line.rstrip() for line in out.splitlines()] == output.splitlines()


def test_the_page_shows_both_models():
    assert {command.split()[1] for command, _ in SHOWN} >= {"configs/phi-3-mini.json", "configs/llama-3-70b.json"}


@pytest.mark.parametrize("name", ["phi-3-mini", "llama-3-70b"])
def test_the_pages_arithmetic_is_what_the_command_says(name):
    """Each line is computed, and is to the byte what the command says of that term, and what the page says it is."""
    section = PAGE.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0]
    lines = re.findall(r"^\| ([^|]+) \| `([^`|]+)` \| ([\d.]+) \|$", section, re.MULTILINE)
    assert len(lines) == 19
    config = json.loads((DOCS / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    settings = {"seq_len": 4096, "gradient_checkpointing": True, "ranks": 8, "tp": 8}
    plans = {engine: plan(decoder_of(config), Training(**settings), engine) for engine in SHARDED}
    for what, arithmetic, result in lines:
        engine, _, term = what.strip().partition(": ")
        computed = eval(arithmetic.replace("·", "*").replace("×", "*").replace(",", ""), {})
        assert computed == plans[engine].terms[term], what
        assert f"{computed / 2**30:.3f}" == result, what
