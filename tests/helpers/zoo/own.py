"""torch's own transformers, and small modules that read weights as those of packages do that need not be installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.rows import DEAD, Row, ids, in_peft, random


class Seen(nn.Module):
    """As timm's BEiT and EVA-02: the bias of the fused projection is put together, and its weight read for it."""

    def __init__(self, normed: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(16))
        self.proj, self.normed = nn.Linear(16, 16), normed

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, weight=self.qkv.weight, bias=bias).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.normed:  # as Swin V2
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Windows(nn.Module):
    """As torchvision's Swin: a function of the file is given the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return window_attention(x, self.qkv.weight, self.proj.weight, self.qkv.bias, self.proj.bias)


def window_attention(x: Tensor, qkv: Tensor, proj: Tensor, qkv_bias: Tensor, proj_bias: Tensor) -> Tensor:
    q, k, v = F.linear(x, qkv, qkv_bias).chunk(3, -1)
    return F.linear(F.scaled_dot_product_attention(q, k, v), proj, proj_bias)


class Pooling(nn.Module):
    """As open_clip's ResNet: torch's function for attention is given the weights of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.c_proj = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)  # (L, N, 16)
        y, _ = F.multi_head_attention_forward(
            query=x.mean(0, keepdim=True),
            key=x,
            value=x,
            embed_dim_to_check=16,
            num_heads=2,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            in_proj_weight=None,  # type: ignore[arg-type]
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )
        return y[0]


class Proteins(nn.Module):
    """As fair-esm's attention without rotary embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.out_proj = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        y, weights = F.multi_head_attention_forward(
            x, x, x, 16, 2, torch.empty([0]), torch.cat((self.q_proj.bias, self.k_proj.bias, self.v_proj.bias)),
            None, None, False, 0.0, self.out_proj.weight, self.out_proj.bias, self.training, None, True, None,
            use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return y + weights.mean()


class StdConv2d(nn.Conv2d):
    """As timm's: each filter is standardised."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Conv2dSame(nn.Conv2d):
    """As timm's: padded as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = (-side % stride + 2 for side, stride in zip(x.shape[-2:], self.stride, strict=True))
        x = F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class CausalConv1d(nn.Conv1d):
    """As speech models': what comes later is not seen."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class ChannelsLast(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = Conv2dSame(3, 8, 3, stride=2), StdConv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.stem(x).relu())


class Sounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.causal, self.last = CausalConv1d(4, 8, 3, dilation=2), ChannelsLast(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.causal(x).relu().transpose(1, 2))


class Diffused(nn.Module):
    """As diffusers' Attention, whose projections can be fused; its processor is no module, and is given it."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(16, 16), nn.Dropout(0.0)])
        self.processor: Callable[..., Tensor] = separately
        if fused:
            self.fuse_projections()

    def fuse_projections(self) -> None:
        self.to_qkv = nn.Linear(16, 48, bias=False)
        self.to_qkv.weight.data.copy_(torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight]).data)
        self.processor = fused

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


def separately(attn: Diffused, x: Tensor) -> Tensor:
    return attend(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x))


def fused(attn: Diffused, x: Tensor) -> Tensor:
    return attend(attn, *attn.to_qkv(x).chunk(3, -1))


def attend(attn: Diffused, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(q, k, v)
    for module in attn.to_out:
        y = module(y)
    return y


class Words(nn.Module):
    """As models with a fused loss: the head is never called, and a function is given its weight, in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.lm_head = nn.Embedding(64, 16), nn.Linear(16, 16), nn.Linear(16, 64, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.up(self.words(input_ids)).tanh()
        return cross_entropy_in_parts(h[:, :-1], self.lm_head.weight, input_ids[:, 1:])


def cross_entropy_in_parts(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = torch.cat([h @ part.t() for part in weight.split(16)], -1)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Recurrent(nn.Module):
    """Between recurrent layers, which "all-linear" leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(16, 16, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def alone(make: Callable[[], nn.Module], name: str, *shape: int, **about: Any) -> Row:
    """A row for a module, which is given random numbers by this name."""
    return Row(make, lambda: {name: random(*shape)}, **about)


FAST = "torch's encoder takes its fast path in eval() where none of its weights trains, and PEFT's LoRA is not in it"
PADDED = in_peft("PEFT's convolution of x goes without what this forward pads")
DILATED = in_peft("PEFT's convolution of x goes without the dilation, which is an error here")
ROWS = {
    "torch's encoder": alone(encoder, "src", 2, 5, 16, faults=in_peft(FAST)),
    "torch's encoder, with its attention": alone(
        encoder, "src", 2, 5, 16, targets=["self_attn", "linear1", "linear2"], faults=in_peft(FAST)
    ),
    "torch's transformer": Row(
        lambda: nn.Transformer(16, 2, 1, 1, 24, batch_first=True),
        lambda: {"src": random(2, 5, 16), "tgt": random(2, 4, 16)},
        faults=in_peft(DEAD),
    ),
    "torch's LSTM": alone(Recurrent, "x", 2, 5, 16),
    "timm's BEiT": alone(Seen, "x", 2, 5, 16, faults=in_peft(DEAD)),
    "timm's Swin V2": alone(lambda: Seen(normed=True), "x", 2, 5, 16, faults=in_peft(DEAD)),
    "torchvision's Swin": alone(Windows, "x", 2, 5, 16, faults=in_peft(DEAD)),
    "open_clip's pooling": alone(Pooling, "x", 2, 5, 16, faults=in_peft(DEAD)),
    "fair-esm": alone(Proteins, "x", 2, 5, 16, faults=in_peft(DEAD)),
    "timm's convolutions": alone(Pictures, "x", 2, 3, 9, 9, targets=["stem", "conv"], faults=PADDED),
    "causal convolutions": alone(Sounds, "x", 2, 4, 9, targets=["causal", "last"], faults=DILATED),
    "diffusers' attention": alone(Diffused, "x", 2, 5, 16),
    "diffusers' attention, fused": alone(lambda: Diffused(fused=True), "x", 2, 5, 16, unused="to_[qkv]"),
    "a fused loss": Row(Words, lambda: {"input_ids": ids(2, 6)}, faults=in_peft(DEAD)),
}
