"""What can be counted of a computation: bytes kept for backward, storage made, operations done."""

from collections.abc import Callable

import torch
from torch import Tensor
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
    """Counts what reaches the kernels: operations that compute, and bytes of the storages that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: list[int] = []
        self._seen: dict[int, Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in self._tensors((args, kwargs)):
            self._seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        output = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in ("detach", "empty", "new_empty"):
            self.names.append(name)
        for tensor in self._tensors(output):
            address = tensor.untyped_storage().data_ptr()
            if address not in self._seen:
                self._seen[address] = tensor
                self.made.append(tensor.untyped_storage().nbytes())
        return output

    @staticmethod
    def _tensors(tree: object) -> list[Tensor]:
        return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
