"""`inspect --plot`."""

import os

import matplotlib.image
import pytest
from cli_model import run, trained
from test_paths import files_of_at_most

from lora.cli.inspect import grid


def test_plot(tmp_path, capsys):
    trained(tmp_path / "adapter")
    code, out, error = run(capsys, "inspect", tmp_path / "adapter", "--plot", tmp_path / "plot.png")
    assert (code, error) == (0, "")
    assert "up_proj" in out
    image = matplotlib.image.imread(tmp_path / "plot.png")
    assert image.ndim == 3
    assert image[..., :3].std() > 0.05  # something is drawn


def test_a_kind_of_file_that_there_is_not(tmp_path, capsys):
    trained(tmp_path / "adapter")
    code, _, error = run(capsys, "inspect", tmp_path / "adapter", "--plot", tmp_path / "plot.mine")
    assert code == 2
    assert "mine" in error


def test_a_plot_that_does_not_fit_leaves_the_old_one(tmp_path, capsys):
    trained(tmp_path / "adapter")
    plot = tmp_path / "plot.png"
    assert run(capsys, "inspect", tmp_path / "adapter", "--plot", plot)[0] == 0
    before = plot.read_bytes()
    with files_of_at_most(1000):
        code, _, error = run(capsys, "inspect", tmp_path / "adapter", "--plot", plot, "--overwrite")
    assert (code, error) == (2, f"error: {plot} is not written: file too large.\n")
    assert plot.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["adapter", "plot.png"]


def test_layers_and_projections():
    norms = {"model.layers.10.attn.q": 1.0, "model.layers.2.attn.q": 2.0, "model.layers.2.mlp.up": None, "head": 3.0}
    rows, columns, values = grid(norms)
    assert (rows, columns) == (["-", "2", "10"], ["attn.q", "mlp.up", "head"])
    assert str(values) == "[[nan, nan, 3.0], [2.0, nan, nan], [1.0, nan, nan]]"


def test_two_stacks_of_layers_are_kept_apart():
    rows, columns, _ = grid({"encoder.0.q": 1.0, "decoder.0.q": 2.0})
    assert (rows, columns) == (["0"], ["encoder.q", "decoder.q"])


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no module"):
        grid({})
