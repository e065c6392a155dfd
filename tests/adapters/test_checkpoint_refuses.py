"""load_adapter: strict both ways; one error lists everything, and the model is as it was."""

import copy
import json
import re

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensor_files import is_written
from toy_model import AdapterFile, Model, snapshot

import lora

Q0, Q1 = "layers.0.attn.q_proj", "layers.1.attn.q_proj"
FIELDS = {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["layers.0.norm"]}
SETTINGS = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def file(tmp_path):
    return AdapterFile(tmp_path / "adapter.safetensors", **FIELDS)


def refuses(model, path, *messages, **options):
    before = snapshot(model)
    with pytest.raises(lora.AdapterError) as caught:
        lora.load_adapter(model, path, **options)
    assert snapshot(model) == before
    assert str(path) in str(caught.value)
    said = str(caught.value).replace(str(path), "")  # a number that a path holds says nothing
    for message in messages:
        assert message in said
    return str(caught.value)


either = pytest.mark.parametrize("injected", [False, True], ids=["plain", "injected"])

# ---- tensors ---------------------------------------------------------------------------------------------------

A0, B1, NORM = f"{Q0}.lora_A", f"{Q1}.lora_B", "layers.0.norm.weight"
TENSORS = {
    "missing": ({A0: None}, f"{A0} is missing."),
    "missing module": ({NORM: None}, f"{NORM} is missing."),
    "unexpected": ({f"{Q0}.lora_C": torch.ones(2)}, f"{Q0}.lora_C is unexpected."),
    "unexpected weight": ({f"{Q0}.weight": torch.ones(8, 8)}, f"{Q0}.weight is unexpected."),
    "transposed": ({A0: torch.ones(8, 2)}, f"{A0} must have the shape (2, 8), got (8, 2)."),
    "another rank": ({B1: torch.ones(8, 3)}, f"{B1} must have the shape (8, 2), got (8, 3)."),
    "a scalar": ({B1: torch.tensor(1.0)}, f"{B1} must have the shape (8, 2), got ()."),
    "module of another shape": ({NORM: torch.ones(9)}, f"{NORM} must have the shape (8,), got (9,)."),
    "half": ({B1: torch.ones(8, 2).half()}, f"{B1} must be of dtype torch.float32, got torch.float16."),
    "integers": ({B1: torch.ones(8, 2).int()}, f"{B1} must hold floating-point numbers, got torch.int32."),
    "eight bits": ({B1: torch.ones(8, 2).to(torch.float8_e4m3fn)}, f"{B1} must be of dtype"),
    "empty": ({B1: torch.ones(8, 0)}, f"{B1} is empty: its shape is (8, 0)."),
    "NaN": ({A0: torch.full((2, 8), float("nan"))}, f"{A0} holds NaN or infinity."),
    "one infinity": ({B1: torch.eye(8)[:, :2] / 0}, f"{B1} holds NaN or infinity."),
    "module of NaN": ({NORM: torch.full((8,), float("nan"))}, f"{NORM} holds NaN or infinity."),
}
if is_written(torch.complex64):
    TENSORS["complex"] = (
        {B1: torch.ones(8, 2).cfloat()},
        f"{B1} must hold floating-point numbers, got torch.complex64.",
    )


@either
@pytest.mark.parametrize(("changes", "message"), TENSORS.values(), ids=TENSORS)
def test_a_tensor_that_is_wrong_is_refused(file, changes, message, injected):
    tensors = {name: value for name, value in (file.tensors | changes).items() if value is not None}
    file.write(tensors=tensors)
    refuses(file.model(injected), file.path, message)


M0 = f"{Q0}.lora_magnitude"
MAGNITUDES = {
    "missing": (None, f"{M0} is missing."),
    "another shape": (torch.ones(3), f"{M0} must have the shape (8,), got (3,)."),
}


@either
@pytest.mark.parametrize(("magnitude", "message"), MAGNITUDES.values(), ids=MAGNITUDES)
def test_a_magnitude_that_is_wrong_is_refused(tmp_path, magnitude, message, injected):
    file = AdapterFile(tmp_path / "adapter.safetensors", target_modules=["q_proj"], r=2, use_dora=True)
    file.write(tensors={name: value for name, value in (file.tensors | {M0: magnitude}).items() if value is not None})
    refuses(file.model(injected), file.path, message)


def test_what_trained_in_full_takes_the_dtype_of_a_plain_model_alone(file):
    """A plain model says by its dtype in which one it is to be used; in one that trains a cast would lose digits."""
    file.write(tensors={**file.tensors, NORM: torch.full((8,), 0.3).half()})
    refuses(file.model(True), file.path, f"{NORM} must be of dtype torch.float32, got torch.float16.")
    plain = file.model(False)
    lora.load_adapter(plain, file.path)
    weight = plain.layers[0].norm.weight
    assert torch.equal(weight, torch.full((8,), 0.3).half().float())


@either
def test_one_error_lists_every_tensor_that_is_wrong(file, injected):
    changes = {A0: torch.ones(8, 2), B1: torch.ones(8, 2).half(), NORM: torch.ones(9)}
    file.write(tensors=file.tensors | changes)
    message = refuses(file.model(injected), file.path)
    assert [line.split(" ")[3] for line in message.split("\n")[1:]] == [A0, B1, NORM]


# ---- what the file says of itself ------------------------------------------------------------------------------

GONE = object()
BASE = {"kind": "linear", "shape": [8, 8], "dtype": "float32", "fan_in_fan_out": False}
SAID = {
    "no scaling": ({"scaling": GONE}, f"{Q1}: `scaling` must be a finite number, got None."),
    "scaling in words": ({"scaling": "2"}, f"{Q1}: `scaling` must be a finite number, got '2'."),
    "scaling of NaN": ({"scaling": float("nan")}, f"{Q1}: `scaling` must be a finite number, got nan."),
    "scaling beyond floats": ({"scaling": 10**400}, f"{Q1}: `scaling` must be a finite number"),
    "scaling of a truth": ({"scaling": True}, f"{Q1}: `scaling` must be a finite number"),
    "no r": ({"r": GONE}, f"{Q1}: `r` must be an integer of at least 0, got None."),
    "r in words": ({"r": "2"}, f"{Q1}: `r` must be an integer of at least 0, got '2'."),
    "r of 0": ({"r": 0}, f"{Q1}: `r` must be at least 1, got 0."),
    "another r": ({"r": 4}, Q1),
    "no lora_alpha": ({"lora_alpha": GONE}, f"{Q1}: `lora_alpha` must be a finite number, got None."),
    "lora_alpha in words": ({"lora_alpha": "8"}, f"{Q1}: `lora_alpha` must be a finite number, got '8'."),
    "no lora_dropout": ({"lora_dropout": GONE}, f"{Q1}: `lora_dropout` must be at least 0 and below 1, got None."),
    "lora_dropout of 2": ({"lora_dropout": 2}, f"{Q1}: `lora_dropout` must be at least 0 and below 1, got 2."),
    "no use_rslora": ({"use_rslora": GONE}, f"{Q1}: `use_rslora` must be true or false, got None."),
    "use_rslora in words": ({"use_rslora": "no"}, f"{Q1}: `use_rslora` must be true or false, got 'no'."),
    "splits that do not fit": ({"splits": [4, 3], "enable_lora": [True, True]}, Q1),
    "splits in words": ({"splits": "q, k, v"}, f"{Q1}: `splits` must be a list of numbers, got 'q, k, v'."),
    "no base": ({"base": GONE}, f"{Q1}: `base` must describe the base weight, got None."),
    "base in words": ({"base": "linear"}, f"{Q1}: `base` must describe the base weight, got 'linear'."),
    "a kind in numbers": ({"base": BASE | {"kind": 1}}, f"{Q1}: `base` must describe the base weight"),
    "no kind": ({"base": {"shape": [8, 8]}}, f"{Q1}: `base` must describe the base weight"),
    "another shape": ({"base": BASE | {"shape": [8, 9]}}, f"{Q1}: the base weight is not the one"),
    "a shape in words": ({"base": BASE | {"shape": "8"}}, f"{Q1}: `base` must have a shape"),
    "a shape of truths": ({"base": BASE | {"shape": [True, 8]}}, f"{Q1}: `base` must have a shape"),
    "a negative shape": ({"base": BASE | {"shape": [-8, 8]}}, f"{Q1}: `base` must have a shape"),
    "groups in words": ({"base": BASE | {"groups": "2"}}, f"{Q1}: `base` must have a shape and groups"),
    "groups of 0": ({"base": BASE | {"groups": 0}}, f"{Q1}: `base` must have a shape and groups"),
    "a sample in words": ({"base": BASE | {"sample": ["a"] * 16}}, f"{Q1}: `sample` must hold finite numbers"),
    "one word for a sample": ({"base": BASE | {"sample": "a"}}, f"{Q1}: `sample` must hold finite numbers"),
    "a sample too short": ({"base": BASE | {"sample": [1.0]}}, f"{Q1}: `sample` must hold 16 numbers, got 1."),
    "a sample of NaN": ({"base": BASE | {"sample": [float("nan")] * 16}}, f"{Q1}: `sample` must hold finite numbers"),
    "a sample beyond floats": ({"base": BASE | {"sample": [10**400] * 16}}, f"{Q1}: `sample` must hold finite"),
    "a sample whose norm is": ({"base": BASE | {"sample": [1e308] * 16}}, f"{Q1}: the base weight is not the one"),
}


@either
@pytest.mark.parametrize(("changes", "message"), SAID.values(), ids=SAID)
def test_what_is_wrong_about_a_module_is_refused_by_its_name(file, changes, message, injected):
    said = file.about["modules"][Q1] | changes
    file.about["modules"][Q1] = {key: value for key, value in said.items() if value is not GONE}
    file.write()
    refuses(file.model(injected), file.path, message)


ABOUT = {
    "another version": ({"version": 3}, "is an adapter of version 3; this release reads version 2."),
    "the first version": ({"version": 1}, "is an adapter of version 1; this release reads version 2."),
    "version in words": ({"version": "1"}, "is an adapter of version '1'; this release reads version 2."),
    "modules in a list": ({"modules": [Q0]}, "is not an adapter"),
    "modules that say nothing": ({"modules": {Q0: None}}, "is not an adapter"),
    "no module": ({"modules": {}}, "it adapts no module."),
    "full in words": ({"trained_in_full": "norm"}, "is not an adapter"),
    "full by numbers": ({"trained_in_full": [1, 2]}, "is not an adapter"),
    "full by anything": ({"trained_in_full": [{}]}, "is not an adapter"),
}


@either
@pytest.mark.parametrize(("changes", "message"), ABOUT.values(), ids=ABOUT)
def test_what_is_wrong_about_the_whole_is_refused(file, changes, message, injected):
    file.write(file.about | changes)
    refuses(file.model(injected), file.path, message)


@pytest.mark.parametrize("said", ["", "{", "[]", "1", "null", '{"version": 2}', '{"modules": {}}'], ids=repr)
def test_metadata_that_is_no_adapters_is_refused(file, said):
    safetensors.torch.save_file(file.tensors, file.path, {"lora": said})
    refuses(file.model(False), file.path, "is not an adapter")


@pytest.mark.parametrize("said", [None, {"format": "pt"}])
def test_tensors_of_another_tool_are_refused(file, said):
    safetensors.torch.save_file(file.tensors, file.path, said)
    refuses(file.model(False), file.path, "it has no scaling: loralib's files say nothing of lora_alpha; give `lora_a")


@pytest.mark.parametrize("said", [None, {"format": "pt"}])
def test_tensors_of_no_adapter_at_all_are_refused(file, said):
    safetensors.torch.save_file({"0.weight": torch.ones(2, 2)}, file.path, said)
    refuses(file.model(False), file.path, "has no scaling: its metadata has no entry 'lora'")


def test_a_file_whose_content_was_changed_is_refused(file):
    content = bytearray(file.path.read_bytes())
    content[-1] ^= 1
    file.path.write_bytes(content)
    refuses(file.model(False), file.path, "its content has changed since it was written")


def test_a_file_without_a_checksum_is_refused(file):
    safetensors.torch.save_file(file.tensors, file.path, {"format": "pt", "lora": json.dumps(file.about)})
    refuses(file.model(False), file.path, "has no checksum")


# ---- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, -100, -1])
def test_a_file_cut_short_is_refused(file, size):
    file.path.write_bytes(file.path.read_bytes()[:size])
    refuses(file.model(False), file.path, "is not a safetensors file")


def test_a_zip_file_of_something_else_is_refused(file):
    file.path.write_bytes(b"PK\x03\x04 not what torch.save writes")
    refuses(file.model(False), file.path, "is not a torch file")


@pytest.mark.parametrize("content", [b"{}", b"\0" * 64, b"\xff" * 64], ids=repr)
def test_a_file_of_something_else_is_refused(file, content):
    file.path.write_bytes(content)
    refuses(file.model(False), file.path, "is not a safetensors file")


@pytest.mark.parametrize("name", ["nothing.safetensors", "."])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / name))):
        lora.load_adapter(Model(), tmp_path / name)


@SETTINGS
@given(damage=st.lists(st.tuples(st.integers(0, 4000), st.integers(32, 127)), min_size=1, max_size=2))
def test_a_damaged_file_loads_or_is_refused_and_never_by_half(file, damage):
    file.write()
    damaged, model = bytearray(file.path.read_bytes()), file.model(False)
    for position, value in damage:
        damaged[position % len(damaged)] = value
    file.path.write_bytes(damaged)
    before = snapshot(model)
    try:
        lora.load_adapter(model, file.path, check_base=False)
    except lora.AdapterError:
        assert snapshot(model) == before


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
KEYS = ["r", "lora_alpha", "lora_dropout", "use_rslora", "scaling", "splits", "enable_lora", "factored", "base"]
KEYS += [("base", part) for part in ("kind", "shape", "dtype", "sample", "groups", "fan_in_fan_out")]


@SETTINGS
@given(key=st.sampled_from(KEYS), value=VALUES, injected=st.booleans())
def test_anything_said_of_a_module_loads_or_is_refused_and_never_by_half(file, key, value, injected):
    about = copy.deepcopy(file.about)
    said, key = (about["modules"][Q1]["base"], key[1]) if isinstance(key, tuple) else (about["modules"][Q1], key)
    said[key] = value
    file.write(about)
    model = file.model(injected)
    before = snapshot(model)
    try:
        lora.load_adapter(model, file.path)
    except lora.AdapterError:
        assert snapshot(model) == before


# ---- models ----------------------------------------------------------------------------------------------------


@either
def test_another_base_is_refused_unless_told_otherwise(file, injected):
    model = file.model(injected)
    with torch.no_grad():
        model.layers[1].attn["q_proj"].weight.mul_(1.05)
    message = refuses(model, file.path, f"{Q1}: the base weight is not the one", "differ by 5 %", "check_base=False")
    assert Q0 not in message
    lora.load_adapter(model, file.path, check_base=False)
    assert not model.layers[1].attn["q_proj"].lora_B.any()


@either
def test_a_model_without_the_modules_is_refused_for_each(file, injected):
    model = file.model(injected)
    model.layers[0].attn["other"] = model.layers[0].attn.pop("q_proj")
    del model.layers[0].norm
    messages = [
        f"{Q0}: there is no such module",
        "layers.0.norm.weight: there is no such p",
        "layers.0.norm.bias: there",
    ]
    extra = ["layers.0.attn.other: has LoRA in the model, and no adapter in the file."] if injected else []
    refuses(model, file.path, *messages, *extra)


def test_a_model_of_other_sizes_is_refused(file):
    model = file.model(False)
    model.layers[0].attn["q_proj"] = nn.Linear(8, 9)
    refuses(model, file.path, f"{Q0}.lora_B must have the shape (9, 2), got (8, 2).")


def test_layers_that_cannot_be_adapted_are_refused(file):
    model = file.model(False)
    model.layers[0].attn["q_proj"], model.layers[1].attn["q_proj"] = nn.LayerNorm(8), nn.LazyLinear(8)
    refuses(model, file.path, f"{Q0}: no kind of LoRA layer adapts a LayerNorm", f"{Q1}: is lazy")


ELSEWHERE = {
    "v_proj": f"{Q0}: has an adapter in the file, and no LoRA in the model.",
    r"layers\.0.*q_proj": f"{Q1}: has an adapter in the file, and no LoRA in the model.",
    r".*\.[qv]_proj": "layers.0.attn.v_proj: has LoRA in the model, and no adapter in the file.",
}


@pytest.mark.parametrize("target", ELSEWHERE)
def test_a_model_with_lora_elsewhere_is_refused(file, target):
    model = copy.deepcopy(file.base)
    lora.inject(model, target_modules=[target] if target == "v_proj" else target, r=2)
    refuses(model, file.path, ELSEWHERE[target])


def test_a_model_that_trained_more_in_full_than_the_file_holds_is_refused(file):
    model = copy.deepcopy(file.base)
    lora.inject(model, target_modules=["q_proj"], r=2, modules_to_save=["layers.0.norm", "head"])
    refuses(model, file.path, "head.weight")


def test_two_adapters_for_one_module_are_refused(tmp_path):
    model, layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
    lora.inject(model, target_modules=["0", "1"], r=2)
    lora.save_adapter(model, tmp_path / "a")
    refuses(
        nn.Sequential(layer, layer),
        tmp_path / "a",
        "0, 1: one module in the model, and 2 in the file.",
        check_base=False,
    )


def test_splits_that_differ_are_refused(tmp_path):
    def model(**fields):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(4, 8))
        lora.inject(made, target_modules=["0"], r=2, **fields)
        return made

    lora.save_adapter(model(splits={"0": (5, 3)}), tmp_path / "a")
    refuses(model(splits={"0": (3, 5)}), tmp_path / "a", "`splits` is (5, 3) in the file and (3, 5) in the model.")


def test_memory_that_ends_half_way_leaves_the_model_as_it_was(file, monkeypatch):
    def copy_(self, *args):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError
        return original(self, *args)

    calls, original, model = [], torch.Tensor.copy_, file.model(True)
    before = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copy_)
        with pytest.raises(MemoryError):
            lora.load_adapter(model, file.path)
    assert snapshot(model) == before


def test_a_vocabulary_of_another_size_that_trained_in_full(tmp_path):
    def model(rows):
        return nn.ModuleDict(
            {
                "embed": nn.Embedding(rows, 4),
                "body": nn.Linear(4, 4),
                "head": nn.Linear(4, rows),
                "labels": nn.Linear(4, 9),
            }
        )

    theirs = model(7)
    lora.inject(theirs, target_modules=["body"], r=2, modules_to_save=["embed", "head", "labels"])
    lora.save_adapter(theirs, tmp_path / "a.safetensors")
    ours = model(5)
    ours["labels"] = nn.Linear(4, 8)  # a head, and no vocabulary
    message = refuses(ours, tmp_path / "a.safetensors", "call `model.resize_token_embeddings(7)` first.")
    for name in ("embed.weight", "head.weight"):
        assert f"{name} has the shape (5, 4) in the model, and (7, 4) in the file" in message
    assert "labels.weight must have the shape (8, 4), got (9, 4)." in message
