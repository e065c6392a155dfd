"""What changes in a model that DistributedDataParallel has wrapped: what it does not synchronise is found, no more."""

import copy
import gc
import unittest.mock

import pytest
import torch
import torch.distributed as dist
from test_ddp import ROUNDING, Net, adapted, batches_of, share, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import lora

FIX = "Put LoRA in, unfreeze and cast first, then wrap the model; or wrap its `.module` again now."
LATER = "was put in after the model was wrapped."
EARLIER = "was frozen when the model was wrapped, or has been cast or moved since."


def renew(module, name):
    setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))


def half_frozen():
    model = adapted(freeze_A=True)
    model.blocks[1].lora_B.requires_grad_(False)
    return model


def plain():
    torch.manual_seed(1)
    return Net()


def inject_again(model):
    lora.eject(model)
    lora.inject(model, target_modules=["head"], r=2)


# What happens to a model when it is wrapped already: (model, change, what is not synchronised then).
CHANGES = {
    "LoRA is put in": (
        plain,
        lambda model: lora.inject(model, target_modules=["blocks.1", "head"], r=2),
        {f"{name}: {LATER}" for name in ("blocks.1.lora_A", "blocks.1.lora_B", "head.lora_A", "head.lora_B")},
    ),
    "LoRA is put elsewhere": (
        adapted,
        inject_again,
        {f"head.lora_A: {LATER}", f"head.lora_B: {LATER}"},
    ),
    "A is replaced": (
        adapted,
        lambda model: renew(model.blocks[2], "lora_A"),
        {f"blocks.2.lora_A: {LATER}"},
    ),
    "a magnitude is replaced": (
        lambda: adapted(use_dora=True),
        lambda model: renew(model.embed, "lora_magnitude"),
        {f"embed.lora_magnitude: {LATER}"},
    ),
    "a module that trains in full gets another bias": (
        lambda: adapted(modules_to_save=["head"]),
        lambda model: renew(model.head, "bias"),
        {f"head.bias: {LATER}"},
    ),
    "A and B are unfrozen": (
        half_frozen,
        lora.mark_only_lora_as_trainable,
        {f"{name}: {EARLIER}" for name in (*(f"blocks.{n}.lora_A" for n in range(3)), "blocks.1.lora_B")},
    ),
    "as many are frozen as unfrozen": (
        half_frozen,
        lambda model: (model.blocks[1].lora_A.requires_grad_(True), model.blocks[0].lora_B.requires_grad_(False)),
        {f"blocks.1.lora_A: {EARLIER}"},
    ),
    "a base weight is unfrozen": (
        adapted,
        lambda model: model.blocks[0].weight.requires_grad_(True),
        {f"blocks.0.weight: {EARLIER}"},
    ),
    "biases are unfrozen": (
        adapted,
        lambda model: lora.mark_only_lora_as_trainable(model, bias="all"),
        {f"{name}.bias: {EARLIER}" for name in ("blocks.0", "blocks.1", "blocks.2", "norm", "head")},
    ),
    "the model is cast": (
        lambda: adapted(target_modules=["blocks.0"]),
        lambda model: model.float(),
        {f"blocks.0.lora_A: {EARLIER}", f"blocks.0.lora_B: {EARLIER}"},
    ),
}


def unsynchronised(wrapped, batch):
    """The names of what has a gradient that differs between the ranks, and of what has one that does not."""
    wrapped.zero_grad()
    wrapped(share(batch)).square().mean().backward()
    apart, same = set(), set()
    for name, parameter in wrapped.module.named_parameters():
        if parameter.grad is not None:
            gradients = [torch.zeros_like(parameter) for _ in range(dist.get_world_size())]
            dist.all_gather(gradients, parameter.grad.contiguous())
            (same if all(torch.equal(gradients[0], other) for other in gradients) else apart).add(name)
    return apart, same


def is_found(change, used_before):
    make, apply, expected = CHANGES[change]
    batch = batches_of(1)[0]
    wrapped = DDP(make(), find_unused_parameters=True)
    if used_before:
        train(wrapped, batches_of(2), share)
    apply(wrapped.module)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not synchronise") as caught:
            wrapped(share(batch))
        first, *found, last = str(caught.value).splitlines()
        assert first == "DistributedDataParallel does not synchronise these parameters; each rank would train its own:"
        assert sorted(found) == sorted(f"  - {problem}" for problem in expected)
        assert last == FIX


# What is no LoRA layer's own is looked at when a LoRA layer is called for the first time, or has changed.
WHEN = [(change, False) for change in CHANGES]
WHEN += [(change, True) for change in CHANGES if change != "a module that trains in full gets another bias"]


@pytest.mark.parametrize(("change", "used_before"), WHEN)
def test_what_changes_later_and_is_not_synchronised_is_found_at_the_next_forward(ranks, change, used_before):
    ranks.run(is_found, change, used_before)


def is_really_unsynchronised(change):
    make, apply, expected = CHANGES[change]
    wrapped = DDP(make(), find_unused_parameters=True)
    train(wrapped, batches_of(2), share)
    apply(wrapped.module)
    for module in wrapped.modules():
        if isinstance(module, lora.LoRALayer):
            nn.init.normal_(module.lora_A), nn.init.normal_(module.lora_B)
    with unittest.mock.patch.object(lora.LoRALayer, "lora_checks", ()):
        apart, _ = unsynchronised(wrapped, batches_of(1)[0])
    assert apart == {problem.partition(":")[0] for problem in expected}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_found_is_what_has_other_gradients_in_each_rank(ranks, change):
    ranks.run(is_really_unsynchronised, change)


def wrapping_again_mends(change):
    make, apply, _ = CHANGES[change]
    wrapped = DDP(make())
    apply(wrapped.module)
    with pytest.raises(RuntimeError, match="does not synchronise"):
        wrapped(share(batches_of(1)[0]))
    wrapped = DDP(wrapped.module)
    alone, batches = copy.deepcopy(wrapped.module), batches_of(3)
    expected, got = train(alone, batches, lambda batch: batch), train(wrapped, batches, share)
    bounds = ROUNDING if change != "the model is cast" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got, expected, **bounds)


@pytest.mark.parametrize("change", CHANGES)
def test_wrapping_again_mends_it(ranks, change):
    ranks.run(wrapping_again_mends, change)


def another_wrapper_is_asked_anew():
    model = adapted()
    first = DDP(model)
    first(share(batches_of(1)[0]))
    model.blocks[0].lora_A.requires_grad_(False)
    second = DDP(model)
    model.blocks[0].lora_A.requires_grad_(True)  # as it was when the first wrapper was asked
    first(share(batches_of(1)[0]))
    del first
    gc.collect()
    with pytest.raises(RuntimeError, match=r"its own:\n  - blocks\.0\.lora_A: was frozen when .*\nPut"):
        second(share(batches_of(1)[0]))


def test_what_one_wrapper_synchronises_another_may_not(ranks):
    ranks.run(another_wrapper_is_asked_anew)


# ---- refused at once --------------------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part


WRAPS = {"": lambda m: m, "part": Holder, "_orig_mod": lambda m: torch.compile(m, backend="eager")}


def refuses_wrapped_models(folder):
    path = f"{folder}/adapter{dist.get_rank()}.safetensors"
    lora.save_adapter(adapted(), path)
    for name, around in WRAPS.items():
        model = around(DDP(plain()))
        before = {key: (id(p), p.requires_grad) for key, p in model.named_parameters()}
        said = (
            f"  - {name or 'the model'} is wrapped in DistributedDataParallel, which does not synchronise parameters "
            "that are put in later; give its `.module` LoRA first, then wrap it."
        )
        with pytest.raises(ValueError, match="inject: nothing was changed") as caught:
            lora.inject(model, target_modules=["head", "blocks.1"], r=2)
        assert str(caught.value).splitlines()[1:] == [said]
        if name != "part":
            with pytest.raises(lora.AdapterError, match="is not loaded") as caught:
                lora.load_adapter(model, path)
            assert str(caught.value).splitlines()[1:] == [said]
        assert {key: (id(p), p.requires_grad) for key, p in model.named_parameters()} == before
        assert not any(isinstance(module, lora.LoRALayer) for module in model.modules())


def test_a_wrapped_model_is_given_no_lora(ranks, tmp_path):
    ranks.run(refuses_wrapped_models, str(tmp_path))
