"""What kind of tensor this is: whether code that looks past autograd may touch it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary dense floating-point tensors with values, and nothing traces operations on them.

    Not plain are sharded, quantised, nested, sparse and meta tensors and subclasses; and any tensor under
    `torch.compile`, a function transform or forward-mode differentiation.
    """
    for tensor in tensors:  # a loop: with each token that is generated, a generator's overhead would show
        if tensor is not None and not _is_dense(tensor):
            return False
    return not _is_tracing()


def _is_dense(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype.is_floating_point
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_meta)
    )


def _is_tracing() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def needs_plain_backward(dy: Tensor) -> bool:
    """Whether a backward must be differentiable, or takes many output gradients at once (`is_grads_batched`)."""
    return torch.is_grad_enabled() or not is_plain(dy) or not _has_storage(dy)


def _has_storage(tensor: Tensor) -> bool:
    # Batches of `is_grads_batched` look like ordinary tensors and have none.
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which operations compute in the dtype of what they are given."""
    # Entering torch's own costs as much as a small product: only where it changes something.
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def autocasts(device: torch.device) -> bool:
    """Whether operations on this kind of device are being cast automatically."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype; itself, without a call to torch, where it is."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


@torch.enable_grad()
def twin_gradients(
    twin: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    dy: Tensor,
    dtype: torch.dtype | None = None,
) -> list[Tensor | None]:
    """Autograd's gradients of `twin(*inputs)`, cast to `dtype`, for the inputs that need one: differentiable ones."""
    y = twin(*(tensor if tensor is None or dtype is None else cast(tensor, dtype) for tensor in inputs))
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed and tensor is not None]
    gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(gradients) if needed else None for _, needed in zip(inputs, needs, strict=True)]


def is_storage(dtype: torch.dtype) -> bool:
    """Whether numbers are only stored in this dtype, and nothing is trained in it: float8's and float4's kinds."""
    return dtype.is_floating_point and dtype.itemsize < 2


def refuse_storage(dtype: torch.dtype) -> None:
    """TypeError for a weight that is only stored in its dtype, and meets inputs as if it could be computed with."""
    if is_storage(dtype):
        raise TypeError(
            f"the base weight is stored in {dtype}, which nothing is computed in; before each forward the layer must "
            "be cast to the dtype of its input, as hooks for layerwise casting do, or the model once, by `model.to`."
        )


def sparing(fn: Callable[[Tensor], Tensor], spared: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, for `nn.Module._apply`, but `spared` tensors are not cast to dtypes that weights are only stored in.

    Where `fn` would do that, they go to its device alone, and keep their values and their dtype.
    """
    kept = {id(tensor): tensor for tensor in spared if not is_storage(tensor.dtype)}

    def spare(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return tensor.to(new.device) if id(tensor) in kept and is_storage(new.dtype) else new

    return spare


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one to the rounding of the less precise of their dtypes."""
    if a.shape != b.shape or not (is_plain(a) and is_plain(b)):
        return True  # nothing can be said
    eps = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    a, b = a.detach().double(), b.detach().to(a.device).double()
    return bool((a - b).norm() <= 16 * eps * b.norm())


def is_writable(tensor: Tensor) -> bool:
    """Whether values can be copied into a tensor here: not of `torch.inference_mode` outside it, nor expanded."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return True  # others have ways of their own
    expanded = any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return not expanded and (torch.is_inference_mode_enabled() or not tensor.is_inference())


def sample_slice(matrix: Tensor, values: int = 2**17) -> slice:
    """Every so many rows or columns of a matrix: enough for this many values, all of a small one."""
    return slice(None, None, max(1, matrix.numel() // values))
