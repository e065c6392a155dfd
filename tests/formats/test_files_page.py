"""docs/files.md says which tool's files are read, written and converted: each row is tried with a file of its tool."""

import re
from pathlib import Path

import pytest
import tools
import torch
from cli_model import run
from torch import nn

import lora
from lora.adapters.formats import FORMATS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "files.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("| tool | what it writes |")[2].partition("\n\n")[0].split("\n")[2:]
ROWS = {cells[0]: cells[2:] for cells in (re.split(r"\s*\|\s*", row.strip("| ")) for row in TABLE)}


def of_ours(format):
    def write(folder):
        model = tools.nested(q_proj=nn.Linear(6, 4))
        lora.inject(model, target_modules=["q_proj"], r=2)
        lora.save_adapter(model, folder / "adapter", format=format)
        lora.eject(model)
        return tools.Written(folder / "adapter", model, {}, {})

    return write


def loralib(folder):
    torch.save({"q_proj.lora_A": torch.ones(2, 6), "q_proj.lora_B": torch.ones(4, 2)}, folder / "a.pt")
    return tools.Written(folder / "a.pt", tools.nested(q_proj=nn.Linear(6, 4)), {}, {"lora_alpha": 3})


def without_embeddings(folder):
    """Of which only the model knows that they are none of its linear layers."""
    path, *rest = tools.mlx_lm(folder)
    file = path / "adapters.safetensors"
    tensors = tools.load(file)
    tools.save(file, {name: tensor for name, tensor in tensors.items() if "embed" not in name})
    return tools.Written(path, *rest)


SAMPLES = tools.TOOLS | {
    "lora": of_ours("lora"),
    "PEFT": of_ours("peft"),
    "vLLM, llama.cpp's converter": of_ours("portable"),
    "loralib": loralib,
    "mlx-lm": without_embeddings,
}


def test_the_table_has_a_row_for_each_tool():
    assert ROWS.keys() == SAMPLES.keys()
    written = {row[2].strip('`"') for row in ROWS.values()} - {"–"}
    assert written == {name for name, format in FORMATS.items() if format.write is not None}


@pytest.mark.parametrize("tool", ROWS)
def test_a_row_says_what_is_so(tool, tmp_path, capsys):
    reads, alpha, _, inspects, converts = ROWS[tool]
    path, model, _, more = SAMPLES[tool](tmp_path)
    assert (reads, inspects) == ("yes", "yes")
    lora.load_adapter(model, path, **more)
    assert bool(more) == (alpha == "to be given")
    if alpha == "to be given":
        with pytest.raises(lora.AdapterError, match="give `lora_alpha`"):
            lora.read_adapter(path)
    elif alpha == "may be given":
        assert {m.lora_alpha for m in lora.read_adapter(path, lora_alpha=3).modules.values()} == {3}
    else:
        with pytest.raises(TypeError, match="`lora_alpha` is for files that do not say it"):
            lora.read_adapter(path, lora_alpha=3)
    options = [part for name, value in more.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert run(capsys, "inspect", path, *options)[0] == 0
    for format in ("lora", "peft"):
        code, _, error = run(capsys, "convert", path, tmp_path / format, "--format", format, *options)
        assert (code, "in Python" if "only its model knows" in error else "yes") == (
            (0, 2)[converts != "yes"],
            converts,
        )
    for format in ("lora", "peft"):
        if converts == "yes":
            again = lora.read_adapter(tmp_path / format)
            for name in again.modules:
                ours = lora.read_adapter(path, **more).delta(name)
                torch.testing.assert_close(again.delta(name), ours)


@pytest.mark.parametrize("tool", [tool for tool, row in ROWS.items() if row[2] != "–"])
def test_what_is_written_is_of_the_format_that_the_row_names(tool, tmp_path, capsys):
    format = ROWS[tool][2].strip('`"')
    sample = tools.diffusers if format == "diffusers" else of_ours("lora")
    path = sample(tmp_path).path
    assert run(capsys, "convert", path, tmp_path / "out", "--format", format)[0] == 0
    assert lora.read_adapter(tmp_path / "out").format == ("peft" if format == "portable" else format)
