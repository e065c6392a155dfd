"""docs/training.md: its code runs, each section by itself, with the packages that it is about.

Those of the extra `train` (TRL, Lightning, sentence-transformers) are too heavy for all who run the tests:
`.ci/trainers` runs their sections.
"""

import re

import pages
import pytest
import transformers  # noqa: F401 (most sections' code needs it)
from test_extras import brought_by, imported_by

SECTIONS = pages.sections(pages.ROOT / "docs" / "training.md")
NEEDS = {heading: {*imported_by("\n".join(codes))} for heading, codes in SECTIONS.items()}
ALSO = {"phi3", "trainer", "lora"}  # of ours
HERE = [heading for heading in SECTIONS if not NEEDS[heading] - brought_by("test") - ALSO]


@pytest.mark.parametrize("heading", HERE)
def test_a_sections_code_runs_from_its_first_line_to_its_last(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run(SECTIONS[heading], heading)


def test_other_sections_need_the_extra_that_ci_installs_for_them():
    others = {heading: NEEDS[heading] - brought_by("test") - ALSO for heading in SECTIONS if heading not in HERE}
    assert others == {
        "TRL": {"trl", "datasets"},
        "Lightning": {"lightning"},
        "sentence-transformers": {"sentence_transformers", "datasets"},
    }
    assert set().union(*others.values()) <= {name.replace("-", "_") for name in brought_by("train")}
    step = (pages.ROOT / ".ci" / "trainers").read_text(encoding="utf-8")
    assert '".[train]"' in step
    assert "tests/helpers/pages.py docs/training.md" in step


def test_every_row_of_its_table_has_a_section():
    text = (pages.ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert len(SECTIONS) == len(re.findall(r"^\| \[.*?\]\(#", text, re.MULTILINE)) == 8
