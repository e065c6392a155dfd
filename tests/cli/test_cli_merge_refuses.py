"""`merge` refuses what does not fit, all in one error, and leaves nothing behind."""

import dataclasses
import json
import os

import pytest
import safetensors.torch
import tools
import torch
from cli_model import base_folder, run, trained

import lora
from lora.__main__ import main
from lora.cli import folder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def refused(capsys, tmp_path, base, path, *options):
    """The error of a merge that fails, which leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    code, out, error = run(capsys, "merge", base, path, tmp_path / "out", *options)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before
    return error


def test_everything_in_one_error(path, tmp_path, capsys):
    _, state, _ = trained(path, modules_to_save=["norm"])
    del state["layers.0.attn.q_proj.weight"]
    state["layers.0.attn.q_proj.qweight"] = torch.zeros(2, 2, dtype=torch.int32)
    state["layers.1.attn.q_proj.weight"] = torch.zeros(8, 8, dtype=torch.int8)
    state["layers.0.mlp.up_proj.weight"] = torch.zeros(12, 9)
    state["layers.1.mlp.up_proj.weight"] += 1
    state["layers.0.norm.weight"] = torch.zeros(9)
    state["layers.1.norm.bias"] = torch.zeros(8, dtype=torch.int64)
    del state["layers.0.norm.bias"]
    base = base_folder(tmp_path / "base", state, 2)
    error = refused(capsys, tmp_path, base, path)
    for name, reason in {
        "layers.0.attn.q_proj": "there is layers.0.attn.q_proj.bias, layers.0.attn.q_proj.qweight",
        "layers.1.attn.q_proj": "torch.int8, which is quantised",
        "layers.0.mlp.up_proj": "must have the shape (12, 8), got (12, 9)",
        "layers.1.mlp.up_proj": "not the one that the adapter was trained on",
        "layers.0.norm.weight": "must have the shape (9,), got (8,)",
        "layers.1.norm.bias": "must be of dtype torch.int64, got torch.float32",
        "layers.0.norm.bias": "there is no such tensor",
    }.items():
        line = next(line for line in error.splitlines() if line.startswith(f"  - {name}"))
        assert reason in line, name
    assert len(error.splitlines()) == 8


def test_another_base_if_asked(path, tmp_path, capsys):
    _, state, _ = trained(path)
    state["embed.weight"] += 1
    base = base_folder(tmp_path / "base", state)
    error = refused(capsys, tmp_path, base, path)
    assert "embed: the base weight is not the one" in error
    assert "`--no-check-base` loads it all the same" in error
    assert "check_base=" not in error
    assert run(capsys, "merge", base, path, tmp_path / "out", "--no-check-base")[0] == 0


def tied_base(path, tmp_path, config, head=True, **fields):
    """A model whose embedding and output layer are called as in transformers."""
    model = torch.nn.ModuleDict(
        {"embed_tokens": torch.nn.Embedding(6, 4), "lm_head": torch.nn.Linear(4, 6, bias=False)}
    )
    model["up"] = torch.nn.Linear(4, 4)
    _, state, _ = trained(path, model, **{"splits": {}, "enable_lora": {}, "target_modules": ["up"], **fields})
    if not head:
        del state["lm_head.weight"]
    return base_folder(tmp_path / "base", state, config=config)


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}, "model_type": "x"}]
)
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("head", [True, False])
def test_tied_embeddings(path, tmp_path, capsys, config, target, head):
    base = tied_base(path, tmp_path, config, head, target_modules=[target, "up"])
    error = refused(capsys, tmp_path, base, path)
    assert f"{target}: config.json ties" in error
    assert "up:" not in error


def test_a_configuration_that_does_not_say_whether_they_are_tied(path, tmp_path, capsys):
    base = tied_base(path, tmp_path, {"model_type": "x"}, head=False, target_modules=["embed_tokens"])
    assert "embed_tokens: config.json ties" in refused(capsys, tmp_path, base, path)


@pytest.mark.parametrize(
    ("config", "head"), [({"tie_word_embeddings": False}, True), ({"tie_word_embeddings": False}, False), (None, False)]
)
def test_embeddings_that_are_not_tied(path, tmp_path, capsys, config, head):
    base = tied_base(path, tmp_path, config, head, target_modules=["embed_tokens"])
    assert run(capsys, "merge", base, path, tmp_path / "out")[0] == 0


def test_tied_weights_that_trained_in_full(path, tmp_path, capsys):
    base = tied_base(path, tmp_path, {"tie_word_embeddings": True}, modules_to_save=["lm_head"])
    assert "lm_head: trained in full" in refused(capsys, tmp_path, base, path)
    base.rename(tmp_path / "before")
    base = tied_base(path, tmp_path, {"tie_word_embeddings": True}, False, modules_to_save=["embed_tokens"])
    assert run(capsys, "merge", base, path, tmp_path / "out")[0] == 0


def test_a_merged_weight_that_is_not_finite(path, tmp_path, capsys):
    _, state, _ = trained(path, dtype=torch.float16)
    adapter = lora.read_adapter(path)
    name = "layers.1.mlp.up_proj"
    adapter.modules[name] = dataclasses.replace(adapter.modules[name], scaling=1e6)
    lora.write_adapter(adapter, path)
    error = refused(capsys, tmp_path, base_folder(tmp_path / "base", state, 2), path)
    assert "layers.1.mlp.up_proj: the merged weight would not be finite in torch.float16" in error


def test_several_prefixes_fit(path, tmp_path, capsys):
    _, state, _ = trained(path)
    both = {
        f"{prefix}{name}": tensor.clone() for prefix in ("model.", "transformer.") for name, tensor in state.items()
    }
    assert "several prefixes fit" in refused(capsys, tmp_path, base_folder(tmp_path / "base", both), path)


def test_two_names_for_one_weight(path, tmp_path, capsys):
    _, state, _ = trained(path, target_modules=["embed"], splits={}, enable_lora={})
    adapter = lora.read_adapter(path)
    adapter.modules["model.embed"] = adapter.modules["embed"]
    adapter.tensors.update({f"model.{name}": tensor for name, tensor in adapter.tensors.items()})
    lora.write_adapter(adapter, path)
    error = refused(capsys, tmp_path, base_folder(tmp_path / "base", state), path)
    assert "model.embed.weight: there is no such tensor" in error


def test_names_as_they_are_go_first(path, tmp_path, capsys):
    _, state, _ = trained(path)
    both = {f"{prefix}{name}": tensor.clone() for prefix in ("", "model.") for name, tensor in state.items()}
    assert run(capsys, "merge", base_folder(tmp_path / "base", both), path, tmp_path / "out")[0] == 0
    merged = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["model.embed.weight"], state["embed.weight"])
    assert not torch.equal(merged["embed.weight"], state["embed.weight"])


def test_folders_that_hold_no_model(path, tmp_path, capsys):
    trained(path)
    assert "must be the folder of a model" in refused(capsys, tmp_path, path, path)
    (tmp_path / "base").mkdir()
    assert "has neither model.safetensors nor" in refused(capsys, tmp_path, tmp_path / "base", path)
    (tmp_path / "base" / "model.safetensors").write_bytes(b"no header")
    assert "model.safetensors" in refused(capsys, tmp_path, tmp_path / "base", path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda files: files.update(x="model-00009-of-00009.safetensors"),
            "model-00009-of-00009.safetensors is missing",
        ),
        (lambda files: files.update(x="../adapter.safetensors"), "must be the name of a safetensors file"),
        (lambda files: files.update(x="C:adapter.safetensors"), "must be the name of a safetensors file"),
        (lambda files: files.update(x="model-00001-of-00002.safetensors"), "x is not in model-00001"),
        (lambda files: files.update(x=3), "must have a `weight_map`"),
    ],
)
def test_an_index_that_does_not_fit(path, tmp_path, capsys, change, reason):
    _, state, _ = trained(path)
    base = base_folder(tmp_path / "base", state, 2)
    index = base / "model.safetensors.index.json"
    about = json.loads(index.read_text(encoding="utf-8"))
    change(about["weight_map"])
    index.write_text(json.dumps(about), encoding="utf-8")
    assert reason in refused(capsys, tmp_path, base, path)
    index.write_text("[", encoding="utf-8")
    assert "is not JSON" in refused(capsys, tmp_path, base, path)


def test_out_in_the_base_or_around_it(path, tmp_path, capsys):
    _, state, _ = trained(path)
    base = base_folder(tmp_path / "models" / "base", state)
    before = sorted(tmp_path.rglob("*"))
    for out in (base / "out", base, base.parent):
        code, _, error = run(capsys, "merge", base, path, out, "--overwrite")
        assert code == 2
        assert "must not be" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite_is_for_folders_of_models(path, tmp_path, capsys):
    _, state, _ = trained(path)
    base, out = base_folder(tmp_path / "base", state), tmp_path / "out"
    out.mkdir()
    for name in ("thesis.tex", "photos", "b", "c", "d", "zebra"):
        (out / name).mkdir()
    error = refused(capsys, tmp_path, base, path, "--overwrite")
    assert "neither config.json nor a safetensors file" in error
    assert "b, c, d, photos, thesis.tex and 1 more" in error
    (out / "config.json").write_text("{}", encoding="utf-8")
    assert run(capsys, "merge", base, path, out, "--overwrite")[0] == 0
    assert [file.name for file in out.iterdir()] == ["model.safetensors"]
    assert run(capsys, "merge", base, path, out, "--overwrite")[0] == 0  # no config.json, but weights
    (out / "model.safetensors").unlink()
    assert run(capsys, "merge", base, path, out, "--overwrite")[0] == 0  # an empty folder is nothing to lose


def test_overwrite_replaces_no_file(path, tmp_path, capsys):
    _, state, _ = trained(path)
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    error = refused(capsys, tmp_path, base_folder(tmp_path / "base", state), path, "--overwrite")
    assert "is a file" in error
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def peft_folder(folder, fan_in_fan_out, **shapes):
    """A folder as PEFT writes it, by hand: A and B of modules with these numbers of outputs and inputs."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "fan_in_fan_out": fan_in_fan_out}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for name, (n_out, n_in) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, n_in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(n_out, 2)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return {
        name: 3 * tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
        for name in shapes
    }


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_weights_that_may_be_transposed_are_merged_as_they_fit(tmp_path, capsys, fan_in_fan_out):
    deltas = peft_folder(tmp_path / "peft", fan_in_fan_out, c_attn=(12, 4), c_fc=(6, 4))
    state = {"c_attn.weight": torch.randn(4, 12), "c_fc.weight": torch.randn(6, 4)}  # a Conv1D's and a Linear's
    base = base_folder(tmp_path / "base", state)
    assert run(capsys, "merge", base, tmp_path / "peft", tmp_path / "out")[0] == 0
    merged = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(merged["c_attn.weight"], state["c_attn.weight"] + deltas["c_attn"].T)
    torch.testing.assert_close(merged["c_fc.weight"], state["c_fc.weight"] + deltas["c_fc"])


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_square_weights_that_may_be_transposed(tmp_path, capsys, fan_in_fan_out):
    peft_folder(tmp_path / "peft", fan_in_fan_out, c_attn=(12, 4), c_proj=(4, 4), c_fc=(6, 4))
    state = {"c_attn.weight": torch.zeros(4, 12), "c_proj.weight": torch.zeros(4, 4), "c_fc.weight": torch.zeros(6, 5)}
    error = refused(capsys, tmp_path, base_folder(tmp_path / "base", state), tmp_path / "peft")
    lines = sorted(error.splitlines()[1:], reverse=True)
    assert len(lines) == 2
    assert "c_proj: cannot know which way its square weight is stored" in lines[0]
    assert "lora.merge" in lines[0]
    assert "c_fc: its base weight must have the shape (6, 4) or (4, 6), got (6, 5)" in lines[1]


FAULTY = {
    "a FIFO": (os.mkfifo, "{} is not read: it is a FIFO, and must be a file."),
    "a circle": (lambda file: os.symlink(file.name, file), "{} is not read: its links lead in a circle."),
    "a dangling link": (
        lambda file: os.symlink("gone", file),
        "there is no file {}: it is a link to gone, which is not there.",
    ),
}


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("what", FAULTY)
def test_a_file_of_the_base_that_cannot_be_read(path, tmp_path, capsys, what, name):
    _, state, _ = trained(path)
    base = base_folder(tmp_path / "base", state)
    (base / name).unlink(missing_ok=True)
    make, message = FAULTY[what]
    make(base / name)
    if (what, name) == ("a dangling link", "model.safetensors"):
        message = f"{base} has neither model.safetensors nor model.safetensors.index.json: other formats are not read."
    assert refused(capsys, tmp_path, base, path) == f"error: {message.format(base / name)}\n"


def test_killed_in_the_middle(path, tmp_path, capsys, monkeypatch):
    _, state, _ = trained(path)
    base = base_folder(tmp_path / "base", state, 2)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder.shutil, "copyfile", interrupt)
    (base / "config.json").write_text("{}", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert run(capsys, "merge", base, path, tmp_path / "out")[0] == 130
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_there_stays_if_it_cannot_be_replaced(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine", encoding="utf-8")
    replace = folder.os.replace

    def fail(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(folder.os, "replace", fail)
    with pytest.raises(OSError, match="no"), folder.whole_folder(out) as new:
        (new / "new").write_text("new", encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in out.iterdir()] == ["mine"]


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    model = folder.open_folder(tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    for names in ([], ["a", "b"]):
        with pytest.raises(OSError, match="has changed"):
            folder.rewrite(model, path.name, tmp_path / f"out{len(names)}", lambda name, tensor: None, names)


def test_an_embedding_that_bounds_its_rows_is_not_merged(tmp_path, capsys):
    model = torch.nn.ModuleDict({"e": torch.nn.Embedding(5, 4, max_norm=1.0)})
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(
        {"e.weight": model["e"].weight.detach().clone()}, tmp_path / "base" / "model.safetensors"
    )
    lora.inject(model, target_modules=["e"], r=2)
    lora.save_adapter(model, tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    assert "e: weights cannot say that `max_norm` does not bound the update" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_only_the_model_knows_of_other_tools_names(tmp_path, capsys):
    path, model, *_ = tools.kohya(tmp_path)
    base = base_folder(tmp_path / "base", model.state_dict())
    code, _, error = run(capsys, "merge", base, path, tmp_path / "out")
    assert code == 2
    assert "which underscores in the file's names stand for dots" in error
    assert "use `lora.merge(model)`" in error
    assert not (tmp_path / "out").exists()
