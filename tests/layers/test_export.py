"""torch.export of layers and models: it computes the same, under the pretrained names, and can be saved."""

import io
import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, WITH_DROPOUT, example, make, plain_twin, randomised
from magnitudes import dora, formula, input_of, leaves
from pairwise import pairwise
from torch import nn
from torch.export import Dim

import lora

# torch's own, of what it unpickles.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
BATCH_AND_LENGTH = ({0: Dim("batch"), 1: Dim("length")},)


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


# ---- layers -----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("kind", "mode", "strict"),
    pairwise(itertools.product(KINDS, ["train", "eval", "served", "disabled"], [True, False])),
)
def test_a_layer_exports_in_every_mode(kind, mode, strict):
    layer, x = make(kind, dtype=torch.float64).train(mode == "train"), example(kind, torch.float64)
    twin = plain_twin(layer)
    off = lora.disabled(layer) if mode == "disabled" else nullcontext()
    with torch.set_grad_enabled(mode != "served"), off:
        program = torch.export.export(layer, (x,), strict=strict)
        expected = layer.lora_base_forward(x) if mode == "disabled" else twin(x)
    assert list(program.state_dict) == list(layer.state_dict())
    assert_same(program.module()(x), expected)


@pytest.mark.parametrize(("kind", "strict"), list(zip(WITH_DROPOUT, itertools.cycle([True, False]))))
def test_dropout_is_exported_as_torchs_own_and_only_in_training(kind, strict):
    layer, x = make(kind, lora_dropout=0.5, dtype=torch.float64), example(kind, torch.float64)
    twin, exported = plain_twin(layer), torch.export.export(layer, (x,), strict=strict).module()
    torch.manual_seed(3)
    got = exported(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    assert_same(got, layer.lora_base_forward(x) + twin(dropped) - layer.lora_base_forward(dropped))
    assert not torch.equal(got, exported(x))
    assert_same(torch.export.export(layer.eval(), (x,), strict=strict).module()(x), twin(x))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("form", "mode"),
    [*((kind, "train") for kind in [*KINDS, "Embedding with max_norm"]), ("Linear", "frozen"), ("Embedding", "frozen")],
)
def test_a_layer_with_magnitudes_that_was_exported_with_gradients_on_can_be_loaded(form, mode):
    """torch saves, and then refuses to load, a program with an empty region of no gradient."""
    layer, x = dora(form, dtype=torch.float64).train(mode == "train"), input_of(form, torch.float64)
    if mode == "frozen":
        layer.requires_grad_(False)
    program = torch.export.export(layer, (x,))
    assert list(program.state_dict) == list(layer.state_dict())
    assert_same(saved_and_loaded(program).module()(x), formula(layer, x, leaves(layer)))


@pytest.mark.parametrize(
    ("kind", "use_dora"), [*((kind, False) for kind in KINDS), ("Linear", True), ("Embedding", True)]
)
def test_gradients_through_what_was_exported_are_the_layers(kind, use_dora):
    layer, x = make(kind, dtype=torch.float64, use_dora=use_dora), example(kind, torch.float64)
    exported = torch.export.export(layer, (x,)).module()
    trained = [name for name, parameter in exported.named_parameters() if parameter.requires_grad]
    # In another order before torch 2.8.
    assert {*trained} == {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    got, expected = (
        torch.autograd.grad(one(x).square().sum(), [one.get_parameter(name) for name in trained])
        for one in (exported, layer)
    )
    assert_same(got, expected)


# ---- a model ----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """An embedding, causal attention behind a fused projection, and a head."""

    def __init__(self, dtype, **options):
        super().__init__()
        options = {"r": 2, "dtype": dtype, **options}
        self.embed = lora.Embedding(10, 8, **options)
        self.qkv = lora.MergedLinear(8, 24, enable_lora=(True, False, True), **options)
        self.out = lora.Linear(8, 8, **options)
        self.head = nn.Linear(8, 10, bias=False, dtype=dtype)
        for layer in (self.embed, self.qkv, self.out):
            randomised(layer)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)  # (batch, 1 head, length, 8) each
        return self.head(x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)))


def small(how, dtype=torch.float64):
    model = Small(dtype, use_dora=how == "dora").eval()
    if how == "merged":
        lora.merge(model)
    return model


IDS, OTHERS = torch.tensor([[1, 2, 3, 9], [0, 0, 4, 5]]), torch.tensor([[3, 9, 8, 1, 0, 2, 2], [5, 5, 4, 0, 1, 7, 6]])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("how", "strict"), [("unmerged", False), ("merged", True), ("served", False), ("dora", True)])
def test_a_model_exports_for_any_batch_and_length(how, strict):
    model = small(how)
    names = list(model.state_dict())
    with torch.set_grad_enabled(how != "served"):
        program = torch.export.export(model, (IDS,), strict=strict, dynamic_shapes=BATCH_AND_LENGTH)
        for ids in (IDS, OTHERS, OTHERS[:1, :3]):
            assert_same(program.module()(ids), model(ids))
    assert list(program.state_dict) == names
    plain = {"embed.weight", "qkv.weight", "qkv.bias", "out.weight", "out.bias", "head.weight"}
    added = {name.rpartition(".")[2] for name in set(names) - plain}
    assert plain <= set(names)
    assert added == {"merged": set(), "dora": {"lora_A", "lora_B", "lora_magnitude"}}.get(how, {"lora_A", "lora_B"})
    assert_same(saved_and_loaded(program).module()(OTHERS), model(OTHERS))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("how", ["unmerged", "dora"])
def test_an_exported_model_can_be_decomposed(how):
    model = small(how)
    program = torch.export.export(model, (IDS,)).run_decompositions()
    assert_same(program.module()(IDS), model(IDS))


@pytest.mark.parametrize("how", ["served", "dora"])
def test_another_adapter_may_be_loaded_into_an_exported_model(how):
    model, other = small(how), small(how)
    with torch.no_grad():
        exported = torch.export.export(model, (IDS,)).module()
        exported.load_state_dict(other.state_dict())
        assert_same(exported(IDS), other(IDS))
        adapter = lora.lora_state_dict(small(how))
        other.load_state_dict(adapter, strict=False)
        exported.load_state_dict(adapter, strict=False)
        assert_same(exported(IDS), other(IDS))
