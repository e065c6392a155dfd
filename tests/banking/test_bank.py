"""A bank as a mapping: what comes and goes in it, its files, and what it leaves alone."""

import copy
import io
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import safetensors.torch
import torch
from cli_model import run
from interruptions import whole
from torch import nn
from toy_model import IDS, Model

import lora


class Owner(nn.Module):
    """A matrix of its own, and a layer."""

    def __init__(self):
        super().__init__()
        self.up, self.out = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(nn.functional.linear(x, self.up))


class Base(Model):
    """The small transformer, with an owner in its head."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(Owner(), nn.Linear(8, 10, bias=False))


def plain():
    torch.manual_seed(0)
    return Base().eval()


def config(*targets, **settings):
    return lora.LoraConfig(target_modules=list(targets), init_lora_weights=False, **settings)


CONFIGS = {
    "alice": config("q_proj", "v_proj", "embed", r=2, lora_alpha=3),
    "bob": config("up_proj", "v_proj", r=3, use_rslora=True, use_dora=True, lora_dropout=0.1),
    "carol": config("q_proj", "out", r=1, target_parameters=["head.0.up"]),
}


def alone(name):
    """A plain model with one of the adapters."""
    model = plain()
    torch.manual_seed(sorted(CONFIGS).index(name))
    lora.inject(model, CONFIGS[name])
    return model.eval()


def banked(*names):
    model = plain()
    bank = lora.bank(model)
    for name in names or CONFIGS:
        torch.manual_seed(sorted(CONFIGS).index(name))
        bank[name] = CONFIGS[name]
    return model.eval(), bank


def output(model, bank=None, name=None):
    with torch.no_grad():
        if bank is None:
            return model(IDS)
        with bank.use(name):
            return model(IDS)


def trained(model, bank):
    """After a step of AdamW of each adapter, whose optimizers come back."""
    optimizers = {name: torch.optim.AdamW(bank.parameters(name), lr=0.05) for name in bank}
    for name, optimizer in optimizers.items():
        with bank.use(name):
            model(IDS).square().sum().backward()
        optimizer.step()
    return optimizers


def same(adapter, other):
    assert dict(adapter.modules) == dict(other.modules)
    assert adapter.rest == other.rest
    assert adapter.trained_in_full == other.trained_in_full
    assert [*adapter.tensors] == [*other.tensors]
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in adapter.tensors.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_a_bank_is_that_of_a_plain_model(name):
    model, bank = banked()
    one = alone(name)
    assert same(bank[name], lora.adapter_of(one))
    assert torch.equal(output(model, bank, name), output(one))
    assert torch.equal(output(model, bank, None), output(plain()))
    own = {id(parameter) for parameter in bank.parameters(name)}
    assert own == {id(tensor) for tensor in bank[name].tensors.values()}
    trains = {n for n, p in one.named_parameters() if p.requires_grad}
    assert {n.removesuffix(f"_{name}") for n, p in model.named_parameters() if id(p) in own} == trains
    grouped = [*bank.param_groups(name, lr=1.0)]
    theirs = lora.param_groups(one, lr=1.0)
    assert [(g["name"], g["lr"], len(g["params"])) for g in grouped] == [
        (g["name"], g["lr"], len(g["params"])) for g in theirs
    ]
    assert {id(p) for group in grouped for p in group["params"]} == own


@pytest.mark.parametrize("format", ["lora", "peft"])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_go_from_a_bank_to_a_plain_model_and_back(name, format, tmp_path):
    model, bank = banked()
    path = tmp_path / "adapter.safetensors" if format == "lora" else tmp_path
    bank.save(name, path, format)
    one = plain()
    lora.load_adapter(one, path)
    assert torch.equal(output(one), output(model, bank, name))
    if format == "lora":
        theirs = tmp_path / "theirs.safetensors"
        lora.save_adapter(alone(name), theirs)
        assert same(lora.read_adapter(theirs), lora.read_adapter(path))
    other, theirs = banked(*[each for each in CONFIGS if each != name])
    theirs["from a file"] = path
    assert torch.equal(output(other, theirs, "from a file"), output(one))
    changed, values = banked()
    with torch.no_grad():
        for parameter in values.parameters(name):
            parameter.add_(1)
    values.load(name, path)
    assert torch.equal(output(changed, values, name), output(one))


def left_alone(model, bank, optimizers, names):
    """What must be as it was of other adapters: objects, values, gradients, and what optimizers know."""
    found = []
    for name in names:
        for parameter in bank.parameters(name):
            state = optimizers[name].state[parameter]
            tensors = (parameter, parameter.grad, *(state[key] for key in sorted(state)))
            found += [(id(each), each.detach().clone()) for each in tensors]
    base = [(n, id(p), p.detach().clone()) for n, p in model.named_parameters() if "lora_" not in n]
    return found, base, {name: output(model, bank, name) for name in names}


CHANGES = {
    "add": lambda bank: bank.update({"dave": config("q_proj", "down_proj", r=4)}),
    "add from": lambda bank: bank.update({"dave": bank["bob"]}),
    "replace": lambda bank: bank.update({"bob": bank["carol"]}),
    "replace by itself": lambda bank: bank.update({"bob": bank["bob"]}),
    "delete": lambda bank: bank.pop("bob"),
    "load": lambda bank: bank.load("bob", banked()[1]["bob"]),
    "read": lambda bank: [bank[name] for name in bank],
    "seed": lambda bank: bank.seed("bob", 3),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_others_stay_as_they_are(what):
    model, bank = banked()
    optimizers = trained(model, bank)
    others = ("alice", "carol")
    before = left_alone(model, bank, optimizers, others)
    CHANGES[what](bank)
    after = left_alone(model, bank, optimizers, others)
    pairs = zip(before[0] + before[1], after[0] + after[1], strict=True)
    for one, other in pairs:
        assert one[:-1] == other[:-1]
        assert torch.equal(one[-1], other[-1])
    assert all(torch.equal(y, after[2][name]) for name, y in before[2].items())
    assert all(p.requires_grad for name in bank for p in bank.parameters(name))
    names = {"add": [*CONFIGS, "dave"], "add from": [*CONFIGS, "dave"], "delete": ["alice", "carol"]}
    assert [*bank] == names.get(what, [*CONFIGS])


def test_a_copy_of_an_adapter_has_tensors_of_its_own():
    model, bank = banked()
    bank["old"] = bank["bob"]
    assert same(bank["old"], bank["bob"])
    trained(model, bank)  # each by itself
    snapshot = output(model, bank, "old")
    with torch.no_grad():
        for parameter in bank.parameters("bob"):
            parameter.mul_(2)
    assert torch.equal(output(model, bank, "old"), snapshot)
    bank.load("old", bank["bob"])
    assert same(bank["old"], bank["bob"])
    assert not {*map(id, bank.parameters("old"))} & {*map(id, bank.parameters("bob"))}


def test_without_its_last_adapter_a_model_is_plain():
    model, bank = banked()
    before = whole(plain(), objects=False)
    for name in CONFIGS:
        del bank[name]
    assert len(bank) == 0
    assert repr(bank) == "AdapterBank()"
    assert whole_but_flags(model) == whole_but_flags(plain())
    assert [*model.state_dict()] == [*plain().state_dict()]
    assert not any(isinstance(module, lora.LoRALayer) for module in model.modules())
    model, bank = banked()
    bank.keep(None)
    assert whole(model.requires_grad_(True), objects=False) == before


def whole_but_flags(model):
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_one_that_is_kept_is_that_of_a_plain_model(name, tmp_path):
    model, bank = banked()
    own = [id(parameter) for parameter in bank.parameters(name)]
    y = output(model, bank, name)
    bank.keep(name)
    assert not bank
    assert torch.equal(output(model), y)
    one = alone(name)
    assert [*model.state_dict()] == [*one.state_dict()]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {*own}
    assert repr(model) == repr(one)
    lora.save_adapter(model, tmp_path / "a.safetensors")
    lora.save_adapter(one, tmp_path / "b.safetensors")
    assert same(*(lora.read_adapter(tmp_path / f"{each}.safetensors") for each in "ab"))
    model(IDS).sum().backward()
    lora.merge(model)
    assert torch.allclose(output(model), y, atol=1e-5)


def test_handles_of_one_model_are_one_bank():
    model = plain()
    one, other = lora.bank(model), lora.bank(model)  # both of nothing yet
    one["alice"] = CONFIGS["alice"]
    other["bob"] = CONFIGS["bob"]
    assert [*one] == [*other] == [*lora.bank(model)] == ["alice", "bob"]
    assert one == other == lora.bank(model)
    assert len({one, other}) == 1
    assert one != lora.bank(plain())
    with one.rows(["bob", "alice"]):
        mixed = model(IDS)
    with other.rows([1, 0]):
        assert torch.equal(model(IDS), mixed)
    del other["alice"]
    assert [*one] == ["bob"]


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(model, call, error, *words):
    """A call raises one error with all of these words, and leaves the model as it was, to the bit."""
    before = whole(model)
    with pytest.raises(error) as raised:
        call()
    assert [word for word in words if word not in str(raised.value)] == []
    assert whole(model) == before
    return str(raised.value)


def test_everything_that_is_wrong_is_said_at_once():
    model, bank = banked("alice")
    wrong = {
        "a.b": CONFIGS["bob"],
        "": CONFIGS["bob"],
        3: CONFIGS["bob"],
        "nothing": config("nope"),
        "fine": CONFIGS["carol"],
        "alice": config("gone"),
        "full": config("q_proj", modules_to_save=["norm"], bias="all"),
        "pissa": lora.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
        "wide": config("q_proj", splits={"q_proj": (3, 3)}),
        "other": lora.adapter_of(injected(nn.Sequential(nn.Linear(3, 3)))),
    }
    said = refused(
        *(model, partial(lora.bank, model, wrong), ValueError, "bank: nothing was changed, because", "'a.b' is no"),
        *("'' is no name", "3 is no name", "nothing: `target_modules` 'nope'", "alice: `target_modules` 'gone'"),
        *("full: `modules_to_save`", "full: `bias` (='all')", "pissa: `init_lora_weights`", "wide: layers.0.attn."),
        "other: 0",
    )
    assert "fine" not in said
    assert [*bank] == ["alice"]


def injected(model):
    lora.inject(model, target_modules=["0"], r=1)
    return model


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        (lambda model, bank: bank.update({"x": 3}), TypeError, "a LoraConfig, an Adapter, or the path of one, got 3"),
        (lambda model, bank: bank.update({"x": "/none/such"}), FileNotFoundError, "/none/such"),
        (lambda model, bank: bank["x"], KeyError, "x"),
        (lambda model, bank: bank.pop("x"), KeyError, "x"),
        (lambda model, bank: bank.save("x", "/x"), ValueError, "save: nothing was done"),
        (lambda model, bank: bank.load("x", bank["bob"]), ValueError, "no adapter 'x'; the bank has alice, bob, carol"),
        (lambda model, bank: bank.load("bob", bank["carol"]), lora.AdapterError, "head.0.up: has an adapter"),
        (lambda model, bank: bank.parameters("x"), ValueError, "parameters: nothing was done"),
        (lambda model, bank: bank.param_groups("x", 1.0), ValueError, "param_groups: nothing was done"),
        (lambda model, bank: bank.check("x"), ValueError, "check: nothing was done"),
        (lambda model, bank: bank.keep("x"), ValueError, "keep: nothing was done"),
        (lambda model, bank: bank.seed("x", 0), ValueError, "seed: nothing was done"),
        (lambda model, bank: bank.use("x"), ValueError, "use: no adapter is chosen"),
        (lambda model, bank: bank.rows(["x", None, "y", "bob"]), ValueError, "'y'"),
        (lambda model, bank: bank.rows([True, 3]), ValueError, "no adapter True"),
        (lambda model, bank: bank.rows(["bob"], per="word"), ValueError, "`per` must be 'row' or 'token', got 'word'"),
        (lambda model, bank: bank.rows([["bob"], ["bob"] * 2], "token"), ValueError, "lists must be of one length"),
        (lambda model, bank: bank.rows("bob"), ValueError, "an entry for each row"),
        (lambda model, bank: bank.rows([]), ValueError, "an entry for each row"),
        (lambda model, bank: model(IDS), RuntimeError, "no adapter is chosen"),
    ],
)
def test_a_wrong_call_names_what_is_wrong(what, error, words):
    model, bank = banked()
    refused(model, partial(what, model, bank), error, words)
    assert [*bank] == [*CONFIGS]


# What is for models with one adapter: each refuses, and says how the model gets to have one.
FOR_ONE = {
    "save_adapter": lambda model, path: lora.save_adapter(model, path),
    "load_adapter": lambda model, path: lora.load_adapter(model, lora.adapter_of(alone("bob"))),
    "adapter_of": lambda model, path: lora.adapter_of(model),
    "merge": lambda model, path: lora.merge(model),
    "merged_state_dict": lambda model, path: lora.merged_state_dict(model),
    "eject": lambda model, path: lora.eject(model),
    "inject": lambda model, path: lora.inject(model, target_modules=["down_proj"]),
    "initialize": lambda model, path: lora.initialize(model, "pissa"),
    "calibrate": lambda model, path: lora.calibrate(model, [IDS]),
    "loftq": lambda model, path: lora.loftq(model, dict(plain().named_parameters()).get),
    "prepare_for_swap": lambda model, path: lora.prepare_for_swap(model, 4),
    "param_groups": lambda model, path: lora.param_groups(model, lr=1.0),
    "check": lambda model, path: lora.check(model),
}


@pytest.mark.parametrize("what", FOR_ONE)
def test_what_is_for_one_adapter_says_how_to_have_one(what, tmp_path):
    model, bank = banked()
    words = f"{what}: the model has a bank of adapters (", "`bank.keep(name)`"
    refused(model, partial(FOR_ONE[what], model, tmp_path / "x.safetensors"), ValueError, *words)
    assert [*tmp_path.iterdir()] == []
    assert [*bank] == [*CONFIGS]


def test_extract_says_how_to_have_one():
    model, _ = banked()
    words = "`finetuned` has LoRA layers", "bank.keep(name)"
    refused(model, partial(lora.extract, plain(), model, r=2), ValueError, *words)


def test_a_model_with_one_adapter_gets_no_bank():
    model = alone("alice")
    words = "layers.0.attn.q_proj: has an adapter already", "embed: has an adapter", "`lora.eject` it first"
    refused(model, partial(lora.bank, model, {"bob": CONFIGS["bob"]}), ValueError, *words)


def test_a_bank_of_a_part_is_that_of_the_whole_and_two_are_named():
    model = plain()
    part = lora.bank(model.layers[0], {"alice": config("q_proj")})
    rest = lora.bank(model)
    rest["bob"] = config("up_proj")
    assert [*part] == [*rest] == ["alice", "bob"]
    assert [*rest["alice"].modules] == ["layers.0.attn.q_proj"]
    assert len(rest["bob"].modules) == 2
    with rest.rows(["alice", "bob"]):
        assert model(IDS).isfinite().all()
    two = plain()
    for layer in two.layers:
        lora.bank(layer, {"alice": config("q_proj")})
    refused(two, partial(lora.bank, two), ValueError, "parts with banks of their own")


def test_an_adapter_that_was_replaced_in_the_model_is_named():
    model, bank = banked()
    model.layers[0].attn["q_proj"] = nn.Linear(8, 8)
    for call in (lambda: bank["alice"], partial(bank.save, "alice", "/x"), partial(bank.update, {"x": config("out")})):
        refused(model, call, ValueError, "layers.0.attn.q_proj: had LoRA", "`keep(None)`")
    bank.keep(None)
    assert type(model.embed) is nn.Embedding


def test_an_own_forward_that_would_go_on_calling_lora_is_named():
    model, bank = banked("bob", "carol")
    layer = model.layers[0].mlp["up_proj"]
    layer.forward = layer.forward  # as accelerate's hooks do, around the class's own
    layer.forward = partial(layer.forward)
    for call in (partial(bank.pop, "bob"), partial(bank.keep, None), partial(bank.keep, "carol")):
        refused(model, call, ValueError, "layers.0.mlp.up_proj: the instance has its own `forward`")


# ---- torch's own ways with a model ----------------------------------------------------------------------------------


def outputs(model, bank=None):
    bank = lora.bank(model) if bank is None else bank
    return torch.stack([output(model, bank, name) for name in CONFIGS])


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_meta(model):
    other = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    return other


def assigned(model):
    with torch.device("meta"):
        other = Base().eval()
    lora.bank(other, CONFIGS)
    other.load_state_dict(model.state_dict(), assign=True)
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
    "meta": through_meta,
    "assign": assigned,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_a_model_with_a_bank_of_its_own(how):
    model, bank = banked()
    y, base = outputs(model, bank), output(model, bank, None)
    other = COPIES[how](model)
    assert torch.equal(outputs(other), y)
    assert [*other.state_dict()] == [*model.state_dict()]
    its = lora.bank(other)
    assert its != bank
    assert not {*map(id, its.parameters("bob"))} & {*map(id, bank.parameters("bob"))}
    its["dave"] = config("q_proj")
    del its["alice"]
    assert [*bank] == [*CONFIGS]
    assert [*its] == ["bob", "carol", "dave"]
    assert torch.equal(outputs(model, bank), y)
    assert torch.equal(output(other, its, None), base)
    with its.use("bob"):
        other(IDS).sum().backward()
    assert all(p.grad is not None for p in its.parameters("bob"))
    assert all(p.grad is None for p in model.parameters())


def test_a_copy_of_the_handle_is_of_a_copy_of_the_model():
    _model, bank = banked()
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert [*other] == [*bank]
        assert other != bank
        assert same(other["bob"], bank["bob"])
        assert other.parameters("bob")[0] is not bank.parameters("bob")[0]


def test_state_dicts_hold_all_adapters_strictly():
    model, bank = banked()
    other, its = banked()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    objects = [*map(id, other.parameters())]
    other.load_state_dict(model.state_dict())
    assert objects == [*map(id, other.parameters())]
    assert torch.equal(outputs(other, its), outputs(model, bank))
    del its["bob"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.0\.attn\.v_proj\.lora_A_bob"):
        other.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.0\.attn\.v_proj\.lora_A_bob"):
        model.load_state_dict(other.state_dict())
    missing, unexpected = model.load_state_dict(plain().state_dict(), strict=False)
    assert not unexpected
    assert len(missing) == sum(len(bank.parameters(name)) for name in bank)
    state = lora.lora_state_dict(model)
    assert {*state} == {*missing}
    other, its = banked()
    other.load_state_dict(state, strict=False)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())


def as_torch_file(state, path):
    torch.save(state, path)


@pytest.mark.parametrize("write", [as_torch_file, safetensors.torch.save_file], ids=["torch", "safetensors"])
def test_a_state_dict_is_told_from_an_adapter(write, tmp_path, capsys):
    model, bank = banked()
    path = tmp_path / "state"
    write(model.state_dict(), path)
    words = r"state dict of a model with a bank of adapters \(.*bob.*\).*`load_state_dict`.*`bank.save\(name, path\)`"
    with pytest.raises(lora.AdapterError, match=words):
        lora.read_adapter(path, lora_alpha=2)
    code, _, said = run(capsys, "inspect", path)
    assert code != 0
    assert re.search(words, said.replace("\n", " "))
    bank.save("bob", path)
    code, out, _ = run(capsys, "inspect", path)
    assert code == 0
    assert "layers.0.mlp.up_proj" in out


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_casts_reach_every_adapter(dtype):
    model, bank = banked()
    one = alone("bob").to(dtype)
    with bank.use("bob"), torch.no_grad():
        model(IDS)  # whatever is kept of it is of the old dtype
        assert torch.equal(model.to(dtype)(IDS), one(IDS))
    assert {p.dtype for p in bank.parameters("alice")} == {dtype}
    assert torch.equal(bank["bob"].delta("layers.0.mlp.up_proj"), lora.adapter_of(one).delta("layers.0.mlp.up_proj"))


def test_training_and_evaluating_reach_every_adapter():
    model, bank = banked("alice", "bob")
    model.train()
    assert not torch.equal(output(model, bank, "bob"), output(model, bank, "bob"))  # dropout
    model.eval()
    assert torch.equal(output(model, bank, "bob"), output(model, bank, "bob"))
    merging = plain()
    its = lora.bank(merging, {"bob": config("q_proj", merge_weights=True), "carol": CONFIGS["carol"]})
    y = output(merging.eval(), its, "bob")
    with torch.no_grad():
        its.parameters("bob")[0].add_(1)  # the merged weight is computed anew
    assert not torch.equal(output(merging, its, "bob"), y)


@pytest.mark.parametrize("freeze_A", [False, True])
def test_marking_what_trains_marks_every_adapter(freeze_A):
    model, bank = banked()
    model.requires_grad_(False)
    lora.mark_only_lora_as_trainable(model, freeze_A=freeze_A)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = set()
    for name in bank:
        one = alone(name)
        lora.mark_only_lora_as_trainable(one, freeze_A=freeze_A)
        expected |= {f"{own}_{name}" for own, parameter in one.named_parameters() if parameter.requires_grad}
    assert trains == expected


def test_a_model_that_is_a_layer_has_a_bank():
    model = nn.Linear(6, 5)
    W, b = model.weight.detach().double(), model.bias.detach().double()
    bank = lora.bank(model, {"alice": config("", r=2, lora_alpha=3)})
    A, B = (parameter.detach().double() for parameter in bank.parameters("alice"))
    x = torch.randn(3, 6)
    with bank.rows(["alice", None, "alice"]):
        y = model(x)
    expected = x.double() @ W.T + b
    expected[[0, 2]] += 1.5 * x[[0, 2]].double() @ A.T @ B.T
    assert torch.allclose(y.double(), expected, atol=1e-6)
    with bank.rows(["alice"] * 2), pytest.raises(ValueError, match="the model: the input of this layer has 3 rows"):
        model(x)
    bank.keep("alice")
    assert torch.allclose(model(x[:1]).double(), expected[:1], atol=1e-6)


class Tied(nn.Module):
    """One layer under two names, and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.second, self.head.weight = self.first, self.embed.weight

    def forward(self, x):
        return self.head(self.second(self.first(self.embed(x))))


def test_ties_are_kept():
    torch.manual_seed(0)
    model = Tied()
    base = copy.deepcopy(model)
    configs = {"a": config("first"), "b": config("second", "embed"), "c": config("head", "first"), "d": config("head")}
    bank = lora.bank(model, configs)
    assert model.first is model.second
    assert model.head.weight is model.embed.weight
    x = torch.tensor([[1, 2], [3, 4], [0, 1], [2, 2]])
    with torch.no_grad(), bank.rows(["a", "b", "c", "d"]):
        y = model(x)
    for row, name in enumerate(bank):
        one = copy.deepcopy(base)
        lora.load_adapter(one, bank[name])
        assert torch.allclose(one(x)[row], y[row], atol=1e-6)


def test_wrappers_are_looked_through_and_would_not_be_silently_wrong():
    model, bank = banked()
    compiled = torch.compile(model, backend="eager")
    assert lora.bank(compiled) == bank == lora.bank(nn.DataParallel(model))
    with bank.use("bob"), pytest.raises(RuntimeError, match=r"DataParallel cannot replicate a bank of adapters"):
        model.layers[0].mlp["up_proj"]._replicate_for_data_parallel()


def test_statistics_that_training_moved_are_in_the_file_and_given_back(tmp_path):
    def norms():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    x = torch.randn(8, 4)
    model = norms()
    bank = lora.bank(model, {"alice": config("0"), "bob": config("2")})
    with bank.use("alice"):
        model(x)  # moves the statistics, which all adapters share
        y = model.eval()(x)
    bank.save("alice", tmp_path / "alice.safetensors")
    other = norms().eval()
    lora.load_adapter(other, tmp_path / "alice.safetensors")
    assert torch.equal(other(x), y)
    with lora.disabled(model):
        assert torch.equal(model(x), norms().eval()(x))
    bank["old"] = bank["alice"]  # has what the model has
    with bank.use("old"):
        assert torch.equal(model(x), y)
    bank.load("old", bank["alice"])
    with bank.use("alice"):
        assert torch.equal(model(x), y)
    plain = norms()
    fresh = lora.bank(plain, {"alice": config("0")})
    for call in (partial(fresh.update, {"x": bank["alice"]}), partial(fresh.load, "alice", bank["alice"])):
        refused(plain, call, ValueError, "1.running_mean: is in the adapter", "1.running_var")
    bank.keep(None)
    assert torch.equal(model(x), norms().eval()(x))


def test_a_vocabulary_is_resized_for_all_adapters_or_for_none():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4))
    configs = {"a": config("0", r=2), "b": config("0", r=1, use_dora=True)}
    bank = lora.bank(model, configs)
    ones = {}
    for name in bank:
        ones[name] = nn.Sequential(nn.Embedding(6, 4))
        ones[name].load_state_dict({"0.weight": model[0].weight})
        lora.load_adapter(ones[name], bank[name])
    grown = torch.cat([model[0].weight.detach(), torch.randn(2, 4)])
    for each in (model, *ones.values()):
        each[0].weight.data = grown.clone()
        each[0].num_embeddings = 8
    ids = torch.arange(8)
    assert all(torch.equal(output_of(model, bank, name, ids), ones[name](ids)) for name in bank)
    model[0].weight.data = grown[:5].clone()  # too few for b's magnitudes; a could follow
    refused(model, partial(setattr, model[0], "num_embeddings", 5), ValueError, "cannot follow")


def output_of(model, bank, name, x):
    with bank.use(name):
        return model(x)


# ---- whose choice it is, and who has none ---------------------------------------------------------------------------


def test_disabled_is_the_base_whatever_is_chosen():
    model, bank = banked()
    base = output(plain())
    with lora.disabled(model), torch.no_grad():
        assert torch.equal(model(IDS), base)  # without a choice, too
        with bank.use("bob"):
            assert torch.equal(model(IDS), base)
        with bank.rows(["alice", None]):
            assert torch.equal(model(IDS), base)
        assert torch.equal(output(copy.deepcopy(model)), base)
    y = output(model, bank, "bob")
    assert not torch.equal(y, base)
    with bank.use("bob"), torch.no_grad(), lora.disabled(model):
        assert torch.equal(model(IDS), base)
    with bank.use("alice"), lora.disabled(model.layers[0]):  # of a part
        assert not torch.equal(output(model, bank, "alice"), base)


def in_turns(*steps):
    """Run each in a thread of its own, all within their blocks at once; what they return."""
    barrier = threading.Barrier(len(steps), timeout=60)
    with ThreadPoolExecutor(len(steps)) as pool:
        return [future.result() for future in [pool.submit(step, barrier.wait) for step in steps]]


def test_threads_choose_for_themselves():
    model, bank = banked("alice", "bob")
    expected = {name: output(model, bank, name) for name in ("alice", "bob", None)}

    def all_rows(name):
        def step(wait):
            with torch.no_grad(), bank.use(name):
                wait()
                y = model(IDS)
                wait()
            return torch.equal(y, expected[name])

        return step

    def some_rows(wait):
        with torch.no_grad(), bank.rows(["bob", None]):
            wait()
            y = model(IDS)
            wait()
        whole = torch.stack([expected["bob"][0], expected[None][1]])
        return torch.allclose(y, whole, atol=1e-6)

    def none(wait):
        wait()
        with pytest.raises(RuntimeError, match="no adapter is chosen"):
            model(IDS)
        wait()
        return True

    def off(wait):
        with torch.no_grad(), lora.disabled(model):
            wait()
            y = model(IDS)
            wait()
        return torch.equal(y, expected[None])

    with bank.use("alice"):  # of this thread alone
        assert in_turns(all_rows("alice"), all_rows("bob"), some_rows, none, off) == [True] * 5


def test_threads_train_adapters_of_one_model_at_once():
    model, bank = banked("alice", "bob")
    one, its = banked("alice", "bob")
    for name in its:
        with its.use(name):
            one(IDS).square().sum().backward()

    def step_of(name):
        def step(wait):
            with bank.use(name):
                wait()
                model(IDS).square().sum().backward()
                wait()
            return [parameter.grad for parameter in bank.parameters(name)]

        return step

    for name, gradients in zip(("alice", "bob"), in_turns(step_of("alice"), step_of("bob")), strict=True):
        for gradient, parameter in zip(gradients, its.parameters(name), strict=True):
            assert torch.equal(gradient, parameter.grad)


@torch.no_grad()
def test_blocks_are_entered_once_and_the_innermost_counts():
    model, bank = banked("alice", "bob")
    block = bank.use("alice")
    with block:
        with pytest.raises(RuntimeError, match="entered already"), block:
            pass
        with bank.use("bob"):
            y = model(IDS)
        assert torch.equal(y, output(model, bank, "bob"))
        assert torch.equal(model(IDS), output(model, bank, "alice"))
    with pytest.raises(RuntimeError, match="no adapter is chosen"):
        model(IDS)
    _other, theirs = banked("alice")
    with theirs.use("alice"), pytest.raises(RuntimeError, match="no adapter is chosen"):
        model(IDS)  # of another bank


def test_a_file_without_scaling_is_given_one(tmp_path):
    model = plain()
    torch.manual_seed(1)
    lora.inject(model, config("q_proj", r=2, lora_alpha=6))
    path = tmp_path / "loralib.pt"
    torch.save(lora.lora_state_dict(model), path)
    other, bank = banked("alice")
    refused(other, partial(bank.update, {"x": path}), ValueError, "x: it has no scaling", "give `lora_alpha`")
    bank["x"] = lora.read_adapter(path, lora_alpha=6)
    assert torch.equal(output(other, bank, "x"), output(model))


def test_what_comes_in_inference_mode_trains_after_it(tmp_path):
    model = plain()
    with torch.inference_mode():
        bank = lora.bank(model, {"alice": CONFIGS["alice"], "bob": CONFIGS["bob"]})
        bank.save("alice", tmp_path / "alice.safetensors")
        bank.load("alice", tmp_path / "alice.safetensors")
        bank["carol"] = bank["alice"]
        del bank["bob"]
    with bank.rows(["alice", "carol"]):
        model(IDS).sum().backward()
    trained = [parameter for name in bank for parameter in bank.parameters(name)]
    assert all(parameter.grad is not None and not parameter.is_inference() for parameter in trained)
    with torch.inference_mode():
        bank.keep("carol")
    model.zero_grad()
    model(IDS).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
