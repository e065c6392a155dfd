"""What combine, scale and resize refuse: one error lists everything."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from dense import adapter_of, assert_unchanged, content, dense

import lora
from lora.arithmetic import combine, extract, resize, scale, subtract


def refuses(call, *messages, error=lora.AdapterError):
    with pytest.raises(error) as caught:
        call()
    for message in messages:
        assert message in str(caught.value)
    return str(caught.value)


ARGUMENTS = {
    "no adapter": ([], {}, "there must be at least one adapter."),
    "no pair": (["adapter"], {}, "pairs of a lora.Adapter and a finite number, got 'adapter' at 0."),
    "no weight": ([(1, 1)], {}, "pairs of a lora.Adapter and a finite number, got (1, 1) at 0."),
    "no method": ([], {"method": "sum"}, "must be one of 'cat', 'svd', 'linear', 'ties', 'dare', got 'sum'."),
    "a rank for cat": ([], {"r": 2}, "`r` is for the methods 'svd', 'ties', 'dare'; 'cat' takes none."),
    "no rank": ([], {"method": "svd", "r": 0}, "`r` must be an integer of at least 1, got 0."),
    "half a rank": ([], {"method": "svd", "r": 1.5}, "`r` must be an integer of at least 1, got 1.5."),
    "no density": ([], {"density": 0}, "`density` must be above 0 and at most 1, got 0."),
    "high density": ([], {"density": 1.1}, "`density` must be above 0 and at most 1, got 1.1."),
}


@pytest.mark.parametrize(("adapters", "options", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(adapters, options, message):
    refuses(lambda: combine(adapters, **options), message, error=ValueError)


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1", None, True])
def test_weights_that_are_no_finite_numbers(weight):
    adapter = adapter_of("Linear")
    refuses(lambda: combine([(adapter, 1), (adapter, weight)]), "at 1.", error=ValueError)
    refuses(lambda: scale(adapter, weight), "`factor` must be a finite number", error=ValueError)


def test_unsound_adapters_and_what_trained_in_full_are_listed_all():
    broken, trained = adapter_of("Linear"), adapter_of("Linear")
    broken.tensors["0.lora_A"].data[0, 0] = math.nan
    del broken.tensors["0.lora_B"]
    trained.tensors["norm.weight"] = torch.ones(2)
    trained.trained_in_full.append("norm.weight")
    messages = (
        "adapter 0: 0.lora_B is missing.",
        "adapter 0: 0.lora_A holds NaN",
        "adapter 1: norm.weight trained in full, and is not an update.",
    )
    refuses(lambda: combine([(broken, 1), (trained, 1)]), "combine: nothing was computed, because", *messages)
    refuses(lambda: subtract(broken, trained), *messages)
    refuses(
        lambda: scale(trained, 2), "scale: nothing was computed", "- norm.weight trained in full, and is not an update."
    )
    refuses(lambda: resize(broken, 1), "resize: nothing was computed", "- 0.lora_B is missing.", "0.lora_A holds NaN")


def with_base(adapter, **facts):
    module = adapter.modules["0"]
    adapter.modules["0"] = dataclasses.replace(module, base=dataclasses.replace(module.base, **facts))
    return adapter


def test_other_base_weights_are_listed_by_module():
    one, two = adapter_of("Linear"), adapter_of("Linear", in_features=4)
    third = with_base(adapter_of("Linear"), sample=[0.6] * 16)
    message = refuses(
        lambda: combine([(one, 1), (two, 1), (third, 1)]),
        "0: the base weights of adapters 0 and 1 are not the same: `shape` is (5, 6) and (5, 4).",
        "0: the base weights of adapters 0 and 2 are not the same: sampled values differ by 17 %; `check_base=False`",
    )
    assert message.count("\n") == 2
    message = refuses(lambda: combine([(one, 1), (two, 1), (third, 1)], check_base=False), "`shape` is (5, 6)")
    assert message.count("\n") == 1
    np.testing.assert_allclose(dense(combine([(one, 1), (third, 1)], check_base=False)), dense(one) + dense(third))
    np.testing.assert_allclose(dense(subtract(one, third, check_base=False)), dense(one) - dense(third))
    refuses(lambda: subtract(one, third), "sampled values differ")


def test_samples_of_other_sizes():
    one, two = adapter_of("Linear"), with_base(adapter_of("Linear"), sample=[0.5] * 15)
    refuses(lambda: combine([(one, 1), (two, 1)]), "sampled values differ by inf %")
    huge = with_base(adapter_of("Linear"), sample=[1e308] * 16)
    refuses(lambda: combine([(huge, 1), (with_base(two, sample=[-1e308] * 16), 1)]), "sampled values differ")


def test_a_base_in_another_dtype_is_the_same_base():
    one, two = adapter_of("Linear"), with_base(adapter_of("Linear"), sample=[0.5005] * 16, dtype="bfloat16")
    assert combine([(one, 1), (two, 1)]).modules["0"]["base"] == one.modules["0"]["base"]


@pytest.mark.parametrize(
    ("kind", "facts", "message"),
    [
        ("Embedding", {}, "`kind` is 'linear' and 'embedding'."),
        ("Linear", {"fan_in_fan_out": True, "shape": [6, 5]}, "`fan_in_fan_out` is False and True."),
    ],
)
def test_other_kinds_of_base_weights_whatever_check_base_says(kind, facts, message):
    one, two = adapter_of("Linear"), with_base(adapter_of(kind), **facts)
    refuses(lambda: combine([(one, 1), (two, 1)], check_base=False), message)


def test_groups_of_a_convolution():
    one, two = adapter_of("Conv2d factored"), adapter_of("Conv2d factored", groups=1)
    refuses(lambda: combine([(one, 1), (two, 1)]), "`groups` is 2 and 1.")


def test_shapes_that_only_the_tensors_say():
    one, two = (with_base(adapter_of("Linear", in_features=n), shape=None, sample=None) for n in (6, 4))
    refuses(lambda: combine([(one, 1), (two, 1)]), "0: lora_A and lora_B must be for one base weight", "(2, 4)")


def test_ranks_that_do_not_fit():
    one, two = adapter_of("Conv2d factored", 2), adapter_of("Conv2d factored", 4)
    refuses(
        lambda: combine([(one, 1), (two, 1)], "linear"), "all ranks must be equal for the method 'linear', got 2, 4"
    )
    for call in (lambda: combine([(one, 1)], "svd", r=3), lambda: resize(one, 3)):
        refuses(call, "0: `r` (=3) must be divisible by `groups` (=2)")


def test_a_users_kind_is_known_by_its_model_only():
    one = with_base(adapter_of("Linear"), kind="Heads")
    both = [(one, 1), (one, 1)]
    for call in (lambda: combine(both), lambda: resize(one, 1)):
        refuses(call, "0: is of the kind Heads, which only its model knows.")
    assert scale(one, 2).modules["0"]["scaling"] == 2 * one.modules["0"]["scaling"]


def test_a_result_too_large_for_its_dtype():
    adapter = adapter_of("Linear", dtype=torch.float16)
    before = content(adapter)
    refuses(lambda: combine([(adapter, 1e6)]), "0.lora_B holds NaN or infinity.")
    refuses(lambda: scale(adapter_of("Linear", scaling=1e30), 1e30), "0: `scaling` must be a finite number")
    assert_unchanged(adapter, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either `r` or `energy` must be given, got None and None."),
        ({"r": 1, "energy": 0.5}, "either `r` or `energy` must be given, got 1 and 0.5."),
        ({"r": 0}, "`r` must be an integer of at least 1, got 0."),
        ({"r": True}, "`r` must be an integer of at least 1, got True."),
        ({"energy": 0}, "`energy` must be above 0 and at most 1, got 0."),
        ({"energy": 1.5}, "`energy` must be above 0 and at most 1, got 1.5."),
        ({"energy": math.nan}, "`energy` must be above 0 and at most 1, got nan."),
    ],
)
def test_ranks_out_of_range(options, message):
    refuses(lambda: resize(adapter_of("Linear"), **options), message, error=ValueError)
    refuses(lambda: extract(nn.Linear(2, 2), nn.Linear(2, 2), **options), message, error=ValueError)
