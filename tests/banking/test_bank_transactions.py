"""Whole or not at all: what changes a bank does all of it, or nothing to the bit, wherever Ctrl-C comes."""

from functools import cache, partial

import pytest
import torch
from interruptions import ends_of, is_interrupted, lines_of, whole
from torch import nn

import lora


class Owner(nn.Module):
    """A matrix of its own, and a layer."""

    def __init__(self):
        super().__init__()
        self.up, self.out = nn.Parameter(torch.ones(5, 6)), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(nn.functional.linear(x, self.up))


def config(*targets, **settings):
    return lora.LoraConfig(target_modules=list(targets), r=2, init_lora_weights=False, **settings)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), Owner(), nn.BatchNorm1d(3), nn.Embedding(4, 3))


def banked(offset=0.0):
    """A bank whose adapters have gradients, and statistics that have moved."""
    model = plain()
    torch.manual_seed(1)
    configs = {"a": config("0", "1.out", target_parameters=["1.up"]), "b": config("0", "3", use_dora=True)}
    bank = lora.bank(model, configs)
    with torch.no_grad():
        model[2].running_mean.add_(1)
        for parameter in bank.parameters("a"):
            parameter.grad = torch.ones_like(parameter)
            parameter.add_(offset)
    return model, bank


@cache
def file_of(name):
    return banked(offset=1.0)[1][name]


CHANGES = {
    "first": lambda model, bank: lora.bank(model[1], {"a": config("out", target_parameters=["up"])}),
    "add": lambda model, bank: bank.update({"c": config("0", "1.out", target_parameters=["1.up"])}),
    "add several": lambda model, bank: lora.bank(model, {"c": file_of("a"), "d": config("3")}),
    "replace": lambda model, bank: bank.update({"b": file_of("a")}),
    "delete": lambda model, bank: bank.pop("a"),
    "delete and more": lambda model, bank: bank.__delitem__("b"),
    "delete the last": lambda model, bank: bank.__delitem__("a"),
    "keep": lambda model, bank: bank.keep("a"),
    "keep another": lambda model, bank: bank.keep("b"),
    "keep none": lambda model, bank: bank.keep(None),
    "load": lambda model, bank: bank.load("a", file_of("a")),
    "freeze A": lambda model, bank: lora.mark_only_lora_as_trainable(model, freeze_A=True),
    "resize": lambda model, bank: setattr(model[3], "num_embeddings", 6),
}


def made(what):
    file_of("a")
    if what == "first":
        model = plain()
        return model, lora.bank(model)
    model, bank = banked()
    if what == "delete the last":
        del bank["b"]
    if what == "resize":
        model[3].weight.data = torch.cat([model[3].weight.data, torch.ones(2, 3)])
    return model, bank


def changed(what, model, bank):
    torch.manual_seed(0)
    CHANGES[what](model, bank)


def state(model, bank, objects=True):
    """All that a model is, and what the bank says; which objects are its seeds."""
    known = bank._own.known
    return whole(model, objects), [(name, id(seeds) if objects else 0) for name, seeds in known.items()]


@pytest.mark.parametrize(
    "most",
    [8, pytest.param(30, marks=pytest.mark.slow), pytest.param(10**6, marks=pytest.mark.exhaustive)],
    ids=["some", "many", "every"],
)
@pytest.mark.parametrize("what", CHANGES)
def test_ctrl_c_at_any_line_leaves_all_or_nothing(what, most):
    model, bank = made(what)
    changed(what, model, bank)  # what is imported, or made once, is there now
    done = state(model, bank, objects=False)
    model, bank = made(what)
    seen = lines_of(partial(changed, what, model, bank))
    model, bank = made(what)
    before = state(model, bank)
    ends = ends_of(seen)
    points = sorted({*ends[:: max(1, -(-len(ends) // most))], *ends[-6:]})  # the last: where it is left
    undone = 0
    for n in points:
        is_interrupted(partial(changed, what, model, bank), n)
        if state(model, bank) == before:
            undone += 1
        else:
            assert state(model, bank, objects=False) == done, seen[n]
            model, bank = made(what)
            before = state(model, bank)
    assert undone
    changed(what, model, bank)
    assert state(model, bank, objects=False) == done


READS = {
    "adapter": lambda bank, path: bank["a"],
    "parameters": lambda bank, path: bank.parameters("a"),
    "groups": lambda bank, path: bank.param_groups("a", lr=1.0),
    "check": lambda bank, path: bank.check("a"),
    "save": lambda bank, path: bank.save("a", path / "a.safetensors"),
    "rows": lambda bank, path: bank.rows(["a", "b", None]),
}


@pytest.mark.parametrize("most", [4, pytest.param(60, marks=pytest.mark.slow)], ids=["some", "more"])
@pytest.mark.parametrize("what", READS)
def test_what_reads_a_bank_changes_nothing_wherever_it_ends(what, most, tmp_path):
    model, bank = banked()
    reads = partial(READS[what], bank, tmp_path)
    before = state(model, bank)
    reads()
    assert state(model, bank) == before
    ends = ends_of(lines_of(reads))
    for n in ends[:: max(1, -(-len(ends) // most))]:
        assert is_interrupted(reads, n)
        assert state(model, bank) == before


def test_a_forward_that_ends_early_leaves_no_choice_behind():
    model, bank = banked()
    x = torch.ones(2, 6)

    def forward():
        with bank.rows(["a", "b"]):
            return model[0](x)

    ends = ends_of(lines_of(forward))
    with bank.use("b"):
        expected = model[0](x)
        for n in ends:
            is_interrupted(forward, n)
            assert torch.equal(model[0](x), expected)
    with pytest.raises(RuntimeError, match="no adapter is chosen"):
        model[0](x)
