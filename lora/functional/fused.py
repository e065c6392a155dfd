"""What all fused functions share: when one applies, in which dtype and with which dropout, and its two backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

Slices = Sequence[tuple[int, int]]  # begin and end of the parts of an output that an update goes to, in order
Maybe = TypeVar("Maybe", Tensor, Tensor | None)
_NOTHING = nullcontext()
_LEVELS = 256  # one random byte decides on one value
_CACHED = 2**20  # values of noise that stay in a processor's cache while they are used

# ---- tensors, as far as it matters to code that looks past autograd ------------------------------------------------


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary dense floating-point tensors with values, and nothing traces operations on them.

    Not plain are sharded, quantised, nested, sparse and meta tensors and subclasses; and any tensor under
    `torch.compile`, a function transform or forward-mode differentiation.
    """
    for tensor in tensors:  # a loop: with each token that is generated, a generator's overhead would show
        if tensor is not None and not is_dense(tensor):
            return False
    return not is_tracing()


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor, by itself, is plain."""
    kind = type(tensor)
    return (
        (kind is Tensor or kind is nn.Parameter)  # torch.compile follows no `in` of a set before torch 2.9
        and tensor.dtype.is_floating_point
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_meta)
    )


# These are asked with each token.
is_jit_tracing, _is_transforming = torch._C._is_tracing, torch._C._are_functorch_transforms_active


def is_tracing() -> bool:
    """Whether something traces operations: `torch.compile`, a function transform, forward-mode differentiation."""
    return torch.compiler.is_compiling() or is_jit_tracing() or _is_transforming() or forward_ad._current_level >= 0


def is_storage(dtype: torch.dtype) -> bool:
    """Whether this dtype only stores numbers, and nothing is computed in it: the float8 and float4 dtypes."""
    return dtype.is_floating_point and dtype.itemsize < 2


def refuse_storage(dtype: torch.dtype) -> None:
    """TypeError for a weight whose dtype only stores it, where it would be computed with."""
    if is_storage(dtype):
        raise TypeError(
            f"the base weight is stored in {dtype}, which nothing is computed in; before each forward the layer must "
            "be cast to the dtype of its input, as hooks for layerwise casting do, or the model once, by `model.to`."
        )


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in before rounding once to this one: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def cast(tensor: Maybe, dtype: torch.dtype) -> Maybe:
    """The tensor in this dtype; itself, without a call to torch, where it is."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def may_autocast() -> bool:
    """Whether autocast is on for some kind of device: quick to ask, but not where a compiler follows."""
    return torch._C._is_any_autocast_enabled()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which operations compute in the dtype of what they are given."""
    # Entering torch's own costs as much as a small product: only where it changes something.
    return torch.autocast(device.type, enabled=False) if autocasts(device) else _NOTHING


# ---- scaling where nothing overflows ---------------------------------------------------------------------------------
#
# float16 ends at 65,504, which s · A x and s · dy reach where s · B A x and s · Bᵀ dy do not: B starts at zero. So in
# float16 B is scaled, which is small. In other dtypes the product with B is scaled while it is added, and s · Bᵀ dy
# before it meets A. The gradient of B is scaled in B's own dtype.


def computes_in_float16(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of tensors of this dtype are computed in float16, be it by autocast."""
    return (torch.get_autocast_dtype(device.type) if autocasts(device) else dtype) == torch.float16


def spread(B: Tensor, scaling: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, float | Tensor]:
    """B in this dtype, and what is left to scale its product with h by: 1 in float16, where B itself is scaled."""
    if not computes_in_float16(dtype, B.device):
        return B.to(dtype), scaling
    return (B.to(exact_dtype(B.dtype)) * scaling).to(dtype), 1.0


def scaled_mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha · a b, in one operation."""
    if alpha == 1:
        return torch.mm(a, b)
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=alpha)  # with beta = 0 the first is not read


# ---- dropout that is drawn again in the backward pass instead of being remembered ------------------------------------


def replays(device: torch.device) -> bool:
    """Whether a generator that is made now, of a seed, draws the same numbers whenever it is made."""
    return device.type == "cpu" or (device.type == "cuda" and not torch.cuda.is_current_stream_capturing())


@dataclass(frozen=True)
class Noise:
    """The dropout of one forward pass over an x of shape (N, features), as the seed that it comes from.

    Attributes:
        dropped: how many of 256 levels of noise drop a value, 1 to 255.
        seed: by default drawn from torch's default generator, so that manual seeds and activation checkpointing
            replay it.
    """

    dropped: int
    seed: int

    @staticmethod
    def draw(p: float, x: Tensor, seed: Callable[[], int] | None = None) -> Noise | None:
        """Noise of a probability rounded to a multiple of 1/256; None where it would be 0 or 1, or has no replay.

        `seed` is asked for the seed only where there is noise; without it torch's default generator is.
        """
        if not Noise.is_possible(p, x):
            return None
        return Noise(round(p * _LEVELS), int(torch.randint(2**62, (), device="cpu")) if seed is None else seed())

    @staticmethod
    def is_possible(p: float, x: Tensor) -> bool:
        """Whether `draw` gives noise."""
        return 0 < round(p * _LEVELS) < _LEVELS and replays(x.device)

    @property
    def rescale(self) -> float:
        """What the values that are kept are multiplied by, for the expectation to be that without dropout."""
        return _LEVELS / (_LEVELS - self.dropped)

    def chunks(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Row by row of x (N, features), in chunks: which rows, and their noise (n, features) in x's dtype.

        The noise is written over by the next chunk, and may be written over by the caller.
        """
        rows, features = x.shape
        pieces = max(1, round(rows * features / _CACHED)) if x.device.type == "cpu" else 1
        step = max(1, -(-rows // pieces))  # of equal size: a small rest would cost as many calls as a whole chunk
        generator = torch.Generator(x.device).manual_seed(self.seed)
        words = torch.empty(min(step, rows), -(-features // 8), dtype=torch.int64, device=x.device)
        noise = x.new_empty(min(step, rows), features)
        for start in range(0, rows, step):
            n = min(step, rows - start)
            # Without bounds the top bit of each word would always be 0.
            bytes_ = words[:n].random_(-(2**63), None, generator=generator).view(torch.uint8)
            yield slice(start, start + n), noise[:n].copy_(bytes_[:, :features])

    def gate(self, x: Tensor, noise: Tensor, out: Tensor) -> Tensor:
        """x where the noise keeps it and 0 elsewhere, without the rescaling; `out` may be `noise` or `x` itself."""
        # One pass, 4 to 8 times faster on a CPU than `where` with a mask: x where noise > threshold, else 0.
        gated: Tensor = torch.ops.aten.threshold_backward.grad_input(x, noise, self.dropped - 1, grad_input=out)
        return gated

    def drop(self, x: Tensor) -> Tensor:
        """D ⊙ x in a new tensor, for x (N, features); of ones this is the mask D itself."""
        kept = torch.empty_like(x)
        for rows, chunk in self.chunks(x):
            self.gate(x[rows], chunk, out=kept[rows])
        return kept


def drop(x: Tensor, dropout: float | Tensor) -> Tensor:
    """x with dropout as a plain function takes it: a probability, or what to multiply x by."""
    if isinstance(dropout, Tensor):
        return x * dropout
    return F.dropout(x, dropout) if dropout else x


def seeded_dropout(dropout: float | Tensor, x: Tensor, seed: Callable[[], int] | None) -> float | Tensor:
    """The dropout of a plain function that drops what the fused one would, as far as a seed is given and can be."""
    if isinstance(dropout, Tensor) or not dropout or seed is None or not (is_plain(x) and replays(x.device)):
        return dropout
    noise = Noise.draw(dropout, x, seed)
    if noise is not None:
        return noise.drop(torch.ones_like(x)) * noise.rescale
    generator = torch.Generator(x.device).manual_seed(seed())
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= dropout
    return kept.to(x.dtype) / (1 - dropout or 1)


# ---- the harness -----------------------------------------------------------------------------------------------------


class Fused(NamedTuple):
    """The options of a fused function, whatever its kind of layer."""

    scaling: float
    noise: Noise | None
    dtype: torch.dtype
    slices: Slices

    @property
    def c(self) -> float:
        """The scaling, times the rescaling of dropout."""
        return self.scaling if self.noise is None else self.scaling * self.noise.rescale

    @property
    def alpha(self) -> float:
        """What a product with `up` is multiplied by while it is computed: c; 1 where B has it."""
        return 1.0 if self.dtype == torch.float16 else self.c

    def scaled_(self, dh: Tensor) -> Tensor:
        """c · dh, in place; in float16 as it is, since B has the scaling."""
        return dh if self.dtype == torch.float16 else dh.mul_(self.c)

    def up(self, B: Tensor) -> Tensor:
        """B to multiply h and dy by, in the dtype to compute in."""
        return spread(B, self.c, self.dtype)[0] if self.dtype == torch.float16 else cast(B, self.dtype)

    def of_B(self, dB: Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
        """The gradient of B, from dyᵀ h, in B's own dtype: written to `out`, or else to `dB`."""
        dB = cast(dB, B.dtype)
        return torch.mul(dB, self.c, out=dB if out is None else out)

    def of_B_scaled(self, dB: Tensor, B: Tensor) -> Tensor:
        """The same from alpha · dyᵀ h, which lacks c in float16 alone."""
        return self.of_B(dB, B) if self.dtype == torch.float16 else cast(dB, B.dtype)

    def dropout(self, x: Tensor, rows: Tensor) -> float | Tensor:
        """The `dropout` that makes a plain function drop the same values of x; `rows` is x as (N, features)."""
        if self.noise is None:
            return 0.0
        return self.noise.drop(torch.ones_like(rows)).view(x.shape) * self.noise.rescale


def choose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout: float,
    slices: Slices | None = None,
) -> Fused | None:
    """The options of the fused function for these tensors; None where only autograd's own operations will do."""
    dtype = fused_dtype(x, weight, bias, A, B)
    if dtype is None:
        return None
    slices = slices or ((0, weight.shape[0]),)
    return with_dropout(dropout, x, scaling, dtype, slices) if dropout else Fused(scaling, None, dtype, slices)


def with_dropout(
    dropout: float,
    x: Tensor,
    scaling: float,
    dtype: torch.dtype,
    slices: Slices,
    seed: Callable[[], int] | None = None,
) -> Fused | None:
    """The options with dropout; None where it has no replay."""
    noise = Noise.draw(dropout, x, seed)
    return None if noise is None else Fused(scaling, noise, dtype, slices)


def fused_dtype(x: Tensor, weight: Tensor, bias: Tensor | None, *adapter: Tensor) -> torch.dtype | None:
    """What a fused function computes in with these tensors; None where only autograd's own operations will do."""
    if weight.requires_grad or not is_plain(x, weight, bias, *adapter):
        return None
    autocast = autocast_dtype(x, weight) if may_autocast() else None
    if weight.dtype != x.dtype and autocast is None:
        refuse_storage(weight.dtype)
        return None  # the plain operations raise what torch's own layer raises
    return autocast or x.dtype


def autocast_dtype(*factors: Tensor) -> torch.dtype | None:
    """What autocast computes a product of these in; None where it leaves them as they are."""
    device = factors[0].device
    if not autocasts(device) or any(factor.dtype == torch.float64 for factor in factors):
        return None
    return torch.get_autocast_dtype(device.type)


class FusedFunction(torch.autograd.Function):
    """A plain function's twin with a hand-written backward. A subclass has `inputs`, the number of its tensors, and

        forward(ctx, *inputs, *options)    the value; saves all inputs first, and then what else `gradients` uses
        gradients(ctx, dy)                 the gradient of each input, None where none is needed
        twin(ctx, *inputs)                 the value in operations that autograd knows, for `backward` to be
                                           differentiated, or taken of many dy at once

    A function that is linear in its first inputs may save None for each, and what they were as `ctx.unsaved`: for each
    its shape and dtype.
    """

    inputs: ClassVar[int]

    @classmethod
    def count(cls, ctx: Any) -> int:
        """How many inputs this call had, where that is not the same for all calls."""
        return cls.inputs

    @classmethod
    def run(cls, x: Tensor, *arguments: Any) -> Tensor:
        """The value, which autograd knows a backward of."""
        with without_autocast(x.device):
            y: Tensor = cls.apply(x, *arguments)  # type: ignore[no-untyped-call]
        return y

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
        raise NotImplementedError

    @staticmethod
    def twin(ctx: Any, *inputs: Any) -> Tensor:
        raise NotImplementedError

    @classmethod
    def backward(cls, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs; None for each of the options."""
        with without_autocast(dy.device):
            gradients = cls._plain_backward(ctx, dy) if _needs_plain_backward(dy) else cls.gradients(ctx, dy)
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - cls.count(ctx))

    @classmethod
    @torch.enable_grad()
    def _plain_backward(cls, ctx: Any, dy: Tensor) -> list[Tensor | None]:
        """Autograd's own gradients of the twin, which can be differentiated."""
        count = cls.count(ctx)
        inputs, needs = list(ctx.saved_tensors[:count]), ctx.needs_input_grad[:count]
        for n, (shape, dtype) in enumerate(getattr(ctx, "unsaved", ())):
            if inputs[n] is None:
                # Not of dy, which may be many: then autograd would meet a value that is many, too.
                inputs[n] = torch.zeros(shape, dtype=dtype, device=dy.device, requires_grad=True)
        y = cls.twin(ctx, *inputs)
        wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
        gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
        return [next(gradients) if needed else None for needed in needs]


def without_input(plain: str) -> RuntimeError:
    """What to raise where a backward is differentiated that needs an input, which was not kept."""
    return RuntimeError(
        "differentiating twice, or for many output gradients at once, needs the layer's input, which is not kept while "
        f"lora_B trains and lora_A does not; let lora_A train, or compute with `lora.functional.{plain}`."
    )


def _needs_plain_backward(dy: Tensor) -> bool:
    """Whether a backward must be differentiable, or takes many output gradients at once (`is_grads_batched`)."""
    return torch.is_grad_enabled() or not is_plain(dy) or not _has_storage(dy)


def _has_storage(tensor: Tensor) -> bool:
    # Batches of `is_grads_batched` look like ordinary tensors and have none.
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
