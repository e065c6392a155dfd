"""The README says what is so: its code runs, its commands are those of CI, its files exist."""

import re
from pathlib import Path

import pages
import pytest
from releases import before

import lora

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path for path in sorted((ROOT / "docs").glob("*.md"))}
PROSE = {name: ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")} | PAGES
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = pages.blocks(README)
# Its sections need packages: tests/interop/test_training_page.py runs them.
ELSEWHERE = {"training.md", *(["distributed.md"] if before("2.11") else [])}  # as lora.parallel needs


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_its_code_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "trainable: " in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(PAGES.keys() - ELSEWHERE))
def test_a_pages_code_runs_from_its_first_line_to_its_last(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGES[name].read_text(encoding="utf-8")
    blocks = pages.blocks(text)
    assert blocks
    pages.run(blocks, name, pages.printed(text))


def test_the_first_code_is_ten_lines():
    assert len(CODE[0].strip().splitlines()) - CODE[0].count("\n\n") <= 10 + 1  # and an import


def test_it_has_the_two_commands_that_ci_runs():
    commands = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert [command.strip() for command in commands] == [
        'pip install -e ".[examples]" && python examples/phi3_chat.py',
        'pip install -e ".[test]" && pytest',
    ]


def headings(path):
    """The anchors of a page, as GitHub makes them, and docs/hooks.py's site."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found]


@pytest.mark.parametrize("path", PROSE.values(), ids=PROSE)
def test_every_file_and_heading_that_it_links_to_exists(path):
    missing = []
    for file, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", FENCE.sub("", path.read_text(encoding="utf-8"))):
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in headings(target)):
            missing.append(f"{file}#{anchor}")
    assert not missing


@pytest.mark.parametrize("path", PROSE.values(), ids=PROSE)
def test_no_two_headings_have_one_anchor(path):  # GitHub and the site number them apart
    assert len(set(headings(path))) == len(headings(path))


@pytest.mark.parametrize("path", PROSE.values(), ids=PROSE)
def test_every_name_of_ours_that_it_uses_exists(path):
    names = set(re.findall(r"\blora\.(\w+)", path.read_text(encoding="utf-8")))
    missing = sorted(name for name in names if not hasattr(lora, name))
    assert not missing


def test_the_changelog_begins_with_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE).group(1) == lora.__version__
