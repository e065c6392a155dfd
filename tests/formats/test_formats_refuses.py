"""Folders of PEFT's and flat files that are wrong: one error says all, and the model is as it was."""

import math
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import randomised
from exchange import FORMATS, flat, model_of, refused, refuses, write_peft
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy_model import snapshot

import lora
from lora.formats.expressions import pattern_problem
from lora.models.patterns import Patterns

# ---- what is wrong with a folder of PEFT's ---------------------------------------------------------------------

GOOD = {"0.lora_A.weight": torch.ones(2, 4), "0.lora_B.weight": torch.ones(3, 2)}


WRONG = {
    "B is missing": ({"0.lora_B.weight": None}, {}, "0: lora_B is missing."),
    "A is missing": ({"0.lora_A.weight": None}, {}, "0: lora_A is missing."),
    "nothing": ({"0.lora_A.weight": None, "0.lora_B.weight": None, "0.bias": torch.ones(3)}, {}, "it adapts no module"),
    "transposed": ({"0.lora_A.weight": torch.ones(4, 2)}, {}, "0: the shapes (4, 2) and (3, 2) do not fit r = 2"),
    "both transposed": (
        {"0.lora_A.weight": torch.ones(4, 2), "0.lora_B.weight": torch.ones(2, 3)},
        {},
        "0: the shapes (4, 2) and (2, 3) do not fit r = 2",
    ),
    "another in_features": ({"0.lora_A.weight": torch.ones(2, 5)}, {}, "0.lora_A must have the shape (2, 4), got"),
    "another out_features": ({"0.lora_B.weight": torch.ones(4, 2)}, {}, "0.lora_B must have the shape (3, 2), got"),
    "a vector": ({"0.lora_B.weight": torch.ones(3)}, {}, "0: lora_A and lora_B must be two matrices or two kernels"),
    "empty": ({"0.lora_B.weight": torch.ones(0, 2)}, {}, "0: lora_A and lora_B must be two matrices or two kernels"),
    "NaN": ({"0.lora_B.weight": torch.full((3, 2), float("nan"))}, {}, "0.lora_B holds NaN or infinity."),
    "infinity": ({"0.lora_A.weight": torch.full((2, 4), float("inf"))}, {}, "0.lora_A holds NaN or infinity."),
    "integers": ({"0.lora_B.weight": torch.ones(3, 2).int()}, {}, "0.lora_B must hold floating-point numbers"),
    "eight bits": ({"0.lora_B.weight": torch.ones(3, 2).to(torch.float8_e4m3fn)}, {}, "0.lora_B must be of dtype"),
    "another r": ({}, {"r": 4}, "0: the shapes (2, 4) and (3, 2) do not fit r = 4 in adapter_config.json."),
    "r of 0": ({}, {"r": 0}, "0: the shapes (2, 4) and (3, 2) do not fit r = 0"),
    "another r by pattern": ({}, {"rank_pattern": {"0": 1}}, "0: the shapes (2, 4) and (3, 2) do not fit r = 1"),
    "a module that is not there": (
        {"1.lora_A.weight": torch.ones(2, 4), "1.lora_B.weight": torch.ones(3, 2)},
        {},
        "1: there is no such module",
    ),
    "a tensor that is not there": ({"0.gate": torch.ones(3)}, {}, "0.gate: there is no such parameter or buffer"),
    "a weight of another adapter": ({"0.lora_A.other.weight": torch.ones(2, 4)}, {}, "(one without a name, other)"),
    "DoRA without magnitudes": ({}, {"use_dora": True}, "0.lora_magnitude is missing."),
    "magnitudes without DoRA": ({"0.lora_magnitude_vector": torch.ones(3)}, {}, "0.lora_magnitude is unexpected."),
    "a bias of B": ({"0.lora_B.bias": torch.ones(3)}, {}, "0.lora_B.bias: `lora_bias` is not set in the"),
    "another method": ({}, {"peft_type": "IA3"}, "`peft_type` must be 'LORA', got 'IA3'."),
    "no method": ({}, {"peft_type": None}, "`peft_type` must be 'LORA', got None."),
    "pissa": ({}, {"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa', which changes the base weight"),
    "pissa by steps": ({}, {"init_lora_weights": "pissa_niter_16"}, "`init_lora_weights` is 'pissa_niter_16'"),
    "olora": ({}, {"init_lora_weights": "olora"}, "`init_lora_weights` is 'olora'"),
    "loftq": ({}, {"init_lora_weights": "loftq"}, "`init_lora_weights` is 'loftq'"),
    "corda": ({}, {"init_lora_weights": "corda"}, "`init_lora_weights` is 'corda'"),
    "lora_ga": ({}, {"init_lora_weights": "lora_ga"}, "`init_lora_weights` is 'lora_ga'"),
    "replicated layers": ({}, {"layer_replication": [[0, 2], [1, 3]]}, "`layer_replication` is set"),
    "trained tokens": ({}, {"trainable_token_indices": [1]}, "`trainable_token_indices` is set"),
    "parameters": ({}, {"target_parameters": "0.weight"}, "`target_parameters` must be a list of names"),
    "too many parameters": ({}, {"target_parameters": ["0.a", "0.b"]}, "names 2 parameters of it (0.a, 0.b), and"),
    "a parameter of another rank": ({}, {"target_parameters": ["0.weight"], "r": 3}, "do not fit r = 3"),
    "a parameter of rank 0": ({}, {"target_parameters": ["0.weight"], "r": 0}, "do not fit r = 0"),
    "aLoRA": ({}, {"alora_invocation_tokens": [1]}, "`alora_invocation_tokens` is set"),
    "a catastrophe": ({}, {"rank_pattern": {"(a+)+$": 2}}, "`rank_pattern`: '(a+)+$' is too intricate"),
    "a catastrophe of alphas": ({}, {"alpha_pattern": {"(a|aa)+$": 2}}, "`alpha_pattern`: '(a|aa)+$' is too intr"),
    "no expression": ({}, {"rank_pattern": {"(": 2}}, "`rank_pattern`: '(' is no regular expression"),
    "a lookahead, repeated": ({}, {"rank_pattern": {"(?=0)*0": 2}}, "`rank_pattern`: '(?=0)*0' is too intricate"),
}  # fmt: skip


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize(("tensors", "config", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_in_a_folder_is_refused(tmp_path, tensors, config, message, injected):
    tensors = {name: tensor for name, tensor in (GOOD | tensors).items() if tensor is not None}
    model = nn.Sequential(nn.Linear(4, 3))
    if injected:
        lora.inject(model, target_modules=["0"], r=2)
    refuses(write_peft(tmp_path / "a", tensors, **config), message, model=model)


def test_one_error_lists_all_that_a_configuration_cannot_be(tmp_path):
    wrong = {"use_dora": 1, "use_qalora": True, "r": "8", "layer_replication": [[0, 1]], "use_rslora": 1}
    wrong |= {"init_lora_weights": "pissa", "rank_pattern": {"(a+)+": 2, "b": "2"}, "modules_to_save": "head"}
    message = refuses(write_peft(tmp_path / "a", GOOD, **wrong))
    assert message.count("\n  - ") == 9


def test_one_error_lists_all_that_tensors_cannot_be(tmp_path):
    tensors = {f"{i}.lora_{part}.weight": torch.ones(3, 3) for i in range(3) for part in "AB"}
    tensors |= {"0.lora_B.bias": torch.ones(3), "3.lora_A.weight": torch.ones(2, 4)}
    message = refuses(
        write_peft(tmp_path / "a", tensors), *[f"\n  - {i}: the shapes" for i in range(3)], "3: lora_B is m"
    )
    assert message.count("\n  - ") == 5


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"nonsense", b"[" * 100_000, b'{"r": 1' + b"0" * 5000 + b"}"]
)
def test_a_configuration_that_is_not_json_is_refused(tmp_path, content):
    write_peft(tmp_path / "a", GOOD)
    (tmp_path / "a" / "adapter_config.json").write_bytes(content)
    refuses(tmp_path / "a", "adapter_config.json", "is not JSON")


@pytest.mark.parametrize("content", ["[]", "1", "null", '"LORA"', "true", "NaN"])
def test_a_configuration_that_is_no_object_is_refused(tmp_path, content):
    write_peft(tmp_path / "a", GOOD)
    (tmp_path / "a" / "adapter_config.json").write_text(content, encoding="utf-8")
    refuses(tmp_path / "a", "must hold an object")


def test_files_that_are_missing_are_named(tmp_path):
    write_peft(tmp_path / "a", GOOD)
    (tmp_path / "a" / "adapter_config.json").unlink()
    refuses(tmp_path / "a", "there is no adapter_config.json", error=FileNotFoundError)
    write_peft(tmp_path / "a", GOOD)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    refuses(tmp_path / "a", "it has none of adapter_model.safetensors", error=FileNotFoundError)


FIELDS = ["peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "target_modules", "bias"]
FIELDS += ["rank_pattern", "alpha_pattern", "modules_to_save", "base_model_name_or_path", "init_lora_weights"]
FIELDS += [
    "use_dora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "inference_mode",
]
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 2.0, -2, True, 10**400])
anything = st.recursive(
    st.none()
    | st.booleans()
    | numbers
    | st.text(max_size=4)
    | st.sampled_from(["0", "1", "conv", "LORA", "(0)", ".*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("0"), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(FIELDS), anything, min_size=1, max_size=2), st.booleans())
def test_any_value_of_any_field_loads_rightly_or_is_refused(config, injected):
    tensors = GOOD | {"1.lora_embedding_A": torch.ones(2, 4), "1.lora_embedding_B": torch.ones(3, 2)}
    tensors |= {"conv.lora_A.weight": torch.ones(2, 1, 3), "conv.lora_B.weight": torch.ones(2, 2, 1)}
    modules = {"0": nn.Linear(4, 3), "1": nn.Embedding(4, 3), "conv": nn.Conv1d(1, 2, 3)}
    model = nn.ModuleDict(modules)
    if injected:
        lora.inject(model, target_modules=list(modules), r=2, factored=True)
    before = snapshot(model)
    with tempfile.TemporaryDirectory() as folder:
        write_peft(Path(folder, "a"), tensors, **config)
        try:
            lora.load_adapter(model, Path(folder, "a"))
        except lora.AdapterError:
            assert snapshot(model) == before
            return
    for name, module in model.items():
        lora_alpha = next(iter((config.get("alpha_pattern") or {}).values()), config.get("lora_alpha", 3))
        others = config.get("lora_alpha", 3)
        s = {alpha / (math.sqrt(2) if config.get("use_rslora") else 2) for alpha in (lora_alpha, others)}
        assert module.scaling in s, name
        assert module.r == 2


# ---- patterns --------------------------------------------------------------------------------------------------

BOMBS = ["(a+)+", "(a*)*b", "(a|aa)+", "(a|a)*", "a?" * 26, "(a|aa)" * 28, "a*a*a*a*", "(a|b|ab)" * 20, ".*" * 8 + "b"]
BOMBS += ["(" * 200 + "a" + ")" * 200 + "{9}", "[ab]*" * 30, "((a|a)(a|a))" * 12, "a{0,99}" * 9, "((a{9}){9}){9}"]


@pytest.mark.parametrize("pattern", BOMBS)
@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_take_forever_end_at_once(tmp_path, pattern, option):
    name = "a" * 450 + "!"  # as long as names in files may be
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(3, 2)}
    write_peft(tmp_path / "a", tensors, **{option: {pattern: 2}})
    start = time.thread_time()  # what else runs does not count
    refused(lambda: lora.read_adapter(tmp_path / "a"), "is too intricate to be matched safely")
    assert time.thread_time() - start < 2


USUAL = {
    r"model\.layers\.\d+\.self_attn\.(q|k|v)_proj": True,
    "q_proj": True,
    r".*\.[5-9]\.self_attn\.q_proj": True,
    r"^model\.layers\.5\.self_attn\.q_proj": True,
    r"layers\.5\..*": True,
    r"(.*)\.layers\.(\d+)\.(.*)_proj": True,
    "proj": False,
    "k_proj": False,
    "": False,
}


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_match_as_pefts(pattern):
    name = "model.layers.5.self_attn.q_proj"
    assert pattern_problem(pattern) is None
    assert Patterns({pattern: 4}).value([name], 8) == (4 if USUAL[pattern] else 8)


def test_the_first_pattern_counts():
    patterns = Patterns({"b": 1, r"a\.b": 2, "a": 3})
    assert [patterns.value([name], 0) for name in ("a.b", "a", "b", "c", "ab")] == [1, 3, 1, 0, 0]


# ---- loralib's files, as far as they need no loralib -----------------------------------------------------------


def test_a_flat_file_needs_its_lora_alpha(tmp_path):
    path = flat(tmp_path / "a", _0_lora_A=torch.ones(2, 4), _0_lora_B=torch.ones(3, 2))
    refuses(path, "it has no scaling: loralib's files say nothing of lora_alpha")
    adapter = lora.read_adapter(path, lora_alpha=8)
    assert adapter.format == "loralib"
    assert adapter.modules["0"]["scaling"] == 4


@pytest.mark.parametrize("lora_alpha", ["8", float("nan"), float("inf"), True, [8], 10**400])
def test_a_lora_alpha_that_is_no_number_is_refused(tmp_path, lora_alpha):
    path = flat(tmp_path / "a", _0_lora_A=torch.ones(2, 4), _0_lora_B=torch.ones(3, 2))
    with pytest.raises(ValueError, match="`lora_alpha` must be a finite number"):
        lora.read_adapter(path, lora_alpha=lora_alpha)


@pytest.mark.parametrize("format", FORMATS)
def test_lora_alpha_is_not_for_formats_that_say_it(tmp_path, format):
    model = model_of(lora.Linear(4, 3, r=2))
    lora.save_adapter(model, tmp_path / "a", format=format)
    before = snapshot(model)
    for call in (
        lambda: lora.read_adapter(tmp_path / "a", lora_alpha=8),
        lambda: lora.load_adapter(model, tmp_path / "a", lora_alpha=8),
        lambda: lora.load_adapter(model, lora.read_adapter(tmp_path / "a"), lora_alpha=8),
    ):
        with pytest.raises(TypeError, match="`lora_alpha` is for files that do not say it"):
            call()
    assert snapshot(model) == before


FLAT = {
    "A is missing": ({"_0_lora_B": torch.ones(3, 2)}, "0.lora_A is missing."),
    "B is missing": ({"_0_lora_A": torch.ones(2, 4)}, "0.lora_B is missing."),
    "vectors": ({"_0_lora_A": torch.ones(2), "_0_lora_B": torch.ones(2)}, "0: lora_A and lora_B must be matrices"),
    "empty": ({"_0_lora_A": torch.ones(2, 0), "_0_lora_B": torch.ones(3, 2)}, "0: lora_A and lora_B must be matrices"),
    "misfits": ({"_0_lora_A": torch.ones(3, 4), "_0_lora_B": torch.ones(3, 2)}, "do not fit each other"),
    "transposed": ({"_0_lora_A": torch.ones(4, 2), "_0_lora_B": torch.ones(2, 3)}, "do not fit each other"),
    "fused": ({"_0_lora_A": torch.ones(4, 4), "_0_lora_B": torch.ones(3, 2)}, "those of a fused layer, whose splits"),
    "another size": ({"_0_lora_A": torch.ones(2, 5), "_0_lora_B": torch.ones(3, 2)}, "0.lora_A must have the shape"),
    "NaN": ({"_0_lora_A": torch.ones(2, 4) / 0, "_0_lora_B": torch.ones(3, 2)}, "0.lora_A holds NaN"),
    "beside": ({"_0_lora_A": torch.ones(2, 4), "_0_lora_B": torch.ones(3, 2), "x": torch.ones(3)}, "x: there is no"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), FLAT.values(), ids=FLAT)
def test_what_is_wrong_in_a_flat_file_is_refused(tmp_path, tensors, message):
    path = flat(tmp_path / "a", **tensors)
    model = nn.Sequential(nn.Linear(4, 3))
    before = snapshot(model)
    refused(lambda: lora.load_adapter(model, path, lora_alpha=8), message)
    assert snapshot(model) == before


def test_the_flat_file_of_one_layer_alone_is_loaded(tmp_path):
    layer, other = randomised(lora.Linear(4, 3, r=2)), lora.Linear(4, 3, r=2)
    path = flat(tmp_path / "a", lora_A=layer.lora_A.detach(), lora_B=layer.lora_B.detach())
    lora.load_adapter(other, path, lora_alpha=3)
    assert torch.equal(other.lora_A, layer.lora_A)
    assert other.scaling == 1.5


@pytest.mark.parametrize("format", ["lora", "peft", "portable"])
def test_errors_bear_the_name_of_the_function_that_was_called(tmp_path, format):
    layer = lora.Linear(4, 4, r=2, use_dora=format == "portable")
    if format == "lora":
        nn.init.constant_(layer.lora_A, float("nan"))
    adapter = lora.adapter_of(layer)
    for function, what in ((lora.save_adapter, layer), (lora.write_adapter, adapter)):
        with pytest.raises(lora.AdapterError, match=rf"\A{function.__name__}: ") as caught:
            function(what, tmp_path / "a", format=format)
        assert str(caught.value).count("_adapter: ") == 1


# ---- errors bear the name of the function that was called -------------------------------------------------------


@pytest.mark.parametrize("format", ["lora", "peft", "portable", "diffusers"])
def test_an_error_is_the_functions_that_was_called(format, tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))  # "0" is in no model of a pipeline
    lora.inject(model, target_modules=["0"], r=2, use_dora=True)
    adapter = lora.adapter_of(model)
    if format in ("lora", "peft"):  # which have a place for magnitudes
        nn.init.constant_(model[0].lora_A, float("nan"))
        adapter.tensors["0.lora_A"] = model[0].lora_A.detach()
    calls = {
        "save_adapter": lambda: lora.save_adapter(model, tmp_path, format),
        "write_adapter": lambda: lora.write_adapter(adapter, tmp_path, format),
    }
    for name, call in calls.items():
        with pytest.raises(lora.AdapterError, match=rf"^{name}: .*, because\n") as caught:
            call()
        assert str(caught.value).count("_adapter:") == 1
