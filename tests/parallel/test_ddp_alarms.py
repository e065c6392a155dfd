"""Changes in a wrapped model that are no mistake raise nothing; and looking for mistakes costs next to nothing."""

import copy
import pickle
import unittest.mock
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from test_ddp import adapted, batches_of, share, train
from test_ddp_changes import plain, renew, unsynchronised
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel as DDP

import lora

# ---- no false alarms --------------------------------------------------------------------------------------------


def trains_on(wrapped, without=()):
    """It trains, and the ranks agree but for these."""
    apart, same = unsynchronised(wrapped, batches_of(1)[0])
    assert apart == set(without)
    assert same


def frozen_later():
    wrapped = DDP(adapted(), find_unused_parameters=True)
    wrapped.module.blocks[0].lora_A.requires_grad_(False)
    trains_on(wrapped)
    wrapped.module.blocks[0].lora_A.requires_grad_(True)  # its gradient is hooked still
    trains_on(wrapped)


def ignored():
    model = adapted()
    DDP._set_params_and_buffers_to_ignore_for_model(model, ["blocks.0.lora_A", "blocks.1.lora_B"])
    wrapped = DDP(model)
    trains_on(wrapped, ["blocks.0.lora_A", "blocks.1.lora_B"])
    renew(model.blocks[0], "lora_A")
    trains_on(wrapped, ["blocks.0.lora_A", "blocks.1.lora_B"])


def delayed():
    model = adapted().float()  # torch's buffer for it is
    named = [(f"blocks.0.{name}", getattr(model.blocks[0], name)) for name in ("lora_A", "lora_B")]
    wrapped = DDP(model, delay_all_reduce_named_params=named, param_to_hook_all_reduce=model.embed.lora_A)
    wrapped(share(batches_of(1)[0])).square().mean().backward()


def tied():
    model = adapted()
    model.blocks[1].lora_A = model.blocks[0].lora_A
    model.blocks[2].weight, model.blocks[2].lora_B = model.blocks[1].weight, model.blocks[1].lora_B
    trains_on(DDP(model))


class Pair(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids):
        return self.first(ids) + self.second(ids)


def nested():
    model = Pair(DDP(adapted()), adapted())
    inner = [f"first.{name}" for name, _ in model.first.named_parameters()]
    DDP._set_params_and_buffers_to_ignore_for_model(model, inner)
    wrapped = DDP(model)
    for _ in range(2):
        trains_on(wrapped)
    renew(model.first.module.blocks[0], "lora_A")
    with pytest.raises(RuntimeError, match=r"train its own:\n  - blocks\.0\.lora_A: was put in after .*\nPut"):
        wrapped(share(batches_of(1)[0]))


def others_called():
    """A wrapped model calls models that it does not hold: a frozen one, and one with a wrapper of its own."""
    ids, others = batches_of(1)[0], [adapted().requires_grad_(False), DDP(adapted())]
    trains_on(DDP(adapted(lambda block, x: block(x) + sum(other(ids).mean() for other in others))))


def uneven():
    wrapped = DDP(adapted())
    with wrapped.join():
        for batch in batches_of(2 + dist.get_rank()):
            wrapped(share(batch)).square().mean().backward()


def not_trained():
    """Forwards of a model that the wrapper does not know, where nothing is trained."""
    wrapped = DDP(plain())
    lora.inject(wrapped.module, target_modules=["head"], r=2)
    ids = batches_of(1)[0]
    with torch.no_grad():
        wrapped.eval()(ids)
    with torch.inference_mode():
        wrapped.train()(ids)
    with torch.no_grad(), lora.disabled(wrapped):
        wrapped(ids)
    wrapped.module(ids).sum().backward()  # not the wrapper's
    with pytest.raises(RuntimeError, match="does not synchronise"):
        wrapped.eval()(ids)  # with gradients


def served_merged():
    layer = lora.Linear(6, 4, r=2, merge_weights=True)
    wrapped = DDP(layer)
    renew(layer, "lora_A")
    with torch.no_grad():
        wrapped.eval()(torch.ones(6))


class Fast(nn.Module):
    """A step of gradient descent within the forward, by other tensors in the parameters' places."""

    def __init__(self):
        super().__init__()
        self.net = adapted()

    def forward(self, ids):
        slow = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        fast = {name: p.detach().clone().requires_grad_() for name, p in slow.items()}
        y = torch.func.functional_call(self.net, fast, (ids,)).sum()
        gradients = torch.autograd.grad(y, list(fast.values()))
        moved = {name: p - 0.1 * g for (name, p), g in zip(slow.items(), gradients, strict=True)}
        return torch.func.functional_call(self.net, moved, (ids,))


def functional():
    trains_on(DDP(Fast()))


def copied():
    wrapped = DDP(adapted())
    for _ in range(2):
        trains_on(wrapped)
    trains_on(copy.deepcopy(wrapped))
    other = pickle.loads(pickle.dumps(wrapped))
    trains_on(other)
    renew(other.module.blocks[0], "lora_B")
    trains_on(wrapped)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.lora_B: was put in after"):
        other(share(batches_of(1)[0]))


def loaded_and_moved():
    wrapped = DDP(adapted())
    trains_on(wrapped)
    wrapped.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    lora.load_adapter(wrapped, lora.adapter_of(adapted()))
    wrapped.to(torch.float64).cpu()
    trains_on(wrapped)


FINE = [
    frozen_later,
    ignored,
    delayed,
    tied,
    nested,
    others_called,
    uneven,
    not_trained,
    served_merged,
    functional,
    copied,
    loaded_and_moved,
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("scene", FINE, ids=lambda scene: scene.__name__)
def test_there_is_no_false_alarm(ranks, scene):
    ranks.run(scene)


def a_hidden_layer_is_found():
    model = adapted()
    hidden = lora.Linear(6, 6, r=2, dtype=torch.float64)
    model.how = lambda block, x: hidden(block(x))
    wrapped = DDP(model)
    with pytest.raises(RuntimeError) as caught:
        wrapped(share(batches_of(1)[0]))
    said = "of a Linear that the wrapped model calls, and does not hold as a module."
    assert [line for line in str(caught.value).splitlines() if "hold" in line] == [
        f"  - {name} {said}" for name in ("bias", "lora_A", "lora_B")
    ]


def test_a_layer_that_the_wrapped_model_does_not_hold_is_found(ranks):
    ranks.run(a_hidden_layer_is_found)


# ---- what it costs ----------------------------------------------------------------------------------------------


def looks(count, change):
    wrapped = DDP(adapted())
    with unittest.mock.patch("lora.parallel.ddp._unsynchronised", wraps=lora.parallel.ddp._unsynchronised) as looked:
        train(wrapped, batches_of(count), share)
        change(wrapped)
        train(wrapped, batches_of(count), share)
        return looked.call_count


def nothing(wrapped):
    pass


def casts(wrapped):
    wrapped.double()


@pytest.mark.parametrize(("change", "expected"), [(nothing, 1), (casts, 2)])
def test_the_model_is_looked_through_once_for_each_change(ranks, change, expected):
    assert ranks.run(looks, 3, change) == [expected] * 2


def compiled_graphs(order, checks):
    torch._dynamo.reset()
    counter = CompileCounter()
    off = unittest.mock.patch.object(lora.LoRALayer, "lora_checks", ())
    with nullcontext() if checks else off:
        model = adapted()
        whole = order == "inner"
        if whole:
            wrapped = DDP(torch.compile(model, backend=counter, fullgraph=True))
        else:
            wrapped = torch.compile(DDP(model), backend=counter)
        for batch in batches_of(3):
            wrapped(share(batch)).square().mean().backward()
        if whole:
            for batch in batches_of(2):  # outside of the wrapper
                wrapped.module(share(batch)).square().mean().backward()
    torch._dynamo.reset()
    return counter.frame_count, counter.op_count


@pytest.mark.sampled(1)
@pytest.mark.parametrize("order", ["inner", "outer"])
def test_a_compiler_sees_nothing_of_it(ranks, order):
    expected, got = ranks.run(compiled_graphs, order, False), ranks.run(compiled_graphs, order, True)
    assert got == expected
    assert order == "outer" or {frames for frames, _ in got} == {1}
