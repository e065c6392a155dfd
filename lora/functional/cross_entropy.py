"""Cross entropy over a frozen language model's head as a function: no logits are kept, and few are there at a time.

A head makes a number for each word of the vocabulary from each token: the largest tensor of a training step, and with
its softmax and gradient there are three of them. Over a frozen head all that backward needs is the gradient of the
hidden states, and that can be computed when the logits are there, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora.errors import is_number
from lora.functional.fused import FusedFunction, autocast_dtype, cast, exact_dtype, is_plain, without_autocast

REDUCTIONS = ("mean", "sum", "none")
# Logits at a time: with fewer rows, products would read all of the weight for little work; 32 MiB of float32 on a CPU.
_LOGITS = {"cpu": 2**23}
_LOGITS_ELSEWHERE = 2**25
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
) -> Tensor:
    """The cross entropy of a frozen linear layer's outputs, without ever having all of them.

        z = hidden Wᵀ + b        loss_n = log Σ_v exp z_nv − z_n,labels[n]

    With `softcap` = c it is that of c · tanh(z / c), as of models whose `final_logit_softcapping` is c (Gemma 2).

    The rows go through the layer in chunks. What is kept for backward is the gradient of `hidden`, of its size and
    dtype, and nothing as large as the outputs; the softmax is computed in float32, or float64. Rows with the label
    `ignore_index` have the loss 0 and the gradient 0, but are computed: where many are, select the others before.

    Where the fused function does not apply (a weight or bias that trains, subclassed tensors, `torch.compile`, function
    transforms) this is `plain_linear_cross_entropy`, which has all outputs at once; the two agree to rounding.

    The weight must be all that the layer is. Of a layer with LoRA `layer.weight` is the base's: compute
    `torch.nn.functional.cross_entropy(layer(hidden), labels)` there.

    Args:
        hidden: (..., in_features).
        weight: (classes, in_features).
        labels: (...), integers from 0 to classes − 1, or `ignore_index`.
        bias: (classes), or None. Default: None.
        ignore_index: the label of rows that do not count. Default: -100.
        reduction: "mean" over the rows that count (NaN if none does), "sum", or "none": one loss for each row, from
            which a mean over each of several sequences can be taken. Default: "mean".
        softcap: what the size of outputs is bounded by, above 0; or None. Default: None.

    Returns:
        The loss () or, with "none", the losses (...), in float32, or float64 for float64.

    Raises:
        ValueError: the shape of labels is not that of hidden without its last dimension, reduction is another word, or
            softcap is neither None nor a number above 0 in the range of float32.
        IndexError: a label is out of range, as `torch.nn.functional.cross_entropy` raises it.
        RuntimeError: the dtypes of hidden and weight differ, as `torch.nn.functional.linear` raises it; or the loss is
            differentiated twice, which only the plain function can be.

    From "Gemma 2: Improving Open Language Models at a Practical Size", arXiv:2408.00118, section 2: the soft cap.

    >>> import torch, lora.functional
    >>> hidden, head, labels = torch.zeros(2, 3, 4), torch.ones(8, 4), torch.tensor([[1, 2, 3], [4, -100, -100]])
    >>> lora.functional.linear_cross_entropy(hidden, head, labels)
    tensor(2.0794)
    >>> lora.functional.linear_cross_entropy(hidden, head, labels, reduction="none").sum(1)
    tensor([6.2383, 2.0794])
    >>> lora.functional.linear_cross_entropy(hidden + 100, head, labels, softcap=30)
    tensor(2.0794)
    """
    _check(hidden, labels, reduction, softcap)
    dtype = _dtype(hidden, weight, labels, bias)
    if dtype is None:
        return plain_linear_cross_entropy(hidden, weight, labels, bias, ignore_index, reduction, softcap)
    if torch.is_grad_enabled() and hidden.requires_grad:
        losses = _LinearCrossEntropy.run(hidden, weight, labels, bias, ignore_index, softcap, dtype)  # (N)
    else:
        with without_autocast(hidden.device):
            losses, _ = _forward(hidden, weight, labels, bias, ignore_index, softcap, dtype, False)
    if reduction == "none":
        return losses.view(labels.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


def plain_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
) -> Tensor:
    """The equation of `linear_cross_entropy` in operations that autograd knows."""
    _check(hidden, labels, reduction, softcap)
    logits = F.linear(hidden, weight, bias)  # (..., classes)
    rows = cast(logits, exact_dtype(logits.dtype)).reshape(labels.numel(), logits.shape[-1])
    if softcap is not None:
        rows = softcap * torch.tanh(rows / softcap)
    loss = F.cross_entropy(rows, labels.reshape(-1), ignore_index=ignore_index, reduction=reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


def _check(hidden: Tensor, labels: Tensor, reduction: str, softcap: float | None) -> None:
    if reduction not in REDUCTIONS:
        words = ", ".join(map(repr, REDUCTIONS))
        raise ValueError(f"linear_cross_entropy: reduction must be one of {words}, got {reduction!r}.")
    if softcap is not None and not (is_number(softcap) and _SMALLEST <= softcap <= _LARGEST):
        raise ValueError(
            "linear_cross_entropy: softcap must be None or a number above 0 that float32 can hold, "
            f"from {_SMALLEST:.3g} to {_LARGEST:.3g}; got {softcap!r}."
        )
    if hidden.dim() == 0 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            "linear_cross_entropy: labels must have the shape of hidden without its last dimension; "
            f"hidden is {tuple(hidden.shape)}, labels are {tuple(labels.shape)}."
        )


def _dtype(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """What the fused function computes products in; None where only autograd's own operations will do."""
    trains = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    ids = type(labels) is Tensor and labels.dtype == torch.int64 and not labels.is_meta
    if trains or not ids or not is_plain(hidden, weight, bias):
        return None
    if (autocast := autocast_dtype(hidden, weight)) is not None:
        return autocast
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        return None  # the plain operations raise what torch's own layer raises
    return hidden.dtype


class _LinearCrossEntropy(FusedFunction):
    """The losses (N) of `plain_linear_cross_entropy`, fused. Saves each row's own gradient, and labels.

    Row n's loss depends on no other row, so that a gradient that comes from above only scales it:

        p = softmax z        dhidden_n = dloss_n · (p_n − onehot(labels[n])) W

    and with a soft cap c, z = c · tanh(u / c), dhidden_n = dloss_n · ((p_n − onehot(labels[n])) ⊙ (1 − (z_n / c)²)) W.
    """

    inputs = 1

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        softcap: float | None,
        dtype: torch.dtype,
    ) -> Tensor:
        losses, gradient = _forward(hidden, weight, labels, bias, ignore_index, softcap, dtype, True)
        ctx.ignore_index, ctx.shape = ignore_index, hidden.shape
        ctx.save_for_backward(gradient, labels)
        return losses

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
        gradient, labels = ctx.saved_tensors
        ignored = labels.reshape(-1, 1) == ctx.ignore_index  # (N, 1)
        # Not by a factor of 0: where no row counts, dy is 1/0 of a mean.
        dhidden = (gradient * dy.unsqueeze(-1)).masked_fill(ignored, 0)  # (N, in_features)
        return (dhidden.view(ctx.shape),)  # autograd casts it to hidden's dtype

    @classmethod
    def _plain_backward(cls, ctx: Any, dy: Tensor) -> list[Tensor | None]:
        """Of many dy at once, the same; what the gradient depends on was not kept."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy cannot be differentiated twice; "
                "compute with `lora.functional.plain_linear_cross_entropy`."
            )
        return list(cls.gradients(ctx, dy))


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    dtype: torch.dtype,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The losses (N) and, if needed, the gradient of each by its own row (N, in_features), not scaled by anything."""
    N, classes, exact = labels.numel(), weight.shape[0], exact_dtype(dtype)
    weight, bias = cast(weight, dtype), cast(bias, dtype)
    rows, labels = cast(hidden, dtype).reshape(N, hidden.shape[-1]), labels.reshape(N)  # (N, in_features), (N)
    index = labels.masked_fill(labels == ignore_index, 0).unsqueeze(1)  # (N, 1)
    losses = rows.new_empty(N, dtype=exact)
    gradient = torch.empty_like(rows) if needs_gradient else None
    step = _step(N, classes, hidden.device)
    made = rows.new_empty(step, classes)  # the logits of each chunk in turn
    wide = made if dtype == exact else made.new_empty(step, classes, dtype=exact)
    # The softmax overwrites the capped outputs. The slope of tanh is needed after it, so tanh gets a buffer of its own.
    capped = None if softcap is None else torch.empty_like(wide) if needs_gradient else wide
    for start in range(0, N, step):
        chunk = slice(start, min(start + step, N))
        n = chunk.stop - start
        z, p = made[:n], wide[:n]  # (n, classes)
        if bias is None:
            torch.mm(rows[chunk], weight.T, out=z)
        else:
            torch.addmm(bias, rows[chunk], weight.T, out=z)
        if p.dtype != z.dtype:
            p.copy_(z)
        if softcap is not None and capped is not None:
            t = torch.tanh(p.div_(softcap), out=capped[:n])  # (n, classes)
            torch.mul(t, softcap, out=p)
        # In place: it reads all of a row before it writes, and each value where that value was.
        torch.log_softmax(p, 1, out=p)
        losses[chunk] = F.nll_loss(p, labels[chunk], ignore_index=ignore_index, reduction="none")
        if gradient is not None:
            # 1 is taken from p before it is rounded to z's dtype: close to 1, little of it would be left.
            p.exp_().scatter_add_(1, index[chunk], p.new_full((n, 1), -1))
            if capped is not None:
                p.addcmul_(p, t.square_(), value=-1)  # tanh' = 1 − t²
            torch.mm(z.copy_(p) if p.dtype != z.dtype else p, weight, out=gradient[chunk])
    return losses, gradient


def _step(rows: int, classes: int, device: torch.device) -> int:
    """How many rows go at a time: chunks of equal size, since a small rest would read all of the weight for little."""
    pieces = -(-rows * classes // _LOGITS.get(device.type, _LOGITS_ELSEWHERE))
    return max(1, -(-rows // max(1, pieces)))
