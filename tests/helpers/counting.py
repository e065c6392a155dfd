"""What can be counted of a computation: bytes kept for backward, storage made, operations done."""

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
