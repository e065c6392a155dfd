"""LoRA for a linear layer of which each row of the input has an adapter of its own, or none.

The base's product is computed once, for all rows; what each adapter adds, for its own rows alone. Nothing of one
adapter is ever multiplied with, or added to, what is another's: not even by zero, which would carry a NaN across.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.functional.beside import plain_lora_beside
from lora.functional.fused import (
    Fused,
    FusedFunction,
    Noise,
    Slices,
    cast,
    fused_dtype,
    is_dense,
    seeded_dropout,
    without_autocast,
    without_input,
)
from lora.functional.linear import base
from lora.functional.stacked import Block, Stack
from lora.functional.update import add_update_, flat, update_backward

# ---- which rows are whose --------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """The rows of one adapter.

    Attributes:
        adapter: which adapter, by its place in the list of all.
        rows: where its rows are, among all rows, or among `Rows.scattered` if it has more than one run of them.
        gathered: whether `rows` means places among the scattered rows.
    """

    adapter: int
    rows: slice
    gathered: bool


class Rows:
    """Which adapter each row has; made once for a batch, and used by all layers.

    Attributes:
        count: how many rows there are.
        parts: a part for each adapter that has rows, in the adapters' order. Rows without an adapter are in none.
    """

    def __init__(self, count: int, parts: Sequence[Part], scattered: Sequence[int], each: int = 1) -> None:
        self.count = count
        self.parts = tuple(parts)
        self._scattered = scattered
        self._each = each  # how many rows each of `scattered` stands for
        self._indices: dict[torch.device, Tensor] = {}
        self._times: dict[int, Rows] = {}
        self._blocks: dict[tuple[int, ...] | None, Block] = {}

    @classmethod
    def of(cls, owners: Sequence[int | None]) -> Rows:
        """Rows of which these are the adapters: each the adapter's place in the list of all, or None.

        >>> from lora.functional import Rows
        >>> [part.adapter for part in Rows.of([3, 0, None, 3]).parts]
        [0, 3]
        """
        places: dict[int, list[int]] = {}
        for row, owner in enumerate(owners):
            if owner is not None:
                places.setdefault(owner, []).append(row)
        if any(owner < 0 for owner in places):
            raise ValueError(f"Rows.of: adapters are numbered from 0; got {sorted(o for o in places if o < 0)}.")
        parts: list[Part] = []
        scattered: list[int] = []
        for owner, rows in sorted(places.items()):
            gathered = rows[-1] - rows[0] >= len(rows)
            start = len(scattered) if gathered else rows[0]
            parts.append(Part(owner, slice(start, start + len(rows)), gathered))
            if gathered:
                scattered += rows
        return cls(len(owners), parts, scattered)

    def times(self, n: int) -> Rows:
        """The rows of a tensor in which n contiguous rows stand for each of these."""
        if n == 1:
            return self
        if n not in self._times:
            parts = [part._replace(rows=slice(n * part.rows.start, n * part.rows.stop)) for part in self.parts]
            self._times[n] = Rows(n * self.count, parts, self._scattered, n * self._each)
        return self._times[n]

    def scattered(self, device: torch.device) -> Tensor | None:
        """The rows of all adapters that have more than one run of them, adapter by adapter; None if there are none."""
        if not self._scattered:
            return None
        if device not in self._indices:
            with torch.inference_mode(False):  # a later batch may train, with the same rows
                index = torch.tensor(self._scattered, device=device)
                if self._each != 1:
                    index = (index[:, None] * self._each + torch.arange(self._each, device=device)).flatten()
            if torch.compiler.is_compiling():
                return index
            self._indices[device] = index
        return self._indices[device]

    def views(self, parts: Sequence[Part], x: Tensor, gathered: Tensor | None) -> list[Tensor]:
        """The rows of each part in x (N, features), of which `gathered` are the scattered rows."""
        return [(x if gathered is None or not part.gathered else gathered)[part.rows] for part in parts]

    def gather(self, x: Tensor) -> Tensor | None:
        """The scattered rows of x (N, features); None if there are none."""
        index = self.scattered(x.device)
        return None if index is None else x.index_select(0, index)

    def take(self, part: Part, x: Tensor) -> Tensor:
        """The rows of a part in x (N, features): a view of them, if they are one run."""
        return x[part.rows] if not part.gathered else x.index_select(0, self._index(part, x.device))

    def put_(self, part: Part, x: Tensor, taken: Tensor) -> None:
        """Write what was taken back into x; what is a view is there."""
        if part.gathered:
            x.index_copy_(0, self._index(part, x.device), taken)

    def _index(self, part: Part, device: torch.device) -> Tensor:
        index = self.scattered(device)
        assert index is not None, "the part is gathered"
        return index[part.rows]

    def block(self, parts: Sequence[Part]) -> Block:
        """The rows of these parts as a block."""
        key = None if len(parts) == len(self.parts) else tuple(part.adapter for part in parts)
        if key not in self._blocks:
            each = range(self._each)
            scattered = [row * self._each + i for row in self._scattered for i in each]
            self._blocks[key] = Block(
                [scattered[p.rows] if p.gathered else range(p.rows.start, p.rows.stop) for p in parts]
            )
        return self._blocks[key]

    def replaced(self, parts: Sequence[Part], x: Tensor, values: Sequence[Tensor]) -> Tensor:
        """x (N, …) in a new tensor, with these values in the place of the rows of each part."""
        gathered, index = self.gather(x), self.scattered(x.device)
        of_parts = [*zip(parts, values, strict=True)]
        if gathered is not None and index is not None:
            gathered = _exchanged(gathered, [(part.rows, value) for part, value in of_parts if part.gathered])
            x = x.index_copy(0, index, gathered)
        return _exchanged(x, [(part.rows, value) for part, value in of_parts if not part.gathered])

    def __repr__(self) -> str:
        return f"Rows(count={self.count}, parts={self.parts})"


def _exchanged(x: Tensor, values: list[tuple[slice, Tensor]]) -> Tensor:
    """x (N, …) with other values in these rows, in a new tensor, if there are any."""
    pieces, end = [], 0
    for rows, value in sorted(values, key=lambda pair: pair[0].start):
        pieces += [x[end : rows.start], value]
        end = rows.stop
    return torch.cat([*pieces, x[end:]]) if pieces else x


# ---- the function ----------------------------------------------------------------------------------------------------


class Update(NamedTuple):
    """What an adapter adds to a linear layer.

    Attributes:
        A: (G·r, in_features), for G slices.
        B: (sum of the slices' sizes, r).
        scaling: s.
        dropout: probability of dropping a value of x, as `lora_linear` takes it.
        slices: begin and end of the parts of the output to update, in order. Default: all of it, as one.
        seed: gives the seed of dropout; called once for each forward in which the adapter has rows, and not where
            nothing is dropped. Default: torch's default generator gives it.
    """

    A: Tensor
    B: Tensor
    scaling: float
    dropout: float | Tensor = 0.0
    slices: Slices | None = None
    seed: Callable[[], int] | None = None


def lora_linear_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[Update | None],
    rows: Rows,
    *,
    stack: Stack | None = None,
) -> Tensor:
    """A linear layer with a low-rank update for each row: several adapters in one batch, each for its own rows.

        y = x Wᵀ + b,    then for the rows R of the k-th adapter    y[R] += s_k · drop_k(x[R]) A_kᵀ B_kᵀ

    in slices of the output, as in `lora_linear`. Each adapter's update and gradients are what `lora_linear` computes
    of its rows alone, to the bit (to rounding, where no backward follows: there a few rows of many adapters are
    computed at once). What is not finite stays with the rows and the adapter that it is of. Adapters without rows take
    no part: their gradients stay None.

    Where the fused function does not apply (as in `lora_linear`) this is `plain_lora_linear_rows`; the two agree to
    rounding.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features), or None.
        updates: for each adapter what it adds; None for one that adds nothing to this layer.
        rows: which adapter each entry of x's first dimension has, or each entry of all but its last.
        stack: keeps A and B of several adapters in one tensor each, where a few rows are computed at once, and gives
            them. Default: they are stacked anew.

    Returns:
        y (..., out_features).

    Raises:
        ValueError: `rows` are not as many as x has, or are of an adapter that is not in `updates`.
        RuntimeError: the dtypes of x and weight differ, as `torch.nn.functional.linear` raises it.

    >>> import torch
    >>> from lora.functional import Rows, Update, lora_linear_rows
    >>> x, W, A, B = torch.ones(3, 8), torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2)
    >>> updates = [Update(A, B, scaling=0.5), Update(A, B, scaling=1.0)]
    >>> lora_linear_rows(x, W, None, updates, Rows.of([1, None, 0]))[:, 0]
    tensor([24.,  8., 16.])
    """
    rows, parts, present = _fit(x, updates, rows)
    if not present:
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():  # as when text is generated, where every microsecond shows
        y = _at_once(x, weight, bias, present, rows, parts, stack)
        if y is not None:
            return y
    fused = _choose(x, weight, bias, present)
    if fused is None:
        return plain_lora_linear_rows(x, weight, bias, updates, rows)
    plan, factors = _Plan(rows, parts, fused), [factor for update in present for factor in (update.A, update.B)]
    if torch.is_grad_enabled():
        return _LoRALinearRows.run(x, weight, bias, *factors, plan)
    with without_autocast(x.device):
        x = cast(x, plan.dtype)
        y = F.linear(x, cast(weight, x.dtype), cast(bias, x.dtype))  # (..., out_features)
        plan.add_updates_(flat(y), flat(x), factors)
        return y


def plain_lora_linear_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update | None], rows: Rows
) -> Tensor:
    """The equation of `lora_linear_rows` in operations that autograd knows.

    The `dropout` of an update may be what to multiply the adapter's rows of x by, (its rows, in_features).
    """
    rows, parts, present = _fit(x, updates, rows)
    y = F.linear(x, weight, bias)  # (..., out_features)
    if not present:
        return y
    x_, y_ = flat(x), flat(y)
    of_parts = zip(present, rows.views(parts, x_, rows.gather(x_)), rows.views(parts, y_, rows.gather(y_)), strict=True)
    sums = [
        plain_lora_beside(x_k, y_k, u.A, u.B, u.scaling, seeded_dropout(u.dropout, x_k, u.seed), u.slices)
        for u, x_k, y_k in of_parts
    ]
    return rows.replaced(parts, y_, sums).view(y.shape)


def _fit(x: Tensor, updates: Sequence[Update | None], rows: Rows) -> tuple[Rows, Sequence[Part], Sequence[Update]]:
    """The rows of x as (N, in_features); and the parts of those adapters that add something, with what they add."""
    N, first = x.shape[:-1].numel(), x.shape[0] if x.dim() > 1 else 1
    if rows.count not in (N, first):
        raise ValueError(
            f"lora_linear_rows: the rows must be as many as the input's: of an input of shape {tuple(x.shape)} "
            f"{' or '.join(map(str, dict.fromkeys((first, N))))}, not {rows.count}."
        )
    if rows.count != N:
        rows = rows.times(N // first)
    parts = rows.parts
    if parts and parts[-1].adapter >= len(updates):
        unknown = [part.adapter for part in parts if part.adapter >= len(updates)]
        raise ValueError(
            f"lora_linear_rows: there are {len(updates)} adapters, numbered from 0; rows are of {unknown}."
        )
    given = [updates[part.adapter] for part in parts]
    present = [update for update in given if update is not None]
    if len(present) < len(given):
        parts = tuple(part for part, update in zip(parts, given, strict=True) if update is not None)
    return rows, parts, present


def _choose(x: Tensor, weight: Tensor, bias: Tensor | None, present: Sequence[Update]) -> list[Fused] | None:
    """`choose` for several adapters at once; no seed is drawn where one of them cannot be fused."""
    dtype = fused_dtype(x, weight, bias, *(factor for update in present for factor in (update.A, update.B)))
    for p in (update.dropout for update in present):
        if dtype is None or isinstance(p, Tensor) or (p and not Noise.is_possible(p, x)):
            return None
    assert dtype is not None, "and there is an update"
    noises = (Noise.draw(p, x, seed) if (p := float(dropout)) else None for _, _, _, dropout, _, seed in present)
    whole = ((0, weight.shape[0]),)
    return [Fused(u.scaling, noise, dtype, u.slices or whole) for u, noise in zip(present, noises, strict=True)]


def _at_once(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    present: Sequence[Update],
    rows: Rows,
    parts: Sequence[Part],
    stack: Stack | None,
) -> Tensor | None:
    """`lora_linear_rows`, if it is to be computed at once, and can be."""
    As, Bs, scalings, dropouts, slices, _ = zip(*present, strict=True)
    dtype = fused_dtype(x, weight, bias)
    if dtype is None or not rows.count or any(isinstance(p, Tensor) or p for p in dropouts):
        return None
    block = rows.block(parts)
    if not block.pays(As, Bs, slices, kept=stack is not None):
        return None
    with without_autocast(x.device):
        A, B = (stack or Block.stack)(block, As, Bs)
        if not (is_dense(A) and is_dense(B)):  # what is stacked is what each of them is
            return None
        x = cast(x, dtype)
        y = F.linear(x, cast(weight, dtype), cast(bias, dtype))  # (..., out_features)
        block.add_updates_(flat(y), flat(x), A, B, scalings, slices[0] or ((0, weight.shape[0]),))
        return y


class _Plan(NamedTuple):
    """Which rows, and of whom, and how: for each adapter that adds something its part and its options."""

    rows: Rows
    parts: Sequence[Part]
    fused: Sequence[Fused]

    @property
    def dtype(self) -> torch.dtype:
        return self.fused[0].dtype

    def add_updates_(self, y: Tensor, x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
        """Add all updates of x (N, in_features) to y (N, out_features), in place; return each one's h."""
        hs = []
        for part, A, B, fused in zip(self.parts, factors[::2], factors[1::2], self.fused, strict=True):
            # One adapter after the other: its rows are still in the processor's cache when they are written back.
            y_k = self.rows.take(part, y)
            hs.append(add_update_(y_k, self.rows.take(part, x), A, B, fused))
            self.rows.put_(part, y, y_k)
        return hs


class _LoRALinearRows(FusedFunction):
    """`plain_lora_linear_rows`, fused. Saves x (if an A trains), h of each B that trains, and inputs, no copies.

    Its inputs are x, weight, bias, and A and B of each adapter that has rows, one after the other.
    """

    @classmethod
    def count(cls, ctx: Any) -> int:
        return len(ctx.needs_input_grad) - 1

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        factors, plan = rest[:-1], rest[-1]
        x_ = cast(x, plan.dtype)
        y = base(x_, weight, bias)
        hs: list[Tensor | None] = [*plan.add_updates_(flat(y), flat(x_), factors)]
        needs_A, needs_B = ctx.needs_input_grad[3:-1:2], ctx.needs_input_grad[4:-1:2]
        ctx.plan, ctx.unsaved = plan, ((x.shape, x.dtype),)
        hs = [h if needed else None for h, needed in zip(hs, needs_B, strict=True)]
        ctx.save_for_backward(x if any(needs_A) else None, weight, bias, *factors, *hs)
        return y

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
        plan: _Plan = ctx.plan
        n, rows = len(plan.parts), plan.rows
        x, weight, _, *rest = ctx.saved_tensors
        factors, hs = rest[: 2 * n], rest[2 * n :]
        needs_x, _, needs_bias, *needs = ctx.needs_input_grad[:-1]
        x_ = None if x is None else cast(flat(x), plan.dtype)
        dy_ = flat(dy)  # (N, out_features)
        dx = torch.mm(dy_, cast(weight, plan.dtype)) if needs_x else None  # (N, in_features)
        gradients: list[Tensor | None] = []
        for k, (part, fused) in enumerate(zip(plan.parts, plan.fused, strict=True)):
            A, B = factors[2 * k], factors[2 * k + 1]
            needs_A, needs_B = needs[2 * k], needs[2 * k + 1]
            if dx is None and not (needs_A or needs_B):
                gradients += None, None
                continue
            x_k = rows.take(part, x_) if needs_A and x_ is not None else None
            dx_k = None if dx is None else rows.take(part, dx)
            gradients += update_backward(rows.take(part, dy_), x_k, A, B, hs[k], dx_k, fused)
            if dx is not None and dx_k is not None:
                rows.put_(part, dx, dx_k)
        return None if dx is None else dx.view(ctx.unsaved[0][0]), None, dy_.sum(0) if needs_bias else None, *gradients

    @staticmethod
    def twin(ctx: Any, *inputs: Any) -> Tensor:
        needs = ctx.needs_input_grad[3:-1]
        if any(needs[1::2]) and not any(needs[::2]):
            raise without_input("plain_lora_linear_rows")
        plan: _Plan = ctx.plan
        x, weight, bias, *factors = (cast(tensor, plan.dtype) for tensor in inputs)
        updates: list[Update | None] = [None] * (1 + max(part.adapter for part in plan.parts))
        for k, (part, fused) in enumerate(zip(plan.parts, plan.fused, strict=True)):
            x_k = plan.rows.take(part, flat(x))
            dropout = fused.dropout(x_k, x_k)
            updates[part.adapter] = Update(factors[2 * k], factors[2 * k + 1], fused.scaling, dropout, fused.slices)
        return plain_lora_linear_rows(x, weight, bias, updates, plan.rows)
