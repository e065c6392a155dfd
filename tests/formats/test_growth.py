"""What a conversion writes is a small multiple of what it reads, or refused before it is made."""

import tracemalloc

import pytest
import torch
from torch import nn

import lora

ABOUT = {"r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "use_rslora": False, "scaling": 1.0}


def of_splits(count, size=1, columns=1):
    settings = {**ABOUT, "splits": [size] * count, "enable_lora": [True] * count}
    settings["base"] = {"kind": "linear", "shape": [count * size, columns]}
    return lora.Adapter(
        {"l": settings}, {"l.lora_A": torch.ones(count, columns), "l.lora_B": torch.ones(count * size, 1)}
    )


def of_groups(groups):
    settings = {
        **ABOUT,
        "r": groups,
        "factored": True,
        "base": {"kind": "conv", "shape": [groups, 1, 3], "groups": groups},
    }
    return lora.Adapter({"c": settings}, {"c.lora_A": torch.ones(groups, 1, 3), "c.lora_B": torch.ones(groups, 1, 1)})


def of_kernels(groups):
    base = {"kind": "conv", "shape": [groups, 1, 9, 9], "groups": groups}
    settings = {**ABOUT, "factored": False, "base": base}
    return lora.Adapter({"c": settings}, {"c.lora_A": torch.ones(9, 9 * groups), "c.lora_B": torch.ones(9, 9)})


LARGE = {
    "splits": (of_splits(6000), 36_006_000),
    "groups": (of_groups(3000), 27_003_000),
    "kernels": (of_kernels(40), None),
}


@pytest.mark.parametrize(("adapter", "values"), LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("format", ["peft", "portable"])
def test_what_would_grow_is_refused_before_it_is_made(adapter, values, format, tmp_path):
    tracemalloc.start()
    with pytest.raises(lora.AdapterError, match="more than 64 times as many are not made") as caught:
        lora.write_adapter(adapter, tmp_path / "out", format)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"it would have {values or ''}" in str(caught.value)
    assert peak < 16 * 2**20
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [3, 64])
def test_fused_projections_are_written(count, tmp_path):
    adapter = of_splits(count, 24, 256)
    for format in ("peft", "portable"):
        lora.write_adapter(adapter, tmp_path / format, format)
        model = nn.ModuleDict({"l": nn.Linear(256, 24 * count)})
        lora.load_adapter(model, tmp_path / format)
        assert model["l"].lora_B.shape == (24 * count, count)


def test_one_rank_for_all_may_be_much_larger_than_most(tmp_path):
    layers = [lora.Linear(64, 64, r=r, bias=False) for r in (48, *[1] * 30)]
    lora.save_adapter(nn.Sequential(*layers), tmp_path / "out", format="portable")
    assert {module.r for module in lora.read_adapter(tmp_path / "out").modules.values()} == {48}
