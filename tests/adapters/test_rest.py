"""A file knows its whole model: what it does not adapt is sampled, and what nobody else has is in it."""

import copy
import json

import hypothesis.strategies as st
import pytest
import torch
import torch.nn as nn
from hypothesis import example, given
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora
from lora.adapters.base import same_sample
from lora.adapters.files import checksum

HINT = "`check_base=False` loads the adapter all the same."


class Net(nn.Module):
    """A convolution with running statistics, and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.up(self.norm(self.conv(x)).relu().mean((2, 3))))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def trained(model, steps=5, **settings):
    """The model, with LoRA in "up", after some steps of training."""
    lora.inject(model, **{"target_modules": ["up"], "r": 2, **settings})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(steps):
        model(torch.randn(4, 3, 6, 6) * 2 + 1).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    return model.eval()


def refusal(function):
    with pytest.raises(lora.AdapterError) as error:
        function()
    return str(error.value)


# ---- what differs is named ------------------------------------------------------------------------------------------


def test_another_head_is_named_and_the_model_stays_as_it_was(path):
    base = Net()
    lora.save_adapter(trained(copy.deepcopy(base)), path)
    other = copy.deepcopy(base)
    other.head.reset_parameters()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    message = refusal(lambda: lora.load_adapter(other, path))
    assert "  - head.weight and head.bias: the values are not those that the adapter was trained with." in message
    assert message.endswith(HINT)
    assert "up" not in message.partition(", because\n")[2]  # the path before it may hold any letters
    assert other.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    lora.load_adapter(other, path, check_base=False)
    assert type(other.up) is lora.Linear


def test_a_bias_beside_the_adapted_weight_counts(path):
    base = Net()
    lora.save_adapter(trained(copy.deepcopy(base)), path)
    nn.init.ones_(base.up.bias)
    assert "up.bias" in refusal(lambda: lora.load_adapter(base, path))


def test_tensors_that_only_one_of_both_has_are_named(path):
    base = Net()
    lora.save_adapter(trained(copy.deepcopy(base)), path)
    other = copy.deepcopy(base)
    other.head = nn.Linear(16, 4, bias=False)
    other.head.weight = base.head.weight
    other.more = nn.Linear(2, 2)
    message = refusal(lambda: lora.load_adapter(other, path))
    assert "head.bias: there is no such tensor in the model." in message
    assert (
        "more.weight and more.bias: there was no such tensor in the model that the adapter was trained in." in message
    )
    other = copy.deepcopy(base)
    other.head = nn.Linear(16, 5)
    assert "head.weight: the shape is (5, 16), and was (4, 16) where the adapter was trained." in refusal(
        lambda: lora.load_adapter(other, path)
    )


def test_what_is_computed_is_not_compared(path):
    """Buffers that no state dict holds: rotary frequencies, masks, caches."""
    base = Net()
    base.register_buffer("frequencies", torch.rand(3), persistent=False)
    lora.save_adapter(trained(copy.deepcopy(base)), path)
    base.frequencies.mul_(2)
    lora.load_adapter(base, path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("back", [False, True])
def test_the_same_model_in_another_dtype_is_the_same(path, dtype, back):
    base = Net()
    lora.save_adapter(trained(copy.deepcopy(base), 0), path)
    base.to(dtype)
    lora.load_adapter(base.float() if back else base, path)


def test_a_file_from_a_model_in_half_precision_fits_what_it_was_rounded_from(path):
    base = Net()
    lora.save_adapter(trained(copy.deepcopy(base).bfloat16().float(), 0), path)
    lora.load_adapter(base, path)


def test_tied_weights_fit_untied_ones_of_the_same_values_and_back(path):
    class Tied(nn.Module):
        def __init__(self, tie):
            super().__init__()
            torch.manual_seed(1)
            self.embed, self.up, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            with torch.no_grad():
                self.head.weight.copy_(self.embed.weight)
            if tie:
                self.head.weight = self.embed.weight

    for tie in (True, False):
        model = Tied(tie)
        lora.inject(model, target_modules=["up"], r=2)
        lora.save_adapter(model, path)
        lora.load_adapter(Tied(not tie), path)


@pytest.mark.parametrize("same", [False, True])
def test_two_modules_of_a_file_that_are_one_in_the_model_must_hold_the_same(same):
    class Twins(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.up, self.one = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two = self.one if shared else nn.Linear(4, 4)

    apart, shared = Twins(False), Twins(True)
    shared.up.load_state_dict(apart.up.state_dict())
    if same:
        apart.two.load_state_dict(apart.one.state_dict())
    lora.inject(apart, target_modules=["up"], r=2, modules_to_save=["one", "two"])
    adapter, before = lora.adapter_of(apart), shared.one.weight.detach().clone()
    if same:
        lora.load_adapter(shared, adapter)
        assert torch.equal(shared.two.weight, apart.two.weight)
    else:
        message = refusal(lambda: lora.load_adapter(shared, adapter))
        assert "one.weight, two.weight: are one tied tensor in the model, and differ in the file." in message
        assert torch.equal(shared.one.weight, before)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8), st.sampled_from(["bfloat16", "float16"]))
@example([5.94002992145429e-39], "bfloat16")  # below bfloat16's normal numbers
def test_rounding_is_told_from_change(values, dtype):
    exact = torch.tensor(values, dtype=torch.float32)
    rounded = exact.to(getattr(torch, dtype)).float()
    assert same_sample(exact.tolist(), rounded.tolist())
    assert same_sample(rounded.tolist(), exact.tolist())
    assert same_sample(exact.bfloat16().tolist(), exact.half().tolist())
    moved = exact * (1 + 2 * torch.finfo(torch.bfloat16).eps)  # some of the values may be bfloat16's by chance
    if (exact.abs() > 1e-3).any():
        assert not same_sample(rounded.tolist(), moved.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_step_of_the_narrower_dtype_is_no_rounding(dtype):
    exact = torch.tensor([1.0, 1 / 3])
    rounded = exact.to(dtype)
    assert same_sample(exact.tolist(), rounded.tolist())
    rounded[0] += torch.finfo(dtype).eps
    assert not same_sample(exact.tolist(), rounded.tolist())


def test_float32_values_that_differ_in_the_sixth_digit_are_others():
    theirs = torch.rand(8, generator=torch.Generator().manual_seed(0)).tolist()
    assert not same_sample(theirs, [value * (1 + 1e-6) for value in theirs])


def test_what_is_known_is_small(path):
    """A line of text for each tensor, whatever its size."""
    model = nn.Sequential(*(nn.Linear(300, 300) for _ in range(40)))
    lora.inject(model, target_modules=["0"], r=1)
    lora.save_adapter(model, path)
    with safe_open(path, "pt") as file:
        rest = json.loads(file.metadata()["rest"])["tensors"]
    assert len(rest) == 2 * 40 - 1
    assert len(json.dumps(rest)) < 200 * len(rest)


def test_earlier_readers_of_version_2_find_what_they_know(path):
    """They want exactly these parts under "lora", pass over other entries, and take every tensor that is listed."""
    model = trained(Net())
    lora.save_adapter(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["lora"])
    assert about.keys() == {"version", "modules", "trained_in_full", "modules_to_save", "base_model"}
    assert about["version"] == 2
    assert {*load_file(path)} == {"up.lora_A", "up.lora_B", *about["trained_in_full"]}
    del metadata["rest"], metadata["sha256"]
    tensors = load_file(path)  # and a file as they write it
    save_file(tensors, path, {**metadata, "sha256": checksum(tensors, metadata)})
    adapter = lora.read_adapter(path)
    assert (adapter.kept, adapter.rest) == ([], {})
    lora.load_adapter(Net(), path, check_base=False)


def test_a_tensor_of_no_dimension_is_remembered_once_as_in_files_of_before(path):
    """BatchNorm's `num_batches_tracked` is one: no file of before would load into a model that has one."""
    model = Net().eval()
    lora.inject(model, target_modules=["up"], r=2)
    assert lora.adapter_of(model).rest["norm.num_batches_tracked"] == {"shape": [], "sample": [0.0]}


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("{", "says under 'rest'"),
        ('{"kept": [], "tensors": []}', "says under 'rest'"),
        ('{"kept": [1], "tensors": {}}', "says under 'rest'"),
        ('{"kept": ["nothing"], "tensors": {}}', "nothing is in `kept`, and must be in `trained_in_full`, too."),
        ('{"kept": [], "tensors": {"head.weight": {"shape": [2]}}}', "`rest` must say its shape and sample"),
        ('{"kept": [], "tensors": {"head.weight": {"shape": [-2], "sample": null}}}', "a shape of integers"),
        ('{"kept": [], "tensors": {"head.weight": {"shape": "x", "sample": null}}}', "a shape of integers"),
        ('{"kept": [], "tensors": {"head.weight": {"shape": [2], "sample": ["x"]}}}', "finite numbers"),
        ('{"kept": [], "tensors": {"head.weight": {"shape": [2], "sample": [NaN]}}}', "finite numbers"),
        ('{"kept": [], "tensors": {"head.weight": {"shape": [2], "sample": [1,1,1,1,1,1,1,1,1]}}}', "at most 8"),
    ],
)
def test_what_strangers_say_of_the_rest_is_checked(path, rest, message):
    lora.save_adapter(trained(Net()), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    metadata = {**metadata, "rest": rest}
    save_file(tensors, path, {**metadata, "sha256": checksum(tensors, metadata)})
    assert message in refusal(lambda: lora.read_adapter(path))


# ---- running statistics ---------------------------------------------------------------------------------------------


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_buffers_that_training_moved_are_saved_and_put_back(path):
    base, x = Net(), torch.randn(4, 3, 6, 6) * 2 + 1
    base(x)  # its statistics are not those of a new module
    model = trained(copy.deepcopy(base))
    moved = statistics(model)
    assert not torch.equal(moved["norm.running_mean"], base.norm.running_mean)
    lora.save_adapter(model, path)
    adapter = lora.read_adapter(path)
    assert adapter.kept == [f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
    loaded = copy.deepcopy(base).eval()
    lora.load_adapter(loaded, path)
    assert torch.equal(loaded(x), model(x))
    with lora.disabled(loaded), lora.disabled(model):
        assert torch.equal(loaded(x), base.eval()(x))
        assert torch.equal(model(x), base(x))
    assert all(torch.equal(buffer, moved[name]) for name, buffer in loaded.named_buffers())
    lora.eject(loaded)
    assert loaded.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_an_adapter_from_before_the_move_puts_the_statistics_back(path, tmp_path):
    base = Net()
    model = trained(copy.deepcopy(base), 0)
    lora.save_adapter(model, path)
    assert lora.read_adapter(path).kept == []
    for x in torch.randn(3, 4, 3, 6, 6):
        model.train()(x)
    lora.save_adapter(model, tmp_path / "later.safetensors")
    lora.load_adapter(model, path)
    assert all(torch.equal(buffer, dict(base.named_buffers())[name]) for name, buffer in model.named_buffers())
    lora.load_adapter(model, tmp_path / "later.safetensors")
    assert int(model.norm.num_batches_tracked) == 3


def test_statistics_that_stay_are_neither_saved_nor_exchanged(path):
    model = trained(Net(), 0)
    lora.save_adapter(model, path)
    assert lora.read_adapter(path).trained_in_full == []
    mean = model.norm.running_mean
    with lora.disabled(model):
        assert model.norm.running_mean is mean


def test_moved_statistics_go_with_the_model_into_another_dtype(path):
    base = Net()
    model = trained(copy.deepcopy(base))
    lora.save_adapter(model, path)
    half = copy.deepcopy(base).bfloat16()
    lora.load_adapter(half, path)
    assert half.norm.running_mean.dtype == torch.bfloat16
    assert torch.equal(half.norm.running_mean, model.norm.running_mean.bfloat16())


def test_a_merged_model_keeps_the_statistics_that_it_was_trained_with(path):
    model = trained(Net())
    moved = statistics(model)
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    lora.merge(model)
    torch.testing.assert_close(model(x), expected)
    assert all(torch.equal(buffer, moved[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("use", [lora.eject, lambda model: lora.disabled(model).__enter__()], ids=["eject", "disabled"])
def test_a_statistic_that_was_taken_away_is_named(use):
    model = trained(Net())
    model.norm.running_mean = None
    with pytest.raises(ValueError, match=r"norm\.running_mean: no longer exists; give it a value again first"):
        use(model)
    assert type(model.up) is lora.Linear


def test_a_codebook_of_integers_is_no_statistic():
    """GPTQ and its kin keep whole weights in integer buffers: no copy of those."""
    model = Net()
    model.register_buffer("codes", torch.zeros(4, 4, dtype=torch.int32))
    lora.inject(model, target_modules=["up"], r=2)
    assert "codes" not in vars(model).get("lora_originals", {})


def test_modules_that_are_made_anew_remember_what_the_old_ones_did(path):
    base = Net()
    model = trained(copy.deepcopy(base), 0, modules_to_save=["norm"])
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with torch.no_grad():
        model.norm.running_mean.add_(1)
        model.norm.weight.add_(1)
    lora.save_adapter(model, path)
    assert "norm.running_mean" in lora.read_adapter(path).trained_in_full
    with lora.disabled(model):
        assert torch.equal(model.norm.running_mean, base.norm.running_mean)
        assert torch.equal(model.norm.weight, base.norm.weight)
    lora.eject(model)
    assert torch.equal(model.norm.running_mean, base.norm.running_mean)
    assert torch.equal(model.norm.weight, base.norm.weight)


def odd_buffers():
    """A buffer that is expanded, a sparse one, a lazy one, and one that several modules share."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Module(), nn.Module(), nn.LazyBatchNorm1d())
    model[1].register_buffer("mask", torch.zeros(1).expand(4, 4))
    model[1].register_buffer("adjacency", torch.eye(4).to_sparse())
    model[1].register_buffer("shared", torch.zeros(3))
    model[2].register_buffer("shared", model[1].shared)
    model[2].register_buffer("part", model[1].shared[:1])
    return model


def test_odd_buffers_are_left_alone_and_shared_ones_move_together(path):
    model = odd_buffers()
    weight = model[0].weight.detach().clone()
    lora.inject(model, target_modules=["0"], r=2, init_lora_weights="pissa")
    model[1].shared.add_(1)
    lora.save_adapter(model, path)
    loaded = odd_buffers()
    loaded[0].weight.data.copy_(weight)
    loaded[0].bias.data.copy_(model[0].bias)
    lora.load_adapter(loaded, path)
    assert loaded[2].shared is loaded[1].shared
    assert torch.equal(loaded[1].shared, torch.ones(3))
    with lora.disabled(loaded):
        assert torch.equal(loaded[1].shared, torch.zeros(3))
        assert loaded[2].shared is loaded[1].shared
    assert torch.equal(loaded[1].shared, torch.ones(3))
    lora.eject(model)
    assert torch.equal(model[1].shared, torch.zeros(3))
    torch.testing.assert_close(model[0].weight.detach(), weight)


def test_a_model_made_in_inference_mode_is_ejected():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    lora.inject(model, target_modules=["0"], r=2)
    lora.eject(model)
    assert type(model[0]) is nn.Linear


def test_a_buffer_that_cannot_be_written_to_is_named(path):
    class Moving(nn.Module):
        def __init__(self, expanded):
            super().__init__()
            self.up = nn.Linear(4, 4)
            self.register_buffer("e", torch.zeros(1).expand(8) if expanded else torch.zeros(8))

    model, plain = Moving(False), Moving(True)
    plain.up.load_state_dict(model.up.state_dict())
    lora.inject(model, target_modules=["up"], r=2)
    model.e.add_(1)
    lora.save_adapter(model, path)
    assert "e: the model's tensor cannot be written to" in refusal(lambda: lora.load_adapter(plain, path))


def test_switching_off_walks_the_model_a_few_times_however_many_buffers_moved():
    class Counted(nn.Sequential):
        walks = 0

        def modules(self):
            Counted.walks += 1
            return super().modules()

    counts = []
    for n in (4, 40):
        model = Counted(*(part for _ in range(n) for part in (nn.Linear(3, 3), nn.BatchNorm1d(3))))
        lora.inject(model, target_modules="all-linear", r=1)
        model.train()(torch.randn(5, 3))
        Counted.walks = 0
        with lora.disabled(model):
            assert not model[1].running_mean.any()
        counts.append(Counted.walks)
    assert counts[0] == counts[1]


def test_a_wrapper_with_a_tensor_of_its_own_is_no_part_of_the_model(path):
    base = Net()
    model = torch.optim.swa_utils.AveragedModel(trained(copy.deepcopy(base), 0))
    lora.save_adapter(model, path)
    assert "n_averaged" in lora.read_adapter(path).rest
    lora.load_adapter(base, path)


# ---- arithmetic and the command line --------------------------------------------------------------------------------


def test_combining_carries_what_all_agree_on_and_names_what_they_do_not(path):
    base = Net()
    one, two = (lora.adapter_of(trained(copy.deepcopy(base), 0)) for _ in range(2))
    both = lora.combine([(one, 0.5), (two, 0.5)])
    assert both.rest == one.rest
    base.head.reset_parameters()
    three = lora.adapter_of(trained(copy.deepcopy(base), 0))
    message = refusal(lambda: lora.combine([(one, 1), (three, 1)]))
    assert "head.weight: adapter 1 was trained in another base model than an earlier one" in message
    assert "head.bias: adapter 1" in message
    lora.combine([(one, 1), (three, 1)], check_base=False)


def test_combining_carries_statistics_if_they_are_the_same():
    base = Net()
    one, two = (lora.adapter_of(trained(copy.deepcopy(base))) for _ in range(2))
    message = refusal(lambda: lora.combine([(one, 1), (two, 1)]))
    assert "norm.running_mean: adapter 1 and an earlier one hold different values" in message
    first = lora.combine([(one, 1), (two, 1)], check_base=False)
    assert torch.equal(first.tensors["norm.running_mean"], one.tensors["norm.running_mean"])
    doubled = lora.combine([(one, 1), (one, 1)])
    assert doubled.kept == one.kept == doubled.trained_in_full
    assert torch.equal(doubled.tensors["norm.running_mean"], one.tensors["norm.running_mean"])
    assert lora.scale(one, 2).kept == one.kept


def test_the_portable_form_has_no_place_for_statistics(path):
    model = trained(Net())
    message = refusal(lambda: lora.save_adapter(model, path.parent / "portable", format="portable"))
    assert "norm.running_mean is a part of the base model, and has no place there." in message


def test_the_command_line_shows_and_compares_the_rest(path, tmp_path, capsys):
    from lora.__main__ import main

    base = Net()
    lora.save_adapter(trained(copy.deepcopy(base)), path)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "kept of the base model: norm.running_mean 8 float32" in shown
    assert "sampled of the base model: 7 other tensors" in shown
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(base.state_dict(), folder / "model.safetensors")
    assert main(["merge", str(folder), str(path), str(tmp_path / "merged")]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["norm.running_mean"], lora.read_adapter(path).tensors["norm.running_mean"])
    base.head.reset_parameters()
    save_file(base.state_dict(), folder / "model.safetensors")
    assert main(["merge", str(folder), str(path), str(tmp_path / "other")]) == 2
    refused = capsys.readouterr().err
    assert (
        "head.weight: the values are not those that the adapter was trained with; `--no-check-base` merges it"
        in refused
    )
    assert main(["merge", str(folder), str(path), str(tmp_path / "other"), "--no-check-base"]) == 0
