"""What can be counted of a computation: bytes kept for backward, storage made, operations done, calls made."""

import cProfile
import gc
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def kept_for_backward(function: Callable[[], object], *known: Tensor) -> int:
    """Bytes of distinct storages that autograd keeps while `function` runs, those of `known` tensors aside."""
    aside = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result is not None
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in aside)


class Operations(TorchDispatchMode):
    """Counts what reaches the kernels: operations that compute, multiply-adds, and the storages that are made.

    Unlike torch's FlopCounterMode it counts the in-place forms of matrix products as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.flops = 0  # of matrix products and convolutions
        self.made: list[int] = []  # bytes
        self.largest = 0  # elements of the largest storage made
        self._seen: dict[int, Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in self._tensors((args, kwargs)):
            self._seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        output = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in ("detach", "empty", "new_empty"):
            self.names.append(name)
            self.flops += self._flops(name.rstrip("_"), args, output)
        for tensor in self._tensors(output):
            address = tensor.untyped_storage().data_ptr()
            if address not in self._seen:
                self._seen[address] = tensor
                self.made.append(tensor.untyped_storage().nbytes())
                self.largest = max(self.largest, self.made[-1] // tensor.element_size())
        return output

    @staticmethod
    def _flops(name: str, args: tuple, output: object) -> int:
        if name in ("mm", "bmm", "mv", "addmm", "baddbmm", "addmv"):
            left, right = args[1:3] if name.startswith(("add", "badd")) else args[:2]
            return 2 * left.numel() * (right.shape[-1] if right.dim() > 1 else 1)
        if name == "linear":
            return 2 * args[0].numel() * args[1].shape[0]
        return 2 * output.numel() * args[1][0].numel() if name == "convolution" else 0

    @staticmethod
    def _tensors(tree: object) -> list[Tensor]:
        return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def operations(layer: nn.Module, *leading: int, dtype=torch.float32, backward=False) -> Operations:
    """What a layer of 256 inputs does with an input of shape (*leading, 256)."""
    x = torch.randn(*leading, 256, dtype=dtype, requires_grad=True)
    with Operations() as counted:
        y = layer(x)
        if backward:
            y.sum().backward()
    return counted


class Name(str):
    """A string of which every comparison is a call, as one in a list is made, and none in a dict."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return str.__ne__(self, other)

    # Names that are made of names stay such.

    def __add__(self, other: str) -> "Name":
        return Name(str.__add__(self, other))

    def __radd__(self, other: str) -> "Name":
        return Name(str.__add__(other, self))

    def partition(self, *args):
        return tuple(map(Name, super().partition(*args)))

    def rpartition(self, *args):
        return tuple(map(Name, super().rpartition(*args)))

    def removeprefix(self, *args):
        return Name(super().removeprefix(*args))


def calls(function: Callable[[], object]) -> int:
    """How many calls `function` makes, of Python's functions and of C's; a generator counts each time it goes on."""
    profile = cProfile.Profile()
    re.purge()  # what other cases have compiled
    gc.disable()  # callbacks of objects that are gone
    profile.enable()
    try:
        function()
    finally:
        profile.disable()
        gc.enable()
    return sum(entry.callcount for entry in profile.getstats())


def bend(make: Callable[[int], Callable[[], object]], n: int) -> int:
    """How many calls a third n adds beyond what the second n adds: 0 where work grows as n does.

    Where each of n looks at a k-th of all others once, it is 2 n² / k.
    """
    make(2)()  # imports, and what is made once
    one, two, three = (calls(make(times * n)) for times in (1, 2, 3))
    return (three - two) - (two - one)
