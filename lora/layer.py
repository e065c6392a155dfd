"""The one equation that every LoRA layer is, and what follows from it for all kinds of layer.

    W = W₀ + s · B A        s = lora_alpha / r

A kind of layer says four things: the shapes of A and B, `down` (x → A x), `up` (h → B h) and `delta`
(B A in the shape of the weight). Forward, merging, dtype and dropout rules are written here, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lora.merged import MergedWeight
from lora.registry import enter, new
from lora.settings import settings_problems
from lora.tensors import is_plain, without_autocast

Shape = tuple[int, ...]


class LoRALayer(nn.Module):
    """What all LoRA layers share: `isinstance(m, lora.LoRALayer)` tells one from a plain layer.

    A mixin that stands in front of the layer that it adapts, as in `class Linear(LinearLoRA, nn.Linear)`.
    A kind of layer derives from it and defines `lora_shapes`, `down`, `up`, `delta` and
    `forward_with`; `lora.register` then makes `lora.inject` use it (docs there).

    Attributes:
        r: rank of the update; 0 means that the layer behaves exactly as its base class.
        lora_alpha: numerator of the scaling.
        scaling: s in the equation; set from `lora_alpha` and `r`, may be changed at any time.
        lora_dropout: probability of dropping an input feature on the LoRA path, in training only.
        merge_weights: serve `eval()` without gradients from one merged weight, kept beside the base weight.
        lora_A, lora_B: the adapter's parameters, absent when `r` is 0.

    From "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
    """

    # Class-level defaults: torch's constructors call `reset_parameters` before ours has set anything.
    r: int = 0
    lora_alpha: float = 1
    lora_dropout: float = 0.0
    use_rslora: bool = False
    merge_weights: bool = False
    scaling: float = 1.0
    lora_disabled: int = 0
    injected: bool = False
    _merged: MergedWeight | None = None
    _subclassed: bool = False

    weight: Tensor
    bias: Any
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    #: The arguments that define the adapter: what a checkpoint records and `eject` removes.
    settings: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "lora_dropout", "use_rslora", "merge_weights")
    #: The class that this one adapts.
    base_class: ClassVar[type[nn.Module]] = nn.Module
    #: Whether `forward_with` may stand in for the base class's own forward.
    dense: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.base_class = next(
            base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, LoRALayer)
        )
        enter(cls)

    # ---- what a kind of layer says -----------------------------------------------------------------

    @classmethod
    def configure(cls, base: nn.Module, **wanted: Any) -> tuple[type[LoRALayer], dict[str, Any]]:
        """The kind and its own settings for `base`, from the fields of a LoraConfig that only some kinds know."""
        if wanted["splits"] is not None or wanted["enable_lora"] is not None:
            raise ValueError(f"`splits` and `enable_lora` are for linear layers, not for a {type(base).__name__}.")
        return cls, {}

    @classmethod
    def lora_shapes(cls, base: nn.Module, r: int, **settings: Any) -> tuple[Shape, Shape]:
        """The shapes of lora_A and lora_B for `base`; ValueError where the kind's own settings do not fit it."""
        raise NotImplementedError(f"{cls.__name__} must define lora_shapes")

    def beyond_weight(self) -> str | None:
        """What of the merged layer's function its weight alone cannot say; None if nothing."""
        return None

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """x → A x."""
        raise NotImplementedError(f"{type(self).__name__} must define down")

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        """h → B h, in the shape of the layer's output."""
        raise NotImplementedError(f"{type(self).__name__} must define up")

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        """B A in the shape of the base weight."""
        raise NotImplementedError(f"{type(self).__name__} must define delta")

    def forward_with(self, input: Tensor, weight: Tensor) -> Tensor:
        """The base layer's function of `input` with `weight` in the place of its own; needed if `dense`."""
        raise NotImplementedError(f"{type(self).__name__} must define forward_with")

    def base_weight(self) -> Tensor:
        """W₀, as the base layer's function uses it."""
        return self.weight

    # ---- making ------------------------------------------------------------------------------------

    def attach(
        self,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = False,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        **kind_settings: Any,
    ) -> None:
        """Give a bare base layer its adapter: settings, lora_A and lora_B (uninitialised), a frozen weight."""
        problems = settings_problems(r, lora_alpha, lora_dropout)
        if problems:
            raise ValueError(" ".join(problems))
        shape_A, shape_B = self.lora_shapes(self, r, **kind_settings)
        r = r if shape_A[0] else 0  # a mask that enables nothing leaves no rows
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, float(lora_dropout)
        self.merge_weights, self.use_rslora = merge_weights, use_rslora
        for name, value in kind_settings.items():
            setattr(self, name, value)
        if r == 0:
            return
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        # By device and dtype, never from the weight: quantised weights refuse `new_zeros`.
        device, dtype = self.weight.device, adapter_dtype or self.weight.dtype
        self.lora_A = nn.Parameter(torch.zeros(shape_A, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, device=device, dtype=dtype))
        self.weight.requires_grad_(False)

    def detach(self, restore_layout: bool = True) -> None:
        """Undo `attach`: the layer is a bare base layer again, with its weight in the base class's layout.

        `restore_layout` is False for a weight that is shared with a layer that has restored it.
        """
        made = ("lora_A", "lora_B", "scaling", "lora_disabled", "injected", "_merged", "_subclassed")
        for name in (*made, *self.settings):
            self.__dict__.pop(name, None)
            self._parameters.pop(name, None)
        self.__class__ = self.base_class  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        """Initialise the base layer's parameters, then the adapter's."""
        super().reset_parameters()  # type: ignore[misc]
        if self.r > 0:
            self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """A ~ kaiming uniform (a = √5), B = 0, so that training starts from the base layer's function."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def lora_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's own parameters, by name; nothing when `r` is 0."""
        for name in ("lora_A", "lora_B"):
            if name in self._parameters:
                yield name, getattr(self, name)

    def owns_its_tensors(self) -> bool:
        """Whether weight, A and B are parameters or buffers here, not computed by a parametrization, say."""
        return {"weight", "lora_A", "lora_B"} <= {*self._parameters, *self._buffers}

    # ---- forward -----------------------------------------------------------------------------------

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y = W₀ x + b + s · B A drop(x), or the same from the merged weight (class docstring).

        Further arguments, which only a user's subclass of torch's layers has, go to the base layer's forward.
        """
        if self.r == 0 or self.lora_disabled:
            return self.base_forward(input, *args, **kwargs)
        if self._serves_merged():
            return self.forward_with(input, self.merged_weight(), *args, **kwargs)
        return self.lora_forward(input, *args, **kwargs)

    def base_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The pretrained layer's own output."""
        output: Tensor = super().forward(input, *args, **kwargs)
        return output

    def lora_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The equation in plain, out-of-place operations: right for every base, quantised or sharded."""
        y = self.base_forward(input, *args, **kwargs)
        return y + (self.lora_update(input) * self.scaling).to(y.dtype)

    def lora_update(self, input: Tensor) -> Tensor:
        """B A drop(x), without the scaling; A and B, which are small, are cast to x's dtype, never x."""
        dtype = input.dtype if input.is_floating_point() else self.update_dtype(self.weight)
        h = self.down(self.drop(input), self.lora_A.to(dtype))
        return self.up(h, self.lora_B.to(dtype))

    def update_dtype(self, other: Tensor) -> torch.dtype:
        """The wider of the adapter's dtype and that of `other`, if it has numbers like ours."""
        return torch.promote_types(self.lora_A.dtype, other.dtype) if other.is_floating_point() else self.lora_A.dtype

    def drop(self, input: Tensor) -> Tensor:
        """Dropout on the LoRA path."""
        return F.dropout(input, self.lora_dropout) if self.lora_dropout and self.training else input

    # ---- merging -----------------------------------------------------------------------------------

    def _serves_merged(self) -> bool:
        if self.training or not self.merge_weights or not self.dense or self._subclassed:
            return False
        tensors = (self.weight, self.lora_A, self.lora_B)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return False
        return is_plain(*tensors)

    def merged_weight(self) -> Tensor:
        """W₀ + s · B A in the base weight's dtype, remembered until something that it depends on changes."""
        sources = (self.weight, self.lora_A, self.lora_B)
        if self._merged is None or not self._merged.is_current(sources, self.scaling):
            self._merged = MergedWeight(sources, self.scaling, self.compute_merged())
        return self._merged.tensor

    @torch.inference_mode(False)
    @torch.no_grad()
    def compute_merged(self) -> Tensor:
        """W₀ + s · B A in the weight's dtype: added in float32, or float64 where the weight is, and rounded once."""
        return self.merge_into(torch.empty_like(self.weight))

    def merge(self) -> None:
        """Make the merged weight the base weight; the base layer computes with it what `forward_with` does."""
        self.merge_into(self.weight)

    def merge_into(self, out: Tensor) -> Tensor:
        """Write W₀ + s · B A to `out`, which is like the weight: the weight itself, or another."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with without_autocast(self.weight.device):
            A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
            return out.copy_(self.add_update(self.base_weight().to(dtype, copy=True), A, B))

    def sampled(self, weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Parts of a weight and of A that belong together, few where that is quick; `delta` of one is of the other."""
        return weight, A

    def add_update(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Add s · B A to `weight`, in place."""
        return weight.add_(self.delta(A, B), alpha=self.scaling)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # FSDP puts a sharded parameter and a plain, whole one in each other's place around every forward: a merged
        # weight that outlived the whole one would undo the sharding.
        if name in ("weight", "lora_A", "lora_B"):
            self._merged = None
            self._subclassed |= isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter)

    def train(self, mode: bool = True) -> LoRALayer:
        """Set training mode; leaving `eval()` drops the merged weight. The base weight is never written."""
        super().train(mode)
        if mode:
            self._merged = None
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALayer:
        self._merged = None  # before `.to()` and the like: no second copy on the old device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    # ---- printing and pickling ---------------------------------------------------------------------

    def extra_repr(self) -> str:
        """The base layer's arguments, then the adapter's."""
        return ", ".join(words for words in (super().extra_repr(), self.adapter_repr()) if words)

    def adapter_repr(self) -> str:
        """The adapter's arguments, those that are not as by default."""
        if self.r == 0:
            return ""
        words = [f"r={self.r}", f"lora_alpha={self.lora_alpha:g}"]
        for name in self.settings[2:]:
            value = getattr(self, name)
            if value != getattr(type(self), name):
                words.append(f"{name}={value}")
        return ", ".join(words)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if type(self).__dict__.get("generated", False):  # such a class has no name to be imported by
            return new, type(self).__bases__, *reduced[2:]
        return reduced


def join(module: str, name: str) -> str:
    """The full name of a module's own parameter; the root module's name is empty."""
    return f"{module}.{name}" if module else name
