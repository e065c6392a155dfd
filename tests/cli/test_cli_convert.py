"""`convert`, `combine` and `resize`, against numpy's updates in float64."""

import copy

import numpy as np
import pytest
import tools
import torch
from cli_model import run, trained
from conftest import update
from toy_model import Model

import lora


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def updates(path):
    adapter = lora.read_adapter(path)
    return {name: adapter.delta(name, torch.float64).numpy() for name in adapter.modules}


@pytest.mark.parametrize("format", ["lora", "peft", "portable"])
def test_convert(path, tmp_path, capsys, format):
    _, _, layers = trained(path)
    out = tmp_path / "out"
    code, said, error = run(capsys, "convert", path, out, "--format", format)
    assert (code, error) == (0, "")
    assert "5 modules" in said
    assert out.is_dir() == (format != "lora")
    for name, delta in updates(out).items():
        np.testing.assert_allclose(delta, update(layers[name]), rtol=1e-6, atol=1e-6)
    assert lora.read_adapter(out).format == ("lora" if format == "lora" else "peft")


def test_converting_what_a_format_has_no_place_for(path, tmp_path, capsys):
    trained(path, modules_to_save=["norm"])
    code, _, error = run(capsys, "convert", path, tmp_path / "out", "--format", "portable")
    assert code == 2
    assert "layers.0.norm.weight trains in full" in error
    assert not (tmp_path / "out").exists()


def test_combine(path, tmp_path, capsys):
    other = tmp_path / "a=b"  # an equals sign of its own
    base = Model()
    _, _, a = trained(path, copy.deepcopy(base))
    _, _, b = trained(other, base)
    out = tmp_path / "out"
    assert run(capsys, "combine", out, f"{path}=0.25", other)[0] == 0
    for name, delta in updates(out).items():
        np.testing.assert_allclose(delta, 0.25 * update(a[name]) + update(b[name]), rtol=1e-5, atol=1e-5)
    assert run(capsys, "combine", out, path, f"{other}=-2", "--overwrite")[0] == 0
    for name, delta in updates(out).items():
        np.testing.assert_allclose(delta, update(a[name]) - 2 * update(b[name]), rtol=1e-5, atol=1e-5)


def test_combine_passes_everything_on(path, tmp_path, capsys):
    _, _, layers = trained(path)
    out, name = tmp_path / "out", "layers.0.mlp.up_proj"

    def combined(*options):
        code, _, error = run(capsys, "combine", out, path, path, "--overwrite", *options)
        assert (code, error) == (0, "")
        return lora.read_adapter(out).modules[name]["r"], updates(out)[name]

    r, delta = combined("--method", "svd", "--r", 1)
    U, S, Vt = np.linalg.svd(2 * update(layers[name]))
    assert r == 1
    np.testing.assert_allclose(delta, U[:, :1] * S[0] @ Vt[:1], rtol=1e-5, atol=1e-5)
    one, same, two = (combined("--method", "dare", "--seed", seed)[1] for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != two).any()
    _, all_of_it = combined("--method", "dare", "--density", 1)
    np.testing.assert_allclose(all_of_it, 2 * update(layers[name]), rtol=1e-5, atol=1e-5)
    assert run(capsys, "combine", tmp_path / "folder", path, "--format", "peft")[0] == 0
    assert (tmp_path / "folder" / "adapter_config.json").is_file()


def test_combine_checks_the_base(path, tmp_path, capsys):
    trained(path)
    trained(tmp_path / "other")  # of another random base
    combine = ["combine", tmp_path / "out", path, tmp_path / "other"]
    code, _, error = run(capsys, *combine)
    assert code == 2
    assert error.count("the base weights of adapters 0 and 1 are not the same") == 5  # embed, and what is adapted
    assert "head.weight: adapter 1 was trained in another base model than an earlier one" in error
    assert "`--no-check-base`" in error
    assert "check_base=" not in error
    assert run(capsys, *combine, "--no-check-base")[0] == 0


@pytest.mark.parametrize("weight", ["", "much", "nan", "inf"])
def test_a_weight_that_is_none(path, tmp_path, capsys, weight):
    trained(path)
    code, _, error = run(capsys, "combine", tmp_path / "out", f"{path}={weight}")
    assert code == 2
    assert "must be a finite number" in error


def test_resize(path, tmp_path, capsys):
    _, _, layers = trained(path)
    out, name = tmp_path / "out", "layers.0.mlp.up_proj"
    code, said, _ = run(capsys, "resize", path, out, "--r", 1)
    assert code == 0
    U, S, Vt = np.linalg.svd(update(layers[name]))
    np.testing.assert_allclose(updates(out)[name], U[:, :1] * S[0] @ Vt[:1], rtol=1e-5, atol=1e-5)
    row = next(line for line in said.splitlines() if line.startswith(name))
    assert row.split() == [name, "2", "1", f"{100 * S[0] ** 2 / (S**2).sum():.2f}", "%"]
    code, said, _ = run(capsys, "resize", path, out, "--energy", 1, "--overwrite")
    assert code == 0
    np.testing.assert_allclose(updates(out)[name], update(layers[name]), rtol=1e-5, atol=1e-5)
    code, _, error = run(capsys, "resize", path, out, "--energy", 2, "--overwrite")
    assert code == 2
    assert "energy" in error


def test_what_a_file_does_not_say_is_said(tmp_path, capsys):
    path, _, updates, _ = tools.raw_peft(tmp_path)
    code, _, error = run(capsys, "convert", path, tmp_path / "out", "--format", "peft")
    assert code == 2
    assert f"`lora convert {path} NEW --format lora --lora-alpha X`" in error
    assert run(capsys, "convert", path, tmp_path / "out", "--format", "peft", "--lora-alpha", 7)[0] == 0
    adapter = lora.read_adapter(tmp_path / "out")
    for name, expected in updates.items():
        np.testing.assert_allclose(adapter.delta(name, torch.float64).numpy(), expected, rtol=1e-6, atol=1e-6)
    code, _, error = run(capsys, "convert", tmp_path / "out", tmp_path / "b", "--format", "lora", "--lora-alpha", 7)
    assert code == 2
    assert "`lora_alpha` is for files that do not say it" in error
