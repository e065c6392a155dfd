"""Run notebooks: `python tests/helpers/notebooks.py examples/phi3_chat.ipynb` writes what its cells put out into it.

Only what a reader should see is kept: no stream of errors (what dependencies log, with paths of the machine), no counts
of a kernel, no metadata of the program that ran it.
"""

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
TEXT = "text/plain"


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def run(path: Path, parameters: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
    """The notebook with what its cells put out, run in its folder; `parameters` follow the cell that sets them."""
    notebook = read(path)
    if parameters:
        at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
        known = notebook.cells[at].source
        assert all(name in known for name in parameters), f"{path.name} has not all of {[*parameters]}"
        source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(source))
    client = NotebookClient(
        notebook, timeout=timeout, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}
    )
    return client.execute()


def clean(notebook: Any) -> Any:
    """The notebook as it is committed."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata = nbformat.from_dict({"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {})
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [_cleaned(output) for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def _cleaned(output: Any) -> Any:
    if "execution_count" in output:
        output.execution_count = None
    if "data" in output:
        pictures = any(kind.startswith("image/") for kind in output.data)
        output.data = {kind: data for kind, data in output.data.items() if not (pictures and kind == TEXT)}
        output.metadata = {}
    return output


def text_of(notebook: Any) -> str:
    """The file: with letters as letters."""
    return nbformat.writes(notebook, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        done = clean(run(file.resolve()))
        nbformat.validate(done)
        file.write_text(text_of(done), encoding="utf-8", newline="\n")
