"""The house: every file of lora/ belongs to a ring or a wing, and imports go one way.

    functional ← layers ← models ← adapters        a ring imports rings inside it, and no wing
    init, quantized, parallel, …                   a wing imports rings; another wing only if `WINGS` says so
    errors                                         imports nothing of lora; everything may import it
    __init__, __main__, reports                    the doors: import everything; nothing imports them

All imports count: those inside functions and those for type checkers, too. A module that a table names by a string,
for it to be imported when it is needed, does not.
"""

import ast
import graphlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
    "formats": (),
    "arithmetic": (),
    "cli": ("arithmetic",),
}
DOORS = ("__init__", "__main__", "reports")
CELLAR = "errors"
MOST_LINES = 450

# ---- still to be cut: what runs against the order today. Nothing is added here, and what is cut goes ---------------
WRONG_WAY = {
    "models.learnt": ("adapters.single",),
}
# Imports for annotations, and one inside a function, that close a circle within a ring.
CIRCLES: dict[str, tuple[str, ...]] = {}


@pytest.mark.parametrize(("rule", "added", "said"), WRONG.values(), ids=WRONG)
def test_a_rule_says_what_breaks_it(rule, added, said):
    files = house()
    new = set(rule({**files, **added})) - set(rule(files))
    assert {frozenset(one.split(" <- ")) for one in new} == {frozenset(said.split(" <- "))}  # a circle has no first one


def test_what_is_cut_must_go_from_the_lists():
    files = house()
    for importer in {**WRONG_WAY, **CIRCLES}:
        rest = cut_already({**files, importer: ""})
        assert {
            f"{importer} -> {to}: is cut" for to in (*WRONG_WAY.get(importer, ()), *CIRCLES.get(importer, ()))
        } <= set(rest)


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
