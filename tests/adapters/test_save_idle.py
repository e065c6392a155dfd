"""save_adapter names the adapters that took no part in a training, and gives no false alarm."""

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora

NAMES = ["words", "body", "dead", "expert", "head", "other_head"]


class Net(nn.Module):
    """`dead` is read by a name that is made at run time; `expert` sees no token; `other_head` is not in use."""

    def __init__(self):
        super().__init__()
        self.words, self.body, self.dead = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.expert, self.head, self.other_head = nn.Linear(8, 8), nn.Linear(8, 9), nn.Linear(8, 2)

    def forward(self, ids):
        x = self.body(self.words(ids))
        x = x + self.expert(x[:0]).sum(0)
        x = F.linear(x, getattr(self, "".join(["de", "ad"])).weight)
        return self.head(x)


def adapted(names=NAMES, **fields):
    torch.manual_seed(0)
    model = Net()
    lora.inject(model, target_modules=names, r=2, **fields)
    return model


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "one by one": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
}


def trained(model, optimizer="AdamW", steps=2, keep_gradients=False):
    optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(4)).square().sum().backward()
        optimizer.step()
    if not keep_gradients:
        optimizer.zero_grad()
    return model


def warned(model, path, **how):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora.save_adapter(model, path, **how)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("keep_gradients", [False, True])
def test_what_no_gradient_came_to_is_named_in_one_warning(optimizer, keep_gradients, tmp_path):
    model = trained(adapted(), optimizer, keep_gradients=keep_gradients)
    (message,) = warned(model, tmp_path / "a")
    assert message.startswith(
        "save_adapter: 2 of 6 adapters are as they started, and others have learnt: dead, other_head. No gradient came"
    )
    assert [*lora.read_adapter(tmp_path / "a").modules] == NAMES  # it was written all the same


def test_where_writes_are_not_counted_values_tell(tmp_path):
    """Some versions of torch do not count a fused optimizer's: an expert without a token is named as well then."""
    model = adapted()
    before = {p: p._version for p in model.parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    model(torch.arange(4)).square().sum().backward()
    optimizer.step()
    counted = any(p._version != version for p, version in before.items())
    (message,) = warned(model, tmp_path / "a")
    assert "dead, other_head. " in message  # there are gradients
    optimizer.zero_grad()
    (message,) = warned(model, tmp_path / "a")
    assert ("dead, other_head. " if counted else "dead, expert, other_head. ") in message


STARTS = ["gaussian", "pissa", "olora", True]


@pytest.mark.parametrize("how", STARTS, ids=str)
def test_a_start_from_the_weight_is_known_by_its_values(how, tmp_path):
    model = adapted(["body", "dead", "head"], init_lora_weights=how)
    assert not warned(model, tmp_path / "a")
    (message,) = warned(trained(model), tmp_path / "a")
    assert "others have learnt: dead. " in message


def test_a_start_after_inject_is_a_start(tmp_path):
    model = adapted(["body", "dead", "head"])
    trained(model)
    lora.initialize(model, "pissa")
    assert not warned(model, tmp_path / "a")
    (message,) = warned(trained(model), tmp_path / "a")
    assert "others have learnt: dead. " in message


QUIET = {
    "before training": lambda model, path: model,
    "before the first step": lambda model, path: trained(model, steps=0),
    "trained, all of them": lambda model, path: trained(adapted(["words", "body", "expert", "head"])),
    "random starts": lambda model, path: trained(adapted(init_lora_weights=False)),
    "a start of one's own": lambda model, path: adapted(init_lora_weights=lambda layer: uneven(layer)),
    "frozen": lambda model, path: trained(frozen(model)),
    "copied": lambda model, path: copy.deepcopy(trained(model)),
    "loaded": lambda model, path: loaded(model, path),
    "loaded into what was adapted": lambda model, path: loaded(model, path, adapted()),
    "loaded, and trained": lambda model, path: trained(loaded(model, path)),
    "loaded from a state dict": lambda model, path: from_state(trained(model)),
    "put in after others have learnt": lambda model, path: second(model),
    "between a backward and its step": lambda model, path: after_backward(model),
}


def second(model):
    """Others are put in where some have learnt, as for a second stage."""
    trained(model)
    layers = nn.ModuleDict({"first": model, "more": nn.Linear(8, 8)})
    lora.inject(layers, target_modules=["more"], r=2)
    return layers


def uneven(layer):
    layer.reset_lora_parameters()
    if layer.lora_A.shape[1] == 8:
        nn.init.ones_(layer.lora_B)


def frozen(model):
    for layer in (model.dead, model.other_head):
        layer.requires_grad_(False)
    return model


def loaded(model, path, into=None):
    with pytest.warns(UserWarning, match="others have learnt: dead, other_head"):
        lora.save_adapter(trained(model), path / "trained")
    into = Net() if into is None else into
    lora.load_adapter(into, path / "trained", check_base=False)
    return into


def from_state(model):
    made = adapted()
    made.load_state_dict(model.state_dict())
    return made


def after_backward(model):
    model(torch.arange(4)).square().sum().backward()
    return model


@pytest.mark.parametrize("case", QUIET)
@pytest.mark.parametrize("format", ["lora", "peft"])
def test_nothing_is_said_where_nothing_is_known(case, format, tmp_path):
    assert not warned(QUIET[case](adapted(), tmp_path), tmp_path / "a", format=format)


def test_many_are_counted(tmp_path):
    model = nn.ModuleDict({f"x{n}": nn.Linear(4, 4) for n in range(30)})
    lora.inject(model, target_modules="all-linear", r=2)
    nn.init.ones_(model["x0"].lora_B)
    with pytest.warns(UserWarning, match=re.escape("29 of 30 adapters are as they started")) as caught:
        lora.save_adapter(model, tmp_path / "a")
    assert "x1, x2, x3, x4, x5, x6, x7, x8 and 21 others. " in str(caught[0].message)


def test_a_warning_that_is_an_error_comes_before_the_file(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="save_adapter: 2 of 6"):
            lora.save_adapter(trained(adapted()), tmp_path / "a")
    assert not (tmp_path / "a").exists()
