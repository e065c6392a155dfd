"""W in the place of a stack of matrices: of experts, of which each token meets a few.

    W_e = g_e ⊙ (W₀_e + s · B_e A_e)        for each matrix e of (E, out, in)

What a module picks out of it, turns or cuts is such a value again, and a product with it is computed beside that with
W₀: of no matrix is the update ever built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.functional import lora_linear
from lora.functional.fused import autocasts, drop, exact_dtype, spread, without_autocast
from lora.functional.grouped import lora_grouped
from lora.functional.magnitude import magnify
from lora.layers.in_place import LowRankWeight


class LowRankStack(LowRankWeight):
    """W = row_gain ⊙ (W₀ + s · left right) ⊙ column_gain, for matrices (..., rows, columns) as they lie in memory.

    Args:
        layer: whose weight it is, a `StackLoRA`; its dropout is that of each product's inputs.
        A, B: (E, r, in) and (E, out, r).
        scaling, gain, dropout, base: as of a `LowRankWeight`.
    """

    left: Tensor  # (..., rows, r)
    right: Tensor  # (..., r, columns)
    row_gain: Tensor | None = None  # (..., rows)
    column_gain: Tensor | None = None  # (..., columns)
    # Each matrix's own factors, where they have been asked for one by one.
    _apart: tuple[tuple[Tensor, ...], ...] | None = None

    def __init__(
        self,
        layer: Any,
        A: Tensor,
        B: Tensor,
        scaling: float,
        *,
        gain: bool = False,
        dropout: float = 0.0,
        base: Tensor | None = None,
    ) -> None:
        super().__init__(layer, A, B, scaling, gain=gain, dropout=dropout, base=base)
        gains = layer.lora_output_gains() if gain else None  # (E, out)
        B = layer.lora_wide(B)
        if layer.fan_in_fan_out:
            self.left, self.right, self.column_gain = A.mT, B.mT, gains
        else:
            self.left, self.right, self.row_gain = B, A, gains

    def _changed(self, base: Tensor, **parts: Tensor | None) -> LowRankStack:
        """The same with other parts."""
        value = object.__new__(type(self))
        vars(value).update(vars(self), base=base, _apart=None, **parts)
        return value

    def with_base(self, base: Tensor) -> LowRankStack:
        return self._changed(base)

    def dense(self, why: str = "an operation that is not known") -> Tensor:
        self._no_dropout(why)
        exact = exact_dtype(self.base.dtype)
        with without_autocast(self.base.device):
            update = self.left.to(exact) @ self.right.to(exact) * self.scaling
            W = self.base.to(exact) + update
            W = W if self.row_gain is None else W * self.row_gain.to(exact)[..., None]
            W = W if self.column_gain is None else W * self.column_gain.to(exact)[..., None, :]
        return W.to(self.base.dtype)

    # ---- parts of it -------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    def __getitem__(self, index: Any) -> Any:
        whole = self.base.dim()
        picks, rows, columns = _split_index(index, whole - 2)
        if rows is None:
            return self.dense("indexing")[index]
        if whole == 3 and _is_number(picks) and not torch.compiler.is_compiling():
            value = self._one(int(picks))
        else:
            value = self._changed(self.base[picks], **{name: part[picks] for name, part in self._parts()})
        return value if rows == columns == slice(None) else value._cut(rows, columns)

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        names = ("left", "right", "row_gain", "column_gain")
        return ((name, part) for name in names if (part := getattr(self, name)) is not None)

    def _one(self, e: int) -> LowRankStack:
        """One matrix. Its factors are taken apart all at once: backward then puts their gradients together once."""
        base = self.base[e]
        if self._apart is None:
            self._apart = tuple(part.unbind() for _, part in self._parts())
        names = (name for name, _ in self._parts())
        return self._changed(base, **{name: parts[e] for name, parts in zip(names, self._apart, strict=True)})

    def _cut(self, rows: slice, columns: slice) -> LowRankStack:
        """Some rows and columns of each matrix."""
        row_gain = None if self.row_gain is None else self.row_gain[..., rows]
        column_gain = None if self.column_gain is None else self.column_gain[..., columns]
        parts = {"left": self.left[..., rows, :], "right": self.right[..., columns]}
        return self._changed(self.base[..., rows, columns], **parts, row_gain=row_gain, column_gain=column_gain)

    def _along(self, dim: int, start: int, stop: int) -> LowRankStack:
        index = [slice(None)] * self.base.dim()
        index[dim] = slice(start, stop)
        cut: LowRankStack = self[tuple(index)]
        return cut

    def split(self, split_size: int | list[int], dim: int = 0) -> tuple[LowRankStack, ...]:
        """W in parts of these sizes, along a dimension."""
        whole, sizes = self.shape[dim], split_size
        if isinstance(sizes, int):
            sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)]
        if sum(sizes) != whole:
            raise ValueError(f"`split`: the sizes {sizes} must add up to {whole}, the size of dimension {dim}.")
        return tuple(self._along(dim, stop - size, stop) for size, stop in zip(sizes, accumulate(sizes), strict=True))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[LowRankStack, ...]:
        """W in so many parts along a dimension."""
        return self.split(-(-self.shape[dim] // chunks), dim)

    def narrow(self, dim: int, start: int, length: int) -> LowRankStack:
        """A part of W along a dimension."""
        start = start + self.shape[dim] if start < 0 else start
        return self._along(dim, start, start + length)

    def unbind(self, dim: int = 0) -> Any:
        """The matrices one by one."""
        return tuple(self) if dim == 0 and self.base.dim() == 3 else self.dense("unbind").unbind(dim)

    def __iter__(self) -> Any:
        return map(self.__getitem__, range(len(self))) if self.base.dim() == 3 else iter(self.dense("iteration"))

    def index_select(self, dim: int, index: Tensor) -> Any:
        """Some of the matrices."""
        return self[index] if dim == 0 and self.base.dim() == 3 else self.dense("index_select").index_select(dim, index)

    def t(self) -> Any:
        return self.mT if self.base.dim() == 2 else self.dense("t").t()

    @property
    def T(self) -> Any:
        return self.mT if self.base.dim() == 2 else self.dense("T").T

    @property
    def mT(self) -> LowRankStack:
        """Each matrix transposed."""
        gains = {"row_gain": self.column_gain, "column_gain": self.row_gain}
        return self._changed(self.base.mT, left=self.right.mT, right=self.left.mT, **gains)

    def transpose(self, dim0: int, dim1: int) -> Any:
        n = self.base.dim()
        last = {dim0 % n, dim1 % n} == {n - 2, n - 1}
        return self.mT if last else self.dense("transpose").transpose(dim0, dim1)

    swapaxes = swapdims = transpose

    def permute(self, *dims: Any, **named: Any) -> Any:
        """W with its dimensions in another order."""
        given = named.get("dims") or (dims[0] if isinstance(dims[0], (tuple, list)) else dims)
        order, n = [d % self.base.dim() for d in given], self.ndim
        last = order == [*range(n - 2), n - 1, n - 2]
        return self.mT if last else self.dense("permute").permute(order)

    def contiguous(self, **named: Any) -> LowRankStack:
        """W₀ in one piece: a product with W does not ask more."""
        return self._changed(self.base.contiguous(**named))

    def data_ptr(self) -> int:
        """0: W is nowhere. transformers asks whether it is aligned."""
        return 0

    # ---- products with it ----------------------------------------------------------------------------------------

    def taught(self, function: Any) -> Callable[..., Any] | None:
        own = isinstance(function, torch._ops.OpOverloadPacket)  # it is of a package's own, and has a name
        name = _TAUGHT.get(str(function) if own else function)
        return None if name is None else partial(getattr(self, name), function)

    def _linear(self, function: Any, input: Any, weight: Any, bias: Tensor | None = None) -> Any:
        """x Wᵀ + b."""
        if weight is not self or self.base.dim() != 2 or not isinstance(input, Tensor):
            return NotImplemented
        return self.mT._after(input, bias)

    def _after(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W + b, for one matrix W."""
        x = x if self.row_gain is None else _scaled(x, self.row_gain)
        y = lora_linear(x, self.base.mT, bias, self.left.mT, self.right.mT, self.scaling, self.dropout)
        if self.column_gain is None:
            return y
        return magnify(y, self.column_gain.to(exact_dtype(y.dtype)), None if bias is None else bias.to(y.dtype))

    def _product(self, function: Any, one: Any = None, other: Any = None, **named: Any) -> Any:
        """W x or x W."""
        one = named.pop("input", named.pop("self", one))
        other = named.pop("other", named.pop("mat2", other))
        if named or not (isinstance(one, Tensor) or isinstance(other, Tensor)):
            return NotImplemented
        if function is Tensor.__rmatmul__:
            one, other, function = other, one, torch.matmul
        x = other if one is self else one
        if x.dim() == 1:
            return NotImplemented
        if one is not self:
            return self._after(x) if self.base.dim() == 2 else self._beside(x, partial(function))
        turned: LowRankStack = self.mT
        if self.base.dim() == 2 and x.dim() == 2:
            return turned._after(x.mT).mT
        # (..., rows, columns) (..., columns, n): as (xᵀ Wᵀ)ᵀ, whose operands are those of W x.
        return turned._beside(x.mT, lambda x, base: function(base.mT, x.mT).mT).mT

    def _beside(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """x W, for stacks of matrices, and what computes x W₀."""
        x = x if self.row_gain is None else _scaled(x, self.row_gain[..., None, :])
        y = product(x, self.base)  # (..., n, columns)
        device = x.device
        dtype = torch.get_autocast_dtype(device.type) if autocasts(device) and x.dtype != torch.float64 else x.dtype
        with without_autocast(device):
            right, rest = spread(self.right, self.scaling, dtype)
            h = torch.matmul(drop(x, self.dropout).to(dtype), self.left.to(dtype))  # (..., n, r)
            y = y + (torch.matmul(h, right) * rest).to(y.dtype)
            return y if self.column_gain is None else _scaled(y, self.column_gain[..., None, :])

    def _added(self, function: Any, *args: Any, **named: Any) -> Any:
        """b + x W, or b + W x."""
        if named or len(args) != 3 or args[0] is self:
            return NotImplemented
        product = self._product(torch.bmm if function in (torch.baddbmm, Tensor.baddbmm) else torch.mm, *args[1:])
        return NotImplemented if product is NotImplemented else args[0] + product

    def _grouped(self, function: Any, input: Any, weight: Any = None, offs: Any = None, **named: Any) -> Any:
        """x W_e for the rows of x before the e-th of `offs`, and not before the one before."""
        weight = named.pop("mat2", named.pop("mat_b", weight))
        given = [value for value in named.values() if value is not None]
        if weight is not self or self.base.dim() != 3 or given or offs is None or input.dim() != 2:
            return NotImplemented

        def product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
            y: Tensor = function(x, weight, offs=ends)
            return y

        x = input if self.row_gain is None else _scaled(input, _by_rows(self.row_gain, offs, len(input)))
        y = lora_grouped(x, self.base, self.left, self.right, self.scaling, offs, product, self.dropout)
        return y if self.column_gain is None else _scaled(y, _by_rows(self.column_gain, offs, len(input)))

    def _method(self, function: Any, input: Any, *args: Any, **named: Any) -> Any:
        """What W has as a method of that name."""
        if "split_size_or_sections" in named:
            named["split_size"] = named.pop("split_size_or_sections")
        return getattr(self, function.__name__)(*args, **named) if input is self else NotImplemented


# What computes each function of W beside W₀: methods of a `LowRankStack`.
_TAUGHT: dict[Any, str] = {
    F.linear: "_linear",
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), "_product"),
    **dict.fromkeys((Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__), "_product"),
    **dict.fromkeys((torch.baddbmm, torch.addmm, Tensor.baddbmm, Tensor.addmm), "_added"),
    **dict.fromkeys(
        (torch.transpose, torch.swapaxes, torch.swapdims, torch.permute, torch.t, torch.chunk, torch.split), "_method"
    ),
    **dict.fromkeys((torch.narrow, torch.unbind, torch.index_select), "_method"),
    # Not all versions of torch have these; the last is transformers', which need not be there.
    **{getattr(torch, name): "_grouped" for name in ("_grouped_mm",) if hasattr(torch, name)},
    **{getattr(F, name): "_grouped" for name in ("grouped_mm",) if hasattr(F, name)},
    "transformers.grouped_mm_fallback": "_grouped",
}


def _scaled(x: Tensor, gain: Tensor) -> Tensor:
    """Magnitudes are exact: their product is rounded once."""
    return (x * gain.to(exact_dtype(x.dtype))).to(x.dtype)


def _by_rows(gain: Tensor, ends: Tensor, rows: int) -> Tensor:
    """Of gains (E, n) those of each row's group (rows, n); rows in none have the last."""
    of = torch.searchsorted(ends, torch.arange(rows, device=ends.device, dtype=ends.dtype), right=True)
    return gain[of.clamp(max=len(gain) - 1)]


def _is_number(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.dim() == 0 and not index.dtype.is_floating_point and index.dtype != torch.bool
    return isinstance(index, int) and not isinstance(index, bool)


def _split_index(index: Any, leading: int) -> tuple[Any, slice | None, slice]:
    """What an index picks of the leading dimensions, and the rows and columns of each matrix.

    None for the rows if it picks otherwise.
    """
    whole = slice(None)
    entries: list[Any] = list(index) if isinstance(index, tuple) else [index]
    dots = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    if dots:
        entries[dots[0] : dots[0] + 1] = [whole] * (leading + 3 - len(entries))
    simple = all(isinstance(entry, (slice, Tensor)) or _is_number(entry) for entry in entries)
    if len(entries) > leading + 2 or len(dots) > 1 or not simple or any(_is_mask(entry, leading) for entry in entries):
        return index, None, whole
    entries += [whole] * (leading + 2 - len(entries))
    *picks, rows, columns = entries
    if not (isinstance(rows, slice) and isinstance(columns, slice)):
        return index, None, whole
    return (tuple(picks) if len(picks) != 1 else picks[0]), rows, columns


def _is_mask(entry: Any, leading: int) -> bool:
    """Whether it is a mask of more than one dimension."""
    return isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8) and entry.dim() != 1
