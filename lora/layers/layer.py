"""The one equation that every LoRA layer is, and what follows from it for all kinds of layer.

    W = g ⊙ (W₀ + s · B A)        s = lora_alpha / r,  g = 1  (DoRA: m / ‖W₀ + s · B A‖)

A kind of layer says four things: `lora_shapes`, of A and B, `lora_down` (x → A x), `lora_up` (h → B h) and `lora_delta`
(B A in the shape of the weight). Forward, merging, and the rules for dtypes and dropout are written here, once;
magnitudes in dora.py.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from lora.errors import short
from lora.functional.fused import exact_dtype, is_jit_tracing, is_plain, spread, without_autocast
from lora.layers import starts, switch, weights
from lora.layers.cache import remembered
from lora.layers.in_place import LowRankWeight, computed_names, with_weight
from lora.layers.registry import new, parts_of
from lora.layers.replay import seeded
from lora.layers.settings import scaling_of, scaling_problem, settings_problems
from lora.layers.state import PARAMETERS, StateDicts
from lora.layers.weights import sparing

# What a layer keeps beside its settings and parameters.
_STATE = (
    *("lora_scaling", "lora_disabled", "lora_injected", "init_lora_weights", "lora_start", "lora_base_written"),
    *("lora_needs_data", "lora_place", "lora_fresh", "_merged", "_squares", "_norms"),
    *("_subclassed", "_checked", "_in_place"),
)


def needs_no_data(layer: LoRALayer, input: Tensor) -> None:
    """RuntimeError in training where A and B are still to be made from data."""
    if layer.lora_needs_data and layer.training:
        raise RuntimeError(
            f"`init_lora_weights={layer.lora_needs_data!r}` needs data: call `lora.calibrate(model, batches)` first."
        )


class LoRALayer(StateDicts):
    """What all LoRA layers share: `isinstance(m, lora.LoRALayer)` tells one from a plain layer.

    A mixin that stands in front of the layer that it adapts, as in `class Linear(LinearLoRA, nn.Linear)`.
    A kind of layer derives from it and defines `lora_shapes`, `lora_down`, `lora_up`, `lora_delta` and
    `lora_forward_with`; `lora.register` then makes `lora.inject` use it (docs there).

    Attributes:
        r: rank of the update; 0 means that the layer behaves exactly as its base class.
        lora_alpha: numerator of the scaling.
        scaling: s in the equation; set from `lora_alpha` and `r`, may be changed at any time, to a number.
        lora_dropout: probability of dropping an input feature on the LoRA path, in training only.
        merge_weights: serve `eval()` without gradients from one merged weight, kept beside the base weight.
        use_dora: scale each output to a trainable magnitude.
        lora_A, lora_B, lora_magnitude: the adapter's parameters; absent when `r` is 0, the last also without DoRA.
        lora_start: A, B and scaling as they started, if that was taken out of the base weight; or None.

    From "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
    """

    lora_value: ClassVar[type[LowRankWeight]] = LowRankWeight
    #: What is checked before each forward with LoRA in training, or with gradients: wings add functions of a layer and
    #: its input, which raise.
    lora_checks: ClassVar[tuple[Callable[[LoRALayer, Tensor], None], ...]] = (needs_no_data,)

    # ---- forward ---------------------------------------------------------------------------------------------

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y = g ⊙ (W₀ x + s · B A drop(x)) + b, or the same from the merged weight.

        Further arguments, which only a user's subclass of torch's layers has, go to the base layer's forward.
        """
        return self.lora_layer_forward(input, *args, **kwargs)

    def lora_layer_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What `forward` computes; classes in front change this, and not `forward`."""
        # A user's class may have a `forward` around ours, and hooks hold that of the class which the layer had before.
        if self.r == 0 or (self.lora_disabled is not None and self.lora_is_off()):
            return self.lora_pretrained_forward(input, *args, **kwargs)
        if self.merge_weights and (merged := self._served()) is not None:
            if self.lora_dense:
                return self.lora_forward_with(input, merged, *args, **kwargs)
            return self.lora_computed_with(merged, input, *args, **kwargs)
        self._check(input)
        if self._in_place and self.lora_is_in_place():
            W, why = self.lora_weight(), self.lora_needs.why_tensor(self)
            return self.lora_computed_with(W if why is None else W.dense(why), input, *args, **kwargs)
        y = self.lora_forward(input, *args, **kwargs)
        return self.lora_magnified(y) if self.use_dora else y

    def _check(self, input: Tensor) -> None:
        if self.training or torch.is_grad_enabled():
            for check in type(self).lora_checks:  # torch.compile before torch 2.8 finds no tuple by the instance
                check(self, input)

    def lora_is_off(self) -> bool:
        """Whether LoRA is disabled in the layer for the caller; in a compiled model, for anyone."""
        disabled = self.lora_disabled  # asked once: another thread may leave its block
        return disabled is not None and (is_compiling() or disabled.is_off(self.weight.device))

    def lora_base_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W₀ x + b: the base layer's own output."""
        output: Tensor = super().forward(input, *args, **kwargs)
        return output

    def lora_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W₀ x + s · B A drop(x) + b, out of place: right for every base, quantised or sharded."""
        return self.lora_beside(input, self.lora_base_forward(input, *args, **kwargs))

    def lora_beside(self, input: Tensor, y: Tensor, seed: Callable[[], int] | None = None) -> Tensor:
        """What the base layer has computed, and s · B A drop(x); `seed` gives dropout's, and is called if it drops."""
        drops = self.lora_dropout and self.training
        with nullcontext() if seed is None or not drops else seeded(seed(), y.device):
            return y + self.lora_update(input, self.lora_scaling).to(y.dtype)

    def lora_update(self, input: Tensor, scaling: float | Tensor = 1.0) -> Tensor:
        """s · B A drop(x); A and B, which are small, are cast to x's dtype, never x."""
        dtype = input.dtype if input.is_floating_point() else self.lora_update_dtype(self.weight)
        B, left = spread(self.lora_B, scaling, dtype)
        return self.lora_product(self.lora_drop(input), self.lora_A.to(dtype), B) * left

    def lora_update_dtype(self, other: Tensor) -> torch.dtype:
        """The wider of the adapter's dtype and that of `other`, if it has numbers like ours."""
        return torch.promote_types(self.lora_A.dtype, other.dtype) if other.is_floating_point() else self.lora_A.dtype

    def lora_drop(self, input: Tensor) -> Tensor:
        """Dropout on the LoRA path."""
        return F.dropout(input, self.lora_dropout) if self.lora_dropout and self.training else input

    def lora_pretrained_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the layer as it was pretrained, whatever an initialiser took out of its weight."""
        start = self.lora_start
        if start is None:
            return self.lora_base_forward(input, *args, **kwargs)
        A, B, scaling = start
        if self.lora_is_in_place():
            return self.lora_computed_with(self.lora_weight_now(), input, *args, **kwargs)
        y = self.lora_base_forward(input, *args, **kwargs)
        dtype = y.dtype if y.is_floating_point() else A.dtype
        B, left = spread(B.to(y.device), scaling, dtype)
        return y + (self.lora_product(input, A.to(y.device, dtype), B) * left).to(y.dtype)

    # ---- where the base class has a forward of its own -------------------------------------------------------

    def lora_is_in_place(self) -> bool:
        """Whether the base class has a forward of its own, and a weight that W can take the place of."""
        return self._in_place and not self._subclassed

    def lora_weight(self) -> LowRankWeight:
        """W, in the place of the weight that the base class's own forward reads."""
        dropout = self.lora_dropout if self.training else 0.0
        return self.lora_value(self, self.lora_A, self.lora_B, self.lora_scaling, gain=self.use_dora, dropout=dropout)

    def lora_weight_now(self) -> Tensor | LowRankWeight:
        """The weight that the layer computes with now, for a parent that reads it and does not call the layer."""
        weight: Tensor = self.weight
        if self.r == 0 or self.lora_is_off():
            start = self.lora_start
            if start is None:
                return weight
            A, B, scaling = start
            return self.lora_value(self, A.to(weight.device), B.to(weight.device), scaling)
        if (merged := self._served()) is not None:
            return merged
        self._check(weight)
        return self.lora_weight()

    def lora_computed_with(self, weight: Tensor | LowRankWeight, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with another weight in the place of its own."""
        if self.lora_dense:
            assert isinstance(weight, Tensor)
            return self.lora_forward_with(input, weight, *args, **kwargs)
        output: Tensor = with_weight(self, weight, input, *args, **kwargs)
        return output

    # ---- the merged weight -----------------------------------------------------------------------------------

    def _served(self) -> Tensor | None:
        """The merged weight, if that is what the layer is to compute with now."""
        if self.training or not self.merge_weights:
            return None
        # Whether tensors suit a merged weight is checked once; the answer holds while they are unchanged, inside a
        # transform too. (Asked in this order, a compiler sees a constant, and guards nothing.)
        if not (is_compiling() or is_jit_tracing() or torch.is_grad_enabled()):
            kept = self._merged  # asked once: another thread may drop it
            if kept is not None and kept.is_current(self.lora_sources(), self.lora_scaling):
                merged: Tensor = kept.value
                return merged
        return self.lora_merged_weight() if self._serves_merged() else None

    def _serves_merged(self) -> bool:
        if self._subclassed:
            return False
        if not self.lora_dense and not self._in_place:
            return False
        tensors = self.lora_sources()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return False
        return is_plain(*tensors)

    def lora_sources(self) -> tuple[Tensor, ...]:
        """What the merged weight is computed from: the weight, A and B, with DoRA the magnitudes as well."""
        own = self._parameters  # with each token `nn.Module.__getattr__` takes its time, and so does one call more
        weight, A, B = own.get("weight"), own.get("lora_A"), own.get("lora_B")
        if weight is None or A is None or B is None:  # a parametrization computes it, say
            sources: tuple[Tensor, ...] = self.weight, self.lora_A, self.lora_B
        else:
            sources = weight, A, B
        return (*sources, self.lora_magnitude) if self.use_dora else sources

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        own = self._parameters
        A, B = own.get("lora_A"), own.get("lora_B")
        if A is None or B is None:  # a parametrization computes it, say
            return self.lora_A, self.lora_B
        return A, B

    def lora_merged_weight(self) -> Tensor:
        """W in the base weight's dtype, remembered until something that it depends on changes."""
        return remembered(self, "_merged", self.lora_sources(), self.lora_scaling, self.lora_compute_merged)

    @torch.inference_mode(False)
    @torch.no_grad()
    def lora_compute_merged(self) -> Tensor:
        """W in the weight's dtype: computed in float32, or float64 where the weight is, and rounded once."""
        return self.lora_merge_into(torch.empty_like(self.lora_base_weight()))

    def lora_merge(self) -> None:
        """Make the merged weight the base weight; the base layer computes with it what `lora_forward_with` does."""
        self.lora_merge_into(self.weight)

    def lora_merge_into(self, out: Tensor) -> Tensor:
        """Write W to `out`, which is like the weight: the weight itself, or another."""
        dtype = exact_dtype(out.dtype)
        with without_autocast(out.device):
            A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
            g = self.lora_gain(dtype) if self.use_dora else None
            merged = self.lora_add_update(self.lora_base_weight().to(dtype, copy=True), A, B)
            return out.copy_(merged if g is None else merged.mul_(g))

    # ---- making ----------------------------------------------------------------------------------------------

    def lora_add(
        self,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = False,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: starts.Init = True,
        adapter_dtype: torch.dtype | None = None,
        **kind_settings: Any,
    ) -> None:
        """Give a bare base layer its adapter: settings, its parameters (uninitialised), a frozen weight."""
        problems = [
            *settings_problems(r, lora_alpha, lora_dropout, use_rslora),
            starts.constructor_problem(init_lora_weights),
        ]
        if any(problems):
            raise ValueError(" ".join(filter(None, problems)))
        shape_A, shape_B = self.lora_shapes(self, r, **kind_settings)
        if use_dora:
            self.lora_check_dora(self, shape_B)
        r = r if shape_A[0] else 0  # a mask that enables nothing leaves no rows
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, float(lora_dropout)
        self.merge_weights, self.use_rslora, self.use_dora = merge_weights, use_rslora, use_dora and r > 0
        self.init_lora_weights = init_lora_weights
        for name, value in kind_settings.items():
            setattr(self, name, value)
        if r == 0:
            return
        self.lora_scaling = scaling_of(lora_alpha, r, use_rslora)
        # By device and dtype, never from the weight: quantised weights refuse `new_zeros`.
        device, dtype = self.weight.device, adapter_dtype or self.weight.dtype
        self.lora_A = nn.Parameter(torch.zeros(shape_A, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, device=device, dtype=dtype))
        if use_dora:
            count = self.lora_magnitudes(self, shape_B)
            exact = exact_dtype(dtype)  # it moves in small steps, and is small
            self.lora_magnitude = nn.Parameter(torch.ones(count, device=device, dtype=exact))
        self.weight.requires_grad_(False)
        self._in_place = not self.lora_dense and not weights.is_packed(self)

    def lora_remove(self, restore_layout: bool = True) -> None:
        """Undo `lora_add`: the layer is a bare base layer again, with its weight in the base class's layout.

        `restore_layout` is False for a weight that is shared with a layer that has restored it.
        """
        if self.lora_place is not None:
            self.lora_place.adapted = False
        for name in (*PARAMETERS, *_STATE, *self.lora_settings, "forward"):
            vars(self).pop(name, None)
            self._parameters.pop(name, None)
        self.__class__ = self.lora_base_class  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        """Initialise the base layer's parameters, then the adapter's."""
        self.lora_reset_base_parameters()
        if self.r > 0:
            self.lora_start_adapter()

    def lora_reset_base_parameters(self) -> None:
        """Initialise the base layer's parameters, as its class does."""
        super().reset_parameters()  # type: ignore[misc]

    def lora_start_adapter(self) -> None:
        """Initialise the adapter as `init_lora_weights` says, where that needs nothing but shapes."""
        # Of a sharded layer whole ones: random numbers drawn by each rank for its own part would be other ones.
        read = tuple(self._parameters) if callable(self.init_lora_weights) else ()
        names = [name for name, _ in self.lora_parameters()]
        with weights.ranks_of(self).written_whole(self, *names, read=read) as whole:
            starts.from_shapes(whole, self.init_lora_weights)
        self.lora_needs_data = self.init_lora_weights if self.init_lora_weights in starts.OF_DATA else None
        self.lora_start = None
        self.reset_magnitude()

    def lora_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's own parameters, by name; nothing when `r` is 0."""
        own = [*self._parameters]  # what a parametrization computes may be found there by its name, and is not listed
        for name in PARAMETERS:
            if name in own:
                yield name, getattr(self, name)

    def lora_owns_its_tensors(self) -> bool:
        """Whether weight, A and B are parameters or buffers here, and none is computed by a parametrization, say."""
        needed = {"weight", "lora_A", "lora_B"} | ({"lora_magnitude"} if self.use_dora else set())
        return needed <= {*self._parameters, *self._buffers} and not computed_names(self)

    # ---- for the adapters that files hold, and for classes in front, which may extend these -----------

    def lora_ranks(self) -> Sequence[int]:
        """The ranks of adapters that the layer can hold, the largest first; its own, if it has no room for others."""
        return (self.r,)

    def lora_padded(self, r: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of an adapter of rank `r` at the layer's rank, if it has room; as they are where they do not fit."""
        return A, B

    def lora_trimmed(self, A: Tensor, B: Tensor) -> tuple[int, float, Tensor, Tensor]:
        """r, lora_alpha, A and B of the layer's adapter at its own rank, from the layer's A and B, whole."""
        return self.r, self.lora_alpha, A, B

    def lora_take(self, r: int, lora_alpha: float, scaling: float, use_rslora: bool) -> None:
        """Take over the settings of an adapter of one of `lora_ranks`, whose A and B are written next."""
        self.r, self.lora_alpha, self.use_rslora, self.lora_scaling = r, lora_alpha, use_rslora, scaling
        self.lora_needs_data = None

    def lora_refresh(self) -> None:
        """Called when LoRA was disabled or enabled in the layer, and when its attributes were put back."""

    # ---- state --------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scaling" and type(self).scaling is LoRALayer.scaling and not LoRALayer.scaling.is_taken(self):
            return setattr(self, "lora_scaling", value)
        if name == "lora_scaling" and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
            raise TypeError(f"`scaling` must be a number, got {short(value)}.")
        if name == "lora_scaling" and (problem := scaling_problem(value if isinstance(value, int) else float(value))):
            raise ValueError(problem)
        super().__setattr__(name, value)
        # FSDP puts a sharded parameter and a plain, whole one in each other's place around every forward: a merged
        # weight that outlived the whole one would undo the sharding.
        if name == "weight" or name in PARAMETERS:
            self._merged = self._squares = self._norms = None
            self._subclassed |= isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter)

    def train(self, mode: bool = True) -> LoRALayer:
        """Set training mode; leaving `eval()` drops the merged weight. The base weight is never written."""
        super().train(mode)
        if mode:
            self._merged = None
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALayer:
        super()._apply(self.lora_applied(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def lora_applied(self, fn: Any) -> Any:
        """What `_apply` is to apply to the layer's tensors; drops caches, which are of the tensors as they were."""
        self._merged = self._squares = self._norms = None  # before `.to()` and the like: no copy on the old device
        self._checked = None
        if self.r == 0:
            return fn
        # A model that is cast to float8, to be stored in it, goes on to train what trains here.
        own, adapters = self._parameters.items(), {name for name, _ in self.lora_parameters()}
        trained = [p for name, p in own if p is not None and (name in adapters or p.requires_grad)]
        return sparing(fn, [*trained, *(p.grad for p in trained if p.grad is not None)])

    def _replicate_for_data_parallel(self) -> Any:
        """A twin for one of `nn.DataParallel`'s threads, which have no context of their own."""
        off = self.lora_is_off()
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        vars(replica)["lora_disabled"] = switch.OFF if off else None
        return replica

    # ---- printing and pickling ---------------------------------------------------------------------

    def extra_repr(self) -> str:
        """The base layer's arguments, then the adapter's."""
        return ", ".join(words for words in (super().extra_repr(), self.lora_repr()) if words)

    def lora_repr(self) -> str:
        """The adapter's arguments, those that are not as by default."""
        if self.r == 0:
            return ""
        words = [f"r={self.r}", f"lora_alpha={self.lora_alpha:g}"]
        for name in self.lora_settings[2:]:
            value = getattr(self, name)
            if value != getattr(type(self), name):
                words.append(f"{name}={value}")
        return ", ".join(words)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if type(self).__dict__.get("generated", False):  # such a class has no name to be imported by
            return new, parts_of(type(self)), *reduced[2:]
        return reduced

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        switch.copy_blocks(self)
        vars(self).pop("lora_fresh", None)  # which was of other tensors
        self.lora_refresh()
        weights.packing_of(self)  # imports how to read the weight: a compiler, which may be the next to ask, cannot


def is_computed(module: nn.Module) -> bool:
    """Whether a parametrization computes a tensor of an adapted layer, or of a module that finds W as it reads."""
    if isinstance(module, LoRALayer):
        return module.r > 0 and not module.lora_owns_its_tensors()
    return "lora_reads" in vars(module) and bool(computed_names(module))
