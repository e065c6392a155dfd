"""Layers that several threads compute with: caches are of what is there now, and each class is made once."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn

import lora
from lora.layers.cache import Cached
from lora.layers.linear import LinearLoRA
from lora.layers.registry import class_for

X = torch.ones(2, 6)


@torch.no_grad()
def served(use_dora=False, merge_weights=False):
    layer = lora.Linear(6, 5, r=2, use_dora=use_dora, merge_weights=merge_weights).eval()
    nn.init.normal_(layer.lora_B)
    return layer


@torch.no_grad()
def anew(layer):
    """What the layer computes without anything that it remembers."""
    layer._merged = layer._norms = layer._squares = None
    return layer(X)


@torch.no_grad()
def write_B(layer):
    layer.lora_B.fill_(0.5)


@torch.no_grad()
def write_weight(layer):
    layer.weight.add_(1)


def write_scaling(layer):
    layer.scaling = 7


CACHES = {
    "merged weight": ("lora_compute_merged", write_B, {"merge_weights": True}),
    "merged weight, by its base": ("lora_compute_merged", write_weight, {"merge_weights": True}),
    "merged weight, by its scaling": (
        "lora_compute_merged",
        write_scaling,
        {"merge_weights": True},
    ),
    "norms": ("lora_norms", write_B, {"use_dora": True}),
    "norms' squares": ("lora_weight_blocks", write_weight, {"use_dora": True}),
    "merged weight with norms": ("lora_compute_merged", write_B, {"use_dora": True, "merge_weights": True}),
}


@pytest.mark.parametrize(("computed_by", "write", "settings"), CACHES.values(), ids=CACHES)
def test_what_changes_while_a_cache_is_computed_makes_it_out_of_date(computed_by, write, settings):
    """As `load_adapter` in another thread does it."""
    layer = served(**settings)
    compute = getattr(layer, computed_by)

    def slow(*args):
        result = compute(*args)
        copied = [part.clone() for part in result] if isinstance(result, list) else result.clone()
        write(layer)
        return copied

    with torch.no_grad():
        vars(layer)[computed_by] = slow
        layer(X)
        del vars(layer)[computed_by]
        assert torch.equal(layer(X), anew(layer))


def test_what_a_thread_kept_of_before_a_change_is_not_served_after_it():
    """It is the last to write the cache, with what it computed first."""
    layer = served(merge_weights=True)
    with torch.no_grad():
        layer(X)
        stale = layer._merged
        layer.lora_B.fill_(0.5)
        layer(X)
        layer._merged = stale
        assert torch.equal(layer(X), anew(layer))


@pytest.mark.parametrize("settings", [{"merge_weights": True}, {"use_dora": True}], ids=["merged", "norms"])
def test_train_in_another_thread_takes_no_cache_from_under_a_forward(monkeypatch, settings):
    layer = served(**settings)
    is_current = Cached.is_current

    def meanwhile(self, *args):
        layer.train().eval()
        layer.double().float()
        return is_current(self, *args)

    with torch.no_grad():
        expected = layer(X)
        monkeypatch.setattr(Cached, "is_current", meanwhile)
        torch.testing.assert_close(layer(X), expected)


def test_threads_that_need_a_class_get_the_same_one():
    both, made = threading.Barrier(2), type.__new__

    class Meta(type):
        def __new__(cls, *args, **kwargs):
            if "generated" in args[2]:
                both.wait(60)  # neither has entered its class yet
            return made(cls, *args, **kwargs)

    class Slow(nn.Linear, metaclass=Meta):
        pass

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: class_for(LinearLoRA, Slow), range(2))
    assert one is other is class_for(LinearLoRA, Slow)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"merge_weights": True}, {"use_dora": True}], ids=["merged", "norms"])
def test_after_a_load_under_serving_threads_every_output_is_the_new_adapters(settings):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    lora.inject(model, target_modules=["0", "1"], r=2, **settings)
    adapters = []
    for _ in range(2):
        with torch.no_grad():
            for layer in model:
                nn.init.normal_(layer.lora_B)
            adapters.append((copy.deepcopy(lora.adapter_of(model)), model.eval()(X)))
    end, errors = time.monotonic() + 6, []

    def serve():
        while time.monotonic() < end:
            try:
                with torch.no_grad():
                    model(X)
            except Exception as error:  # whatever it is
                errors.append(error)
                return

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(serve)
        n = 0
        while time.monotonic() < end:
            adapter, expected = adapters[n % 2]
            lora.load_adapter(model, adapter)
            with torch.no_grad():
                torch.testing.assert_close(model(X), expected)
            model.train().eval()
            n += 1
    assert n > 10
    assert not errors
