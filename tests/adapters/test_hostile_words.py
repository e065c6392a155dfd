"""Names and values of a stranger's file in messages and reports: of one line, of bounded length, and visible."""

import json
import re

import pytest
import safetensors.torch
import torch

import lora
from lora.__main__ import main
from lora.adapters.files import checksum
from lora.errors import AdapterError, Problems, clipped, short, table, visible

HOSTILE = "\x1b[2J\x1b]0;owned\x07\n  - forged: é 名\u202eabc\u2066\r\x00\x9b31m\u2028\ud800"
UNSEEN = re.compile(r"[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text, lines=None):
    assert not UNSEEN.search(text), ascii(text)
    assert len(text) < 40_000
    assert lines is None or text.count("\n") == lines, text
    return text


def test_what_can_be_seen_stays():
    assert visible("é 中文 😀 q_proj") == "é 中文 😀 q_proj"
    assert visible(HOSTILE) == visible(visible(HOSTILE))  # an error may be put together of others


VALUES = [
    "x" * 10**7,
    10**4000,
    10**5000,
    -(10**5000),
    [[[[[1] * 9] * 9] * 9] * 9] * 9,
    {"k" * 10**6: ["v" * 10**6] * 99},
]
VALUES += [
    HOSTILE,
    [HOSTILE],
    {HOSTILE: 1},
    (1, 2),
    float("nan"),
    None,
    True,
    lora.LoraConfig(target_modules=["x" * 10**6]),
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_any_value_is_short(value):
    assert len(harmless(short(value), lines=0)) <= 160


@pytest.mark.parametrize("error", [ValueError, AdapterError])
def test_an_error_is_bounded_and_loses_nothing_of_a_small_list(error):
    few = [f"layers.{i}.q_proj: is missing." for i in range(100)]
    with pytest.raises(error) as caught, Problems("load: nothing", error) as problems:
        problems.add(*few)
    assert str(caught.value) == "load: nothing, because\n" + "\n".join(f"  - {line}" for line in few)
    for many in (few * 1000, [HOSTILE] * 10**5, ["x" * 10**6] * 50, [f"{HOSTILE}{'x' * 10**6}"] * 50):
        with pytest.raises(error) as caught, Problems(f"load: {HOSTILE}", error) as problems:
            problems.add(*many)
        *shown, last = harmless(str(caught.value)).splitlines()
        more = len(many) - (len(shown) - 1)
        assert last == f"  - and {more} more."
        assert len(shown) > 10


def test_an_error_of_a_module_that_is_called_by_something_else():
    with (
        pytest.raises(ValueError, match="forged") as caught,
        Problems("load: nothing") as problems,
        problems.at(HOSTILE),
    ):
        raise ValueError("is wrong.")
    harmless(str(caught.value), lines=1)


def test_a_table_is_as_wide_as_names_may_be():
    made = harmless(table(("name", "r"), [(HOSTILE, 1), ("x" * 10**6, 2), ("é", 3)]), lines=3)
    assert max(map(len, made.splitlines())) < 600
    assert clipped("x" * 10**6, 100).startswith("xxx")


TENSORS = {"base_model.model.c.lora_A.weight": torch.ones(2, 4), "base_model.model.c.lora_B.weight": torch.ones(6, 2)}
LONG = "9" * 3_000_000
CONFIGS = {
    "peft_type": HOSTILE,
    "r": LONG,
    "lora_alpha": [HOSTILE],
    "lora_dropout": {HOSTILE: HOSTILE},
    "use_rslora": HOSTILE,
    "use_dora": LONG,
    "init_lora_weights": "pissa_\x1b[2J\u202e" + "x" * 10**6,
    "rank_pattern": {HOSTILE: HOSTILE},
    "alpha_pattern": [HOSTILE],
    "modules_to_save": HOSTILE,
}


def peft_folder(path, tensors=TENSORS, **config):
    path.mkdir()
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}
    (path / "adapter_config.json").write_text(json.dumps(said))
    return path


@pytest.mark.parametrize("option", CONFIGS)
def test_a_configuration_of_hostile_values_is_refused_in_few_words(option, tmp_path, capsys):
    folder = peft_folder(tmp_path / "a", **{option: CONFIGS[option]})
    with pytest.raises(AdapterError) as caught:
        lora.read_adapter(folder)
    harmless(str(caught.value), lines=1)
    assert main(["inspect", str(folder)]) == 2
    harmless("".join(capsys.readouterr()))


def test_a_file_cannot_forge_a_report(tmp_path, capsys):
    named = {"base_model_name_or_path": HOSTILE, "modules_to_save": [HOSTILE]}
    assert main(["inspect", str(peft_folder(tmp_path / "a", **named))]) == 0
    said = harmless(capsys.readouterr().out)
    assert [line.split()[0] for line in said.splitlines()] == ["format:", "module", "c", "1"]
    assert "é 名" in said


BASE = {"kind": "linear", "shape": [6, 4]}
ABOUT = {"r": 2, "lora_alpha": 2, "lora_dropout": 0.0, "use_rslora": False, "scaling": 1.0, "base": BASE}
UNSOUND = [
    {key: value} for key in (*ABOUT, "use_dora", "splits", "enable_lora", "factored") for value in (HOSTILE, [LONG])
]
UNSOUND += [{"base": {**BASE, key: value}} for key in (*BASE, "groups", "sample") for value in (HOSTILE, [LONG])]
UNSOUND += [{"r": 10**4000}, {"scaling": float("nan"), "lora_alpha": float("inf")}, {"splits": [float("nan")]}]


@pytest.mark.sampled(12)
@pytest.mark.parametrize("about", UNSOUND, ids=range(len(UNSOUND)))
def test_a_report_of_something_unsound_is_harmless(about, tmp_path, capsys):
    adapter = lora.Adapter({"c": {**ABOUT, **about}}, {"c.lora_A": torch.ones(2, 4), "c.lora_B": torch.ones(6, 2)})
    said = {"modules": {"c" + HOSTILE.replace("\ud800", ""): dict(adapter.modules["c"])}, "version": 2}
    said |= {"trained_in_full": [HOSTILE], "modules_to_save": [HOSTILE], "base_model": LONG}
    metadata = {"lora": json.dumps(said, default=dict), "format": "pt"}
    metadata["sha256"] = checksum(adapter.tensors, metadata)
    safetensors.torch.save_file(adapter.tensors, tmp_path / "a", metadata)
    for arguments in ([], ["--json"]):
        assert main(["inspect", str(tmp_path / "a"), *arguments]) == 1
        out = capsys.readouterr().out
        harmless(out) if not arguments else json.loads(out)
    with pytest.raises(AdapterError) as caught:
        lora.read_adapter(tmp_path / "a")
    harmless(str(caught.value))


def test_a_path_of_a_shells_is_shown_in_one_line(tmp_path, capsys):
    name = f"x{HOSTILE}".replace("\0", "").replace("\ud800", "")
    assert main(["inspect", name]) == 2
    harmless(capsys.readouterr().err, lines=1)
    for arguments in ([name], ["inspect", "a", name]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "\n  - forged" not in harmless(capsys.readouterr().err)


@pytest.mark.parametrize(
    "about",
    [{"shape": 3}, {"shape": 3.0, "sample": None}, {"shape": None, "sample": 1.5}, {"shape": [2], "sample": True}],
)
def test_a_number_in_the_place_of_a_list_is_refused(about):
    adapter = lora.Adapter({"c": ABOUT}, {"c.lora_A": torch.ones(2, 4), "c.lora_B": torch.ones(6, 2)})
    adapter.rest["x"] = {"shape": None, "sample": None, **about}
    assert [problem.partition(" must")[0] for problem in adapter.problems()] == ["x: `rest`"]
    adapter = lora.Adapter({"c": {**ABOUT, "base": {**BASE, **about}}}, adapter.tensors)
    assert [*adapter.problems()]
