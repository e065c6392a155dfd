"""Whole or not at all: what changes a model does all of it, or nothing to the bit, wherever Ctrl-C comes."""

import pkgutil
from functools import cache, partial

import pytest
import torch
from conftest import randomised
from interruptions import ends_of, interrupted_undo, is_interrupted, lines_of, whole
from torch import nn

import lora
from lora.layers import weights


class Rounded(nn.Linear):
    """A packed weight: codes in int8, and a scale that is written in place."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = torch.ones(())
        self.pack(self.weight.detach())

    def pack(self, weight):
        self.scale.copy_(weight.abs().max() / 100)
        codes = (weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def unpack(self):
        return self.weight * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.unpack(), self.bias)


@pytest.fixture(autouse=True)
def _packing(monkeypatch):
    monkeypatch.setattr(weights, "_PACKINGS", dict(weights._PACKINGS))
    lora.register_weight(Rounded, Rounded.unpack, Rounded.pack)


def plain():
    """Layers of each mechanism, one that is packed, a norm with statistics, a tie, gradients, and a head."""
    torch.manual_seed(1)
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(6, 5),
            "qkv": nn.Linear(6, 9),
            "embed": nn.Embedding(7, 5),
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "sequence": nn.Conv1d(4, 6, 3),
            "packed": Rounded(6, 5),
            "norm": nn.BatchNorm1d(5),
            "head": nn.Linear(5, 7),
        }
    )
    model["norm"].running_mean.normal_()
    model["linear"].bias.grad = torch.ones(5)
    return model


def injected(targets=("linear", "qkv", "embed", "conv", "packed"), **settings):
    """The same with LoRA in it, as after some training."""
    model = plain()
    torch.manual_seed(2)
    splits = {"splits": {"qkv": (4, 3, 2)}, "enable_lora": {"qkv": (True, False, True)}} if "qkv" in targets else {}
    lora.inject(model, **{"target_modules": list(targets), "r": 2, "lora_alpha": 3, **splits, **settings})
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            randomised(module, 0.1)
            module.lora_A.grad = torch.ones_like(module.lora_A)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
        model["norm"].running_mean += 1
    return model


DENSE = ("linear", "qkv", "embed", "conv")
IN_FULL = {"bias": "all", "modules_to_save": ["head"]}


def constructed():
    torch.manual_seed(1)
    return nn.Sequential(lora.Linear(6, 5, r=2, fan_in_fan_out=True), lora.Linear(5, 4, r=2, use_dora=True))


def waiting(how):
    model = plain()
    lora.inject(model, target_modules=["linear", "head"], r=2, init_lora_weights=how)
    return nn.Sequential(model["linear"], model["norm"], model["head"])


def calibrated(model, **settings):
    torch.manual_seed(3)
    lora.calibrate(model, [torch.randn(8, 6)], step=lambda model, x: model(x).square().mean(), **settings)


def original(name):
    torch.manual_seed(4)
    return torch.randn(5, 6)


@cache
def file_of(full):
    return lora.adapter_of(injected(DENSE, **(IN_FULL if full else {})))


def merged_for_inputs(model, merge=lora.merge):
    torch.manual_seed(3)
    batches = [torch.randn(8, 6).bfloat16() for _ in range(2)]
    return merge(model, batches, step=lambda model, x: (model["norm"](model["linear"](x)), model["qkv"](x)))


class Owner(nn.Module):
    """Two parameters of its own, and a layer."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.out = nn.Parameter(torch.ones(5, 6)), nn.Parameter(torch.ones(4, 5)), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(nn.functional.linear(nn.functional.linear(x, self.up), self.down))


PARTS = {"target_parameters": ["up", "down"], "target_modules": ["out"], "r": 2}


def owner(**settings):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), Owner())
    if settings:
        lora.inject(model, **PARTS, **settings)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
                parameter.grad = torch.ones_like(parameter)
    return model


@cache
def file_of_parts():
    return lora.adapter_of(owner(lora_alpha=3))


def resized():
    model = injected(("embed",), use_dora=True)
    model["embed"].weight.data = torch.cat([model["embed"].weight.data, torch.ones(2, 5)])
    return model


# What changes a model: how the model is made, and the change.
CHANGES = {
    "merge": (injected, lora.merge),
    "merge DoRA": (lambda: injected(DENSE, use_dora=True, **IN_FULL), lora.merge),
    "merge factored": (
        lambda: injected(("conv", "sequence"), factored=True, init_lora_weights="pissa", use_dora=True),
        lora.merge,
    ),
    "merge bfloat16": (lambda: injected(DENSE).bfloat16(), lora.merge),
    "merge transposed": (constructed, lora.merge),
    "merge for inputs": (lambda: injected(DENSE).bfloat16(), lambda model: merged_for_inputs(model)),
    "merge packed": (lambda: injected(("linear", "packed")), lambda model: lora.merge(model, packed=True)),
    "eject": (lambda: injected(**IN_FULL), lora.eject),
    "eject pissa": (lambda: injected(DENSE, init_lora_weights="pissa", use_dora=True), lora.eject),
    "eject transposed": (constructed, lora.eject),
    "inject": (plain, lambda model: lora.inject(model, target_modules="all-linear", r=2, **IN_FULL)),
    "initialize pissa": (constructed, lambda model: lora.initialize(model, "pissa")),
    "initialize again": (
        lambda: injected(DENSE, init_lora_weights="pissa"),
        lambda model: lora.initialize(model, "olora"),
    ),
    "mark_only_lora_as_trainable": (
        lambda: injected(**IN_FULL),
        lambda model: lora.mark_only_lora_as_trainable(model, "lora_only", freeze_A=True),
    ),
    "prepare_for_swap": (injected, lambda model: lora.prepare_for_swap(model, 4)),
    "calibrate eva": (lambda: waiting("eva"), lambda model: calibrated(model, rho=2.0)),
    "calibrate lora_ga": (lambda: waiting("lora_ga"), calibrated),
    "calibrate corda": (lambda: waiting("corda"), calibrated),
    "loftq": (lambda: injected(("packed",)), lambda model: lora.loftq(model, original, 3)),
    "load_adapter": (lambda: injected(DENSE), lambda model: lora.load_adapter(model, file_of(False), check_base=False)),
    "load_adapter into a plain model": (plain, lambda model: lora.load_adapter(model, file_of(True))),
    "inject parameters": (owner, lambda model: lora.inject(model, **PARTS, use_dora=True, init_lora_weights="pissa")),
    "merge parameters": (lambda: owner(use_dora=True), lora.merge),
    "eject parameters": (lambda: owner(init_lora_weights="olora"), lora.eject),
    "load_adapter with parameters": (owner, lambda model: lora.load_adapter(model, file_of_parts())),
    "load_adapter over parameters": (
        lambda: owner(lora_alpha=5),
        lambda model: lora.load_adapter(model, file_of_parts()),
    ),
    "resize": (resized, lambda model: setattr(model["embed"], "num_embeddings", 9)),
}
STARTS = {
    f"inject {how}": (
        plain,
        partial(lora.inject, target_modules=["linear", "head"], r=2, init_lora_weights=how),
    )
    for how in ("pissa", "pissa_niter_2", "olora", "orthogonal", "gaussian", "eva")
}
CHANGES |= STARTS

# At how many lines a change is interrupted.
MOST = [12, pytest.param(60, marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.exhaustive)]


def changed(change, model):
    torch.manual_seed(0)
    change(model)


def spread(points, most):
    """At most so many of them, evenly."""
    return points[:: max(1, -(-len(points) // most))] if most else points


@pytest.mark.parametrize("most", MOST, ids=["some", "many", "every"])
@pytest.mark.parametrize("what", CHANGES)
def test_ctrl_c_at_any_line_leaves_all_or_nothing(what, most):
    build, change = CHANGES[what]
    model = build()
    changed(change, model)  # what is imported, or made once, is there now
    done = whole(model, objects=False)
    model = build()
    seen = lines_of(partial(changed, change, model))
    model = build()
    before = whole(model)
    undone = 0
    for n in spread(ends_of(seen), most):
        is_interrupted(partial(changed, change, model), n)
        if whole(model) == before:
            undone += 1
        else:
            assert whole(model, objects=False) == done, seen[n]
            model = build()
            before = whole(model)
    assert undone
    changed(change, model)
    assert whole(model, objects=False) == done


@pytest.mark.parametrize("most", [2, pytest.param(12, marks=pytest.mark.exhaustive)], ids=["some", "more"])
@pytest.mark.parametrize("what", ["merge transposed", "eject transposed", "initialize pissa", "resize", "inject pissa"])
def test_ctrl_c_in_the_undo_is_undone_too(what, most, monkeypatch):
    build, change = CHANGES[what]
    model = build()
    seen = lines_of(partial(changed, change, model))
    done = whole(model, objects=False)
    model = build()
    before = whole(model)
    twice = 0
    begins = [code.co_filename.endswith("undo.py") and code.co_name == "__enter__" for code, _ in seen].index(True)
    for n in spread([n for n in ends_of(seen) if n > begins], most):
        with monkeypatch.context() as patch:
            undo = interrupted_undo(patch, None)
            is_interrupted(partial(changed, change, model), n)
        if whole(model) != before:  # it had come to its end
            model = build()
            before = whole(model)
            continue
        for m in spread(ends_of(undo.seen), 4 * most):
            with monkeypatch.context() as patch:
                interrupted_undo(patch, m)
                assert is_interrupted(partial(changed, change, model), n)
            if whole(model) == before:
                twice += 1
            else:  # it had come to its end, and neither exit to its beginning
                assert whole(model, objects=False) == done, (seen[n], undo.seen[m])
                model = build()
                before = whole(model)
    assert twice


# What is called of torch while a model changes: of each, every call is made to fail.
FAILING = {
    "merge": ["Tensor.copy_", "Tensor.clone", "Tensor.add_", "Tensor.addmm_"],
    "merge DoRA": ["Tensor.mul_", "linalg.vector_norm"],
    "merge for inputs": ["linalg.cholesky", "Tensor.addr_", "Tensor.copy_"],
    "eject pissa": ["Tensor.copy_", "add", "Tensor.to"],
    "inject pissa": ["Tensor.copy_", "zeros", "linalg.svd", "Tensor.clone"],
    "initialize again": ["Tensor.copy_", "linalg.qr"],
    "loftq": ["linalg.svd", "Tensor.norm", "Tensor.round"],
    "calibrate corda": ["linalg.cholesky", "cholesky_solve", "Tensor.copy_"],
    "prepare_for_swap": ["Tensor.fill_", "empty"],
    "load_adapter": ["Tensor.copy_", "Tensor.clone"],
}


@pytest.mark.parametrize(("what", "name"), [(what, name) for what, names in FAILING.items() for name in names])
def test_no_memory_left_in_any_call_of_torch_leaves_all_as_it_was(what, name, monkeypatch):
    build, change = CHANGES[what]
    function = pkgutil.resolve_name(f"torch:{name}")
    calls = 0

    def failing(at):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls - 1 == at:
                raise MemoryError
            return function(*args, **kwargs)

        return call

    def failed(at):
        nonlocal calls
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(f"torch.{name}", failing(at))
            try:
                changed(change, model)
            except MemoryError:
                return True
        return False

    model = build()
    before = whole(model)
    k = 0
    while failed(k):
        assert whole(model) == before, k
        k += 1
    assert k, "it is never called"


READS = [lora.merged_state_dict, lora.lora_state_dict, lora.adapter_of, lora.param_groups]


@pytest.mark.parametrize("reads", [*READS, partial(merged_for_inputs, merge=lora.merged_state_dict)])
def test_what_reads_a_model_changes_nothing_wherever_it_ends(reads):
    if reads is lora.param_groups:
        reads = partial(lora.param_groups, lr=1.0)
    model = injected(DENSE, use_dora=True, **IN_FULL).bfloat16()
    reads(model)  # what is made once is there now
    seen = lines_of(partial(reads, model))
    before = whole(model)
    for n in spread(ends_of(seen), 25):
        assert is_interrupted(partial(reads, model), n)
        assert whole(model) == before, seen[n]
