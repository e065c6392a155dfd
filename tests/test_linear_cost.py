"""What every public function costs grows as the model does, or the file: counted at n and 2 n, never timed."""

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import sys

import pytest
import safetensors.torch
import torch
from helpers.counting import Name, bend
from torch import nn

import lora
import lora.parallel
from lora.__main__ import main
from lora.errors import join

N = 8
# Half of what it would be if each of n were compared with half of the others. Sorting takes a few more than n.
MOST = N * N // 2
# Public names that walk nothing: kinds of layer, records of settings, errors, and tables that are written to.
OF_NO_SIZE = {
    *("Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoRALayer", "MergedLinear", "AdapterError"),
    *("register", "register_weight", "parallel.ColwiseParallel", "parallel.RowwiseParallel"),
    "parallel.MergedColwiseParallel",
    *("parallel.sum_gradients", "parallel.clip_grad_norm_"),  # of a model on several devices: tests/parallel
}
# Types of what functions return: their methods are in the table under these names.
CASES = {}
NUMBERS = itertools.count()
TMP = None  # each case has a folder of its own


@pytest.fixture(autouse=True)
def names_that_count(monkeypatch):
    """Names that lora makes of names count their comparisons as well."""
    for name, module in [*sys.modules.items()]:
        if name.startswith("lora.") and vars(module).get("join") is join:
            monkeypatch.setattr(module, "join", lambda module, own: Name(join(module, own)))


class Model(nn.Module):
    """n blocks of a linear layer and a norm, whose running statistics training moves."""

    def __init__(self, n, **more):
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(n):
            block = nn.Module()
            block.add_module(up(i), nn.Linear(2, 2))
            block.add_module(norm(i), nn.BatchNorm1d(2))
            self.layers.add_module(Name(f"{i:02}"), block)
        for name, module in more.items():
            self.add_module(Name(name), module)

    def forward(self, x):
        for i, block in enumerate(self.layers):
            x = x + getattr(block, norm(i))(getattr(block, up(i))(x))
        return x


def up(i):
    return Name(f"up{i:02}")  # as long for all sizes, since what is done for a name may be done for its letters


def norm(i):
    return Name(f"norm{i:02}")


def ups(n):
    return [up(i) for i in range(n)]


def norms(n):
    return [norm(i) for i in range(n)]


def adapted(n, train=True, **settings):
    model = Model(n)
    lora.inject(model, **{"target_modules": ups(n), "r": 1, "bias": "all", **settings})
    if train:
        with torch.no_grad():
            model(torch.ones(3, 2))  # moves the running statistics
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.fill_(0.5)
    return model


@functools.cache
def plain_adapter(n):
    """One of A and B alone."""
    return lora.adapter_of(adapted(n, train=False, bias="none"))


@functools.cache
def in_full(n):
    """One with biases, whole modules and what was kept of the base."""
    return named(lora.adapter_of(adapted(n, modules_to_save=[norm(i) for i in range(0, n, 2)])))


def named(adapter):
    """The same, of names whose comparisons count."""
    lists = {own: [*map(Name, getattr(adapter, own))] for own in ("trained_in_full", "modules_to_save", "kept")}
    dicts = {own: {Name(k): v for k, v in getattr(adapter, own).items()} for own in ("modules", "tensors", "rest")}
    return lora.Adapter(**dicts, **lists, format=adapter.format)


def case(name):
    """Enter a function of n that prepares, and returns what is counted."""

    def enter(make):
        CASES[f"{name}: {make.__name__.replace('_', ' ').strip()}"] = make
        return make

    return enter


def refused(function, error=ValueError):
    """A call that raises, and makes its message."""

    def call():
        with pytest.raises(error) as raised:
            function()
        str(raised.value)

    return call


# ---- putting LoRA in, and what trains -----------------------------------------------------------------------------


def injecting(**of_n):
    def make(n):
        model, settings = Model(n), {name: value(n) for name, value in of_n.items()}
        return lambda: lora.inject(model, **{"target_modules": ups(n), "r": 1, **settings})

    return make


def full_names(n):
    return [f"layers.{i:02}.{up(i)}" for i in range(n)]


INJECTED = {
    "names": {},
    "all-linear": {"target_modules": lambda n: "all-linear"},
    "a pattern": {"target_modules": lambda n: r".*\.up\d+"},
    "full names": {"target_modules": full_names},
    "ranks": {"rank_pattern": lambda n: dict.fromkeys(ups(n), 2)},
    "ranks by full names": {"rank_pattern": lambda n: dict.fromkeys(full_names(n), 2)},
    "ranks by escaped names": {
        "rank_pattern": lambda n: {f"^layers\\.{i:02}\\.{up(i)}": 2 for i in range(n)},
        "alpha_pattern": lambda n: {f"^layers\\.{i:02}\\.{up(i)}$": 2 for i in range(n)},
    },
    "splits": {"splits": lambda n: dict.fromkeys(ups(n), (1, 1)), "enable_lora": lambda n: {"up00": (True, False)}},
    "excluded": {"exclude_modules": lambda n: [up(i) for i in range(1, n)]},
    "saved": {"modules_to_save": lambda n: norms(n)},
    "biases": {"bias": lambda n: "all"},
    "a task": {"task_type": lambda n: "SEQ_CLS"},
}
for words, settings in INJECTED.items():
    CASES[f"inject: {words}"] = injecting(**settings)


class Owner(nn.Module):
    """A module with a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.ones(2, 2))

    def forward(self, x):
        return nn.functional.linear(x, self.own)


def owners(n, adapt=False):
    model = Model(n)
    for i, block in enumerate(model.layers):
        block.add_module(up(i), Owner())
    if adapt:
        lora.inject(model, target_parameters=["own"], r=1)
    return model


@case("inject")
def parameters(n):
    model = owners(n)
    return lambda: lora.inject(model, target_parameters=["own"], r=1)


@case("inject")
def parameters_by_full_names(n):
    model = owners(n)
    return lambda: lora.inject(model, target_parameters=[Name(f"layers.{i:02}.{up(i)}.own") for i in range(n)], r=1)


@case("inject")
def parameters_that_are_not_there(n):
    model = owners(n)
    return refused(lambda: lora.inject(model, target_parameters=[Name(f"owm{i:02}") for i in range(n)], r=1))


@case("eject")
def of_parameters(n):
    model = owners(n, adapt=True)
    return lambda: lora.eject(model)


@case("merged_state_dict")
def of_parameters_too(n):
    model = owners(n, adapt=True)
    return lambda: lora.merged_state_dict(model)


@case("load_adapter")
def parameters_into_a_plain_model(n):
    adapter, model = named(lora.adapter_of(owners(n, adapt=True))), owners(n)
    return lambda: lora.load_adapter(model, adapter)


CASES["inject: a task"] = lambda n: (
    lambda model: lambda: lora.inject(model, target_modules=ups(n), r=1, task_type="SEQ_CLS")
)(Model(n, score=nn.Linear(2, 2)))


@case("check")
def after_a_step(n):
    model = adapted(n)
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            module.lora_B.grad = torch.ones_like(module.lora_B)
    return lambda: lora.check(model)


@case("inject")
def names_that_match_nothing(n):
    model = Model(n)
    wrong = [Name(f"donw{i:02}") for i in range(n)]
    return refused(lambda: lora.inject(model, target_modules=wrong, exclude_modules=wrong, modules_to_save=wrong, r=1))


@case("inject")
def patterns_that_match_nothing(n):
    model = Model(n)
    wrong = {f"donw{i:02}": 2 for i in range(n)}
    return refused(lambda: lora.inject(model, target_modules=ups(n), r=1, rank_pattern=wrong))


@case("inject")
def patterns_that_are_never_used(n):
    model = Model(n)
    ranks = dict.fromkeys(ups(n), 2) | dict.fromkeys(full_names(n), 2)
    return refused(lambda: lora.inject(model, target_modules=ups(n), r=1, rank_pattern=ranks))


@case("inject")
def modules_that_cannot_be_adapted(n):
    model = Model(n)
    return refused(lambda: lora.inject(model, target_modules=norms(n), r=1))


@case("inject")
def modules_that_train_in_full_and_are_adapted(n):
    model = Model(n)
    return refused(lambda: lora.inject(model, target_modules=ups(n), modules_to_save=ups(n), r=1))


@case("inject")
def layers_that_have_LoRA(n):
    model = adapted(n)
    return refused(lambda: lora.inject(model, target_modules=ups(n), r=1))


@case("inject")
def an_error_at_the_last_layer(n):
    model, left = Model(n), iter(range(n - 1))

    def start(layer):
        if next(left, None) is None:
            raise ValueError("undo")
        layer.reset_lora_parameters()

    return refused(lambda: lora.inject(model, target_modules=ups(n), r=1, init_lora_weights=start))


@case("inject")
def one_module_of_many_names(n):
    model = nn.ModuleList([nn.Linear(2, 2)] * n)
    return lambda: str(lora.inject(model, target_modules=["0"], r=1))


@case("inject")
def tensors_of_one_storage(n):
    model, flat = Model(n), torch.ones(n, 2, 2)
    for i, block in enumerate(model.layers):
        getattr(block, up(i)).weight = nn.Parameter(flat[i])
    return lambda: lora.inject(model, target_modules=ups(n), r=1)


@case("LoraConfig")
def ranks_and_alphas(n):
    ranks, alphas = dict.fromkeys(ups(n), 2), dict.fromkeys(ups(n), 3.0)
    return lambda: lora.LoraConfig(target_modules=ups(n), rank_pattern=ranks, alpha_pattern=alphas)


@case("LoraConfig")
def values_that_are_wrong(n):
    ranks = {name: -1 - i for i, name in enumerate(ups(n))}
    alphas = {name: f"{i}" for i, name in enumerate(ups(n))}
    return refused(lambda: lora.LoraConfig(target_modules=ups(n), rank_pattern=ranks, alpha_pattern=alphas))


@case("mark_only_lora_as_trainable")
def every_bias(n):
    model = adapted(n)
    return lambda: lora.mark_only_lora_as_trainable(model, "all")


@case("lora_state_dict")
def with_biases(n):
    model = adapted(n)
    return lambda: lora.lora_state_dict(model, "all")


@case("param_groups")
def of_a_model(n):
    model = adapted(n)
    return lambda: lora.param_groups(model, lr=1.0)


@case("disabled")
def with_trained_biases(n):
    model = adapted(n)

    def call():
        with lora.disabled(model):
            pass

    return call


@case("eject")
def what_trained(n):
    model = adapted(n)
    return lambda: lora.eject(model)


@case("initialize")
def pissa(n):
    model = adapted(n, bias="none")
    return lambda: lora.initialize(model, "pissa")


@case("initialize")
def weights_that_are_tied(n):
    model = Model(n, twins=nn.ModuleList(nn.Linear(2, 2) for _ in range(n)))
    for i, block in enumerate(model.layers):
        model.twins[i].weight = getattr(block, up(i)).weight
    lora.inject(model, target_modules=ups(n), r=1)
    return refused(lambda: lora.initialize(model, "pissa"))


@case("calibrate")
def eva(n):
    model = Model(n)
    lora.inject(model, target_modules=ups(n), r=1, init_lora_weights="eva")
    x = torch.randn(4, 2)
    return lambda: str(lora.calibrate(model, [x], rho=2.0))


@case("calibrate")
def lora_ga(n):
    model = Model(n)
    lora.inject(model, target_modules=ups(n), r=1, init_lora_weights="lora_ga")
    x = torch.randn(4, 2)
    return lambda: lora.calibrate(model, [x], step=lambda model, x: model(x).square().mean())


class Rounded(nn.Linear):
    """A packed linear layer."""

    def pack(self, weight):
        self.weight = nn.Parameter((weight * 4).round().to(torch.int8), requires_grad=False)

    def unpack(self):
        return self.weight / 4

    def forward(self, x):
        return nn.functional.linear(x, self.unpack(), self.bias)


lora.register_weight(Rounded, Rounded.unpack, Rounded.pack)


def packed(n):
    model = nn.Module()
    weights = {}
    for i in range(n):
        layer = Rounded(2, 2)
        weights[f"{up(i)}.weight"] = torch.randn(2, 2)
        layer.pack(weights[f"{up(i)}.weight"])
        model.add_module(up(i), layer)
    lora.inject(model, target_modules=ups(n), r=1)
    return model, weights


@case("loftq")
def packed_layers(n):
    model, weights = packed(n)
    return lambda: str(lora.loftq(model, weights))


@case("merge")
def packed_weights(n):
    model, _ = packed(n)
    return lambda: str(lora.merge(model))


@case("merge")
def dense_weights(n):
    model = adapted(n)
    return lambda: str(lora.merge(model))


@case("merge")
def weights_tied_to_others(n):
    model = Model(n, twins=nn.ModuleList(nn.Linear(2, 2) for _ in range(n)))
    for i, block in enumerate(model.layers):
        model.twins[i].weight = getattr(block, up(i)).weight
    lora.inject(model, target_modules=ups(n), r=1)
    return refused(lambda: lora.merge(model))


def all_tied(n):
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(n))
    for layer in model:
        layer.weight = model[0].weight
    return model


@case("inject")
def weights_that_are_all_one(n):
    model = all_tied(n)
    return lambda: str(lora.inject(model, target_modules="all-linear", r=1))


@case("merge")
def weights_that_all_are_one(n):
    model = all_tied(n)
    lora.inject(model, target_modules="all-linear", r=1)
    return refused(lambda: lora.merge(model))


@case("merged_state_dict")
def of_many_layers(n):
    model = adapted(n)
    return lambda: lora.merged_state_dict(model)


@case("bank")
def several(n):
    model = Model(n)
    config = lora.LoraConfig(target_modules=ups(n), r=1)

    def call():
        bank = lora.bank(model, {"a": config, "b": config})
        bank["c"] = bank["a"]
        del bank["b"]
        bank.keep(None)

    return call


@case("prepare_for_swap")
def many_layers(n):
    model = adapted(n)
    return lambda: lora.prepare_for_swap(model, 2)


@case("parallel.plan_of")
def names(n):
    model = adapted(n)
    plan = dict.fromkeys(full_names(n), "colwise")
    return lambda: lora.parallel.plan_of(model, plan)


@case("reports")
def as_tables(n):
    report = lora.inject(Model(n), target_modules=ups(n), modules_to_save=norms(n), r=1)
    return lambda: str(report)


# ---- files --------------------------------------------------------------------------------------------------------


@case("adapter_of")
def with_what_trained_in_full(n):
    model = adapted(n, modules_to_save=[norm(i) for i in range(0, n, 2)])
    return lambda: lora.adapter_of(model)


@case("adapter_of")
def layers_replaced(n):
    model = adapted(n)
    for i, block in enumerate(model.layers):
        setattr(block, up(i), nn.Linear(2, 2))
    return refused(lambda: lora.adapter_of(model))


def place(end=""):
    """A path at which there is nothing."""
    return TMP / f"{next(NUMBERS)}{end}"


def saving(make, format):
    def of(n):
        model, path = make(n), place()
        return lambda: lora.save_adapter(model, path, format)

    return of


def writing(make, format):
    def of(n):
        adapter, path = make(n), place()
        names = [Name(f"{part}.{own}") for part in full_names(n) for own in ("a", "b")]
        return lambda: lora.write_adapter(adapter, path, format, module_names=names)

    return of


def loading(make, format, into):
    def of(n):
        path = place()
        lora.write_adapter(make(n), path, format)
        model = into(n)
        return lambda: lora.load_adapter(model, path, check_base=False)

    return of


def reading(make, format):
    def of(n):
        path = place()
        lora.write_adapter(make(n), path, format)
        return lambda: lora.read_adapter(path)

    return of


@functools.cache
def with_biases_alone(n):
    return named(lora.adapter_of(adapted(n, train=False)))


@functools.cache
def of_many_ranks(n):
    return named(
        lora.adapter_of(adapted(n, train=False, bias="none", rank_pattern={up(i): 2 + i % 2 for i in range(0, n, 2)}))
    )


MADE = {
    "lora": (plain_adapter, in_full),
    "peft": (plain_adapter, with_biases_alone, of_many_ranks),
    "portable": (plain_adapter,),
}
for format, makes in MADE.items():
    for make in makes:
        words = f"{format}, {make.__name__.replace('_', ' ')}"
        CASES[f"write_adapter: {words}"] = writing(make, format)
        CASES[f"read_adapter: {words}"] = reading(make, format)
        CASES[f"load_adapter: {words}, into a plain model"] = loading(make, format, Model)
    CASES[f"save_adapter: {format}"] = saving(lambda n: adapted(n, train=False, bias="none"), format)
CASES["save_adapter: peft, biases"] = saving(lambda n: adapted(n, train=False), "peft")
CASES["load_adapter: lora, into an adapted model"] = loading(
    in_full, "lora", lambda n: adapted(n, modules_to_save=[norm(i) for i in range(0, n, 2)])
)
CASES["load_adapter: peft, into an adapted model"] = loading(
    with_biases_alone, "peft", lambda n: adapted(n, train=False)
)


@case("write_adapter")
def peft_with_whole_modules(n):
    model = Model(n)
    for block in model.layers:
        for name, module in [*block._modules.items()]:
            if isinstance(module, nn.BatchNorm1d):
                block.add_module(name, nn.LayerNorm(2))
    lora.inject(model, target_modules=ups(n), r=1, modules_to_save=norms(n))
    return writing(lambda n: named(lora.adapter_of(model)), "peft")(n)


@case("read_adapter")
def peft_with_whole_modules_(n):
    path = place()
    path.mkdir()
    prefix = "base_model.model."
    tensors = {f"{prefix}{up(i)}.lora_{part}.weight": torch.ones(1, 1) for i in range(n) for part in "AB"}
    tensors |= {f"{prefix}{norm(i)}.weight": torch.ones(1) for i in range(n)}
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    saved = norms(n)
    patterns = {up(i): 1 for i in range(n)}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "modules_to_save": saved}
    config |= {"target_modules": ups(n), "rank_pattern": patterns, "alpha_pattern": patterns}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return lambda: lora.read_adapter(path)


@case("read_adapter")
def loralibs(n):
    n = 8 * n  # from 256 objects on a pickle counts in four bytes
    path = place(".pt")
    state = {f"{up(i)}.lora_{part}": torch.ones(1, 1) for i in range(n) for part in "AB"}
    torch.save(state | {f"{up(i)}.bias": torch.ones(1) for i in range(n)}, path)
    return lambda: lora.read_adapter(path, lora_alpha=1)


def kohyas(n):
    path = place(".safetensors")
    ends = {"lora_down.weight": torch.ones(1, 2), "lora_up.weight": torch.ones(2, 1), "alpha": torch.ones(())}
    tensors = {f"lora_unet_layers_{i:02}_{up(i)}.{end}": t.clone() for i in range(n) for end, t in ends.items()}
    safetensors.torch.save_file(tensors, path)
    return path


@case("read_adapter")
def kohyas_names(n):
    path = kohyas(n)
    return lambda: lora.read_adapter(path)


@case("load_adapter")
def kohyas_names_(n):
    adapter, model = named(lora.read_adapter(kohyas(n))), Model(n)
    return lambda: lora.load_adapter(model, adapter)


@case("load_adapter")
def biases_of_B(n):
    path = place()
    path.mkdir()
    ends = {"lora_A.weight": torch.ones(1, 2), "lora_B.weight": torch.ones(2, 1), "lora_B.bias": torch.ones(2)}
    names = {f"base_model.model.layers.{i:02}.{up(i)}.{end}": t.clone() for i in range(n) for end, t in ends.items()}
    safetensors.torch.save_file(names, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "lora_bias": True}
    (path / "adapter_config.json").write_text(json.dumps(config))
    adapter, model = named(lora.read_adapter(path)), Model(n)
    return lambda: lora.load_adapter(model, adapter)


@case("write_adapter")
def what_has_no_place(n):
    adapter = dataclasses.replace(in_full(n), modules_to_save=[])
    return refused(lambda: lora.write_adapter(adapter, TMP / "refused", "peft"))


@case("load_adapter")
def another_models(n):
    adapter = in_full(n)
    model = nn.Sequential(nn.Linear(2, 2))
    return refused(lambda: lora.load_adapter(model, adapter))


@case("load_adapter")
def of_other_shapes(n):
    adapter = in_full(n)
    model = Model(n)
    for block in model.layers:
        for name, module in [*block._modules.items()]:
            block.add_module(name, nn.Linear(3, 2) if isinstance(module, nn.Linear) else nn.BatchNorm1d(3))
    return refused(lambda: lora.load_adapter(model, adapter))


@case("load_adapter")
def another_base(n):
    adapter = lora.adapter_of(adapted(n, bias="none"))
    model = Model(n)
    return refused(lambda: lora.load_adapter(model, adapter))


@case("load_adapter")
def names_that_clash(n):
    adapter = plain_adapter(n)
    modules = {**adapter.modules, **{f"module.{name}": settings for name, settings in adapter.modules.items()}}
    tensors = {**adapter.tensors, **{f"module.{name}": tensor for name, tensor in adapter.tensors.items()}}
    twice = named(lora.Adapter(modules, tensors))
    model = Model(n)
    return refused(lambda: lora.load_adapter(model, twice))


@case("load_adapter")
def tied_in_the_model(n):
    adapter = in_full(n)
    model = Model(n)
    for i, block in enumerate(model.layers):
        block.add_module("twin", nn.Module())
        block.twin.bias = getattr(block, up(i)).bias
    adapter = lora.Adapter(adapter.modules, adapter.tensors, adapter.trained_in_full, format="peft", kept=adapter.kept)
    return refused(lambda: lora.load_adapter(model, adapter, check_base=False))


@case("Adapter")
def looked_through(n):
    adapter = in_full(n)
    return lambda: [*adapter.problems(), repr(adapter), *map(adapter.delta, adapter.modules)]


@case("Adapter")
def what_is_wrong(n):
    adapter = in_full(n)
    wrong = lora.Adapter(adapter.modules, {}, adapter.trained_in_full, kept=ups(n))
    return lambda: [*wrong.problems()]


# ---- arithmetic ---------------------------------------------------------------------------------------------------


@functools.cache
def kept_alone(n):
    """One with what was kept of the base, and nothing that trained in full."""
    return named(lora.adapter_of(adapted(n, bias="none")))


for method in ("cat", "svd", "linear", "ties", "dare"):
    CASES[f"combine: {method}"] = lambda n, method=method: (
        lambda adapter: lambda: lora.combine([(adapter, 0.5), (adapter, 0.5)], method)
    )(kept_alone(n))


@case("combine")
def many_adapters(n):
    one = plain_adapter(2)
    return lambda: lora.combine([(one, 1.0)] * n, "linear")


@case("combine")
def adapters_of_different_modules(n):
    adapters = []
    for i in range(n):
        settings = {"r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "use_rslora": False, "scaling": 1.0}
        settings["base"] = {"kind": "linear", "shape": [2, 2]}
        tensors = {f"{up(i)}.lora_A": torch.ones(1, 2), f"{up(i)}.lora_B": torch.ones(2, 1)}
        rest = {f"{norm(i)}.weight": {"shape": [1], "sample": [1.0]}}
        adapters.append((named(lora.Adapter({up(i): settings}, tensors, rest=rest)), 1.0))
    return lambda: lora.combine(adapters)


@case("combine")
def what_trained_in_full(n):
    adapter = in_full(n)
    return refused(lambda: lora.combine([(adapter, 1.0)]))


@case("subtract")
def two(n):
    adapter = kept_alone(n)
    return lambda: lora.subtract(adapter, adapter)


@case("scale")
def one(n):
    adapter = kept_alone(n)
    return lambda: lora.scale(adapter, 2.0)


@case("resize")
def to_a_larger_rank(n):
    adapter = in_full(n)
    return lambda: str(lora.resize(adapter, 2))


@case("extract")
def every_layer(n):
    base = Model(n)
    finetuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in finetuned.parameters():
            parameter.add_(torch.randn_like(parameter))
    return lambda: str(lora.extract(base, finetuned, r=1))


@case("extract")
def models_that_do_not_fit(n):
    base, other = Model(n), nn.Sequential(*(nn.Linear(2, 2) for _ in range(n)))
    return refused(lambda: lora.extract(base, other, r=1))


# ---- the command line ---------------------------------------------------------------------------------------------


def command(*words):
    def call():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main([str(word) for word in words])
        assert code == 0, errors.getvalue()

    return call


def written(make, n, format="lora"):
    path = place()
    lora.write_adapter(make(n), path, format)
    return path


@case("command inspect")
def an_adapter(n):
    return command("inspect", written(in_full, n))


@case("command inspect")
def as_json(n):
    return command("inspect", written(in_full, n), "--json")


@case("command diff")
def with_itself(n):
    path = written(in_full, n)
    return command("diff", path, path)


@case("command convert")
def to_PEFT(n):
    return command("convert", written(with_biases_alone, n), place(), "--format", "peft")


@case("command combine")
def two_files(n):
    path = written(plain_adapter, n)
    return command("combine", place(), path, path)


@case("command resize")
def a_file(n):
    return command("resize", written(plain_adapter, n), place(), "--r", "2")


def folder(model, shards):
    path = place()
    path.mkdir()
    names = [*model]
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        own = {name: model[name] for name in names if files[name] == file}
        safetensors.torch.save_file(own, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return path


@case("command merge")
def many_tensors(n):
    model = adapted(n)
    adapter = place()
    lora.save_adapter(model, adapter)
    lora.eject(model)
    return command("merge", folder(model.state_dict(), 2), adapter, place())


@case("command merge")
def many_files(n):
    model = adapted(n)
    adapter = place()
    lora.save_adapter(model, adapter)
    lora.eject(model)
    return command("merge", folder(model.state_dict(), n), adapter, place())


@case("command merge")
def tensors_that_are_missing(n):
    adapter, path = written(in_full, n), folder({f"layers.{i:02}.{up(i)}.bias": torch.ones(2) for i in range(n)}, 2)

    def call():
        with contextlib.redirect_stderr(io.StringIO()):
            assert main(["merge", str(path), str(adapter), str(TMP / "missing")]) == 2

    return call


# ---- the table holds -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TMP", tmp_path)


# What takes the same way as another case, but for a part that is small.
SLOW = {name for name in CASES if name.startswith(("command ", "combine: ", "load_adapter: p", "parallel"))} - {
    *("command inspect: an adapter", "command merge: many tensors", "combine: cat", "combine: many adapters"),
    *("combine: adapters of different modules", "load_adapter: peft, into an adapted model"),
}


@pytest.mark.sampled(24)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_the_cost_grows_as_the_work_does(name):
    torch.manual_seed(0)
    assert bend(CASES[name], N) <= MOST


def test_every_public_function_is_in_the_table():
    public = {*lora.__all__, *(f"parallel.{name}" for name in lora.parallel.__all__)}
    measured = {name.partition(":")[0] for name in CASES}
    assert public - OF_NO_SIZE - measured - {"AdapterBank", "Extracted", "Resized"} == set()
