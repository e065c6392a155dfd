"""What do several adapters in one batch cost, to serve and to train?

K adapters of r = 16 in every linear layer but the head of a Llama of 6 layers with 576 features, one row for each.
Served (no gradients): the frozen model, one adapter for all rows, lora's bank, PEFT's `adapter_names`, and PEFT's
`set_adapter` with the rows one after the other. Trained, as forward, backward and AdamW for each adapter: the bank,
against K runs of one adapter each by lora and by PEFT, and PEFT's `set_adapter` in one model; all rows and adapters of
all variants are the same. "Frozen" is forward and backward of all rows at once without any adapter, to the gradient of
the embedded tokens: what no training at once can be below. "135M" is the pretrained model of examples/phi3_chat.py,
adapted in its four projections.

    python benchmarks/bank.py [--quick]
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import peft
import torch
from harness import Case, main
from models import TARGETS, Plan, build
from rivals import assert_equal
from torch import Tensor, nn

import lora

R = 16
F32, BF16 = torch.float32, torch.bfloat16
ADAPTERS = {F32: (4, 8, 32), BF16: (8,)}
TOKENS = (1, 128, 512)
TRAINED = [(8, 16), (8, 128)]
PRETRAINED = [(8, 4), (8, 16), (8, 64)]


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    found: dict[str, Callable[[], Case]] = {}
    few = slice(1) if quick else slice(None)
    for dtype in (F32, BF16):
        kind = str(dtype).removeprefix("torch.")
        for k in ADAPTERS[dtype][few]:
            for tokens in TOKENS[few]:
                found[f"serve {k} adapters, {tokens} tokens, {kind}"] = partial(serve, k, tokens, dtype, quick)
    for k, tokens in TRAINED[few]:
        found[f"train {k} adapters, {tokens} tokens, float32"] = partial(train, "llama", k, tokens, quick)
    for k, tokens in PRETRAINED[few]:
        found[f"train {k} adapters, 135M, {tokens} tokens, float32"] = partial(train, "phi3", k, tokens, quick)
    return found


class Setup:
    """A frozen model, K adapters, a row of tokens for each, and what each library makes of them."""

    def __init__(self, model: str, k: int, tokens: int, dtype: torch.dtype, quick: bool) -> None:
        self.targets = TARGETS[model]
        self.base = build(Plan(model, quick, dtype, "frozen", dtype, 0.0))
        self.names = [f"a{n}" for n in range(k)]
        generator = torch.Generator().manual_seed(0)
        shape = k, max(min(2, tokens), tokens // 16) if quick else tokens
        ids = torch.randint(self.base.config.vocab_size, shape, generator=generator, device="cpu")
        self.ids = ids.to(torch.get_default_device())
        self.adapters = {name: self.adapter(n) for n, name in enumerate(self.names)}

    def adapter(self, seed: int) -> lora.Adapter:
        model = self.with_config()
        generator = torch.Generator().manual_seed(seed)
        adapter = lora.adapter_of(model)
        with torch.no_grad():
            for tensor in adapter.tensors.values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, device="cpu") * 0.02)
        return adapter

    def with_config(self) -> nn.Module:
        model = self.twin()
        settings = {"r": R, "lora_alpha": 2 * R, "target_modules": self.targets}
        lora.inject(model, **settings, adapter_dtype=next(model.parameters()).dtype)
        return model

    def twin(self) -> nn.Module:
        """The base once more, with the same tensors: memory is read as often as it is for one."""
        memo = {id(p): p for p in [*self.base.parameters(), *self.base.buffers()]}
        return copy.deepcopy(self.base, memo)

    def alone(self, name: str) -> nn.Module:
        model = self.twin()
        lora.load_adapter(model, self.copied(name), check_base=False)
        return model

    def copied(self, name: str) -> lora.Adapter:
        adapter = self.adapters[name]
        return lora.Adapter(adapter.modules, {key: tensor.clone() for key, tensor in adapter.tensors.items()})

    def bank(self) -> tuple[nn.Module, lora.AdapterBank]:
        model = self.twin()
        return model, lora.bank(model, {name: self.copied(name) for name in self.names}, check_base=False)

    def peft(self, names: list[str]) -> peft.PeftModel:
        config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=self.targets)
        cast = {"autocast_adapter_dtype": False}
        model = peft.get_peft_model(self.twin(), config, adapter_name=names[0], **cast)
        for name in names[1:]:
            model.add_adapter(name, config, **cast)
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name in names:
                for key, tensor in self.adapters[name].tensors.items():
                    module, _, factor = key.rpartition(".")
                    own[f"base_model.model.{module}.{factor}.{name}.weight"].copy_(tensor)
        return model


@torch.no_grad()
def serve(k: int, tokens: int, dtype: torch.dtype, quick: bool) -> Case:
    setup = Setup("llama", k, tokens, dtype, quick)
    frozen, one = setup.base.eval(), setup.alone(setup.names[0]).eval()
    model, bank = setup.bank()
    model.eval()
    theirs = setup.peft(setup.names).eval()
    ids, names = setup.ids, setup.names

    def with_bank() -> Tensor:
        with bank.rows(names):
            return logits(model, ids)

    def in_turns() -> Tensor:
        rows = []
        for name, row in zip(names, ids, strict=True):
            theirs.set_adapter(name)
            rows.append(logits(theirs, row[None]))
        return torch.cat(rows)

    variants = {
        "frozen": partial(logits, frozen, ids),
        "lora, one adapter": partial(logits, one, ids),
        "lora, bank": with_bank,
        "PEFT, adapter_names": partial(logits, theirs, ids, adapter_names=names),
        "PEFT, set_adapter": in_turns,
    }
    if dtype == F32:  # in bfloat16 the models' own rounding is larger
        assert_equal([with_bank().float(), variants["PEFT, adapter_names"]().float(), in_turns().float()])
    return Case({name: partial(without_gradients, run) for name, run in variants.items()}, charted=dtype == F32)


@torch.no_grad()
def without_gradients(run: Callable[[], Tensor]) -> Tensor:
    return run()


def logits(model: nn.Module, ids: Tensor | None = None, **options: object) -> Tensor:
    return model(input_ids=ids, use_cache=False, **options).logits


def train(model: str, k: int, tokens: int, quick: bool) -> Case:
    setup = Setup(model, k, tokens, F32, quick)
    names, rows = setup.names, setup.ids.split(1)
    banked, bank = setup.bank()
    banked.train()
    own = {name: optimizer_of(bank.parameters(name)) for name in names}

    def all_at_once() -> list[float]:
        with bank.rows(names):
            losses = losses_of(logits(banked, setup.ids), setup.ids)
            losses.sum().backward()
        for optimizer in own.values():
            optimizer.step()
            optimizer.zero_grad()
        return losses.tolist()

    runs = [Run(setup.alone(name), row) for name, row in zip(names, rows, strict=True)]
    theirs = [Run(setup.peft([name]), row) for name, row in zip(names, rows, strict=True)]
    several = setup.peft(names)
    factors = {name: [p for key, p in several.named_parameters() if f".{name}." in key] for name in names}
    optimizers = {name: optimizer_of(factors[name]) for name in names}

    def in_turns() -> list[float]:
        losses = []
        for name, row in zip(names, rows, strict=True):
            several.set_adapter(name)
            losses.append(step_of(several, row, optimizers[name]))
        return losses

    variants: dict[str, Callable[[], list[float]]] = {
        "lora, K runs": lambda: [run.step() for run in runs],
        "lora, bank": all_at_once,
        "PEFT, K runs": lambda: [run.step() for run in theirs],
        "PEFT, set_adapter": in_turns,
    }
    first = [torch.tensor(step()) for step in variants.values()]  # with the same adapters, before the first step
    for losses in first[1:]:
        torch.testing.assert_close(losses, first[0], rtol=1e-4, atol=0)
    embed = setup.base.get_input_embeddings()

    def frozen() -> list[float]:
        x = embed(setup.ids).detach().requires_grad_()
        losses = losses_of(logits(setup.base, inputs_embeds=x), setup.ids)
        losses.sum().backward()
        return losses.tolist()

    return Case({**variants, "frozen, all rows": frozen})


class Run:
    """One adapter's training, alone."""

    def __init__(self, model: nn.Module, row: Tensor) -> None:
        self.model, self.row = model.train(), row
        self.optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])

    def step(self) -> float:
        return step_of(self.model, self.row, self.optimizer)


def step_of(model: nn.Module, row: Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss = losses_of(logits(model, row), row).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def losses_of(scores: Tensor, ids: Tensor) -> Tensor:
    """The mean loss of each row (rows), from its scores (rows, tokens, words)."""
    each = nn.functional.cross_entropy(scores[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return each.mean(1)


def optimizer_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


if __name__ == "__main__":
    main(__file__, __doc__, cases)
