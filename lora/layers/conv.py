"""LoRA for convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lora.functional import Geometry, lora_conv
from lora.functional.conv import CONVOLUTIONS
from lora.functional.fused import autocasts, computes_in_float16, exact_dtype, refuse_storage, spread, without_autocast
from lora.layers.in_place import LowRankWeight
from lora.layers.kind import Shape
from lora.layers.layer import LoRALayer
from lora.layers.registry import Kind, register
from lora.layers.starts import Init

# Values of a factored form, which is larger than the one it is made of: an adapter has some millions.
_MOST_VALUES = 2**31


class ConvLoRA(LoRALayer):
    """The kind for convolutions.

    factored: A is a convolution with r filters in the base's geometry, (r, in_channels / groups, *kernel), and B
    a convolution of kernel 1, (out_channels, r / groups, 1, …). Otherwise B A is a matrix that is reshaped to the
    weight, as in loralib: with n dimensions and k the kernel size, A is (r k^⌊n/2⌋, in_channels k^⌈n/2⌉) and B
    (out_channels / groups k^⌊n/2⌋, r k^⌊n/2⌋).
    """

    factored: bool = False

    lora_settings = (*LoRALayer.lora_settings, "factored")
    lora_taught: ClassVar[Mapping[Any, str]] = dict.fromkeys(CONVOLUTIONS.values(), "lora_taught_conv")

    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: Any
    padding: Any
    dilation: Any
    padding_mode: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        *,
        factored: bool = False,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: Init = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        sizes = in_channels, out_channels, kernel_size
        self.lora_base_class.__init__(self, *sizes, device=device, dtype=dtype, **kwargs)
        settings = lora_dropout, merge_weights, use_rslora, use_dora, init_lora_weights
        self.lora_add(r, lora_alpha, *settings, factored=factored)
        self.reset_parameters()

    @classmethod
    def lora_configure(cls, base: nn.Module, **wanted: Any) -> tuple[Kind, dict[str, Any]]:
        kind, settings = super().lora_configure(base, **wanted)
        return kind, settings | {"factored": wanted["factored"]}

    @classmethod
    def lora_shapes(cls, base: Any, r: int, factored: bool = False, **settings: Any) -> tuple[Shape, Shape]:
        kernel_size, groups, n = base.kernel_size, base.groups, len(base.kernel_size)
        if factored and r % groups:
            raise ValueError(f"`r` (={r}) must be divisible by `groups` (={groups}) when `factored=True`.")
        if factored:
            return (r, base.in_channels // groups, *kernel_size), (base.out_channels, r // groups, *(1,) * n)
        if r and len(set(kernel_size)) > 1:
            raise ValueError(
                f"`kernel_size` (={kernel_size}) must be the same in all dimensions when `factored=False`; "
                "pass `factored=True`, which takes any kernel."
            )
        rows, columns = kernel_size[0] ** (n // 2), kernel_size[0] ** (n - n // 2)
        return (r * rows, base.in_channels * columns), (base.out_channels // groups * rows, r * rows)

    def lora_down(self, x: Tensor, A: Tensor) -> Tensor:
        return self._convolve(x, A)  # (N, in_channels, *size) -> (N, r, *out_size)

    def lora_up(self, h: Tensor, B: Tensor) -> Tensor:
        convolution = CONVOLUTIONS[len(self.kernel_size)]
        return convolution(h, B, groups=self.groups)  # (N, r, *out_size) -> (N, out_channels, *out_size)

    def lora_delta(self, A: Tensor, B: Tensor) -> Tensor:
        if not self.factored:
            return (B @ A).view(self.weight.shape)
        A = A.reshape(self.groups, self.r // self.groups, -1)  # (groups, r / groups, in_channels / groups · k)
        B = B.reshape(self.groups, -1, self.r // self.groups)  # (groups, out_channels / groups, r / groups)
        return (B @ A).reshape(self.weight.shape)

    @classmethod
    def lora_magnitudes(cls, base: Any, shape_B: Shape) -> int:
        channels: int = base.out_channels
        return channels

    def lora_output_dims(self) -> tuple[int, int]:
        return 0, -1 - len(self.kernel_size)

    def lora_block_rows(self) -> list[int]:
        parts = self.groups if self.factored else 1
        return [self.lora_B.shape[0] // parts] * parts

    def lora_weight_blocks(self, weight: Tensor) -> Sequence[Tensor]:
        if not self.factored:  # B A lies in the weight value by value, its rows are not the weight's
            return [weight.reshape(self.lora_B.shape[0], self.lora_A.shape[1])]
        return super().lora_weight_blocks(weight)

    def lora_norms(self) -> Tensor:
        return super().lora_norms() if self.factored else self._dense_norms()

    @torch.no_grad()
    def _dense_norms(self) -> Tensor:
        """The norms of the sum itself: the update has no blocks in the weight's own rows."""
        weight = self.lora_base_weight()
        dtype = exact_dtype(weight.dtype)
        with without_autocast(weight.device):
            update = self.lora_delta(self.lora_A.to(dtype), self.lora_B.to(dtype))
        total: Tensor = weight.to(dtype) + self.lora_read_scaling() * update
        norm: Tensor = torch.linalg.vector_norm(total.flatten(1), dim=1)
        return norm

    def lora_forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # In lower precision the sum of both weights would lose much of the update.
        precise = self.weight.dtype in (torch.float32, torch.float64)
        one_convolution = precise and not autocasts(input.device) and not (self.lora_dropout and self.training)
        if self._fuses(input, one_convolution):
            dropout = self.lora_dropout if self.training else 0.0
            geometry = Geometry(self.stride, self.padding, self.dilation)
            A, B = self.lora_single(self.lora_A, self.lora_B)  # themselves, if they are factored
            return lora_conv(input, self.weight, self.bias, A, B, self.lora_scaling, geometry, dropout)
        if self.lora_dense and not precise:
            refuse_storage(self.weight.dtype)
        if self.factored or not self.lora_dense or not one_convolution:
            return super().lora_forward(input, *args, **kwargs)
        return self.lora_forward_with(
            input, self.weight + self._delta_like(self.weight, self.lora_B) * self.lora_scaling
        )

    def lora_taught_conv(
        self,
        W: LowRankWeight,
        input: Any,
        weight: Any,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        """W ∗ x + b, in the base class's own forward."""
        if weight is not W or not self.factored or groups != self.groups:
            return NotImplemented
        n = len(self.kernel_size)
        convolve: Any = CONVOLUTIONS[n]
        geometry: Any = [size if isinstance(size, str) else _for_each(size, n) for size in (stride, padding, dilation)]
        if groups == 1 and not isinstance(padding, str) and input.dim() == n + 2:
            y = lora_conv(input, W.base, bias, W.A, W.B, W.scaling, Geometry(*geometry), W.dropout)
        else:
            y = convolve(input, W.base, bias, *geometry, groups)  # (N, out_channels, *out_size)
            x = F.dropout(input, W.dropout)
            h = convolve(x, W.A.to(x.dtype), None, *geometry, groups)  # (N, r, *out_size)
            B, left = spread(W.B, W.scaling, h.dtype)
            y = y + (convolve(h, B, groups=groups) * left).to(y.dtype)
        return self.lora_magnified_beside(bias, y) if W.gain else y

    def _fuses(self, input: Tensor, one_convolution: bool) -> bool:
        """Whether the update is computed by filters of its own, beside the base's convolution.

        Where A and B are not factored they can be seen so, with q = r k^(2⌊n/2⌋) filters. What else there is takes
        `out_channels` of them: in one convolution, with the sum of both weights, whose gradient is as large, or in a
        second one. A step over the frozen layer's, 3×3, r = 4, q = 36, one thread, by filters and otherwise:

            256 channels  float32 1.43, 1.68  bfloat16 1.42, 2.67
            128 channels  float32 1.70, 1.54
             64 channels  float32 2.66, 1.68  bfloat16 2.55, 2.63
        """
        plain = self.groups == 1 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if not (plain and self.lora_dense and input.dim() == self.weight.dim()):
            return False
        q = self.lora_B.shape[1] * self.kernel_size[0] ** (len(self.kernel_size) // 2)
        return self.factored or q * (5 if one_convolution else 1) < self.out_channels

    def lora_update(self, input: Tensor, scaling: float | Tensor = 1.0) -> Tensor:
        if self.factored:
            return super().lora_update(input, scaling)
        B: Tensor = self.lora_B
        left = scaling
        if computes_in_float16(input.dtype, input.device):
            B, left = B.to(exact_dtype(B.dtype)) * scaling, 1.0
        return self._convolve(self.lora_drop(input), self._delta_like(input, B)) * left

    def lora_product(self, input: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return super().lora_product(input, A, B) if self.factored else self._convolve(input, self.lora_delta(A, B))

    def _delta_like(self, other: Tensor, B: Tensor) -> Tensor:
        dtype = self.lora_update_dtype(other)
        return self.lora_delta(self.lora_A.to(dtype), B.to(dtype)).to(other.dtype)

    def lora_forward_with(self, input: Tensor, weight: Tensor) -> Tensor:
        return self._convolve(input, weight, self.bias)

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A convolution in the base's geometry: its stride, padding and padding mode, dilation and groups."""
        output: Tensor = self._conv_forward(input, weight, bias)  # type: ignore[operator]
        return output

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # loralib keeps the base in a child called conv, and its parameters under their own names as well.
        *_, error_msgs = args
        for name in ("weight", "bias"):
            theirs, ours = f"{prefix}conv.{name}", f"{prefix}{name}"
            if theirs in state_dict:
                value = state_dict.pop(theirs)
                if not torch.equal(state_dict.setdefault(ours, value), value):
                    error_msgs.append(f"{theirs} and {ours} must be equal, being one parameter in loralib.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def lora_single(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """loralib's A (r m, in k^⌈n/2⌉) and B (out / groups m, r m), with m = k^⌊n/2⌋, as convolutions.

        In B A the m rows of an output channel stand side by side in the kernel; with groups, `groups` output channels
        stand side by side in what would be one.
        """
        if self.factored:
            return A, B
        groups, kernel = self.groups, self.kernel_size
        m = kernel[0] ** (len(kernel) // 2)
        values = groups**2 * m**2 * A.numel()
        if values > _MOST_VALUES:
            raise ValueError(f"as a factored convolution it would have {values} values.")
        blocks: Tensor = torch.block_diag(*[A] * m)  # type: ignore[no-untyped-call]  # (m·r m, in·k^n)
        q = blocks.shape[0]
        parts = blocks.view(q, groups, -1).transpose(0, 1).reshape(groups * q, -1)  # (groups·q, in / groups·k^n)
        up = B.reshape(-1, 1, 1, q) * torch.eye(groups, dtype=B.dtype, device=B.device).view(1, groups, groups, 1)
        up = up.reshape(-1, groups * q)  # (out, groups·q): channel o'·groups + γ reads the γ-th part
        A = parts.repeat(groups, 1).view(-1, self.in_channels // groups, *kernel)
        return A, up.view(*up.shape, *[1] * len(kernel))


class Conv1d(ConvLoRA, nn.Conv1d):
    """A one-dimensional convolution with a frozen weight and a trainable low-rank update.

    Equation, arguments, errors and origin are `lora.Conv2d`'s. loralib's Conv1d fails for kernels above 1; here A
    is (r, in_channels · k) and B (out_channels / groups, r), which are loralib's shapes where k = 1.

    Input (N, in_channels, L) or (in_channels, L); returns (N, out_channels, L_out) or (out_channels, L_out).

    >>> import torch, lora
    >>> lora.Conv1d(4, 6, 3, r=2, padding=1)(torch.ones(1, 4, 10)).shape
    torch.Size([1, 6, 10])
    """

    lora_dense = True


class Conv2d(ConvLoRA, nn.Conv2d):
    """A two-dimensional convolution with a frozen weight and a trainable low-rank update.

        y = W₀ ∗ x + b + s · B ∗ (A ∗ drop(x))        factored: A has r filters, B a kernel of 1
        y = W₀ ∗ x + b + s · reshape(B A) ∗ drop(x)   otherwise, as in loralib
        s = lora_alpha / r  (rsLoRA: lora_alpha / √r)

    With DoRA y − b is scaled for each output channel, by m / ‖W₀ + s · B A‖.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: a number, or one for each dimension.
        r: rank of the update; with 0 the layer is a plain, trainable convolution. Default: 0.
        lora_alpha: numerator of the scaling. Default: 1.
        lora_dropout: probability of dropping an input value on the LoRA path in training. Default: 0.
        merge_weights: as in `lora.Linear`. Default: True.
        factored: make A a convolution with r filters in the base's geometry and B a 1×1 convolution: cheaper in
            training, and the form that PEFT and the diffusion tools exchange. Default: False.
        use_rslora: scale by lora_alpha / √r (arXiv:2312.03732). Default: False.
        use_dora: train a magnitude m for each output channel, as in `lora.Linear`. Default: False.
        init_lora_weights: how A and B start, as in `lora.Linear`. Default: True.
        device, dtype, **kwargs: `device`, `dtype`, `stride`, `padding`, `dilation`, `groups`, `bias` and
            `padding_mode` of `nn.Conv2d`.

    Parameters: `weight` (out_channels, in_channels / groups, kh, kw) and `bias` (out_channels); factored `lora_A`
    (r, in_channels / groups, kh, kw) and `lora_B` (out_channels, r / groups, 1, 1), otherwise `lora_A`
    (r k, in_channels k) and `lora_B` (out_channels / groups k, r k); with DoRA `lora_magnitude` (out_channels).

    Input (N, in_channels, H, W) or (in_channels, H, W); returns (N, out_channels, H_out, W_out) or
    (out_channels, H_out, W_out).

    Raises:
        ValueError: the kernel is not square and `factored` is False, `groups` does not divide `r` and `factored`
            is True, or `r`, `lora_alpha` or `lora_dropout` is out of range.

    From "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, and loralib, which applies it to
    convolutions.

    >>> import torch, lora
    >>> layer = lora.Conv2d(4, 6, (3, 5), r=2, padding="same", factored=True)
    >>> layer(torch.ones(1, 4, 8, 8)).shape
    torch.Size([1, 6, 8, 8])
    """

    lora_dense = True


class Conv3d(ConvLoRA, nn.Conv3d):
    """A three-dimensional convolution with a frozen weight and a trainable low-rank update.

    Equation, arguments, errors and origin are `lora.Conv2d`'s. loralib's Conv3d fails for kernels above 1; here A
    is (r k, in_channels k²) and B (out_channels / groups k, r k), which are loralib's shapes where k = 1.

    Input (N, in_channels, D, H, W) or (in_channels, D, H, W); returns the same with out_channels.

    >>> import torch, lora
    >>> lora.Conv3d(2, 3, 3, r=2, padding=1)(torch.ones(1, 2, 4, 4, 4)).shape
    torch.Size([1, 3, 4, 4, 4])
    """

    lora_dense = True


def _for_each(size: Any, n: int) -> tuple[int, ...]:
    """A size for each of n dimensions."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * n if len(sizes) == 1 else sizes


for _base in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(_base, ConvLoRA)
