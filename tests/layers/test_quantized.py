"""LoRA on packed base weights, of kinds that the test registers: a layer that packs, and a tensor that is packed."""

import copy
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from packed import ROWS, R, adapted, assert_dora, assert_equation, assert_merges, kept
from torch import Tensor, nn

import lora
from lora.layers import weights

IN, OUT = 24, 16


class Packed(nn.Linear):
    """A linear layer that keeps its weight as bytes, in the shape of nobody's weight."""

    def __init__(self, inputs=IN, outputs=OUT, dtype=torch.float32):
        super().__init__(inputs, outputs, dtype=dtype)
        self.pack(self.weight.detach())

    def pack(self, weight):
        self.scale = weight.abs().max() / 127
        codes = (weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)  # (out·in, 1)

    def unpack(self):
        return self.weight.reshape(self.out_features, self.in_features).to(self.scale.dtype) * self.scale

    def forward(self, x):
        return F.linear(x, self.unpack(), self.bias)


class Further(Packed):
    """A subclass."""


class Codes(Tensor):
    """A tensor that stands as the weight of nn.Linear and holds bytes and a scale."""

    @staticmethod
    def __new__(cls, codes, scale):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, requires_grad=False)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def dense(self):
        return self.codes.to(self.scale.dtype) * self.scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, about, size, stride):
        return Codes(inner["codes"], inner["scale"])

    def __reduce_ex__(self, protocol):
        return Codes, (self.codes, self.scale)

    def __deepcopy__(self, memo):
        return nn.Parameter(Codes(self.codes.clone(), self.scale.clone()), requires_grad=False)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return F.linear(args[0], args[1].dense(), *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{function} of Codes")


class OtherCodes(Codes):
    """A subclass."""


def codes_of(weight, cls=Codes):
    scale = weight.abs().max() / 127
    return nn.Parameter(cls((weight / scale).round().to(torch.int8), scale), requires_grad=False)


def pack_codes(module, weight):
    module.weight = codes_of(weight)


def with_codes(dtype=torch.float32):
    layer = nn.Linear(IN, OUT, dtype=dtype)
    pack_codes(layer, layer.weight.detach())
    return layer


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(weights, "_PACKINGS", dict(weights._PACKINGS))


@pytest.fixture
def known():
    """Both kinds are registered."""
    lora.register_weight(Packed, Packed.unpack, Packed.pack)
    lora.register_weight(Codes, lambda module: module.weight.dense(), pack_codes)


KINDS = {"layer": Packed, "subclass": Further, "tensor": with_codes}


def dequantised(layer):
    return layer.weight.dense() if isinstance(layer.weight, Codes) else layer.unpack()


# ---- dense weights --------------------------------------------------------------------------------------------------


def test_a_dense_weight_is_read_and_written_itself():
    layer = nn.Linear(3, 2)
    weight, values = layer.weight, torch.randn(2, 3)
    got = weights.read_weight(layer)
    assert got.data_ptr() == weight.data_ptr()
    assert not got.requires_grad
    weights.write_weight(layer, values)
    assert layer.weight is weight
    assert weight.requires_grad
    assert torch.equal(weight, values)
    assert (weights.is_packed(layer), weights.packing_of(layer), weights.why_not_train(layer)) == (
        False,
        None,
        None,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dense_in_any_dtype(dtype):
    layer = nn.Linear(3, 2, dtype=dtype)
    weights.write_weight(layer, torch.full((2, 3), 1.5))
    assert torch.equal(weights.read_weight(layer), torch.full((2, 3), 1.5, dtype=dtype))


# ---- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_reads_and_writes_by_what_was_registered(known, kind):
    layer, values = KINDS[kind](), torch.randn(OUT, IN)
    assert weights.is_packed(layer)
    assert torch.equal(weights.read_weight(layer), dequantised(layer))
    weights.write_weight(layer, values)
    twin = KINDS[kind]()
    (pack_codes if kind == "tensor" else Packed.pack)(twin, values)
    assert torch.equal(weights.read_weight(layer), dequantised(twin))


def test_what_is_there_is_not_packed_again():
    written = []
    lora.register_weight(Packed, Packed.unpack, lambda module, weight: written.append(weight))
    layer = Packed()
    weights.write_weight(layer, weights.read_weight(layer))
    assert written == []
    weights.write_weight(layer, 2 * weights.read_weight(layer))
    assert len(written) == 1


def test_by_name():
    lora.register_weight(f"{Packed.__module__}.Packed", Packed.unpack, Packed.pack)
    lora.register_weight(f"{Codes.__module__}.Codes", lambda module: module.weight.dense(), pack_codes)
    for make in KINDS.values():
        layer = make()
        assert torch.equal(weights.read_weight(layer), dequantised(layer))
        assert torch.equal(weights.read_weight(adapted(layer)), dequantised(layer))


def test_the_nearest_class_counts_and_the_layer_before_its_weight():
    read = {cls: (lambda module, n=n: torch.full((1,), float(n))) for n, cls in enumerate((Packed, Further, Codes))}
    for cls, function in read.items():
        lora.register_weight(cls, function, Packed.pack)
    layer = Further()
    assert weights.read_weight(layer) == 1
    layer.weight = codes_of(torch.randn(OUT, IN), OtherCodes)
    assert weights.read_weight(layer) == 1
    plain = with_codes()
    assert weights.read_weight(plain) == 2
    lora.register_weight(nn.Linear, lambda module: torch.full((1,), 3.0), Packed.pack)
    assert weights.read_weight(plain) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_packings_are_named(kind):
    layer = KINDS[kind]()
    assert weights.is_packed(layer)
    assert weights.packing_of(layer) is None
    name = {
        "layer": "a Packed with a torch.*int8",
        "subclass": "a Further with",
        "tensor": r"a Linear with a .*\.Codes",
    }
    for function in (weights.read_weight, lambda module: weights.write_weight(module, torch.zeros(OUT, IN))):
        with pytest.raises(ValueError, match=rf"{name[kind]}.*packed in a way that is not known.*register_weight"):
            function(layer)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_bytes_are_no_dense_weight(dtype):
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 3).to(dtype), requires_grad=False)
    assert weights.is_packed(layer)
    with pytest.raises(ValueError, match=f"a Linear with a torch.*Parameter of {dtype}.*register_weight"):
        weights.read_weight(layer)


@pytest.mark.parametrize("kind", [nn.Linear(2, 2), int, 3, None, torch.zeros(1)])
def test_what_cannot_be_registered(kind):
    with pytest.raises(TypeError, match=r"`kind` must be a class of nn\.Module or torch\.Tensor"):
        lora.register_weight(kind, Packed.unpack, Packed.pack)


def test_functions_that_are_none():
    with pytest.raises(TypeError, match="`read_weight` must be a function"):
        lora.register_weight(Packed, None, Packed.pack)
    with pytest.raises(TypeError, match="`write_weight` must be a function"):
        lora.register_weight(Packed, Packed.unpack, "pack")
    with pytest.raises(TypeError, match="`why_not_train` must be a function"):
        lora.register_weight(Packed, Packed.unpack, Packed.pack, why_not_train="no")
    assert weights.packing_of(Packed()) is None


def test_a_row_may_be_a_string_which_is_imported_when_such_a_weight_is_met(monkeypatch):
    rows = types.ModuleType("rows_of_a_wing")
    rows.PACKED = weights.Packing(Packed.unpack, Packed.pack)
    monkeypatch.setitem(sys.modules, rows.__name__, rows)
    name = f"{Packed.__module__}.Packed"
    table = weights._PACKINGS
    table[name] = "rows_of_a_wing:PACKED"
    weights.read_weight(nn.Linear(2, 2))
    assert table[name] == "rows_of_a_wing:PACKED"
    layer = adapted(Packed())
    assert table[name] is rows.PACKED
    table[name] = "rows_of_a_wing:PACKED"
    pickle.loads(pickle.dumps(layer))  # compiled as the first thing, it would be too late: no import is traced
    assert table[name] is rows.PACKED


# ---- LoRA on them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_equation(known, kind, dtype):
    layer = KINDS[kind](dtype=dtype) if kind == "tensor" else KINDS[kind](IN, OUT, dtype)
    assert_equation(adapted(layer), dequantised(layer), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_nothing_of_the_weights_size(kind):
    layer = KINDS[kind]()
    x = torch.randn(ROWS, IN, requires_grad=True)
    bare = kept(layer, x)
    assert kept(adapted(layer), x) - bare <= 4 * R * ROWS  # A x


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_the_same_function(known, kind):
    layer = adapted(KINDS[kind]())
    x = torch.randn(3, IN)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(weights.read_weight(twin), weights.read_weight(layer))


@pytest.mark.parametrize("kind", KINDS)
def test_base_weight_and_write_base(known, kind):
    layer, values = adapted(KINDS[kind]()), torch.randn(OUT, IN)
    assert torch.equal(layer.lora_base_weight(), dequantised(layer))
    layer.lora_write_base(values)
    torch.testing.assert_close(layer.lora_base_weight(), values, rtol=0, atol=values.abs().max().item() / 254 * 1.01)
    assert not layer.weight.requires_grad
    assert_equation(layer, dequantised(layer), torch.float32)


def test_what_gives_wrong_gradients_is_refused_with_its_reason():
    def reason(module):
        return "rounds its inputs." if module.in_features == 5 else None

    lora.register_weight(Packed, Packed.unpack, Packed.pack, why_not_train=reason)
    model = nn.Sequential(Packed(5, 5), Packed(5, 4), Packed(4, 3))
    with pytest.raises(ValueError, match=r"0: rounds its inputs\.\n.*1: rounds its inputs\.") as error:
        lora.inject(model, target_modules=["0", "1", "2"], r=2)
    assert "2:" not in str(error.value)
    assert not any(isinstance(module, lora.LoRALayer) for module in model)
    with pytest.raises(ValueError, match="1: rounds its inputs"):  # layers before it would not train right
        lora.inject(model, target_modules=["2"], r=2)
    lora.inject(model[2:], target_modules=["2"], r=2)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_merges_into_a_plain_layer(known, kind, dtype, use_dora):
    layer = KINDS[kind](dtype=dtype)
    W = dequantised(layer)
    assert_merges(adapted(layer, use_dora=use_dora), W)


@pytest.mark.parametrize("kind", KINDS)
def test_dora(known, kind):
    layer = KINDS[kind]()
    W = dequantised(layer)
    assert_dora(adapted(layer, use_dora=True), W)
