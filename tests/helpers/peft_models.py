"""What the tests against PEFT share: a model with a layer of every kind, adapted by us or by PEFT."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

import lora

#: What PEFT and transformers warn of, and is none of our business.
QUIET = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]
PREFIX = "base_model.model."
FORMATS = ["peft", "portable"]


class Net(nn.Module):
    """A layer of every kind; names that are ends of other names."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.qkv = nn.Linear(6, 12)
        self.o = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"o": nn.Linear(6, 6), "norm": nn.LayerNorm(6)})
        self.conv1 = nn.Conv1d(6, 4, 3, stride=2, padding=2, groups=2)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), padding=(1, 2), stride=(1, 2), bias=False)
        self.conv3 = nn.Conv3d(4, 4, (1, 2, 1), stride=(1, 2, 1), groups=4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        x = self.emb(ids)  # (N, L, 6)
        q, k, v = self.qkv(x).split((6, 4, 2), -1)
        x = self.o(q) + q * k.sum(-1, keepdim=True) * v.sum(-1, keepdim=True).tanh()
        x = self.block["norm"](x + self.block["o"](x))
        z = self.conv1(x.transpose(1, 2))  # (N, 4, L')
        y = self.conv3(self.conv2(x[:, None])[:, :, None])  # (N, 4, 1, ·, ·)
        return self.head(z.mean(-1) + y.mean((-3, -2, -1)))


IDS = torch.tensor([[1, 2, 3, 10, 4, 5, 6], [0, 0, 7, 8, 9, 1, 2]])
TARGETS = ["emb", "qkv", "o", "conv1", "conv2", "conv3"]  # "o" is block.o as well
MERGEABLE = ["emb", "qkv", "o", "conv2"]  # with groups, PEFT's own adapters are of no weight that the layer can have
SPLITS = {"splits": {"qkv": (6, 4, 2)}, "enable_lora": {"qkv": (True, False, True)}}


@torch.no_grad()
def train(model, std=0.4):
    """Random values, in eval(), for all that trains."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape) * std)
    return model.eval()


def adapted(base, **fields):
    model = copy.deepcopy(base)
    fields = {"target_modules": TARGETS, "r": 4, "lora_alpha": 6, "factored": True, **SPLITS} | fields
    lora.inject(model, **fields)
    return train(model)


def theirs(base, path):
    """PEFT's model of this folder; it complains of keys that it misses by warnings, which are errors here."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), path).eval()


def by_peft(base, path, **fields):
    """A model that PEFT adapted, trained at random and saved."""
    model = train(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields)))
    model.save_pretrained(path, save_embedding_layers=False)
    return model


@torch.no_grad()
def same(ours, others, base, eps=2e-6):
    """Equal outputs within rounding, and none of the base model's."""
    got, expected, plain = ours(IDS), others(IDS), base.eval()(IDS)
    got, expected, plain = (x.logits if hasattr(x, "logits") else x for x in (got, expected, plain))
    scale = expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=20 * eps, atol=20 * eps * scale)
    assert (expected - plain).abs().max() > 0.05 * scale


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config).eval()
