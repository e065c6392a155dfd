"""What users give for a path, and what the system may say to it: sentences about that path, and the class as it is.

Errors are real ones: links, FIFOs and devices, a user without permissions, a limit on the size of files.
"""

import contextlib
import errno
import os
import pathlib
import resource
import shutil
import tempfile

import pytest
import torch
from cli_model import base_folder, run
from torch import nn

import lora


def model(r=2):
    made = nn.Sequential(nn.Linear(6, 4))
    lora.inject(made, target_modules=["0"], r=r)
    nn.init.normal_(made[0].lora_B)
    return made


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Paths in these tests are relative: errors must say what the user wrote, and no more."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def circle():
    os.symlink("b", "a")
    os.symlink("a", "b")


def text_file():
    pathlib.Path("file.txt").write_text("mine", encoding="utf-8")


NOTHING = lambda: None  # noqa: E731
LONG = "x" * 300
LONG_SAID = f"{LONG} is not {{}}: it is too long, at 300 bytes, or one of its parts is, at 300."
TILDE = " Python does not expand `~`; os.path.expanduser does."

# What is there, what is given, and the error.
READ = {
    "nothing": (NOTHING, "a", FileNotFoundError, "there is no file a."),
    "no folder": (NOTHING, "x/y/a", FileNotFoundError, "there is no file x/y/a: there is no folder x."),
    "home": (NOTHING, "~/a", FileNotFoundError, f"there is no file ~/a: there is no folder ~.{TILDE}"),
    "a dangling link": (
        lambda: os.symlink("gone", "a"),
        "a",
        FileNotFoundError,
        "there is no file a: it is a link to gone, which is not there.",
    ),
    "a circle of links": (circle, "a", OSError, "a is not read: its links lead in a circle."),
    "a folder in a circle": (circle, "a/x", OSError, "a/x is not read: its links lead in a circle."),
    "a file for a folder": (
        text_file,
        "file.txt/a",
        NotADirectoryError,
        "file.txt/a is not read: file.txt is a file, and must be a folder.",
    ),
    "an empty folder": (
        lambda: os.mkdir("a"),
        "a",
        FileNotFoundError,
        "there is no adapter in a: it has none of adapter_model.safetensors, adapter_model.bin, adapter.safetensors.",
    ),
    "a folder for our file": (
        lambda: os.makedirs("a/adapter.safetensors"),
        "a",
        IsADirectoryError,
        "a/adapter.safetensors is not read: it is a folder, and must be a file.",
    ),
    "a folder for PEFT's file": (
        lambda: os.makedirs("a/adapter_config.json") or os.makedirs("a/adapter_model.safetensors"),
        "a",
        IsADirectoryError,
        "a/adapter_config.json is not read: it is a folder, and must be a file.",
    ),
    "a FIFO": (lambda: os.mkfifo("a"), "a", OSError, "a is not read: it is a FIFO, and must be a file."),
    "a device": (NOTHING, "/dev/null", OSError, "/dev/null is not read: it is a device, and must be a file."),
    "too long": (NOTHING, LONG, OSError, LONG_SAID.format("read")),
}
WRITE = {
    "no folder": (NOTHING, "x/y/a", FileNotFoundError, "there is no folder x/y to write a to."),
    "home": (NOTHING, "~/a", FileNotFoundError, f"there is no folder ~ to write a to.{TILDE}"),
    "a circle of links": (circle, "a", OSError, "a is not written: its links lead in a circle."),
    "a file for a folder": (
        text_file,
        "file.txt/a",
        NotADirectoryError,
        "file.txt/a is not written: file.txt is a file, and must be a folder.",
    ),
    "too long": (NOTHING, LONG, OSError, LONG_SAID.format("written")),
}
TO_A_FILE = {
    "a folder to be made": (
        NOTHING,
        "new/",
        FileNotFoundError,
        "there is no folder new to write adapter.safetensors to.",
    ),
    "a folder in its place": (
        lambda: os.makedirs("a/adapter.safetensors"),
        "a",
        IsADirectoryError,
        "a/adapter.safetensors is not written: it is a folder, and must be a file.",
    ),
    "a FIFO": (
        lambda: os.mkfifo("a"),
        "a",
        FileExistsError,
        "a is not written: it is a FIFO, and must be a file or nothing.",
    ),
    "a device": (
        NOTHING,
        "/dev/null",
        FileExistsError,
        "/dev/null is not written: it is a device, and must be a file or nothing.",
    ),
}
TO_A_FOLDER = {
    "a file in its place": (
        text_file,
        "file.txt",
        FileExistsError,
        "file.txt is not written: it is a file, and must be a folder or nothing.",
    ),
    "a device": (
        NOTHING,
        "/dev/null",
        FileExistsError,
        "/dev/null is not written: it is a device, and must be a folder or nothing.",
    ),
}
# Of no system's, but of every function's.
WRONG = {
    "None": (None, TypeError, "must be a str or an os.PathLike{}, got NoneType."),
    "a number": (3, TypeError, "must be a str or an os.PathLike{}, got int."),
    "a state dict": ({}, TypeError, "must be a str or an os.PathLike{}, got dict."),
    "bytes": (b"a", TypeError, "must be a str or an os.PathLike{}, got bytes; os.fsdecode(`{}`) makes one."),
    "nothing": ("", ValueError, "must name a file or a folder, got ''."),
    "NUL": ("a\0b", ValueError, "must have no NUL and no surrogate characters, got 'a\\x00b'."),
    "a surrogate": ("a\ud800", ValueError, "must have no NUL and no surrogate characters, got 'a\\ud800'."),
}
READERS = {"read_adapter": lora.read_adapter, "load_adapter": lambda path: lora.load_adapter(model(), path)}
WRITERS = {
    "save_adapter": lambda path: lora.save_adapter(model(), path),
    "write_adapter": lambda path: lora.write_adapter(lora.adapter_of(model()), path),
    "peft": lambda path: lora.save_adapter(model(), path, format="peft"),
    "portable": lambda path: lora.save_adapter(model(), path, format="portable"),
}
FILES, FOLDERS = ("save_adapter", "write_adapter"), ("peft", "portable")
CASES = [
    *((f"{reader}, {what}", call, *READ[what]) for reader, call in READERS.items() for what in READ),
    *((f"{writer}, {what}", call, *WRITE[what]) for writer, call in WRITERS.items() for what in WRITE),
    *((f"{writer}, {what}", WRITERS[writer], *TO_A_FILE[what]) for writer in FILES for what in TO_A_FILE),
    *((f"{writer}, {what}", WRITERS[writer], *TO_A_FOLDER[what]) for writer in FOLDERS for what in TO_A_FOLDER),
]
COMMANDS = {
    "inspect": (["inspect", "{}"], READ),
    "diff": (["diff", "{}", "in"], READ),
    "convert from": (["convert", "{}", "out", "--format", "peft"], READ),
    "combine of": (["combine", "out", "{}=0.5", "in"], READ),
    "convert": (["convert", "in", "{}", "--format", "lora"], WRITE | TO_A_FILE),
    "combine": (["combine", "{}", "in"], WRITE | TO_A_FILE),
    "resize": (["resize", "in", "{}", "--r", 1], WRITE | TO_A_FILE),
    "convert to a folder": (["convert", "in", "{}", "--format", "peft"], WRITE | TO_A_FOLDER),
    "merge": (["merge", "base", "in", "{}"], WRITE | TO_A_FOLDER),
    "plot": (["inspect", "in", "--plot", "{}"], WRITE),
}


def refused(call, path, error, message):
    """The error, in these words and of this class; and nothing in the folder has changed."""
    before = sorted(pathlib.Path().rglob("*"))
    with pytest.raises(error) as caught:
        call(path)
    assert str(caught.value) == message
    assert type(caught.value) is error
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert sorted(pathlib.Path().rglob("*")) == before
    return caught.value


@pytest.mark.parametrize(
    ("call", "prepare", "path", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_what_the_system_says_is_said_in_a_sentence(call, prepare, path, error, message):
    prepare()
    refused(call, path, error, message)


@pytest.mark.parametrize(
    ("arguments", "prepare", "path", "message"),
    [
        pytest.param(arguments, prepare, path, message, id=f"{command}, {what}")
        for command, (arguments, cases) in COMMANDS.items()
        for what, (prepare, path, _, message) in cases.items()
    ],
)
def test_the_same_on_the_command_line_in_one_line(capsys, arguments, prepare, path, message):
    lora.save_adapter(model(), "in")
    base_folder(pathlib.Path("base"), {"0.weight": torch.ones(4, 6)})
    prepare()
    before = sorted(pathlib.Path().rglob("*"))
    said = run(capsys, *(str(argument).format(path) for argument in arguments))
    assert said == (2, "", f"error: {message}\n")
    assert sorted(pathlib.Path().rglob("*")) == before


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", READERS | WRITERS)
def test_what_is_no_path(name, what):
    path, error, message = WRONG[what]
    loads = name == "load_adapter"
    argument = "source" if loads else "path"
    message = message.format(" or a lora.Adapter" if loads else "", argument)
    refused((READERS | WRITERS)[name], path, error, f"`{argument}` {message}")


@pytest.mark.parametrize(
    "arguments", [["inspect", ""], ["convert", "in", "", "--format", "lora"], ["combine", "out", ""]]
)
def test_an_empty_argument_is_no_path(capsys, arguments):
    lora.save_adapter(model(), "in")
    try:
        code, _, error = run(capsys, *arguments)
    except SystemExit as ended:
        code, error = ended.code, capsys.readouterr().err
    assert code == 2
    assert error.endswith("must name a file or a folder, got ''.\n")


def test_a_link_into_a_folder_that_is_not_there(here):
    os.symlink("x/y", "a")
    message = f"there is no folder {os.path.realpath(here)}/x to write to, where the link a leads."
    refused(WRITERS["save_adapter"], "a", FileNotFoundError, message)


# ---- a folder in the place of a file -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["folder", "folder/", ".", pathlib.Path("folder")])
def test_in_a_folder_the_adapter_has_a_name_of_its_own(path):
    os.mkdir("folder")
    saved, loaded = model(), model()
    lora.save_adapter(saved, path)
    assert [file.name for file in pathlib.Path(path).glob("*.safetensors")] == ["adapter.safetensors"]
    lora.load_adapter(loaded, path, check_base=False)
    assert torch.equal(loaded[0].lora_B, saved[0].lora_B)
    lora.save_adapter(model(r=3), path)  # and again, in its place
    assert lora.read_adapter(path).modules["0"]["r"] == 3


def test_the_same_for_the_command_line(capsys):
    os.mkdir("folder")
    lora.save_adapter(model(), "in")
    file = pathlib.Path("folder", "adapter.safetensors")
    for command in (
        ["convert", "in", "folder", "--format", "lora"],
        ["combine", "folder", "in"],
        ["resize", "in", "folder", "--r", 1],
    ):
        code, said, error = run(capsys, *command)
        assert (code, error) == (0, "")
        assert f"{file}: 1 modules, r = " in said
        assert run(capsys, *command) == (2, "", f"error: {file} exists; --overwrite replaces it.\n")
        assert run(capsys, *command, "--overwrite")[0] == 0
        assert run(capsys, "inspect", "folder")[0] == 0
        file.unlink()


def test_the_input_in_a_folder_is_not_the_output(capsys):
    os.mkdir("folder")
    lora.save_adapter(model(), "folder")
    for out in ("folder", "folder/adapter.safetensors"):
        code, _, error = run(capsys, "resize", "folder", out, "--r", 1, "--overwrite")
        assert (code, "must not be an input" in error) == (2, True)
    assert lora.read_adapter("folder").modules["0"]["r"] == 2


@pytest.mark.parametrize("writer", FOLDERS)
def test_two_adapters_in_a_folder(writer):
    os.mkdir("folder")
    lora.save_adapter(model(), "folder")
    said = (
        "folder has adapter.safetensors of another adapter; with one beside it in the format '{}', nobody could tell "
    )
    said += "which is meant: remove what is there, or choose another folder."
    refused(WRITERS[writer], "folder", FileExistsError, said.format(writer))
    os.rename("folder/adapter.safetensors", "adapter.safetensors")
    WRITERS[writer]("folder")
    files = "adapter_config.json, adapter_model.safetensors"
    refused(
        WRITERS["save_adapter"], "folder", FileExistsError, said.replace("adapter.safetensors", files).format("lora")
    )
    os.rename("adapter.safetensors", "folder/adapter.safetensors")
    message = (
        "folder may hold two adapters, lora's in adapter.safetensors and PEFT's in {}: name the file that is meant, "
    )
    message += "folder/adapter.safetensors or folder/adapter_config.json."
    refused(lora.read_adapter, "folder", lora.AdapterError, message.format(files))
    for file, format in [
        ("adapter.safetensors", "lora"),
        ("adapter_config.json", "peft"),
        ("adapter_model.safetensors", "peft"),
    ]:
        assert lora.read_adapter(f"folder/{file}").format == format
    lora.save_adapter(model(r=3), "folder/adapter.safetensors")
    assert lora.read_adapter("folder/adapter.safetensors").modules["0"]["r"] == 3


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_the_names_of_pefts_files_are_not_for_ours(name):
    WRITERS["peft"]("folder")
    message = f"folder/{name} is the name of a file of PEFT's format, as which it would be read: choose another."
    refused(WRITERS["save_adapter"], f"folder/{name}", FileExistsError, message)
    assert lora.read_adapter("folder").format == "peft"


def test_a_name_as_long_as_names_may_be(capsys):
    name = "\N{GRINNING FACE}" * 63  # 252 bytes of 255
    lora.save_adapter(model(), name)
    assert lora.read_adapter(name).format == "lora"
    base_folder(pathlib.Path("base"), {"0.weight": torch.ones(4, 6)})
    assert run(capsys, "merge", "base", name, f"{name[:-1]}.a", "--no-check-base")[0] == 0


# ---- permissions -------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch):
    """In a folder that others may look into: what it takes to be a user who has no permission to do more."""
    folder = pathlib.Path(tempfile.mkdtemp(dir="/tmp"))  # TMPDIR may be in a folder of root's own
    monkeypatch.chdir(folder)

    @contextlib.contextmanager
    def become():
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)

    yield become
    monkeypatch.chdir("/")
    shutil.rmtree(folder)


def test_no_permission_to_read(nobody, capsys):
    lora.save_adapter(model(), "a")
    lora.save_adapter(model(), "theirs", format="peft")
    os.mkdir("closed")
    lora.save_adapter(model(), "closed/a")
    os.chmod("a", 0)
    os.chmod("theirs/adapter_model.safetensors", 0)
    os.chmod("closed", 0)
    with nobody():
        for path in ("a", "theirs", "closed/a", "closed"):
            file = "theirs/adapter_model.safetensors" if path == "theirs" else path
            file = "closed/adapter.safetensors" if path == "closed" else file
            message = f"{file} is not read: there is no permission to read it."
            for read in READERS.values():
                refused(read, path, PermissionError, message)
            assert run(capsys, "inspect", path) == (2, "", f"error: {message}\n")
            assert run(capsys, "convert", path, "out", "--format", "lora") == (2, "", f"error: {message}\n")
    os.chmod("closed", 0o755)


@pytest.mark.parametrize("writer", WRITERS)
def test_no_permission_to_write(nobody, writer):
    with nobody():
        message = "a is not written: there is no permission to write in its folder."
        refused(WRITERS[writer], "a", PermissionError, message)


def test_no_permission_to_write_on_the_command_line(nobody, capsys):
    lora.save_adapter(model(), "in")
    base = base_folder(pathlib.Path("base"), {"0.weight": torch.ones(4, 6)})
    (base / "model.safetensors").chmod(0o644)
    with nobody():
        for command in (
            ["convert", "in", "out", "--format", "lora"],
            ["convert", "in", "out", "--format", "peft"],
            ["merge", "base", "in", "out", "--no-check-base"],
        ):
            said = "error: out is not written: there is no permission to write in its folder.\n"
            assert run(capsys, *command)[::2] == (2, said)


def test_a_folder_of_the_base_that_cannot_be_listed(nobody, capsys):
    lora.save_adapter(model(), "in")
    base = base_folder(pathlib.Path("base"), {"0.weight": torch.ones(4, 6)})
    (base / "model.safetensors").chmod(0o644)
    os.mkdir("base/closed", 0o300)
    with nobody():
        code, _, error = run(capsys, "merge", "base", "in", "out", "--no-check-base")
    assert (code, error) == (2, "error: base/closed is not read: there is no permission to read it.\n")
    os.chmod("base/closed", 0o755)


# ---- a full disk -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(size):
    """The system writes so many bytes of a file, and then fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("given", ["a", "folder"])
def test_a_file_that_does_not_fit_leaves_the_old_one(given):
    os.mkdir("folder")
    lora.save_adapter(model(), given)
    file = pathlib.Path(given, "adapter.safetensors") if given == "folder" else pathlib.Path(given)
    before = file.read_bytes()
    with files_of_at_most(1000):
        error = refused(WRITERS["save_adapter"], given, OSError, f"{file} is not written: file too large.")
    assert error.errno == errno.EFBIG
    assert file.read_bytes() == before


def test_a_full_disk_keeps_its_number(monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    error = refused(WRITERS["save_adapter"], "a", OSError, "a is not written: no space left on device.")
    assert error.errno == errno.ENOSPC


@pytest.mark.parametrize("what", ["weights", "another file"])
def test_a_merged_model_that_does_not_fit_leaves_the_old_one(capsys, what):
    lora.save_adapter(model(), "in")
    base = base_folder(pathlib.Path("base"), {"0.weight": torch.ones(4, 6), "b": torch.ones(100)})
    base_folder(pathlib.Path("out"), {"0.weight": torch.zeros(4, 6)})
    if what == "another file":
        (base / "vocabulary.txt").write_bytes(b"x" * 2000)
    before = {path: path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()}
    with files_of_at_most(300 if what == "weights" else 1500):
        code, _, error = run(capsys, "merge", "base", "in", "out", "--overwrite", "--no-check-base")
    assert (code, error) == (2, "error: out is not written: file too large.\n")
    assert {path: path.read_bytes() for path in pathlib.Path().rglob("*") if path.is_file()} == before
