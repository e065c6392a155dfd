"""The house: every file of lora/ belongs to a ring or a wing, and imports go one way.

    functional ← layers ← models ← adapters        a ring imports rings inside it, and no wing
    init, quantized, parallel, …                   a wing imports rings; another wing only if `WINGS` says so
    errors                                         imports nothing of lora; everything may import it
    __init__, __main__, reports                    the doors: import everything; nothing imports them

All imports count: those inside functions and those for type checkers, too. A module that a table names by a string,
for it to be imported when it is needed, does not.
"""

import ast
import functools
import graphlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import lora
import lora.functional
import lora.parallel
from lora.layers import weights

ROOT = Path(__file__).resolve().parents[1]
RINGS = ("functional", "layers", "models", "adapters")
# Each wing, and which others it may import.
WINGS = {
    "init": (),
    "quantized": (),
    "parallel": (),
    "swapping": (),
    "banking": ("swapping",),
    "formats": (),
    "arithmetic": (),
    "cli": ("arithmetic",),
}
DOORS = ("__init__", "__main__", "reports")
CELLAR = "errors"
MOST_LINES = 450


# ---- who imports whom -------------------------------------------------------------------------------------------


def house() -> dict[str, str]:
    """Every file of lora/, by its module's name without `lora.` (`layers.layer`), and what is in it."""
    found = {}
    for path in sorted((ROOT / "lora").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "lora").with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


@functools.cache
def imports(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]


def asked(name: str, source: str, names: set[str]) -> Iterator[str]:
    """What a module imports, anywhere in it, with all dots: a module, or a name in one."""
    package = ["lora", *name.split(".")] if name in packages(names) else ["lora", *name.split(".")[:-1]]
    for node in imports(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported(name: str, source: str, names: set[str]) -> Iterator[str]:
    """The modules of lora that a module imports."""
    for one in asked(name, source, names):
        if one == "lora" or one.startswith("lora."):
            # `from lora.layers.layer import LoRALayer` asks for a name in a module, or for a module in a package.
            words = one.split(".")[1:]
            parts = (".".join(words[:n]) for n in range(len(words), 0, -1))
            yield next((part for part in parts if part in names), "__init__")


def packages(names: set[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names} | {"__init__"}


def arrows(files: dict[str, str]) -> set[tuple[str, str]]:
    """(importer, imported), once for each pair."""
    return {(name, to) for name, source in files.items() for to in imported(name, source, set(files)) if to != name}


def room(name: str) -> str:
    """The ring, the wing, or the file beside them that a module is in."""
    return name.partition(".")[0]


def why_wrong(importer: str, to: str) -> str | None:
    """What is wrong with an import; None if nothing is."""
    ours, theirs = room(importer), room(to)
    if ours in DOORS or ours == theirs or (theirs == CELLAR and ours != CELLAR):
        return None
    if theirs in DOORS:
        return "goes through the front door"
    if ours in RINGS and theirs in RINGS:
        return "runs against the order of the rings" if RINGS.index(theirs) > RINGS.index(ours) else None
    if ours in RINGS:
        return "is a ring's, of a wing"
    if ours in WINGS:
        allowed = theirs in RINGS or theirs in WINGS[ours]
        return None if allowed else "is a wing's, of a wing that `WINGS` does not give it"
    return "is of a file that must import nothing of lora" if ours == CELLAR else "is of a file that has no place"


# ---- the rules: each is a function of the files, and says what is wrong ---------------------------------------------


def against_the_order(files: dict[str, str]) -> list[str]:
    return [
        f"{importer} -> {to}: {why}"
        for importer, to in sorted(arrows(files))
        if (why := why_wrong(importer, to)) is not None
    ]


def circles(files: dict[str, str]) -> list[str]:
    graph: dict[str, set[str]] = {name: set() for name in files}
    for importer, to in arrows(files):
        graph[importer].add(to)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def names_of_functions(files: dict[str, str]) -> list[str]:
    """`import lora.merge as m` must give a module wherever there is one."""
    public = {*lora.__all__, *lora.functional.__all__, *lora.parallel.__all__}
    return [f"{name}: bears the name of something public" for name in files if name.rpartition(".")[2] in public]


def homeless(files: dict[str, str]) -> list[str]:
    places = {*RINGS, *WINGS, *DOORS, CELLAR}
    empty = [f"{name}: is not there" for name in (*RINGS, *WINGS) if name not in files]
    return empty + [f"{name}: is in no ring and no wing" for name in files if room(name) not in places]


def too_long(files: dict[str, str]) -> list[str]:
    lengths = {name: len(source.splitlines()) for name, source in files.items()}
    return [f"{name}: has {n} lines" for name, n in lengths.items() if n > MOST_LINES]


RULES = (against_the_order, circles, names_of_functions, homeless, too_long)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_is_in_order(rule):
    assert rule(house()) == []


# What would be wrong: the rule that says so, files that are added, and what is said.
WRONG = {
    "a ring imports one that is outside it": (
        against_the_order,
        {"functional.new": "from lora.layers import Layer"},
        "functional.new -> layers: runs against the order of the rings",
    ),
    "a ring imports a wing": (
        against_the_order,
        {"layers.new": "import lora.arithmetic"},
        "layers.new -> arithmetic: is a ring's, of a wing",
    ),
    "in a function": (
        against_the_order,
        {"models.new": "def late():\n    from lora.adapters import checkpoint"},
        "models.new -> adapters.checkpoint: runs against the order of the rings",
    ),
    "for an annotation": (
        against_the_order,
        {"functional.new": "if TYPE_CHECKING:\n    from lora import models"},
        "functional.new -> models: runs against the order of the rings",
    ),
    "relative": (
        against_the_order,
        {"layers.new": "from ..swapping import prepare_for_swap"},
        "layers.new -> swapping: is a ring's, of a wing",
    ),
    "a wing imports another": (
        against_the_order,
        {"quantized.new": "from lora.formats import Reader"},
        "quantized.new -> formats: is a wing's, of a wing that `WINGS` does not give it",
    ),
    "the public names from within": (
        against_the_order,
        {"models.new": "from lora import Linear"},
        "models.new -> __init__: goes through the front door",
    ),
    "a circle within a ring": (
        circles,
        {"models.new": "from lora.models import newer", "models.newer": "def late():\n    import lora.models.new"},
        "models.new <- models.newer <- models.new",
    ),
    "a module that is called as a function": (
        names_of_functions,
        {"models.merge": ""},
        "models.merge: bears the name of something public",
    ),
    "a module that is called as a function of lora.parallel": (
        names_of_functions,
        {"parallel.plan_of": ""},
        "parallel.plan_of: bears the name of something public",
    ),
    "a file beside the rings": (homeless, {"helpers": ""}, "helpers: is in no ring and no wing"),
    "a folder beside the rings": (homeless, {"tools.strings": ""}, "tools.strings: is in no ring and no wing"),
    "a file that is too long": (too_long, {"models.new": "\n" * 451}, "models.new: has 451 lines"),
}


@pytest.mark.parametrize(("rule", "added", "said"), WRONG.values(), ids=WRONG)
def test_a_rule_says_what_breaks_it(rule, added, said):
    files = house()
    new = set(rule({**files, **added})) - set(rule(files))
    assert {frozenset(one.split(" <- ")) for one in new} == {frozenset(said.split(" <- "))}  # a circle has no first one


def test_importing_lora_brings_no_dtensor_and_no_package_that_quantises():
    """Importing DTensor takes a second."""
    late = ("torch.distributed.tensor", "lora.parallel.dtensor", "lora.quantized", "bitsandbytes", "torchao")
    code = f"import sys, lora; print([name for name in sys.modules if name.startswith({late})])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("table", "kind"), [(weights._PACKINGS, weights.Packing), (weights._SHARDINGS, type)], ids=["packed", "sharded"]
)
def test_a_string_in_a_table_names_something_in_a_wing(table, kind):
    rows = {row for row in table.values() if isinstance(row, str)}
    for row in rows:
        assert row.split(".")[1] in WINGS
        assert isinstance(pkgutil.resolve_name(row), kind)


def test_lora_shows_its_public_names_and_its_modules_alone():
    shown = {name for name in dir(lora) if not name.startswith("_") and not isinstance(getattr(lora, name), ModuleType)}
    assert shown == set(lora.__all__)
