"""Whatever is in a file: it is read right, to the bit, or refused with one AdapterError, and the model is as it was."""

import copy
import json
import struct
import zipfile

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import Model, content, snapshot

import lora
from lora.adapters import files, saving
from lora.formats.torch_files import read_torch

MANY = settings(max_examples=300)
READERS = {"safetensors": files.read_tensors, "torch": read_torch, "lora": lora.read_adapter}
PAIRS = {
    f"base_model.model.layers.{i}.q_proj.lora_{part}.weight": torch.randn(shape)
    for i in range(2)
    for part, shape in [("A", (2, 8)), ("B", (8, 2))]
}


def bits(tensors):
    return {name: content(tensor) for name, tensor in tensors.items()}


def error_of(call):
    """The AdapterError of a call, if any; another exception is none that a file may cause."""
    found = None
    try:
        call()
    except lora.AdapterError as error:
        found = error
    assert len(str(found)) < 20_000
    return found


# ---- files of nothing in particular ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file"


EMPTY = struct.pack("<Q", 2) + b"{}"
STARTS = [b"", b"PK\3\4", b"PK\5\6" + b"\0" * 18, b"\x80\x02}", EMPTY, struct.pack("<Q", 8) + b'{"a":{}}']


@MANY
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=200), read=st.sampled_from(sorted(READERS)))
def test_bytes_of_any_kind_are_refused(path, start, rest, read):
    path.write_bytes(start + rest)
    if (read, start + rest) != ("safetensors", EMPTY):
        assert error_of(lambda: READERS[read](path))


SOMETIMES_WRONG = st.one_of(st.integers(-2, 2**65), st.none(), st.booleans(), st.floats(), st.text(max_size=3))
NATURALS = st.integers(0, 6)
SHAPES = st.lists(NATURALS, max_size=3) | st.lists(SOMETIMES_WRONG, max_size=3) | SOMETIMES_WRONG
NAMES = st.sampled_from(["a", "b", "c.d"]) | st.text(max_size=4)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "I64", "BOOL", "F8_E4M3", "F4", "f32"]) | SOMETIMES_WRONG,
        "shape": SHAPES,
        "data_offsets": st.tuples(NATURALS, st.integers(0, 40)) | SHAPES,
    },
    optional={"more": st.none()},
)
METADATA = st.dictionaries(st.text(max_size=3), st.text(max_size=3) | SOMETIMES_WRONG, max_size=2)
JSON = st.recursive(SOMETIMES_WRONG, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=8)


@MANY
@given(entries=st.dictionaries(NAMES, ENTRIES | JSON, max_size=3), metadata=st.none() | METADATA | JSON, size=NATURALS)
def test_headers_of_any_kind_are_refused_or_read_as_safetensors_reads_them(path, entries, metadata, size):
    said = {**entries, "__metadata__": metadata} if metadata is not None else entries
    header = json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\1" * size)
    _as_safetensors_reads(path)


@MANY
@given(sizes=st.lists(st.tuples(st.sampled_from(["U8", "BOOL", "F16"]), NATURALS), max_size=4), off=st.integers(-1, 1))
def test_headers_that_are_nearly_right(path, sizes, off):
    entries, stop = {}, 0
    for i, (dtype, size) in enumerate(sizes):
        start, stop = stop, stop + size * (2 if dtype == "F16" else 1)
        entries[f"x{i}"] = {"dtype": dtype, "shape": [size], "data_offsets": [start, stop]}
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\1" * max(stop + off, 0))
    assert _as_safetensors_reads(path) == (off == 0 or stop + off < 0)


def _as_safetensors_reads(path):
    got = []
    if error_of(lambda: got.append(files.read_tensors(path))):
        return False
    ((tensors, metadata),) = got
    assert bits(tensors) == bits(safetensors.torch.load_file(path))
    with safetensors.safe_open(path, framework="pt") as file:
        assert metadata == (file.metadata() or {})
    return True


# ---- damaged files ---------------------------------------------------------------------------------------------


def _flip(draw, content):
    for bit in draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=3, unique=True)):
        content[bit // 8] ^= 1 << bit % 8


def _overwrite(draw, content):
    at = draw(st.integers(0, len(content) - 1))
    new = draw(st.binary(min_size=1, max_size=8))
    content[at : at + len(new)] = new


def _cut(draw, content):
    start = draw(st.integers(0, len(content) - 1))
    del content[start : draw(st.sampled_from([start + 1, start + 8, len(content)]))]


def _insert(draw, content):
    at = draw(st.integers(0, len(content)) | st.just(len(content)))
    content[at:at] = draw(st.binary(min_size=1, max_size=8))


def _exchange(draw, content):
    size = draw(st.integers(1, 64))
    a, b = (draw(st.integers(0, len(content) - size)) for _ in range(2))
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]


DAMAGE = st.sampled_from([_flip, _overwrite, _cut, _insert, _exchange])

HUGE = [2**31, 2**40, 2**63, 2**64, 10**30, -1]


def _offsets_of_another(draw, header, name, other):
    header[name]["data_offsets"], header[other]["data_offsets"] = (
        header[other]["data_offsets"],
        header[name]["data_offsets"],
    )


def _name_of_another(draw, header, name, other):
    header[name], header[other] = header[other], header[name]


def _dtype(draw, header, name, other):
    header[name]["dtype"] = draw(st.sampled_from(["I32", "U32", "F16", "BF16", "F64", "BOOL"]))


def _shape(draw, header, name, other):
    header[name]["shape"] = draw(
        st.sampled_from([header[name]["shape"][::-1], [16], [4, 4], [1, 16], [], [16, 1, 1]])
        | st.lists(st.sampled_from([0, 1, 2, 8, *HUGE]), max_size=4)
    )


def _offset(draw, header, name, other):
    header[name]["data_offsets"][draw(st.sampled_from([0, 1]))] += draw(st.sampled_from([1, -1, 64, -64, *HUGE]))


def _without(draw, header, name, other):
    del header[name]


def _nested(draw, header, name, other):
    header[name] = json.loads("[" * 500 + "]" * 500)


EDITS = st.sampled_from([_offsets_of_another, _name_of_another, _dtype, _shape, _offset, _without, _nested])


def edited(draw, content):
    """A safetensors file whose header says something else of the same data."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name, other = draw(st.permutations(names))[:2]
    draw(EDITS)(draw, header, name, other)
    text = json.dumps(header)
    if draw(st.booleans()):
        text = text[:-1] + f', "{name}": ' + json.dumps(header.get(name)) + "}"  # a name twice
    return struct.pack("<Q", len(text)) + text.encode() + content[8 + length :]


@st.composite
def damaged(draw, content, editable=True):
    if editable and draw(st.booleans()):
        return edited(draw, content)
    changed = bytearray(content)
    draw(DAMAGE)(draw, changed)
    return bytes(changed)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A base model, and the content and tensors of an adapter file for it."""
    torch.manual_seed(0)
    base, file = Model(), tmp_path_factory.mktemp("native") / "adapter.safetensors"
    model = copy.deepcopy(base)
    lora.inject(model, target_modules=["q_proj"], r=2, modules_to_save=["layers.0.norm"])
    lora.save_adapter(model, file)
    return base, file.read_bytes(), bits(safetensors.torch.load_file(file))


def _loads_right_or_not_at_all(native, path, content):
    base, _, expected = native
    path.write_bytes(content)
    model = copy.deepcopy(base)
    before = snapshot(model)
    if error_of(lambda: lora.load_adapter(model, path)):
        assert snapshot(model) == before
        return
    state = bits(model.state_dict())
    assert {name: state[name] for name in expected} == expected


@MANY
@given(data=st.data())
def test_a_damaged_file_of_loras_is_refused_or_read_right(native, path, data):
    _loads_right_or_not_at_all(native, path, data.draw(damaged(native[1])))


@MANY
@given(data=st.data())
def test_any_flipped_bit_of_a_file_of_loras_is_found(native, path, data):
    base, whole, _ = native
    content = bytearray(whole)
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    model = copy.deepcopy(base)
    before = snapshot(model)
    assert error_of(lambda: lora.load_adapter(model, path)), f"bit {bit} may be flipped"
    assert snapshot(model) == before


def test_every_flipped_bit_of_a_small_file_is_found(path):
    saving.write_tensors(path, {"a": torch.tensor([1.0]), "b": torch.ones(2, 1)}, {"x": "y"})
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        got = []
        error = error_of(lambda got=got: got.append(files.read_tensors(path)[0]))
        in_key_of_checksum = b"sha256" not in content
        assert error or in_key_of_checksum, f"bit {bit} may be flipped"


@MANY
@given(data=st.data())
def test_a_damaged_file_of_others_is_refused_or_read_as_safetensors_reads_it(path, data):
    content = safetensors.torch.save(PAIRS, {"format": "pt"})
    path.write_bytes(data.draw(damaged(content)))
    _as_safetensors_reads(path)


@MANY
@given(data=st.data(), wrapped=st.booleans())
def test_a_damaged_file_of_torchs_is_refused_or_read_right(path, data, wrapped):
    tensors = {**PAIRS, "half": torch.ones(3, dtype=torch.half), "part": torch.arange(10)[2:7:2]}
    torch.save({"state_dict": tensors} if wrapped else tensors, path)
    path.write_bytes(data.draw(damaged(path.read_bytes(), editable=False)))
    got = []
    if not error_of(lambda: got.append(read_torch(path))):
        assert bits(got[0]) == bits(tensors)


CODES = b"\x80}()NIKMJQRbcdehijlopqrstux\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x93\x94."
WORDS = [b"X\1\0\0\0a", b"X\7\0\0\0storage", b"X\1\0\0\x000", b"K\2", b"K\1\x85", b"ctorch\nFloatStorage\n"]
WORDS += [
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"q\0",
    b"h\0",
]


@MANY
@given(said=st.lists(st.sampled_from(WORDS + [bytes([code]) for code in CODES]), max_size=25).map(b"".join))
def test_instructions_in_any_order_make_a_state_dict_or_are_refused(path, said):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", b"\x80\2}" + said + b".")
        file.writestr("x/data/0", b"\0" * 8)
    got = []
    if not error_of(lambda: got.append(read_torch(path))):
        assert all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in got[0].items())
