"""LoRA for linear layers, and for several of them fused into one: query, key and value, say."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from itertools import accumulate, compress
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lora.errors import instance, short
from lora.functional import Adapted, lora_beside, lora_linear
from lora.functional.fused import exact_dtype, without_autocast
from lora.functional.update import add_slices_, up_slices
from lora.layers.kind import Shape
from lora.layers.layer import LoRALayer
from lora.layers.parts import Matrix
from lora.layers.registry import Kind, register
from lora.layers.starts import Init
from lora.layers.taught import TaughtLinear
from lora.layers.weights import sample_slice

# What `lora_beside` computes in the place of.
_OF_UPDATE = "lora_down", "lora_up", "lora_update", "lora_product", "lora_drop"
# How many rows of a weight in low precision are merged at a time.
_PART = 512


class LinearLoRA(TaughtLinear):
    """The kind for linear layers: A (r, in_features), B (out_features, r)."""

    lora_counted = "out_features", "lora_B", 0
    #: The kind to use when the layer's output is several fused ones.
    lora_merged_kind: ClassVar[type[LinearLoRA]]
    #: Whether a class computes the update in a way of its own.
    lora_own_update: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.lora_own_update = any(getattr(cls, own) is not getattr(LinearLoRA, own) for own in _OF_UPDATE)

    def lora_rows(self) -> Tensor:
        return self.lora_stored(self.weight)

    @classmethod
    def lora_features(cls, base: nn.Module) -> tuple[int, int]:
        """(in_features, out_features) of a base layer."""
        return base.in_features, base.out_features  # type: ignore[return-value]

    @classmethod
    def lora_configure(cls, base: nn.Module, **wanted: Any) -> tuple[Kind, dict[str, Any]]:
        splits, enable_lora = wanted["splits"], wanted["enable_lora"]
        if splits is None and enable_lora is None:
            return cls, {}
        settings = split_settings(cls.lora_features(base)[1], splits, True if enable_lora is None else enable_lora)
        if not any(settings["enable_lora"]):
            raise ValueError("`enable_lora` enables no split; leave the module out of `target_modules` instead.")
        return cls.lora_merged_kind, settings

    @classmethod
    def lora_shapes(cls, base: nn.Module, r: int, **settings: Any) -> tuple[Shape, Shape]:
        in_features, out_features = cls.lora_features(base)
        return (r, in_features), (out_features, r)

    def lora_down(self, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)  # (..., in_features) -> (..., r)

    def lora_up(self, h: Tensor, B: Tensor) -> Tensor:
        return up_slices(h, B, self.lora_slices(), self.lora_features(self)[1])  # (..., G·r) -> (..., out_features)

    def lora_weight_shape(self) -> Shape:
        in_features, out_features = self.lora_features(self)
        return (in_features, out_features) if self.fan_in_fan_out else (out_features, in_features)

    def lora_slices(self) -> list[tuple[int, int]]:
        return [(0, self.lora_features(self)[1])]

    def lora_delta(self, A: Tensor, B: Tensor) -> Tensor:
        columns = up_slices(A.T, B, self.lora_slices(), self.lora_features(self)[1])  # h = A e_i for each input i
        return self.lora_stored(columns.T)

    def lora_merge_into(self, out: Tensor) -> Tensor:
        exact = exact_dtype(out.dtype)
        A, B = self.lora_A.to(exact), self.lora_B.to(exact)
        # Of the weight as it is, before it is written.
        gain = self.lora_gain(exact) if self.use_dora else None
        if out is not self.weight:
            out.copy_(self.lora_base_weight())
        with without_autocast(out.device):
            if out.dtype == exact:
                merged = self.lora_add_update(out, A, B)
                return merged if gain is None else merged.mul_(gain)
            self._merge_by_parts(out, A, B, None if gain is None else self.lora_stored(gain))
        return out

    def _merge_by_parts(self, out: Tensor, A: Tensor, B: Tensor, gain: Tensor | None) -> None:
        """Make the weight in `out` the merged one, in A's dtype, without a second weight in that dtype."""
        slices = self.lora_slices()
        Bs = torch.split(B, [stop - start for start, stop in slices])
        for (start, stop), A_g, B_g in zip(slices, torch.split(A, self.r), Bs, strict=True):
            rows = self.lora_stored(out)[start:stop]  # (size, in_features)
            room = torch.empty(_PART, rows.shape[1], dtype=A.dtype, device=A.device)  # once: new memory is slow
            for n, (part, B_part) in enumerate(zip(torch.split(rows, _PART), torch.split(B_g, _PART), strict=True)):
                sum_ = room[: len(part)].copy_(part).addmm_(B_part, A_g, alpha=self.lora_scaling)
                if gain is not None:
                    sum_.mul_(gain[start + n * _PART :][: len(part)])  # (rows, 1)
                part.copy_(sum_)

    def lora_sampled(self, weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        columns = sample_slice(weight)
        return self.lora_stored(self.lora_stored(weight)[:, columns]), A[:, columns]

    def lora_add_update(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        add_slices_(self.lora_stored(weight).T, A.T, B, self.lora_slices(), self.lora_scaling)
        return weight

    @classmethod
    def lora_magnitudes(cls, base: nn.Module, shape_B: Shape) -> int:
        return shape_B[0]

    def lora_output_dims(self) -> tuple[int, int]:
        return (1 if self.fan_in_fan_out else 0), -1

    def lora_block_rows(self) -> list[int]:
        return [stop - start for start, stop in self.lora_slices()]

    def lora_weight_blocks(self, weight: Tensor) -> Sequence[Tensor]:
        return [self.lora_stored(weight)[start:stop] for start, stop in self.lora_slices()]

    def lora_base_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # nn.Linear itself knows no transposed weight; other bases that have one know it.
        if self.fan_in_fan_out and self.lora_base_class is nn.Linear:
            return self.lora_forward_with(input, self.weight)
        return super().lora_base_forward(input, *args, **kwargs)

    def lora_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.lora_dense:
            return super().lora_forward(input, *args, **kwargs)
        # No second weight beside one that was gathered from shards for this forward.
        return lora_linear(input, *self.lora_arguments(), fold=not self._subclassed)

    def lora_beside(self, input: Tensor, y: Tensor, seed: Callable[[], int] | None = None) -> Tensor:
        if self.lora_own_update:
            return super().lora_beside(input, y, seed)
        dropout = self.lora_dropout if self.training else 0.0
        return lora_beside(input, y, *self.lora_factors(), self.lora_scaling, dropout, self.lora_slices(), seed=seed)

    def lora_adapted(self) -> Adapted:
        """The layer as the arguments of `lora.functional.lora_linear`; ValueError with DoRA, which is more."""
        if not self.lora_dense:
            raise ValueError(f"{instance(self)} has a forward of its own, which `lora_linear` does not know.")
        if self.use_dora:
            raise ValueError(f"`lora_linear` and `lora_swiglu` know no magnitudes, and this {type(self).__name__} has.")
        return self.lora_arguments()

    def lora_arguments(self) -> Adapted:
        """The layer as the arguments of `lora.functional.lora_linear`, without magnitudes."""
        dropout = self.lora_dropout if self.training else 0.0
        weight, A, B, *_ = self.lora_sources()
        weight, bias = self.lora_stored(weight), self._own_bias()
        return Adapted(weight, bias, A, B, self.lora_scaling, dropout, self.lora_slices())

    def _own_bias(self) -> Tensor | None:
        if "bias" in self._parameters:  # quicker than by `nn.Module.__getattr__`
            return self._parameters["bias"]
        bias: Tensor | None = self.bias
        return bias

    def lora_forward_with(self, input: Tensor, weight: Tensor) -> Tensor:
        # `lora_stored` here, too, would be one call more with each token.
        return F.linear(input, weight.T if self.fan_in_fan_out else weight, self._own_bias())

    def lora_reset_base_parameters(self) -> None:
        self._transpose_weight()  # nn.Linear's fan-in is that of (out_features, in_features)
        super().lora_reset_base_parameters()
        self._transpose_weight()

    def lora_remove(self, restore_layout: bool = True) -> None:
        if restore_layout:
            self._transpose_weight()
        self.__dict__.pop("fan_in_fan_out", None)
        super().lora_remove()

    def _transpose_weight(self) -> None:
        """Between nn.Linear's layout and the other, where the layer has the other."""
        if self.fan_in_fan_out and self.lora_base_class is nn.Linear:
            self.weight.data = self.weight.data.T.contiguous()


class MergedLinearLoRA(LinearLoRA):
    """The kind for fused linear layers: A (G·r, in_features), B (out_features of the G enabled splits, r)."""

    splits: tuple[int, ...] = ()
    enable_lora: tuple[bool, ...] = ()

    lora_settings = (*LoRALayer.lora_settings, "splits", "enable_lora")

    @classmethod
    def lora_shapes(cls, base: nn.Module, r: int, **settings: Any) -> tuple[Shape, Shape]:
        splits, enable_lora = settings["splits"], settings["enable_lora"]
        in_features, out_features = cls.lora_features(base)
        if sum(splits) != out_features or any(size <= 0 for size in splits):
            raise ValueError(f"`splits` (={splits}) must be positive and add up to `out_features` (={out_features}).")
        if len(enable_lora) != len(splits):
            raise ValueError(f"`enable_lora` (={enable_lora}) must have one entry for each of the splits {splits}.")
        return (r * sum(enable_lora), in_features), (sum(compress(splits, enable_lora)), r)

    def lora_resize(self, size: int) -> None:
        if size != sum(self.splits):
            raise ValueError(
                f"`out_features` (={size}) must be the sum of `splits` (={self.splits}), which cannot follow; load the "
                "model again, and resize it before `lora.inject`."
            )

    def lora_slices(self) -> list[tuple[int, int]]:
        stops = accumulate(self.splits)
        return [(stop - size, stop) for size, stop in compress(zip(self.splits, stops, strict=True), self.enable_lora)]

    def lora_expand_to_outputs(self, adapted: Tensor, other: float = 0.0) -> Tensor:
        if all(self.enable_lora):
            return adapted
        parts = iter(torch.split(adapted, self.lora_block_rows()))
        every = zip(self.splits, self.enable_lora, strict=True)
        shape = adapted.shape[1:]
        return torch.cat(
            [next(parts) if enabled else adapted.new_full((size, *shape), other) for size, enabled in every]
        )

    def lora_single(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A stays, (G·r, in_features); B is block-diagonal, (out_features, G·r), and zero where nothing is enabled."""
        wide: Tensor = torch.block_diag(*torch.split(B, self.lora_block_rows()))  # type: ignore[no-untyped-call]
        return A, self.lora_expand_to_outputs(wide)


class Conv1DLoRA(LinearLoRA):
    """The kind for transformers' Conv1D (GPT-2), a linear layer whose weight is (in_features, out_features)."""

    fan_in_fan_out = True

    @classmethod
    def lora_features(cls, base: nn.Module) -> tuple[int, int]:
        weight: Any = base.weight
        return weight.shape[0], weight.shape[1]

    def __repr__(self) -> str:  # Conv1D's own leaves no room for more
        return f"{super().__repr__().removesuffix(')')}, {self.lora_repr()})"


class MergedConv1DLoRA(Conv1DLoRA, MergedLinearLoRA):
    """The kind for a fused Conv1D, such as GPT-2's c_attn."""


LinearLoRA.lora_merged_kind = MergedLinearLoRA
Conv1DLoRA.lora_merged_kind = MergedConv1DLoRA
register(nn.Linear, LinearLoRA)
register(Matrix, LinearLoRA)
register("transformers.pytorch_utils.Conv1D", Conv1DLoRA)


def split_settings(
    out_features: int, splits: Sequence[int] | None, enable_lora: bool | Sequence[bool | int]
) -> dict[str, Any]:
    """`splits` and `enable_lora` in the form that layers keep: tuples of ints and of bools."""
    if splits is not None and not (_is_sequence(splits) and all(isinstance(size, numbers.Integral) for size in splits)):
        raise ValueError(f"`splits` must be a list or a tuple of integers, got {short(splits)}.")
    if isinstance(enable_lora, bool):
        enable_lora = (enable_lora,) * len(splits or (0,))
    mask = tuple(enable_lora) if _is_sequence(enable_lora) else ()
    if not mask or any(entry not in (0, 1) for entry in mask):
        raise ValueError(f"`enable_lora` must hold at least one entry, each a bool, 0 or 1, got {short(enable_lora)}.")
    if splits is None:
        if out_features % len(mask):
            raise ValueError(
                f"`out_features` (={out_features}) must be divisible by the {len(mask)} entries of `enable_lora`; "
                "for uneven splits give `splits`."
            )
        splits = (out_features // len(mask),) * len(mask)
    return {"splits": tuple(int(size) for size in splits), "enable_lora": tuple(map(bool, mask))}


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


class Linear(LinearLoRA, nn.Linear):
    """A linear layer with a frozen weight and a trainable low-rank update.

        y = g ⊙ (x W₀ᵀ + s · drop(x) Aᵀ Bᵀ) + b        s = lora_alpha / r  (rsLoRA: lora_alpha / √r)

    and g = 1, or m / ‖W₀ + s · B A‖ for each output with DoRA.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        r: rank of the update; with 0 the layer is a plain, trainable `nn.Linear`. Default: 0.
        lora_alpha: numerator of the scaling. Default: 1.
        lora_dropout: probability of dropping an input feature on the LoRA path in training. Default: 0.
        fan_in_fan_out: store the weight as (in_features, out_features). Default: False.
        merge_weights: in `eval()` without gradients, compute from one merged weight, kept beside the base
            weight and brought up to date when the weight, A, B or the scaling change. Of what is written through
            `.data`, or by numpy, which torch does not count, a sample of 16 to 64 values of each tensor is compared on
            a CPU, and nothing elsewhere: after such a write call `train()` and `eval()` again. Default: True.
        use_rslora: scale by lora_alpha / √r (arXiv:2312.03732). Default: False.
        use_dora: train a magnitude m for each adapted output, starting at the norm of its weights
            (arXiv:2402.09353). Dropout is for the low-rank update alone. A weight
            that is set otherwise than by `load_state_dict` needs `layer.reset_magnitude()`. Default: False.
        init_lora_weights: how A and B start: True, "gaussian", "orthogonal", False (both random), or a function of the
            layer. Ways that need the pretrained weight or data: `lora.initialize`, `lora.calibrate`. Default: True.
        device, dtype, **kwargs: `device`, `dtype` and `bias` of `nn.Linear`.

    Parameters: `weight` (out_features, in_features), `bias` (out_features), `lora_A` (r, in_features),
    `lora_B` (out_features, r), with DoRA `lora_magnitude` (out_features).

    Input (..., in_features); returns (..., out_features).

    Raises:
        ValueError: `r`, `lora_alpha` or `lora_dropout` out of range.

    From "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.

    >>> import torch, lora
    >>> layer = lora.Linear(8, 4, r=2, lora_alpha=4)
    >>> layer(torch.ones(3, 8)).shape
    torch.Size([3, 4])
    >>> [name for name, p in layer.named_parameters() if name.startswith("lora_")]
    ['lora_A', 'lora_B']
    """

    lora_dense = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: Init = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, device=device, dtype=dtype, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self._transpose_weight()
        self.lora_add(r, lora_alpha, lora_dropout, merge_weights, use_rslora, use_dora, init_lora_weights)
        self.reset_parameters()


class MergedLinear(MergedLinearLoRA, nn.Linear):
    """Several linear layers fused into one, each with a low-rank update of its own, or none.

        y_g = x W₀_gᵀ + b_g + s · drop(x) A_gᵀ B_gᵀ    for each enabled split g of the output

    (With DoRA each output of an enabled split is scaled as in `lora.Linear`.)

    One product with the stacked A serves all splits; splits that are not enabled cost nothing.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample, all splits together.
        r: rank of each split's update. Default: 0.
        lora_alpha: numerator of the scaling lora_alpha / r. Default: 1.
        lora_dropout: probability of dropping an input feature on the LoRA path in training. Default: 0.
        enable_lora: which splits to adapt, as bools or 0/1; one bool speaks for all `splits`. With nothing
            enabled the layer is a plain, trainable `nn.Linear`. Default: [False].
        fan_in_fan_out: store the weight as (in_features, out_features). Default: False.
        merge_weights: as in `lora.Linear`. Default: True.
        splits: sizes of the splits, in order, uneven ones too (grouped-query attention). Default: equal
            parts, one for each entry of `enable_lora`.
        use_rslora: scale by lora_alpha / √r (arXiv:2312.03732). Default: False.
        use_dora: train a magnitude m for each adapted output, starting at the norm of its weights
            (arXiv:2402.09353). Dropout is for the low-rank update alone. Default: False.
        init_lora_weights: how A and B start: True, "gaussian", "orthogonal", False (both random), or a function of the
            layer. Ways that need the pretrained weight or data: `lora.initialize`, `lora.calibrate`. Default: True.
        device, dtype, **kwargs: `device`, `dtype` and `bias` of `nn.Linear`.

    Parameters, for G enabled splits: `weight` (out_features, in_features), `bias` (out_features), `lora_A`
    (G·r, in_features), `lora_B` (sum of the enabled splits' sizes, r), with DoRA `lora_magnitude` (the same sum).

    Input (..., in_features); returns (..., out_features).

    Raises:
        ValueError: `splits` do not add up to `out_features`, `enable_lora` does not fit them or divide it, or
            `r`, `lora_alpha` or `lora_dropout` is out of range.

    From "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.2.

    >>> import torch, lora
    >>> qkv = lora.MergedLinear(64, 64 + 16 + 16, r=4, enable_lora=[True, False, True], splits=(64, 16, 16))
    >>> qkv.lora_A.shape, qkv.lora_B.shape
    (torch.Size([8, 64]), torch.Size([80, 4]))
    >>> qkv(torch.ones(2, 5, 64)).shape
    torch.Size([2, 5, 96])
    """

    lora_dense = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: bool | Sequence[bool | int] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        splits: Sequence[int] | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: Init = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, device=device, dtype=dtype, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self._transpose_weight()
        fused = split_settings(out_features, splits, enable_lora)
        self.lora_add(r, lora_alpha, lora_dropout, merge_weights, use_rslora, use_dora, init_lora_weights, **fused)
        self.reset_parameters()
