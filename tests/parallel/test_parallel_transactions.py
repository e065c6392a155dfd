"""Tensor parallelism: a layer is divided among ranks whole or not at all, wherever Ctrl-C comes."""

from functools import partial

import pytest
from conftest import randomised
from interruptions import ends_of, is_interrupted, lines_of, whole
from test_parallel import mesh
from torch.distributed.tensor.parallel import parallelize_module

import lora
import lora.parallel
from lora.layers import weights

MAKES = {
    "ColwiseParallel": partial(lora.Linear, 6, 4, r=2),
    "RowwiseParallel": partial(lora.Linear, 6, 4, r=2, use_dora=True),
    "MergedColwiseParallel": partial(lora.MergedLinear, 4, 8, r=2, splits=(4, 4), enable_lora=(True, False)),
}


def is_divided_whole(style):
    def divide():
        parallelize_module(layer, ours, getattr(lora.parallel, style)())

    ours, layer = mesh(), randomised(MAKES[style]())
    divide()  # what is imported, or made once, is there now
    layer = randomised(MAKES[style]())
    seen = lines_of(divide)
    layer = randomised(MAKES[style]())
    before = whole(layer)
    undone = 0
    for n in ends_of(seen):  # at the same lines on both ranks: collectives meet
        assert is_interrupted(divide, n)
        if not weights.is_sharded(layer.weight) and whole(layer) == before:
            undone += 1
        else:
            assert layer.lora_local is not None
            assert layer._forward_hooks
            layer = randomised(MAKES[style]())
            before = whole(layer)
    assert undone > len(ends_of(seen)) / 2


@pytest.mark.parametrize("style", MAKES)
def test_ctrl_c_at_any_line_leaves_a_layer_whole_or_divided(ranks, style):
    ranks.run(is_divided_whole, style)
