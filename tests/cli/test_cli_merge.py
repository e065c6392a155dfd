"""`merge`: what it writes is W₀ + s · B A, taken in float64 and rounded once, in the base's own layout."""

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn as nn
from cli_model import base_folder, content, expected, run, trained
from conftest import STORED, make, update

import lora

# How far a sum in float32, rounded, may be from one in float64: a unit of the last place.
EPS = {torch.float32: 2**-22, torch.float64: 2**-50, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "merged model"


def assert_merged(merged, wanted, dtype):
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert merged[name].dtype == tensor.dtype, name
        torch.testing.assert_close(merged[name], tensor, rtol=EPS[dtype], atol=EPS[dtype] / 4, msg=name)
        if dtype in (torch.bfloat16, torch.float16):  # ties between neighbours are all that may go the other way
            assert (merged[name] != tensor).float().mean() < 0.02, name


def header(path):
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [*EPS], ids=str)
def test_merge(path, out, tmp_path, capsys, files, dtype):
    _, state, layers = trained(path, dtype=dtype)
    base = base_folder(tmp_path / "base", state, files)
    code, said, error = run(capsys, "merge", base, path, out)
    assert (code, error) == (0, "")
    wanted = expected(state, layers)
    assert_merged(content(out), wanted, dtype)
    for name, tensor in state.items():
        changed = name.removesuffix(".weight") in layers and name.endswith(".weight")
        assert torch.equal(content(out)[name], tensor) != changed, name
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in base.iterdir())
    for file in base.iterdir():
        if file.suffix == ".safetensors":
            assert header(out / file.name) == header(file)
        else:
            assert (out / file.name).read_bytes() == file.read_bytes()
    assert all(name in said for name in layers)


@pytest.mark.parametrize("kind", STORED)
def test_every_kind(kind, path, out, tmp_path, capsys):
    layer = make(kind)
    state = {f"it.{name}": t for name, t in layer.state_dict().items() if not name.startswith("lora_")}
    lora.save_adapter(nn.ModuleDict({"it": layer}), path)
    assert run(capsys, "merge", base_folder(tmp_path / "base", state), path, out)[0] == 0
    assert_merged(content(out), expected(state, {"it": layer}), torch.float32)


def test_what_trained_in_full_replaces_the_base(path, out, tmp_path, capsys):
    model, state, layers = trained(path, modules_to_save=["norm"], bias="lora_only")
    code, said, _ = run(capsys, "merge", base_folder(tmp_path / "base", state, 2), path, out)
    assert code == 0
    wanted, after = expected(state, layers), model.state_dict()
    replaced = {n for n in state if ".norm." in n or (n.endswith(".bias") and n.removesuffix(".bias") in layers)}
    assert len(replaced) == 8
    assert_merged(content(out), wanted | {name: after[name] for name in replaced}, torch.float32)
    assert all(f"replaced: {name}" in said for name in replaced)
    assert not any(torch.equal(content(out)[name], state[name]) for name in replaced)


def test_in_full_in_another_precision(path, out, tmp_path, capsys):
    _, state, _ = trained(path, modules_to_save=["norm"], dtype=torch.bfloat16)
    adapter = lora.read_adapter(path)
    value = torch.linspace(0.1, 0.9, 8)
    adapter.tensors["layers.0.norm.weight"] = value
    lora.write_adapter(adapter, path)
    assert run(capsys, "merge", base_folder(tmp_path / "base", state), path, out)[0] == 0
    merged = content(out)["layers.0.norm.weight"]
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, value.bfloat16())


def test_what_rounding_lost(path, out, tmp_path, capsys):
    _, state, layers = trained(path, dtype=torch.bfloat16)
    code, said, _ = run(capsys, "merge", base_folder(tmp_path / "base", state), path, out, "--json")
    assert code == 0
    found, merged = json.loads(said), content(out)
    assert [module["name"] for module in found["modules"]] == [*layers]
    for module in found["modules"]:
        delta = update(layers[module["name"]])
        after, before = (w[f"{module['name']}.weight"].double().numpy() for w in (merged, state))
        assert module["lost"] == pytest.approx(np.linalg.norm(after - before - delta) / np.linalg.norm(delta), rel=0.02)
        assert module["dtype"] == "bfloat16"
    assert found["lost"] == max(module["lost"] for module in found["modules"]) > 0


def test_other_files(path, out, tmp_path, capsys):
    _, state, _ = trained(path)
    base = base_folder(tmp_path / "base", state, config={"model_type": "mine"})
    files = {
        "tokenizer.json": True,
        "merges.txt": True,
        "1_Pooling/config.json": True,
        "pytorch_model.bin": False,
        "pytorch_model.bin.index.json": False,
        "original/consolidated.00.pth": False,
        "other.safetensors": False,
        "adapter_config.json": False,
        ".git/HEAD": None,
    }
    for name in files:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name, encoding="utf-8")
    code, said, _ = run(capsys, "merge", base, path, out)
    assert code == 0
    for name, copied in files.items():
        assert (out / name).is_file() == bool(copied), name
        assert ("not copied: " + str((out / name).relative_to(out)) in said) == (copied is False), name
    assert (out / "1_Pooling" / "config.json").read_text(encoding="utf-8") == "1_Pooling/config.json"
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert run(capsys, "merge", base, path, out, "--overwrite", "--json")[0] == 0


@pytest.mark.parametrize(
    ("in_adapter", "in_base"), [("model.", ""), ("", "model."), ("base_model.model.", ""), ("transformer.", "")]
)
def test_prefixes(path, out, tmp_path, capsys, in_adapter, in_base):
    _, state, layers = trained(path, bias="lora_only")
    adapter = lora.read_adapter(path)
    renamed = lora.Adapter(
        {in_adapter + name: about for name, about in adapter.modules.items()},
        {in_adapter + name: tensor for name, tensor in adapter.tensors.items()},
        [in_adapter + name for name in adapter.trained_in_full],
    )
    lora.write_adapter(renamed, path)
    base = base_folder(tmp_path / "base", {in_base + name: tensor for name, tensor in state.items()}, 2)
    assert run(capsys, "merge", base, path, out)[0] == 0
    merged = content(out)
    for name, layer in layers.items():
        wanted = expected(state, {name: layer})[f"{name}.weight"]
        torch.testing.assert_close(merged[f"{in_base}{name}.weight"], wanted, rtol=2**-22, atol=2**-23)


def test_from_peft_and_back(path, out, tmp_path, capsys):
    _, state, layers = trained(path)
    run(capsys, "convert", path, tmp_path / "peft", "--format", "peft")
    assert run(capsys, "merge", base_folder(tmp_path / "base", state), tmp_path / "peft", out)[0] == 0
    assert_merged(content(out), expected(state, layers), torch.float32)


def test_tensors_of_any_dtype_go_through(path, out, tmp_path, capsys):
    _, state, layers = trained(path)
    state["count"] = torch.tensor(7)
    state["mask"] = torch.tensor([[True, False]])
    state["empty"] = torch.zeros(0, 3)
    state["packed"] = torch.randint(0, 255, (3, 5), dtype=torch.uint8)
    state["half"] = torch.randn(4).to(torch.float8_e4m3fn)
    state["big"] = torch.randn(2**19 + 3, dtype=torch.float64)  # more than what is copied at a time
    base = base_folder(tmp_path / "base", state, 2)
    assert run(capsys, "merge", base, path, out)[0] == 0
    merged = content(out)
    for name in ("count", "mask", "empty", "packed", "half", "big"):
        assert merged[name].dtype == state[name].dtype
        assert torch.equal(merged[name].view(torch.uint8), state[name].view(torch.uint8)) if merged[name].dim() else 1
    assert merged["count"] == 7
    for name, tensor in expected(state, layers).items():  # they stand between the others, ordered by dtype
        if name.removesuffix(".weight") in layers:
            torch.testing.assert_close(merged[name], tensor, rtol=2**-22, atol=2**-23)


def test_overwrite_replaces_a_folder_as_a_whole(path, out, tmp_path, capsys):
    _, state, _ = trained(path)
    base = base_folder(tmp_path / "base", state)
    out.mkdir()
    (out / "mine").write_text("mine", encoding="utf-8")
    assert run(capsys, "merge", base, path, out)[0] == 2
    assert [file.name for file in out.iterdir()] == ["mine"]
    (out / "config.json").write_text("{}", encoding="utf-8")  # a model's, which may go
    assert run(capsys, "merge", base, path, out, "--overwrite")[0] == 0
    assert [file.name for file in out.iterdir()] == ["model.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.safetensors", "base", "merged model"]


# ---- memory ------------------------------------------------------------------------------------------------------

PEAK = """
import pathlib, sys
from lora.__main__ import main

def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes

before = peak()
code = main(sys.argv[1:])
print(peak() - before)
sys.exit(code)
"""


def many_layers(path, folder, layers, size, dtype=torch.float32):
    """The adapter of a stack of layers, all adapted, in a base of one file."""
    model = nn.Sequential(*(nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(layers)))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora.inject(model, target_modules="all-linear", r=2)
    lora.save_adapter(model, path)
    return base_folder(folder, state)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no measure of this in the standard library")
def test_memory_of_the_process(path, out, tmp_path):
    base = many_layers(path, tmp_path / "base", layers=96, size=1024)  # 96 tensors of 4 MiB
    command = [sys.executable, "-c", PEAK, "merge", base, path, out, "--json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    grown = int(done.stdout.splitlines()[-1])
    assert grown < (base / "model.safetensors").stat().st_size / 5  # of 384 MiB; torch's own workspaces take some 60


def test_memory_that_python_allocates(path, out, tmp_path, capsys):
    base = many_layers(path, tmp_path / "base", layers=40, size=512)  # 40 tensors of 1 MiB
    tracemalloc.start()
    try:
        assert run(capsys, "merge", base, path, out)[0] == 0
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 2**20 <= most < 6 * 2**20
