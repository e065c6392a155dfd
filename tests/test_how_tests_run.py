"""How the tests are run: which warnings fail a test, and which cases are left out by default."""

import ast
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import mark_parts, mark_sampled

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
OURS = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((ROOT / "lora").rglob("*.py"))]
# These folders, and those in tests, are on the path, so their names are not part of a module's.
OURS += [".".join(path.relative_to(ROOT / "examples").with_suffix("").parts) for path in EXAMPLES]
OURS += [
    f"{path.parent.name}.{path.stem}" if (path.parent / "__init__.py").exists() else path.stem
    for path in sorted((ROOT / "tests").rglob("*.py"))
]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
OURS = [*(name.removesuffix(".__init__") for name in OURS), "readme", "page"]  # and the code on our pages
THEIRS = ["torch.jit._script", "torch.utils.data", "transformers.modeling_utils", "peft", "numpy", "loralib.layers"]

TESTS = """
import pytest

def run_in(module, code):
    exec(code, {"__name__": module, "__file__": __file__})

@pytest.mark.parametrize("module", MODULES)
def test_something_is_wrong(module):
    run_in(module, "import warnings; warnings.warn('this is wrong')")

@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("category", ["DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"])
def test_something_is_deprecated(module, category):
    run_in(module, f"import warnings; warnings.warn('this goes away', {category})")

@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_left_open(module):
    run_in(module, "file = open(__file__); del file")
"""


# ---- warnings: those of our own code fail a test, those of a dependency do not ----------------------------------


def failed_of(tmp_path: Path, modules: list[str], *options: str) -> dict[str, set[str]]:
    """For each of the tests above: the modules for which it fails by the rules in pyproject.toml."""
    (tmp_path / "test_them.py").write_text(TESTS.replace("MODULES", repr(modules)))
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-n", "0"]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rA", *settings, *options, "test_them.py"]
    env = {name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "PYTHONWARNINGS")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    pattern = r"^(PASSED|FAILED) test_them\.py::(\w+)\[(?:\w+Warning-)?([\w.]+)\]"
    outcomes = re.findall(pattern, done.stdout, re.MULTILINE)
    assert len(outcomes) == 5 * len(modules), done.stdout + done.stderr
    failed = {test: set() for _, test, _ in outcomes}
    for outcome, test, module in outcomes:
        failed[test] |= {module} if outcome == "FAILED" else set()
    return failed


@pytest.mark.slow
def test_a_warning_fails_a_test_if_it_is_blamed_on_our_code(tmp_path):
    failed = failed_of(tmp_path, OURS + THEIRS)
    for test in ("test_something_is_wrong", "test_a_file_is_left_open"):
        assert sorted(failed[test] ^ set(OURS)) == []  # if a module is missed: it is to be named in pyproject.toml
    assert failed["test_something_is_deprecated"] == set()  # by a newer release, which blames the line that calls it


def test_every_warning_fails_a_test_where_versions_are_pinned(tmp_path):
    """As CI runs the tests."""
    modules = ["lora.layers.layer", "torch.jit._script"]
    failed = failed_of(tmp_path, modules, "-W", "error")
    assert failed == {test: set(modules) for test in failed}


def warn():
    warnings.warn("of ours", stacklevel=1)
    return "went on"


def test_a_warning_in_another_rank_fails_the_test(ranks):
    with pytest.raises(AssertionError, match="UserWarning: of ours"):
        ranks.run(warn)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:of ours")
def test_a_rank_ignores_what_the_test_ignores(ranks):
    assert ranks.run(warn) == ["went on"] * 2


def test_no_legend_looks_for_the_best_place():
    """matplotlib warns of that where it takes long, on a machine that is busy, and the warning would fail a test."""
    files = [*EXAMPLES, *sorted((ROOT / "benchmarks").glob("*.py"))]
    nodes = [(file.name, node) for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    calls = [(file, node) for file, node in nodes if isinstance(node, ast.Call)]
    legends = [(file, call) for file, call in calls if getattr(call.func, "attr", None) == "legend"]
    assert len(legends) > 3
    assert [file for file, call in legends if "loc" not in [keyword.arg for keyword in call.keywords]] == []


# ---- cases that are left out ------------------------------------------------------------------------------------


class Case:
    """What the hook asks of an item."""

    def __init__(self, nodeid, *sampled, **others):
        self.nodeid, self.marks = nodeid, [pytest.mark.sampled(n, **others) for n in sampled]

    def get_closest_marker(self, name):
        return next((mark.mark for mark in self.marks if mark.name == name), None)

    def add_marker(self, mark):
        self.marks.append(mark)


def test_of_the_cases_of_a_sampled_test_those_that_are_run_are_evenly_spread():
    cases = [Case(f"test_a.py::test_one[{i}]", 3) for i in range(10)]
    cases += [Case("test_a.py::test_two[x[y]]", 4), Case("test_b.py::test_one[0]"), Case("test_b.py::test_three[9]", 1)]
    mark_sampled(cases)
    run = [case.nodeid for case in cases if not case.get_closest_marker("slow")]
    assert run == [f"test_a.py::test_one[{i}]" for i in (0, 4, 7)] + [case.nodeid for case in cases[10:]]


def test_the_other_cases_may_be_exhaustive_ones():
    cases = [Case(f"test_a.py::test_one[{i}]", 1, others="exhaustive") for i in range(3)]
    mark_sampled(cases)
    assert [bool(case.get_closest_marker("exhaustive")) for case in cases] == [False, True, True]
    assert not any(case.get_closest_marker("slow") for case in cases)


def test_each_slow_test_is_in_one_of_the_parts():
    run = []
    for part in range(4):
        cases = [Case(f"test_a.py::test_one[{i}]", 1) for i in range(10)]  # the first by default, the others slow
        cases += [Case("test_a.py::test_two[0]", 1, others="exhaustive"), Case("test_a.py::test_two[1]")]
        cases[-1].add_marker(pytest.mark.exhaustive)
        mark_sampled(cases)
        mark_parts(cases, part, 4)
        run.append([i for i, case in enumerate(cases) if not case.get_closest_marker("exhaustive")])
    assert run == [[0, 1, 5, 9, 10], [0, 2, 6, 10], [0, 3, 7, 10], [0, 4, 8, 10]]


def test_of_all_tests_each_n_th_is_run():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--collect-only"]
    file = "tests/functional/test_functional_magnitude.py"
    every, few = (
        re.findall(
            r"^.*::.*$", subprocess.run([*command, *n, file], cwd=ROOT, capture_output=True, text=True).stdout, re.M
        )
        for n in ([], ["--every", "7"])
    )
    assert few == every[::7]
    assert len(few) > 5
