"""Models that are not what they seem: wrapped, traced, without values, with weights that are shared or computed."""

import sys

import pytest
import torch
import torch.nn as nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters
from toy_model import Model

import lora

X = torch.linspace(-1, 1, 8).view(2, 4)


def injected(**fields):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora.inject(model, **{"target_modules": ["0"], "r": 2, **fields})
    nn.init.normal_(model[0].lora_B)
    return model


# ---- wrappers --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["checkpoint_wrapper", "compile"])
def wrapped(request):
    model = injected()
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    state = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    plain.load_state_dict(state)
    expected = model(X)
    if request.param == "compile":
        model = torch.compile(model, backend="eager")
    else:
        model[0] = checkpoint_wrapper(model[0])
    return model, plain, expected


def test_an_adapter_of_a_wrapped_model_loads_into_the_plain_one(wrapped, tmp_path):
    model, plain, expected = wrapped
    lora.save_adapter(model, tmp_path / "a")
    lora.load_adapter(plain, tmp_path / "a")
    torch.testing.assert_close(plain(X), expected)


def test_the_state_dict_of_a_wrapped_model_holds_what_trains(wrapped):
    model, _, _ = wrapped
    assert [name.rsplit(".", 1)[-1] for name in lora.lora_state_dict(model)] == ["lora_A", "lora_B"]


def test_a_wrapped_layers_merged_state_dict_has_the_keys_of_the_plain_model():
    model = injected()
    expected = model(X)
    model[0] = checkpoint_wrapper(model[0])
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain.load_state_dict(lora.merged_state_dict(model))
    torch.testing.assert_close(plain(X), expected)


# torch deprecates what is tested here, and its tracer tells what it cannot see.
@pytest.mark.filterwarnings("ignore:`?torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [True, False])
def test_a_traced_model_computes_the_same(training):
    model = injected(merge_weights=True).train(training).requires_grad_(False)
    expected = model(X)
    traced = torch.jit.trace(model, X)
    torch.testing.assert_close(traced(X), expected)


# ---- weights that share memory, or are computed ----------------------------------------------------------------


def test_parts_of_one_storage_that_do_not_overlap_are_not_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
    report = lora.inject(model, target_modules=["0"], modules_to_save=["1"])
    assert report.modules[0].tied_to == ()
    lora.merge(model)


@pytest.mark.parametrize("tie", ["buffer", "part"])
def test_a_weight_that_is_tied_to_a_buffer_or_a_part_of_another_is_not_merged(tie):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if tie == "buffer":
        model[1].register_buffer("copy", model[0].weight.data)
    else:
        model[1].weight.data = model[0].weight.data[1:3]
    lora.inject(model, target_modules=["0"])
    nn.init.ones_(model[0].lora_B)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match="0: its weight is tied to that of 1"):
        lora.merge(model)
    assert torch.equal(model[0].weight, before)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", ["weight", "lora_A"])
@pytest.mark.parametrize("function", [lora.eject, lora.merge, lora.merged_state_dict], ids=lambda f: f.__name__)
def test_a_layer_that_was_parametrized_since_is_refused(function, name):
    model = injected()
    parametrize.register_parametrization(model[0], name, Doubled())
    with pytest.raises(ValueError, match="a tensor of 0 is computed by a parametrization; remove the parametrization"):
        function(model)
    parametrize.remove_parametrizations(model[0], name)
    function(model)


# ---- without values, and in other modes ------------------------------------------------------------------------


def test_a_model_without_values_takes_no_adapter_and_gives_none(tmp_path):
    lora.save_adapter(injected(), tmp_path / "a")
    with torch.device("meta"):
        plain, model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), injected()
    with pytest.raises(lora.AdapterError, match="0: has no values yet, being on the meta device"):
        lora.load_adapter(plain, tmp_path / "a")
    with pytest.raises(lora.AdapterError, match=r"0\.lora_A has no values, being on the meta device"):
        lora.save_adapter(model, tmp_path / "b")
    with pytest.raises(ValueError, match="0: has no values yet, being on the meta device"):
        lora.merge(model)


def test_a_model_that_is_adapted_in_inference_mode_can_be_trained():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with torch.inference_mode():
        lora.inject(model, target_modules=["0"], modules_to_save=["1"])
    model(X).sum().backward()
    assert model[0].lora_B.grad is not None


def test_what_is_marked_after_injection_is_the_bases_again_while_disabled():
    model = injected()
    with lora.disabled(model):
        base = model(X)
    lora.mark_only_lora_as_trainable(model, bias="all")
    with torch.no_grad():
        model[1].bias.add_(1)
    with lora.disabled(model):
        assert torch.equal(model(X), base)
    lora.eject(model)
    assert torch.equal(model(X), base)


def test_disabled_that_fails_to_begin_leaves_nothing_behind(monkeypatch):
    model = injected(modules_to_save=["1"])
    expected = model(X)

    def fails(*args):
        raise MemoryError

    monkeypatch.setattr(sys.modules["lora.models.disabling"], "_base", fails)
    with pytest.raises(MemoryError), lora.disabled(model):
        pass
    monkeypatch.undo()
    assert torch.equal(model(X), expected)
    with lora.disabled(model):
        assert not torch.equal(model(X), expected)


# ---- files -----------------------------------------------------------------------------------------------------


def test_modules_with_masks_and_empty_buffers_are_saved(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        model[1].register_buffer("mask", torch.full((2,), float("-inf")))
        model[1].register_buffer("nothing", torch.zeros(0))
        return model

    model, plain = make(), make()
    plain.load_state_dict(model.state_dict())
    lora.inject(model, target_modules=["0"], modules_to_save=["1"])
    lora.save_adapter(model, tmp_path / "a")
    lora.load_adapter(plain, tmp_path / "a")
    assert torch.equal(plain(X), model(X))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to write a to"):
        lora.save_adapter(injected(), tmp_path / "nowhere" / "a")


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    lora.save_adapter(injected(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    lora.load_adapter(injected(), tmp_path / "file", check_base=False)


# ---- words that are of the wrong kind --------------------------------------------------------------------------

WRONG = {
    "splits": ((2, 1, 1), "`splits` must map patterns to values, for example {'qkv_proj': "),
    "enable_lora": ([True, False], "`enable_lora` must map patterns to values, for example {'qkv_proj': "),
    "rank_pattern": (["0"], "`rank_pattern` must map patterns to values, for example {'qkv_proj': "),
    "target_modules": ([0], "`target_modules` must be a list of names, got [0]."),
    "modules_to_save": ("head", "`modules_to_save` must be a list of names, got the string 'head'."),
    "use_rslora": ("yes", "`use_rslora` must be True or False, got 'yes'."),
    "adapter_dtype": (torch.int32, "`adapter_dtype` must be a floating-point torch.dtype, got torch.int32."),
}


@pytest.mark.parametrize("option", WRONG)
def test_an_option_of_the_wrong_type_is_refused_in_words(option):
    value, message = WRONG[option]
    with pytest.raises(ValueError, match="LoraConfig") as caught:
        lora.LoraConfig(**{"target_modules": ["q_proj"], option: value})
    assert message in str(caught.value)


@pytest.mark.parametrize("config", [["q_proj"], {"target_modules": ["q_proj"]}])
def test_a_config_that_is_none_is_refused(config):
    with pytest.raises(TypeError, match=r"`config` must be a lora\.LoraConfig, got a builtins\."):
        lora.inject(Model(), config)
