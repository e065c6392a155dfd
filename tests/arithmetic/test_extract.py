"""extract: an adapter that turns one model into another."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from dense import assert_same, best, dense
from toy_model import IDS, Model, snapshot

import lora
from lora.arithmetic import extract

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6), lambda W: [W], 5),
    "embedding": (lambda: nn.Embedding(7, 5), None, lambda W: [W.T], 5),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7), lambda W: [W.reshape(6, -1)], 6),
    "conv2d": (lambda: nn.Conv2d(4, 6, (1, 3)), (2, 4, 5, 6), lambda W: [W.reshape(6, -1)], 6),
    "groups": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2),
        (2, 4, 5, 6),
        lambda W: [W[:3].reshape(3, -1), W[3:].reshape(3, -1)],
        6,
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 3), lambda W: [W.reshape(3, -1)], 3),
}
layers = pytest.mark.parametrize(("make", "shape", "blocks", "full"), LAYERS.values(), ids=LAYERS)


@torch.no_grad()
def moved(model, *names):
    """A copy in which these parameters and buffers have changed; all of them if none is named."""
    other = copy.deepcopy(model)
    for name, tensor in [*other.named_parameters(), *other.named_buffers()]:
        if (name in names or not names) and tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor).abs())
    return other


def loaded(base, adapter, path):
    """A copy of the base model with the adapter, gone through a file."""
    lora.write_adapter(adapter, path)
    model = copy.deepcopy(base)
    lora.load_adapter(model, path)
    return model.eval()


# ---- one layer of each kind ------------------------------------------------------------------------------------


@layers
def test_full_rank_is_the_fine_tune(make, shape, blocks, full, tmp_path):
    base = nn.Sequential(make()).double()
    finetuned = moved(base)
    x = torch.randint(7, (3, 4)) if shape is None else torch.randn(shape, dtype=torch.float64)
    before = snapshot(base), snapshot(finetuned)
    for options in ({"r": 100 * full}, {"energy": 1}):
        adapter, kept = extract(base, finetuned, **options)
        assert kept == {"0": 1.0}
        assert adapter.modules["0"]["r"] == full
        assert adapter.trained_in_full == [name for name, _ in base.named_parameters() if name.endswith("bias")]
        torch.testing.assert_close(loaded(base, adapter, tmp_path / "a")(x), finetuned(x), rtol=1e-12, atol=1e-12)
    assert (snapshot(base), snapshot(finetuned)) == before


@layers
@pytest.mark.parametrize("r", [2, 4])
def test_a_rank_is_the_best_approximation_of_the_difference(make, shape, blocks, full, r):
    base = nn.Sequential(make()).double()
    finetuned = moved(base)
    q = r // len(blocks(np.zeros(base[0].weight.shape)))
    adapter, kept = extract(base, finetuned, r)
    W = (finetuned[0].weight - base[0].weight).detach().numpy()
    assert adapter.modules["0"]["r"] == min(r, full)
    energies = [best(block, q)[1] for block in blocks(W)]
    share = sum(energy[:q].sum() for energy in energies) / sum(energy.sum() for energy in energies)
    assert kept["0"] == pytest.approx(share, rel=1e-12)
    for got, block in zip(blocks(dense(adapter)), blocks(W), strict=True):
        assert_same(got, best(block, q)[0], scale=np.abs(W).max())


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99])
def test_energy_takes_the_smallest_rank_that_keeps_it(energy):
    base = nn.Sequential(nn.Linear(8, 8))
    finetuned = moved(base)
    W = (finetuned[0].weight.double() - base[0].weight.double()).detach().numpy()
    squares = best(W, 8)[1]
    share = squares.cumsum() / squares.sum()
    adapter, kept = extract(base, finetuned, energy=energy)
    r = adapter.modules["0"]["r"]
    assert kept["0"] == pytest.approx(share[r - 1], rel=1e-5)
    assert share[r - 1] >= energy
    assert r == 1 or share[r - 2] < energy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_adapters_are_float32_at_least_and_the_rest_is_as_in_the_base(dtype):
    base = nn.Sequential(nn.Linear(4, 4)).to(dtype)
    adapter, _ = extract(base, moved(base.double()).float() if dtype == torch.float64 else moved(base), 4)
    assert {adapter.tensors[f"0.{name}"].dtype for name in ("lora_A", "lora_B")} == {
        torch.promote_types(dtype, torch.float32)
    }
    assert adapter.tensors["0.bias"].dtype == dtype


def test_a_fine_tune_in_another_dtype_is_compared_by_value():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    finetuned = copy.deepcopy(base).float()
    with torch.no_grad():
        finetuned[1].weight.add_(1e-4)
    adapter, _ = extract(base, finetuned, 1)
    assert list(adapter.modules) == ["1"]
    assert adapter.trained_in_full == []
    assert_same(dense(adapter, "1"), np.full((4, 4), 1e-4), scale=1e8)


# ---- whole models ----------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def forward(self, x):
        x = self.depthwise(self.norm(self.conv(x)).relu()).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_what_no_adapter_holds_is_kept_in_full(tmp_path):
    base = Net().eval()
    finetuned = moved(base).eval()
    finetuned.norm.num_batches_tracked += 3
    adapter, kept = extract(base, finetuned, 4)
    assert (
        list(kept)
        == list(adapter.modules)
        == [
            "conv",
            "attention.in_proj_weight",
            "attention.out_proj",
            "depthwise",
            "head",
        ]
    )
    everything = {name for name in base.state_dict() if {name, name.rpartition(".")[0]}.isdisjoint(kept)}
    assert set(adapter.trained_in_full) == everything | {
        f"{name}.bias" for name in kept if f"{name}.bias" in base.state_dict()
    }
    x = torch.randn(2, 2, 5, 5)
    model = loaded(base, adapter, tmp_path / "a")
    torch.testing.assert_close(model(x), finetuned(x), rtol=1e-4, atol=1e-4)
    assert model.norm.num_batches_tracked == 3
    assert (adapter.tensors["norm.weight"].data_ptr()) != finetuned.norm.weight.data_ptr()


def test_what_does_not_differ_is_left_out():
    base = Model()
    adapter, _ = extract(base, moved(base, "layers.1.attn.q_proj.weight", "layers.0.norm.bias"), 8)
    assert list(adapter.modules) == ["layers.1.attn.q_proj"]
    assert adapter.trained_in_full == ["layers.0.norm.bias"]


def test_targets_are_adapted_and_the_rest_is_kept_in_full(tmp_path):
    base = Model()
    finetuned = moved(base)
    adapter, _ = extract(
        base, finetuned, 8, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.1.attn.v_proj"]
    )
    assert list(adapter.modules) == ["layers.0.attn.q_proj", "layers.0.attn.v_proj", "layers.1.attn.q_proj"]
    assert {"embed.weight", "layers.1.attn.v_proj.weight"} <= set(adapter.trained_in_full)
    torch.testing.assert_close(loaded(base, adapter, tmp_path / "a")(IDS), finetuned(IDS), rtol=1e-4, atol=1e-3)
    assert "embed" not in extract(base, finetuned, 8, exclude_modules=["embed"]).adapter.modules


@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ["embed", "q_proj"]}, {"exclude_modules": ["embed"]}], ids=str
)
def test_tied_weights(options, tmp_path):
    base = Model(tied=True).double()
    finetuned = moved(base)
    assert finetuned.head.weight is finetuned.embed.weight
    adapter, _ = extract(base, finetuned, 8, **options)
    tied = {"embed", "head"} & set(adapter.modules)
    assert tied == (set() if options else {"embed", "head"})
    assert ("embed.weight" in adapter.trained_in_full) == bool(options)
    assert "head.weight" not in adapter.trained_in_full
    torch.testing.assert_close(loaded(base, adapter, tmp_path / "a")(IDS), finetuned(IDS), rtol=1e-10, atol=1e-9)


def test_a_tied_weight_that_became_two_is_two_adapters_or_a_problem(tmp_path):
    base = Model(tied=True).double()
    finetuned = moved(base, "embed.weight")
    finetuned.head.weight = nn.Parameter(finetuned.head.weight.detach() + 1)
    adapter, _ = extract(base, finetuned, 8)
    torch.testing.assert_close(loaded(base, adapter, tmp_path / "a")(IDS), finetuned(IDS), rtol=1e-10, atol=1e-9)
    with pytest.raises(ValueError, match=r"embed\.weight, head\.weight: one tensor in `base`, and different ones in"):
        extract(base, finetuned, 8, exclude_modules=["head"])


def test_a_module_with_several_names_is_adapted_once(tmp_path):
    shared = nn.Linear(4, 4)
    base = nn.Sequential(shared, nn.ReLU(), shared)
    finetuned = moved(base)
    adapter, _ = extract(base, finetuned, 4)
    assert sorted(adapter.tensors) == ["0.bias", "0.lora_A", "0.lora_B"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(base, adapter, tmp_path / "a")(x), finetuned(x))


def test_an_embedding_whose_function_is_more_than_its_weight_is_kept_in_full():
    base = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 3))
    adapter, _ = extract(base, moved(base), 2)
    assert list(adapter.modules) == ["1"]
    assert "0.weight" in adapter.trained_in_full


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 3))


class HeadsLoRA(lora.LoRALayer):
    @classmethod
    def lora_shapes(cls, base, r, **settings):
        return (r, 2, 3), (2, r, 3)


def test_kinds_that_users_register_are_kept_in_full_or_refused_where_asked_for():
    lora.register(Heads, HeadsLoRA)
    base = nn.Sequential(Heads(), nn.Linear(3, 3))
    finetuned = moved(base)
    assert extract(base, finetuned, 2).adapter.trained_in_full == ["0.weight", "1.bias"]
    with pytest.raises(ValueError, match=r"0: its update cannot be known from its weight\."):
        extract(base, finetuned, 2, target_modules=["0"])


def test_what_is_known_of_the_base_is_in_the_adapter():
    base = nn.Sequential(nn.Linear(3, 3))
    base.config = SimpleNamespace(_name_or_path="some/model")
    adapter, _ = extract(base, moved(base), 2)
    assert adapter.base_model == "some/model"
    assert not any(tensor.requires_grad for tensor in adapter.tensors.values())
    assert adapter.modules["0"]["base"]["sample"][0] == base[0].weight[0, 0].item()


# ---- what it refuses -------------------------------------------------------------------------------------------


def refuses(base, finetuned, *messages, r=2, **options):
    before = snapshot(base), snapshot(finetuned)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the messages are compared below)
        extract(base, finetuned, r, **options)
    assert (snapshot(base), snapshot(finetuned)) == before
    for message in messages:
        assert message in str(caught.value)


def test_nothing_differs():
    model = Model()
    refuses(model, copy.deepcopy(model), "no layer to adapt differs; what differs: nothing.")
    refuses(model, moved(model, "layers.0.norm.bias"), "what differs: layers.0.norm.bias.")


def test_other_architectures_are_listed_all():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    other = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 5), nn.Linear(3, 2))
    refuses(
        base,
        other,
        "0.bias is missing in `finetuned`.",
        "2.bias is missing in `base`.",
        "1.weight must have one shape in both, got (3, 4) and (5, 4).",
        "1.bias must have one shape in both, got (3,) and (5,).",
    )


def test_models_that_cannot_be_compared():
    base, adapted = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(lora.Linear(4, 4, r=2))
    refuses(adapted, base, "`base` has LoRA layers; merge or eject them first.")
    refuses(base, adapted, "`finetuned` has LoRA layers; merge or eject them first.", "0.lora_A is missing in `base`.")
    with pytest.raises(ValueError, match=r"0\.weight must be a dense tensor with values in `finetuned`\."):
        extract(base, copy.deepcopy(base).to("meta"), 2)
    broken = copy.deepcopy(base)
    broken[0].weight.data[0, 0] = float("nan")
    refuses(base, broken, "0.weight differs, and holds NaN or infinity.")


def test_targets_and_ranks_that_do_not_fit():
    base = Net()
    finetuned = moved(base)
    refuses(base, finetuned, "'nowhere' matches no module", target_modules=["nowhere"], r=4)
    refuses(base, finetuned, "norm: no kind of LoRA layer adapts a BatchNorm2d", target_modules=["norm"], r=4)
    refuses(base, finetuned, "depthwise: `r` (=2) must be divisible by `groups` (=4)", "is kept in full.")
    refuses(base, finetuned, "`target_modules` must name the modules to adapt", target_modules=[])
