"""Room for other adapters in a model: any of them, of whatever rank, without compiling again.

    y = W₀ x + b + where(on, s · B A drop(x), 0)        with DoRA also g − 1 = where(on, g − 1, 0)

To `torch.compile` a number is a constant, and what it makes holds for one scaling, and for layers that are enabled. A
tensor is an input. So a layer that is prepared has its scaling, and whether it is enabled, in a tensor as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lora.errors import raise_all
from lora.functional.fused import exact_dtype
from lora.layers.layer import LoRALayer
from lora.layers.registry import class_for
from lora.layers.settings import alpha_of
from lora.layers.undo import undo_on_error
from lora.models.blocks import at_block_rank, block_rank, factor_blocks, layer_rank
from lora.models.model import lora_layers, names_of, sharded_problems

_TENSORS = _SCALE, _OFF = "lora_scale", "lora_scale_off"


class Padded(LoRALayer):
    """In front of a layer's class: the layer has room for adapters of up to its rank.

    Attributes:
        padded_from: rank and `lora_alpha` of the adapter that is in the layer.
    """

    lora_base_class = LoRALayer

    padded_from: tuple[int, float]

    def lora_ranks(self) -> Sequence[int]:
        return range(self.r, 0, -1)

    def lora_padded(self, r: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        fits = True
        for theirs, ours, dim in zip((A, B), (self.lora_A, self.lora_B), self.lora_rank_dims, strict=True):
            expected = [*ours.shape]
            expected[dim] = expected[dim] * r // self.r
            fits = fits and [*theirs.shape] == expected
        return at_block_rank(self, A, B, self.lora_block_rank()) if fits and r < self.r else (A, B)

    def lora_trimmed(self, A: Tensor, B: Tensor) -> tuple[int, float, Tensor, Tensor]:
        r, lora_alpha = self.padded_from
        q = block_rank(self, r)
        if any(bool(factor.any()) for B_g, A_g in factor_blocks(self, A, B) for factor in (B_g[:, q:], A_g[q:])):
            return super().lora_trimmed(A, B)
        return r, lora_alpha, *at_block_rank(self, A, B, q)

    def lora_take(self, r: int, lora_alpha: float, scaling: float, use_rslora: bool) -> None:
        alpha = lora_alpha if r == self.r else alpha_of(scaling, self.r, use_rslora)
        super().lora_take(self.r, alpha, scaling, use_rslora)
        self.padded_from = r, lora_alpha

    def lora_repr(self) -> str:
        return f"{super().lora_repr()}, padded_from={self.padded_from}"

    def lora_remove(self, restore_layout: bool = True) -> None:
        super().lora_remove(restore_layout)
        vars(self).pop("padded_from")


class Swappable(Padded):
    """In front of a layer's class: the layer has room, and what a compiler reads of it is in tensors.

    Attributes:
        lora_scale: (s, 1), which a compiler reads. `lora_scale_off` beside it is (0, 0). While the layer is disabled
            the two are exchanged: both stay where they are in memory, as CUDA graphs need it, and a backward that is
            still to come keeps the values of its forward.
    """

    lora_base_class = LoRALayer

    lora_scale: Tensor
    #: The tensor that holds the scaling, and what was written there; changed in place, with the tensors.
    _written: list[Any]

    def lora_layer_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As a layer without room computes it; for a compiler from tensors, which a swap may change."""
        if not self._is_traced():
            return super().lora_layer_forward(input, *args, **kwargs)
        y = self.lora_base_forward(input, *args, **kwargs)
        y = y + self._gated(self.lora_update(input, self.lora_read_scaling())).to(y.dtype)
        return self.lora_magnified(y) if self.use_dora else y

    def lora_read_scaling(self) -> float | Tensor:
        return self.lora_scale[0] if self._is_traced() else super().lora_read_scaling()

    def lora_gains(self) -> Tensor:
        gains = super().lora_gains()
        return self._gated(gains, 1) if self._is_traced() else gains

    def _gated(self, values: Tensor, off: float = 0) -> Tensor:
        """What LoRA adds, or scales by; what does nothing where the layer is disabled, whatever the adapter holds."""
        return torch.where(self.lora_scale[1] != 0, values, off)

    def _is_traced(self) -> bool:
        """Whether a compiler looks on, and the layer is in no state that only the plain forward knows."""
        known = self.lora_start is None and self.lora_needs_data is None and not self.lora_is_in_place()
        return torch.compiler.is_compiling() and known

    # ---- its tensors -------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "lora_scaling" or (name == "lora_A" and not self._are_placed()):
            self.lora_refresh()

    def _apply(self, fn: Any, recurse: bool = True) -> Swappable:
        super()._apply(fn, recurse)
        self.lora_refresh()
        return self

    @torch.inference_mode(False)
    @torch.no_grad()
    def lora_refresh(self) -> None:
        """Bring the two tensors up to date: in place, where their device and dtype are still right."""
        on, off = (_SCALE, _OFF) if self.lora_disabled is None else (_OFF, _SCALE)
        tensor, scaling = self._written
        if tensor is not None and self._buffers[off] is tensor:
            self._buffers.update({on: tensor, off: self._buffers[on]})
        # Writing what is there already would be a change to a backward that is still to come.
        if self._buffers[on] is not tensor or scaling != self.lora_scaling or not self._are_placed():
            self._write({on: (self.lora_scaling, 1.0), off: (0.0, 0.0)})
            self._written[:] = self._buffers[on], self.lora_scaling

    def _write(self, wanted: dict[str, tuple[float, float]]) -> None:
        self._written[:] = None, None  # until it is done
        device, dtype = self._placement()
        for name, values in wanted.items():
            tensor = self._buffers[name]
            if tensor is None or (tensor.device, tensor.dtype) != (device, dtype) or tensor.is_inference():
                tensor = self._buffers[name] = torch.empty(2, dtype=dtype, device=device)
            tensor[0].fill_(values[0])
            tensor[1].fill_(values[1])

    def _are_placed(self) -> bool:
        """Whether the two tensors are where the parameters are."""
        scale = self._buffers[_SCALE]
        return scale is None or (scale.device, scale.dtype) == self._placement()

    def _placement(self) -> tuple[torch.device, torch.dtype]:
        # Whatever `.to()` makes of the parameters: a scaling has many digits.
        return self.lora_A.device, exact_dtype(self.lora_A.dtype)

    def lora_remove(self, restore_layout: bool = True) -> None:
        super().lora_remove(restore_layout)
        vars(self).pop("_written")
        for name in _TENSORS:
            self._buffers.pop(name)
            self._non_persistent_buffers_set.discard(name)


def prepare_for_swap(model: nn.Module, max_r: int) -> None:
    """Make room for adapters of up to `max_r` in a model, so that it is compiled once for all of them.

    Fills A and B of every layer up with zeros, to rank `max_r`, which changes nothing that the model computes: what is
    zero stays zero in training. `lora.load_adapter` then takes adapters of any rank up to `max_r`, and
    `lora.save_adapter` writes the one that is there at its own rank. Under `torch.compile` a layer reads its scaling,
    and whether it is enabled, from a tensor:

        y = W₀ x + b + where(on, s · B A drop(x), 0)

    so that nothing is compiled again when an adapter is swapped, when `layer.scaling` is set, or in `lora.disabled`.
    Without it the model computes as before, with larger A and B.

    The layers get classes of their own, which derive from those that they had: `isinstance` holds as before.
    State dicts have the same keys, with A and B of rank `max_r`. The Parameter objects stay; an optimizer that has
    seen them at their old size has to be made anew, and so has one that has trained another adapter: its momentum would
    move what is zero. While a compiled model is disabled, gradients of A and B are zeros, not None. Prepare first, then
    wrap, shard and compile.

    Args:
        model: a model with LoRA layers. It may have been prepared before, for a smaller rank.
        max_r: the rank to make room for; factored convolutions whose groups do not divide it get the next one that
            they divide.

    Raises:
        TypeError: `max_r` is not an integer.
        ValueError: there is no LoRA layer, `max_r` is below the rank of one, its parameters are sharded, it waits for
            data, started as a part of its base weight (PiSSA and the like), or is of a user's kind with a
            `lora_forward` of its own. One error lists all, and the model is as it was.

    >>> import torch, lora
    >>> model = torch.nn.Sequential(lora.Linear(8, 4, r=2), lora.Linear(4, 4, r=3))
    >>> lora.prepare_for_swap(model, max_r=8)
    >>> model[0].lora_A.shape, model[0]
    (torch.Size([8, 8]), Linear(in_features=8, out_features=4, bias=True, r=8, lora_alpha=4, ...padded_from=(2, 1)))
    >>> other = torch.nn.Sequential(lora.Linear(8, 4, r=5), lora.Linear(4, 4, r=1))
    >>> _ = lora.load_adapter(model, lora.adapter_of(other), check_base=False)
    >>> [settings["r"] for settings in lora.adapter_of(model).modules.values()]
    [5, 1]
    """
    if not isinstance(max_r, int) or isinstance(max_r, bool):
        raise TypeError(f"`max_r` must be an integer, got {max_r!r}.")
    make_room(model, max_r, "prepare_for_swap", Swappable)


def make_room(model: nn.Module, max_r: int, what: str, front: type[Padded] = Padded) -> None:
    """Fill A and B of a model's layers up to a rank, and put a class in front of them that knows of it."""
    layers = [layer for layer in lora_layers(model, what) if layer.r > 0]
    names = names_of(model)
    problems = [f"{names[m][0] or 'the model'}: {problem}" for m in names for problem in _problems(m, max_r)]
    problems += sharded_problems(layers, names, "prepare the model, then shard it")
    if not layers:
        problems.append("no LoRA layer has a rank above 0.")
    raise_all(f"{what}: nothing was changed", problems)
    grown = [_with_room_for(layer, max_r) for layer in layers]  # all that may fail, before anything is changed
    with undo_on_error(layers) as undo, undo:
        for layer, larger in zip(layers, grown, strict=True):
            _prepare(layer, larger, front)


def _problems(module: nn.Module, max_r: int) -> Iterator[str]:
    """Why a module cannot be prepared, or has to be later."""
    if isinstance(module, DistributedDataParallel):
        yield "is wrapped in DistributedDataParallel, which knows the sizes of its parameters; prepare, then wrap."
    if not isinstance(module, LoRALayer) or module.r == 0:
        return
    needed = {*_TENSORS, *Padded.__annotations__, *Swappable.__annotations__, *dir(Swappable)} - {*dir(LoRALayer)}
    taken = sorted(needed & {*dir(module)})
    if taken and not isinstance(module, Padded):
        yield f"uses names that `prepare_for_swap` needs: {', '.join(taken)}."
    if module.lora_start is not None:
        yield (
            "its adapter started as a part of its base weight, without which it would be another model's; save it "
            "with `lora.save_adapter`, and load it into the plain base model."
        )
    if module.lora_needs_data:
        yield f"waits for data (`init_lora_weights={module.lora_needs_data!r}`); call `lora.calibrate` first."
    if module.r > max_r:
        yield f"`max_r` (={max_r}) must be at least its rank, {module.r}."
    owner = next(cls for cls in type(module).__mro__ if "lora_forward" in vars(cls))
    if owner.__module__.partition(".")[0] != "lora":
        yield f"its kind has a `lora_forward` of its own ({owner.__name__}), which may take the scaling for a constant."
    try:
        module.lora_block_rows()
    except ValueError as error:
        yield str(error)


class _Larger(NamedTuple):
    """What a layer with room has in the place of what it had. Gradients that there are not yet are anything."""

    r: int
    lora_alpha: float
    values: tuple[Tensor, Tensor]
    grads: tuple[Tensor, Tensor]


def _with_room_for(layer: LoRALayer, max_r: int) -> _Larger:
    A, B = layer.lora_A, layer.lora_B
    q = -(-max_r * layer.lora_block_rank() // layer.r)
    r = layer_rank(layer, q)
    dA, dB = (factor if factor.grad is None else factor.grad for factor in (A, B))
    lora_alpha = alpha_of(layer.lora_scaling, r, layer.use_rslora)
    return _Larger(r, lora_alpha, at_block_rank(layer, A, B, q), at_block_rank(layer, dA, dB, q))


def _prepare(layer: LoRALayer, larger: _Larger, front: type[Padded]) -> None:
    own = layer.r, layer.lora_alpha
    layer.r, layer.lora_alpha = larger.r, larger.lora_alpha
    for parameter, value, grad in zip((layer.lora_A, layer.lora_B), larger.values, larger.grads, strict=True):
        has_grad, parameter.grad = parameter.grad is not None, None
        with torch.inference_mode(parameter.is_inference()):
            parameter.data = value.clone() if parameter.is_inference() else value
        parameter.grad = grad if has_grad else None
    if not isinstance(layer, Padded):
        vars(layer)["padded_from"] = own
    if not isinstance(layer, front):
        if front is Swappable:
            for name in _TENSORS:
                layer.register_buffer(name, None, persistent=False)
            vars(layer)["_written"] = [None, None]
        layer.__class__ = class_for(front, type(layer))
    layer.lora_refresh()
