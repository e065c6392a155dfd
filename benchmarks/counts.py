"""What can be counted of a computation: bytes kept for backward, new storage, arithmetic; and one without its base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def memory(
    steps: Mapping[str, Callable[[], object]], modules: Mapping[str, nn.Module], x: Tensor
) -> dict[str, dict[str, float]]:
    """Columns of what each module keeps for backward, in sizes of x, and makes in a step, to the frozen one."""
    new = {name: made(step) for name, step in steps.items()}
    return {
        "kept / x": {name: kept(partial(module, x), module) / x.nbytes for name, module in modules.items()},
        "made / frozen": {name: count / new["frozen"] for name, count in new.items()},
    }


def kept(forward: Callable[[], object], module: nn.Module) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward of `forward`, parameters aside."""
    aside = {_address(parameter) for parameter in module.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[_address(tensor)] = tensor  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(tensor.untyped_storage().nbytes() for address, tensor in found.items() if address not in aside)


def made(function: Callable[[], object]) -> int:
    """Bytes of the storages that operations make, whether or not they live on."""
    with _Made() as counted:
        function()
    return counted.bytes


def flops(function: Callable[[], object]) -> int:
    """Floating-point operations of products and convolutions."""
    with _Flops() as counted:
        function()
    return counted.flops


class _Flops(TorchDispatchMode):
    """As torch's FlopCounterMode, and products in place, which that one leaves out."""

    formulas: ClassVar = {**flop_registry, aten.addmm_: flop_registry[aten.addmm]}

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if formula := self.formulas.get(function.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=output)
        return output


class _Made(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._seen: dict[int, Tensor] = {}  # kept alive, so that no address comes twice

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._seen.setdefault(_address(tensor), tensor)
        output = function(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            if _address(tensor) not in self._seen:
                self._seen[_address(tensor)] = tensor
                self.bytes += tensor.untyped_storage().nbytes()
        return output


class WithoutBase(TorchDispatchMode):
    """Within it, a product with one of the `weights` only fills its result with zeros: what is left is LoRA's cost."""

    products: ClassVar = (aten.mm, aten.addmm)

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.addresses = {_address(weight) for weight in weights}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket in self.products and any(_address(factor) in self.addresses for factor in args[-2:]):
            left, right = args[-2:]
            return kwargs["out"].zero_() if "out" in kwargs else left.new_zeros(left.shape[0], right.shape[1])
        return function(*args, **kwargs)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
