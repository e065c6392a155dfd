"""The site's pages: pictures are what their script draws, and the reference has every public name."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import lora
import lora.functional
import lora.parallel
import lora.reports

DOCS = Path(__file__).resolve().parents[1] / "docs"
DRAW = runpy.run_path(str(DOCS / "pictures.py"))
REFERENCE = (DOCS / "reference.md").read_text(encoding="utf-8")
SOURCES = dict(re.findall(r"^### (lora[\w.]+)\n\n\[(.+?)\]\(\.\./\2\)$", REFERENCE, re.MULTILINE))
PUBLIC = {
    **{f"lora.{name}": getattr(lora, name) for name in lora.__all__},
    **{
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (lora.functional, lora.parallel, lora.reports)
        for name in module.__all__
        if name not in lora.__all__
    },
}


@pytest.mark.parametrize("name", DRAW["PICTURES"])
def test_a_picture_is_what_its_script_draws(name):
    assert (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == DRAW["drawn"](name)


def test_every_picture_is_drawn_by_the_script_and_is_on_a_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    assert {path.name for path in (DOCS / "pictures").iterdir()} == {f"{name}.svg" for name in DRAW["PICTURES"]}
    assert set(re.findall(r"\]\(pictures/(\w+)\.svg\)", pages)) == set(DRAW["PICTURES"])


def test_every_page_has_its_place_in_the_site_once():
    places = re.findall(r"\b(\w+\.md)\b", (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(places) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_reference_has_every_public_name_once():
    assert re.findall(r"^### (.+)$", REFERENCE, re.MULTILINE) == [*SOURCES]
    assert sorted(SOURCES) == sorted(PUBLIC)


@pytest.mark.parametrize("name", SOURCES)
def test_the_reference_says_where_a_name_is_defined(name):
    file = Path(sys.modules[PUBLIC[name].__module__].__file__).resolve()
    assert file.relative_to(DOCS.parent).as_posix() == SOURCES[name]
