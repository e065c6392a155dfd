"""ONNX: what torch exports of layers and models, another engine computes as eager torch does."""

import copy

import onnxruntime
import pytest
import torch
from conftest import example, make, plain_twin
from magnitudes import dora, formula, input_of, leaves
from test_export import BATCH_AND_LENGTH, IDS, OTHERS, small

import lora

# The exporter's own, of what it copies.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


def by_onnxruntime(model, x, dynamic_shapes=None):
    """A function of an input: the model, exported, in onnxruntime."""
    with torch.no_grad():
        program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


def assert_same(got, expected):
    tolerance = 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["Linear", "Linear transposed", "MergedLinear", "Embedding", "Conv2d factored"])
def test_a_layer_is_the_same_in_onnx(kind):
    layer, x = make(kind).eval(), example(kind)
    assert_same(by_onnxruntime(layer, x)(x), plain_twin(layer)(x.double() if x.is_floating_point() else x))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["Linear", "Conv2d factored"])
def test_a_layer_with_magnitudes_is_the_same_in_onnx(kind):
    layer, x = dora(kind).eval(), input_of(kind)
    assert_same(by_onnxruntime(layer, x)(x), formula(layer, x, leaves(layer)).detach())


@pytest.mark.slow
def test_a_merged_convolution_is_the_same_in_onnx():
    model, x = torch.nn.Sequential(make("Conv2d")).eval(), example("Conv2d")
    expected = plain_twin(model[0])(x.double())
    lora.merge(model)
    assert_same(by_onnxruntime(model, x)(x), expected)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("how", ["unmerged", "merged"])
def test_a_model_is_the_same_in_onnx_for_any_batch_and_length(how):
    model = small(how, torch.float32)
    run = by_onnxruntime(model, IDS, BATCH_AND_LENGTH)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        for ids in (IDS, OTHERS, OTHERS[:1, :3]):
            assert_same(run(ids), exact(ids))
