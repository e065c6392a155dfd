"""The starts of adapters against PEFT's, on small models: s · B A and what is left of the base weight."""

import copy
import dataclasses
import math
import sys
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.loftq_utils import _low_rank_decomposition
from peft_models import QUIET, gpt2
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]
R, ALPHA = 3, 5


class Net(nn.Module):
    """Two linear layers of each layout, beside each other and behind each other."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.conv = nn.Linear(10, 14), nn.Linear(14, 10), Conv1D(9, 10)
        nn.init.normal_(self.conv.weight)

    def forward(self, x):
        return self.conv(x + self.down(self.up(x).tanh()))


LINEAR = ["up", "down"]


def ours(base, how, **fields):
    model = copy.deepcopy(base)
    lora.inject(model, **{"target_modules": LINEAR, "r": R, "lora_alpha": ALPHA, "init_lora_weights": how} | fields)
    return model


def config(how, **fields):
    settings = {"target_modules": LINEAR, "r": R, "lora_alpha": ALPHA, "init_lora_weights": how}
    return peft.LoraConfig(**settings | fields)


def numbers(tensor):
    return tensor.detach().double().numpy()


def factors(layer):
    """A, B and s of one of our layers, or of PEFT's."""
    if isinstance(layer, lora.LoRALayer):
        return numbers(layer.lora_A), numbers(layer.lora_B), layer.scaling
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return numbers(A), numbers(B), layer.scaling["default"]


def assert_same_start(model, other, base, names=LINEAR, changed=True):
    for name in names:
        mine, theirs = model.get_submodule(name), other.base_model.model.get_submodule(name)
        (A, B, s), (A2, B2, s2) = factors(mine), factors(theirs)
        assert s == pytest.approx(s2)
        np.testing.assert_allclose(s * B @ A, s2 * B2 @ A2, rtol=0, atol=3e-5)
        np.testing.assert_allclose(numbers(mine.weight), numbers(theirs.base_layer.weight), rtol=0, atol=3e-5)
        assert np.abs(s * B @ A).max() > 0.01
        assert (numbers(mine.weight) != numbers(base.get_submodule(name).weight)).any() == changed


def assert_same_rows(A, B):
    """Rows that are equal but for their signs."""
    np.testing.assert_allclose(np.abs(A), np.abs(B), rtol=0, atol=1e-4 * np.abs(B).max())


# ---- by the weight ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa(use_rslora):
    base, names = Net(), [*LINEAR, "conv"]
    fields = {"target_modules": names, "use_rslora": use_rslora}
    other = peft.get_peft_model(copy.deepcopy(base), config("pissa", **fields))
    assert_same_start(ours(base, "pissa", **fields), other, base, names)
    theirs, mine = other.base_model.model.up, ours(base, "pissa", **fields).up
    for one, two in zip(factors(mine)[:2], factors(theirs)[:2], strict=True):
        np.testing.assert_allclose(np.abs(one), np.abs(two), rtol=0, atol=1e-4)


def test_pissa_by_iterations_is_at_least_as_near_as_theirs():
    base = nn.Sequential(nn.Linear(200, 120, bias=False))
    other = peft.get_peft_model(copy.deepcopy(base), config("pissa_niter_2", target_modules=["0"], r=8))
    mine = ours(base, "pissa_niter_2", target_modules=["0"], r=8)
    assert mine[0].weight.norm() < other.base_model.model[0].base_layer.weight.norm()


def test_olora():
    base = Net()
    assert_same_start(ours(base, "olora"), peft.get_peft_model(copy.deepcopy(base), config("olora")), base)


# ---- by shapes -------------------------------------------------------------------------------------------------


def both(how, r=8):
    base = nn.Sequential(nn.Linear(4000, 3000))
    fields = {"target_modules": ["0"], "r": r, "lora_alpha": r}
    other = peft.get_peft_model(copy.deepcopy(base), config(how, **fields))
    return factors(ours(base, how, **fields)[0]), factors(other.base_model.model[0])


def test_gaussian():
    for A, B, _ in both("gaussian"):
        assert not B.any()
        assert A.std() == pytest.approx(1 / 8, rel=0.03)
        assert abs(A.mean()) < 0.003
        assert np.abs(A).max() > 3.5 / 8  # no uniform distribution


def test_orthogonal():
    for A, B, s in both("orthogonal"):
        assert s == 1
        assert np.abs(B @ A).max() < 1e-6
        assert np.square(A).mean() == pytest.approx(1 / 200, rel=0.05)
        assert np.square(B).mean() == pytest.approx(1 / 200, rel=0.05)
        assert [np.linalg.matrix_rank(factor, tol=1e-3) for factor in (A, B)] == [4, 4]


# ---- by data ---------------------------------------------------------------------------------------------------


def eva_of_peft(base, batches, **fields):
    """PEFT runs over the batches again and again, until its components stay."""
    rho = fields.pop("rho", 1.0)
    model = peft.get_peft_model(copy.deepcopy(base), config("eva", eva_config=peft.EvaConfig(rho=rho), **fields))
    peft.initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return model


def test_eva():
    base = Net().eval()
    batches = [torch.randn(40, 10) @ torch.diag(0.6 ** torch.arange(10.0)) + 2]
    other = eva_of_peft(base, batches)
    model = ours(base, "eva")
    lora.calibrate(model.eval(), batches)
    for name in LINEAR:
        (A, B, _), (A2, B2, _) = factors(model.get_submodule(name)), factors(other.base_model.model.get_submodule(name))
        assert_same_rows(A, A2)
        assert not B.any()
        assert not B2.any()
        assert torch.equal(model.get_submodule(name).weight, base.get_submodule(name).weight)


def test_eva_of_a_language_model_leaves_out_the_same_positions():
    base, ids = gpt2(), torch.randint(11, (6, 8))
    mask, labels = torch.ones(6, 8, dtype=int), ids.clone()
    mask[:, 6:], labels[:, :2] = 0, -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    fields = {"target_modules": ["c_attn", "c_fc"], "r": 8}
    theirs = peft.get_peft_model(copy.deepcopy(base), config("eva", **fields, eva_config=peft.EvaConfig(rho=1.0)))
    peft.initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    model = ours(base, "eva", **fields)
    lora.calibrate(model, [batch])
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"):
        A, A2 = (factors(m.get_submodule(name))[0] for m in (model, theirs.base_model.model))
        assert_same_rows(A, A2)
    lora.inject(other := copy.deepcopy(base), **fields, init_lora_weights="eva")
    lora.calibrate(other, [{"input_ids": ids}])
    assert np.abs(numbers(other.transformer.h[0].attn.c_attn.lora_A)).max() > 0
    with pytest.raises(AssertionError):
        assert_same_rows(factors(other.transformer.h[0].attn.c_attn)[0], factors(model.transformer.h[0].attn.c_attn)[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_ga_of_a_language_model(checkpointing):
    base, ids = gpt2().train(), torch.randint(11, (6, 8))
    base.config.use_cache = False
    model = copy.deepcopy(base)
    for dropout in (m for m in [*base.modules(), *model.modules()] if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    if checkpointing:
        model.activation_checkpointing_enable()
    lora.inject(model, target_modules=["c_attn", "c_fc"], r=R, lora_alpha=ALPHA, init_lora_weights="lora_ga")
    lora.calibrate(model, [{"input_ids": ids, "labels": ids}])
    base(input_ids=ids, labels=ids).loss.backward()
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"):
        A, B, _ = factors(model.get_submodule(name))
        U, _, Vt = np.linalg.svd(numbers(base.get_submodule(name).weight.grad).T, full_matrices=False)
        c = len(U) ** 0.25 / 4
        assert_same_rows(A / c, Vt[:R])
        assert_same_rows(B.T / c, U.T[R : 2 * R])
    torch.testing.assert_close(model.eval()(ids).logits, base.eval()(ids).logits, rtol=1e-4, atol=1e-5)


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 5) for _ in range(3))

    def forward(self, x):
        return sum(layer(x * decay ** torch.arange(8)) for layer, decay in zip(self.layers, (0.95, 0.6, 0.3)))  # noqa: B905


def test_eva_moves_the_same_ranks():
    base, batches = Parallel().eval(), [torch.randn(300, 8)]
    names = [f"layers.{i}" for i in range(3)]
    fields = {"target_modules": names, "r": 2, "lora_alpha": 6}
    other = eva_of_peft(base, batches, rho=2.0, **fields)
    model = ours(base, "eva", **fields)
    report = lora.calibrate(model.eval(), batches, rho=2)
    theirs = [other.base_model.model.get_submodule(name) for name in names]
    assert [module.r for module in report.modules] == [layer.r["default"] for layer in theirs]
    assert len({module.r for module in report.modules}) > 1
    for mine, layer in zip((model.get_submodule(name) for name in names), theirs, strict=True):
        assert mine.scaling == layer.scaling["default"]
        assert_same_rows(factors(mine)[0], factors(layer)[0])


def loss_of(model, x):
    return model(x).square().mean()


def test_lora_ga_has_the_same_vectors_and_its_authors_scale():
    base, batches = Net(), [torch.randn(20, 10), torch.randn(20, 10)]
    theirs = copy.deepcopy(base)
    settings = config("lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(theirs, settings, lambda: [loss_of(theirs, batch).backward() for batch in batches])
    gradients = {name: numbers(theirs.get_submodule(name)._peft_loraga_grad) for name in LINEAR}
    theirs = peft.get_peft_model(theirs, settings)
    model = ours(base, "lora_ga")
    lora.calibrate(model, batches, step=loss_of)
    for name in LINEAR:
        layer = model.get_submodule(name)
        (A, B, s), (A2, B2, _) = factors(layer), factors(theirs.base_model.model.get_submodule(name))
        c = len(B) ** 0.25 / 16**0.5
        # PEFT leaves A as it is, and gives B the gradient's singular values; the authors' code scales both by c alone.
        S = np.linalg.svd(gradients[name], compute_uv=False)[R : 2 * R]
        assert_same_rows(A / c, A2)
        assert_same_rows((B * S).T, B2.T)
        W = numbers(base.get_submodule(name).weight)
        np.testing.assert_allclose(numbers(layer.weight) + s * B @ A, W, rtol=0, atol=1e-6)


@pytest.mark.parametrize("corda_method", ["ipm", "kpm"])
def test_corda(corda_method, monkeypatch):
    # PEFT takes its dataclass from `attrs`, which it does not depend on.
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    # They divide each batch by its largest value: so that it is no other than ours, these have the same one.
    base, batches = nn.Sequential(nn.Linear(10, 14)), [torch.randn(1, 30, 10).clamp(max=1.5) for _ in range(3)]
    theirs = copy.deepcopy(base)
    settings = config("corda", target_modules=["0"], corda_config=CordaConfig(corda_method=corda_method))
    preprocess_corda(theirs, settings, lambda: [theirs(batch) for batch in batches])
    theirs = peft.get_peft_model(theirs, settings)
    model = ours(base, "corda", target_modules=["0"])
    lora.calibrate(model, batches, corda_method=corda_method)
    assert_same_start(model, theirs, base, ["0"])


# ---- quantised -------------------------------------------------------------------------------------------------


class Rounded(nn.Linear):
    def pack(self, weight):
        self.weight = nn.Parameter((weight * 20).round().to(torch.int8), requires_grad=False)

    def unpack(self):
        return self.weight / 20

    def forward(self, x):
        return nn.functional.linear(x, self.unpack(), self.bias)


lora.register_weight(Rounded, Rounded.unpack, Rounded.pack)


def test_loftq():
    model, W = nn.Sequential(Rounded(30, 20)), torch.randn(20, 30)
    model[0].pack(W)
    lora.inject(model, target_modules=["0"], r=4, lora_alpha=4)
    lora.loftq(model, {"0.weight": W})
    parts = _low_rank_decomposition(W - model[0].unpack(), reduced_rank=4)
    A, B, _ = factors(model[0])
    assert_same_rows(A, numbers(parts["R"]))
    assert_same_rows(B.T, numbers(parts["L"]).T)
    assert math.isclose((parts["L"] @ parts["R"]).norm(), np.linalg.norm(B @ A), rel_tol=1e-5)
