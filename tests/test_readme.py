"""The README says what is so: its code runs, its commands are those of CI, its files exist."""

import re
from pathlib import Path

import pytest

import lora

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_its_code_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "trainable: " in capsys.readouterr().out


def test_the_first_code_is_ten_lines():
    assert len(CODE[0].strip().splitlines()) - CODE[0].count("\n\n") <= 10 + 1  # and an import


def test_it_has_the_two_commands_that_ci_runs():
    commands = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert [command.strip() for command in commands] == [
        'pip install -e ".[examples]" && python examples/phi3_chat.py',
        'pip install -e ".[test]" && pytest',
    ]


def test_every_file_that_it_links_to_exists():
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    missing = [link for link in re.findall(r"\]\(([^)#:]+)\)", prose) if not (ROOT / link).exists()]
    assert not missing


def test_every_name_of_ours_that_it_uses_exists():
    names = set(re.findall(r"\blora\.(\w+)", README))
    missing = sorted(name for name in names if not hasattr(lora, name))
    assert not missing


def test_the_changelog_begins_with_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE).group(1) == lora.__version__
