"""The code of a page of docs/, section by section: `python tests/helpers/pages.py docs/training.md` runs all of it.

What stands before the first section, each of them begins with.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[str]:
    """The blocks of code that run."""
    return BLOCK.findall(text)


def printed(text: str) -> dict[str, str]:
    """What blocks of code print, where a page says it, in a block of text right below."""
    return dict(re.findall(BLOCK.pattern + r"\n+```text\n(.*?)^```", text, BLOCK.flags))


def sections(path: Path) -> dict[str, list[str]]:
    """The blocks of each section that has any, by its heading, after those before the first."""
    before, *parts = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {part.partition("\n")[0]: blocks(part) for part in parts}
    return {heading: blocks(before) + own for heading, own in found.items() if own}


def run(codes: list[str], where: str, printed: Mapping[str, str] = types.MappingProxyType({})) -> None:
    """Run blocks of code, one after another, as one module; what some of them print is known."""
    module = sys.modules["page"] = types.ModuleType("page")  # where a compiler and pickle look for it
    try:
        for code in codes:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, where, "exec"), vars(module))
            print(out.getvalue(), end="")
            assert out.getvalue() == printed.get(code, out.getvalue()), f"{where} prints\n{out.getvalue()}"
    finally:
        del sys.modules["page"]


if __name__ == "__main__":
    sys.path.append(str(ROOT / "examples"))
    for page in map(Path.resolve, map(Path, sys.argv[1:])):
        for heading, codes in sections(page).items():
            print(f"== {page.name}: {heading}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                run(codes, f"{page.name}, {heading}")
                os.chdir(ROOT)
