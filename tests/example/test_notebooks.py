"""examples/*.ipynb: each runs from its first cell to its last, on a toy, and is committed clean."""

import json
import re
from pathlib import Path

import notebooks
import pytest
from phi3 import tiny

EXAMPLES = sorted((notebooks.ROOT / "examples").glob("*.ipynb"))
# What a short form sets, beside the model and the data.
SHORT = {
    "phi3_chat": {"steps": 2, "steps_in_4_bits": 2, "new_tokens": 4, "output_dir": "output"},
    "adapters": {"steps": 2},
}


@pytest.fixture
def toy(tmp_path):
    """A model of sizes that NF4 packs, and a few conversations."""
    tiny.model(heads=8).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    colours = ["red", "green", "blue", "amber", "violet"]
    chats = [[f"what comes after {one}?", other, "sure?", f"{other}, yes"] for one in colours for other in colours]
    roles = ["user", "assistant"] * 2
    with open(tmp_path / "chats.jsonl", "w", encoding="utf-8") as file:
        for chat in chats:
            messages = [{"role": role, "content": text} for role, text in zip(roles, chat, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")
    return {"model_name": str(tmp_path / "model"), "data_name": str(tmp_path / "chats.jsonl")}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_from_its_first_cell_to_its_last(path, toy, tmp_path):
    before = path.read_bytes()
    short = {key: str(tmp_path / value) if key == "output_dir" else value for key, value in SHORT[path.stem].items()}
    done = notebooks.run(path, {**toy, **short}, timeout=300)
    code = [cell for cell in done.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    shown = [kind for cell in code for output in cell.outputs for kind in output.get("data", {})]
    assert "image/png" in shown
    assert path.read_bytes() == before


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_committed_with_outputs_and_clean(path):
    text, notebook = path.read_text(encoding="utf-8"), notebooks.read(path)
    assert path.stat().st_size < 300_000
    assert text == notebooks.text_of(notebooks.clean(notebook))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    without_pictures = re.sub(r'"image/png": ".*?"', "", text)
    assert re.findall(r"/(?:tmp|home|root|Users)\b|\\\\Users\\\\|it/s|tokens/s", without_pictures) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_what_it_links_to_exists(path):
    for cell in notebooks.read(path).cells:
        for file in re.findall(r"\]\(([^)#:]+)", cell.source if cell.cell_type == "markdown" else ""):
            assert (path.parent / Path(file)).exists(), file
