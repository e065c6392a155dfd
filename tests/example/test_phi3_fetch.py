"""examples/phi3/fetch.py, with pip pointed at a folder of our own."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from phi3 import fetch
from phi3.errors import UserError


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fetch.Wheel:
    """A wheel that pip finds, with a dependency that nobody has."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "toy_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_data/numbers.txt", "1 2 3")
        metadata = "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\nRequires-Dist: no-such-project-anywhere\n"
        archive.writestr("toy_data-1.0.dist-info/METADATA", metadata)
        archive.writestr("toy_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    return fetch.Wheel("toy-data", "1.0", checksum, "toy_data/numbers.txt")


def everything_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() or path.name.startswith(".")]


def test_takes_one_file_out_of_the_wheel_and_downloads_once(wheel, tmp_path, monkeypatch):
    found = fetch.fetch(wheel, tmp_path / "cache")
    assert found.read_text() == "1 2 3"
    assert everything_in(tmp_path / "cache") == ["numbers.txt"]
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("downloaded again"))
    assert fetch.fetch(wheel, tmp_path / "cache") == found


def test_a_wrong_checksum_leaves_nothing_in_the_cache(wheel, tmp_path):
    with pytest.raises(UserError, match=f"has sha256 {wheel.sha256}, expected 0000"):
        fetch.fetch(wheel._replace(sha256="0000"), tmp_path / "cache")
    assert everything_in(tmp_path / "cache") == []


def test_a_wheel_without_the_file(wheel, tmp_path):
    with pytest.raises(UserError, match=r"does not hold toy_data/letters\.txt"):
        fetch.fetch(wheel._replace(member="toy_data/letters.txt"), tmp_path / "cache")


def test_pips_reason_is_shown(wheel, tmp_path):
    with pytest.raises(UserError, match=r"(?s)pip download --no-deps toy-data==2.0.*No matching distribution"):
        fetch.fetch(wheel._replace(version="2.0"), tmp_path / "cache")


def test_a_cache_that_cannot_be_written(wheel, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache-dir"):
        fetch.fetch(wheel, tmp_path / "file")


def test_the_cache_directory_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LORA_EXAMPLES_CACHE", raising=False)
    assert fetch.default_cache_dir() == tmp_path / "lora-examples"
    monkeypatch.setenv("LORA_EXAMPLES_CACHE", str(tmp_path / "mine"))
    assert fetch.default_cache_dir() == tmp_path / "mine"
