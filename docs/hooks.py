"""What the site needs beside Markdown and mkdocs' own plugins; mkdocs.yml names this file.

The pages are written to be read in the repository. For the site:
- files that they link to outside of docs/ become pages as well, under `repository/`: notebooks with what they put out;
- each heading of reference.md that is a public name is followed by its docstring;
- doctests in docstrings become blocks of code;
- `lora.name`, in code, leads to the reference;
- what a link in the built site leads to must be there, or the build has a warning, an error with `--strict`.
"""

import base64
import json
import logging
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"(^ *(?P<fence>```+).*?^ *(?P=fence)$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\(|src=\")([^)\s#:\"]+)")  # the target of [text](target) and of <img src="target">
NAME = re.compile(r"(?<![\[`])`((lora(?:\.\w+)+)(?:\([^`\n]*\))?)`(?!`)")  # as `lora.inject`, `lora.inject(model)`
PUBLIC = set(re.findall(r"^### (lora[\w.]+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.MULTILINE))
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".yml": "yaml", ".txt": "text"}
# Of a class whose other methods are for the library alone, those that are for its users.
MEMBERS = {
    "lora.LoRALayer": "lora_shapes, lora_down, lora_up, lora_delta, lora_forward_with, lora_configure, lora_base_weight"
}
log = logging.getLogger("mkdocs.site")


# ---- files of the repository as pages --------------------------------------------------------------------------------


def on_files(files, config):
    """Add a page, or an image, for each file outside of docs/ that a page, or such a file, links to."""
    found, queue = set(), list(DOCS.glob("*.md"))
    while queue:
        for target in _targets(queue.pop()):
            if target not in found and target.exists() and DOCS not in target.parents:
                found.add(target)
                queue.append(target)
    for target in sorted(found):
        if target.suffix in (".png", ".svg"):
            files.append(File.generated(config, _uri(target), abs_src_path=str(target)))
        else:
            files.append(File.generated(config, _uri(target), content=_page(target)))
    return files


def _targets(path):
    """What a page, or a folder's list of files, links to."""
    if path.is_dir():
        return [] if (path / "README.md").exists() else _files_in(path)
    text = FENCE.sub("", _markdown(path)) if path.suffix in (".md", ".ipynb") else ""
    return [_target(link, path.parent) for _, link in LINK.findall(text)]


def _target(link, folder):
    target = (folder / unquote(link)).resolve()
    return target / "README.md" if (target / "README.md").exists() else target


def _files_in(folder):
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")


def _uri(target):
    """The place in the site's sources of a file of the repository."""
    if DOCS in target.parents:
        return target.relative_to(DOCS).as_posix()
    uri = f"repository/{target.relative_to(ROOT).as_posix().lstrip('.')}"
    return f"{uri}/index.md" if target.is_dir() else uri if target.suffix in (".md", ".png", ".svg") else f"{uri}.md"


def _page(target):
    name, front = target.relative_to(ROOT).as_posix(), "---\nsearch:\n  exclude: true\n---\n"
    if target.is_dir():
        links = "\n".join(f"- [{path.name}]({path.name})" for path in _files_in(target))
        return f"{front}# {name}\n\n{links}\n"
    text = target.read_text(encoding="utf-8")
    if target.suffix in (".md", ".ipynb"):
        return front + _markdown(target)
    return f"{front}# {name}\n\n`````{LANGUAGES.get(target.suffix, 'sh')}\n{text}\n`````\n"


def _markdown(path):
    """The text of a page, or of a notebook with what its cells put out."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).strip()}\n```")
            for kind in output.get("data", {}).keys() & {"image/png", "image/svg+xml"}:
                data = "".join(output["data"][kind])
                data = data if kind == "image/png" else base64.b64encode(data.encode()).decode()
                parts.append(f'<img alt="what this cell shows" src="data:{kind};base64,{data}">')
    return "\n\n".join(parts) + "\n"


# ---- Markdown --------------------------------------------------------------------------------------------------------


def on_page_markdown(markdown, page, config, files):
    """The page's text with links that are right in the site, and docstrings in the reference."""
    here = Path(page.file.src_uri)
    folder = DOCS / here.parent if here.parts[0] != "repository" else _folder_of(here)

    def moved(match):
        target = _target(match[2], folder)
        if not target.exists():
            return match[0]
        return match[1] + os.path.relpath(_uri(target), here.parent).replace(os.sep, "/")

    markdown = markdown.replace("```python no-run", "```python")
    pieces = FENCE.split(markdown)  # text, a block of code, its fence, text, …
    pieces[::3] = [NAME.sub(_linked, LINK.sub(moved, text)) for text in pieces[::3]]
    del pieces[2::3]
    markdown = "".join(pieces)
    if here.name == "reference.md":
        markdown = re.sub(r"^### (lora[\w.]+)\n+.*$", _documented, markdown, flags=re.MULTILINE)
    return markdown


def _linked(match):
    return f"[{match[0]}][{match[2]}]" if match[2] in PUBLIC else match[0]


def _together(match):
    """Several arguments or attributes on one line: spaces between the names would end the first."""
    return "    " + match[0].strip().replace(", ", ",\N{NO-BREAK SPACE}") + " "


def _folder_of(uri):
    """The folder, in the repository, of the file that a page of the site shows."""
    return ROOT.joinpath(*uri.parts[1:]).parent


def _documented(match):
    anchor = re.sub(r"[^\w-]", "", match[1].lower())  # that of the heading in the repository
    members = MEMBERS.get(match[1], "")
    options = f"\n    options:\n      members: [{members}]\n      inherited_members: true" if members else ""
    return f'<a id="{anchor}"></a>\n\n::: {match[1]}{options}'


class Docstrings(griffe.Extension):
    """Blocks of code around what Markdown would take for something else: doctests, and tables of reStructuredText."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            text = re.sub(r"^>>> .*(?:\n(?!\n).+)*", r"```pycon\n\g<0>\n```", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"^    (?:[\w*]+, )+[\w*]+: ", _together, NAME.sub(_linked, text), flags=re.MULTILINE)
            obj.docstring.value = re.sub(
                r"^(=+  [= ]+)\n(?:.*\n)*?\1$", r"```text\n\g<0>\n```", text, flags=re.MULTILINE
            )


# ---- links of the built site -----------------------------------------------------------------------------------------


class _Links(HTMLParser):
    """The anchors of a page, and what it links to."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        self.links += [attrs[key] for key in ("href", "src") if attrs.get(key)]


def on_post_build(config):
    """Warn of every link within the site to a page, a file or an anchor that is not there."""
    site = Path(config.site_dir)
    pages = {path.resolve(): _Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links if path.name != "404.html" else ():
            if re.match(r"[a-z]+:", link):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / unquote(file)).resolve() if file else path
            if not target.exists():
                log.warning("%s links to %s, which is not there", path.relative_to(site.resolve()), link)
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                log.warning("%s links to %s, but the page has no such anchor", path.relative_to(site.resolve()), link)
