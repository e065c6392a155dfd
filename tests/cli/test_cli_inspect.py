"""`inspect` and `diff`: norms, ranks and distances against numpy's dense updates in float64."""

import json
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
from cli_model import run, trained
from conftest import STORED, make, update

import lora
from lora.adapters.files import checksum


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def inspected(capsys, *arguments):
    code, out, _ = run(capsys, "inspect", *arguments, "--json")
    found = json.loads(out)
    return code, found, {module["name"]: module for module in found["modules"]}


def effective_rank(matrix):
    energy = np.linalg.svd(matrix, compute_uv=False) ** 2
    energy = energy[energy > energy.max() * 1e-24]
    share = energy / energy.sum()
    return np.exp(-(share * np.log(share)).sum())


def test_norms_and_ranks(path, capsys):
    _, state, layers = trained(path, lora_dropout=0.1)
    code, found, modules = inspected(capsys, path)
    assert code == 0
    assert list(modules) == list(layers)
    assert found["parameters"] == sum(p.numel() for layer in layers.values() for _, p in layer.lora_parameters())
    assert found["bytes"] == 4 * found["parameters"]
    for name, layer in layers.items():
        module, delta, weight = modules[name], update(layer), state[f"{name}.weight"].double().numpy()
        assert module["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-9)
        sample = weight.reshape(-1)[[k * (weight.size - 1) // 15 for k in range(16)]]
        estimate = np.sqrt(np.mean(sample**2)) * np.sqrt(weight.size)
        assert module["relative_norm_estimate"] == pytest.approx(np.linalg.norm(delta) / estimate, rel=1e-6)
        assert (module["r"], module["lora_alpha"], module["scaling"]) == (2, 3, 1.5)
        assert module["shape"] == list(weight.shape)
    for name in ("layers.0.mlp.up_proj", "embed"):
        assert modules[name]["kind"] == ("embedding" if name == "embed" else "linear")
        assert modules[name]["effective_rank"] == pytest.approx(effective_rank(update(layers[name])), rel=1e-6)
        assert [block["rows"] for block in modules[name]["blocks"]] == [None]


def test_splits_one_by_one(path, capsys):
    _, _, layers = trained(path)
    _, _, modules = inspected(capsys, path)
    delta, module = update(layers["layers.1.attn.q_proj"]), modules["layers.1.attn.q_proj"]
    assert [block["rows"] for block in module["blocks"]] == [[0, 5], [7, 8]]
    for block in module["blocks"]:
        part = delta[slice(*block["rows"])]
        assert block["norm"] == pytest.approx(np.linalg.norm(part), rel=1e-9)
        assert block["effective_rank"] == pytest.approx(effective_rank(part), rel=1e-6)
    assert module["effective_rank"] == max(block["effective_rank"] for block in module["blocks"])
    _, out, _ = run(capsys, "inspect", path)
    assert "  rows 7:8" in out
    assert "~" in out


@pytest.mark.parametrize("kind", STORED)
def test_every_kind(kind, path, capsys):
    layer = make(kind, use_rslora=False)
    lora.save_adapter(nn.ModuleDict({"it": layer}), path)
    code, _, modules = inspected(capsys, path)
    assert code == 0
    assert modules["it"]["norm"] == pytest.approx(np.linalg.norm(update(layer)), rel=1e-6)
    assert run(capsys, "diff", path, path)[0] == 0


def test_an_update_of_zeros(path, capsys):
    lora.save_adapter(nn.Sequential(lora.Linear(4, 3, r=2)), path)
    _, _, modules = inspected(capsys, path)
    assert (modules["0"]["norm"], modules["0"]["effective_rank"]) == (0, 0)


def damage(path, change):
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        metadata = file.metadata()
    about = json.loads(metadata["lora"])
    change(tensors, about)
    metadata = {**metadata, "lora": json.dumps(about)}
    safetensors.torch.save_file(tensors, path, {**metadata, "sha256": checksum(tensors, metadata)})


def test_nan_is_reported(path, capsys):
    _, _, layers = trained(path)

    def poison(tensors, about):
        tensors["layers.0.mlp.up_proj.lora_A"][0, 1] = torch.nan
        tensors["embed.lora_B"][0, 0] = -torch.inf

    damage(path, poison)
    code, found, modules = inspected(capsys, path)
    assert code == 1
    assert sorted(found["problems"]) == [
        "embed.lora_B holds NaN or infinity.",
        "layers.0.mlp.up_proj.lora_A holds NaN or infinity.",
    ]
    assert modules["embed"]["norm"] is modules["embed"]["effective_rank"] is None
    assert modules["embed"]["r"] == 2
    assert modules["layers.1.mlp.up_proj"]["norm"] == pytest.approx(
        np.linalg.norm(update(layers["layers.1.mlp.up_proj"])), rel=1e-9
    )
    code, out, _ = run(capsys, "inspect", path)
    assert code == 1
    assert "problem: embed.lora_B holds NaN or infinity." in out
    assert run(capsys, "diff", path, path)[0] == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: about["modules"]["embed"].update(r="two"),
        lambda tensors, about: about["modules"]["embed"].update(base=None),
        lambda tensors, about: about["modules"]["embed"].pop("scaling"),
        lambda tensors, about: tensors.pop("embed.lora_A"),
        lambda tensors, about: about["modules"]["embed"].update(r=3),
        lambda tensors, about: tensors.update({"embed.lora_A": torch.zeros(2, 0)}),
    ],
)
def test_whatever_is_wrong_is_reported(path, capsys, change):
    trained(path)
    damage(path, change)
    code, found, modules = inspected(capsys, path)
    assert code == 1
    assert all("embed" in problem for problem in found["problems"])
    assert modules["embed"]["norm"] is None
    assert modules["layers.1.mlp.up_proj"]["norm"] > 0
    assert run(capsys, "inspect", path)[0] == 1


def test_a_kind_that_only_its_model_knows_is_no_problem(path, capsys):
    trained(path)
    damage(path, lambda tensors, about: about["modules"]["embed"]["base"].update(kind="Mine"))
    code, _, modules = inspected(capsys, path)
    assert code == 0
    assert (modules["embed"]["kind"], modules["embed"]["norm"]) == ("Mine", None)
    assert run(capsys, "diff", path, path)[0] == 0


def test_what_trained_in_full(path, capsys):
    trained(path, modules_to_save=["norm"], bias="lora_only")
    _, found, _ = inspected(capsys, path)
    names = [entry["name"] for entry in found["trained_in_full"]]
    assert {"layers.0.norm.weight", "layers.1.attn.q_proj.bias"} <= set(names)
    assert found["modules_to_save"] == ["layers.0.norm", "layers.1.norm"]
    assert "trained in full: layers.0.norm.weight 8 float32" in run(capsys, "inspect", path)[1]


def test_plot_without_matplotlib(path, tmp_path, capsys, monkeypatch):
    trained(path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, error = run(capsys, "inspect", path, "--plot", tmp_path / "plot.png")
    assert code == 2
    assert "pip install matplotlib" in error


# ---- diff --------------------------------------------------------------------------------------------------------


def compared(capsys, *arguments):
    code, out, _ = run(capsys, "diff", *arguments, "--json")
    found = json.loads(out)
    return code, found, {module["name"]: module for module in found["modules"]}


def test_distances(path, tmp_path, capsys):
    other = tmp_path / "other"
    _, _, a = trained(path)
    torch.manual_seed(1)
    _, _, b = trained(other, r=4, lora_alpha=8)
    code, found, modules = compared(capsys, path, other)
    assert code == 1
    assert not found["same"]
    for name in a:
        A, B = update(a[name]), update(b[name])
        assert modules[name]["relative_distance"] == pytest.approx(np.linalg.norm(A - B) / np.linalg.norm(A), rel=1e-9)
        assert modules[name]["cosine"] == pytest.approx((A * B).sum() / np.linalg.norm(A) / np.linalg.norm(B), abs=1e-9)
        assert modules[name]["settings"]["r"] == [2, 4]
        assert modules[name]["differs"]
    code, out, _ = run(capsys, "diff", path, other)
    assert code == 1
    assert "embed: lora_alpha is 3 in A and 8 in B" in out


def test_the_same_function_in_another_form(path, tmp_path, capsys):
    trained(path)
    run(capsys, "convert", path, tmp_path / "portable", "--format", "portable")
    code, found, modules = compared(capsys, path, tmp_path / "portable")
    assert code == 0
    assert found["same"]
    assert modules["layers.0.attn.q_proj"]["settings"]["splits"] == [[5, 2, 1], None]
    assert all(module["relative_distance"] < 1e-6 for module in modules.values())


def test_other_splits(path, tmp_path, capsys):
    other = tmp_path / "other"
    _, _, a = trained(path)
    _, _, b = trained(other, enable_lora={"q_proj": [0, 1, 1]})
    _, _, modules = compared(capsys, path, other)
    name = "layers.0.attn.q_proj"
    A, B = update(a[name]), update(b[name])
    assert modules[name]["relative_distance"] == pytest.approx(np.linalg.norm(A - B) / np.linalg.norm(A), rel=1e-9)


def test_tolerance(path, tmp_path, capsys):
    other = tmp_path / "other"
    model, _, layers = trained(path)
    with torch.no_grad():
        layers["embed"].lora_A.mul_(1 + 1e-4)
    lora.save_adapter(model, other)
    assert run(capsys, "diff", path, other)[0] == 1
    assert run(capsys, "diff", path, other, "--tolerance", 1e-3)[0] == 0
    _, _, modules = compared(capsys, path, other)
    assert [name for name, module in modules.items() if module["differs"]] == ["embed"]


def test_modules_in_one_only(path, tmp_path, capsys):
    other = tmp_path / "other"
    trained(path)
    trained(other, target_modules=["q_proj"])
    code, found, _ = compared(capsys, path, other)
    assert code == 1
    assert {entry["name"] for entry in found["only_a"]} == {"embed", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj"}
    assert found["only_b"] == []
    code, out, _ = run(capsys, "diff", other, path)
    assert code == 1
    assert "only in B: embed" in out


def test_a_module_more_is_a_difference_whoever_has_it(path, tmp_path, capsys):
    other = tmp_path / "other"
    trained(path)
    adapter = lora.read_adapter(path)
    del adapter.modules["embed"], adapter.tensors["embed.lora_A"], adapter.tensors["embed.lora_B"]
    lora.write_adapter(adapter, other)
    assert run(capsys, "diff", path, other)[0] == 1
    assert run(capsys, "diff", other, path)[0] == 1


def test_a_module_more_that_changes_nothing_is_no_difference(path, tmp_path, capsys):
    other = tmp_path / "other"
    trained(path)
    adapter = lora.read_adapter(path)
    adapter.tensors["embed.lora_B"].zero_()
    lora.write_adapter(adapter, path)
    for part in ("lora_A", "lora_B"):
        del adapter.tensors[f"embed.{part}"]
    del adapter.modules["embed"]
    lora.write_adapter(adapter, other)
    assert run(capsys, "diff", path, other)[0] == 0
    assert "only in B: embed (its update is 0)" in run(capsys, "diff", other, path)[1]


def test_zero_against_something(path, tmp_path, capsys):
    other = tmp_path / "other"
    trained(path)
    adapter = lora.read_adapter(path)
    adapter.tensors["embed.lora_B"].zero_()
    lora.write_adapter(adapter, other)
    code, _, modules = compared(capsys, other, path)
    assert code == 1
    assert modules["embed"]["relative_distance"] is modules["embed"]["cosine"] is None
    assert modules["embed"]["distance"] == pytest.approx(modules["embed"]["norm_b"])


def test_what_trained_in_full_counts(path, tmp_path, capsys):
    other = tmp_path / "other"
    model, _, _ = trained(path, modules_to_save=["norm"])
    with torch.no_grad():
        model.layers[0].norm.weight.add_(1)
        expected = np.sqrt(8) / np.linalg.norm(model.layers[0].norm.weight.double().numpy() - 1)
    lora.save_adapter(model, other)
    code, found, _ = compared(capsys, path, other)
    assert code == 1
    full = {entry["name"]: entry for entry in found["trained_in_full"]}
    assert full["layers.0.norm.weight"]["relative_distance"] == pytest.approx(expected, rel=1e-5)
    assert not full["layers.1.norm.weight"]["differs"]
    trained(other)
    assert "trained in full in A only" in run(capsys, "diff", path, other)[1]


def test_other_layers_cannot_be_compared(tmp_path, capsys):
    paths = [tmp_path / name for name in "ab"]
    for path, kind in zip(paths, ("Linear", "Embedding"), strict=True):
        lora.save_adapter(nn.ModuleDict({"it": make(kind)}), path)
    code, _, modules = compared(capsys, *paths)
    assert code == 1
    assert "different layers" in modules["it"]["why"]
    lora.save_adapter(nn.ModuleDict({"it": make("Linear", in_features=7)}), paths[1])
    code, _, modules = compared(capsys, *paths)
    assert code == 1
    assert "different shapes" in modules["it"]["why"]


@pytest.mark.parametrize("use_dora", [False, True])
def test_magnitudes_are_counted_and_named(path, capsys, use_dora):
    lora.save_adapter(nn.Sequential(make("Linear", use_dora=use_dora, bias=False)), path)
    _, _, modules = inspected(capsys, path)
    assert modules["0"]["parameters"] == 2 * 6 + 5 * 2 + 5 * use_dora
    _, out, _ = run(capsys, "inspect", str(path))
    assert ("linear, DoRA" in out) is use_dora
