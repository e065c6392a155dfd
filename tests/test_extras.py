"""What pyproject.toml's extras bring is what the code that they are for imports."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
# TOML writes a list of strings as Python does; to read all of it, Python 3.10 would need one more package.
LISTS = {
    name: ast.literal_eval(value)
    for name, value in re.findall(r"^([\w-]+) = (\[.*?\])$", PROJECT, re.MULTILINE | re.DOTALL)
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]

# The extra with which README.md, or the folder's own, has the folder's code run; None is no extra.
FOLDERS = {"lora": None, "examples": "examples", "benchmarks": "study", "tests": "test"}
MET = {"bitsandbytes", "torchao"}  # imported by lora when it meets their weights: then they are there
IMPORTED_AS = {"scikit-learn": "sklearn"}  # by another name than the package's


def brought_by(extra: str | None) -> set[str]:
    """The packages that `pip install lora[extra]` is told to install, those of the extras in it, too."""
    found = set()
    for requirement in LISTS["dependencies"] + (LISTS[extra] if extra else []):
        name, extras = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
        found |= {IMPORTED_AS.get(name, name)} if name != "lora" else set().union(*map(brought_by, extras.split(",")))
    return found


def imported_by(source: str) -> Iterator[str]:
    """The top-level names of all modules that a file imports when it runs, wherever it does, by name as well."""
    tree = ast.parse(source)
    for node in ast.walk(tree):  # type checkers bring what is for them alone
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "importorskip"):
            modules = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        else:
            continue
        yield from (module.partition(".")[0] for module in modules)


def undeclared(folder: str, extra: str | None) -> list[str]:
    """`file: module` for each import that the extra does not bring."""
    ours = {path.stem for place in ("examples", "benchmarks", "tests") for path in (ROOT / place).rglob("*")} | {"lora"}
    brought = {name.replace("-", "_") for name in brought_by(extra)}
    known = ours | sys.stdlib_module_names | brought | (MET if folder == "lora" else set())
    missing = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        # What is for one option only, the user installs when the file says so.
        told = set(re.findall(r"pip install ([a-z]\w*)", source)) if folder in ("lora", "examples") else set()
        missing += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(set(imported_by(source)) - known - told)]
    return missing


@pytest.mark.parametrize(("folder", "extra"), FOLDERS.items(), ids=FOLDERS)
def test_every_import_is_declared(folder, extra):
    assert undeclared(folder, extra) == []


def test_the_extras_bring_what_is_imported_by_others():
    assert "accelerate" in brought_by("examples")  # transformers reads a GGUF file with it
    assert "bitsandbytes" in brought_by("bench")  # methods.py measures QLoRA, through the example


def test_every_extra_that_a_page_or_a_message_names_exists():
    files = [*PAGES, *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    named = {
        extra: path.name
        for path in files
        for extras in re.findall(r"pip install .*?\.\[([\w,]+)\]", path.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert {"examples", "test", "bench", "quantize"} <= named.keys()
    assert {extra: path for extra, path in named.items() if extra not in LISTS} == {}
