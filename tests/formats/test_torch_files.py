"""Files of torch.save: state dicts are read to the bit, everything else is refused and nothing of it runs."""

import io
import os
import pickle
import resource
import struct
import tracemalloc
import warnings
import zipfile

import pytest
import torch
from tensor_files import TENSORS, own_their_memory, refused, same
from torch import nn
from toy_model import Model

from lora.formats.torch_files import read_torch


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def torch_file(path, said, entries=(), compression=zipfile.ZIP_STORED):
    """A zip file as torch lays it out, of any pickle and entries."""
    said = said if isinstance(said, bytes) else pickle.dumps(said, 2)
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in [("file/data.pkl", said), *entries]:
            file.writestr(name, data)


def test_what_torch_saves_is_read_to_the_bit(path):
    torch.save(TENSORS, path)
    tensors = read_torch(path)
    same(tensors, TENSORS)
    assert own_their_memory(tensors)
    torch.save({"z": torch.ones(2, dtype=torch.complex128)}, path)
    same(read_torch(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize("wrapper", [None, "model_state_dict", "state_dict"])
def test_state_dicts_of_models_are_read_in_their_usual_wrappers(path, wrapper):
    model = nn.Sequential(Model(), nn.BatchNorm1d(3)).bfloat16()
    state = model.state_dict()
    torch.save({wrapper: state} if wrapper else state, path)
    same(read_torch(path), dict(state))


def test_parameters_and_views_become_plain_tensors_that_own_their_memory(path):
    base = torch.arange(24.0).view(4, 6)
    said = {
        "parameter": nn.Parameter(torch.ones(2)),
        "part": base[1:3],
        "transposed": torch.randn(3, 2).T,
        "strided": base[::2, 1::3],
        "a reversal of sizes": base.view(2, 2, 6).permute(2, 0, 1),
        "stretched": torch.ones(6)[:1].expand(3),
    }
    torch.save(said, path)
    tensors = read_torch(path)
    same(tensors, {name: t.detach().contiguous() for name, t in said.items()})
    assert own_their_memory(tensors)


def test_tied_tensors_are_one(path):
    tied = nn.Parameter(torch.ones(1000))
    torch.save({str(i): tied for i in range(100)}, path)
    tensors = read_torch(path)
    assert len(tensors) == 100
    assert len({t.data_ptr() for t in tensors.values()}) == 1


class Called:
    """Unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


class Subclass(torch.Tensor):
    pass


def without_end():
    """A tuple that takes a moment to make, and longer than anyone waits to hash or to print."""
    value = (1,)
    for _ in range(60):
        value = (value, value)
    return value


def overlapping(number=1000):
    base = torch.ones(100_000)
    return {str(i): base[i:] for i in range(number)}


def sparse():
    return torch.eye(3).to_sparse()


ELSE = "its data.pkl makes something else than dicts of dense tensors."
REFUSED = {
    "a function": (lambda: {"a": Called(len, ())}, "asks for '__builtin__ len'"),
    "a bytearray": (lambda: {"a": Called(bytearray, 10**11)}, "asks for '__builtin__ bytearray'"),
    "a class": (lambda: nn.Linear(2, 2), "data.pkl"),
    "a tensor alone": (lambda: torch.ones(2), ELSE),
    "a number": (lambda: {"a": torch.ones(1), "step": 3}, "'step' must be a tensor, got 3."),
    "a list": (lambda: [torch.ones(1)], "instruction EMPTY_LIST"),
    "a nested dict": (lambda: {"a": {"b": torch.ones(1)}}, "'a' must be a tensor, got dict."),
    "two wrappers": (lambda: {"state_dict": {"b": torch.ones(1)}, "step": 3}, "'state_dict' must be a tensor"),
    "names of numbers": (lambda: {1: torch.ones(1)}, "its names must be strings, got 1."),
    "sparse": (lambda: {"a": sparse()}, "asks for 'torch._utils _rebuild_sparse_tensor'"),
    "on meta": (lambda: {"a": torch.ones(2, device="meta")}, "_rebuild_meta_tensor_no_storage'"),
    "a subclass": (lambda: {"a": torch.ones(2).as_subclass(Subclass)}, "asks for "),
    "conjugate": (lambda: {"a": torch.ones(2, dtype=torch.complex64).conj()}, ELSE),
    "expanded": (lambda: {"a": torch.ones(1).expand(10**12)}, "the shape '(1000000000000,)' in a storage of 1 values"),
    "expanded twice": (lambda: {"a": torch.ones(3, 1).expand(3, 4)}, "in a storage of 3 values"),
    "overlapping": (overlapping, "its tensors overlap so much"),
    "expanded to nothing": (lambda: {"a": torch.ones(1).expand(2**61)}, "natural numbers"),
}


@pytest.mark.parametrize(("made", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_state_dict_is_refused(path, made, message):
    torch.save(made(), path)
    tracemalloc.start()
    refused(read_torch, path, "is not a torch file", message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_nothing_of_a_stranger_runs(path, tmp_path):
    torch.save({"a": Called(os.mkdir, str(tmp_path / "ran"))}, path)
    refused(read_torch, path, "asks for")
    assert not (tmp_path / "ran").exists()


def test_files_of_old_torch_are_refused_with_what_to_do(path):
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    refused(read_torch, path, "it is no zip file", "write it again with `torch.save(state_dict, path)`")


def described(length=2, dtype="FloatStorage", key="0", offset=0, shape=(2,), stride=(1,)):
    """The pickle of {"a": a tensor}, with whatever is said of it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", getattr(torch, dtype), key, "cpu", length) if value is Ellipsis else None

    out = io.BytesIO()
    Pickler(out, 2).dump({"a": Called(torch._utils._rebuild_tensor_v2, ..., offset, shape, stride, False, None)})
    return out.getvalue()


DESCRIBED = {
    "a storage longer than its entry": ({"length": 3}, "a storage of 3 values of torch.float32 has no entry"),
    "a storage shorter than its entry": ({"length": 1}, "a storage of 1 values of torch.float32 has no entry"),
    "a storage that is not there": ({"key": "1"}, "has no entry of that size"),
    "a storage of another dtype": ({"dtype": "DoubleStorage"}, "has no entry of that size"),
    "a storage elsewhere": ({"key": "../data.pkl"}, "has no entry of that size"),
    "a key without end": ({"key": without_end}, ELSE),
    "a negative length": ({"length": -2}, "a storage of -2 values of torch.float32 has no entry"),
    "an offset too far": ({"offset": 1}, "in a storage of 2 values"),
    "a negative offset": ({"offset": -1}, "natural numbers"),
    "a stride too far": ({"stride": (3,)}, "in a storage of 2 values"),
    "a negative stride": ({"stride": (-1,), "offset": 1}, "natural numbers"),
    "a huge stride": ({"stride": (2**70,)}, "natural numbers"),
    "strides of fewer": ({"stride": ()}, "natural numbers"),
    "a shape of too many": ({"shape": (1,) * 65, "stride": (1,) * 65}, ELSE),
    "a shape of truths": ({"shape": (True,)}, ELSE),
    "a shape without end": ({"shape": without_end}, ELSE),
}


@pytest.mark.parametrize(("said", "message"), DESCRIBED.values(), ids=DESCRIBED)
def test_a_tensor_that_is_described_wrongly_is_refused(path, said, message):
    entry = ("file/data/0", struct.pack("<2f", 1, 2))
    torch_file(path, described(), [entry])
    same(read_torch(path), {"a": torch.tensor([1.0, 2.0])})
    torch_file(path, described(**{key: value() if callable(value) else value for key, value in said.items()}), [entry])
    refused(read_torch, path, "is not a torch file", message)


PICKLES = {
    "nothing": (b"", "is damaged"),
    "no end": (b"}", "is damaged"),
    "an end alone": (b".", ELSE),
    "two values": (b"}}" + b".", ELSE),
    "bytes that are no instruction": (b"\xff" + b".", "is damaged"),
    "a memo of nothing": (b"h\x05" + b".", "is damaged"),
    "a pop of nothing": (b"\x85" + b".", ELSE),
    "a pop beyond a mark": (b"}(\x85" + b".", ELSE),
    "no mark": (b"}t" + b".", ELSE),
    "names and no values": (b"}(X\x01\0\0\0au" + b".", "is damaged"),
    "a name twice": (b"}(X\x01\0\0\0aNX\x01\0\0\0aNu" + b".", "'a' must be a tensor, got None."),
    "a name twice, one by one": (b"}X\x01\0\0\0aNsX\x01\0\0\0aNs" + b".", "'a' must be a tensor, got None."),
    "a call of text": (b"X\x05\0\0\0print)R" + b".", ELSE),
    "a call of a dict": (b"})R" + b".", ELSE),
    "a storage alone": (b"ctorch\nFloatStorage\n" + b".", ELSE),
    "a dict of a dict": (b"ccollections\nOrderedDict\n}\x85R" + b".", ELSE),
    "a name without end": (b"}N" + b"q\0h\0\x86" * 60 + b"Ns.", ELSE),
    "a name that is deep": (b"}N" + b"\x85" * 300_000 + b"Ns.", ELSE),
    "a memo that is huge": (b"}r\xff\xff\xff\xff" + b".", None),
    "a protocol of today": (pickle.dumps({"a": 1}, 4), "which no state dict needs"),
    "an instruction to import": (b"\x8c\x02os\x8c\x06system\x93" + b".", "which no state dict needs"),
    "an instance": (b"(ios\nsystem\n" + b".", "which no state dict needs"),
    "an extension": (b"\x82\x01" + b".", "which no state dict needs"),
    "too many instructions": (b"N" * 4_000_001 + b".", "more than 4000000 instructions"),
    "too many bytes": (b"}" + b"X\0\0\0\x01" + b"a" * 2**24, "its data.pkl may have 16777216 bytes"),
}


@pytest.mark.parametrize(("said", "message"), PICKLES.values(), ids=PICKLES)
def test_a_pickle_that_is_wrong_is_refused(path, said, message):
    torch_file(path, said)
    if message:
        refused(read_torch, path, "is not a torch file", message)
    else:
        assert read_torch(path) == {}


# A pickle of one tensor, its name, and the instructions that make it.
ONE = described()
NAME = ONE[ONE.index(b"X\1\0\0\0a") :][:6]
MADE = ONE[ONE.index(NAME) + 8 : -2]
# Each `torch.load(weights_only=True)` would take, or fail at after it has allocated what is asked for.
ATTACKS = {
    "memory": (b"cbuiltins\nbytearray\n\x8a\6" + (2**42).to_bytes(6, "little") + b"\x85R", "asks for 'builtins byt"),
    "text": (b"c_codecs\nencode\nX\1\0\0\0aX\6\0\0\0latin1\x86R", "asks for '_codecs encode'"),
    "sizes": (b"ctorch\nSize\n(K\1K\2t\x85R", "asks for 'torch Size'"),
    "a counter": (b"ccollections\nCounter\n)R", "asks for 'collections Counter'"),
    "a set": (b"\x8f", "instruction EMPTY_SET"),
    "a new object": (b"ctorch.nn.parameter\nParameter\n)\x81", "asks for 'torch.nn.parameter Parameter'"),
    "a tuple that is deep": (b"N" + b"\x85" * 300_000, ELSE),
    "a parameter of nothing": (b"ctorch._utils\n_rebuild_parameter\nN\x89ccollections\nOrderedDict\n)R\x87R", ELSE),
    "a tensor set anew": (MADE + b"(" + b"K\1" * 3 + b"tb", ELSE),
    "a tensor filled": (MADE + NAME + b"Ns", ELSE),
    "a storage": (MADE[MADE.index(b"((") + 1 : MADE.index(b"Q") + 1], ELSE),
    "dicts in dicts": (b"}" + (NAME + b"}") * 50 + b"s" * 50, ELSE),
    "a dict of pairs": (b"ccollections\nOrderedDict\n((K\1K\2tt\x85R", ELSE),
}


@pytest.mark.parametrize(("value", "message"), ATTACKS.values(), ids=ATTACKS)
def test_what_torch_would_take_is_refused_before_it_costs_anything(path, value, message):
    content = ONE[: ONE.index(NAME)] + NAME + value + b"s."
    torch_file(path, content, [("file/data/0", struct.pack("<2f", 1, 2))])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(read_torch, path, "is not a torch file", message)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


@pytest.mark.parametrize("made", ["meta", "sparse", "quantised", "jagged"])
def test_tensors_that_take_no_bytes_of_a_file_are_refused_at_any_size(path, made):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = {
            "meta": lambda: torch.ones(2**20, 2**20, 2**18, device="meta"),
            "sparse": lambda: torch.sparse_coo_tensor(torch.zeros(1, 1).long(), torch.ones(1), (2**58,)),
            "quantised": lambda: torch.quantize_per_tensor(torch.ones(4), 0.5, 0, torch.qint8),
            "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        }
        torch.save({"a": tensors[made]()}, path)
    refused(read_torch, path, "asks for 'torch._utils _rebuild_")


def test_a_tensor_twice_under_a_name_is_refused(path):
    torch_file(path, ONE[:-1] + NAME + MADE + b"s.", [("file/data/0", struct.pack("<2f", 1, 2))])
    refused(read_torch, path, "it has a name twice")


def test_a_storage_of_two_dtypes_is_refused(path):
    entry = ("file/data/0", struct.pack("<2f", 1, 2))
    other = MADE.replace(b"FloatStorage", b"IntStorage")
    torch_file(path, ONE[:-1] + NAME.replace(b"a", b"b") + other + b"s.", [entry])
    refused(read_torch, path, "its storage '0' is of two dtypes")


def zip_of(path, **options):
    torch_file(path, described(), [("file/data/0", struct.pack("<2f", 1, 2)), *options.pop("entries", [])], **options)
    return path.read_bytes()


def test_compressed_entries_are_refused(path):
    zip_of(path, compression=zipfile.ZIP_DEFLATED)
    refused(read_torch, path, "is compressed or encrypted")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("file/data.pkl", described())
        file.writestr("file/data/0", b"\0" * 10**6, compress_type=zipfile.ZIP_BZIP2)
    refused(read_torch, path, "'file/data/0' is compressed or encrypted")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_that_are_there_twice_are_refused(path):
    zip_of(path, entries=[("file/DATA/0", b"\0" * 4)])  # of which torch would take either
    refused(read_torch, path, "an entry twice")
    zip_of(path, entries=[("file/data/0", b"\0" * 8)])
    refused(read_torch, path, "an entry twice")
    zip_of(path, entries=[("other/data.pkl", described())])
    refused(read_torch, path, "it must have one entry data.pkl, got 2")


def test_an_entry_that_is_called_as_a_storage_is_none(path):
    zip_of(path, entries=[("1", b"\0" * 8)])
    same(read_torch(path), {"a": torch.tensor([1.0, 2.0])})
    torch_file(path, described(length=4), [("file/data/0", b"\0" * 8), ("0", b"\0" * 16)])  # of which one is read
    refused(read_torch, path, "a storage of 4 values of torch.float32 has no entry of that size")


def test_byte_orders(path):
    zip_of(path, entries=[("file/byteorder", b"little")])
    same(read_torch(path), {"a": torch.tensor([1.0, 2.0])})
    for order in (b"big", b"middle", b"little" * 10**6):
        zip_of(path, entries=[("file/byteorder", order)])
        refused(read_torch, path, "its byte order must be little")


def test_entries_that_overlap_are_refused(path):
    content = bytearray(zip_of(path, entries=[("file/data/1", b"\0" * 1000), ("file/data/2", b"\0" * 1000)]))
    for name in (b"file/data/1", b"file/data/2"):  # in the directory
        at = content.rindex(name) - 46
        content[at + 20 : at + 28] = struct.pack("<II", 2000, 2000)
    path.write_bytes(content)
    refused(read_torch, path, "its entries are longer than the file")


@pytest.mark.parametrize(("change", "message"), [("-1", "cut short"), ("-60", "cut short"), ("+", "something follows")])
def test_a_zip_that_ends_elsewhere_is_refused(path, change, message):
    content = zip_of(path)
    path.write_bytes(content + b"\0" if change == "+" else content[: int(change)])
    refused(read_torch, path, message)


def test_a_directory_that_is_long_for_its_own_sake_is_refused(path):
    content = zip_of(path)
    path.write_bytes(content[:-10] + struct.pack("<I", 2**25) + content[-6:])
    refused(read_torch, path, "its zip directory may have 16777216 bytes, and has 33554432")
    torch.save({"a": torch.ones(1)}, path)
    content = path.read_bytes()
    path.write_bytes(content[:-58] + struct.pack("<Q", 2**40) + content[-50:])
    refused(read_torch, path, f"and has {2**40}")


def test_a_flipped_bit_of_a_torch_file_is_found(path):
    values = torch.randn(300)
    torch.save({"a": values}, path)
    content = bytearray(path.read_bytes())
    content[content.index(values.numpy().tobytes()) + 700] ^= 16
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["a"], values)
    refused(read_torch, path, "is damaged", "CRC")


def test_a_flipped_bit_of_an_entry_that_nothing_uses_is_found(path):
    content = bytearray(zip_of(path, entries=[("file/extra", b"unused" * 9)]))
    content[content.index(b"unused" * 9)] ^= 1
    path.write_bytes(content)
    refused(read_torch, path, "is damaged", "CRC")


def test_large_storages_are_read_in_parts(path):
    values = torch.randn(3 * 2**18 + 5)
    torch.save({"a": values}, path)
    same(read_torch(path), {"a": values})
